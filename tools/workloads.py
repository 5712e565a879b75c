"""Makes up the work that tools/bench.py measures: a corpus, a training step, decoding, streams.

Most functions return the work as a function without arguments. Only the setup of a corpus is timed
here, because it runs with made-up lengths (timed_setup). Lightning and datasets are imported where
they are used, because a training step needs neither.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

from cli import SPARING, keep_freed_memory

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from conformer import U2Conformer
from decode import (
    SearchOptions,
    answered,
    attention_rescoring,
    find_offers,
    prefix_follow,
    prefix_result,
    prefix_start,
)
from files import published
from frames import receptive_field
from kernels import for_few_rows
from presets import PRESETS, ModelOptions
from stream import listen
from tokenizer import SPECIALS, Tokenizer, load_tokenizer, save_tokenizer, train_char
from transforms import Augment, Frontend, extract

RATE = 16000  # samples per second
FRAMES_A_SECOND = 100  # of features

# The corpus.
BATCH = 16  # rows
BATCH_SECONDS = 400.0  # of a batch for a GPU
SHARD_ROWS = 2000  # as prepare.py has them
LOADER_ROWS = 320  # rows with whole audio
SHORT = 160  # samples of a row in all other corpora: 10 ms
LABELS_A_SECOND = 14  # characters of read English
AUGMENT = Augment(max_trim=50)  # every kind of augmentation

# A training step.
ROWS = 8
FRAMES = 600
LABELS = 15  # of an utterance
VOCABULARY = 4233

# Decoding.
UTTERANCES = 16
SAMPLES = 160_720  # of an utterance
SECONDS = SAMPLES / RATE
ENCODER_FRAMES = 250
PIECES = 5000  # tokens of the vocabulary
SPIKES = 40  # frames of an utterance in which CTC hears a token


# ---- The corpus


def made_corpus(data_root: str, rows: int) -> Path:
    """Returns the folder of the corpus, and makes the corpus first if the folder is not there.

    train and dev in it have short audio; loader/train and loader/dev have whole audio.
    """
    root = Path(data_root)
    if not root.exists():
        with published(str(root), "a corpus of tools.bench", overwrite=False) as folder:
            write_shards(Path(folder), rows, rows // 100, short=True)
            write_shards(Path(folder) / "loader", min(rows, LOADER_ROWS), 1, short=False)
    return root


def shard_count(rows: int) -> int:
    return -(-rows // SHARD_ROWS)


def write_shards(root: Path, train_rows: int, dev_rows: int, short: bool) -> None:
    import datasets

    datasets.disable_progress_bars()
    tokenizer = train_char(["abcdefghijklmnopqrstuvwxyz '"])
    rng = np.random.default_rng(0)
    for split, rows in (("train", train_rows), ("dev", dev_rows)):
        for shard in range(shard_count(rows)):
            table = make_table(rng, min(SHARD_ROWS, rows - shard * SHARD_ROWS), tokenizer, short)
            datasets.Dataset(table).save_to_disk(root / split / str(shard))
    save_tokenizer(tokenizer, str(root / "tokenizer.json"))


def utterance_seconds(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Draws (rows,) lengths like those of read sentences, log-normal."""
    return np.clip(rng.lognormal(np.log(6.7), 0.55, rows), 0.8, 30)


def make_table(rng: np.random.Generator, rows: int, tokenizer: Tokenizer, short: bool):
    """Makes a pyarrow Table with prepare.py's columns: noise, and words of five random letters.

    One more column, whole_length, counts the samples that a row would have if it were not short.
    """
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
    labels = pa.ListArray.from_arrays(text_ends, ids)
    columns = {
        "input_values": pa.ListArray.from_arrays(offsets(samples), audio),
        "labels": pa.StructArray.from_arrays([labels], ["input_ids"]),
        "length": samples,
        "whole_length": lengths,
        "text": pa.StringArray.from_buffers(rows, *map(pa.py_buffer, (text_ends, characters))),
    }
    return pa.table(columns)


def offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def data_module(root: str, **options):
    import datamodule

    return datamodule.SpeechDataModule(
        data_roots=[root],
        tokenizer=load_tokenizer(str(Path(root) / "tokenizer.json")),
        frontend=Frontend(),
        augment=AUGMENT,
        options=datamodule.DataOptions(batch_size=BATCH, **options),
    )


def timed_setup(data):
    """Sets `data` up as a training does before its first batch, but with the whole lengths.

    -> the sampler, and the seconds until it was there.
    """

    def whole_lengths(dataset):
        return dataset.data.column("whole_length").to_numpy()

    began = time.perf_counter()
    with mock.patch("datamodule.audio_lengths", whole_lengths):
        data.setup("fit")
    return data.sampler(0, 1), time.perf_counter() - began


