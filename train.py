"""Trains a U2++ model: python train.py --data_root data/demo --output_dir runs/demo --preset tiny

Writes OUTPUT_DIR/best.ckpt and last.ckpt (best and newest), run.json (what was run, and its metrics), steps.jsonl (loss and
rows of every update), skipped.jsonl (updates that the guard skipped) and TensorBoard logs.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import warnings

from cli import (
    SPARING,
    UserError,
    build,
    keep_freed_memory,
    make_parser,
    option,
    options_class,
    run,
    shown,
)

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info

from conformer import PRESETS, ModelOptions
from datamodule import DataOptions, SpeechDataModule, rows_rate
from files import ASIDE, alone, aside, check_utf8, json_text, read_json, write_whole
from model import U2, OptimOptions, read_checked
from recovery import (
    Average,
    BestCheckpoint,
    LastCheckpoint,
    MemoryCheck,
    Place,
    WholeFiles,
    check_plan,
    check_state,
    cut_log,
    find_place,
    make_plan,
    one_line_endings,
)
from sampler import check_share
from tokenizer import check_maker, load_tokenizer
from transforms import Augment, Frontend, read_cmvn

LOCK = ".lock"
OUTPUTS = (
    "best.ckpt",
    "last.ckpt",
    "run.json",
    "scores.jsonl",
    "skipped.jsonl",
    "steps.jsonl",
    "logs",
)  # --overwrite removes


@options_class
class RunOptions:
    """The run: where, how long, on what."""

    data_root: tuple[str, ...] = option(("data/demo",), "data roots that prepare.py made")
    output_dir: str = option("runs/demo", "where checkpoints, logs and run.json go")
    preset: str = option(
        "tiny", "size of the model; single numbers can be overridden", choices=tuple(PRESETS)
    )
    init_from: str | None = option(
        None, "start from this checkpoint's weights, model options and frontend (fine-tuning)"
    )
    cmvn: str | None = option(
        None, "global_cmvn file for fbank; default: computed over train, or that of --init_from"
    )
    tokenizer: str | None = option(
        None,
        "tokenizer.json, vocab.json, transformers folder or .ckpt; default DATA_ROOT/tokenizer.json",
    )
    max_epochs: int = option(
        20, "epochs, unless --max_steps comes first", at_least=-1, at_most=10**6
    )
    max_steps: int = option(-1, "updates, -1 for no limit", at_least=-1, at_most=10**9)
    accumulate_grad_batches: int = option(1, "batches per update", at_least=1, at_most=10**6)
    gradient_clip_val: float = option(
        5.0, "largest gradient norm, 0 for no clipping", at_least=0.0, at_most=1e6
    )
    precision: str = option("32", "arithmetic", choices=("32", "16-mixed", "bf16-mixed", "16"))
    accelerator: str = option("auto", "Lightning's accelerator: auto, cpu, gpu ...")
    devices: str = option("auto", "number of devices, or Lightning's list of them")
    num_nodes: int = option(1, "machines", at_least=1, at_most=10**4)
    strategy: str = option("auto", "Lightning's strategy: auto, ddp, ...")
    seed: int = option(
        0, "seed of weights, plan, augmentation, dropout and chunks", at_least=0, at_most=2**32 - 1
    )
    ema_decay: float = option(
        0.0,
        "validate and keep an exponential average of the weights, e.g. 0.998; 0: off",
        at_least=0.0,
        at_most=0.999999,
    )
    check_val_every_n_epoch: int = option(
        1, "epochs between validations", at_least=1, at_most=10**6
    )
    checkpoint_every_n_steps: int | None = option(
        None, "also write last.ckpt every so many updates", at_least=1, at_most=10**9
    )
    checkpoint_every_n_minutes: float | None = option(
        None, "also write last.ckpt every so many minutes", at_least=0.0, at_most=1e6
    )

    def __post_init__(self):
        if 0 in (self.max_epochs, self.max_steps) or self.max_epochs == self.max_steps == -1:
            raise UserError(
                f"--max_epochs {self.max_epochs} --max_steps {self.max_steps}: a run needs an end, and a step"
            )
        if not self.data_root:
            raise UserError("--data_root: give at least one")


OPTIONS = RunOptions, DataOptions, ModelOptions, OptimOptions, Augment, Frontend
# What a run that goes on elsewhere does not take over.
OF_THE_MACHINE = "output_dir", "accelerator", "devices", "num_nodes", "strategy", "num_workers"


def parse(argv):
    parser = make_parser(__doc__, *OPTIONS)
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        nargs="?",
        const="",
        type=str,
        metavar="CKPT",
        default=argparse.SUPPRESS,
        help="go on, from OUTPUT_DIR/last.ckpt unless named; what is not given is "
        "as the run had it",
    )
    again.add_argument("--overwrite", action="store_true", help="replace an existing run")
    return vars(parser.parse_args(argv))


def main(argv):
    given = parse(argv)
    folder, resume = find_run(given)
    checkpoint = read_resumable(resume) if resume else {}
    before = options_of(checkpoint)
    options = build(RunOptions, given, **{**before, "output_dir": folder})
    source = read_checked(options.init_from) if options.init_from and not resume else None
    check_options(options.init_from, source or {})
    sizes = (
        before
        if resume and "preset" not in given
        else source["model_options"]
        if source
        else PRESETS[options.preset]
    )
    model_options, optim = build(ModelOptions, given, **sizes), build(OptimOptions, given, **before)
    heard = (
        source["frontend"] if source else before or {"sample_rate": rows_rate(options.data_root)}
    )
    frontend = build(Frontend, given, **heard)
    augment, data_options = (
        build(Augment, given, **before),
        build(DataOptions, without_rivals(given, before)),
    )
    check(options)
    check_unused(given, options, frontend)
    check_source(options.init_from, source, model_options, frontend)
    check_sources_stay(options, given["overwrite"])
    tokenizer = read_tokenizer(options.tokenizer, options.data_root[0])
    place = (
        check_resume(resume, checkpoint, given, before, options, model_options, frontend, tokenizer)
        if resume
        else Place()
    )

    if optim.gradient_checkpointing:
        keep_freed_memory(SPARING)
    L.seed_everything(options.seed, workers=False, verbose=False)
    data = SpeechDataModule(
        data_roots=options.data_root,
        tokenizer=tokenizer,
        frontend=frontend,
        augment=augment,
        options=data_options,
        input_layer=model_options.input_layer,
        seed=options.seed,
    )
    data.start_batch = place.batches
    data.setup("fit")  # before Lightning says anything: what is wrong with the data is one line
    everything = {
        name: value
        for some in (options, data_options, model_options, optim, augment, frontend)
        for name, value in dataclasses.asdict(some).items()
    }
    start = Start(folder, given["overwrite"], place, {**everything, **given})
    trainer = make_trainer(
        options,
        start,
        {name: value for name, value in everything.items() if name not in OF_THE_MACHINE},
    )
    check_processes(trainer, data)
    check_plan(place, make_plan(data, trainer.world_size, options.accumulate_grad_batches), data)
    if place.batches > data.train_batches(trainer.world_size):
        raise UserError(
            f"{resume}: it was saved behind {place.batches} batches of an epoch, which has not as many; resume on the "
            "data that it was made with"
        )
    model = U2(
        options=model_options,
        optim=optim,
        frontend=frontend,
        tokenizer=tokenizer,
        seed=options.seed,
        total_steps=count_steps(options, data, trainer.world_size, place),
        skip_log=os.path.join(folder, "skipped.jsonl"),
        step_log=os.path.join(folder, "steps.jsonl"),
    )
    if resume:
        say_schedule(checkpoint, model, place)
    else:
        prepare_weights(model, source, options.cmvn, data)
    alone_there = only_writer(folder) if trainer.is_global_zero else contextlib.nullcontext()
    with alone_there, one_line_endings(trainer, folder, lambda: start.begun):
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
        start.record or start.begin(trainer, model)  # where a resumed run had nothing left to train
        best = save_best(trainer, model, data)
        if trainer.is_global_zero:
            finish(trainer, model, best, folder, start.record)


def find_run(given: dict) -> tuple[str, str | None]:
    """OUTPUT_DIR and the checkpoint to resume from, or None. Raises UserError where another run lies there: a run is touched
    by its own continuation or by --overwrite alone."""
    named = given.get("resume")
    if named and os.path.isdir(named):
        named = os.path.join(named, "last.ckpt")
    folder = given.get("output_dir") or (
        os.path.dirname(named) or "." if named else RunOptions.output_dir
    )
    resume = None if named is None else named or os.path.join(folder, "last.ckpt")
    if any(
        os.environ.get(name, "0") != "0"
        for name in ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    ):
        return folder, resume  # the process of rank 0 has checked, and may have begun to write
    check_place(folder)
    there = os.listdir(folder) if os.path.isdir(folder) else ()
    # What is left of a run that was killed before it began does not count.
    there = [
        name
        for name in there
        if name not in (LOCK, "logs") and not name.endswith((ASIDE, f"{ASIDE}.lock"))
    ]
    if not there or given["overwrite"]:
        return folder, resume
    if resume is None:
        raise UserError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it, or choose "
            "another --output_dir"
        )
    if os.path.exists(resume) and not os.path.samefile(os.path.dirname(resume) or ".", folder):
        raise UserError(
            f"{folder} holds another run than {resume}; leave out --output_dir to go on where that is, or choose "
            "an empty one"
        )
    return folder, resume


def check_place(folder: str) -> None:
    """UserError where the run could not write all of its files. Looks only: nothing is written or removed yet."""
    check_utf8(folder, "--output_dir", "TensorBoard")
    there = folder
    while True:
        try:
            os.lstat(there)
            break
        except FileNotFoundError:
            there = os.path.dirname(there) or "."
        except (OSError, ValueError) as error:  # too long a name, or none at all
            raise UserError(
                f"--output_dir {folder}: cannot be made ({error}); choose another"
            ) from error
    refuse(there, "folder", folder)
    halves = [aside(name) for name in ("best.ckpt", "last.ckpt", "run.json")]
    locks = [LOCK, *(f"{name}.lock" for name in halves)]
    for name in (*OUTPUTS, *halves, *locks) if there == folder else ():
        if os.path.lexists(path := os.path.join(folder, name)):
            if os.path.islink(path):
                raise UserError(
                    f"--output_dir {folder}: {path} is a link; move it away, or choose another"
                )
            refuse(path, "folder" if name == "logs" else "file", folder)
            if name in locks and os.path.getsize(path):
                raise UserError(
                    f"--output_dir {folder}: {path} is no lock, which would be empty; "
                    "move it away, or choose another"
                )
            for log in files_of(path) if name == "logs" else ():
                refuse(os.path.dirname(log), "folder", folder)


def refuse(path: str, kind: str, folder: str) -> None:
    """UserError where `path` is no such kind of thing, or may not be changed."""
    if not (os.path.isdir if kind == "folder" else os.path.isfile)(path):
        raise UserError(
            f"--output_dir {folder}: {path} is no {kind}; move it away, or choose another"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK * (kind == "folder")):
        raise UserError(
            f"--output_dir {folder}: {path} cannot be written, or not be read; choose another"
        )


def options_of(checkpoint: dict) -> dict:
    """All options of the run that a checkpoint is from; those of an older version's checkpoint are not all in it."""
    parts = ("model_options", "optim_options", "frontend", "run_options")
    options = {}
    for part in parts:
        if not isinstance(found := checkpoint.get(part, {}), dict):
            raise UserError(f"its {part} are damaged; get it again, or name another checkpoint")
        options |= found
    return options


