"""Speech and transcripts in, training data out: python prepare.py (--demo | --source SRC) --data_root ROOT

ROOT/{split}/{shard}/ are datasets saved with save_to_disk; a row has input_values (N,) float32 at 16 kHz,
labels {input_ids: (U,) int32}, length N, text and, where known, speaker. ROOT/tokenizer.json holds the vocabulary,
ROOT/rejected.csv the rows that could not be used. ROOT appears when all of it is written, or not at all.
"""

import collections
import contextlib
import csv
import functools
import glob
import io
import itertools
import logging
import os
import re
import shutil
import unicodedata
from dataclasses import dataclass
from typing import Any, Callable, Iterable, NamedTuple

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

import cli
import demo
import tokenizer as tk
from audio import read_audio, resample
from cli import UserError, option

# The splits of openslr/librispeech_asr (configs all, clean, other) and the usual names on the hub.
SPLIT_NAMES = {"train.clean.100": "train", "train.clean.360": "train", "train.other.500": "train",
               "train.100": "train", "train.360": "train", "train.500": "train", "train": "train",
               "validation.clean": "dev", "validation.other": "dev_other", "validation": "dev",
               "test.clean": "eval_clean", "test.other": "eval_other", "test": "eval_clean"}
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")  # after clean_text: no white space, and nothing that is said or written
TEXT_COLUMNS = ("transcription", "text", "transcript", "sentence")
SPEAKER_COLUMNS = ("speaker", "speaker_id")
QUIET = 20  # steps of 16 bits: in nothing that stays within so many is anything said
EDGE = 160  # samples: 10 ms


@dataclass(frozen=True)
class PrepareOptions:
    source: str | None = option(None, "folder SRC/{split}/metadata.csv, folder of parquet files, or a hub dataset's id")
    demo: bool = option(False, "make the synthetic demo corpus instead of reading a source")
    data_root: str | None = option(None, "folder to write; with --demo data/demo if not given")
    tokenizer: str = option("char", "char, bpe, or the path of a tokenizer.json, a .ckpt or a vocab.json")
    vocab_size: int | None = option(None, "number of tokens of --tokenizer bpe; 500 if not given")
    shard_rows: int = option(2000, "rows of a shard")
    overwrite: bool = option(False, "replace the data that an earlier run left in data_root")
    lowercase: bool = option(False, "write all text in lower case")
    uppercase: bool = option(False, "write all text in upper case")
    remove_punctuation: bool = option(False, "leave punctuation out of the text, apostrophes excepted")
    split_map: tuple[str, ...] = option((), "read only these splits under these names, e.g. train.100=train test=dev")
    config: str | None = option(None, "configuration of a hub dataset, e.g. clean")
    text_column: str | None = option(None, f"column of the text; the first of {', '.join(TEXT_COLUMNS)} if not given")
    audio_column: str = option("audio", "column of the audio in parquet and hub data")


class Row(NamedTuple):
    name: str  # for rejected.csv
    audio: Any  # a path, the bytes of a file, or a function that returns (waveform (N,), rate)
    text: str
    speaker: str  # "" when not known
    reason: str = ""  # why it cannot be used, where its source can tell


class Split(NamedTuple):
    count: int | None  # rows, where known
    speakers: bool  # whether its rows name their speakers
    texts: Callable[[], Iterable[str]]  # all transcripts, without touching audio
    rows: Callable[[], Iterable[Row]]


class BadRow(Exception):
    """Why one row cannot be used."""


# Sources: each gives {split name: [Split, ...]}


def demo_source() -> dict[str, list[Split]]:
    """The synthetic corpus of demo.py."""

    def rows(plan):
        for i, utterance in enumerate(plan):
            speech = functools.partial(lambda u: (demo.speak(u), demo.RATE), utterance)
            yield Row(f"utterance {i}", speech, utterance.text, utterance.voice)

    splits = {}
    for name in demo.UTTERANCES:
        plan = demo.plan(name)
        texts = functools.partial(lambda plan: (u.text for u in plan), plan)
        splits[name] = [Split(len(plan), True, texts, functools.partial(rows, plan))]
    return splits


