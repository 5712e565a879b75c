"""Measures what this project costs here: python bench.py {data,train,decode,stream,growth} [--preset base] [--json]

Every figure is a median after a warm-up; times are wall-clock, so let nothing else run. With --json the last line of stdout is
one JSON object.

data    a corpus of --rows rows, made where --data_root has none (10 ms of noise each, while `length` and labels are those of
        1,300 hours of reading): setup('fit') in a fresh process (once, by its nature), the growth of that process's anonymous
        memory at its highest, one epoch's batch plan, padding at 16 rows beside the length grouping of HF's Trainer; then one
        loader process with one thread and all augmentation on whole utterances, beside the original lightning-U2's way.
train   forward and backward on 8 x 600 frames, 15 labels, vocabulary 4,233, float32, on the GPU where there is one.
        share = what WeNet's code must compute for it (357 GFLOP, preset base) per second, over the rate of a 2048 x 2048
        float32 matrix product, torch's, gemm_gflops; the network's own may be faster (linear_gflops), and the share above 1.
        audio_hours = those that an hour of such steps reads; peak_mb = the most memory over what the process had before.
decode  ms per utterance of 10 s with one thread, V = 5,000: searches over made-up CTC output, 40 spikes among blanks or
        (flat) any token as likely as another, and the second pass over the n-best of the spikes; rtf = features, encoder, prefix
        beam search and second pass, 16 utterances at once.
stream  encoder ms per chunk "size/left" (in encoder frames and chunks) with one thread, left chunks full; rtf = features,
        encoder and prefix beam search of the first pass.
growth  how that grows, and a picture of it in --png: seconds and memory of a training step over the length of an utterance
        and over the batch; ms per chunk over an hour of streaming with 4 left chunks and over ten minutes with all of them;
        seconds of setup over the rows of a corpus.
"""

import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from cli import (
    SPARING,
    UserError,
    build,
    keep_freed_memory,
    make_parser,
    option,
    options_class,
    run,
)

import numpy as np
import torch
import torchaudio
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader

from conformer import PRESETS, ModelOptions, U2Conformer, receptive_field
from files import json_text, published
from kernels import Linear, for_few_rows
from sampler import LengthGroupedSampler
from tokenizer import SPECIALS, Tokenizer, load_tokenizer, save_tokenizer, train_char
from transforms import Augment, Frontend, extract, make_generator, spec_sub, spec_trim

# Lightning and datasets are imported where they are used: `train` runs without them.

REFERENCE_GFLOP = 357  # what WeNet's code computes for the work of `train` with preset base
GEMM = 2048
FRAMES, LABELS, ROWS, VOCABULARY = 600, 15, 8, 4233  # of `train`
UTTERANCES, SAMPLES, ENCODER_FRAMES, PIECES, SPIKES = (
    16,
    160_720,
    250,
    5000,
    40,
)  # of `decode`: 10 s at 16 kHz
CHUNKS = ((4, 4), (8, 4), (16, 4))  # of `stream`: encoder frames of 40 ms, left chunks
WARM_UP, ROUNDS = 4, 15  # steps of `train`; an allocator takes a few to settle
BATCH = 16  # rows, of `data`
SHARD_ROWS, LOADER_ROWS, SHORT = (
    2000,
    320,
    160,
)  # prepare.py's shards; rows with whole audio; samples of all other rows
LABELS_A_SECOND = 14  # characters of read English
RATE, FRAMES_A_SECOND = 16000, 100
AUGMENT = Augment(max_trim=50)  # all of it


@options_class
class BenchOptions:
    preset: str = option(
        "base", "size of the model; the reference of `share` is base", choices=tuple(PRESETS)
    )
    json: bool = option(False, "print one JSON object instead of the table")
    seconds: float = option(
        5.0, "repeat each measurement for so long", at_least=0.0, at_most=3600.0
    )


@options_class
class DataOptions:
    """What only `data` takes."""

    data_root: str = option("data/bench", "where the made-up corpus is, or will be made")
    rows: int = option(620_000, "rows of it", at_least=100, at_most=10**8)
    loader_root: str | None = option(
        None, "data that prepare.py wrote, for the loader's speed instead of noise"
    )


