"""Checks on a GPU what no CPU can show: python -m tools.gpu_check [--json]

The command prints each check's figures with their limits, and pass, fail or skipped; then the card
and the versions. A check that is not done within five minutes of the start (--minutes) fails. The
exit status is 1 where a check fails. Limits of speed and memory hold for an H100 or H200 alone,
where nothing else runs. With --json the last line of stdout is one JSON object. `make test`, which
hides the GPU from itself, tests what needs none.

kernels        the fused kernels give torch's own numbers, in float32
nan            16-mixed, a row of NaN: every epoch skips its update and names the row
losses         20 updates in float32, without CUDA graphs and with them, have the same losses
waits          a step waits for the GPU once, apart from torch's CTC loss, which copies its lengths
ddp, fsdp      NCCL and FSDP start with one process, and train
step           base learns 48 x 1000 frames, without a graph and as a graph, where dropout differs
step_compiled  the same with compiled blocks, and what compiling takes, again in a second process
train_400      train.py, base, batches of 400 s: times real time by epoch, and few shapes
train_1600     the same with batches of 1,600 s and --compile
small          train.py, preset small, batches of 8
oom            on a full card train.py says so in one line, before the first update
transcribe     the whole command on an hour of speech, with rescoring; score does the same

The corpora are noise in a temporary folder, which takes up to 3 GB. The model that transcribes has
random weights, but a CTC branch that hears some three tokens a second. Epochs are timed without
validation and saving. With --an4 the command trains AN4 instead, with graphs and without, for each
of --seeds.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

from cli import (
    UserError,
    build,
    keep_freed_memory,
    make_parser,
    option,
    options_class,
    out_of_memory,
    run,
    shown,
)

import torch

from files import json_text
from tools import gpu_work as work
from train import commit

ROOM_ON_DISK = 3e9  # bytes
CHILD = "import sys; from tools.gpu_check import child; child(*sys.argv[1:])"
FAST = "H100", "H200"
NO_LIMIT = "no limit for this card"
NO_FIGURES = "name", "ok", "limits", "missed"  # of a result
# WeNet's code with its SDPA on an H100, torch 2.11, 2026-11-26: ms and MB of a step of base on
# 48 x 1000 frames in bfloat16.
WENET_MS, WENET_MB = 124, 7700


class Limit(NamedTuple):
    """Says what a figure must be, on `fast` cards alone or on any."""

    figure: str
    sign: str  # "<=" or ">="
    value: float
    fast: bool = False

    def met(self, figure) -> bool:
        """Returns whether the figure is there, finite, and within the limit."""
        if not isinstance(figure, (int, float)) or not math.isfinite(figure):
            return False
        return figure <= self.value if self.sign == "<=" else figure >= self.value


class Check(NamedTuple):
    """Calls `work` with a folder, a device and `arguments`, and judges the figures it returns.

    The check fails where that takes more than `seconds`. One that times nothing may run beside
    others, `together`.
    """

    name: str
    work: Callable[..., dict]
    seconds: int
    limits: tuple[Limit, ...]
    together: bool = False
    arguments: tuple[str, ...] = ()


FEW_SHAPES = Limit("shapes", "<=", 64), Limit("new_shapes", "<=", 0)
STEP_MB = Limit("peak_mb", "<=", WENET_MB, fast=True)
HOUR = (Limit("seconds", "<=", 10, fast=True),)
UPDATES = (Limit("updates", ">=", 2),)
CHECKS = (
    Check("kernels", work.check_kernels, 90, (Limit("largest_difference", "<=", 1e-5),), True),
    Check(
        "nan",
        work.check_nan,
        90,
        (Limit("named", ">=", 2), Limit("others", "<=", 0), Limit("bad_weights", "<=", 0)),
        True,
    ),
    Check(
        "losses",
        work.check_losses,
        90,
        (Limit("largest_difference", "<=", 1e-3), Limit("graphs", ">=", 1)),
        True,
    ),
    Check(
        "waits",
        work.check_waits,
        90,
        (Limit("waits_a_step", "<=", 1), Limit("graphs", ">=", 1)),
        True,
    ),
    Check("ddp", work.check_strategy, 90, UPDATES, True, ("ddp",)),
    Check("fsdp", work.check_strategy, 90, UPDATES, True, ("fsdp",)),
    Check(
        "step",
        work.check_step,
        60,
        (
            Limit("graphs", ">=", 1),
            STEP_MB,
            Limit("dropout_differs", ">=", 1e-6),
            Limit("same_seed_differs", "<=", 1e-4),
        ),
    ),
    Check(
        "step_compiled",
        work.check_compiled,
        150,
        (
            Limit("graph_ms", "<=", round(WENET_MS / 3, 1), fast=True),
            STEP_MB,
            Limit("compile_s", "<=", 60, fast=True),
            Limit("again_share", "<=", 0.99),
            Limit("recompiled", "<=", 0),
        ),
    ),
    Check(
        "train_400",
        work.check_train,
        90,
        (
            Limit("first_epoch_x", ">=", 4000, fast=True),
            Limit("second_epoch_x", ">=", 9000, fast=True),
            *FEW_SHAPES,
        ),
        arguments=("--max_batch_seconds 400",),
    ),
    Check(
        "train_1600",
        work.check_train,
        90,
        (Limit("third_epoch_x", ">=", 15000, fast=True), *FEW_SHAPES),
        arguments=("--max_batch_seconds 1600 --compile",),
    ),
    Check(
        "small",
        work.check_small,
        60,
        (Limit("updates_a_second", ">=", 60, fast=True), *FEW_SHAPES, Limit("graphs", ">=", 1)),
    ),
    Check(
        "oom",
        work.check_oom,
        60,
        (Limit("refused", ">=", 1), Limit("lines", "<=", 1), Limit("updates", "<=", 0)),
    ),
    Check("transcribe", work.check_transcribe, 60, (*HOUR, Limit("characters_a_file", ">=", 5))),
    Check("score", work.check_score, 60, HOUR),
)


@options_class
class CheckOptions:
    json: bool = option(False, "print one JSON object behind the table")
    only: tuple[str, ...] = option((), "run only these", choices=tuple(c.name for c in CHECKS))
    minutes: float = option(
        5.0, "checks that are not done by then fail; AN4 has no end", above=0, at_most=1e4
    )
    an4: str | None = option(None, "AN4's data root, to train on it instead")
    seeds: tuple[int, ...] = option((0, 1), "with --an4", at_least=0, at_most=2**32 - 1)


def main(argv) -> int:
    given = vars(make_parser(__doc__, CheckOptions).parse_args(argv))
    options = build(CheckOptions, given)
    for name, other in (("seeds", options.an4), ("only", not options.an4)):
        if name in given and not other:
            raise UserError(f"--{name} has no effect {'with' if options.an4 else 'without'} --an4")
    if not torch.cuda.is_available():
        raise UserError("torch finds no GPU, which this command checks; run it where one is")
    began = time.monotonic()
    about = {"card": name_of_card(), "torch": torch.__version__, "cuda": torch.version.cuda}
    about["commit"] = commit()
    ends = math.inf if options.an4 else began + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        results = run_checks(chosen(options), Path(folder), "cuda", ends, is_fast(about["card"]))
    about["seconds"] = round(time.monotonic() - began)
    verdicts = [verdict(result) for result in results]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("pass", "fail", "skipped"))
    print("{card}, torch {torch}, CUDA {cuda}, commit {commit}".format(**about))
    print(f"{counts}, in {about['seconds']} s")
    if options.json:
        print(json_text(about | {"checks": results}))
    return int("fail" in verdicts)


def name_of_card() -> str:
    try:
        return torch.cuda.get_device_name(0)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"torch sees a GPU that does not work ({first}); see nvidia-smi") from error


def is_fast(card: str) -> bool:
    return any(name in card for name in FAST)


def chosen(options: CheckOptions) -> list[Check]:
    if not options.an4:
        return [check for check in CHECKS if not options.only or check.name in options.only]
    limits = (Limit("difference", "<=", 0.03), Limit("graphs", ">=", 1))
    root = os.path.abspath(options.an4)
    return [
        Check(f"an4_{seed}", work.check_an4, 10**5, limits, arguments=(root, str(seed)))
        for seed in options.seeds
    ]


# ---- Running


def run_checks(checks, folder: Path, device: str, ends: float, fast: bool) -> list[dict]:
    """Makes the corpora and runs the checks -> results, printed as they come."""
    if shutil.disk_usage(folder).free < ROOM_ON_DISK:
        raise UserError(f"{folder} has less than 3 GB left; set TMPDIR to a folder that has them")
    if not all(check.work is work.check_an4 for check in checks):
        work.make_corpora(folder)
    results = []
    for _, group in itertools.groupby(checks, lambda check: check.together or check.name):
        with contextlib.closing(run_group(list(group), folder, device, ends)) as pairs:
            for check, figures in pairs:
                results.append(judge(check, figures, fast))
                print("\n".join(rows(results[-1])), flush=True)
    return results


def run_group(group, folder: Path, device: str, ends: float):
    """Runs checks beside each other -> pairs of a check and its figures, or {"error": why}."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = []
        for check in group if began < ends else ():
            processes.append(launch(check, folder, device))
            stack.callback(end, processes[-1])
        for check, process in itertools.zip_longest(group, processes):
            if process is None:
                yield check, {"error": "not run, as the time was over; give more --minutes"}
                continue
            until = min(began + check.seconds, ends)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.1))
            yield check, figures_of(check, process, folder, until - began)


