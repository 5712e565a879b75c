"""Trains a U2++ model: python train.py --data_root data/demo --output_dir runs/demo --preset tiny

Writes OUTPUT_DIR/best.ckpt and last.ckpt (best and newest), run.json (command, options
and metrics), steps.jsonl (loss and rows of every update), skipped.jsonl (updates that the guard
skipped) and the logs of --logger.
"""

import argparse
import contextlib
import dataclasses
import glob
import importlib.util
import math
import os
import subprocess
import sys
import time
import warnings
from typing import NamedTuple

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
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.callbacks import LearningRateMonitor, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_info

import kernels
from datamodule import DataOptions, SpeechDataModule, label_column, rows_rate
from files import ASIDE, alone, aside, check_path, json_text, read_json, write_whole
from model import U2, OptimOptions, read_checked
from presets import PRESETS, ModelOptions
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
from tokenizer import Tokenizer, check_maker, load_tokenizer
from transforms import Augment, Frontend, read_cmvn

LOCK = ".lock"
WHOLE = ("best.ckpt", "last.ckpt", "run.json")  # written whole or not at all
OUTPUTS = (*WHOLE, "scores.jsonl", "skipped.jsonl", "steps.jsonl", "logs")  # --overwrite removes


@options_class
class RunOptions:
    """Says what a run trains on, where, and for how long."""

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
        "tokenizer.json, vocab.json, transformers folder or .ckpt; "
        "default DATA_ROOT/tokenizer.json",
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
    tf32: bool = option(
        True, "let a GPU multiply float32 by TF32, which keeps 10 bits of the 23 behind the point"
    )
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
    logger: str = option(
        "tensorboard",
        "where curves go: OUTPUT_DIR/logs, or Weights & Biases, where wandb is installed",
        choices=("tensorboard", "csv", "wandb"),
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
                f"--max_epochs {self.max_epochs} --max_steps {self.max_steps}: a run needs an end, "
                "and a step"
            )
        if not self.data_root:
            raise UserError("--data_root: give at least one")


OPTIONS = RunOptions, DataOptions, ModelOptions, OptimOptions, Augment, Frontend
# Fine-tuning may change these options of a model: none of them shapes a weight, and the model can
# learn its way from one value to another.
MAY_CHANGE = (
    "dropout_rate",
    "attention_dropout_rate",
    "ctc_weight",
    "lsm_weight",
    "length_normalized_loss",
    "cr_ctc_weight",
    "interctc_weight",
    "stochastic_depth",
    "use_dynamic_chunk",
    "use_dynamic_left_chunk",
    "high_freq",
    "tail_padding",
)
# Checkpoints leave these options out: a run that goes on elsewhere has its own.
OF_THE_MACHINE = "output_dir", "accelerator", "devices", "num_nodes", "strategy", "num_workers"


class Settings(NamedTuple):
    """Holds all options of a run."""

    run: RunOptions
    data: DataOptions
    model: ModelOptions
    optim: OptimOptions
    augment: Augment
    frontend: Frontend

    def by_name(self) -> dict:
        """Returns all options by the names of their flags."""
        return {
            name: value for options in self for name, value in dataclasses.asdict(options).items()
        }


def read_flags(argv) -> dict:
    """Returns the flags that were given, and `overwrite`."""
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
    given = read_flags(argv)
    folder, resume = find_run(given)
    checkpoint = read_resumable(resume) if resume else {}
    settings, source = choose_settings(given, folder, checkpoint)
    check_run(settings.run, settings.optim.optimizer)
    if not (checkpoint or source):
        check_parts(settings.model)
        check_windows(settings.frontend)
    check_unused(given, settings, options_of(checkpoint))
    check_source(source, settings)
    check_overwrite(settings.run, given["overwrite"])
    tokenizer = label_tokenizer(settings.run.tokenizer, settings.run.data_root[0])
    place = check_resume(resume, checkpoint, given, settings, tokenizer) if resume else Place()

    if settings.optim.gradient_checkpointing:
        keep_freed_memory(SPARING)
    L.seed_everything(settings.run.seed, workers=False, verbose=False)
    # The data come before Lightning prints anything, so an error in them is a single line.
    data = open_data(settings, tokenizer, place)
    if not resume:
        check_words(data)
    start = Start(folder, given["overwrite"], place, {**settings.by_name(), **given})
    trainer = make_trainer(settings, start)
    choose_shapes(trainer, data)
    check_processes(trainer, data)
    graphs = prepare_gpu(trainer, given, settings, data.options.few_shapes)
    check_epoch(trainer, data, place)
    model = new_model(settings, data, trainer.world_size, place, graphs)
    if resume:
        say_schedule(checkpoint, model, place)
    else:
        prepare_weights(model, source, settings.run.cmvn, data)
    alone_there = only_writer(folder) if trainer.is_global_zero else contextlib.nullcontext()
    with alone_there, one_line_endings(trainer, folder, lambda: start.begun):
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
        if not start.record:  # a resumed run had nothing left to train
            start.begin(trainer, model)
        best = save_best(trainer, model, data)
        if trainer.is_global_zero:
            finish(trainer, model, best, folder, start.record)


