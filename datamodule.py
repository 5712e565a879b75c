"""From shards on disk to batches: concat, filter, length-grouped batches, and the transforms, run on every access.

Rows are HF datasets rows with input_values (raw audio, 16 kHz unless ROOT/prepare.json says otherwise), labels (token
ids; a list, or a dict with input_ids) and, if it is there, length (= len(input_values)). Row numbers are positions in the
concatenation of all shards.
Axes: B batch, T frames, F mel bins, U labels, N samples.
"""

import math
import operator
import os
import signal
import threading
import zlib
from collections.abc import Callable
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

from conformer import subsampled_length
from files import SMALL, parse_json, read_json, read_text, why
from sampler import LengthGroupedSampler, eval_batches
from tokenizer import Tokenizer
from transforms import (
    Augment,
    Compose,
    Frontend,
    eval_transform,
    make_generator,
    num_frames,
    shortest_frames,
    train_transform,
)

EVAL_SECONDS = 200.0  # of audio in a batch that is only heard, padding included: less than a GB of memory with preset base
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream


@options_class
class DataOptions:
    """Batches, filter and workers. Raises UserError for sizes that contradict each other."""

    batch_size: int | None = option(
        None,
        "rows per batch and device; 16 unless --max_batch_seconds is given",
        at_least=1,
        at_most=2**16,
    )
    max_batch_seconds: float | None = option(
        None,
        "instead of --batch_size: seconds of audio per batch, padding included",
        above=0,
        at_most=1e6,
    )
    group_by_length: bool = option(
        True, "batches of rows alike in length; otherwise plain shuffling"
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
        if self.min_frame > self.max_frame:
            raise UserError(
                f"--min_frame {self.min_frame} --max_frame {self.max_frame}: no row lies between them; lower "
                "--min_frame or raise --max_frame"
            )


class Batch(NamedTuple):
    features: torch.Tensor  # (B,T,F) float32, zero padded
    feature_lengths: torch.Tensor  # (B,) frames
    labels: torch.Tensor  # (B,U) token ids, zero padded
    label_lengths: torch.Tensor  # (B,)
    rows: torch.Tensor  # (B,) row numbers

    def __reduce__(self):
        """What is small travels from the loader inside the message: a shared file costs both processes 0.2 ms a tensor."""
        return unpack_batch, (self.features, *(tensor.numpy() for tensor in self[1:]))


def unpack_batch(features, *small) -> Batch:
    return Batch(features, *map(torch.from_numpy, small))


# ---------------------------------------------------------------------------------------------------------------- shards


def get_concat_dataset(data_roots, split: str) -> datasets.Dataset:
    """All shards ROOT/split/0, 1, ... (or 0/data ...) of all roots that have the split, in numeric order.

    Raises UserError for a missing root, a split that no root has, a shard that comes twice, a damaged one, a wrong schema
    (naming the shard), and roots whose tokenizers differ.
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
    first, first_path = shards[0]
    names = [
        name
        for name in first.column_names
        if all(name in shard.column_names for shard, _ in shards)
    ]
    for shard, path in shards:
        for name in names:
            if shard.features[name] != first.features[name]:
                raise UserError(
                    f"{path}: column {name} is {shard.features[name]} but in {first_path} it is "
                    f"{first.features[name]}; prepare both the same way"
                )
    return datasets.concatenate_datasets(
        [  # selecting takes as long as opening: only where there is something to leave out
            shard if shard.column_names == names else shard.select_columns(names)
            for shard, _ in shards
        ]
    )


def check_tokenizers(data_roots) -> None:
    """Raises UserError where the tokenizer.json of two data roots differ, or one cannot be read."""
    contents = {}
    for path in (Path(root) / "tokenizer.json" for root in data_roots):
        try:
            contents |= {path: parse_json(read_text(path))} if path.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read ({shown(str(why(error)), 200)}); prepare it again"
            ) from error
    for path, content in contents.items():
        if content != next(iter(contents.values())):
            raise UserError(
                f"{path} differs from {next(iter(contents))}: label ids would mean different things; prepare both "
                "roots with the same --tokenizer"
            )


def check_twice(paths: list[Path]) -> None:
    """Raises UserError where two of the paths are the same folder."""
    seen = {}
    for path in paths:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise UserError(
                f"{path}: its rows would come twice{f', also as {other}' if other != path else ''}; give every data "
                "root once, or a copy of one whose rows shall count twice"
            )


def shard_paths(root: Path, split: str) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"{root}: no such data root; prepare.py makes one")
    if not (root / split).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) or ["none"]
        raise UserError(
            f"{root} has no split {split} (there: {', '.join(there)}); prepare.py makes one from "
            f"SRC/{split}/metadata.csv"
        )
    shards = sorted(
        (path for path in (root / split).iterdir() if path.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    if not shards:
        raise UserError(f"{root / split} holds no shard 0, 1, ...; prepare it again")
    others = sorted(
        path.name
        for path in (root / split).iterdir()
        if path.is_dir() and not path.name.isdecimal() and not path.name.startswith(".")
    )
    if others:
        rank_zero_info(f"{root / split}: left out {', '.join(others)}; shards are called 0, 1, ...")
    if (absent := int(shards[-1].name) + 1 - len(shards)) > 0:
        rank_zero_info(f"{root / split}: {absent} of the shards 0 .. {shards[-1].name} absent")
    return [path / "data" if (path / "data" / "state.json").is_file() else path for path in shards]


def load_shard(path: Path) -> tuple[datasets.Dataset, Path]:
    try:
        if not (path / "state.json").exists() and (path / "dataset_dict.json").exists():
            raise ValueError(
                "it holds several splits; a shard is one datasets.Dataset saved with save_to_disk"
            )
        check_files(path)
        shard = datasets.Dataset.load_from_disk(str(path)).with_format(None)
    except Exception as error:  # what datasets and pyarrow raise for JSON and tables of strangers has no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: cannot be read as a dataset ({reason}); prepare it again"
        ) from error
    check_schema(shard, path)
    return shard, path


def check_files(path: Path) -> None:
    """Raises OSError, ValueError or ArrowInvalid where the datasets library would read files
    outside the shard, wait for ever, fill the memory, or read memory that is not its own."""
    read_json(path / "dataset_info.json")
    for name in [entry["filename"] for entry in read_json(path / "state.json")["_data_files"]]:
        if (
            os.path.isabs(name) or os.pardir in Path(name).parts
        ):  # a link may lead to another disk, a name may not
            raise ValueError(f"its state.json names {name}, which lies outside")
        if not os.path.isfile(path / name):
            raise ValueError(f"its state.json names {name}, which is no file")
        check_arrow(str(path / name))


def check_arrow(path: str) -> None:
    """Raises ValueError or ArrowInvalid where an Arrow stream lacks its end, where its buffers hold
    less than it says of them, or where they are compressed.

    Arrow believes the offsets of lists when it reads. Its full validation, which is asked for here,
    looks at every offset, but at no audio.
    """
    name = os.path.basename(path)
    # A stream that was cut between two record batches looks to pyarrow like a whole, shorter one.
    with open(path, "rb") as stream:
        stream.seek(-len(END_OF_STREAM), os.SEEK_END)
        if stream.read() != END_OF_STREAM:
            raise ValueError(f"{name} is truncated")
    head, *messages = pa.ipc.MessageReader.open_stream(pa.memory_map(path))
    # From a message of another type, pyarrow would read what is not there.
    if head.type != "schema" or head.metadata.size > SMALL:
        raise ValueError(f"{name} begins with no schema, or with one of more than {SMALL} bytes")
    schema = pa.ipc.read_schema(head)
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"{name} holds a {message.type}, which is not read here")
        if message.metadata_version != pa.ipc.MetadataVersion.V5 or is_packed(message):
            raise ValueError(f"{name} is packed, which save_to_disk does not")
        batch = pa.ipc.read_record_batch(message, schema)
        # Any number of empty lists, or of values that are missing, may be said to lie in no bytes.
        if batch.num_rows > message.body.size:
            raise ValueError(f"{name} promises {batch.num_rows} rows in {message.body.size} bytes")
        batch.validate(full=True)


def is_packed(message: pa.ipc.Message) -> bool:
    """Whether the buffers of a record batch are compressed. pyarrow does not tell, so the field is
    read from the flatbuffer: Message.header.compression in Arrow's format/Message.fbs."""
    content = message.metadata.to_pybytes()

    def number(place: int, size: int = 4) -> int:
        return int.from_bytes(content[place : place + size], "little", signed=size == 4)

    def field(table: int, index: int) -> int:
        """Where field `index` of a flatbuffer's table lies, or 0."""
        vtable, entry = table - number(table), 4 + 2 * index
        offset = number(vtable + entry, 2) if entry < number(vtable, 2) else 0
        return offset and table + offset

    header = field(number(0), 2)
    return field(header + number(header), 3) > 0


def check_schema(shard: datasets.Dataset, path: Path) -> None:
    """Raises UserError where a column is missing, has a wrong type, or has rows without a value."""
    schema = shard.data.schema
    for name in ("input_values", "labels"):
        if name not in schema.names:
            raise UserError(f"{path}: no column {name} (there: {', '.join(schema.names)})")
    labels = schema.field("labels").type
    if pa.types.is_struct(labels):
        labels = (
            labels.field("input_ids").type if labels.get_field_index("input_ids") >= 0 else None
        )
    for name, kind, is_value in (
        ("input_values", schema.field("input_values").type, pa.types.is_floating),
        ("labels", labels, pa.types.is_integer),
    ):
        if not is_list(kind) or not is_value(kind.value_type):
            wanted = (
                "a list of floats"
                if name == "input_values"
                else "a list of ints, or a dict with input_ids"
            )
            raise UserError(f"{path}: column {name} is {schema.field(name).type}, not {wanted}")
    for name, column in (
        ("input_values", shard.data.column("input_values")),
        ("labels", label_column(shard)),
    ):
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy())[0]
            raise UserError(
                f"{path}: column {name} has no value in row {row} of the shard; leave such rows out"
            )
    if "length" in schema.names and not pa.types.is_integer(schema.field("length").type):
        raise UserError(
            f"{path}: column length is {schema.field('length').type}, not a whole number of samples; leave it "
            "out, and it is computed"
        )
    if "length" in schema.names:
        said, samples = (
            shard.data.column("length").to_numpy(),
            list_lengths(shard.data.column("input_values")),
        )
        for row in np.flatnonzero(said != samples)[:1]:  # one without a value is nan
            raise UserError(
                f"{path}: column length is {said[row]} in row {row} of the shard, but input_values has "
                f"{samples[row]} samples there; leave the column out, and it is computed"
            )


