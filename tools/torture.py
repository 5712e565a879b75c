"""Kills a small training (kill -9) at random times, many of them while it saves, and resumes it each time: python torture.py

Checks that every checkpoint found after a kill loads, and that each run ends bit by bit as the same run that was never killed:
weights, averages, optimizer, schedule, steps.jsonl. Exit status 1 where not. Trains on noise, on the CPU, in a temporary folder.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from cli import build, make_parser, option, options_class, run

import datasets
import numpy as np
import torch

import train
from files import ASIDE
from model import read_checked
from tokenizer import save_tokenizer, train_char

SMALL = (
    "--output_size 16 --attention_heads 2 --linear_units 32 --num_blocks 1 --cnn_module_kernel 3 --decoder_num_blocks 1 "
    "--r_num_blocks 1 --decoder_linear_units 32 --warmup_steps 2 --accelerator cpu --max_epochs 3"
)
KINDS = (
    "--num_workers 0 --batch_size 2 --checkpoint_every_n_steps 1",
    "--num_workers 2 --batch_size 2 --checkpoint_every_n_steps 2",
    "--num_workers 0 --batch_size 1 --accumulate_grad_batches 3 --checkpoint_every_n_minutes 0",
    "--num_workers 0 --max_batch_seconds 2 --checkpoint_every_n_steps 1 --ema_decay 0.5",
)
SAVING = f".*.ckpt{ASIDE}"  # what is there while a checkpoint is written
KEPT = (
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
    "skips",
    "global_step",
)


@options_class
class TortureOptions:
    kills: int = option(200, "how many", at_least=0, at_most=10**6)
    seed: int = option(0, "of the times of the kills", at_least=0, at_most=2**32 - 1)


def main(argv):
    args = build(TortureOptions, vars(make_parser(__doc__, TortureOptions).parse_args(argv)))
    torch.set_num_threads(1)  # and no pool of threads, which would not survive the forks
    datasets.disable_progress_bars()
    counts, rng, expected, shown = Counter(), random.Random(args.seed), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data")
        while counts["kills"] < args.kills:
            kind = KINDS[counts["runs"] % len(KINDS)]
            output = Path(folder) / str(counts["runs"])
            if kind not in expected:
                expected[kind] = unbroken(folder, output.with_name(f"whole{counts['runs']}"), kind)
            result, seconds = expected[kind]
            took = kill_until_done(
                command(folder, output, kind), output, seconds, rng, counts, args.kills
            )
            expected[kind] = (
                result,
                took or seconds,
            )  # what a run takes now, beside whatever else the machine does
            counts["runs"] += 1
            counts["differ"] += left(output) != result
            if counts["kills"] >= min(shown + 20, args.kills):
                shown = counts["kills"]
                report(counts)
    return 1 if counts["differ"] or counts["damaged"] else 0


def unbroken(folder, output, kind):
    """(what the run leaves, the seconds it takes)"""
    began = time.monotonic()
    launch(command(folder, output, kind), output)
    return left(output), time.monotonic() - began


def report(counts):
    print(
        f"{counts['kills']} kills, {counts['saving']} of them during a save, {counts['unsaved']} before the first checkpoint; "
        f"{counts['loaded']} checkpoints loaded, {counts['damaged']} did not; {counts['runs']} runs to their end, "
        f"{counts['differ']} of them not as unbroken",
        flush=True,
    )


def make_data(root: Path) -> None:
    """Ten training rows and two dev rows of noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("dev", 2)):
        rows = [rng.standard_normal(8000 + 700 * i).astype(np.float32) for i in range(count)]
        labels = [rng.integers(4, 12, 3).astype(np.int32) for _ in rows]
        datasets.Dataset.from_dict({"input_values": rows, "labels": labels}).save_to_disk(
            str(root / split / "0")
        )
    save_tokenizer(train_char(["abcdefgh"]), str(root / "tokenizer.json"))


def command(folder, output, kind) -> list[str]:
    return f"--data_root {folder}/data --output_dir {output} {SMALL} {kind}".split()


def kill_until_done(words, output, seconds, rng, counts, most) -> float | None:
    """Starts, kills and resumes one run until it ends; `seconds` is how long it takes unbroken.

    -> how long it took, if it was never killed.
    """
    began, before = time.monotonic(), counts["kills"]
    while True:
        resume = ["--resume"] if (output / "last.ckpt").exists() else ["--overwrite"]
        delay = rng.uniform(0, seconds) if counts["kills"] < most else None
        if not launch(words + resume, output, delay, in_save=rng.random() < 0.5):
            return time.monotonic() - began if counts["kills"] == before else None
        counts["kills"] += 1
        counts["saving"] += bool(list(output.glob(SAVING)))
        counts["unsaved"] += not (output / "last.ckpt").exists()
        for path in output.glob("*.ckpt"):
            try:
                read_checked(str(path))
                counts["loaded"] += 1
            except Exception as error:
                print(f"after kill {counts['kills']}: {error}", file=sys.stderr)
                counts["damaged"] += 1


def launch(words, output: Path, delay: float | None = None, in_save: bool = False) -> bool:
    """Trains in a forked process, which saves its imports. Kills it after `delay` seconds, with `in_save` at the next save.

    -> whether it was killed. Raises RuntimeError where it fails by itself.
    """
    child = os.fork()
    if not child:
        train_and_exit(words, output)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        late = delay is not None and time.monotonic() - began >= delay
        if late and (not in_save or list(output.glob(SAVING))):
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.0002 if late else 0.002)
    if status and os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError(f"training failed with {status}:\n{log_of(output).read_text()[-3000:]}")
    return bool(status)


def train_and_exit(words, output):
    status = 1
    log_of(output).parent.mkdir(exist_ok=True)
    log = os.open(log_of(output), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        train.main(words)
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def log_of(output: Path) -> Path:
    return output.with_name(output.name + ".log")


def left(output: Path) -> list:
    """All that a training leaves behind that must not depend on kills."""
    kept = [(output / "steps.jsonl").read_bytes()]
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = read_checked(str(output / name))
        leaves = torch.utils._pytree.tree_leaves({key: checkpoint.get(key) for key in KEPT})
        kept += [
            leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]
    return kept


if __name__ == "__main__":
    run(lambda argv: sys.exit(main(argv)))