def choose_settings(given: dict, folder: str, checkpoint: dict) -> tuple[Settings, dict | None]:
    """Returns the options of the run, and the checkpoint of --init_from in a new run.

    A flag that is given counts most. Another option is as in the checkpoint from which the run goes
    on or, for model and frontend, as in the checkpoint of --init_from. Else it has its default,
    and so has the weight decay of an optimizer that takes another's place.
    """
    before = options_of(checkpoint)
    run_options = build(RunOptions, given, **{**before, "output_dir": folder})
    source = None
    if run_options.init_from and not checkpoint:
        source = read_checked(run_options.init_from)
        check_options(run_options.init_from, source)
    if checkpoint:
        asked = given.get("preset")
        # A fine-tuned run's preset is the default, and says nothing of its sizes.
        own = asked == before.get("preset") and not before.get("init_from")
        sizes = before if own or not asked else {**before, **PRESETS[asked]}
    else:
        sizes = source["model_options"] if source else PRESETS[run_options.preset]
    model = build(ModelOptions, given, **sizes)
    same = given.get("optimizer", before.get("optimizer")) == before.get("optimizer")
    own_decay = {} if same else {"weight_decay": None}
    optim = build(OptimOptions, given, **{**before, **own_decay})
    # What the run keeps of its options says the number, by which runs compare.
    optim = dataclasses.replace(optim, weight_decay=optim.decay)
    if source:
        frontend_options = source["frontend"]
    else:
        frontend_options = before or {"sample_rate": rows_rate(run_options.data_root)}
    frontend = build(Frontend, given, **frontend_options)
    augment = build(Augment, given, **before)
    if checkpoint:
        before = {"few_shapes": "off", **before}  # as runs were before they had the choice
    data = build(DataOptions, without_rivals(given, before))
    return Settings(run_options, data, model, optim, augment, frontend), source


def open_data(settings: Settings, tokenizer, place: Place) -> SpeechDataModule:
    """Opens, checks and filters the data. Raises UserError for data that cannot be used."""
    data = SpeechDataModule(
        data_roots=settings.run.data_root,
        tokenizer=tokenizer,
        frontend=settings.frontend,
        augment=settings.augment,
        options=settings.data,
        input_layer=settings.model.input_layer,
        seed=settings.run.seed,
        views=settings.model.views,
    )
    data.start_batch = place.batches
    data.setup("fit")
    return data


def new_model(
    settings: Settings, data: SpeechDataModule, world_size: int, place: Place, graphs: bool
) -> U2:
    """Makes the model with random weights, and the logs that it writes."""
    folder = settings.run.output_dir
    return U2(
        options=settings.model,
        optim=settings.optim,
        frontend=settings.frontend,
        tokenizer=data.tokenizer,
        seed=settings.run.seed,
        total_steps=count_steps(settings.run, data, world_size, place),
        skip_log=os.path.join(folder, "skipped.jsonl"),
        step_log=os.path.join(folder, "steps.jsonl"),
        cuda_graphs=graphs,
    )