def folder_source(source: str, options: PrepareOptions) -> dict[str, list[Split]]:
    """SRC/{split}/metadata.csv with file_name (relative to the split's folder), text and, optionally, speaker."""
    splits = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(source), "*", "metadata.csv"))):
        folder = os.path.dirname(path)
        records = read_metadata(path)
        text = choose_column([c for c in records[0] if c], options.text_column, TEXT_COLUMNS, path)
        speaker = next((c for c in SPEAKER_COLUMNS if c in records[0]), None)
        rows = functools.partial(folder_rows, source, folder, records, text, speaker)
        texts = functools.partial(lambda records, text: (r[text] or "" for r in records), records, text)
        splits[os.path.basename(folder)] = [Split(len(records), speaker is not None, texts, rows)]
    return select_splits(splits, options, source, {})


def read_metadata(path: str) -> list[dict]:
    """The rows of a metadata.csv. Raises UserError when it is no CSV in UTF-8 with a column file_name, or has no rows."""
    records, line = [], 1
    try:  # `line` is where the next row begins
        with open(path, "rb") as file:
            reader = csv.DictReader(io.StringIO(file.read().decode("utf-8-sig"), newline=""), strict=True)
        columns, line = list(reader.fieldnames or ()), reader.line_num + 1
        for record in reader:
            records.append(record)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not in UTF-8: line {line} has the byte 0x{error.object[error.start]:02x}; save it in UTF-8 "
                        "(iconv -f LATIN1 -t UTF-8, if it is in Latin-1)") from None
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file from line {line} on: {error}; is a quotation mark left open, or not doubled "
                        "within quotation marks?") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not records:
        raise UserError(f"{path} has no rows; fill it or take the folder away")
    twice = [column for column in columns if column and columns.count(column) > 1]
    if twice or "file_name" not in columns:
        raise UserError(f"{path} has {f'two columns {twice[0]}' if twice else 'no column file_name'}; its columns are "
                        f"{', '.join(columns)}")
    return records


def folder_rows(source: str, folder: str, records: list[dict], text: str, speaker: str | None):
    """A file that several rows name is used once; where their texts differ none can be trusted, and it is not used."""
    rows = [folder_row(source, folder, record, text, speaker) for record in records]
    texts, seen = collections.defaultdict(set), set()
    for row in rows:
        if not row.reason and row.text.strip():
            texts[row.audio].add(tk.normalize_text(row.text))
    for row in rows:
        if not row.reason and len(texts[row.audio]) > 1:
            row = row._replace(reason="several rows with different texts name this file")
        elif not row.reason and row.text.strip():
            row = row._replace(reason="an earlier row with the same text names this file" if row.audio in seen else "")
            seen.add(row.audio)
        yield row


def folder_row(source: str, folder: str, record: dict, text: str, speaker: str | None) -> Row:
    name = record["file_name"] or ""
    path = os.path.normpath(os.path.join(folder, name))
    reason = outside(source, path) if name.strip() else "no file name"
    if None in record:  # where DictReader puts what has no column
        reason = "more fields than columns; put a text with commas between quotation marks"
    return Row(name, path, record[text] or "", (speaker and record[speaker]) or "", reason)


def outside(source: str, path: str) -> str:
    """Why `path` may not be read, or "": its name must not lead out of `source`; links that lie in there may, and do."""
    inside = os.path.abspath(path).startswith(os.path.join(os.path.abspath(source), ""))
    return "" if inside else f"lies outside {source}; move it there, or put a link to it there"


def hub_source(source: str, options: PrepareOptions) -> dict[str, list[Split]]:
    """Parquet files or a dataset on the hub, through datasets; the audio stays encoded until it is needed."""
    local = os.path.isdir(source)
    try:  # a local folder is streamed; what the hub sends is kept in datasets' cache
        loaded = datasets.load_dataset(source, options.config, streaming=local)
    except Exception as error:  # datasets raises many kinds, some of them bare
        raise UserError(f"cannot load {source}: {error}; give a folder with SRC/{{split}}/metadata.csv, a folder of "
                        "parquet files or the id of a hub dataset") from None
    splits = {}
    for name, data in loaded.items():
        columns = data.column_names or list(next(iter(data)))
        place = f"split {name} of {source}"
        text = choose_column(columns, options.text_column, TEXT_COLUMNS, place)
        audio = choose_column(columns, options.audio_column, (), place, flag="--audio_column")
        data = data.cast_column(audio, datasets.Audio(decode=False))
        speaker = next((c for c in SPEAKER_COLUMNS if c in columns), None)
        texts = functools.partial(lambda d, text, place: (string(r[text]) for r in records(d, place)),
                                  data.select_columns([text]), text, place)
        rows = functools.partial(hub_rows, data, place, audio, text, speaker, source if local else None)
        splits[name] = [Split(None if local else len(data), speaker is not None, texts, rows)]
    return select_splits(splits, options, source, SPLIT_NAMES)


