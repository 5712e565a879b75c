"""Where speech and transcripts come from: a folder, or a dataset on the hub.

A source gives {split: [Split, ...]}. In a folder every metadata.csv, metadata.jsonl and parquet
file is read; which split it is of is decided here, by names alone. What is joined under one name
and what is left out is named.
"""

import codecs
import collections
import csv
import fnmatch
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cli import UserError, option, options_class, shown

import datasets
import pyarrow as pa
import pyarrow.parquet
import soundfile

import tokenizer as tk
from audio import EXTENSIONS
from files import parse_yaml, read_small, read_text, why

# The splits of openslr/librispeech_asr (configs all, clean, other), the hub's usual ones and ours.
SPLIT_NAMES = {
    "train.clean.100": "train",
    "train.clean.360": "train",
    "train.other.500": "train",
    "train.100": "train",
    "train.360": "train",
    "train.500": "train",
    "train": "train",
    "validation.clean": "dev",
    "validation.other": "dev_other",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "dev": "dev",
    "dev_other": "dev_other",
    "test.clean": "eval_clean",
    "test.other": "eval_other",
    "test": "eval_clean",
    "eval_clean": "eval_clean",
    "eval_other": "eval_other",
}
SHARD = re.compile(r"-\d+-of-(\d+)(-[0-9a-f]+)?$")  # train-00000-of-00002.parquet is of train
NUMBER = re.compile(r"[-_]\d+$")  # and so is train-0.parquet
TEXT_COLUMNS = ("transcription", "text", "transcript", "sentence")
AUDIO_COLUMNS = ("audio", "file_name", "path", "file")
SPEAKER_COLUMNS = ("speaker", "speaker_id")
OWN = ("tokenizer.json", "rejected.csv", "prepare.json")  # beside the splits in a data root
# What no file in UTF-8 holds: half of a pair, or a byte of a name that is not in UTF-8 on disk.
SURROGATE = re.compile("[\ud800-\udfff]")
BATCH = 16  # texts of a parquet file read at a time; of rows with audio one, which fits into memory
# Bytes that a column of a row group may take in memory; more must not come from a hundredth of it.
UNPACKED, PACKED = 2**26, 100
METADATA = 2**30  # bytes of a metadata.csv: some millions of rows
MOST_LINKS = 100  # to one folder: links to links could make as many paths as atoms
DEEPEST = 100  # folders in folders


@options_class
class SourceOptions:
    source: str | None = option(
        None,
        "folder of SRC/{split}/metadata.csv or .jsonl, folder of parquet files, or a hub "
        "dataset's id",
    )
    split_map: tuple[str, ...] = option(
        (), "read only these splits under these names, e.g. train.100=train test=dev"
    )
    config: str | None = option(
        None, "configuration of a hub dataset, or folder of the splits, e.g. clean"
    )
    text_column: str | None = option(
        None, f"column of the text; the first of {', '.join(TEXT_COLUMNS)} if not given"
    )
    audio_column: str | None = option(
        None,
        "column of the audio in parquet and hub data; the first of "
        f"{', '.join(AUDIO_COLUMNS)} if not given",
    )


class Row(NamedTuple):
    name: str  # for rejected.csv
    audio: str | bytes | None  # a path, or the bytes of a file
    text: str
    speaker: str  # "" when not known
    reason: str = ""  # why it cannot be used, where its source can tell


class Split(NamedTuple):
    count: int  # rows
    speakers: bool  # whether its rows name their speakers
    texts: Callable[[], Iterable[str]]  # all transcripts, without touching audio
    rows: Callable[[], Iterable[Row]]


def open_source(options) -> tuple[dict[str, list[Split]], Callable[[], str]]:
    """The splits, and a function that names, once all rows are read, the files left out."""
    source = options.source
    if not os.path.exists(source):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
            raise UserError(f"no folder {source}; give a folder with SRC/{{split}}/metadata.csv")
        return select_splits(hub_source(source, options), options), str
    folder = Folder(source)
    return select_splits(folder_source(folder, options), options), folder.left_out


