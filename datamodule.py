"""Turns shards on disk into batches: checks and joins shards, filters rows, groups rows by length.

A shard is a dataset saved by Hugging Face's save_to_disk. A row has input_values (audio; 16 kHz
unless ROOT/prepare.json says otherwise), labels (token ids; a list, or a dict with input_ids) and
perhaps length (= len(input_values)). A row number is a position in the concatenation of all shards.
Transforms run whenever a row is read.
Axes: B batch, T frames, F mel bins, U labels, N samples.
"""

import math
import operator
import os
import signal
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from cli import UserError, option, options_class, shown

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytorch_lightning as L
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, get_worker_info

from files import SMALL, cannot_read, parse_json, read_json, read_text
from frames import receptive_field, subsampled_length
from sampler import LengthGroupedSampler, Shaped, ShapedSampler, eval_batches
from tokenizer import Tokenizer
from transforms import (
    Augment,
    Compose,
    Frontend,
    eval_transform,
    make_generator,
    num_frames,
    shortest_frames,
    speed_length,
    train_transform,
)

# Seconds of audio, padding included, in a batch of evaluation: less than a GB of memory with preset
# base.
EVAL_SECONDS = 200.0
CMVN_ROWS = 20_000  # rows that global CMVN is computed from: two minutes of one core
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream


@options_class
class DataOptions:
    """Says how batches are made, which rows are left out, and how many processes load them.

    Raises UserError for sizes that contradict each other.
    """

    batch_size: int | None = option(
        None,
        "rows per batch and device; 16 unless --max_batch_seconds is given",
        at_least=1,
        at_most=2**16,
    )
    max_batch_seconds: float | None = option(
        None,
        "instead of --batch_size: seconds of audio per batch at the slowest speed or, with "
        "--few_shapes, at the speed that the plan draws, padding and tails included",
        above=0,
        at_most=1e6,
    )
    group_by_length: bool = option(
        True, "batches of rows alike in length; otherwise plain shuffling"
    )
    few_shapes: str = option(
        "auto",
        "pad batches to at most 64 shapes (rows, frames, labels), which come again in every epoch; "
        "auto: on where each new shape costs time, which is everywhere but on a CPU",
        choices=("auto", "on", "off"),
    )
    num_workers: int | None = option(
        None,
        "loader processes, one thread each; default: cores - 2, at most 4",
        at_least=0,
        at_most=256,
    )
    filter: bool = option(True, "drop training rows that CTC cannot learn from")
    output_len_prob: float = option(
        1.0, "share of a row's encoder frames that its labels may need", at_least=0.0, at_most=1.0
    )
    min_frame: int = option(
        10, "fewest feature frames of a training row", at_least=0, at_most=10**7
    )
    max_frame: int = option(
        10240, "most feature frames of a training row", at_least=1, at_most=10**7
    )
    limit_rows: int | None = option(
        None, "use only the first rows of every split", at_least=1, at_most=10**9
    )

    def __post_init__(self):
        if self.batch_size is not None and self.max_batch_seconds is not None:
            raise UserError("--batch_size and --max_batch_seconds: give one of them")
        if self.few_shapes == "on" and not self.group_by_length:
            raise UserError(
                "--few_shapes on --no-group_by_length: few shapes need rows alike in length; leave "
                "out --no-group_by_length, or give --few_shapes off"
            )
        if self.min_frame > self.max_frame:
            raise UserError(
                f"--min_frame {self.min_frame} --max_frame {self.max_frame}: no row lies between "
                "them; lower --min_frame or raise --max_frame"
            )


class Batch(NamedTuple):
    """Holds rows of one split, padded to the longest.

    With two views of each row, B counts views: first views of all rows come before second ones.
    """

    features: torch.Tensor  # (B,T,F) float32, zero padded
    feature_lengths: torch.Tensor  # (B,) frames
    labels: torch.Tensor  # (B,U) token ids, zero padded
    label_lengths: torch.Tensor  # (B,)
    rows: torch.Tensor  # (B,) row numbers

    def __reduce__(self):
        """Sends small tensors inside the loader's message: a shared file would cost 0.2 ms each."""
        return unpack_batch, (self.features, *(tensor.numpy() for tensor in self[1:]))


def unpack_batch(features, *small) -> Batch:
    return Batch(features, *map(torch.from_numpy, small))


# ---- Shards


