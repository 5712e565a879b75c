"""Where speech and transcripts come from: a folder, a dataset on the hub, or the demo's sentences.

A source gives {split: [Split, ...]}. In a folder it is decided here, from names alone, which file is read as which split: all
metadata.csv, metadata.jsonl and parquet files are. What is joined under one name and what is left out is named.
"""

import collections
import csv
import functools
import glob
import io
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet
import soundfile
import yaml

import demo
import tokenizer as tk
from cli import UserError, option
from segments import EXTENSIONS

# The splits of openslr/librispeech_asr (configs all, clean, other), the usual names on the hub, and ours.
SPLIT_NAMES = {"train.clean.100": "train", "train.clean.360": "train", "train.other.500": "train",
               "train.100": "train", "train.360": "train", "train.500": "train", "train": "train",
               "validation.clean": "dev", "validation.other": "dev_other", "validation": "dev", "valid": "dev", "val": "dev",
               "test.clean": "eval_clean", "test.other": "eval_other", "test": "eval_clean",
               "dev": "dev", "dev_other": "dev_other", "eval_clean": "eval_clean", "eval_other": "eval_other"}
TEXT_COLUMNS = ("transcription", "text", "transcript", "sentence")
AUDIO_COLUMNS = ("audio", "file_name", "path", "file")
SPEAKER_COLUMNS = ("speaker", "speaker_id")
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")  # train-00000-of-00002.parquet is a part of train
SURROGATE = re.compile("[\ud800-\udfff]")  # what no file in UTF-8 holds: a byte of a name on disk that is not, half of a pair
NUMBER = re.compile(r"[-_]\d+$")  # and so is train-0.parquet
OWN = ("tokenizer.json", "rejected.csv", "prepare.json")  # what lies beside the splits in a data root
CELLS = 16  # parquet rows read at a time: with the audio of an hour each they still fit into memory


@dataclass(frozen=True)
class SourceOptions:
    source: str | None = option(None, "folder SRC/{split}/metadata.csv or .jsonl, folder of parquet files, or a hub dataset's id")
    split_map: tuple[str, ...] = option((), "read only these splits under these names, e.g. train.100=train test=dev")
    config: str | None = option(None, "configuration of a hub dataset, or the folder that holds the splits, e.g. clean")
    text_column: str | None = option(None, f"column of the text; the first of {', '.join(TEXT_COLUMNS)} if not given")
    audio_column: str | None = option(None, "column of the audio in parquet and hub data; the first of "
                                            f"{', '.join(AUDIO_COLUMNS)} if not given")


class Row(NamedTuple):
    name: str  # for rejected.csv
    audio: Any  # a path, the bytes of a file, or a function that returns (waveform (N,), rate)
    text: str
    speaker: str  # "" when not known
    reason: str = ""  # why it cannot be used, where its source can tell


class Split(NamedTuple):
    count: int  # rows
    speakers: bool  # whether its rows name their speakers
    texts: Callable[[], Iterable[str]]  # all transcripts, without touching audio
    rows: Callable[[], Iterable[Row]]


def open_source(options) -> tuple[dict[str, list[Split]], Callable[[], str]]:
    """The splits, and a function that says, once all rows have been read, which files of the source no row has named."""
    if options.demo:
        return demo_source(), str
    source = options.source
    if not os.path.exists(source):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            raise UserError(f"no folder {source}; give a folder with SRC/{{split}}/metadata.csv")
        return select_splits(hub_source(source, options), options), str
    folder = Folder(source)
    return select_splits(folder_source(folder, options), options), folder.left_out


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


def select_splits(splits: dict[str, list[Split]], options) -> dict[str, list[Split]]:
    """Renames splits: those of --split_map only, or all with the usual names. Several may join under one name, and a note says so."""
    wanted = dict(item.partition("=")[::2] for item in options.split_map)
    for old, new in wanted.items():
        if not new:
            raise UserError(f"--split_map {old}={new} is not OLD=NEW, a split and a folder's name")
        if old not in splits:
            raise UserError(f"{options.source} has no split {old}; it has {', '.join(splits)}")
    names = collections.defaultdict(list)
    for old in splits:
        if not wanted or old in wanted:
            names[wanted.get(old) or usual(old) or old].append(old)
    if left := [old for old in splits if wanted and old not in wanted]:
        print(f"note: {', '.join(left)} of {options.source}: left out, as --split_map says", flush=True)
    for new, old in names.items():
        if os.path.basename(new) != new or new.startswith(".") or new in OWN or SURROGATE.search(new):
            raise UserError(f"a split cannot be called {new!r}; name it with --split_map OLD=NEW")
        if old != [new] and not wanted:
            print(f"note: {', '.join(old)} of {options.source}: written as {new} (--split_map OLD=NEW says otherwise)", flush=True)
    return {new: [part for name in old for part in splits[name]] for new, old in names.items()}