def is_list(kind) -> bool:
    return kind is not None and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


# --------------------------------------------------------------------------------- lengths, from Arrow offsets, never audio


def audio_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """(rows,) int64 samples: the column `length`, or computed once from the list offsets."""
    if "length" in dataset.column_names:
        lengths = dataset.data.column("length").to_numpy().astype(np.int64)
    else:
        lengths = list_lengths(dataset.data.column("input_values"))
    if dataset._indices is None:
        return lengths
    return lengths[
        dataset._indices.column(0).to_numpy()
    ]  # rows picked by select or shuffle; their audio stays unread


def list_lengths(column) -> np.ndarray:
    return np.concatenate(
        [np.zeros(0, np.int64)]
        + [
            pa.compute.list_value_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64)
            for chunk in column.chunks
        ]
    )


def label_column(dataset: datasets.Dataset) -> pa.ChunkedArray:
    if dataset._indices is not None:
        dataset = dataset.select_columns("labels").flatten_indices()
    column = dataset.data.column("labels")
    return (
        pa.compute.struct_field(column, "input_ids") if pa.types.is_struct(column.type) else column
    )


def label_statistics(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) int64 each: labels, and adjacent repeats among them (CTC needs a blank between)."""
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
    """The same for the same token ids in the same rows, however they are stored."""
    checksum = 0
    for parts in zip(
        *map(label_values, label_column(dataset).chunks)
    ):  # values of all chunks, then lengths of all chunks
        for part in parts:
            checksum = zlib.crc32(part.astype(np.int64), checksum)
    return checksum


def label_values(chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """All token ids of the chunk's rows one after the other, and how many each row has."""
    return chunk.flatten().to_numpy(zero_copy_only=False), list_lengths(pa.chunked_array([chunk]))