def find_run(given: dict) -> tuple[str, str | None]:
    """Returns OUTPUT_DIR, and the checkpoint to resume from or None.

    Raises UserError where another run lies in OUTPUT_DIR: only its own continuation or --overwrite
    may change a run.
    """
    named = given.get("resume")
    if named and os.path.isdir(named):
        named = os.path.join(named, "last.ckpt")
    folder = given.get("output_dir") or (
        os.path.dirname(named) or "." if named else RunOptions.output_dir
    )
    resume = None if named is None else named or os.path.join(folder, "last.ckpt")
    ranks = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    if any(os.environ.get(name, "0") != "0" for name in ranks):
        return folder, resume  # rank 0 checks the folder, and may have begun to write there
    check_folder(folder)
    there = os.listdir(folder) if os.path.isdir(folder) else ()
    # Files of a run that was killed before it began do not count.
    there = [
        name
        for name in there
        if name not in (LOCK, "logs") and not name.endswith((ASIDE, f"{ASIDE}.lock"))
    ]
    if not there or given["overwrite"]:
        return folder, resume
    if resume is None:
        raise UserError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it, or "
            "choose another --output_dir"
        )
    if os.path.exists(resume) and not os.path.samefile(os.path.dirname(resume) or ".", folder):
        raise UserError(
            f"{folder} holds another run than {resume}; leave out --output_dir to go on where that "
            "is, or choose an empty one"
        )
    return folder, resume


def check_folder(folder: str) -> None:
    """Raises UserError where the run could not write all of its files; changes nothing."""
    check_path(folder, "--output_dir", "TensorBoard")
    there = folder
    while True:
        try:
            os.lstat(there)
            break
        except FileNotFoundError:
            there = os.path.dirname(there) or "."
        except (OSError, ValueError) as error:  # the name is too long, or has a NUL
            raise UserError(
                f"--output_dir {folder}: cannot be made ({error}); choose another"
            ) from error
    check_writable(there, "folder", folder)
    if there == folder:
        check_outputs(folder)


def check_outputs(folder: str) -> None:
    """Raises UserError where the run could not replace a file of its own in `folder`."""
    halves = [aside(name) for name in WHOLE]
    locks = [LOCK, *(f"{name}.lock" for name in halves)]
    for name in (*OUTPUTS, *halves, *locks):
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            continue
        if os.path.islink(path):
            raise UserError(
                f"--output_dir {folder}: {path} is a link; move it away, or choose another"
            )
        check_writable(path, "folder" if name == "logs" else "file", folder)
        if name in locks and os.path.getsize(path):
            raise UserError(
                f"--output_dir {folder}: {path} is no lock, which would be empty; "
                "move it away, or choose another"
            )
        for log in files_of(path) if name == "logs" else ():
            check_writable(os.path.dirname(log), "folder", folder)


def check_writable(path: str, kind: str, folder: str) -> None:
    """Raises UserError where `path` is no file or folder, as `kind` says, or may not be changed."""
    if not (os.path.isdir if kind == "folder" else os.path.isfile)(path):
        raise UserError(
            f"--output_dir {folder}: {path} is no {kind}; move it away, or choose another"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK * (kind == "folder")):
        raise UserError(
            f"--output_dir {folder}: {path} cannot be written, or not be read; choose another"
        )


def options_of(checkpoint: dict) -> dict:
    """Returns the options of a checkpoint's run by name; older checkpoints lack some."""
    parts = ("model_options", "optim_options", "frontend", "run_options")
    options = {}
    for part in parts:
        if not isinstance(found := checkpoint.get(part, {}), dict):
            raise UserError(f"its {part} are damaged; get it again, or name another checkpoint")
        options |= found
    return options


def without_rivals(given: dict, before: dict) -> dict:
    """Returns the flags that were given, over the options that the run had.

    One of --batch_size and --max_batch_seconds takes the place of the other.
    """
    rivals = {"batch_size": "max_batch_seconds", "max_batch_seconds": "batch_size"}
    kept = {name: value for name, value in before.items() if rivals.get(name) not in given}
    return {**kept, **given}


def check_run(options: RunOptions, optimizer: str) -> None:
    """Raises UserError for a run that would fail late, or not do as asked."""
    if options.strategy.startswith("fsdp") and optimizer == "muon":
        raise UserError(
            "--strategy fsdp --optimizer muon: Muon needs whole matrices, which FSDP cuts; leave "
            "out one of them"
        )
    if options.strategy.startswith("fsdp"):
        if not torch.cuda.is_available():
            raise UserError("--strategy fsdp shards over GPUs and none is here; leave it out")
        if options.gradient_clip_val or options.ema_decay:
            raise UserError(
                "--strategy fsdp neither clips by norm nor averages through Lightning; add "
                "--gradient_clip_val 0 --ema_decay 0"
            )
    if options.logger == "wandb" and not importlib.util.find_spec("wandb"):
        raise UserError("--logger wandb: wandb is not installed; install it, or leave --logger out")
    if options.precision in ("16", "16-mixed") and not torch.cuda.is_available():
        print("note: 16-mixed on a CPU: Lightning turns it into bf16-mixed", flush=True)