def launch(check: Check, folder: Path, device: str) -> subprocess.Popen:
    """Starts a check on one card, in a process group of its own, which `end` ends."""
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    # With empty caches the first compilation is one.
    caches = ("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")
    paths = {name: str(folder / cache) for name, cache in caches}
    # As torch.profiler has it with CUDA graphs, which may crash once the profiler has ended.
    profiler = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    with open(log_of(check, folder), "w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, check.name, check.work.__name__, folder, device]
            + list(check.arguments),
            cwd=work.ROOT,
            env={**os.environ, **paths, **profiler, "CUDA_VISIBLE_DEVICES": cards.split(",")[0]},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen) -> None:
    """Ends a check with all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def child(name: str, function: str, folder: str, device: str, *arguments: str) -> None:
    """Does a check's work in a fresh process, and writes its figures."""
    keep_freed_memory()
    try:
        figures = getattr(work, function)(Path(folder), device, *arguments)
    except Exception as error:
        traceback.print_exc()
        # CUDA's errors have their reason in the first of many lines.
        first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if not out_of_memory(error) and "does not fit the memory" not in first:
            print(first, flush=True)
            sys.exit(1)
        figures = {"no_memory": first}
    (Path(folder) / f"{name}.json").write_text(json_text(figures))


def log_of(check: Check, folder: Path) -> Path:
    return folder / f"{check.name}.log"


