"""Measures what this project costs on your machine: python -m tools.bench WHAT [--json]

WHAT is data, train, decode, stream or growth. Figures are medians after a warm-up. Times are
wall-clock times, so let nothing else run. With --json the last line of stdout is one JSON object.

data    makes a corpus of --rows rows where --data_root has none. A row has 10 ms of noise, but the
        lengths and labels of read speech, 1,300 hours in all. It measures setup('fit') in a fresh
        process (once, no warm-up), the growth of its memory, one epoch's batch plan, the padding at
        16 rows, shapes and padding with --few_shapes on and batches of 400 s, and how many times
        faster than real time one loader process makes features of utterances, fully augmented, or
        as train.py's flags of augmentation say (--noise DIR --rir DIR).
train   measures forward and backward on 8 x 600 frames, 15 labels, vocabulary 4,233, float32, on
        the GPU where there is one. share is the rate at which the work of WeNet's code is done
        (357 GFLOP, preset base), over gemm_gflops, the rate of torch's product of two 2048 x 2048
        float32 matrices. share can pass 1, where the network's own product is faster than torch's
        (linear_gflops). audio_hours counts the hours of sound that an hour of such steps reads;
        peak_mb is the most memory above the memory in use before.
decode  measures ms per utterance of 10 s with one thread and V = 5,000: searches over made-up CTC
        output, which has 40 spikes among blanks or (flat) any token as likely as another, and the
        second pass over their n-best. rtf is the time for features, encoder and both passes, 16
        at once, over the length of the sound; host_s_per_hour what a GPU leaves to the CPU of it.
stream  measures with one thread the encoder's ms per chunk, "size/left" in encoder frames and left
        chunks, once all left chunks are there. rtf is for features, encoder, prefix beam search.
growth  draws in --png the seconds and memory of a training step over the length of an utterance
        and over the batch; ms per chunk over an hour of streaming with 4 left chunks and over ten
        minutes with all of them; seconds of setup over rows.
"""

import re
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from cli import UserError, build, keep_freed_memory, make_parser, option, options_class, run

import numpy as np
import torch

from decode import SearchOptions, ctc_greedy_search, ctc_prefix_beam_search
from files import json_text
from kernels import Linear
from presets import PRESETS
from sampler import LengthGroupedSampler
from tools import workloads
from transforms import Augment

REFERENCE_GFLOP = 357  # what WeNet's code computes for a step of preset base
GEMM = 2048
WARM_UP = 4  # steps; an allocator takes a few to settle
ROUNDS = 15
CHUNKS = ((4, 4), (8, 4), (16, 4))  # encoder frames of 40 ms, left chunks


@options_class
class BenchOptions:
    preset: str = option("base", "size of the model; share is for base", choices=tuple(PRESETS))
    json: bool = option(False, "print one JSON object instead of the table")
    seconds: float = option(5.0, "repeat each measurement so long", at_least=0.0, at_most=3600.0)


@options_class
class CorpusOptions:
    """Holds the options of `data` and `growth`."""

    data_root: str = option("data/bench", "where the made-up corpus is, or will be made")
    rows: int = option(620_000, "rows of it", at_least=100, at_most=10**8)
    loader_root: str | None = option(
        None, "data that prepare.py wrote, for the loader's speed instead of noise"
    )


@options_class
class TrainOptions:
    """Holds the options of `train`."""

    frames: int = option(
        600, "frames of an utterance; share is for the default alone", at_least=50, at_most=10**5
    )
    precision: str = option(
        "32", "numbers of the matrix products; share is for 32 alone", choices=("32", "bf16-mixed")
    )
    gradient_checkpointing: bool = option(False, "as train.py has it")
    compile: bool = option(False, "as train.py has it")


@options_class
class GrowthOptions:
    """Holds the options of `growth`."""

    png: str = option("docs/growth.png", "where the picture goes")
    hours: float = option(1.0, "how much sound is streamed", above=0, at_most=100.0)