def without_rivals(given: dict, before: dict) -> dict:
    """What was given over what the run had, without what it had instead: one of --batch_size and --max_batch_seconds."""
    rivals = {"batch_size": "max_batch_seconds", "max_batch_seconds": "batch_size"}
    return {
        **{name: value for name, value in before.items() if rivals.get(name) not in given},
        **given,
    }


def check(options: RunOptions) -> None:
    """Refuses in one line what would fail late or not at all as asked."""
    if options.strategy.startswith("fsdp"):
        if not torch.cuda.is_available():
            raise UserError("--strategy fsdp shards over GPUs and none is here; leave it out")
        if options.gradient_clip_val or options.ema_decay:
            raise UserError(
                "--strategy fsdp neither clips by norm nor averages through Lightning; add "
                "--gradient_clip_val 0 --ema_decay 0"
            )
    if options.precision in ("16", "16-mixed") and not torch.cuda.is_available():
        print("note: 16-mixed on a CPU: Lightning turns it into bf16-mixed", flush=True)


def check_unused(given: dict, options: RunOptions, frontend: Frontend) -> None:
    """Refuses flags that would have no effect beside the others."""
    without = {"freeze_encoder_epochs"} if options.init_from is None else {"preset"}
    for names, reason in (
        (
            ("window", "mean_var_norm")
            if frontend.frontend == "fbank"
            else ("dither", "cmvn", "high_freq"),
            f"with --frontend {frontend.frontend}",
        ),
        (without, "without --init_from" if options.init_from is None else "with --init_from"),
    ):
        for name in names:
            if name in given:
                raise UserError(f"--{name} has no effect {reason}; leave it out")