def records(data, place: str):
    """The rows of a dataset; what goes wrong while it is read becomes a UserError."""
    try:
        yield from data
    except Exception as error:  # pyarrow's, fsspec's and datasets' own have no common base
        raise UserError(f"cannot read {place} to its end: {error}; get its files anew, or name the column of the audio with "
                        "--audio_column") from None


def hub_rows(data, place: str, audio: str, text: str, speaker: str | None, folder: str | None):
    """Rows of a dataset, whose paths are relative to `folder`, where it is one, and must not lead out of it."""
    for i, record in enumerate(records(data, place)):
        sound, reason = record[audio] or {}, ""
        content, name = sound.get("bytes"), sound.get("path")
        if content is None and name:
            content = os.path.join(folder or "", name)
            reason = outside(folder, content) if folder else ""
        yield Row(name or f"row {i}", content, string(record[text]), string(speaker and record[speaker]), reason)


def string(value) -> str:
    """A cell as text; speakers are often numbers, and nothing is an empty text. Raises UserError for bytes, lists and dicts."""
    if isinstance(value, (bytes, list, dict)):
        raise UserError(f"a {type(value).__name__} is neither text nor speaker; name the column of the text with --text_column")
    return "" if value is None else str(value)


def choose_column(columns, wanted: str | None, usual, place: str, flag: str = "--text_column") -> str:
    """The column `wanted`, or the first of the usual names. Raises UserError when there is none."""
    found = [c for c in ([wanted] if wanted else usual) if c in columns]
    if not found:
        raise UserError(f"{place} has no column {wanted or ' or '.join(usual)}; its columns are "
                        f"{', '.join(map(str, columns))}: name one with {flag}")
    return found[0]


def select_splits(splits: dict, options: PrepareOptions, source: str, usual: dict) -> dict[str, list[Split]]:
    """Renames splits: those of --split_map only, or all with the usual names. Several may join under one name."""
    wanted = dict(item.partition("=")[::2] for item in options.split_map)
    for old, new in wanted.items():
        if not new or os.path.basename(new) != new or new.startswith("."):
            raise UserError(f"--split_map {old}={new} is not OLD=NEW, a split and a folder's name")
        if old not in splits:
            raise UserError(f"{source} has no split {old}; it has {', '.join(splits)}")
    result = collections.defaultdict(list)
    for old, parts in splits.items():
        if not wanted or old in wanted:
            result[wanted.get(old) or usual.get(old, old)] += parts
    return dict(result)


def open_source(options: PrepareOptions) -> dict[str, list[Split]]:
    if options.demo:
        return demo_source()
    if glob.glob(os.path.join(glob.escape(options.source), "*", "metadata.csv")):
        return folder_source(options.source, options)
    if not os.path.exists(options.source) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", options.source):
        raise UserError(f"no folder {options.source}; give a folder with SRC/{{split}}/metadata.csv")
    if os.path.exists(options.source) and not glob.glob(os.path.join(glob.escape(options.source), "**/*.parquet"),
                                                        recursive=True):
        raise UserError(f"{options.source} has neither SRC/{{split}}/metadata.csv nor parquet files; lay the speech "
                        "out as SRC/train/metadata.csv and SRC/dev/metadata.csv with the columns file_name and text")
    return hub_source(options.source, options)


# One row


def waveform_of(audio) -> np.ndarray:
    """Waveform (N,) float32, mono, 16 kHz, of a path, bytes or a function. Raises BadRow."""
    if audio is None:
        raise BadRow("no audio")
    try:
        return resample(*audio()) if callable(audio) else read_audio(audio)
    except UserError as reason:
        raise BadRow(str(reason)) from None


def silence(samples: np.ndarray) -> str:
    """Why nothing can be said in (N,) samples, or ""; but for the ends, where a constant rings."""
    if not samples.any():
        return "silent: all samples are 0"
    inner = samples[EDGE:-EDGE] if len(samples) > 4 * EDGE else samples
    middle = np.median(inner)
    level = 32768 * np.quantile(np.abs(inner - middle), 0.999)
    if len(inner) == 1 or level > QUIET + 15 * abs(middle):  # resampled, a constant ripples so much
        return ""
    return (f"silent: all samples are {middle:.4g}, give or take {level:.0f} steps of 16 bits; "
            "if it is speech, make it louder")