def main(argv: list[str]) -> None:
    kinds = (CorpusOptions, Augment, TrainOptions, GrowthOptions)
    parser = make_parser(__doc__, BenchOptions, *kinds)
    parser.add_argument("what", choices=tuple(COMMANDS), help="what to measure")
    given = vars(parser.parse_args(argv))
    measure, *takes = COMMANDS[given["what"]]
    for kind in kinds:
        for name in kind.__dataclass_fields__:
            if name in given and kind not in takes:
                raise UserError(f"--{name} is not for `{given['what']}`; leave it out")
    options = build(BenchOptions, given)
    trim = workloads.AUGMENT.max_trim
    results = measure(options, *(build(kind, given, max_trim=trim) for kind in takes))
    print(json_text(results) if options.json else as_table(results))


def as_table(results: dict) -> str:
    lines = []
    for name, entry in results.items():
        for key, value in (entry if isinstance(entry, dict) else {"": entry}).items():
            numbers = value if isinstance(value, list) else [value]
            cells = ("-" if number is None else f"{number:,.10g}" for number in numbers)
            lines.append(f"{f'{name} {key}'.strip():24}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


# ---- Measuring


def timer_of(work, threads: int):
    """Returns torch's timer of work(); it waits for the GPU where there is one."""
    from torch.utils.benchmark import Timer  # where CUDA is half installed, its import says so

    return Timer("work()", globals={"work": work}, num_threads=threads)


def median_seconds(work, options: BenchOptions, threads: int = 1) -> float:
    """Times work() after one call that warms up."""
    timer = timer_of(work, threads)
    timer.timeit(1)
    return timer.blocked_autorange(min_run_time=options.seconds).median


def gflops(product, options: BenchOptions) -> float:
    """Measures a product of two GEMM x GEMM matrices, in 10^9 operations per second."""
    return 2 * GEMM**3 / median_seconds(product, options, torch.get_num_threads()) / 1e9


def memory_mb(field: str) -> float:
    """Reads a field of /proc/self/status in MB.

    VmRSS is the memory now, VmHWM its highest, RssAnon the memory without files that are mapped.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s*(\d+)", status.read_text() if status.exists() else "", re.M)
    if not found:
        raise UserError(
            f"memory is read from /proc/self/status, and there is no {field}; use Linux"
        )
    return int(found[1]) / 1024


@contextmanager
def watched_anon_mb():
    """Yields a list to which a thread adds RssAnon every 2 ms, from the beginning to the end."""
    seen = [memory_mb("RssAnon")]
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(memory_mb("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield seen
    finally:
        done.set()
    seen.append(memory_mb("RssAnon"))


def in_fresh_process(work, *arguments):
    """Runs work(*arguments) where nothing has been allocated before."""
    with ProcessPoolExecutor(1, get_context("spawn"), keep_freed_memory) as fresh:
        return fresh.submit(work, *arguments).result()


# ---- Data


def bench_data(options: BenchOptions, corpus: CorpusOptions, augment: Augment) -> dict:
    root = workloads.made_corpus(corpus.data_root, corpus.rows)
    results = in_fresh_process(measure_setup, str(root), options)
    if results["rows"] != corpus.rows:
        raise UserError(
            f"{root} has {results['rows']} rows, not {corpus.rows}; give --rows {results['rows']} "
            "or another --data_root"
        )
    return results | measure_loader(corpus.loader_root or str(root / "loader"), options, augment)


def measure_setup(root: str, options: BenchOptions) -> dict:
    """Measures, in a process of its own, the setup of a corpus and the batches of its sampler."""
    data = workloads.data_module(root)
    with watched_anon_mb() as seen:
        sampler, setup_s = workloads.timed_setup(data)
    lengths = sampler.lengths  # of the rows that are kept
    plan = LengthGroupedSampler(lengths=lengths, batch_size=workloads.BATCH).plan(0)
    return {
        "rows": len(data.splits["train"]),
        "setup_s": setup_s,
        "setup_anon_mb": max(seen) - seen[0],
        "plan_s": median_seconds(partial(sampler.plan, 1), options),
        "padding_waste": workloads.padding_waste(lengths, plan),
        "megabatch": sampler.megarows // workloads.BATCH,
        **workloads.few_shapes(data),
    }


def measure_loader(root: str, options: BenchOptions, augment: Augment) -> dict:
    """Times whole epochs, once the loader's process has started and has had an epoch."""
    data = workloads.data_module(root, num_workers=1)
    data.augment = augment
    data.setup("fit")
    loader = data.train_dataloader()
    seconds = data.lengths[data.kept].sum() / workloads.RATE
    epoch_s = median_seconds(lambda: sum(1 for _ in loader), options)
    return {"loader_x_realtime": seconds / epoch_s}


# ---- Train


def bench_train(options: BenchOptions, training: TrainOptions) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = memory_mb("VmRSS")
    step = workloads.training_step(options.preset, device, workloads.ROWS, **asdict(training))
    for _ in range(WARM_UP):
        step()
    on_gpu = device.type == "cuda"
    peak_mb = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory_mb("VmHWM") - before
    step_s, gemm, linear = rates(step, device, options)
    measured = (options.preset, training.frames, training.precision)
    is_reference = measured == ("base", workloads.FRAMES, "32")
    return {
        "gemm_gflops": gemm,
        "linear_gflops": linear,
        "step_s": step_s,
        "share": REFERENCE_GFLOP / step_s / gemm if is_reference else None,
        "audio_hours": workloads.ROWS * training.frames / workloads.FRAMES_A_SECOND / step_s,
        "peak_mb": peak_mb,
    }


def rates(step, device, options: BenchOptions) -> list[float]:
    """Measures seconds of a step, and GFLOP/s of torch's matrix product and of Linear.

    The three are timed in turn, because a machine's speed changes while it is measured.
    """
    brief = replace(options, seconds=options.seconds / ROUNDS)
    timer = timer_of(step, torch.get_num_threads())
    a, b = torch.rand(2, GEMM, GEMM, device=device)
    layer = Linear(GEMM, GEMM, bias=False, device=device).requires_grad_(False)
    rounds = [
        (timer.timeit(1).median, gflops(lambda: a @ b, brief), gflops(lambda: layer(a), brief))
        for _ in range(ROUNDS)
    ]
    return [statistics.median(values) for values in zip(*rounds)]


# ---- Decode and stream


def bench_decode(options: BenchOptions) -> dict:
    model = workloads.make_model(options.preset)
    spikes = workloads.ctc_output(spikes=True)
    flat = workloads.ctc_output(spikes=False)
    utterances, frames, _ = spikes.shape
    lengths = torch.full((utterances,), frames)
    encoded = torch.randn(utterances, frames, model.options.output_size)
    beam = partial(ctc_prefix_beam_search, search=SearchOptions())
    hypotheses = beam(spikes, lengths)

    def ms(work, utterances=utterances):
        return 1000 * median_seconds(work, options) / utterances

    return {
        "prefix_beam_ms_batch16": ms(lambda: beam(spikes, lengths)),
        "prefix_beam_ms_single": ms(lambda: beam(spikes[:1], lengths[:1]), 1),
        "prefix_beam_flat_ms_batch16": ms(lambda: beam(flat, lengths)),
        "prefix_beam_flat_ms_single": ms(lambda: beam(flat[:1], lengths[:1]), 1),
        "greedy_ms": ms(lambda: ctc_greedy_search(spikes, lengths)),
        "rescoring_ms": ms(lambda: model.rescore(hypotheses, encoded, lengths)),
        "rtf": ms(workloads.recognition(model, partial(beam, spikes))) / 1000 / workloads.SECONDS,
        "host_s_per_hour": 3.6 * ms(workloads.host_work(model, spikes)) / workloads.SECONDS,
    }


def bench_stream(options: BenchOptions) -> dict:
    model = workloads.make_model(options.preset)
    chunk_ms = {
        f"{size}/{left}": 1000 * median_seconds(workloads.chunk(model, size, left), options)
        for size, left in CHUNKS
    }
    listen = workloads.listening(model, *CHUNKS[-1])
    return {"chunk_ms": chunk_ms, "rtf": median_seconds(listen, options) / workloads.SECONDS}


# ---- Growth


def bench_growth(options: BenchOptions, corpus: CorpusOptions, growth: GrowthOptions) -> dict:
    root = workloads.made_corpus(corpus.data_root, corpus.rows)
    if not (root / "train" / str(workloads.shard_count(corpus.rows) - 1)).exists():
        raise UserError(
            f"{root} has fewer than {corpus.rows} rows; give --rows for what it has, or another "
            "--data_root"
        )
    lengths = [(workloads.ROWS, workloads.FRAMES * times // 6) for times in (1, 2, 4, 8, 16)]
    batches = [(rows, workloads.FRAMES) for rows in (1, 2, 4, 8, 16)]
    row_counts = [corpus.rows // parts for parts in (16, 8, 4, 2, 1)]
    results = {
        "length": in_fresh_process(measure_steps, lengths, options),
        "batch": in_fresh_process(measure_steps, batches, options),
        "stream 4 left": in_fresh_process(measure_stream, 4, growth.hours, options),
        "stream all left": in_fresh_process(measure_stream, -1, growth.hours / 6, options),
        "setup": {n: in_fresh_process(workloads.setup_seconds, root, n) for n in row_counts},
    }
    draw(results, growth.png, options.preset)
    return results


def measure_steps(sizes, options: BenchOptions) -> dict:
    """Measures {"rows x frames": [seconds, MB]}; sizes must rise, because VmHWM never falls."""
    before = memory_mb("VmRSS")
    results = {}
    for rows, frames in sizes:
        step = workloads.training_step(options.preset, torch.device("cpu"), rows, frames)
        seconds = median_seconds(step, options, torch.get_num_threads())
        results[f"{rows} x {frames}"] = [seconds, memory_mb("VmHWM") - before]
    return results


def measure_stream(left: int, hours: float, options: BenchOptions) -> dict:
    """Measures {minute: median encoder ms per chunk} over one utterance without end."""
    torch.set_num_threads(1)
    model = workloads.make_model(options.preset)
    size = CHUNKS[-1][0]
    frames = workloads.feature_frames(model, size)
    state = model.stream_state(size, left)
    times = []
    for _ in range(int(hours * 3600 * workloads.FRAMES_A_SECOND / frames)):
        features = torch.randn(1, frames, 80)
        began = time.perf_counter()
        _, state = model.stream(features, state)
        times.append(1000 * (time.perf_counter() - began))
    medians = [float(np.median(part)) for part in np.array_split(np.array(times), 12)]
    return {round(hours * 60 * (i + 1) / 12, 1): median for i, median in enumerate(medians)}


def draw(results: dict, path: str, preset: str) -> None:
    from matplotlib.figure import Figure  # which needs no screen, unlike pyplot

    figure = Figure(figsize=(10, 7), layout="constrained")
    (by_length, by_batch), (streaming, setup) = figure.subplots(2, 2)
    draw_steps(by_length, results["length"], 1, f"{workloads.ROWS} utterances (preset {preset})")
    draw_steps(by_batch, results["batch"], 0, f"utterances of {workloads.FRAMES} frames")
    for left in ("4 left", "all left"):
        streaming.plot(*zip(*results[f"stream {left}"].items()), "o-", label=f"{left} chunks")
    streaming.set(title=f"streaming, chunk {CHUNKS[-1][0]}", xlabel="minutes of sound", ylim=0)
    streaming.set(ylabel="ms per chunk")
    streaming.legend()
    setup.plot(*zip(*results["setup"].items()), "o-")
    setup.set(title="setup", xlabel="rows", ylabel="seconds", xlim=0, ylim=0)
    figure.savefig(path, dpi=80)


def draw_steps(axis, steps: dict, part: int, fixed: str) -> None:
    """Draws seconds and MB over one part of "rows x frames"; `fixed` says what the other one is."""
    sizes = [int(size.split(" x ")[part]) for size in steps]
    seconds, megabytes = zip(*steps.values())
    axis.plot(sizes, seconds, "o-")
    axis.set(title=f"training step, {fixed}", xlabel=("utterances", "frames")[part])
    axis.set(ylabel="seconds", xlim=0, ylim=0)
    right = axis.twinx()
    right.plot(sizes, megabytes, "s--", color="tab:orange")
    right.set(ylabel="MB (dashed)", ylim=0)


# What to measure: the function, and the options that it takes besides BenchOptions.
COMMANDS = {
    "data": (bench_data, CorpusOptions, Augment),
    "train": (bench_train, TrainOptions),
    "decode": (bench_decode,),
    "stream": (bench_stream,),
    "growth": (bench_growth, CorpusOptions, GrowthOptions),
}


if __name__ == "__main__":
    run(main)