def check_sources_stay(options: RunOptions, overwrite: bool) -> None:
    """UserError where --overwrite would delete what the run is made from."""
    doomed = [
        os.path.realpath(os.path.join(options.output_dir, name)) for name in OUTPUTS if overwrite
    ]
    for name in ("init_from", "tokenizer", "cmvn"):
        path = getattr(options, name)
        if path and any(
            os.path.realpath(path) == one or os.path.realpath(path).startswith(one + os.sep)
            for one in doomed
        ):
            raise UserError(
                f"--{name} {path} is part of the run that --overwrite replaces; choose another --output_dir"
            )


def check_source(
    path: str | None, source: dict | None, model_options: ModelOptions, frontend: Frontend
) -> None:
    """UserError where the weights of --init_from would not fit, or would meet features that are all others."""
    free = {
        "dropout_rate",
        "attention_dropout_rate",
        "ctc_weight",
        "lsm_weight",
        "length_normalized_loss",
        "use_dynamic_chunk",
        "use_dynamic_left_chunk",
        "high_freq",
    }  # what shapes no weight, or can be learnt anew
    for name, (saved, asked) in (
        differences(source, model_options, frontend).items() if source else ()
    ):
        if name not in free:
            raise UserError(f"--{name} {asked}: {path} was made with {saved}; leave it out")