def check_parts(model: ModelOptions) -> None:
    """Raises UserError where a part stays untrained that the searches need, or cannot learn.

    This is for runs from nothing: in others the part may come trained, and WeNet has such models.
    """
    if not model.ctc_weight:
        raise UserError(
            "--ctc_weight 0 leaves CTC untrained, which chooses best.ckpt and tells speech from "
            "silence; give more"
        )
    if model.reverse_weight == 1:
        raise UserError(
            "--reverse_weight 1 leaves the left-to-right decoder untrained, which attention and "
            "joint search need; give less"
        )
    if model.reverse_weight and not model.r_num_blocks:
        raise UserError(
            "--r_num_blocks 0 leaves the right-to-left decoder without the encoder's output; give "
            "more, or --reverse_weight 0"
        )
    positions = model.encoder, model.selfattention_layer_type, model.pos_enc_layer_type
    if positions == ("transformer", "selfattn", "rel_pos"):  # a conformer has its convolutions
        raise UserError(
            "--selfattention_layer_type selfattn leaves a transformer encoder without positions; "
            "add --pos_enc_layer_type abs_pos"
        )


def check_windows(frontend: Frontend) -> None:
    """Raises UserError for frames that leave sound out; models of older versions may have them."""
    if frontend.frame_shift > frontend.frame_length:
        raise UserError(
            f"--frame_shift {frontend.frame_shift} is more than --frame_length "
            f"{frontend.frame_length}, and the sound between would be lost; give at most as much"
        )


def check_unused(given: dict, settings: Settings, before: dict) -> None:
    """Raises UserError for a flag that has no effect beside the others.

    A flag that is given as false or 0 passes: it says no more than what is the case. So does what
    a resumed run had `before`, whose version may have refused less.
    """
    augment = settings.augment
    model = settings.model
    masks = augment.num_freq_masks or augment.num_time_masks
    dropped = model.dropout_rate or model.attention_dropout_rate or model.stochastic_depth
    if model.views > 1 and not (before or masks or dropped):
        raise UserError(
            "--cr_ctc_weight has no effect without masks and dropout, in which the two views "
            "differ; give --num_time_masks, or --cr_ctc_weight 0"
        )
    for name in ("cr_ctc_weight", "interctc_weight"):
        if getattr(model, name) and not (before or model.ctc_weight):
            raise UserError(f"--{name} has no effect with --ctc_weight 0; give --{name} 0")
    frontend = settings.frontend.frontend
    others = {"fbank": ("window", "mean_var_norm"), "log_mel": ("dither", "cmvn", "high_freq")}
    unused = dict.fromkeys(others[frontend], f"with --frontend {frontend}")
    if not augment.noise:
        unused |= dict.fromkeys(("snr", "noise_prob"), "without --noise")
    if not augment.rir:
        unused["rir_prob"] = "without --rir"
    if not augment.num_time_masks:
        unused |= dict.fromkeys(("max_time_mask", "max_time_mask_share"), "with --num_time_masks 0")
    if not augment.num_freq_masks:
        unused["max_freq_mask"] = "with --num_freq_masks 0"
    if not augment.num_subs:
        unused["max_sub"] = "with --num_subs 0"
    if not settings.data.filter:
        unused |= dict.fromkeys(("min_frame", "max_frame", "output_len_prob"), "with --no-filter")
    if not model.use_dynamic_chunk:
        unused["use_dynamic_left_chunk"] = "with --no-use_dynamic_chunk"
    if model.encoder == "transformer":
        of_convolution = "causal", "cnn_module_norm", "cnn_module_kernel"
        unused |= dict.fromkeys(of_convolution, "with --encoder transformer")
    if model.reverse_weight:
        unused["keep_right_decoder"] = "without --reverse_weight 0"
    elif not model.keep_right_decoder:
        unused["r_num_blocks"] = "with --reverse_weight 0"
    if model.ctc_weight == 1:  # --reverse_weight still says whether there is a second decoder
        unused |= dict.fromkeys(("lsm_weight", "length_normalized_loss"), "with --ctc_weight 1")
    if settings.run.init_from is None:
        unused["freeze_encoder_epochs"] = "without --init_from"
    else:
        unused["preset"] = "with --init_from"
    for name, reason in unused.items():
        value = given.get(name)
        if value and as_list(before.get(name)) != value:
            raise UserError(f"--{name} has no effect {reason}; leave it out")