def select_splits(splits: dict[str, Callable[[], list[Split]]], options) -> dict[str, list[Split]]:
    """Renames splits: those of --split_map only, or all with the usual names. Several may join
    under one name. A note says what --split_map does not: what is renamed, joined or left out.
    What is left out is not opened: it may be damaged, or have no text."""
    wanted = dict(item.partition("=")[::2] for item in options.split_map)
    if len(wanted) < len(options.split_map):
        raise UserError(f"--split_map {' '.join(options.split_map)} names a split twice")
    for old, new in wanted.items():
        if not new:
            raise UserError(f"--split_map {old}={new} is not OLD=NEW, a split and a folder's name")
        if old not in splits:
            raise UserError(f"{options.source} has no split {old}; it has {', '.join(splits)}")
    names, notes = collections.defaultdict(list), {}
    for old in [old for old in splits if not wanted or old in wanted]:
        names[wanted.get(old) or usual(old) or old].append(old)
    for new, old in names.items():
        hidden = not new or new[0] == "."
        if hidden or os.path.basename(new) != new or new in OWN or SURROGATE.search(new):
            raise UserError(f"a split cannot be called {new!r}; name it with --split_map OLD=NEW")
        if old != [new] and not wanted:
            notes[f"written as {new}; --split_map OLD=NEW says otherwise"] = old
    notes["left out by --split_map"] = [old for old in splits if wanted and old not in wanted]
    for note, old in notes.items():
        if old:
            print(shown(f"note: {', '.join(old)} of {options.source}: {note}"), flush=True)
    return {new: [part for name in old for part in splits[name]()] for new, old in names.items()}


def usual(name: str) -> str | None:
    """What a split of a usual name is called here."""
    return SPLIT_NAMES.get(name.lower()) or SPLIT_NAMES.get(NUMBER.sub("", name.lower()))


def choose_column(
    columns, wanted: str | None, names, place: str, flag: str = "--text_column"
) -> str:
    """The column `wanted`, or the first of the usual `names`; UserError when there is none."""
    found = [c for c in ([wanted] if wanted else names) if c in columns]
    if not found:
        raise UserError(
            f"{place} has no column {wanted or ' or '.join(names)}; its columns are "
            f"{', '.join(map(str, columns))}: name one with {flag}, or leave the split "
            "out by --split_map, which names the others"
        )
    return found[0]


def string(value, place: str) -> str:
    """A cell as text; speakers are often numbers, and nothing is an empty text. Raises UserError
    for bytes, lists and dicts."""
    if isinstance(value, (bytes, list, dict)):
        raise UserError(
            f"{place}: a {type(value).__name__} is neither text nor speaker; name the "
            "column of the text with --text_column"
        )
    return "" if value is None else str(value)


# A folder: which file is whose