def differences(
    checkpoint: dict, model_options: ModelOptions, frontend: Frontend
) -> dict[str, tuple]:
    """{name: (the checkpoint's value, the one asked for)} of the model options and the frontend's that are not the same."""
    asked = dataclasses.asdict(model_options) | dataclasses.asdict(frontend)
    saved = dataclasses.asdict(ModelOptions()) | dataclasses.asdict(
        Frontend()
    )  # of options that are newer than it
    saved |= checkpoint["model_options"] | checkpoint["frontend"]
    return {name: (saved[name], value) for name, value in asked.items() if saved[name] != value}


def prepare_weights(
    model: U2, source: dict | None, cmvn: str | None, data: SpeechDataModule
) -> None:
    """Before the first step: weights of --init_from, global CMVN of fbank."""
    if source:
        known = model.init_from(source)
        rank_zero_info(
            f"fine-tuning: {known} of {model.tokenizer.vocab_size} tokens known, the others initialised"
        )
    if cmvn:
        mean, istd = read_cmvn(cmvn)
        if len(mean) != model.frontend.num_mel_bins:
            raise UserError(
                f"--cmvn {cmvn}: it is for {len(mean)} mel bins, not {model.frontend.num_mel_bins}"
            )
        model.set_cmvn(mean, istd)
    elif model.frontend.frontend == "fbank" and not source:
        model.set_cmvn(*data.cmvn())