@options_class
class TrainOptions:
    """What only `train` takes."""

    frames: int = option(
        FRAMES,
        "feature frames of an utterance; share is for the default alone",
        at_least=50,
        at_most=10**5,
    )
    precision: str = option(
        "32", "numbers of the matrix products; share is for 32 alone", choices=("32", "bf16-mixed")
    )
    gradient_checkpointing: bool = option(False, "as train.py has it")
    compile: bool = option(False, "as train.py has it")


@options_class
class GrowthOptions:
    """What only `growth` takes."""

    png: str = option("growth.png", "where the picture goes")
    hours: float = option(1.0, "how much sound is streamed", above=0, at_most=100.0)


def main(argv: list[str]) -> None:
    parser = make_parser(__doc__, BenchOptions, DataOptions, TrainOptions, GrowthOptions)
    parser.add_argument("what", choices=tuple(COMMANDS), help="what to measure")
    given = vars(parser.parse_args(argv))
    command, *takes = COMMANDS[given["what"]]
    for kind in (DataOptions, TrainOptions, GrowthOptions):
        for name in kind.__dataclass_fields__:
            if name in given and kind not in takes:
                raise UserError(f"--{name} is not for `{given['what']}`; leave it out")
    options = build(BenchOptions, given)
    results = command(options, *(build(kind, given) for kind in takes))
    print(json_text(results) if options.json else as_table(results))


def as_table(results: dict) -> str:
    flat = {
        f"{name} {key}".strip(): value
        for name, entry in results.items()
        for key, value in (entry if isinstance(entry, dict) else {"": entry}).items()
    }
    return "\n".join(
        f"{name:24}" + "".join(map(as_number, value if isinstance(value, list) else [value]))
        for name, value in flat.items()
    )


def as_number(value) -> str:
    return format("-" if value is None else format(value, ",.10g"), ">14")


# ------------------------------------------------------------------------------------------------------------- measuring


def median_seconds(work, options: BenchOptions, threads: int = 1) -> float:
    timer = Timer(
        "work()", globals={"work": work}, num_threads=threads
    )  # waits for the GPU, if there is one
    timer.timeit(1)  # warms up
    return timer.blocked_autorange(min_run_time=options.seconds).median


def gflops(product, options: BenchOptions) -> float:
    """The rate of a product of two float32 matrices, GEMM x GEMM each: 10^9 operations per second."""
    return 2 * GEMM**3 / median_seconds(product, options, torch.get_num_threads()) / 1e9