def usual(name: str) -> str | None:
    """What a split of a usual name is called here."""
    return SPLIT_NAMES.get(name.lower()) or SPLIT_NAMES.get(NUMBER.sub("", name.lower()))


def choose_column(columns, wanted: str | None, names, place: str, flag: str = "--text_column") -> str:
    """The column `wanted`, or the first of the usual `names`. Raises UserError when there is none."""
    found = [c for c in ([wanted] if wanted else names) if c in columns]
    if not found:
        raise UserError(f"{place} has no column {wanted or ' or '.join(names)}; its columns are "
                        f"{', '.join(map(str, columns))}: name one with {flag}")
    return found[0]


def string(value) -> str:
    """A cell as text; speakers are often numbers, and nothing is an empty text. Raises UserError for bytes, lists and dicts."""
    if isinstance(value, (bytes, list, dict)):
        raise UserError(f"a {type(value).__name__} is neither text nor speaker; name the column of the text with --text_column")
    return "" if value is None else str(value)


# A folder: which file is whose


class Folder:
    """The files of a source folder, those hidden by a dot excepted, and which of them have been read or named by a row."""

    def __init__(self, source: str):
        self.source, self.path = source, os.path.abspath(source)
        self.files = list(walk(self.path, source))
        self.read = set()

    def find(self, folder: str, name: str) -> tuple[str, str]:
        """(path, why it cannot be used or "") of the file that a row calls `name`, seen from `folder`.

        A name may be composed otherwise than on disk (NFC, NFD): to a reader they are the same. Other case, other slashes and
        another folder may be another file: that one is named, not taken.
        """
        path = os.path.normpath(os.path.join(folder, name))
        if not name.strip():
            return path, "no file name"
        if reason := outside(self.source, path):
            return path, reason
        if not os.path.isfile(path):
            slashed = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
            near = sorted(self.alike[alike(os.path.basename(slashed))], key=lambda file: alike(file) != alike(slashed))
            same = [file for file in near if unicodedata.normalize("NFC", file) == unicodedata.normalize("NFC", path)]
            if near and len(same) != 1:
                return path, f"file missing; there is {os.path.relpath(near[0], folder)}"
            path = same[0] if same else path  # what is missing is the decoder's to tell
        self.read.add(path)
        return path, ""

    @functools.cached_property
    def alike(self) -> dict[str, list[str]]:
        """{a file's name as `alike` writes it: paths}"""
        names = collections.defaultdict(list)
        for file in self.files:
            names[alike(os.path.basename(file))].append(file)
        return names

    def left_out(self) -> str:
        """Names what is neither read nor named by a row, or "": a file of each kind and folder, how many more there are, and
        folders that are empty."""
        kinds = collections.defaultdict(list)
        for file in self.files:
            name = os.path.relpath(file, self.path)
            if file not in self.read and not os.path.basename(name).lower().startswith(("readme", "license")):
                top = name.split(os.sep)[0] if os.sep in name else ""
                kinds[top, os.path.splitext(name)[1]].append(name)
        tops = {os.path.relpath(file, self.path).split(os.sep)[0] for file in self.files}
        empty = [f"{entry.name}/ (empty)" for entry in sorted(os.scandir(self.path), key=lambda entry: entry.name)
                 if entry.is_dir() and entry.name not in tops and not entry.name.startswith(".")]
        return ", ".join([names[0] + (f" and {len(names) - 1} more {suffix or 'other'} files" + f" in {top}" * bool(top)
                                      if len(names) > 1 else "") for (top, suffix), names in kinds.items()] + empty)