def get_concat_dataset(data_roots, split: str) -> datasets.Dataset:
    """Joins the shards ROOT/split/0, 1, ... (or 0/data ...) of all roots that have the split.

    Shards come in numeric order. Raises UserError for a missing root, a split that no root has, a
    shard that comes twice, is damaged or has a wrong schema, and roots whose tokenizers differ.
    """
    check_tokenizers(data_roots)
    roots = list(map(Path, data_roots))
    without = [root for root in roots if root.is_dir() and not (root / split).is_dir()]
    if len(without) < len(roots):
        roots = [root for root in roots if root not in without]
        for root in without:
            rank_zero_info(
                f"{split}: {root} has none, so it is that of {', '.join(map(str, roots))} alone"
            )
    paths = [path for root in roots for path in shard_paths(root, split)]
    check_twice(paths)
    shards = [load_shard(path) for path in paths]
    shared = set.intersection(*(set(shard.column_names) for shard in shards))
    first = shards[0]
    names = [name for name in first.column_names if name in shared]
    for shard, path in zip(shards, paths):
        for name in names:
            if shard.features[name] != first.features[name]:
                raise UserError(
                    f"{path}: column {name} is {shard.features[name]} but in {paths[0]} it is "
                    f"{first.features[name]}; prepare both the same way"
                )
    # Selecting columns takes as long as opening a shard, so only shards with other columns pay.
    return datasets.concatenate_datasets(
        [shard if shard.column_names == names else shard.select_columns(names) for shard in shards]
    )


def check_tokenizers(data_roots) -> None:
    """Raises UserError where the tokenizer.json of two data roots differ, or one cannot be read."""
    contents = {}
    for path in (Path(root) / "tokenizer.json" for root in data_roots):
        try:
            contents |= {path: parse_json(read_text(path))} if path.exists() else {}
        except (OSError, ValueError) as error:
            raise cannot_read(path, error, "prepare it again") from error
    for path, content in contents.items():
        if content != next(iter(contents.values())):
            raise UserError(
                f"{path} differs from {next(iter(contents))}: label ids would mean different "
                "things; prepare both roots with the same --tokenizer"
            )


def check_twice(paths: list[Path]) -> None:
    """Raises UserError where two of the paths are the same folder."""
    seen = {}
    for path in paths:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            also = f", also as {other}" if other != path else ""
            raise UserError(
                f"{path}: its rows would come twice{also}; give every data root once, or a copy of "
                "one whose rows shall count twice"
            )