def check_token_ids(dataset: datasets.Dataset, tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError, naming the first such row, for ids outside the vocabulary or missing, and for blanks within a label."""
    first = 0
    for chunk in label_column(dataset).chunks:
        values, lengths = label_values(chunk)
        good = (values >= 0) & (values < tokenizer.vocab_size) & (values != tokenizer.blank_id)
        bad = np.flatnonzero(~good)  # a missing one is NaN, which compares as false
        if len(bad):
            row, token = (
                first + np.searchsorted(np.cumsum(lengths), bad[0], side="right"),
                values[bad[0]],
            )
            reason = (
                "is the CTC blank, which no label may hold"
                if token == tokenizer.blank_id
                else f"lies outside the tokenizer's 0 .. {tokenizer.vocab_size - 1}"
            )
            raise UserError(
                f"{where} row {row}: token id {token} {reason}; use the tokenizer that made the labels"
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
    """Which rows CTC can learn from, and how many are dropped for what reason.

    A row stays when its encoder frames in the worst case (fastest speed, largest trim, this subsampling) times
    output_len_prob are at least its labels plus their adjacent repeats (Graves et al. 2006: the shortest CTC path), and
    its feature frames lie within min_frame .. max_frame.
    """
    frames = num_frames(lengths, frontend)
    worst = subsampled_length(shortest_frames(lengths, frontend, augment), input_layer)
    reasons = {
        f"shorter than {options.min_frame} frames": frames < options.min_frame,
        f"longer than {options.max_frame} frames": frames > options.max_frame,
        "labels too long for CTC": worst * options.output_len_prob
        < np.maximum(label_lengths + repeats, 1),
    }
    keep = np.ones(len(lengths), bool)
    counts = {}
    for reason, bad in reasons.items():
        counts[reason] = int((bad & keep).sum())
        keep &= ~bad
    return keep, {reason: count for reason, count in counts.items() if count}


# ------------------------------------------------------------------------------------------------------ rows and batches


class SpeechDataset(Dataset):
    """Keys (epoch, row) to examples: features (T,F), labels (U,), row. A function of (seed, epoch, row), nothing else."""

    def __init__(self, dataset: datasets.Dataset, make_transform: Callable[[], Compose], seed: int):
        self.dataset, self.make_transform, self.seed = (
            dataset.select_columns(["input_values", "labels"]),
            make_transform,
            seed,
        )

    @cached_property
    def transform(self) -> Compose:
        """Built by the process that uses it: a chain of closures cannot be sent to a worker that was not forked."""
        return self.make_transform()

    def __getitem__(self, keys):
        return collate([self.example(epoch, row) for epoch, row in keys])

    def example(self, epoch: int, row: int):
        waveform = torch.from_numpy(
            row_values(self.dataset, "input_values", row).astype(np.float32)
        )
        example = self.transform({"input_values": waveform}, make_generator(self.seed, epoch, row))
        return (
            example["features"],
            torch.from_numpy(row_values(self.dataset, "labels", row).astype(np.int64)),
            row,
        )


def row_values(dataset: datasets.Dataset, column: str, row: int) -> np.ndarray:
    """A row's list, a view of the Arrow table: datasets' own NumPy format takes eight times as long."""
    if dataset._indices is not None:
        row = dataset._indices.column(0)[row].as_py()
    value = dataset.data.column(column)[row]
    if pa.types.is_struct(value.type):
        value = value["input_ids"]
    return value.values.to_numpy(zero_copy_only=False)


def collate(examples) -> Batch:
    features, labels, rows = zip(*examples)
    lengths = [len(f) for f in features]
    padded = empty_shared(len(features), max(lengths), features[0].size(1))
    for place, frames in zip(padded, features):
        place[: len(frames)] = frames
        place[len(frames) :] = 0
    return Batch(
        padded,
        torch.tensor(lengths),
        pad_sequence(labels, batch_first=True),
        torch.tensor([len(y) for y in labels]),
        torch.tensor(rows),
    )


def empty_shared(*shape: int) -> torch.Tensor:
    """(shape) float32; in a worker in shared memory, which spares a copy on the way out, as torch's own collate does it."""
    if get_worker_info() is None:
        return torch.empty(shape)
    return torch.empty(0).set_(torch.UntypedStorage._new_shared(4 * math.prod(shape)), 0, shape)


def start_worker(_) -> None:
    torch.set_num_threads(
        1
    )  # a worker with as many threads as cores fights the training process for them
    # Ctrl-C and many a SIGTERM reach all processes of a run. The training process finishes its step first, and needs workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent() -> None:
    """Ends the worker at a SIGTERM from the training process, and from nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def default_workers() -> int:
    """Loader processes where none are asked for: training on a CPU wants all of its cores, a GPU wants to be fed."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(4, max(1 if torch.cuda.is_available() else 0, cores - 2))


def make_loader(
    dataset: datasets.Dataset,
    sampler,
    make_transform: Callable[[], Compose],
    seed: int,
    options: DataOptions,
) -> DataLoader:
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
    """The concatenated split, token ids checked. Raises UserError also for an empty split."""
    dataset = get_concat_dataset(data_roots, split)
    if limit_rows is not None:
        dataset = dataset.select(
            range(min(limit_rows, len(dataset)))
        )  # a slice of the Arrow table: nothing is copied
    where = ", ".join(f"{root}/{split}" for root in data_roots)
    if not len(dataset):
        raise UserError(f"{where}: no rows in it")
    check_token_ids(dataset, tokenizer, where)
    return dataset


def rows_rate(data_roots, frontend: Frontend | None = None) -> int:
    """Samples per second of the rows: what ROOT/prepare.json says, else 16,000. Raises UserError
    where the roots differ, or where `frontend` takes the samples for others."""
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
            f"{first} has {rate} samples per second, the model hears "
            f"{frontend.sample_rate}; prepare the data with --sample_rate "
            f"{frontend.sample_rate}"
        )
    return rate