def figures_of(check: Check, process: subprocess.Popen, folder: Path, seconds: float) -> dict:
    """Returns what the check has written, or {"error": why}, and prints the end of its log."""
    if process.returncode == 0:
        return json.loads((folder / f"{check.name}.json").read_text())
    text = log_of(check, folder).read_text(errors="replace")
    print(f"---- {check.name}\n{text[-5000:]}\n----", file=sys.stderr)
    if process.returncode is None:
        return {"error": f"not done after {seconds:.0f} s, at: {work.last_line(text)}"}
    return {"error": work.last_line(text) or f"ended with status {process.returncode}"}


# ---- Results


def judge(check: Check, figures: dict, fast: bool) -> dict:
    """Returns {"name", "ok", figures ..., "limits", "missed"}; ok is None for a skipped check.

    A check is skipped, too, where the card has no memory for it, but a fast card must have it.
    """
    if "no_memory" in figures:
        figures = {"error" if fast else "skipped": figures["no_memory"]}
    limits = {}
    missed = []
    for limit in check.limits if figures.keys().isdisjoint(("error", "skipped")) else ():
        holds = fast or not limit.fast
        limits[limit.figure] = f"{limit.sign} {limit.value:g}" if holds else NO_LIMIT
        if holds and not limit.met(figures.get(limit.figure)):
            missed.append(limit.figure)
    ok = None if "skipped" in figures else "error" not in figures and not missed
    return {"name": check.name, "ok": ok, **figures, "limits": limits, "missed": missed}


def verdict(result: dict) -> str:
    return {True: "pass", False: "fail", None: "skipped"}[result["ok"]]


def rows(result: dict) -> list[str]:
    """Returns the table's rows of a check, one for each figure or limit."""
    limits, missed = result["limits"], result["missed"]
    lines = []
    for name in [key for key in result | limits if key not in NO_FIGURES]:
        value = result.get(name, "not measured")
        if name in ("error", "skipped"):
            lines.append(shown(value, 200))
            continue
        told = shown(value, 200) if isinstance(value, str) else f"{value:,.5g}"
        limit = limits.get(name, "") + ", missed" * (name in missed)
        lines.append(f"{name:20}{told:>12}  {limit}".rstrip())
    head = f"{result['name']:14}{verdict(result):8}"
    return [f"{'' if i else head:22}{line}" for i, line in enumerate(lines)]


if __name__ == "__main__":
    run(lambda argv: sys.exit(main(argv)))