def read_tokenizer(path: str | None, data_root: str):
    """The tokenizer that made the labels: the one named, or DATA_ROOT's own; UserError where both are there and differ."""
    if not os.path.isdir(data_root):
        raise UserError(f"{data_root}: no such data root; prepare.py makes one")
    own = os.path.join(data_root, "tokenizer.json")
    if path is None and not os.path.lexists(own):
        raise UserError(
            f"{own}: no such file; name a data root that prepare.py made, or say with "
            "--tokenizer PATH what made the labels"
        )
    tokenizer = load_tokenizer(path or own)
    check_maker(tokenizer, f"--tokenizer {path}", data_root)
    return tokenizer


def read_resumable(path: str) -> dict:
    checkpoint = read_checked(path)
    if "loops" not in checkpoint:
        raise UserError(
            f"{path} has no state of training to go on from; --init_from starts a new run from its weights"
        )
    check_options(path, checkpoint)
    check_state(path, checkpoint)
    return checkpoint


def check_options(path: str, checkpoint: dict) -> None:
    """UserError, naming `path`, where the options in a checkpoint are none."""
    try:
        for kind in OPTIONS:
            build(kind, {}, **options_of(checkpoint))
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def check_resume(
    path: str,
    checkpoint: dict,
    given: dict,
    before: dict,
    options: RunOptions,
    model_options: ModelOptions,
    frontend: Frontend,
    tokenizer,
) -> Place:
    """Where the checkpoint left its run, and a note of the options that change from there on; UserError where it belongs to
    another model, frontend or tokenizer, or where an option would change nothing any more."""
    differ = [
        f"{name} {saved}, not {asked}"
        for name, (saved, asked) in differences(checkpoint, model_options, frontend).items()
    ]
    if differ:
        raise UserError(
            f"{path} was made with {'; '.join(differ)}; give the options that it was made with"
        )
    if checkpoint["tokenizer"] != tokenizer.to_dict():
        raise UserError(
            f"{path} was made with another tokenizer than this data; resume on the data that it was made with"
        )
    for name in ("init_from", "cmvn"):
        if name in given and given[name] != before.get(name):
            raise UserError(
                f"--{name} has no effect with --resume: {path} has its weights already; leave it out"
            )
    if (
        "averaging_state" in checkpoint and not options.ema_decay
    ):  # (an older checkpoint does not say its decay)
        raise UserError(
            f"--ema_decay 0: {path} averages its weights; give its decay, or start anew with --init_from {path}"
        )
    changed = [
        f"--{name} {given[name]} (before: {value})"
        for name, value in before.items()
        if name in given and as_list(given[name]) != as_list(value)
    ]
    place = find_place(path, checkpoint)
    reached = [
        f"--{name} {most}"
        for name, most, done in (
            ("max_epochs", options.max_epochs, place.epochs),
            ("max_steps", options.max_steps, place.updates),
        )
        if -1 < most <= done
    ]
    if reached and (changed or place.epochs > options.max_epochs > -1):
        raise UserError(
            f"{path} has done {place.epochs} epochs and {place.updates} updates: {' '.join(reached)} leaves nothing to "
            "train, and no other option would have an effect; give more"
        )
    if changed:
        rank_zero_info(f"note: {path} goes on with {', '.join(changed)}")
    return place


def as_list(value):
    return list(value) if isinstance(value, tuple) else value