def check_words(data: SpeechDataModule) -> None:
    """Raises UserError where dev has no word, and so no error rate that chooses the best model."""
    labels = label_column(data.splits["dev"])
    if not any(data.tokenizer.decode(ids.as_py()) for ids in labels):
        raise UserError(
            f"{', '.join(map(str, data.data_roots))}: dev has no words, so that no model would be "
            "the best; give it rows with a text"
        )


def check_overwrite(options: RunOptions, overwrite: bool) -> None:
    """Raises UserError where --overwrite would delete a file that the run is made from."""
    if not overwrite:
        return
    doomed = [os.path.realpath(os.path.join(options.output_dir, name)) for name in OUTPUTS]
    for name in ("init_from", "tokenizer", "cmvn"):
        path = getattr(options, name)
        real = os.path.realpath(path) if path else ""
        if any(real == one or real.startswith(one + os.sep) for one in doomed):
            raise UserError(
                f"--{name} {path} is part of the run that --overwrite replaces; choose another "
                "--output_dir"
            )


def check_source(source: dict | None, settings: Settings) -> None:
    """Raises UserError where the weights of --init_from do not fit the model or its features."""
    if not source:
        return
    for name, (saved, asked) in differences(source, settings).items():
        both = name == "reverse_weight" and saved and asked  # There are two decoders already.
        if name not in MAY_CHANGE and not both:
            raise UserError(
                f"--{name} {asked}: {settings.run.init_from} was made with {saved}; leave it out"
            )


def differences(checkpoint: dict, settings: Settings) -> dict[str, tuple]:
    """Returns {name: (saved, asked)} of the model's and frontend's options that differ."""
    asked = dataclasses.asdict(settings.model) | dataclasses.asdict(settings.frontend)
    # An option that is newer than the checkpoint counts as its default.
    saved = dataclasses.asdict(ModelOptions()) | dataclasses.asdict(Frontend())
    saved |= checkpoint["model_options"] | checkpoint["frontend"]
    return {name: (saved[name], value) for name, value in asked.items() if saved[name] != value}


def prepare_weights(
    model: U2, source: dict | None, cmvn: str | None, data: SpeechDataModule
) -> None:
    """Gives a new model the weights of --init_from and the global CMVN of fbank."""
    if source:
        known = model.init_from(source)
        rank_zero_info(
            f"fine-tuning: {known} of {model.tokenizer.vocab_size} tokens known, the others "
            "initialised"
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


def label_tokenizer(path: str | None, data_root: str) -> Tokenizer:
    """Loads the tokenizer that made the labels: from `path`, or else from the data root.

    Raises UserError where there is none, or where both are there and differ.
    """
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
    """Reads a checkpoint to resume from. Raises UserError where a run cannot go on from it."""
    checkpoint = read_checked(path)
    if "loops" not in checkpoint:
        raise UserError(
            f"{path} has no state of training to go on from; --init_from starts a new run from its "
            "weights"
        )
    check_options(path, checkpoint)
    check_state(path, checkpoint)
    return checkpoint


def check_options(path: str, checkpoint: dict) -> None:
    """Raises UserError, naming `path`, where the options in a checkpoint are not valid."""
    try:
        for kind in OPTIONS:
            build(kind, {}, **options_of(checkpoint))
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def check_resume(path: str, checkpoint: dict, given: dict, settings: Settings, tokenizer) -> Place:
    """Returns where the checkpoint left its run, and prints which options change from there on.

    Raises UserError where it belongs to another model, frontend or tokenizer, or where an option
    would not change anything any more.
    """
    before = options_of(checkpoint)
    check_same_model(path, checkpoint, settings, tokenizer)
    for name in ("init_from", "cmvn"):
        if name in given and given[name] != before.get(name):
            raise UserError(
                f"--{name} has no effect with --resume: {path} has its weights already; leave it "
                "out"
            )
    # An older checkpoint does not hold its decay.
    if "averaging_state" in checkpoint and not settings.run.ema_decay:
        raise UserError(
            f"--ema_decay 0: {path} averages its weights; give its decay, or start anew with "
            f"--init_from {path}"
        )
    optimizers = {before.get("optimizer", settings.optim.optimizer), settings.optim.optimizer}
    if len(optimizers) == 2 and "muon" in optimizers:
        raise UserError(
            f"--optimizer {settings.optim.optimizer}: {path} has the state of "
            f"{before['optimizer']}, which is another; leave it out, or start anew with "
            f"--init_from {path}"
        )
    if len(optimizers) == 2:
        given = {**given, "weight_decay": settings.optim.weight_decay}  # perhaps its default
    changed = [
        f"--{name} {given[name]} (before: {value})"
        for name, value in before.items()
        if name in given and as_list(given[name]) != as_list(value)
    ]
    place = find_place(path, checkpoint)
    check_goes_on(place, settings.run, bool(changed))
    if changed:
        rank_zero_info(f"note: {path} goes on with {', '.join(changed)}")
    return place


def check_same_model(path: str, checkpoint: dict, settings: Settings, tokenizer) -> None:
    """Raises UserError where the checkpoint has another model, frontend or tokenizer."""
    differ = [
        f"{name} {saved}, not {asked}"
        for name, (saved, asked) in differences(checkpoint, settings).items()
    ]
    if differ:
        raise UserError(
            f"{path} was made with {'; '.join(differ)}; give the options that it was made with"
        )
    if checkpoint["tokenizer"] != tokenizer.to_dict():
        raise UserError(
            f"{path} was made with another tokenizer than this data; resume on the data that it "
            "was made with"
        )


def check_goes_on(place: Place, options: RunOptions, changed: bool) -> None:
    """Raises UserError where nothing is left to train, though options were changed or lowered."""
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
            f"{place.path} has done {place.epochs} epochs and {place.updates} updates: "
            f"{' '.join(reached)} leaves nothing to train, and no other option would have an "
            "effect; give more"
        )