def walk(folder: str, source: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """All files below, also behind links; one that leads back up is not followed."""
    real = os.path.realpath(folder)
    try:
        entries = [] if real in above else sorted((entry.name, entry.path, entry.is_dir()) for entry in os.scandir(folder))
    except OSError as error:
        what = "has neither SRC/{split}/metadata.csv nor parquet files: it is no folder" if folder == source else "cannot be read"
        raise UserError(f"{folder} {what} ({error.strerror}); give a folder that can be read") from None
    for name, path, is_folder in entries:
        if not name.startswith("."):
            yield from walk(path, source, (*above, real)) if is_folder else [path]


def alike(name: str) -> str:
    """The same for names that people take for the same: whatever their case, composition, or, for those that are not in UTF-8 on
    disk, with what Latin-1 makes of their bytes."""
    name = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xdc00), name)
    return unicodedata.normalize("NFC", name).casefold()


def outside(source: str, path: str) -> str:
    """Why `path` may not be read, or "": its name must not lead out of `source`; links that lie in there may, and do."""
    inside = os.path.abspath(path).startswith(os.path.join(os.path.abspath(source), ""))
    return "" if inside else f"lies outside {source}; move it there, or put a link to it there"


class Table(NamedTuple):
    config: str  # the folder that holds the splits, or a configuration of a hub copy's README
    split: str
    path: str
    records: list[dict] | None  # of metadata


def folder_source(folder: Folder, options) -> dict[str, list[Split]]:
    tables = choose_config(find_tables(folder), folder, options.config)
    folder.read.update(table.path for table in tables)
    if not tables:
        there = folder.left_out()
        raise UserError(f"{folder.source} has neither SRC/{{split}}/metadata.csv (or .jsonl) nor parquet files"
                        + f", only {there}" * bool(there) + "; lay the speech out as SRC/train/metadata.csv and "
                        "SRC/dev/metadata.csv with the columns file_name and text")
    splits = collections.defaultdict(list)
    for table in tables:
        if table.records is None and not table.path.lower().endswith(".parquet"):
            table = table._replace(records=read_metadata(table.path))
        splits[table.split].append(table)
    for name, parts in splits.items():
        kinds = {os.path.splitext(part.path)[1].lower(): part.path for part in parts}
        if len(kinds) > 1:
            raise UserError(f"{folder.source}: split {name} has {' and '.join(sorted(kinds.values()))}; take one of them away, or "
                            "move it to a folder of its own")
    return {name: [metadata_split(folder, name, parts, options)] if parts[0].records else
            [parquet_split(folder, name, part.path, options) for part in parts] for name, parts in splits.items()}


def find_tables(folder: Folder) -> list[Table]:
    """All metadata and parquet files, each with its split."""
    names = {}  # path: the folders, of parquet files also the name, one of which is the split
    for file in folder.files:
        *folders, name = os.path.relpath(file, folder.path).split(os.sep)
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".parquet":
            names[file] = folders if stem == "metadata" and folders else [*folders, SHARD.sub("", stem)]
        elif name.lower() in ("metadata.csv", "metadata.jsonl"):
            names[file] = folders
    said = readme_tables(folder)
    names = {file: parts for file, parts in names.items() if not said or not file.lower().endswith(".parquet")}
    known = {file: first_usual(parts, file) for file, parts in names.items()}
    above = {tuple(names[file][:place]) for file, place in known.items() if place is not None}
    tables = said
    for file, parts in names.items():
        if not parts:
            tables += top_tables(file)
            continue
        place = known[file]
        if place is None:  # beside splits of usual names it is one too, whatever it is called
            place = max((len(up) for up in above if len(up) < len(parts) and up == tuple(parts[:len(up)])), default=0)
        tables.append(Table("/".join(parts[:place]) or ".", parts[place], file, None))
    return tables


def first_usual(parts: list[str], file: str) -> int | None:
    """Where the first usual name of a split is. Raises UserError where another one follows."""
    places = [place for place, part in enumerate(parts) if usual(part)]
    if len({usual(parts[place]) for place in places}) > 1:
        raise UserError(f"{file}: it may belong to the split {' or '.join(parts[place] for place in places)}; rename the file or "
                        "its folder")
    return places[0] if places else None