def clean_text(text: str, options: PrepareOptions) -> str:
    """NFC with single spaces; case and punctuation as the options say."""
    if options.remove_punctuation:
        text = "".join(" " if unicodedata.category(c).startswith("P") and c not in "'\u2019" else c for c in text)
    if options.lowercase or options.uppercase:
        text = text.lower() if options.lowercase else text.upper()
    return tk.normalize_text(text)


def make_example(row: Row, tokenizer: tk.Tokenizer, options: PrepareOptions) -> dict:
    """The row as it is written. Raises BadRow."""
    if row.reason:
        raise BadRow(row.reason)
    text = clean_text(row.text, options)
    if not text:
        raise BadRow("empty text")
    if found := CONTROL.search(text):
        raise BadRow(f"the text holds the control character U+{ord(found[0]):04X}")
    samples = waveform_of(row.audio)
    if reason := silence(samples):
        raise BadRow(reason)
    return {"input_values": samples, "labels": {"input_ids": tokenizer.encode(text)}, "length": len(samples),
            "text": text, "speaker": row.speaker}


# Writing


def write_split(name: str, parts: list[Split], folder: str, tokenizer, options, rejected: list) -> int:
    """Writes the shards folder/0, folder/1, ...; bad rows are added to `rejected`. Returns the rows kept."""
    counts = [part.count for part in parts]
    rows = itertools.chain.from_iterable(part.rows() for part in parts)
    bar = tqdm(rows, desc=name, unit=" rows", total=None if None in counts else sum(counts))
    speakers, tokens, unknown = any(part.speakers for part in parts), 0, 0
    with contextlib.closing(ShardWriter(folder, options.shard_rows, speakers)) as writer:
        for row in bar:
            try:
                example = make_example(row, tokenizer, options)
            except BadRow as reason:
                rejected.append((name, row.name, str(reason)))
                continue
            writer.write(example)
            tokens += len(example["labels"]["input_ids"])
            unknown += example["labels"]["input_ids"].count(tokenizer.unk_id)
    if writer.rows == 0:
        first = next((f": {r[1]}: {r[2]}" for r in rejected if r[0] == name), "")
        raise UserError(f"split {name} has no usable row{first}; nothing was written")
    if 2 * unknown > tokens:
        raise UserError(f"{unknown} of {tokens} tokens of split {name} are unknown to {options.tokenizer}: "
                        "try --uppercase or --lowercase, or another --tokenizer")
    if unknown:
        print(f"{name}: {unknown} of {tokens} tokens are unknown to the tokenizer")
    return writer.rows


BATCH_ROWS, BATCH_SAMPLES = 100, 2**25  # written at a time: an hour of speech waits in memory, however long the rows are


class ShardWriter:
    """Streams rows into datasets of at most `shard_rows` rows; a shard's audio passes through a file, not memory."""

    def __init__(self, folder: str, shard_rows: int, speakers: bool):
        self.folder, self.shard_rows = folder, shard_rows
        columns = {"input_values": datasets.List(datasets.Value("float32")),
                   "labels": {"input_ids": datasets.List(datasets.Value("int32"))},
                   "length": datasets.Value("int64"), "text": datasets.Value("string")}
        self._features = datasets.Features(columns | ({"speaker": datasets.Value("string")} if speakers else {}))
        self.rows = self.shards = self._waiting = 0
        self._writer, self._stream = None, f"{folder}.arrow"
        os.makedirs(folder)

    def write(self, example: dict) -> None:
        if self._writer is None:
            self._writer = ArrowWriter(path=self._stream, features=self._features, writer_batch_size=BATCH_ROWS)
        self._writer.write({name: example[name] for name in self._features})
        self._waiting += example["length"]
        if self._waiting > BATCH_SAMPLES:
            self._writer.write_examples_on_file()
            self._waiting = 0
        self.rows += 1
        if self.rows % self.shard_rows == 0:
            self.close()

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.finalize()
        self._writer = None
        datasets.Dataset.from_file(self._stream).save_to_disk(os.path.join(self.folder, str(self.shards)))
        os.remove(self._stream)
        self.shards += 1


