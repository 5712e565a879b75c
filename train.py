"""Trains a U2++ model: python train.py --data_root data/demo --output_dir runs/demo --preset tiny

Writes OUTPUT_DIR/best.ckpt and last.ckpt (best and newest), run.json (what was run, and its metrics), steps.jsonl (loss and
rows of every update), skipped.jsonl (updates that the guard skipped) and TensorBoard logs.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytorch_lightning as L
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar, WeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cli import SPARING, UserError, build, keep_freed_memory, make_parser, option, run, write_whole
from conformer import PRESETS, ModelOptions
from datamodule import DataOptions, SpeechDataModule
from model import U2, OptimOptions, read_checkpoint
from recovery import (LastCheckpoint, MemoryCheck, Place, WholeFiles, check_plan, cut_log, find_place, make_plan,
                      one_line_endings)
from sampler import check_share
from tokenizer import check_maker, load_tokenizer
from transforms import Augment, Frontend, read_cmvn

OUTPUTS = ("best.ckpt", "last.ckpt", "run.json", "scores.jsonl", "skipped.jsonl", "steps.jsonl", "logs")  # --overwrite removes


@dataclass(frozen=True)
class RunOptions:
    """The run: where, how long, on what."""

    output_dir: str = option("runs/demo", "where checkpoints, logs and run.json go")
    preset: str = option("tiny", "size of the model; single numbers can be overridden", choices=tuple(PRESETS))
    init_from: str | None = option(None, "start from this checkpoint's weights, model options and frontend (fine-tuning)")
    cmvn: str | None = option(None, "global_cmvn file for fbank; default: computed over train, or that of --init_from")
    tokenizer: str | None = option(None, "tokenizer.json, vocab.json, transformers folder or .ckpt; default DATA_ROOT/tokenizer.json")
    max_epochs: int = option(20, "epochs, unless --max_steps comes first")
    max_steps: int = option(-1, "updates, -1 for no limit")
    accumulate_grad_batches: int = option(1, "batches per update")
    gradient_clip_val: float = option(5.0, "largest gradient norm, 0 for no clipping")
    precision: str = option("32", "arithmetic", choices=("32", "16-mixed", "bf16-mixed", "16"))
    accelerator: str = option("auto", "Lightning's accelerator: auto, cpu, gpu ...")
    devices: str = option("auto", "number of devices, or Lightning's list of them")
    num_nodes: int = option(1, "machines")
    strategy: str = option("auto", "Lightning's strategy: auto, ddp, ...")
    seed: int = option(0, "seed of weights, plan, augmentation, dropout and chunks")
    ema_decay: float = option(0.0, "validate and keep an exponential average of the weights, e.g. 0.998; 0: off")
    check_val_every_n_epoch: int = option(1, "epochs between validations")
    checkpoint_every_n_steps: int | None = option(None, "also write last.ckpt every so many updates")
    checkpoint_every_n_minutes: float | None = option(None, "also write last.ckpt every so many minutes")

    def __post_init__(self):
        limits = {"seed": (0, 2**32 - 1), "max_epochs": (-1, math.inf), "max_steps": (-1, math.inf),
                  "accumulate_grad_batches": (1, math.inf), "gradient_clip_val": (0, math.inf), "num_nodes": (1, math.inf),
                  "ema_decay": (0, 0.999999), "check_val_every_n_epoch": (1, math.inf),
                  "checkpoint_every_n_steps": (1, math.inf), "checkpoint_every_n_minutes": (0, math.inf)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value}: it must lie within {low} .. {high}")
        if 0 in (self.max_epochs, self.max_steps) or self.max_epochs == self.max_steps == -1:
            raise UserError(f"--max_epochs {self.max_epochs} --max_steps {self.max_steps}: a run needs an end, and a step")


def parse(argv):
    parser = make_parser(__doc__, RunOptions, DataOptions, ModelOptions, OptimOptions, Augment, Frontend)
    parser.add_argument("--data_root", nargs="+", default=["data/demo"], help="data roots that prepare.py made")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", nargs="?", const="", metavar="CKPT", help="go on, from OUTPUT_DIR/last.ckpt unless named")
    again.add_argument("--overwrite", action="store_true", help="replace an existing run")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    given = vars(args)
    options = build(RunOptions, given)
    source = read_checkpoint(options.init_from) if options.init_from else None
    model_options = build(ModelOptions, given, **(source["model_options"] if source else PRESETS[options.preset]))
    optim, frontend = build(OptimOptions, given), build(Frontend, given, **(source["frontend"] if source else {}))
    check(options, model_options)
    check_unused(given, frontend)
    check_source(options.init_from, source, model_options, frontend)
    resume = check_output(options.output_dir, args.resume, args.overwrite)
    tokenizer = read_tokenizer(options.tokenizer, args.data_root[0])
    place = check_resume(resume, model_options, frontend, tokenizer) if resume else Place()

    if optim.gradient_checkpointing:
        keep_freed_memory(SPARING)
    L.seed_everything(options.seed, workers=False, verbose=False)
    data = SpeechDataModule(data_roots=args.data_root, tokenizer=tokenizer, frontend=frontend, augment=build(Augment, given),
                            options=build(DataOptions, given), input_layer=model_options.input_layer, seed=options.seed)
    data.start_batch = place.batches
    data.setup("fit")  # before Lightning says anything: what is wrong with the data is one line
    trainer = make_trainer(options)
    check_processes(trainer, data)
    check_plan(place, make_plan(data, trainer.world_size, options.accumulate_grad_batches), data)
    model = U2(options=model_options, optim=optim, frontend=frontend, tokenizer=tokenizer, seed=options.seed,
               total_steps=count_steps(options, data, trainer.world_size),
               skip_log=os.path.join(options.output_dir, "skipped.jsonl"),
               step_log=os.path.join(options.output_dir, "steps.jsonl"))
    if not resume:
        prepare_weights(model, source, options.cmvn, data)
    if trainer.is_global_zero:
        clear_output(options.output_dir, args.overwrite, place.updates)
        record = write_run(options.output_dir, {"options": jsonable(given, options, model_options, optim), "metrics": {}})
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {tokenizer.vocab_size}, "
              f"{model.total_steps} updates planned")
    with one_line_endings(trainer, options.output_dir):
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
        best = save_best(trainer, model, data, options.output_dir)
    if trainer.is_global_zero:
        finish(trainer, model, best, options.output_dir, record)


def check(options: RunOptions, model_options: ModelOptions) -> None:
    """Refuses in one line what would fail late or not at all as asked."""
    width, heads = model_options.output_size, model_options.attention_heads
    if width % heads or width % (model_options.decoder_attention_heads or heads) or width % 2:
        raise UserError(f"--output_size {width} must be even and divisible by --attention_heads {heads} and by "
                        "--decoder_attention_heads")
    if not model_options.causal and model_options.cnn_module_kernel % 2 == 0:
        raise UserError(f"--no-causal needs an odd --cnn_module_kernel, not {model_options.cnn_module_kernel}")
    if options.strategy.startswith("fsdp"):
        if not torch.cuda.is_available():
            raise UserError("--strategy fsdp shards over GPUs and none is here; leave it out")
        if options.gradient_clip_val or options.ema_decay:
            raise UserError("--strategy fsdp neither clips by norm nor averages through Lightning; add "
                            "--gradient_clip_val 0 --ema_decay 0")
    if options.precision in ("16", "16-mixed") and not torch.cuda.is_available():
        print("note: 16-mixed on a CPU: Lightning turns it into bf16-mixed", flush=True)


def check_unused(given: dict, frontend: Frontend) -> None:
    """Refuses flags that would have no effect beside the others."""
    without = {"freeze_encoder_epochs"} if "init_from" not in given else {"preset"}
    for names, reason in ((("window", "mean_var_norm") if frontend.frontend == "fbank" else ("dither", "cmvn", "high_freq"),
                           f"with --frontend {frontend.frontend}"),
                          (without, "with --init_from" if "init_from" in given else "without --init_from")):
        for name in names:
            if name in given:
                raise UserError(f"--{name} has no effect {reason}; leave it out")


def check_source(path: str | None, source: dict | None, model_options: ModelOptions, frontend: Frontend) -> None:
    """UserError where the weights of --init_from would not fit, or would meet features that are all others."""
    free = {"dropout_rate", "attention_dropout_rate", "ctc_weight", "lsm_weight", "length_normalized_loss",
            "use_dynamic_chunk", "use_dynamic_left_chunk", "high_freq"}  # what shapes no weight, or can be learnt anew
    for name, (saved, asked) in differences(source, model_options, frontend).items() if source else ():
        if name not in free:
            raise UserError(f"--{name} {asked}: {path} was made with {saved}; leave it out")


def differences(checkpoint: dict, model_options: ModelOptions, frontend: Frontend) -> dict[str, tuple]:
    """{name: (the checkpoint's value, the one asked for)} of the model options and the frontend's that are not the same."""
    asked = dataclasses.asdict(model_options) | dataclasses.asdict(frontend)
    saved = dataclasses.asdict(ModelOptions()) | dataclasses.asdict(Frontend())  # of options that are newer than it
    saved |= checkpoint["model_options"] | checkpoint["frontend"]
    return {name: (saved[name], value) for name, value in asked.items() if saved[name] != value}


def prepare_weights(model: U2, source: dict | None, cmvn: str | None, data: SpeechDataModule) -> None:
    """Before the first step: weights of --init_from, global CMVN of fbank."""
    if source:
        known = model.init_from(source)
        rank_zero_info(f"fine-tuning: {known} of {model.tokenizer.vocab_size} tokens known, the others initialised")
    if cmvn:
        mean, istd = read_cmvn(cmvn)
        if len(mean) != model.frontend.num_mel_bins:
            raise UserError(f"--cmvn {cmvn}: it is for {len(mean)} mel bins, not {model.frontend.num_mel_bins}")
        model.set_cmvn(mean, istd)
    elif model.frontend.frontend == "fbank" and not source:
        model.set_cmvn(*data.cmvn())


def read_tokenizer(path: str | None, data_root: str):
    """The tokenizer that made the labels: the one named, or DATA_ROOT's own; UserError where both are there and differ."""
    if not os.path.isdir(data_root):
        raise UserError(f"{data_root}: no such data root; prepare.py makes one")
    tokenizer = load_tokenizer(path or os.path.join(data_root, "tokenizer.json"))
    check_maker(tokenizer, f"--tokenizer {path}", data_root)
    return tokenizer


def check_output(folder: str, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint to resume from, or None; an existing run is never touched without being told."""
    if resume is not None:
        return resume or os.path.join(folder, "last.ckpt")
    if any(os.environ.get(name, "0") != "0" for name in ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")):
        return None  # the process of rank 0 has checked, and may have begun to write
    if os.path.isdir(folder) and os.listdir(folder) and not overwrite:
        raise UserError(f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it, or choose "
                        "another --output_dir")
    return None


def check_resume(path: str, model_options: ModelOptions, frontend: Frontend, tokenizer) -> Place:
    """Where the checkpoint left its run; UserError where it belongs to another model, frontend or tokenizer."""
    checkpoint = read_checkpoint(path)
    differ = [f"{name} {saved}, not {asked}" for name, (saved, asked) in
              differences(checkpoint, model_options, frontend).items()]
    if differ:
        raise UserError(f"{path} was made with {'; '.join(differ)}; give the options that it was made with")
    if checkpoint["tokenizer"] != tokenizer.to_dict():
        raise UserError(f"{path} was made with another tokenizer than this data; resume on the data that it was made with")
    if "loops" not in checkpoint:
        raise UserError(f"{path} has no state of training to go on from; --init_from starts a new run from its weights")
    return find_place(path, checkpoint)


def clear_output(folder: str, overwrite: bool, step: int) -> None:
    """Removes what the run will not go on with: the run before with `overwrite`, half-written files, log lines from `step` on
    (a killed run wrote them after its last checkpoint, and they will come again)."""
    for name in (*(OUTPUTS if overwrite else ()), *(name + ".tmp" for name in OUTPUTS)):
        path = os.path.join(folder, name)
        shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.remove(path)
    os.makedirs(folder, exist_ok=True)
    for name in ("steps.jsonl", "skipped.jsonl"):
        if os.path.exists(os.path.join(folder, name)):
            cut_log(os.path.join(folder, name), step)


def make_trainer(options: RunOptions) -> L.Trainer:
    folder = options.output_dir
    warnings.filterwarnings("ignore", message=".*(does not have many workers|exists and is not empty|smaller than the logging "
                            "interval|LeafSpec|dataloader is not resumable).*")  # ours is resumable, in its own way
    best = ModelCheckpoint(folder, filename="best", monitor="val_cer_mean", mode="min", enable_version_counter=False,
                           save_on_train_epoch_end=False)
    last = LastCheckpoint(os.path.join(folder, "last.ckpt"), options.checkpoint_every_n_steps,
                          options.checkpoint_every_n_minutes)
    callbacks = [TQDMProgressBar(refresh_rate=10), LearningRateMonitor("step"), MemoryCheck()]
    if options.ema_decay:
        callbacks.append(WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay)))  # all tensors at once
    try:
        return L.Trainer(
            max_epochs=options.max_epochs, max_steps=options.max_steps, precision=options.precision,
            accelerator=options.accelerator, devices=options.devices, num_nodes=options.num_nodes,
            strategy=options.strategy, accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=options.gradient_clip_val or None, check_val_every_n_epoch=options.check_val_every_n_epoch,
            callbacks=callbacks + [best, last], plugins=[WholeFiles()], logger=TensorBoardLogger(folder, name="logs", version=""),
            use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=10, enable_model_summary=False)
    except (MisconfigurationException, ValueError, ImportError, ModuleNotFoundError) as error:
        raise UserError(f"Lightning refuses these options: {str(error).splitlines()[0]}") from error


def check_processes(trainer: L.Trainer, data: SpeechDataModule) -> None:
    """UserError where torchrun has started other processes than Lightning is told of, or where one would have no rows."""
    told, there = trainer.num_devices * trainer.num_nodes, os.environ.get("WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ and there != str(told):  # each would be a run of its own, or wait for others
        raise UserError(f"torchrun has started {there} processes, but --devices {trainer.num_devices} times --num_nodes "
                        f"{trainer.num_nodes} is {told}; give --devices NPROC_PER_NODE --num_nodes NNODES")
    for split, rows in (("train", data.kept), ("dev", data.splits["dev"])):
        check_share(len(rows), trainer.world_size, split)


def count_steps(options: RunOptions, data: SpeechDataModule, world_size: int) -> int:
    """Updates of the whole run, from the data: OneCycleLR must know its length beforehand.

    (Lightning's own estimate, trainer.estimated_stepping_batches, loads the data loaders early and drops their state.)
    """
    per_epoch = math.ceil(data.train_batches(world_size) / options.accumulate_grad_batches)
    limits = [options.max_epochs * per_epoch if options.max_epochs != -1 else math.inf,
              options.max_steps if options.max_steps != -1 else math.inf]
    return max(1, min(limits))


def jsonable(given, *options) -> dict:
    merged = {key: value for cls in options for key, value in dataclasses.asdict(cls).items()}
    return {**merged, **given}


def commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def write_run(folder: str, record: dict) -> dict:
    """OUTPUT_DIR/run.json, whole or not at all."""
    record = {"command": " ".join(sys.argv), "commit": commit(), "seed": record["options"]["seed"], **record}
    write_whole(os.path.join(folder, "run.json"), json.dumps(record, indent=1).encode())
    return record


def save_best(trainer, model, data, folder) -> float:
    """The best mean CER. A run that ended between two validations is validated once more, so best.ckpt is always there."""
    callback = next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))
    best = math.inf if callback.best_model_score is None else float(callback.best_model_score)
    if model.validated_step != trainer.global_step:
        score = trainer.validate(model, datamodule=data, verbose=False)[0]["val_cer_mean"]
        if score < best:
            best = score
            trainer.save_checkpoint(os.path.join(folder, "best.ckpt"), weights_only=False)
    return best


def finish(trainer, model, best, folder, record) -> None:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    record["metrics"] = {**metrics, "best_val_cer_mean": best, "steps": trainer.global_step,
                         "skipped_updates": model.skips_in_all}
    write_run(folder, record)
    if model.skips_in_all:
        print(f"{model.skips_in_all} updates were skipped; {folder}/skipped.jsonl names their rows")
    print(f"{folder}/best.ckpt: mean CER on dev, full context and chunk 16, {best:.4f}")


if __name__ == "__main__":
    run(main)