def shard_paths(root: Path, split: str) -> list[Path]:
    """Lists the shards of a split, and prints which folders are left out.

    Raises UserError where there is no shard.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such data root; prepare.py makes one")
    if not (root / split).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) or ["none"]
        raise UserError(
            f"{root} has no split {split} (there: {', '.join(there)}); prepare.py makes one from "
            f"SRC/{split}/metadata.csv"
        )
    there = list((root / split).iterdir())
    shards = [path for path in there if path.name.isdecimal()]
    shards.sort(key=lambda path: int(path.name))
    if not shards:
        for folder in (root, root / split):
            if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                raise UserError(
                    f"{folder} is itself a dataset; save each split with save_to_disk as its shard "
                    f"0: {root / split / '0'}"
                )
        raise UserError(f"{root / split} holds no shard 0, 1, ...; prepare it again")
    others = sorted(
        path.name
        for path in there
        if path.is_dir() and not path.name.isdecimal() and not path.name.startswith(".")
    )
    if others:
        rank_zero_info(f"{root / split}: left out {', '.join(others)}; shards are called 0, 1, ...")
    if (absent := int(shards[-1].name) + 1 - len(shards)) > 0:
        rank_zero_info(f"{root / split}: {absent} of the shards 0 .. {shards[-1].name} absent")
    return [path / "data" if (path / "data" / "state.json").is_file() else path for path in shards]


def load_shard(path: Path) -> datasets.Dataset:
    """Opens a shard that save_to_disk wrote. Raises UserError where it cannot be read."""
    try:
        if not (path / "state.json").exists() and (path / "dataset_dict.json").exists():
            raise ValueError(
                "it holds several splits; a shard is one datasets.Dataset saved with save_to_disk"
            )
        check_files(path)
        shard = datasets.Dataset.load_from_disk(str(path)).with_format(None)
    # The errors of datasets and pyarrow for damaged JSON and tables have no common base.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: cannot be read as a dataset ({reason}); prepare it again"
        ) from error
    check_schema(shard, path)
    check_values(shard, path)
    return shard


def check_files(path: Path) -> None:
    """Raises OSError, ValueError or ArrowInvalid for files that the datasets library must not open.

    The library would read files outside the shard, wait for ever, fill the memory, or read memory
    of other data.
    """
    read_json(path / "dataset_info.json")
    names = [entry["filename"] for entry in read_json(path / "state.json")["_data_files"]]
    if not names:
        raise ValueError("it has no rows, and no file of them; take the folder away")
    for name in names:
        # A link may lead to another disk, a name may not.
        if os.path.isabs(name) or os.pardir in Path(name).parts:
            raise ValueError(f"its state.json names {name}, which lies outside")
        if not os.path.isfile(path / name):
            raise ValueError(f"its state.json names {name}, which is no file")
        check_arrow(str(path / name))


def check_arrow(path: str) -> None:
    """Raises ValueError or ArrowInvalid for an Arrow stream that is not whole, or is compressed.

    The end may be missing, or buffers may hold less than their headers say. Arrow believes the
    offsets of lists when it reads. The full validation here looks at every offset, but at no audio.
    """
    name = os.path.basename(path)
    # A stream that was cut between two record batches looks to pyarrow like a whole, shorter one.
    with open(path, "rb") as stream:
        stream.seek(max(0, os.path.getsize(path) - len(END_OF_STREAM)))
        if stream.read() != END_OF_STREAM:
            raise ValueError(f"{name} is truncated")
    head, *messages = pa.ipc.MessageReader.open_stream(pa.memory_map(path))
    # pyarrow would read a message of another type beyond its end.
    if head.type != "schema" or head.metadata.size > SMALL:
        raise ValueError(f"{name} begins with no schema, or with one of more than {SMALL} bytes")
    schema = pa.ipc.read_schema(head)
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"{name} holds a {message.type}, which is not read here")
        if message.metadata_version != pa.ipc.MetadataVersion.V5 or is_packed(message):
            raise ValueError(f"{name} is packed, which save_to_disk does not")
        batch = pa.ipc.read_record_batch(message, schema)
        # A header may promise any number of empty lists or missing values in no bytes at all.
        if batch.num_rows > message.body.size:
            raise ValueError(f"{name} promises {batch.num_rows} rows in {message.body.size} bytes")
        batch.validate(full=True)


def is_packed(message: pa.ipc.Message) -> bool:
    """Returns whether the buffers of a record batch are compressed.

    pyarrow has no function for this, so the field is read from the flatbuffer:
    Message.header.compression in Arrow's format/Message.fbs.
    """
    content = message.metadata.to_pybytes()

    def number(place: int, size: int = 4) -> int:
        return int.from_bytes(content[place : place + size], "little", signed=size == 4)

    def field(table: int, index: int) -> int:
        """Returns where field `index` of a flatbuffer's table lies, or 0."""
        vtable = table - number(table)
        entry = 4 + 2 * index
        offset = number(vtable + entry, 2) if entry < number(vtable, 2) else 0
        return offset and table + offset

    header = field(number(0), 2)
    return field(header + number(header), 3) > 0


def check_schema(shard: datasets.Dataset, path: Path) -> None:
    """Raises UserError where a column is missing or has a wrong type."""
    schema = shard.data.schema
    for name in ("input_values", "labels"):
        if name not in schema.names:
            raise UserError(f"{path}: no column {name} (there: {', '.join(schema.names)})")
    labels = schema.field("labels").type
    if pa.types.is_struct(labels):
        labels = (
            labels.field("input_ids").type if labels.get_field_index("input_ids") >= 0 else None
        )
    audio = schema.field("input_values").type
    for name, kind, is_value, wanted in (
        ("input_values", audio, pa.types.is_floating, "a list of floats"),
        ("labels", labels, pa.types.is_integer, "a list of ints, or a dict with input_ids"),
    ):
        if not is_list(kind) or not is_value(kind.value_type):
            raise UserError(f"{path}: column {name} is {schema.field(name).type}, not {wanted}")
    if "length" in schema.names and not pa.types.is_integer(schema.field("length").type):
        raise UserError(
            f"{path}: column length is {schema.field('length').type}, not a whole number of "
            "samples; leave it out, and it is computed"
        )


def check_values(shard: datasets.Dataset, path: Path) -> None:
    """Raises UserError where a row has no value, or a length that its audio contradicts."""
    audio = shard.data.column("input_values")
    for name, column in (("input_values", audio), ("labels", label_column(shard))):
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy())[0]
            raise UserError(
                f"{path}: column {name} has no value in row {row} of the shard; leave such rows out"
            )
    if "length" not in shard.column_names:
        return
    said = shard.data.column("length").to_numpy()  # nan where a length has no value
    samples = list_lengths(audio)
    for row in np.flatnonzero(said != samples)[:1]:
        raise UserError(
            f"{path}: column length is {said[row]} in row {row} of the shard, but input_values has "
            f"{samples[row]} samples there; leave the column out, and it is computed"
        )