def say_schedule(checkpoint: dict, model: U2, place: Place) -> None:
    """A note where a onecycle run's length has changed, and with it the learning rate."""
    planned = (
        checkpoint["lr_schedulers"][0].get("total_steps", 0) - 1
    )  # (+ 1: see configure_optimizers)
    if (
        model.optim.scheduler == "onecycle"
        and planned not in (-1, model.total_steps)
        and model.total_steps > place.updates
    ):
        rank_zero_info(
            f"note: the learning rate was planned for {planned} updates and is now for {model.total_steps}: from "
            f"update {place.updates} on it goes on as if it had always been. For a new cycle from these weights: "
            f"--init_from {place.path} --output_dir ANOTHER"
        )


@contextlib.contextmanager
def only_writer(folder: str):
    """Keeps other trainings out of `folder`. Raises UserError where one is there."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be made ({error.strerror}); choose another"
        ) from error
    logs = os.path.join(folder, "logs")
    before = files_of(logs)
    try:
        with alone(os.path.join(folder, LOCK), f"--output_dir {folder}"):
            probe = aside(os.path.join(folder, "probe"))
            # On a full disk this fails, before anything is deleted or TensorBoard's thread starts.
            write_whole(probe, bytes(2**16))
            os.remove(probe)
            yield
    finally:
        if not os.path.exists(
            os.path.join(folder, "run.json")
        ):  # the run failed before it began: its log is empty
            for path in set(files_of(logs)) - set(before):
                os.remove(path)
        for path in (logs, folder):
            with contextlib.suppress(OSError):
                os.rmdir(path)


class Start(L.Callback):
    """What is written and deleted before the first update, when nothing can be refused any more: an attempt that fails before
    leaves everything as it was."""

    def __init__(self, folder: str, overwrite: bool, place: Place, options: dict):
        self.folder, self.place, self.options, self.record = folder, place, options, None
        self.begun = False
        # Listed now, because Lightning begins the new log before it says that training starts.
        self.old = [
            path for name in OUTPUTS if overwrite for path in files_of(os.path.join(folder, name))
        ]

    def on_train_start(self, trainer, module):
        self.begin(trainer, module)

    def begin(self, trainer, module):
        self.begun = True
        if not trainer.is_global_zero:
            return
        clear_output(self.folder, self.old, self.place.updates)
        metrics = read_metrics(self.folder) if self.place.path else {}
        self.record = write_run(self.folder, {"options": self.options, "metrics": metrics})
        print(
            f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters, vocabulary {module.tokenizer.vocab_size}, "
            f"{module.total_steps} updates planned"
        )


def read_metrics(folder: str) -> dict:
    """Those of run.json, which stay until there are others."""
    try:
        metrics = read_json(os.path.join(folder, "run.json")).get("metrics")
    except (OSError, ValueError):
        metrics = None
    return metrics if isinstance(metrics, dict) else {}


def files_of(path: str) -> list[str]:
    """The file `path`, or TensorBoard's within the folder `path`, where others may put their own logs."""
    within = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name.startswith(("events.out.tfevents", "hparams.yaml"))
    ]
    return within or [path] * os.path.isfile(path)


def clear_output(folder: str, old: list[str], step: int) -> None:
    """Removes what the run will not go on with: the files `old`, half-written ones, log lines from `step` on (a killed run
    wrote them after its last checkpoint, and they will come again)."""
    half = (aside(os.path.join(folder, name)) for name in OUTPUTS)
    for path in (*old, *half):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    for name in ("steps.jsonl", "skipped.jsonl"):
        if os.path.exists(os.path.join(folder, name)):
            cut_log(os.path.join(folder, name), step)