def top_tables(path: str) -> list[Table]:
    """Metadata above the splits: a column `split`, or the folder in each file_name, says whose a row is."""
    records = read_metadata(path)
    if any("split" in record for record in records):
        names, where = [string(record.get("split")).strip() for record in records], "its column split"
    else:
        folders = [os.path.normpath((record.get("file_name") or "").replace("\\", "/")).split("/")[:-1] for record in records]
        depth = next((depth for depth in range(max(map(len, folders))) if any(usual(f) for f in itertools.chain(
            *(parts[depth:depth + 1] for parts in folders)))), None)
        if depth is None:
            raise UserError(f"{path} has neither a column split nor names that begin with a split's folder (train/a.wav): add one, "
                            f"or move it to {os.path.join(os.path.dirname(path), 'train')} with its files")
        names, where = [parts[depth] if len(parts) > depth else "" for parts in folders], "the folder in its file_name"
    if "" in names:
        raise UserError(f"{path}: row {names.index('') + 1} names no split, as others do by {where}; name it there")
    return [Table(".", name, path, [record for record, own in zip(records, names) if own == name])
            for name in dict.fromkeys(names)]


def readme_tables(folder: Folder) -> list[Table]:
    """The parquet files of a hub copy that its README gives to splits; [] where it does not."""
    try:
        with open(os.path.join(folder.path, "README.md"), encoding="utf-8") as file:
            card = yaml.safe_load(re.match(r"---\n(.*?\n)---", file.read(), re.DOTALL)[1])
        said = [(str(config["config_name"]), *part) for config in card["configs"] for part in data_files(config)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):  # none, or one that says nothing of it
        return []
    tables, files = [], set(folder.files)
    for config, split, pattern in said:
        path = os.path.normpath(os.path.join(folder.path, pattern))
        if "://" in pattern or outside(folder.source, path):
            raise UserError(f"{folder.source}/README.md: {pattern} of configuration {config} lies outside {folder.source}; move it "
                            "there, and say so in README.md")
        path = glob.escape(folder.path) + path[len(folder.path):]
        tables += [Table(config, split, file, None) for file in sorted(glob.glob(path, recursive=True))
                   if file in files and file.lower().endswith(".parquet")]
    return list(dict.fromkeys(tables))


def data_files(config: dict) -> Iterator[tuple[str, str]]:
    """(split, pattern of files) of a configuration in a README, in all the ways in which the hub lets one write it."""
    parts = config["data_files"]
    if isinstance(parts, dict):
        parts = [{"split": split, "path": paths} for split, paths in parts.items()]
    for part in [parts] if isinstance(parts, str) else parts:
        split, paths = (part["split"], part["path"]) if isinstance(part, dict) else ("train", part)
        for path in [paths] if isinstance(paths, str) else paths:
            yield str(split), os.path.join(config.get("data_dir") or "", path)


def choose_config(tables: list[Table], folder: Folder, wanted: str | None) -> list[Table]:
    """The tables of the configuration `wanted`; all where none is given and no split is in two of them."""
    configs = sorted({table.config for table in tables})
    if tables and wanted not in (None, *configs):
        raise UserError(f"{folder.source} has no configuration {wanted}; it has {', '.join(configs)}")
    first = {}
    for table in tables if wanted is None else ():
        if first.setdefault(table.split, table).config != table.config:
            raise UserError(f"{folder.source} has the split {table.split} more than once, as {first[table.split].path} and "
                            f"{table.path}; choose one with --config ({', '.join(configs)}), or give --source its folder")
    return [table for table in tables if wanted in (None, table.config)]


# Metadata


def read_metadata(path: str) -> list[dict]:
    """The rows of a metadata.csv or metadata.jsonl. Raises UserError when it cannot be read as one in UTF-8 with a column
    file_name, or has no rows."""
    try:
        with open(path, "rb") as file:
            content = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not in UTF-8: line {line} has the byte 0x{error.object[error.start]:02x}; save it in UTF-8 "
                        "(iconv -f LATIN1 -t UTF-8, if it is in Latin-1)") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    columns, records = (read_jsonl if path.lower().endswith("l") else read_csv)(path, content)
    if not records:
        raise UserError(f"{path} has no rows; fill it or take the folder away")
    twice = [column for column in columns if column and columns.count(column) > 1]
    if twice or "file_name" not in columns:
        divider = next((d for d in ";\t|" if len(columns) == 1 and "file_name" in columns[0].split(d)), None)
        raise UserError(f"{path} has {f'two columns {twice[0]}' if twice else 'no column file_name'}; its columns are "
                        f"{', '.join(columns)}" + (f": its fields are divided by {divider!r}; save it with commas" if divider else ""))
    return records