def as_list(value):
    """Returns a tuple as a list: flags give lists, checkpoints hold tuples."""
    return list(value) if isinstance(value, tuple) else value


def say_schedule(checkpoint: dict, model: U2, place: Place) -> None:
    """Prints that the length of a onecycle run has changed, and with it the learning rate."""
    # configure_optimizers plans one step more than there are updates.
    planned = checkpoint["lr_schedulers"][0].get("total_steps", 0) - 1
    if model.optim.scheduler != "onecycle" or planned in (-1, model.total_steps):
        return
    if model.total_steps > place.updates:
        rank_zero_info(
            f"note: the learning rate was planned for {planned} updates and is now for "
            f"{model.total_steps}: from update {place.updates} on it goes on as if it had always "
            f"been. For a new cycle from these weights: --init_from {place.path} --output_dir "
            "ANOTHER"
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
            # On a full disk this write fails, before any deletion and before TensorBoard's thread.
            write_whole(probe, bytes(2**16))
            os.remove(probe)
            yield
    finally:
        # A run that failed before it began has an empty log.
        if not os.path.exists(os.path.join(folder, "run.json")):
            for path in set(files_of(logs)) - set(before):
                os.remove(path)
        for path in (*glob.glob(f"{glob.escape(logs)}/csv_*"), logs, folder):
            with contextlib.suppress(OSError):
                os.rmdir(path)


class Start(L.Callback):
    """Writes run.json and deletes old files just before the first update.

    By then nothing is refused any more. An attempt that fails earlier changes no file.
    """

    def __init__(self, folder: str, overwrite: bool, place: Place, options: dict):
        self.folder = folder
        self.place = place
        self.options = options
        self.record = None  # what run.json holds, on rank 0, once it is written
        self.begun = False
        # They are listed now, because Lightning begins the new log before on_train_start.
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
        for logger in trainer.loggers:
            logger.log_hyperparams(self.options)
        size = sum(p.numel() for p in module.parameters()) / 1e6
        print(
            f"{size:.2f} M parameters, vocabulary {module.tokenizer.vocab_size}, "
            f"{module.total_steps} updates planned"
        )


def read_metrics(folder: str) -> dict:
    """Returns the metrics in run.json, which a resumed run keeps until it has its own."""
    try:
        metrics = read_json(os.path.join(folder, "run.json")).get("metrics")
    except (OSError, ValueError):
        metrics = None
    return metrics if isinstance(metrics, dict) else {}


def files_of(path: str) -> list[str]:
    """Lists the file `path`, or the loggers' files in the folder `path`, but no other logs."""
    within = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name.startswith(("events.out.tfevents", "hparams.yaml", "metrics.csv"))
    ]
    return within or [path] * os.path.isfile(path)


