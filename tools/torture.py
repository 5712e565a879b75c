"""Kills a small training many times and resumes it each time: python -m tools.torture [--kills N]

The kills (kill -9) come at random times, half of them while a checkpoint is saved. Every checkpoint
that is there after a kill must load. Each run must end, to the bit, as the same run that was never
killed: weights, averages, optimizer, schedule, steps.jsonl. Otherwise the exit status is 1. The
training is on noise, on the CPU, in a temporary folder.
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from cli import build, make_parser, option, options_class, run

import datasets
import numpy as np
import torch
from tqdm import tqdm

import train
from files import ASIDE
from model import read_checked
from tokenizer import save_tokenizer, train_char

SMALL = (
    "--output_size 16 --attention_heads 2 --linear_units 32 --num_blocks 1 --cnn_module_kernel 3 "
    "--decoder_num_blocks 1 --r_num_blocks 1 --decoder_linear_units 32 --warmup_steps 2 "
    "--accelerator cpu --max_epochs 3"
)
KINDS = (
    "--num_workers 0 --batch_size 2 --checkpoint_every_n_steps 1",
    "--num_workers 2 --batch_size 2 --checkpoint_every_n_steps 2",
    "--num_workers 0 --batch_size 1 --accumulate_grad_batches 3 --checkpoint_every_n_minutes 0",
    "--num_workers 0 --max_batch_seconds 2 --checkpoint_every_n_steps 1 --ema_decay 0.5",
)
SAVING = f".*.ckpt{ASIDE}"  # matches the file that is there while a checkpoint is written
# What a checkpoint holds that must not depend on kills.
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
    options = build(TortureOptions, vars(make_parser(__doc__, TortureOptions).parse_args(argv)))
    torch.set_num_threads(1)  # a pool of threads would not survive the forks
    datasets.disable_progress_bars()
    # All forks share tqdm's own lock, and a process that is killed with it would keep it for ever.
    tqdm.set_lock(threading.RLock())
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data")
        torture(Path(folder), options, counts)
    return 1 if counts["differ"] or counts["damaged"] else 0


def torture(folder: Path, options: TortureOptions, counts: Counter) -> None:
    """Runs one kind of training after the other until there were enough kills, and counts."""
    rng = random.Random(options.seed)
    expected = {}  # kind -> what its run leaves
    seconds = {}  # kind -> how long its run takes
    reported = 0
    while counts["kills"] < options.kills:
        kind = KINDS[counts["runs"] % len(KINDS)]
        output = folder / str(counts["runs"])
        if kind not in expected:
            whole = output.with_name(f"whole{counts['runs']}")
            expected[kind], seconds[kind] = unbroken(folder, whole, kind)
        words = training_words(folder, output, kind)
        took = kill_until_done(words, output, seconds[kind], rng, counts, options.kills)
        # A run that was not killed says how long one takes now, as the machine may be busier.
        seconds[kind] = took or seconds[kind]
        counts["runs"] += 1
        counts["differ"] += remains(output) != expected[kind]
        if counts["kills"] >= min(reported + 20, options.kills):
            reported = counts["kills"]
            report(counts)


def unbroken(folder: Path, output: Path, kind: str) -> tuple[list, float]:
    """Trains without a kill -> what the run leaves, and the seconds it takes."""
    began = time.monotonic()
    launch(training_words(folder, output, kind), output)
    return remains(output), time.monotonic() - began


def report(counts: Counter) -> None:
    print(
        f"{counts['kills']} kills, {counts['saving']} of them during a save, "
        f"{counts['unsaved']} before the first checkpoint; "
        f"{counts['loaded']} checkpoints loaded, {counts['damaged']} did not; "
        f"{counts['runs']} runs to their end, {counts['differ']} of them not as unbroken",
        flush=True,
    )


def make_data(root: Path) -> None:
    """Writes ten training rows and two dev rows of noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("dev", 2)):
        rows = [rng.standard_normal(8000 + 700 * i).astype(np.float32) for i in range(count)]
        labels = [rng.integers(4, 12, 3).astype(np.int32) for _ in rows]
        dataset = datasets.Dataset.from_dict({"input_values": rows, "labels": labels})
        dataset.save_to_disk(str(root / split / "0"))
    save_tokenizer(train_char(["abcdefgh"]), str(root / "tokenizer.json"))


def training_words(folder: Path, output: Path, kind: str) -> list[str]:
    return f"--data_root {folder}/data --output_dir {output} {SMALL} {kind}".split()


def kill_until_done(words, output, seconds, rng, counts, most) -> float | None:
    """Starts, kills and resumes one run until it ends; `seconds` is how long it takes unbroken.

    There are no more kills once counts has `most`. -> how long the run took, if it was not killed.
    """
    began = time.monotonic()
    before = counts["kills"]
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
    """Trains in a forked process, which need not import anything again.

    Kills the process after `delay` seconds, with `in_save` at the next save after them. -> True if
    it was killed. Raises RuntimeError where the training fails by itself.
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


def remains(output: Path) -> list:
    """Lists all that a training leaves behind and kills must not change."""
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