def setup_seconds(root: Path, rows: int) -> float:
    """Times the setup of a corpus that has only the first shards, as many as hold `rows`."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder)
        (part / "train").mkdir()
        shards = [f"train/{shard}" for shard in range(shard_count(rows))]
        for name in ("tokenizer.json", "dev", *shards):
            (part / name).symlink_to(root.resolve() / name)
        return timed_setup(data_module(folder, limit_rows=rows))[1]


def padding_waste(lengths: np.ndarray, plan) -> float:
    """Returns the share of padding in all batches."""
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in plan)
    return 1 - int(lengths.sum()) / padded


def few_shapes(data) -> dict:
    """Counts the shapes of an epoch planned for a GPU, and the share of padding in its frames.

    `data` is set up; its options change to those of such a plan.
    """
    data.options = replace(
        data.options, batch_size=None, max_batch_seconds=BATCH_SECONDS, few_shapes="on"
    )
    batches = list(data.sampler(0, 1).batches(0))
    shapes = [(len(batch.keys), batch.frames, batch.labels) for batch in batches]
    _, rows, speeds = np.array([key for batch in batches for key in batch.keys]).T
    frames = int(data.frames_by_speed()[speeds, rows].sum())
    padded = sum(rows * frames for rows, frames, _ in shapes)
    return {"shapes": len(set(shapes)), "shapes_padding_waste": 1 - frames / padded}


# ---- Training and decoding


def training_step(
    preset: str,
    device: torch.device,
    rows: int,
    frames: int,
    precision: str = "32",
    gradient_checkpointing: bool = False,
    compile: bool = False,
):
    """Returns a function that does one step on rows x frames; 15 labels go with 600 frames."""
    if gradient_checkpointing:
        keep_freed_memory(SPARING)
    torch.manual_seed(0)
    last = VOCABULARY - 1
    net = U2Conformer(ModelOptions(**PRESETS[preset]), 80, VOCABULARY, 0, last, last).to(device)
    net.encoder.gradient_checkpointing = gradient_checkpointing
    if compile:
        net.encoder.compile_blocks()
    features = torch.randn(rows, frames, 80, device=device)
    feature_lengths = torch.full((rows,), frames, device=device)
    labels = torch.randint(1, last, (rows, frames * LABELS // FRAMES), device=device)
    label_lengths = torch.full((rows,), labels.size(1), device=device)

    def step():
        net.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "32"):
            loss = net.loss(features, feature_lengths, labels, label_lengths)["loss"]
        loss.backward()

    return step


def make_model(preset: str):
    """Makes a U2 in evaluation mode with random weights."""
    from model import U2, OptimOptions

    torch.manual_seed(0)
    tokens = [*SPECIALS, *map(str, range(PIECES - len(SPECIALS)))]
    model = U2(
        options=ModelOptions(**PRESETS[preset]),
        optim=OptimOptions(),
        frontend=Frontend(),
        tokenizer=Tokenizer(tokens=tokens, blank_id=0, unk_id=1, sos_id=2, eos_id=3),
    )
    return for_few_rows(model).eval()


def ctc_output(spikes: bool) -> torch.Tensor:
    """Draws log-probabilities (B,T',V).

    With spikes they are like a trained model's: mostly blanks, with a token now and then. Without
    spikes any token is as likely as another, so that every frame brings new prefixes.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(UTTERANCES, ENCODER_FRAMES, PIECES, generator=generator)
    if spikes:
        logits[:, :, 0] += 14
        for row in logits:
            frames = torch.randperm(ENCODER_FRAMES, generator=generator)[:SPIKES]
            tokens = torch.randint(len(SPECIALS), PIECES, (SPIKES,), generator=generator)
            row[frames, tokens] += 17
    return logits.log_softmax(-1)


def recognition(model, search):
    """Returns a function that hears UTTERANCES waveforms at once.

    search(lengths) is its first pass, over made-up log-probabilities, because the output of random
    weights has no spikes.
    """
    waveforms = torch.randn(UTTERANCES, SAMPLES) * 0.1
    features_of = extract(model.frontend)

    @torch.no_grad()
    def recognise():
        features = torch.stack([features_of(waveform) for waveform in waveforms])  # (B,T,F)
        feature_lengths = torch.full((UTTERANCES,), features.size(1))
        encoded, encoded_lengths = model.encode(features, feature_lengths)
        model.ctc_log_probs(encoded)
        model.rescore(search(encoded_lengths), encoded, encoded_lengths)

    return recognise


def host_work(model, log_probs: torch.Tensor):
    """Returns a function that does what a GPU leaves to the CPU: features and search."""
    waveforms = torch.randn(UTTERANCES, SAMPLES) * 0.1
    features_of = extract(model.frontend)
    offers = find_offers(log_probs, SearchOptions())
    net = model.net

    def score(tree, reverse):
        return torch.zeros(()).expand(*tree.tokens.shape, PIECES)

    def work():
        pad_sequence([features_of(waveform) for waveform in waveforms], batch_first=True)
        beam = prefix_follow(prefix_start(UTTERANCES), offers, SearchOptions())
        found = prefix_result(beam)
        answered(attention_rescoring(found, score, SearchOptions(), net.sos_id, net.eos_id))

    return work


def feature_frames(model, encoder_frames: int) -> int:
    return encoder_frames * receptive_field(model.options.input_layer)[1]


def chunk(model, size: int, left: int):
    """Returns a function that encodes a chunk of `size` encoder frames and sees `left` chunks."""
    features = torch.randn(1, feature_frames(model, size), 80)
    state = model.stream_state(size, left)
    # After left + 2 chunks the state holds the look-ahead and all chunks that the next one sees.
    for _ in range(left + 2):
        _, state = model.stream(features, state)
    return lambda: model.stream(features, state)


def listening(model, size: int, left: int):
    """Returns a function that hears an utterance as a stream, in the first pass alone."""
    with torch.no_grad():
        model.net.ctc.bias[0] += 14  # blanks most of the time, as a trained CTC branch gives
    pieces = [torch.randn(SAMPLES) * 0.1]
    search = SearchOptions(chunk_size=size, left_chunks=left)
    return lambda: list(listen(model, pieces, search, endpoints=False))