def clear_output(folder: str, old: list[str], step: int) -> None:
    """Removes what the run will not go on with.

    These are the files `old`, half-written files, and log lines from `step` on: a killed run wrote
    such lines after its last checkpoint, and the resumed run writes them again.
    """
    half = (aside(os.path.join(folder, name)) for name in OUTPUTS)
    for path in (*old, *half):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    for name in ("steps.jsonl", "skipped.jsonl"):
        if os.path.exists(os.path.join(folder, name)):
            cut_log(os.path.join(folder, name), step)


def make_callbacks(settings: Settings, start: Start) -> list[L.Callback]:
    """Lists the callbacks in the order in which Lightning calls them."""
    options = settings.run
    of_the_run = {
        name: value for name, value in settings.by_name().items() if name not in OF_THE_MACHINE
    }
    average = [Average(options.ema_decay)] if options.ema_decay else []
    best = BestCheckpoint(os.path.join(options.output_dir, "best.ckpt"))
    last = LastCheckpoint(
        os.path.join(options.output_dir, "last.ckpt"),
        options.checkpoint_every_n_steps,
        options.checkpoint_every_n_minutes,
        of_the_run,
    )
    bar = TQDMProgressBar(refresh_rate=10)
    return [MemoryCheck(), start, bar, LearningRateMonitor("step"), *average, best, last]


def make_logger(options: RunOptions) -> Logger:
    folder = options.output_dir
    if options.logger == "wandb":
        name = os.path.basename(os.path.abspath(folder))
        return WandbLogger(save_dir=folder, project="lightning-U2", name=name)
    if options.logger == "csv":
        # CSVLogger deletes what it finds, so that a resumed run would lose what came before.
        return CSVLogger(folder, name="logs", version=f"csv_{time.time_ns()}")
    return TensorBoardLogger(folder, name="logs", version="")


def make_trainer(settings: Settings, start: Start) -> L.Trainer:
    """Makes Lightning's trainer. Raises UserError for options that Lightning refuses."""
    options = settings.run
    # (The sampler makes our DataLoader resumable, though Lightning does not see it.)
    warnings.filterwarnings(
        "ignore",
        message=".*(does not have many workers|exists and is not empty|smaller than the logging "
        "interval|LeafSpec|dataloader is not resumable).*",
    )
    try:
        return L.Trainer(
            max_epochs=options.max_epochs,
            max_steps=options.max_steps,
            precision="16-mixed" if options.precision == "16" else options.precision,
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=options.gradient_clip_val or None,
            check_val_every_n_epoch=options.check_val_every_n_epoch,
            callbacks=make_callbacks(settings, start),
            plugins=[WholeFiles()],
            logger=make_logger(options),
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_model_summary=False,
        )
    except Exception as error:
        # Wrong values of --accelerator, --devices and --strategy raise a dozen kinds of errors.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"Lightning refuses these options: {reason}") from error


def choose_shapes(trainer: L.Trainer, data: SpeechDataModule) -> None:
    """Turns --few_shapes auto into on or off, in all that the run keeps of its options, too.

    So a run that goes on with another device keeps its plan.
    """
    chosen = data.options.few_shapes
    if chosen == "auto":
        on = data.options.group_by_length and not isinstance(trainer.accelerator, CPUAccelerator)
        chosen = "on" if on else "off"
    data.options = dataclasses.replace(data.options, few_shapes=chosen)
    for callback in trainer.callbacks:
        if isinstance(callback, (Start, LastCheckpoint)):
            callback.options["few_shapes"] = chosen