def read_csv(path: str, content: str) -> tuple[list[str], list[dict]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    records, line = [], 1
    try:  # `line` is where the next row begins
        columns, line = list(reader.fieldnames or ()), reader.line_num + 1
        for record in reader:
            if found := swallowed(record, os.path.dirname(path)):
                raise UserError(f"{path}: one field of the row in lines {line} to {reader.line_num} holds {found!r}, which looks like "
                                "a row of its own; a quotation mark is left open there, or put the text on one line")
            records.append(record)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file from line {line} on: {error}; is a quotation mark left open, or not doubled "
                        "within quotation marks?") from None
    return columns, records


def swallowed(record: dict, folder: str) -> str:
    """A line that a stray quotation mark has drawn into a field, or "".

    Texts may have line breaks. But a line that has a file's name between its commas is a row.
    """
    endings = EXTENSIONS | {ending(record.get("file_name") or "")} - {""}
    for field in itertools.chain(*(v if isinstance(v, list) else [v] for v in record.values())):
        for line in field.splitlines() if field and ("\n" in field or "\r" in field) else ():
            cells = [cell.strip().strip('"') for cell in line.split(",")]
            if any(os.path.isfile(os.path.join(folder, cell)) or len(cells) > 1 and ending(cell) in endings
                   for cell in cells if cell):
                return line
    return ""


def ending(name: str) -> str:
    return os.path.splitext(name)[1][1:].strip().lower()


def read_jsonl(path: str, content: str) -> tuple[list[str], list[dict]]:
    records = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            "".join(v for k, v in record.items() if k != "file_name" and isinstance(v, str)).encode()  # halves of surrogate pairs
            if "file_name" in record:
                record["file_name"] = string(record["file_name"])
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no JSON object in Unicode ({error}); write one a line, with file_name and "
                            "text") from None
        records.append(record)
    return list(dict.fromkeys(itertools.chain(*records))), records


def metadata_split(folder: Folder, name: str, tables: list[Table], options) -> Split:
    columns = []  # of each table, its columns of text and speaker
    for table in tables:
        there = list(dict.fromkeys(c for c in itertools.chain(*table.records) if c))
        columns.append((choose_column(there, options.text_column, TEXT_COLUMNS, table.path),
                        next((c for c in SPEAKER_COLUMNS if c in there), None)))
    parts = list(zip(tables, columns))
    texts = functools.partial(lambda parts: (string(r.get(text)) for table, (text, _) in parts for r in table.records), parts)
    return Split(sum(len(table.records) for table in tables), any(speaker for _, speaker in columns), texts,
                 functools.partial(used_once, functools.partial(metadata_rows, folder, parts)))


def metadata_rows(folder: Folder, parts) -> Iterator[Row]:
    for table, (text, speaker) in parts:
        place = os.path.dirname(table.path)
        for record in table.records:
            name = record.get("file_name") or ""
            path, reason = folder.find(place, name)
            if None in record:  # where DictReader puts what has no column
                reason = "more fields than columns; put a text with commas between quotation marks"
            yield Row(name, path, string(record.get(text)), string(speaker and record.get(speaker)), reason)