def is_list(kind) -> bool:
    return kind is not None and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


# ---- Lengths, from Arrow offsets, never audio


def audio_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Returns the samples of each row, (rows,) int64: the column `length`, or from list offsets."""
    if "length" in dataset.column_names:
        lengths = dataset.data.column("length").to_numpy().astype(np.int64)
    else:
        lengths = list_lengths(dataset.data.column("input_values"))
    if dataset._indices is None:
        return lengths
    # select or shuffle has picked rows; the audio of the others stays unread.
    return lengths[dataset._indices.column(0).to_numpy()]


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Returns the length of each list, (rows,) int64."""
    lengths = pa.compute.list_value_length(column)
    return lengths.to_numpy().astype(np.int64)


def label_column(dataset: datasets.Dataset) -> pa.ChunkedArray:
    """Returns the token ids of each row as lists, without the dict that may hold them."""
    if dataset._indices is not None:
        dataset = dataset.select_columns("labels").flatten_indices()
    column = dataset.data.column("labels")
    return (
        pa.compute.struct_field(column, "input_ids") if pa.types.is_struct(column.type) else column
    )


def label_statistics(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns (labels, repeats), (rows,) int64 each.

    A repeat is a label equal to the one before it, where CTC needs a blank between the two.
    """
    parts = [(np.zeros(0, np.int64),) * 2]
    for chunk in label_column(dataset).chunks:
        values, lengths = label_values(chunk)
        ends = np.cumsum(lengths)
        same = np.zeros(len(values) + 1, bool)
        same[1:-1] = values[1:] == values[:-1]  # same[i]: value i repeats value i-1
        same[ends - lengths] = False
        counts = np.concatenate(([0], np.cumsum(same[:-1])))
        parts.append((lengths, counts[ends] - counts[ends - lengths]))
    lengths, repeats = map(np.concatenate, zip(*parts))
    return lengths, repeats


def label_checksum(dataset: datasets.Dataset) -> int:
    """Returns a checksum of the token ids in their rows, the same however they are stored."""
    checksum = 0
    # The values of all chunks come first, then the lengths of all chunks.
    for parts in zip(*map(label_values, label_column(dataset).chunks)):
        for part in parts:
            checksum = zlib.crc32(part.astype(np.int64), checksum)
    return checksum


def label_values(chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns all token ids of the chunk's rows, one after the other, and how many each row has."""
    return chunk.flatten().to_numpy(zero_copy_only=False), list_lengths(pa.chunked_array([chunk]))


def check_token_ids(dataset: datasets.Dataset, tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError, naming the first row, for a token id that no label may hold.

    Such an id lies outside the vocabulary, is missing, or is the blank.
    """
    first = 0  # row number of the chunk's first row
    for chunk in label_column(dataset).chunks:
        values, lengths = label_values(chunk)
        # A missing id is nan, for which >= is False.
        good = (values >= 0) & (values < tokenizer.vocab_size) & (values != tokenizer.blank_id)
        bad = np.flatnonzero(~good)
        if len(bad):
            row = first + np.searchsorted(np.cumsum(lengths), bad[0], side="right")
            token = values[bad[0]]
            reason = f"lies outside the tokenizer's 0 .. {tokenizer.vocab_size - 1}"
            if token == tokenizer.blank_id:
                reason = "is the CTC blank, which no label may hold"
            raise UserError(
                f"{where} row {row}: token id {token} {reason}; use the tokenizer that made the "
                "labels"
            )
        first += len(lengths)


def filter_conformer_len_prob(
    lengths,
    label_lengths,
    repeats,
    *,
    frontend: Frontend,
    augment: Augment,
    input_layer: str,
    options: DataOptions,
) -> tuple[np.ndarray, dict[str, int]]:
    """Returns the rows that CTC can learn from, (rows,) bool, and {reason: rows dropped for it}.

    `lengths` (rows,) are samples; label_lengths and repeats come from label_statistics. A row stays
    where its feature frames, without a tail, lie within min_frame .. max_frame, and where its
    encoder frames in the worst case (fastest speed, largest trim, this subsampling) times
    output_len_prob are at least its labels plus repeats, the length of the shortest CTC path
    (Graves et al. 2006).
    """
    frames = num_frames(lengths, frontend.without_tail)
    encoder_frames = subsampled_length(shortest_frames(lengths, frontend, augment), input_layer)
    shortest_path = np.maximum(label_lengths + repeats, 1)
    reasons = {
        f"shorter than {options.min_frame} frames": frames < options.min_frame,
        f"longer than {options.max_frame} frames": frames > options.max_frame,
        "labels too long for CTC": encoder_frames * options.output_len_prob < shortest_path,
    }
    keep = np.ones(len(lengths), bool)
    counts = {}
    for reason, bad in reasons.items():
        counts[reason] = int((bad & keep).sum())
        keep &= ~bad
    return keep, {reason: count for reason, count in counts.items() if count}


# ---- Rows and batches


class SpeechDataset(Dataset):
    """Makes a Batch of keys (epoch, row), or of a Shaped.

    An example depends on (seed, epoch, row) alone, and on its speed where the key has one.
    """

    def __init__(self, dataset: datasets.Dataset, make_transform: Callable[[], Compose], seed: int):
        self.dataset = dataset.select_columns(["input_values", "labels"])
        self.make_transform = make_transform
        self.seed = seed

    @cached_property
    def transform(self) -> Compose:
        """Builds the chain in the process that uses it: closures cannot go to a new process."""
        return self.make_transform()

    def __getitem__(self, keys) -> Batch:
        keys, frames, labels = keys if isinstance(keys, Shaped) else (keys, 0, 0)
        views = zip(*(self.views(*key) for key in keys))
        return collate([example for view in views for example in view], frames, labels)

    def views(
        self, epoch: int, row: int, speed: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Returns features (T,F), labels (U,) and the row number, for each view of the row."""
        labels = row_values(self.dataset, "labels", row).astype(np.int64)
        features = self.example(epoch, row, speed)["features"]  # (T,F), or (views,T,F)
        features = features[None] if features.dim() == 2 else features
        return [(view, torch.from_numpy(labels), row) for view in features]

    def example(self, epoch: int, row: int, speed: int | None = None) -> dict:
        """Returns what the chain makes of the row's waveform."""
        waveform = row_values(self.dataset, "input_values", row).astype(np.float32)
        example = {"input_values": torch.from_numpy(waveform)}
        if speed is not None:
            example["speed"] = speed
        return self.transform(example, make_generator(self.seed, epoch, row))


def row_values(dataset: datasets.Dataset, column: str, row: int) -> np.ndarray:
    """Returns a row's list as a view of the Arrow table.

    The NumPy format of datasets takes eight times as long.
    """
    if dataset._indices is not None:
        row = dataset._indices.column(0)[row].as_py()
    value = dataset.data.column(column)[row]
    if pa.types.is_struct(value.type):
        value = value["input_ids"]
    return value.values.to_numpy(zero_copy_only=False)


def collate(examples, least_frames: int = 0, least_labels: int = 0) -> Batch:
    """Pads examples (features (T,F), labels (U,), row) with zeros to a Batch.

    The Batch is as wide as its longest example, and at least as the two numbers say.
    """
    features, labels, rows = zip(*examples)
    lengths = [len(frames) for frames in features]
    label_lengths = [len(tokens) for tokens in labels]
    padded = empty_shared(len(features), max(least_frames, *lengths), features[0].size(1))
    for place, frames in zip(padded, features):
        place[: len(frames)] = frames
        place[len(frames) :] = 0
    wider = max(0, least_labels - max(label_lengths))
    return Batch(
        features=padded,
        feature_lengths=torch.tensor(lengths),
        labels=torch.nn.functional.pad(pad_sequence(labels, batch_first=True), (0, wider)),
        label_lengths=torch.tensor(label_lengths),
        rows=torch.tensor(rows),
    )


def empty_shared(*shape: int) -> torch.Tensor:
    """Makes an empty float32 tensor, in a loader process in shared memory.

    Shared memory spares a copy on the way to the training process, as in torch's own collate.
    """
    if get_worker_info() is None:
        return torch.empty(shape)
    return torch.empty(0).set_(torch.UntypedStorage._new_shared(4 * math.prod(shape)), 0, shape)


def start_worker(_) -> None:
    """Sets up a loader process: one thread, and signals that end it no sooner than training."""
    # With more threads, loader processes would fight the training process for the cores.
    torch.set_num_threads(1)
    # Ctrl-C and often SIGTERM reach all processes of a run. The training process needs its loader
    # processes to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent() -> None:
    """Ends the loader process at a SIGTERM from the training process, and from nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def default_workers() -> int:
    """Returns how many loader processes there are by default: at least 1 for a GPU, else 0."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(4, max(1 if torch.cuda.is_available() else 0, cores - 2))


def make_loader(
    dataset: datasets.Dataset,
    sampler,
    make_transform: Callable[[], Compose],
    seed: int,
    options: DataOptions,
) -> DataLoader:
    """Makes the DataLoader of the batches that `sampler` plans, lists of keys or Shaped."""
    workers = default_workers() if options.num_workers is None else options.num_workers
    return DataLoader(
        SpeechDataset(dataset, make_transform, seed),
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


def load_split(
    data_roots, split: str, tokenizer: Tokenizer, limit_rows: int | None = None
) -> datasets.Dataset:
    """Joins the shards of a split, keeps its first limit_rows rows, and checks its token ids.

    Raises UserError where get_concat_dataset does, and for an empty split or a wrong token id.
    """
    dataset = get_concat_dataset(data_roots, split)
    if limit_rows is not None:
        dataset = dataset.select(range(min(limit_rows, len(dataset))))
    where = ", ".join(f"{root}/{split}" for root in data_roots)
    if not len(dataset):
        raise UserError(f"{where}: no rows in it")
    check_token_ids(dataset, tokenizer, where)
    return dataset


class Sounds(Sequence):
    """Gives the waveforms (N,) float32 of a dataset's rows as views of the files on disk.

    So a loader process holds no copy of them, and reads no more than it asks for.
    """

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.select_columns("input_values")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> np.ndarray:
        return row_values(self.dataset, "input_values", row).astype(np.float32, copy=False)


def load_sounds(kind: str, roots, frontend: Frontend) -> Sequence[np.ndarray]:
    """Opens the recordings of --noise or --rir, `kind`, in the folders that prepare.py made.

    Raises UserError where a folder is none of those, has another sample rate, or is damaged.
    """
    for root in map(Path, roots):
        if not any(path.name.isdecimal() for path in (root / kind).glob("*")):
            raise UserError(
                f"--{kind} {root}: no {kind} that prepare.py made is there; `prepare.py --{kind} "
                "RECORDINGS --data_root NEW` makes it, and this flag takes NEW"
            )
    if not roots:
        return ()
    rows_rate(roots, frontend)
    dataset = get_concat_dataset(roots, kind)
    lengths = audio_lengths(dataset)
    if not lengths.all() or not len(lengths):
        raise UserError(f"--{kind} {' '.join(roots)}: a recording is empty; prepare it again")
    minutes = lengths.sum() / frontend.sample_rate / 60
    rank_zero_info(f"{kind}: {len(lengths)} recordings, {minutes:.1f} minutes")
    return Sounds(dataset)


def rows_rate(data_roots, frontend: Frontend | None = None) -> int:
    """Returns the samples per second of the rows: the rate in ROOT/prepare.json, else 16,000.

    Raises UserError where the roots differ, or where `frontend` has another sample rate.
    """
    rates = {}
    for root in data_roots:
        path = Path(root) / "prepare.json"
        try:
            record = read_json(path) if path.exists() else {"sample_rate": 16000}
            rates[root] = operator.index(record["sample_rate"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} says no sample_rate ({shown(str(error), 100)}); prepare it again"
            ) from error
    (first, rate), *_ = rates.items()
    for root, other in rates.items():
        if other != rate:
            raise UserError(
                f"{root} has {other} samples per second, {first} {rate}; prepare both "
                "with the same --sample_rate"
            )
    if frontend and frontend.sample_rate != rate:
        raise UserError(
            f"{first} has {rate} samples per second, the model hears {frontend.sample_rate}; "
            f"prepare the data with --sample_rate {frontend.sample_rate}"
        )
    return rate


def eval_plan(
    dataset, frontend: Frontend, options: DataOptions, rank: int = 0, world_size: int = 1
):
    """Plans batches of every row of a split, longest first, as lists of keys (0, row).

    A batch has at most --max_batch_seconds, or else at most EVAL_SECONDS and --batch_size rows.
    """
    seconds = options.max_batch_seconds
    rows = math.inf if seconds else options.batch_size or 16
    samples = (seconds or EVAL_SECONDS) * frontend.sample_rate
    lengths = audio_lengths(dataset) + frontend.tail_samples
    return eval_batches(lengths, rows, rank, world_size, samples)


def eval_loader(
    dataset, frontend: Frontend, options: DataOptions, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Makes the loader of the batches of eval_plan, with features that are not augmented."""
    batches = eval_plan(dataset, frontend, options, rank, world_size)
    return make_loader(dataset, batches, partial(eval_transform, frontend), 0, options)


class SpeechDataModule(L.LightningDataModule):
    """Holds the splits train and dev for Lightning's "fit", dev alone for its "validate"."""

    def __init__(
        self,
        *,
        data_roots,
        tokenizer: Tokenizer,
        frontend: Frontend,
        augment: Augment,
        options: DataOptions,
        input_layer: str = "conv2d",
        seed: int = 0,
        views: int = 1,
    ):
        super().__init__()
        self.data_roots = list(data_roots)
        self.tokenizer = tokenizer
        self.frontend = frontend
        self.augment = augment
        self.options = options
        self.input_layer = input_layer
        self.seed = seed
        self.splits: dict[str, datasets.Dataset] = {}
        self.make_train_transform = partial(train_transform, frontend, augment, views=views)
        self.kept = None  # row numbers of train that the filter kept
        self.start_batch = 0  # batches of the first epoch that a resumed run has seen

    def setup(self, stage: str):
        """Opens the splits of `stage`, "fit" or "validate". Raises UserError for bad data."""
        rows_rate(self.data_roots, self.frontend)
        for name in {"fit": ["train", "dev"], "validate": ["dev"]}[stage]:
            if name not in self.splits:
                self.splits[name] = load_split(
                    self.data_roots, name, self.tokenizer, self.options.limit_rows
                )
        if stage == "fit" and self.kept is None:
            sounds = (
                load_sounds(kind, getattr(self.augment, kind), self.frontend)
                for kind in ("rir", "noise")
            )
            self.make_train_transform = partial(self.make_train_transform, *sounds)
            self.filter_train()

    def filter_train(self):
        """Finds the rows of train to keep. Raises UserError where none is left."""
        train = self.splits["train"]
        self.lengths = audio_lengths(train)
        self.label_lengths, repeats = label_statistics(train)
        self.label_checksum = label_checksum(train)
        keep, reasons = np.ones(len(train), bool), {}
        if self.options.filter:
            keep, reasons = filter_conformer_len_prob(
                self.lengths,
                self.label_lengths,
                repeats,
                frontend=self.frontend,
                augment=self.augment,
                input_layer=self.input_layer,
                options=self.options,
            )
        self.kept = np.flatnonzero(keep)
        dropped = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        rank_zero_info(
            f"train: {len(self.kept)} of {len(train)} rows kept"
            + (f", dropped: {dropped}" if dropped else "")
        )
        if not len(self.kept):
            raise UserError(
                f"{', '.join(map(str, self.data_roots))}: no row of train is left after the filter "
                f"({dropped}); see --min_frame, --max_frame, --output_len_prob"
            )

    def cmvn(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (mean, 1 / standard deviation), each (F,), of train without augmentation.

        Of a larger split, CMVN_ROWS rows are taken, spread evenly over it. Tails do not count:
        their silence, far below any recording, would squeeze the deviations of speech.
        """
        places = np.linspace(0, len(self.kept) - 1, min(len(self.kept), CMVN_ROWS))
        loader = make_loader(
            self.splits["train"],
            [[(0, int(row))] for row in self.kept[places.astype(np.int64)]],
            partial(eval_transform, self.frontend.without_tail),
            self.seed,
            self.options,
        )
        frames = 0
        total = 0.0
        squares = 0.0
        for batch in loader:
            features = batch.features[0].double()  # (T,F)
            features = features[features.isfinite().all(dim=1)]
            frames += len(features)
            total = total + features.sum(0)
            squares = squares + features.square().sum(0)
        mean = total / frames
        variance = (squares / frames - mean.square()).clamp(min=1e-20)
        return mean.float(), variance.rsqrt().float()

    def sampler(self, rank: int, world_size: int) -> LengthGroupedSampler | ShapedSampler:
        """Makes the plan of train. setup("fit") must come before.

        --few_shapes auto counts as off here: train.py knows the device, and says on or off.
        """
        seconds = self.options.max_batch_seconds
        samples = seconds and seconds * self.frontend.sample_rate
        shared = {
            "rows": self.kept,
            "seed": self.seed,
            "rank": rank,
            "world_size": world_size,
            "batch_size": None if seconds else self.options.batch_size or 16,
        }
        if self.options.few_shapes == "on":
            field, rate = receptive_field(self.input_layer)
            return ShapedSampler(
                frames=self.frames_by_speed()[:, self.kept],
                labels=self.label_lengths[self.kept],
                # These are the most frames that make a multiple of 8 encoder frames, which suits
                # the kernels of a GPU best.
                grid=(field - 1, 8 * rate),
                max_batch=samples and samples / self.frontend.shift_samples,
                **shared,
            )
        # The order of batches of so many rows does not depend on the speeds.
        lengths = self.longest_lengths() if seconds else self.lengths + self.frontend.tail_samples
        return LengthGroupedSampler(
            lengths=lengths[self.kept],
            max_batch=samples,
            group_by_length=self.options.group_by_length,
            **shared,
        )

    def longest_lengths(self) -> np.ndarray:
        """Returns the samples of every row of train at the slowest speed, tails included."""
        speed = min(self.augment.speeds, default=1.0)
        return speed_length(self.lengths, speed) + self.frontend.tail_samples

    def frames_by_speed(self) -> np.ndarray:
        """Returns the frames of every row of train at every speed, (speeds, rows) int64."""
        return np.stack(
            [
                # Less than a window is padded to one frame.
                np.maximum(num_frames(speed_length(self.lengths, speed), self.frontend), 1)
                for speed in self.augment.speeds or (1.0,)
            ]
        )

    def train_batches(self, world_size: int) -> int:
        """Returns the batches of one rank in an epoch. setup("fit") must come before."""
        return len(self.sampler(0, world_size))

    def ranks(self) -> tuple[int, int]:
        """Returns this process's rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def next_epoch(self) -> int:
        """Returns the epoch that training begins with.

        Lightning tells the sampler this epoch, too, but in a resumed run only after the loader
        processes have asked for their first batches.
        """
        return self.trainer.fit_loop.epoch_progress.current.processed if self.trainer else 0

    def largest_batches(self) -> list[Batch]:
        """Loads the batches of this rank's next epoch that need most memory.

        They are the largest by frames and, if these are other batches, by labels and by the square
        of the frames, which attention sees: batches by seconds, or of few shapes, have about as
        many frames each. Where the plan draws no speed, all rows have the slowest one, which
        another epoch may draw.
        """
        batches = list(self.sampler(*self.ranks()).batches(self.next_epoch()))
        lengths = self.longest_lengths()
        sizes = np.array([self.sizes(batch, lengths) for batch in batches])  # (batches, measures)
        dataset = SpeechDataset(self.splits["train"], self.make_train_transform, self.seed)
        return [dataset[self.slowest(batches[i])] for i in dict.fromkeys(sizes.argmax(0).tolist())]

    def slowest(self, batch):
        """Returns a planned batch with all rows at the slowest speed, if its plan draws none."""
        if isinstance(batch, Shaped) or not self.augment.speeds:
            return batch
        speed = int(np.argmin(self.augment.speeds))
        return [(*key, speed) for key in batch]

    def sizes(self, batch, lengths: np.ndarray) -> list[int]:
        """Returns by how much a planned batch asks for memory, padding included, in each measure.

        lengths (rows,): of all rows, in samples. The units differ, and compare with those of other
        batches of the plan alone.
        """
        if isinstance(batch, Shaped):
            rows, longest, labels = len(batch.keys), batch.frames, batch.labels
        else:
            keys = [row for _, row in batch]
            rows, longest = len(keys), lengths[keys].max()
            labels = self.label_lengths[keys].max()
        return [rows * longest, rows * labels, rows * longest**2]

    @cached_property
    def dev_checksum(self) -> int:
        """Computes the checksum of the lengths and labels of dev, which every checkpoint holds."""
        return zlib.crc32(
            audio_lengths(self.splits["dev"]).tobytes(), label_checksum(self.splits["dev"])
        )

    def longest_dev_batch(self) -> Batch:
        """Loads this rank's batch of dev that needs most memory: the first of its plan."""
        batches = eval_plan(self.splits["dev"], self.frontend, self.options, *self.ranks())
        dataset = SpeechDataset(self.splits["dev"], partial(eval_transform, self.frontend), 0)
        return dataset[batches[0]]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        """Moves features and labels. Lengths and rows stay on the CPU, where they are asked for.

        CTC's CUDA kernel and the logs would have to wait for the GPU.
        """
        features = batch.features.to(device, non_blocking=True)
        return batch._replace(features=features, labels=batch.labels.to(device, non_blocking=True))

    def train_dataloader(self) -> DataLoader:
        sampler = self.sampler(*self.ranks())
        sampler.set_epoch(self.next_epoch())
        sampler.start_batch = self.start_batch
        return make_loader(
            self.splits["train"], sampler, self.make_train_transform, self.seed, self.options
        )

    def val_dataloader(self) -> DataLoader:
        return eval_loader(self.splits["dev"], self.frontend, self.options, *self.ranks())