def check_processes(trainer: L.Trainer, data: SpeechDataModule) -> None:
    """Raises UserError where torchrun and --devices disagree, or where a process would have no row.

    Otherwise each process of torchrun would be a run of its own, or wait for others.
    """
    told = trainer.num_devices * trainer.num_nodes
    there = os.environ.get("WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ and there != str(told):
        raise UserError(
            f"torchrun has started {there} processes, but --devices {trainer.num_devices} times "
            f"--num_nodes {trainer.num_nodes} is {told}; give --devices NPROC_PER_NODE --num_nodes "
            "NNODES"
        )
    for split, rows in (("train", data.kept), ("dev", data.splits["dev"])):
        check_share(len(rows), trainer.world_size, split)


def prepare_gpu(trainer: L.Trainer, given: dict, settings: Settings, few_shapes: str) -> bool:
    """Sets how a GPU multiplies float32, prints that, and returns whether there are CUDA graphs.

    Raises UserError for flags of a GPU that have no effect in this run.
    """
    if not isinstance(trainer.accelerator, CUDAAccelerator):
        for name in given.keys() & {"tf32", "triton"}:
            raise UserError(f"--{name} and --no-{name} have no effect without a GPU; leave it out")
        if settings.optim.cuda_graphs == "on":
            raise UserError("--cuda_graphs on: this run has no GPU; give --cuda_graphs auto")
        return False
    tf32 = settings.run.tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    kernels.TRITON = settings.optim.triton
    why_not = no_graphs(trainer, settings.optim, few_shapes)
    choice = settings.optim.cuda_graphs
    if why_not and choice == "on":
        raise UserError(f"--cuda_graphs on: {why_not}")
    wanted = not why_not and choice != "off"
    rank_zero_info(
        f"GPU: float32 products in {'TF32' if tf32 else 'full precision'}, few shapes "
        f"{few_shapes}, CUDA graphs {'on' if wanted else 'off'}"
        + (f" ({why_not})" if why_not and choice == "auto" else "")
        + ", fused kernels, which a machine's first run compiles" * kernels.TRITON
    )
    return wanted


def no_graphs(trainer: L.Trainer, options: OptimOptions, few_shapes: str) -> str:
    """Returns why a run on a GPU cannot have CUDA graphs, or "" where it can."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        return (
            "a graph holds the backward pass of one process alone, and several processes exchange "
            "gradients within it; larger batches (--max_batch_seconds) keep several GPUs busy"
        )
    if options.gradient_checkpointing:
        return "--gradient_checkpointing computes blocks twice, which a graph cannot hold"
    if few_shapes != "on":
        return "they need shapes that repeat; give --few_shapes on"
    return ""


def check_epoch(trainer: L.Trainer, data: SpeechDataModule, place: Place) -> None:
    """Raises UserError where a resumed run cannot go on within its epoch."""
    check_plan(place, make_plan(data, trainer.world_size, trainer.accumulate_grad_batches), data)
    if place.batches > data.train_batches(trainer.world_size):
        raise UserError(
            f"{place.path}: it was saved behind {place.batches} batches of an epoch, which has not "
            "as many; resume on the data that it was made with"
        )


def count_steps(options: RunOptions, data: SpeechDataModule, world_size: int, place: Place) -> int:
    """Returns the updates of the whole run, those before a resume included.

    OneCycleLR must know them beforehand. (Lightning's own estimate, estimated_stepping_batches,
    loads the data loaders early and drops their state.)
    """
    batches = data.train_batches(world_size)

    def updates(batches: int) -> int:
        return math.ceil(batches / options.accumulate_grad_batches)

    by_epochs = math.inf
    by_steps = math.inf
    if options.max_steps != -1:
        by_steps = options.max_steps
    if options.max_epochs != -1:
        epochs = options.max_epochs - place.epochs
        by_epochs = place.updates + epochs * updates(batches)
        if place.batches:  # the first of these epochs has begun already
            by_epochs += updates(batches - place.batches) - updates(batches)
    return max(1, min(by_epochs, by_steps))


def commit() -> str:
    """Returns the git commit of this code, or "unknown"."""
    here = os.path.dirname(os.path.abspath(__file__))
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def write_run(folder: str, record: dict) -> dict:
    """Writes OUTPUT_DIR/run.json, whole or not at all, and returns what it holds."""
    record = {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "seed": record["options"]["seed"],
        **record,
    }
    write_whole(os.path.join(folder, "run.json"), json_text(record, indent=1).encode())
    return record


def save_best(trainer, model, data) -> float:
    """Returns the best mean CER.

    A run that ended between two validations is validated once more, so best.ckpt is always there.
    """
    if model.validated_step != trainer.global_step:
        trainer.validate(model, datamodule=data, verbose=False)
    return next(
        callback.score
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, BestCheckpoint)
    )


def finish(trainer, model, best, folder, record) -> None:
    """Writes the metrics to run.json and prints the result."""
    metrics = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val_")
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # whose table of options shows this one number
            logger.log_metrics({"hp_metric": best}, trainer.global_step)
            logger.save()
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