class Folder:
    """The files of a source, those hidden by a dot excepted; which were read or named by a row."""

    def __init__(self, source: str):
        self.source, self.path = source, os.path.abspath(source)
        if not os.path.isdir(source):
            raise UserError(
                f"{source} has neither SRC/{{split}}/metadata.csv nor parquet files: "
                "it is a file; give a folder"
            )
        self.files = list(walk(self.path))
        self.read = set()

    def find(self, folder: str, name: str) -> tuple[str, str]:
        """(path, why it cannot be used or "") of the file that a row calls `name`, seen from
        `folder`.

        A name may be composed otherwise than on disk (NFC, NFD): to a reader they are the same.
        Other case, other slashes or another folder may mean another file: that one is named, not
        taken.
        """
        path = os.path.normpath(os.path.join(folder, name))
        if not name.strip():
            return path, "no file name"
        if reason := outside(self.source, path):
            return path, reason
        if not os.path.isfile(path):
            slashed = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
            near = sorted(
                self.by_name[alike(os.path.basename(slashed))],
                key=lambda file: alike(file) != alike(slashed),
            )
            same = [file for file in near if tk.nfc(file) == tk.nfc(path)]
            if near and len(same) != 1:
                return path, f"file missing; there is {os.path.relpath(near[0], folder)}"
            path = same[0] if same else path  # what is missing is the decoder's to tell
        self.read.add(path)
        return path, ""

    @functools.cached_property
    def by_name(self) -> dict[str, list[str]]:
        names = collections.defaultdict(list)
        for file in self.files:
            names[alike(os.path.basename(file))].append(file)
        return names

    def left_out(self) -> str:
        """What was neither read nor named: of each folder at the top and each ending a file and how
        many more there are, and empty folders."""
        kinds, tops = collections.defaultdict(list), set()
        for file in self.files:
            name = os.path.relpath(file, self.path)
            top = name.partition(os.sep)[0] if os.sep in name else ""
            tops.add(top)
            manual = os.path.basename(name).lower().startswith(("readme", "license"))
            if file not in self.read and not manual:
                kinds[top, os.path.splitext(name)[1]].append(name)
        said = [
            names[0]
            + f" and {len(names) - 1} more {ending or 'other'} files in {top or 'it'}"
            * (len(names) > 1)
            for (top, ending), names in kinds.items()
        ]
        folders = sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
        return ", ".join(
            said
            + [
                f"{name}/ (empty)"
                for name in folders
                if name not in tops and not name.startswith(".")
            ]
        )


def walk(
    folder: str, above: tuple[str, ...] = (), seen: collections.Counter | None = None
) -> Iterator[str]:
    """All files below, also behind links; one that leads back up is not followed. Raises UserError
    where more than MOST_LINKS lead to a folder, and below DEEPEST."""
    real, seen = os.path.realpath(folder), collections.Counter() if seen is None else seen
    if real in above:
        return
    seen[real] += 1
    if seen[real] > MOST_LINKS:
        raise UserError(
            f"{folder}: more than {MOST_LINKS} ways lead there, by links; take some out"
        )
    if len(above) > DEEPEST:
        raise UserError(f"{folder}: it lies below {DEEPEST} folders; take it out")
    try:
        entries = sorted((entry.name, entry.path, entry.is_dir()) for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); change that, or take it out"
        ) from None
    for name, path, is_folder in entries:
        if not name.startswith("."):
            yield from walk(path, (*above, real), seen) if is_folder else [path]


def alike(name: str) -> str:
    """The same for names that are easily taken for each other: in another case, in another Unicode
    form, with a space at an end, or with what Latin-1 makes of the bytes of one that is not in
    UTF-8 on disk."""
    name = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xDC00), name)
    return tk.nfc(name).casefold().strip()


def outside(source: str, path: str) -> str:
    """Why `path` may not be read, or "": its name must not lead out of `source`; links that lie in
    there may, and do."""
    inside = os.path.abspath(path).startswith(os.path.join(os.path.abspath(source), ""))
    return "" if inside else f"lies outside {source}; move it there, or put a link to it there"


class Table(NamedTuple):
    config: str  # the folder that holds the splits, or a configuration of a hub copy's README
    split: str
    path: str
    records: list[dict] | None = None  # of metadata above the splits: it was read to know them


def is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def folder_source(folder: Folder, options) -> dict[str, Callable[[], list[Split]]]:
    tables = choose_config(find_tables(folder), folder.source, options.config)
    folder.read.update(table.path for table in tables)
    if not tables:
        there = folder.left_out()
        raise UserError(
            f"{folder.source} has neither SRC/{{split}}/metadata.csv (or .jsonl) nor "
            f"parquet files{there and f', only {there}'}; lay the speech out as "
            "SRC/train/metadata.csv and SRC/dev/metadata.csv with the columns "
            "file_name and text"
        )
    splits, shards = collections.defaultdict(list), collections.Counter()
    for table in tables:
        splits[table.split].append(table)
        stem = os.path.splitext(table.path)[0]
        if found := SHARD.search(stem):
            shards[stem[: found.start()], found[1]] += 1
    for (stem, total), count in shards.items():
        if count < int(total):
            print(
                shown(
                    f"note: of {stem}-*-of-{total} only {count} are there; get the others, or "
                    "go on without them"
                ),
                flush=True,
            )
    return {
        name: functools.partial(open_tables, folder, name, parts, options)
        for name, parts in splits.items()
    }