def make_trainer(options: RunOptions, start: Start, to_keep: dict) -> L.Trainer:
    """`to_keep`: the options that go into the checkpoints."""
    folder = options.output_dir
    warnings.filterwarnings(
        "ignore",
        message=".*(does not have many workers|exists and is not empty|smaller than the logging "
        "interval|LeafSpec|dataloader is not resumable).*",
    )  # ours is resumable, in its own way
    best = BestCheckpoint(os.path.join(folder, "best.ckpt"))
    last = LastCheckpoint(
        os.path.join(folder, "last.ckpt"),
        options.checkpoint_every_n_steps,
        options.checkpoint_every_n_minutes,
        to_keep,
    )
    callbacks = [
        MemoryCheck(),
        start,
        TQDMProgressBar(refresh_rate=10),
        LearningRateMonitor("step"),
    ]
    if options.ema_decay:
        callbacks.append(Average(options.ema_decay))
    try:
        return L.Trainer(
            max_epochs=options.max_epochs,
            max_steps=options.max_steps,
            precision=options.precision,
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=options.gradient_clip_val or None,
            check_val_every_n_epoch=options.check_val_every_n_epoch,
            callbacks=callbacks + [best, last],
            plugins=[WholeFiles()],
            logger=TensorBoardLogger(folder, name="logs", version=""),
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_model_summary=False,
        )
    except Exception as error:  # it has a dozen kinds for values of --accelerator, --devices, --strategy that are none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"Lightning refuses these options: {reason}") from error


def check_processes(trainer: L.Trainer, data: SpeechDataModule) -> None:
    """UserError where torchrun has started other processes than Lightning is told of, or where one would have no rows."""
    told, there = trainer.num_devices * trainer.num_nodes, os.environ.get("WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ and there != str(
        told
    ):  # each would be a run of its own, or wait for others
        raise UserError(
            f"torchrun has started {there} processes, but --devices {trainer.num_devices} times --num_nodes "
            f"{trainer.num_nodes} is {told}; give --devices NPROC_PER_NODE --num_nodes NNODES"
        )
    for split, rows in (("train", data.kept), ("dev", data.splits["dev"])):
        check_share(len(rows), trainer.world_size, split)


def count_steps(options: RunOptions, data: SpeechDataModule, world_size: int, place: Place) -> int:
    """Updates of the whole run, from the data and, of a resumed run, those that were: OneCycleLR must know its length
    beforehand.

    (Lightning's own estimate, trainer.estimated_stepping_batches, loads the data loaders early and drops their state.)
    """
    batches, rest = data.train_batches(world_size), 0
    epochs = options.max_epochs - place.epochs
    if place.batches:
        epochs, rest = (
            epochs - 1,
            math.ceil((batches - place.batches) / options.accumulate_grad_batches),
        )
    limits = [
        place.updates + rest + epochs * math.ceil(batches / options.accumulate_grad_batches)
        if options.max_epochs != -1
        else math.inf,
        options.max_steps if options.max_steps != -1 else math.inf,
    ]
    return max(1, min(limits))


def commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def write_run(folder: str, record: dict) -> dict:
    """OUTPUT_DIR/run.json, whole or not at all."""
    record = {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "seed": record["options"]["seed"],
        **record,
    }
    write_whole(os.path.join(folder, "run.json"), json_text(record, indent=1).encode())
    return record


def save_best(trainer, model, data) -> float:
    """The best mean CER. A run that ended between two validations is validated once more, so best.ckpt is always there."""
    if model.validated_step != trainer.global_step:
        trainer.validate(model, datamodule=data, verbose=False)
    return next(
        callback.score
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, BestCheckpoint)
    )


def finish(trainer, model, best, folder, record) -> None:
    metrics = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val_")
    }
    record["metrics"] = {
        **metrics,
        "best_val_cer_mean": best,
        "steps": trainer.global_step,
        "skipped_updates": model.skips_in_all,
    }
    write_run(folder, record)
    folder = shown(folder)
    if model.skips_in_all:
        print(f"{model.skips_in_all} updates were skipped; {folder}/skipped.jsonl names their rows")
    print(f"{folder}/best.ckpt: mean CER on dev, full context and chunk 16, {best:.4f}")


if __name__ == "__main__":
    run(main)