def eval_plan(
    dataset, frontend: Frontend, options: DataOptions, rank: int = 0, world_size: int = 1
):
    """Batches of every row of a split, longest first, within --max_batch_seconds, else within EVAL_SECONDS and --batch_size."""
    seconds = options.max_batch_seconds
    rows = math.inf if seconds else options.batch_size or 16
    return eval_batches(
        audio_lengths(dataset),
        rows,
        rank,
        world_size,
        (seconds or EVAL_SECONDS) * frontend.sample_rate,
    )


def eval_loader(
    dataset, frontend: Frontend, options: DataOptions, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """The batches of eval_plan, features without augmentation."""
    batches = eval_plan(dataset, frontend, options, rank, world_size)
    return make_loader(dataset, batches, partial(eval_transform, frontend), 0, options)


class SpeechDataModule(L.LightningDataModule):
    """The splits train and dev for Lightning's "fit", dev alone for its "validate"."""

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
    ):
        super().__init__()
        self.data_roots, self.tokenizer, self.frontend = list(data_roots), tokenizer, frontend
        self.augment, self.options, self.input_layer, self.seed = (
            augment,
            options,
            input_layer,
            seed,
        )
        self.splits: dict[str, datasets.Dataset] = {}
        self.make_train_transform = partial(train_transform, frontend, augment)
        self.kept = None  # row numbers of train that the filter kept
        self.start_batch = 0  # batches of the first epoch that a resumed run has seen

    def prepare_data(self):
        """Nothing: prepare.py is a command of its own."""

    def setup(self, stage: str):
        rows_rate(self.data_roots, self.frontend)
        for name in {"fit": ["train", "dev"], "validate": ["dev"]}[stage]:
            if name not in self.splits:
                self.splits[name] = load_split(
                    self.data_roots, name, self.tokenizer, self.options.limit_rows
                )
        if stage == "fit" and self.kept is None:
            self.filter_train()

    def filter_train(self):
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
                f"{', '.join(map(str, self.data_roots))}: no row of train is left after the filter ({dropped}); "
                "see --min_frame, --max_frame, --output_len_prob"
            )

    def cmvn(self, most_rows: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, 1 / standard deviation), each (F,), of the training split's features without augmentation.

        Of a larger split, `most_rows` rows spread evenly over it are taken: 20,000 take two minutes of one core.
        """
        rows = self.kept[
            np.linspace(0, len(self.kept) - 1, min(len(self.kept), most_rows)).astype(np.int64)
        ]
        loader = make_loader(
            self.splits["train"],
            [[(0, int(row))] for row in rows],
            partial(eval_transform, self.frontend),
            self.seed,
            self.options,
        )
        frames, total, squares = 0, 0.0, 0.0
        for batch in loader:
            features = batch.features[0].double()  # (T,F)
            features = features[features.isfinite().all(dim=1)]
            frames, total, squares = (
                frames + len(features),
                total + features.sum(0),
                squares + features.square().sum(0),
            )
        mean = total / frames
        return mean.float(), (squares / frames - mean.square()).clamp(min=1e-20).rsqrt().float()

    def sampler(self, rank: int, world_size: int) -> LengthGroupedSampler:
        seconds = self.options.max_batch_seconds
        return LengthGroupedSampler(
            lengths=self.lengths[self.kept],
            rows=self.kept,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            batch_size=None if seconds else self.options.batch_size or 16,
            max_batch=seconds and seconds * self.frontend.sample_rate,
            group_by_length=self.options.group_by_length,
        )

    def train_batches(self, world_size: int) -> int:
        """Batches of one rank in an epoch; after setup('fit')."""
        return len(self.sampler(0, world_size))

    def ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def next_epoch(self) -> int:
        """The epoch that training begins with. Lightning tells the sampler too, but in a resumed run only after the loader
        processes have asked for their first batches."""
        return self.trainer.fit_loop.epoch_progress.current.processed if self.trainer else 0

    def largest_batches(self) -> list[Batch]:
        """The batches of this rank's next epoch that need most memory: by frames and, if it is another, by labels."""
        epoch = self.next_epoch()
        plan = self.sampler(*self.ranks()).plan(epoch)
        largest = [
            max(range(len(plan)), key=lambda i: len(plan[i]) * lengths[plan[i]].max())
            for lengths in (self.lengths, self.label_lengths)
        ]
        dataset = SpeechDataset(self.splits["train"], self.make_train_transform, self.seed)
        return [dataset[[(epoch, int(row)) for row in plan[i]]] for i in dict.fromkeys(largest)]

    @cached_property
    def dev_checksum(self) -> int:
        """Of its lengths and labels; every checkpoint says it."""
        return zlib.crc32(
            audio_lengths(self.splits["dev"]).tobytes(), label_checksum(self.splits["dev"])
        )

    def longest_dev_batch(self) -> Batch:
        """Of this rank; the one that needs most memory."""
        batches = eval_plan(self.splits["dev"], self.frontend, self.options, *self.ranks())
        return SpeechDataset(self.splits["dev"], partial(eval_transform, self.frontend), 0)[
            batches[0]
        ]

    def train_dataloader(self) -> DataLoader:
        sampler = self.sampler(*self.ranks())
        sampler.set_epoch(self.next_epoch())
        sampler.start_batch = self.start_batch
        return make_loader(
            self.splits["train"], sampler, self.make_train_transform, self.seed, self.options
        )

    def val_dataloader(self) -> DataLoader:
        return eval_loader(self.splits["dev"], self.frontend, self.options, *self.ranks())