def memory_mb(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS (memory), VmHWM (its highest), RssAnon (without files that are mapped)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024
    except (OSError, StopIteration):
        raise UserError(
            f"memory is read from /proc/self/status, and there is no {field}; use Linux"
        ) from None


@contextmanager
def highest_anon_mb():
    """Yields a list; in it, at the end, the most that RssAnon has grown within, looked at every 2 ms."""
    before, found, done = memory_mb("RssAnon"), [0.0], threading.Event()

    def look():
        while not done.wait(0.002):
            found[0] = max(found[0], memory_mb("RssAnon") - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found[0] = max(found[0], memory_mb("RssAnon") - before)


# ------------------------------------------------------------------------------------------------------ data: the corpus


def corpus(data: DataOptions) -> Path:
    """Where it is, made if it is not there."""
    root = Path(data.data_root)
    if not root.exists():
        make_corpus(root, data.rows)
    return root


def make_corpus(root: Path, rows: int) -> None:
    """Writes root/train and root/dev with short audio, root/loader with whole audio, all or nothing."""
    tokenizer = train_char(["abcdefghijklmnopqrstuvwxyz '"])
    with published(str(root), "a corpus of bench.py", overwrite=False) as folder:
        write_shards(Path(folder), tokenizer, {"train": rows, "dev": rows // 100}, short=True)
        write_shards(
            Path(folder) / "loader",
            tokenizer,
            {"train": min(rows, LOADER_ROWS), "dev": 1},
            short=False,
        )


def shard_count(rows: int) -> int:
    return -(-rows // SHARD_ROWS)


def write_shards(root: Path, tokenizer: Tokenizer, splits: dict[str, int], short: bool) -> None:
    import datasets

    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    for split, rows in splits.items():
        for shard in range(shard_count(rows)):
            table = make_table(rng, min(SHARD_ROWS, rows - shard * SHARD_ROWS), tokenizer, short)
            datasets.Dataset(table).save_to_disk(root / split / str(shard))
    save_tokenizer(tokenizer, str(root / "tokenizer.json"))


def utterance_seconds(rng: np.random.Generator, rows: int) -> np.ndarray:
    """(rows,) as long as read sentences are: log-normal."""
    return np.clip(rng.lognormal(np.log(6.7), 0.55, rows), 0.8, 30)


def make_table(rng: np.random.Generator, rows: int, tokenizer: Tokenizer, short: bool):
    """A pyarrow Table with the columns that prepare.py writes: noise, and words of five random letters; whole_length has the
    samples that a row would have if it were not short."""
    import pyarrow as pa

    seconds = utterance_seconds(rng, rows)
    lengths = (seconds * RATE).astype(np.int64)
    samples = np.full(rows, SHORT) if short else lengths
    audio = rng.standard_normal(samples.sum(), np.float32) * np.float32(0.1)
    text_ends = offsets((seconds * LABELS_A_SECOND).astype(np.int64))
    space, letter_a = map(tokenizer.tokens.index, " a")
    ids = rng.integers(letter_a, letter_a + 26, text_ends[-1], np.int32)
    ids[5::6] = space
    characters = np.array([ord(token[0]) for token in tokenizer.tokens], np.uint8)[ids]
    text = pa.StringArray.from_buffers(rows, pa.py_buffer(text_ends), pa.py_buffer(characters))
    labels = pa.StructArray.from_arrays([pa.ListArray.from_arrays(text_ends, ids)], ["input_ids"])
    return pa.table(
        {
            "input_values": pa.ListArray.from_arrays(offsets(samples), audio),
            "labels": labels,
            "length": samples,
            "whole_length": lengths,
            "text": text,
        }
    )


def offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


# ----------------------------------------------------------------------------------------------- data: setup and batches


def bench_data(options: BenchOptions, data: DataOptions) -> dict:
    root = corpus(data)
    results = in_fresh_process(measure_setup, str(root), options)
    if results["rows"] != data.rows:
        raise UserError(
            f"{root} has {results['rows']} rows, not {data.rows}; give --rows {results['rows']} or another "
            "--data_root"
        )
    loader_root = data.loader_root or str(root / "loader")
    return results | measure_loader(loader_root, options)


def data_module(root: str, **options):
    import datamodule

    return datamodule.SpeechDataModule(
        data_roots=[root],
        tokenizer=load_tokenizer(str(Path(root) / "tokenizer.json")),
        frontend=Frontend(),
        augment=AUGMENT,
        options=datamodule.DataOptions(batch_size=BATCH, **options),
    )


def measure_setup(root: str, options: BenchOptions) -> dict:
    """In a process of its own: timed_setup, and the batches of its sampler."""
    data = data_module(root)
    with highest_anon_mb() as grown:
        sampler, setup_s = timed_setup(data)
    lengths = sampler.lengths  # of the rows that are kept
    plan = LengthGroupedSampler(lengths=lengths, batch_size=BATCH).plan(0)
    return {
        "rows": len(data.splits["train"]),
        "setup_s": setup_s,
        "setup_anon_mb": grown[0],
        "plan_s": median_seconds(partial(sampler.plan, 1), options),
        "padding_waste": padding_waste(lengths, plan),
        "hf_padding_waste": padding_waste(lengths, hf_plan(lengths)),
        "megabatch": sampler.megarows // BATCH,
    }


def timed_setup(data):
    """What a training does before its first batch, as if the rows were whole: the sampler, and the seconds until it is there."""
    began = time.perf_counter()
    with mock.patch(
        "datamodule.audio_lengths", lambda dataset: dataset.data.column("whole_length").to_numpy()
    ):
        data.setup("fit")
    return data.sampler(0, 1), time.perf_counter() - began


def padding_waste(lengths: np.ndarray, plan) -> float:
    """The share of all batches that is padding."""
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in plan)
    return 1 - int(lengths.sum()) / padded


def hf_plan(lengths: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Batches as transformers' LengthGroupedSampler makes them: 50 batches of random rows sorted, the longest row first."""
    megabatches = max(min(len(lengths) // (BATCH * 4), 50), 1)
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.lexsort((-lengths[order], np.arange(len(order)) // (megabatches * BATCH)))]
    longest = np.argmax(lengths[order])
    order[[0, longest]] = order[[longest, 0]]
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


# ------------------------------------------------------------------------------------------------------ data: the loader


def measure_loader(root: str, options: BenchOptions) -> dict:
    data = data_module(root, num_workers=1)
    data.setup("fit")
    ours = data.train_dataloader()
    batches = list(ours.sampler)
    seconds = data.lengths[data.kept].sum() / RATE
    few = batches[:: -(-len(batches) // 8)]  # of every length; the original takes its time
    few_seconds = data.lengths[[row for batch in few for _, row in batch]].sum() / RATE
    original = DataLoader(
        Original(data.splits["train"]),
        sampler=few,
        batch_size=None,
        num_workers=1,
        worker_init_fn=one_thread,
        persistent_workers=True,
    )
    return {
        "loader_x_realtime": seconds / median_epoch(ours, options),
        "original_x_realtime": few_seconds / median_epoch(original, options),
    }


def one_thread(_) -> None:
    torch.set_num_threads(1)


def median_epoch(loader: DataLoader, options: BenchOptions) -> float:
    """Seconds from asking for the first batch to having the last, once the worker has started and has had an epoch."""
    times, enough = [], time.perf_counter() + options.seconds
    for _ in loader:
        pass
    while not times or time.perf_counter() < enough:
        began = time.perf_counter()
        for _ in loader:
            pass
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Original:
    """The original lightning-U2's examples: rows as Python lists, window and filter bank anew for every utterance.

    Its speeds came from sox, which torchaudio no longer has; here they are torchaudio's resampling.
    """

    def __init__(self, dataset):
        self.dataset, self.sub, self.trim = (
            dataset.with_format(None),
            spec_sub(AUGMENT),
            spec_trim(AUGMENT),
        )

    def __getitem__(self, keys):
        import datamodule

        return datamodule.collate([self.example(*key) for key in keys])

    def example(self, epoch: int, row: int):
        item, generator = self.dataset[row], make_generator(0, epoch, row)
        waveform = torch.FloatTensor(item["input_values"])
        speed = AUGMENT.speeds[int(torch.randint(len(AUGMENT.speeds), (), generator=generator))]
        if speed != 1:
            waveform = torchaudio.functional.resample(waveform, round(10 * speed), 10)
        waveform = (waveform - waveform.mean()) / torch.sqrt(waveform.var() + 1e-7)
        mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=RATE,
            n_fft=400,
            win_length=400,
            hop_length=160,
            n_mels=80,
            window_fn=torch.hamming_window,
        )
        features = torch.log1p(mel(waveform[None]))  # (1,F,T)
        for _ in range(AUGMENT.num_freq_masks):
            features = torchaudio.transforms.FrequencyMasking(AUGMENT.max_freq_mask)(features)
        for _ in range(AUGMENT.num_time_masks):
            features = torchaudio.transforms.TimeMasking(AUGMENT.max_time_mask)(features)
        example = self.trim(self.sub({"features": features[0]}, generator), generator)
        return example["features"].T, torch.LongTensor(item["labels"]["input_ids"]), row


# ----------------------------------------------------------------------------------------------------------------- train


def bench_train(options: BenchOptions, work: TrainOptions) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = memory_mb("VmRSS")
    step = training_step(options, device, ROWS, work)
    for _ in range(WARM_UP):
        step()
    peak_mb = (
        torch.cuda.max_memory_allocated() / 2**20
        if device.type == "cuda"
        else memory_mb("VmHWM") - before
    )
    # In turn, as a machine's rate changes while one measures: every step against the matrix products right behind it.
    brief = replace(options, seconds=options.seconds / ROUNDS)
    threads = torch.get_num_threads()
    timer = Timer("work()", globals={"work": step}, num_threads=threads)
    a, b = torch.rand(2, GEMM, GEMM, device=device)
    layer = Linear(GEMM, GEMM, bias=False, device=device).requires_grad_(False)
    rounds = [
        (timer.timeit(1).median, gflops(lambda: a @ b, brief), gflops(lambda: layer(a), brief))
        for _ in range(ROUNDS)
    ]
    step_s, gemm, linear = map(statistics.median, zip(*rounds))
    asked = (
        options.preset == "base" and work.frames == FRAMES and work.precision == "32"
    )  # what REFERENCE_GFLOP is for
    share = REFERENCE_GFLOP / step_s / gemm if asked else None
    return {
        "gemm_gflops": gemm,
        "linear_gflops": linear,
        "step_s": step_s,
        "share": share,
        "audio_hours": ROWS * work.frames / FRAMES_A_SECOND / step_s,
        "peak_mb": peak_mb,
    }


def training_step(options: BenchOptions, device, rows: int, work: TrainOptions):
    """A function that does the reference work once, or as much as that for other sizes."""
    if work.gradient_checkpointing:
        keep_freed_memory(SPARING)
    torch.manual_seed(0)
    net = U2Conformer(
        ModelOptions(**PRESETS[options.preset]), 80, VOCABULARY, 0, VOCABULARY - 1, VOCABULARY - 1
    ).to(device)
    net.encoder.gradient_checkpointing = work.gradient_checkpointing
    if work.compile:
        net.encoder.compile_blocks()
    features, lengths = (
        torch.randn(rows, work.frames, 80, device=device),
        torch.full((rows,), work.frames, device=device),
    )
    labels = torch.randint(1, VOCABULARY - 1, (rows, work.frames * LABELS // FRAMES), device=device)
    label_lengths = torch.full((rows,), labels.size(1), device=device)

    def step():
        net.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=work.precision != "32"):
            loss = net.loss(features, lengths, labels, label_lengths)["loss"]
        loss.backward()

    return step


# ------------------------------------------------------------------------------------------------------ decode and stream


def make_model(options: BenchOptions):
    """A U2 in evaluation mode with random weights."""
    from model import U2, OptimOptions

    torch.manual_seed(0)
    tokens = [*SPECIALS, *map(str, range(PIECES - len(SPECIALS)))]
    tokenizer = Tokenizer(tokens=tokens, blank_id=0, unk_id=1, sos_id=2, eos_id=3)
    return for_few_rows(
        U2(
            options=ModelOptions(**PRESETS[options.preset]),
            optim=OptimOptions(),
            frontend=Frontend(),
            tokenizer=tokenizer,
        )
    ).eval()


def peaky_log_probs() -> torch.Tensor:
    """(B,T,V): what a trained CTC branch gives, blanks and now and then a token."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(UTTERANCES, ENCODER_FRAMES, PIECES, generator=generator)
    logits[:, :, 0] += 14
    for row in logits:
        frames = torch.randperm(ENCODER_FRAMES, generator=generator)[:SPIKES]
        row[frames, torch.randint(len(SPECIALS), PIECES, (SPIKES,), generator=generator)] += 17
    return logits.log_softmax(-1)


def flat_log_probs() -> torch.Tensor:
    """(B,T,V): what tells nothing, so that every frame brings new prefixes."""
    logits = torch.randn(
        UTTERANCES, ENCODER_FRAMES, PIECES, generator=torch.Generator().manual_seed(0)
    )
    return logits.log_softmax(-1)


def bench_decode(options: BenchOptions) -> dict:
    import decode

    model, log_probs, flat = make_model(options), peaky_log_probs(), flat_log_probs()
    lengths = torch.full((UTTERANCES,), ENCODER_FRAMES)
    memory = torch.randn(UTTERANCES, ENCODER_FRAMES, model.options.output_size)
    waveforms = torch.randn(UTTERANCES, SAMPLES) * 0.1
    features_of, beam = (
        extract(model.frontend),
        partial(decode.ctc_prefix_beam_search, search=decode.SearchOptions()),
    )
    hypotheses = beam(log_probs, lengths)

    @torch.no_grad()
    def recognise():
        features = torch.stack([features_of(waveform) for waveform in waveforms])  # (B,T,F)
        encoded, encoded_lengths = model.encode(
            features, torch.full((UTTERANCES,), features.size(1))
        )
        model.ctc_log_probs(encoded)  # random weights have no spikes
        model.rescore(beam(log_probs, encoded_lengths), encoded, encoded_lengths)

    def ms(work, utterances=UTTERANCES):
        return 1000 * median_seconds(work, options) / utterances

    return {
        "prefix_beam_ms_batch16": ms(lambda: beam(log_probs, lengths)),
        "prefix_beam_ms_single": ms(lambda: beam(log_probs[:1], lengths[:1]), 1),
        "prefix_beam_flat_ms_batch16": ms(lambda: beam(flat, lengths)),
        "prefix_beam_flat_ms_single": ms(lambda: beam(flat[:1], lengths[:1]), 1),
        "greedy_ms": ms(lambda: decode.ctc_greedy_search(log_probs, lengths)),
        "rescoring_ms": ms(lambda: model.rescore(hypotheses, memory, lengths)),
        "rtf": ms(recognise) / 1000 / (SAMPLES / RATE),
    }


def bench_stream(options: BenchOptions) -> dict:
    import decode
    import stream

    model = make_model(options)
    with torch.no_grad():
        model.net.ctc.bias[0] += 14  # blanks most of the time, as a trained CTC branch gives
    rate, waveform = receptive_field(model.options.input_layer)[1], torch.randn(SAMPLES) * 0.1

    def chunk_ms(size, left):
        chunk, state = torch.randn(1, size * rate, 80), model.stream_state(size, left)
        for _ in range(
            left + 2
        ):  # until the first chunk's look-ahead is there, and all that a chunk may see
            _, state = model.stream(chunk, state)
        return 1000 * median_seconds(lambda: model.stream(chunk, state), options)

    size, left = CHUNKS[-1]
    search = decode.SearchOptions(chunk_size=size, left_chunks=left)
    pieces = stream.cut(model, waveform, size)
    seconds = median_seconds(
        lambda: list(stream.listen(model, pieces, search, endpoints=False)), options
    )
    return {
        "chunk_ms": {f"{size}/{left}": chunk_ms(size, left) for size, left in CHUNKS},
        "rtf": seconds / (SAMPLES / RATE),
    }


# ---------------------------------------------------------------------------------------------------------------- growth


def bench_growth(options: BenchOptions, data: DataOptions, growth: GrowthOptions) -> dict:
    root = corpus(data)
    if not (root / "train" / str(shard_count(data.rows) - 1)).exists():
        raise UserError(
            f"{root} has fewer than {data.rows} rows; give --rows for what it has, or another --data_root"
        )
    lengths = [(ROWS, FRAMES * times // 6) for times in (1, 2, 4, 8, 16)]
    batches = [(rows, FRAMES) for rows in (1, 2, 4, 8, 16)]
    results = {
        "length": in_fresh_process(measure_steps, lengths, options),
        "batch": in_fresh_process(measure_steps, batches, options),
        "stream 4 left": in_fresh_process(measure_stream, 4, growth.hours, options),
        "stream all left": in_fresh_process(measure_stream, -1, growth.hours / 6, options),
        "setup": {rows: in_fresh_process(time_setup, root, rows) for rows in row_counts(data.rows)},
    }
    draw(results, growth.png, options.preset)
    return results


def in_fresh_process(work, *arguments):
    """work(*arguments) where nothing has been allocated before."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=keep_freed_memory
    ) as fresh:
        return fresh.submit(work, *arguments).result()


def row_counts(rows: int) -> list[int]:
    return [rows // 16, rows // 8, rows // 4, rows // 2, rows]


def measure_steps(sizes, options: BenchOptions) -> dict:
    """ "rows x frames" -> [seconds, MB]; sizes (rows, frames) in rising order, because a process keeps its highest memory."""
    before, results = memory_mb("VmRSS"), {}
    for rows, frames in sizes:
        step = training_step(options, torch.device("cpu"), rows, TrainOptions(frames=frames))
        seconds = median_seconds(step, options, torch.get_num_threads())
        results[f"{rows} x {frames}"] = [seconds, memory_mb("VmHWM") - before]
    return results


def measure_stream(left: int, hours: float, options: BenchOptions) -> dict:
    """Minute -> median encoder ms per chunk since the one before, one utterance without end."""
    torch.set_num_threads(1)
    model, size = make_model(options), CHUNKS[-1][0]
    frames = size * receptive_field(model.options.input_layer)[1]  # of 10 ms
    state, times = model.stream_state(size, left), []
    for _ in range(int(hours * 3600 * FRAMES_A_SECOND / frames)):
        chunk, began = torch.randn(1, frames, 80), time.perf_counter()
        _, state = model.stream(chunk, state)
        times.append(1000 * (time.perf_counter() - began))
    points = np.array_split(np.array(times), 12)
    return {
        round(hours * 60 * (i + 1) / 12, 1): float(np.median(point))
        for i, point in enumerate(points)
    }


def time_setup(root: Path, rows: int) -> float:
    """Of a corpus that has only the first shards, as many as hold `rows`."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder)
        (part / "train").mkdir()
        for name in (
            "tokenizer.json",
            "dev",
            *(f"train/{shard}" for shard in range(shard_count(rows))),
        ):
            (part / name).symlink_to(root.resolve() / name)
        return timed_setup(data_module(folder, limit_rows=rows))[1]


def draw(results: dict, path: str, preset: str) -> None:
    import matplotlib

    matplotlib.use("agg")  # files only, wherever this runs
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, name, title in (
        (axes[0, 0], "length", f"training step, {ROWS} utterances (preset {preset})"),
        (axes[0, 1], "batch", f"training step, utterances of {FRAMES} frames"),
    ):
        x = [int(key.split(" x ")[name == "length"]) for key in results[name]]
        seconds, megabytes = zip(*results[name].values())
        axis.plot(x, seconds, "o-", label="seconds")
        axis.set(
            title=title,
            xlabel={"length": "frames", "batch": "utterances"}[name],
            ylabel="seconds",
            xlim=0,
            ylim=0,
        )
        right = axis.twinx()
        right.plot(x, megabytes, "s--", color="tab:orange", label="MB")
        right.set(ylabel="MB (dashed)", ylim=0)
    for name in ("stream 4 left", "stream all left"):
        axes[1, 0].plot(
            results[name].keys(),
            results[name].values(),
            "o-",
            label=name.removeprefix("stream ") + " chunks",
        )
    axes[1, 0].set(
        title=f"streaming, chunk {CHUNKS[-1][0]}",
        xlabel="minutes of sound",
        ylabel="ms per chunk",
        ylim=0,
    )
    axes[1, 0].legend()
    axes[1, 1].plot(results["setup"].keys(), results["setup"].values(), "o-")
    axes[1, 1].set(title="setup", xlabel="rows", ylabel="seconds", xlim=0, ylim=0)
    figure.savefig(path, dpi=80)


# What to measure: the function, and the options that it takes besides BenchOptions.
COMMANDS = {
    "data": (bench_data, DataOptions),
    "train": (bench_train, TrainOptions),
    "decode": (bench_decode,),
    "stream": (bench_stream,),
    "growth": (bench_growth, DataOptions, GrowthOptions),
}


if __name__ == "__main__":
    run(main)