def open_tables(folder: Folder, name: str, tables: list[Table], options) -> list[Split]:
    """What the split `name` is made of."""
    kinds = {os.path.splitext(table.path)[1].lower(): table.path for table in tables}
    if len(kinds) > 1:
        raise UserError(
            f"{folder.source}: split {name} has "
            f"{' and '.join(sorted(kinds.values()))}; take one of them away, or move "
            "it to a folder of its own"
        )
    if is_parquet(tables[0].path):
        return [parquet_split(folder, name, table.path, options) for table in tables]
    return [metadata_split(folder, tables, options)]


def find_tables(folder: Folder) -> list[Table]:
    """All metadata and parquet files, each with its split.

    The split is the first usual name among a file's folders and, of parquet files, in its own name.
    Where none is usual, metadata may say it itself; else it is the one beside usual ones, or the
    first.
    """
    tables = readme_tables(folder)
    paths = {}  # file: those names
    for file in folder.files:
        *folders, name = os.path.relpath(file, folder.path).split(os.sep)
        if is_parquet(name) and not tables:
            stem = SHARD.sub("", os.path.splitext(name)[0])
            paths[file] = folders if stem == "metadata" and folders else [*folders, stem]
        elif name.lower() in ("metadata.csv", "metadata.jsonl"):
            paths[file] = folders
    known = {file: first_usual(names, file) for file, names in paths.items()}
    above = {tuple(paths[file][:place]) for file, place in known.items() if place is not None}
    for file, names in paths.items():
        place, records = known[file], None
        if place is None and not is_parquet(file):
            records = read_metadata(file)
            if found := top_tables("/".join(names), file, records):
                tables += found
                continue
        if place is None:
            place = max(
                (place for place in range(len(names)) if tuple(names[:place]) in above), default=0
            )
        tables.append(Table("/".join(names[:place]) or ".", names[place], file, records))
    return tables


def first_usual(names: list[str], file: str) -> int | None:
    """Where the first usual name of a split is; UserError where that of another one follows."""
    places = [place for place, name in enumerate(names) if usual(name)]
    if len({usual(names[place]) for place in places}) > 1:
        raise UserError(
            f"{file}: it may belong to the split "
            f"{' or '.join(names[place] for place in places)}; rename the file or its "
            "folder"
        )
    return places[0] if places else None


def top_tables(folder: str, path: str, records: list[dict]) -> list[Table]:
    """Metadata above the splits: a column `split`, or the folder in each file_name, says whose a
    row is. Those of a folder below the source need not: then [], and its name is the split's."""
    if any("split" in record for record in records):
        names = [string(record.get("split"), path).strip() for record in records]
        where = "column split"
    else:
        files = [(record.get("file_name") or "").replace("\\", "/") for record in records]
        folders = [os.path.normpath(file).split("/")[:-1] for file in files]
        levels = [
            [folder[level] if level < len(folder) else "" for folder in folders]
            for level in range(max(map(len, folders)))
        ]
        names = next((level for level in levels if any(map(usual, level))), None)
        where = "folder in file_name"
    if names is None and folder:
        return []
    if names is None:
        raise UserError(
            f"{path} has neither a column split nor names that begin with a split's "
            "folder (train/a.wav); add one, or move it with its files to "
            f"{os.path.join(os.path.dirname(path), 'train')}"
        )
    if "" in names:
        raise UserError(
            f"{path}: row {names.index('') + 1} names no split by its "
            f"{where}, as others do; name it there"
        )
    rows = collections.defaultdict(list)
    for record, name in zip(records, names):
        rows[name].append(record)
    return [Table(folder or ".", name, path, own) for name, own in rows.items()]