def used_once(make_rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """A file that several rows name is used once; where their texts differ none can be trusted, and it is not used."""
    rows = list(make_rows())
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


# Tables of Arrow: parquet files and what the hub sends. datasets' own decoding is left out: the audio stays as it is stored.


def parquet_split(folder: Folder, name: str, path: str, options) -> Split:
    try:
        with open(path, "rb") as file:  # pyarrow itself opens no path that is not in UTF-8
            file = pyarrow.parquet.ParquetFile(file)
            schema, count = file.schema_arrow, file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot load {path}: {error}; get the file anew (git lfs pull, if it is a pointer)") from None

    def batches(columns):
        with open(path, "rb") as file:  # neither a row group nor a column of one is read at once
            file = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
            yield from file.iter_batches(batch_size=CELLS, columns=columns)

    def find(name):
        near, far = folder.find(os.path.dirname(path), name), folder.find(folder.path, name)
        return far if near[1] and not far[1] else near

    return arrow_split(schema, count, batches, find, path, f"split {name} of {folder.source}", options)


def hub_source(source: str, options) -> dict[str, list[Split]]:
    try:
        loaded = datasets.load_dataset(source, options.config)
    except Exception as error:  # datasets raises many kinds, some of them bare
        raise UserError(f"cannot load {source}: {error}; give a folder with SRC/{{split}}/metadata.csv, a folder of "
                        "parquet files or the id of a hub dataset") from None
    splits = {}
    for name, data in loaded.items():
        place = f"split {name} of {source}"
        batches = functools.partial(lambda data, columns: data.select_columns(columns).with_format("arrow").iter(CELLS), data)
        splits[name] = [arrow_split(data.features.arrow_schema, len(data), batches, lambda name: (name, ""), place, place, options)]
    return splits


def arrow_split(schema: pa.Schema, count: int, batches, find, path: str, place: str, options) -> Split:
    """batches: columns -> their rows, some at a time. find: the name of a file -> (path, why it cannot be used or "")."""
    text = choose_column(schema.names, options.text_column, TEXT_COLUMNS, path)
    audio = choose_column(schema.names, options.audio_column, AUDIO_COLUMNS, path, flag="--audio_column")
    speaker = next((c for c in SPEAKER_COLUMNS if c in schema.names), None)
    check_audio_type(schema.field(audio).type, audio, path)

    def read(*columns):
        try:
            for batch in batches(list(columns)):
                yield from zip(*(batch[column] for column in columns))
        except Exception as error:  # pyarrow's, fsspec's and datasets' own have no common base
            raise UserError(f"cannot read {place} to its end: {error}; get {path} anew") from None

    def rows():
        for i, (sound, *cells) in enumerate(read(*filter(None, (audio, text, speaker)))):
            content, name, reason = sound_of(sound)
            if content is None and name and not reason:
                content, reason = find(name)
            yield Row(name or f"row {i}", content, *[words(cell) for cell in cells], *[""] * (not speaker), reason)

    def words(cell):
        try:
            return string(cell.as_py())
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not in UTF-8: {error.object!r}; write it anew") from None

    return Split(count, speaker is not None, lambda: (words(cell) for cell, in read(text)), rows)


def check_audio_type(kind: pa.DataType, column: str, path: str) -> None:
    """Raises UserError where a column holds no audio that can be read."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
    if not any(test(kind) for test in tests) and not fields & {"bytes", "path"} and not fields >= {"array", "sampling_rate"}:
        raise UserError(f"{path}: column {column} is {kind}; audio is the bytes of a file, its path, a struct of bytes and path, or "
                        "one of array and sampling_rate: name its column with --audio_column")


def sound_of(cell: pa.Scalar) -> tuple[bytes | None, str, str]:
    """(bytes of an audio file or None, name of a file or "", why there is no sound or "") of a cell."""
    if isinstance(cell, pa.StructScalar) and cell.is_valid:
        fields = {name: cell[name] for name in ("bytes", "path", "array", "sampling_rate") if name in cell}
        array, rate = fields.pop("array", None), fields.pop("sampling_rate", None)
        values = {name: raw(field) for name, field in fields.items()}
        content, name = values.get("bytes"), os.fsdecode(values.get("path") or "")
        if content is not None or array is None or not array.is_valid:
            return content, name, ""
        try:  # as the file that it could have been: so it meets the same checks
            file = io.BytesIO()
            soundfile.write(file, array.values.to_numpy(zero_copy_only=False).astype("float32"), rate.as_py(), "FLOAT", format="WAV")
            return file.getvalue(), name, ""
        except Exception as error:  # of NumPy, Arrow and soundfile
            return None, name, f"cannot be decoded: its array is no waveform with a rate ({error})"
    is_name = isinstance(cell.value if isinstance(cell, pa.DictionaryScalar) else cell, pa.StringScalar)
    return (None, os.fsdecode(raw(cell) or ""), "") if is_name else (raw(cell), "", "")


def raw(cell: pa.Scalar) -> bytes | None:
    """The bytes of a string, which need not be in UTF-8 where it is the name of a file, or of a binary cell."""
    cell = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
    buffer = cell.as_buffer() if cell.is_valid and hasattr(cell, "as_buffer") else None
    return buffer and buffer.to_pybytes()