def make_tokenizer(splits: dict[str, list[Split]], options: PrepareOptions) -> tk.Tokenizer:
    """Loads --tokenizer PATH, or trains on the text of the train split."""
    if options.tokenizer not in ("char", "bpe"):
        return tk.load_tokenizer(options.tokenizer)
    if "train" not in splits:
        raise UserError(f"no split train to train a tokenizer on, only {', '.join(splits)}; give --tokenizer PATH, the "
                        "tokenizer.json or .ckpt of the model this data is for")
    texts = (clean_text(text, options) for part in splits["train"] for text in part.texts())
    texts = (text for text in texts if not CONTROL.search(text))
    return tk.train_char(texts) if options.tokenizer == "char" else tk.train_bpe(texts, options.vocab_size or 500)


def check_root(root: str, overwrite: bool) -> None:
    """Raises UserError when ROOT holds data and may not be replaced, or anything that is not prepare.py's."""
    if not os.path.exists(root):
        return
    if not os.path.isdir(root):
        raise UserError(f"{root} is a file; give another --data_root")
    foreign = [name for name in sorted(os.listdir(root)) if name not in ("tokenizer.json", "rejected.csv")
               and not glob.glob(os.path.join(glob.escape(os.path.join(root, name)), "*", "state.json"))]
    if foreign:
        raise UserError(f"{root} holds {foreign[0]}, which prepare.py did not write; give another --data_root")
    if os.listdir(root) and not overwrite:
        raise UserError(f"{root} holds data already; give another --data_root, or --overwrite to replace it")


def publish(partial: str, root: str) -> None:
    """Puts the finished folder in ROOT's place; what was there goes last."""
    old = f"{partial}-old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(root):
        os.replace(root, old)
    os.replace(partial, root)
    shutil.rmtree(old, ignore_errors=True)


def prepare(options: PrepareOptions) -> tuple[int, int]:
    """Writes ROOT from the source. Returns the rows kept and rejected. Raises UserError, leaving ROOT as it was."""
    root = os.path.realpath(options.data_root)
    check_root(root, options.overwrite)
    splits = open_source(options)
    tokenizer = make_tokenizer(splits, options)
    partial = os.path.join(os.path.dirname(root), f".{os.path.basename(root)}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        os.makedirs(partial)
        rejected: list[tuple[str, str, str]] = []
        kept = sum(write_split(name, parts, os.path.join(partial, name), tokenizer, options, rejected)
                   for name, parts in splits.items())
        with open(os.path.join(partial, "rejected.csv"), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("split", "file_name", "reason"), *rejected])
        tk.save_tokenizer(tokenizer, os.path.join(partial, "tokenizer.json"))
        publish(partial, root)
    except OSError as error:
        raise UserError(f"cannot write {options.data_root}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kept, len(rejected)


def parse(argv: list[str]) -> PrepareOptions:
    given = vars(cli.make_parser(__doc__, PrepareOptions).parse_args(argv))
    options = cli.build(PrepareOptions, given, **({"data_root": "data/demo"} if given.get("demo") else {}))
    if options.demo == (options.source is not None):
        raise UserError("give either --demo or --source SRC, and --data_root ROOT")
    if options.data_root is None:
        raise UserError("give --data_root ROOT, the folder to write")
    unused = {"split_map", "config", "text_column", "audio_column"} & set(given) if options.demo else set()
    unused |= {"vocab_size"} & set(given) if options.tokenizer != "bpe" else set()
    if unused:
        raise UserError(f"--{sorted(unused)[0]} has no effect here; leave it out")
    if options.lowercase and options.uppercase:
        raise UserError("give --lowercase or --uppercase, not both")
    if options.shard_rows < 1:
        raise UserError("--shard_rows must be 1 or more")
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    datasets.disable_progress_bars()  # save_to_disk's; ours counts rows
    for library in ("datasets", "huggingface_hub", "fsspec"):  # their errors reach the user as ours, in one line
        logging.getLogger(library).setLevel(logging.CRITICAL)
    kept, rejected = prepare(options)
    print(f"{options.data_root}: kept {kept} rows, rejected {rejected} rows"
          + (f" (reasons in {os.path.join(options.data_root, 'rejected.csv')})" if rejected else ""))


if __name__ == "__main__":
    cli.run(main)