def readme_tables(folder: Folder) -> list[Table]:
    """The parquet files of a hub copy that its README gives to splits; [] where it does not."""
    try:
        text = read_text(os.path.join(folder.path, "README.md"), 2**20)
        card = parse_yaml(re.match(r"---\n(.*?\n)---", text, re.DOTALL)[1])
        said = [
            (str(config["config_name"]), *part)
            for config in card["configs"]
            for part in data_files(config)
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # no README, or one that says nothing of files
    tables, absent = [], []
    for config, split, pattern in said:
        path = os.path.normpath(os.path.join(folder.path, pattern))
        if "://" in pattern or outside(folder.source, path):
            raise UserError(
                f"{folder.source}/README.md: {pattern} of configuration {config} lies "
                f"outside {folder.source}; move it there, and say so in README.md"
            )
        steps = tuple(os.path.relpath(path, folder.path).split(os.sep))
        found = [
            file
            for file in folder.files
            if len(steps) < DEEPEST
            and follows(tuple(os.path.relpath(file, folder.path).split(os.sep)), steps)
        ]
        tables += [Table(config, split, file) for file in found if is_parquet(file)]
        absent += [] if found else [f"{pattern} (split {split})"]
    if tables and absent:
        print(
            shown(
                f"note: {folder.source}/README.md names {', '.join(absent)}, of which nothing "
                "is there; get it, or go on without it"
            ),
            flush=True,
        )
    return list(dict.fromkeys(tables))


@functools.lru_cache(2**16)  # else ** after ** would take for ever
def follows(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the names of folders and of a file follow a pattern of them, in which ** is any
    number. glob itself would follow links in circles."""
    if not pattern or not names:
        return not names and all(step == "**" for step in pattern)
    if pattern[0] == "**":
        return follows(names, pattern[1:]) or follows(names[1:], pattern)
    return fnmatch.fnmatchcase(names[0], pattern[0]) and follows(names[1:], pattern[1:])


def data_files(config: dict) -> Iterator[tuple[str, str]]:
    """(split, pattern of files) of a configuration, in all the ways of writing it."""
    parts = config["data_files"]
    if isinstance(parts, dict):
        parts = [{"split": split, "path": paths} for split, paths in parts.items()]
    for part in [parts] if isinstance(parts, str) else parts:
        split, paths = (part["split"], part["path"]) if isinstance(part, dict) else ("train", part)
        for path in [paths] if isinstance(paths, str) else paths:
            yield str(split), os.path.join(config.get("data_dir") or "", path)


def choose_config(tables: list[Table], source: str, wanted: str | None) -> list[Table]:
    """The tables of the configuration `wanted`; without one all, if no split is in two of them."""
    configs = sorted({table.config for table in tables})
    if tables and wanted not in (None, *configs):
        raise UserError(f"{source} has no configuration {wanted}; it has {', '.join(configs)}")
    first = {}
    for table in tables if wanted is None else ():
        if first.setdefault(table.split, table).config != table.config:
            raise UserError(
                f"{source} has the split {table.split} more than once, as "
                f"{first[table.split].path} and {table.path}; choose one with --config "
                f"({', '.join(configs)}), or give --source its folder"
            )
    return [table for table in tables if wanted in (None, table.config)]


# Metadata


def read_metadata(path: str) -> list[dict]:
    """The rows of a metadata.csv or metadata.jsonl. Raises UserError when it is none in UTF-8 with
    a column file_name, or has no rows."""
    try:
        content = read_small(path, METADATA).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        other = "UTF-16" if error.object.startswith(marks) else "LATIN1"
        raise UserError(
            f"{path} is not in UTF-8: line {line} has the byte "
            f"0x{error.object[error.start]:02x}; save it in UTF-8 (iconv -f {other} "
            f"-t UTF-8, if it is in {other})"
        ) from None
    except (OSError, ValueError) as error:
        reason = why(error)
        raise UserError(f"cannot read {path}: {reason}; get it anew, or take it out") from None
    columns, records = (read_jsonl if path.lower().endswith(".jsonl") else read_csv)(path, content)
    if not records:
        raise UserError(f"{path} has no rows; fill it or take the folder away")
    twice = [column for column in columns if column and columns.count(column) > 1]
    if twice or "file_name" not in columns:
        what = f"two columns {twice[0]}" if twice else "no column file_name"
        divider = next((d for d in ";\t|" if len(columns) == 1 and d in columns[0]), None)
        hint = f": they seem to be divided by {divider!r}; save it with commas" if divider else ""
        raise UserError(f"{path} has {what}; its columns are {', '.join(columns)}{hint}")
    return records


def read_csv(path: str, content: str) -> tuple[list[str], list[dict]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    records, line = [], 1
    try:  # `line` is where the next row begins
        while reader.fieldnames == []:  # a blank line
            reader.fieldnames = None
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for record in itertools.chain([{None: columns}], reader):  # the header may have some, too
            if found := swallowed(record, os.path.dirname(path)):
                raise UserError(
                    f"{path}: one field of the row in lines {line} to "
                    f"{reader.line_num} holds {found!r}, which looks like a row of its "
                    "own; close the quotation mark that is left open there, or put "
                    "the text on one line"
                )
            records.append(record)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path} is no CSV file from line {line} on: {error}; is a quotation mark "
            "left open, or not doubled within quotation marks?"
        ) from None
    return columns, records[1:]


def swallowed(record: dict, folder: str) -> str:
    """A line that a stray quotation mark has drawn into a field, or "".

    Texts may have line breaks. But a line that has the name of a file between its commas is a row,
    what has more fields than columns and two such names is two rows, and no header has two lines.
    """
    endings = EXTENSIONS | {ending(record.get("file_name") or "")} - {""}
    fields = [*record.get(None, []), *(v for v in record.values() if isinstance(v, str))]
    cells = {
        line: [cell.strip().strip('"') for cell in line.split(",")]
        for field in fields
        for line in field.splitlines()
    }
    named = sum(ending(cell) in endings for parts in cells.values() for cell in parts)
    fused = None in record and (named > 1 or "file_name" not in record)
    for field in fields:
        lines = field.splitlines()
        for line in lines if len(lines) > 1 else ():
            if line.strip() and (
                fused
                or any(
                    os.path.isfile(os.path.join(folder, cell))
                    or len(cells[line]) > 1
                    and ending(cell) in endings
                    for cell in cells[line]
                    if cell
                )
            ):
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
            if "file_name" in record:
                record["file_name"] = string(record["file_name"], f"{path}: line {number}")
            for name, value in record.items():
                if name != "file_name" and isinstance(value, str):
                    value.encode()  # raises where JSON has escaped half of a surrogate pair
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is no JSON object in Unicode ({error}); write "
                "one a line, with file_name and text"
            ) from None
        records.append(record)
    return list(dict.fromkeys(itertools.chain(*records))), records


def metadata_split(folder: Folder, tables: list[Table], options) -> Split:
    parts = []  # of each table
    for table in tables:
        records = table.records or read_metadata(table.path)
        columns = [column for column in dict.fromkeys(itertools.chain(*records)) if column]
        text = choose_column(columns, options.text_column, TEXT_COLUMNS, table.path)
        speaker = next((column for column in SPEAKER_COLUMNS if column in columns), None)
        parts.append((table.path, records, text, speaker))

    def texts():
        return (
            string(record.get(text), path) for path, records, text, _ in parts for record in records
        )

    def rows():
        return used_once([row for part in parts for row in metadata_rows(folder, *part)])

    return Split(
        sum(len(records) for _, records, _, _ in parts),
        any(part[-1] for part in parts),
        texts,
        rows,
    )


def metadata_rows(
    folder: Folder, table: str, records: list[dict], text: str, speaker: str | None
) -> Iterator[Row]:
    for record in records:
        name = record.get("file_name") or ""
        path, reason = folder.find(os.path.dirname(table), name)
        if None in record:  # where DictReader puts what has no column
            reason = "more fields than columns; put a text with commas between quotation marks"
        yield Row(
            name,
            path,
            string(record.get(text), table),
            string(speaker and record.get(speaker), table),
            reason,
        )


def used_once(rows: list[Row]) -> Iterator[Row]:
    """A file that several rows name is used once; where their texts differ none can be trusted, and
    it is not used."""
    texts, seen = collections.defaultdict(set), set()
    for row in rows:
        if not row.reason and row.text.strip():
            texts[row.audio].add(tk.normalize_text(row.text))
    for row in rows:
        if not row.reason and len(texts[row.audio]) > 1:
            row = row._replace(reason="several rows with different texts name this file")
        elif not row.reason and row.text.strip():
            again = "an earlier row with the same text names this file"
            row = row._replace(reason=again if row.audio in seen else "")
            seen.add(row.audio)
        yield row


# Arrow's tables: parquet files and what the hub sends. The audio stays as it is stored: datasets'
# own decoder is left out.


def parquet_split(folder: Folder, name: str, path: str, options) -> Split:
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("it is no file")
        with open(path, "rb") as file:  # pyarrow itself opens no path that is not in UTF-8
            parquet = pyarrow.parquet.ParquetFile(file)
            schema, count = parquet.schema_arrow, parquet.metadata.num_rows
            check_unpacked(parquet, os.path.getsize(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"cannot load {path}: {error}; get the file anew (git lfs pull, if it is a pointer)"
        ) from None

    def batches(columns):
        with open(path, "rb") as file:  # page by page: a row group need not fit into memory
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
            size = 1 if len(columns) > 1 else BATCH
            yield from parquet.iter_batches(batch_size=size, columns=columns)

    def find(name):
        near, reason = folder.find(os.path.dirname(path), name)
        if not reason and os.path.isfile(near):
            return near, ""
        far, wrong = folder.find(folder.path, name)
        return (far, "") if not wrong and os.path.isfile(far) else (near, reason)

    return arrow_split(
        schema, count, batches, find, path, f"split {name} of {folder.source}", options
    )


def check_unpacked(parquet: pyarrow.parquet.ParquetFile, size: int) -> None:
    """Raises ValueError where a column of a row group, of a file of `size` bytes, takes far more
    memory than its bytes: compressed audio is no smaller, and speech not by so much. Raises OSError
    where the footer is damaged."""
    metadata = parquet.metadata
    for number in range(metadata.num_row_groups):
        group, columns = metadata.row_group(number), range(metadata.num_columns)
        # Batches of no rows read no page, but what the footer says of the columns, and raise where
        # group.column would end the process.
        list(parquet.reader.iter_batches(0, row_groups=[number], column_indices=list(columns)))
        for column in map(group.column, columns):
            unpacked = max(column.total_uncompressed_size, 4 * column.num_values)
            if unpacked > max(UNPACKED, PACKED * min(column.total_compressed_size, size)):
                raise ValueError(
                    f"{column.total_compressed_size} bytes of its column "
                    f"{column.path_in_schema} promise {unpacked}"
                )


def hub_source(source: str, options) -> dict[str, Callable[[], list[Split]]]:
    try:
        loaded = datasets.load_dataset(source, options.config)
    except Exception as error:  # datasets raises many kinds, some of them bare
        raise UserError(
            f"cannot load {source}: {str(error).rstrip('.')}; give a folder with "
            "SRC/{split}/metadata.csv, a folder of parquet files or the id of a hub "
            "dataset"
        ) from None

    def batches(data, columns):
        return data.select_columns(columns).with_format("arrow").iter(BATCH)

    def open_split(name):
        data = loaded[name]
        return [
            arrow_split(
                data.features.arrow_schema,
                len(data),
                functools.partial(batches, data),
                lambda path: (path, ""),
                source,
                f"split {name} of {source}",
                options,
            )
        ]

    return {name: functools.partial(open_split, name) for name in loaded}


def arrow_split(
    schema: pa.Schema, count: int, batches, find, path: str, place: str, options
) -> Split:
    """batches(columns): some rows at a time. find(name): a path, why it cannot be used or ""."""
    text = choose_column(schema.names, options.text_column, TEXT_COLUMNS, path)
    audio = choose_column(schema.names, options.audio_column, AUDIO_COLUMNS, path, "--audio_column")
    speaker = next((column for column in SPEAKER_COLUMNS if column in schema.names), None)
    check_audio_type(schema.field(audio).type, audio, path)

    def read(*columns):
        try:
            for batch in batches(list(columns)):
                yield from zip(*(batch[column] for column in columns))
        except Exception as error:  # pyarrow's, fsspec's and datasets' own have no common base
            raise UserError(f"cannot read {place} to its end: {error}; get {path} anew") from None

    def words(cell):
        try:
            return string(cell.as_py(), path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not in UTF-8: {error.object!r}; write it anew") from None

    def rows():
        for i, (sound, said, *who) in enumerate(read(*filter(None, (audio, text, speaker)))):
            content, name, reason = sound_of(sound)
            if content is None and name and not reason:
                content, reason = find(name)
            yield Row(
                name or f"row {i}", content, words(said), words(who[0]) if who else "", reason
            )

    return Split(count, speaker is not None, lambda: (words(cell) for (cell,) in read(text)), rows)


def check_audio_type(kind: pa.DataType, column: str, path: str) -> None:
    """Raises UserError where a column holds no audio that can be read."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_null,
    )
    if not (
        any(test(kind) for test in tests)
        or fields & {"bytes", "path"}
        or fields >= {"array", "sampling_rate"}
    ):
        raise UserError(
            f"{path}: column {column} is {kind}; audio is the bytes of a file, its "
            "path, a struct of bytes and path, or one of array and sampling_rate: "
            "name its column with --audio_column"
        )


def sound_of(cell: pa.Scalar) -> tuple[bytes | None, str, str]:
    """(bytes of an audio file or None, name of a file or "", why there is no sound or "")"""
    cell = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
    if isinstance(cell, pa.StringScalar):
        return None, name_of(cell), ""
    if not isinstance(cell, pa.StructScalar) or not cell.is_valid:
        return cell.as_py(), "", ""
    content = cell["bytes"].as_py() if "bytes" in cell else None
    name = name_of(cell["path"]) if "path" in cell else ""
    if isinstance(content, bytes) or "array" not in cell or not cell["array"].is_valid:
        return content if isinstance(content, bytes) else None, name, ""
    try:  # as the file that it could have been: so it meets the same checks
        array = cell["array"].values.to_numpy(zero_copy_only=False)
        array = array.astype("float32") if array.dtype.kind == "f" else array
        kind = "FLOAT" if array.dtype.kind == "f" else f"PCM_{8 * array.itemsize}"  # 16 or 32 bits
        file, rate = io.BytesIO(), int(cell["sampling_rate"].as_py())
        soundfile.write(file, array, rate, kind, format="WAV")
        return file.getvalue(), name, ""
    except Exception as error:  # of NumPy, Arrow and soundfile
        return None, name, f"cannot be decoded: its array is no waveform with a rate ({error})"


def name_of(cell: pa.Scalar) -> str:
    """The name of a file, which need not be in UTF-8; "" where there is none."""
    named = isinstance(cell, pa.StringScalar) and cell.is_valid
    return os.fsdecode(cell.as_buffer().to_pybytes()) if named else ""
