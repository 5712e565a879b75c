"""Reads speech and transcripts from a folder, or from a dataset on the hub.

A source is {split: [Split, ...]}. In a folder every metadata.csv, metadata.jsonl and parquet file
is read. Its split is known by the names of file and folders, or else by its rows or by the README
of a hub copy. Joined splits and files left out are named on standard output.
"""

import codecs
import collections
import csv
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
from files import DEEPEST, follows, parse_yaml, read_small, read_text, walk, why

# {our name of a split: its names in openslr/librispeech_asr (configurations all, clean, other), and
# usual names on the hub}.
USUAL_NAMES = {
    "train": "train train.clean.100 train.clean.360 train.other.500 train.100 train.360 train.500",
    "dev": "dev validation validation.clean valid val",
    "dev_other": "dev_other validation.other",
    "eval_clean": "eval_clean test test.clean",
    "eval_other": "eval_other test.other",
}
SPLIT_NAMES = {name: ours for ours, names in USUAL_NAMES.items() for name in names.split()}
# train-00000-of-00002.parquet and train-0.parquet belong to the split train.
SHARD = re.compile(r"-\d+-of-(\d+)(-[0-9a-f]+)?$")
NUMBER = re.compile(r"[-_]\d+$")
TEXT_COLUMNS = ("transcription", "text", "transcript", "sentence")
AUDIO_COLUMNS = ("audio", "file_name", "path", "file")
SPEAKER_COLUMNS = ("speaker", "speaker_id")
# A data root holds these files beside its splits.
BESIDE_SPLITS = ("tokenizer.json", "rejected.csv", "prepare.json")
# Characters that no file in UTF-8 holds: half of a surrogate pair, or a byte of a name on disk that
# is not in UTF-8.
# Texts of a parquet file that are read at a time. Rows with audio are read one by one, because more
# recordings may not fit into memory.
TEXTS_AT_ONCE = 16
# A column of a row group may take UNPACKED bytes in memory, and more only up to PACKED times its
# bytes in the file.
UNPACKED = 2**26
PACKED = 100
LARGEST_METADATA = 2**30  # bytes of a metadata.csv, some millions of rows


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
    reason: str = ""  # why the row cannot be used, where its source can tell


class Split(NamedTuple):
    count: int  # rows
    speakers: bool  # True where the rows name their speakers
    texts: Callable[[], Iterable[str]]  # all transcripts; no audio is read
    rows: Callable[[], Iterable[Row]]


def note(text: str) -> None:
    print(shown(f"note: {text}"), flush=True)


def open_source(options) -> tuple[dict[str, list[Split]], Callable[[], str]]:
    """Opens --source: a folder, or else the id of a dataset on the hub.

    Returns the splits, and a function that names the files left out, once all rows are read. Raises
    UserError, which says what to do, for anything that is no source.
    """
    source = options.source
    if not os.path.exists(source):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
            raise UserError(f"no folder {source}; give a folder with SRC/{{split}}/metadata.csv")
        return select_splits(hub_source(source, options), options), str
    folder = Folder(source)
    return select_splits(folder_source(folder, options), options), folder.left_out


def select_splits(splits: dict[str, Callable[[], list[Split]]], options) -> dict[str, list[Split]]:
    """Renames splits: those of --split_map only, or all to the usual names.

    Several may join under one name. A note names the splits that are renamed, joined or left out.
    A split that is left out is not opened: it may be damaged, or have no text.
    """
    wanted = dict(item.partition("=")[::2] for item in options.split_map)
    if len(wanted) < len(options.split_map):
        raise UserError(f"--split_map {' '.join(options.split_map)} names a split twice")
    for old, new in wanted.items():
        if not new:
            raise UserError(f"--split_map {old}={new} is not OLD=NEW, a split and a folder's name")
        if old not in splits:
            raise UserError(f"{options.source} has no split {old}; it has {', '.join(splits)}")
    names = collections.defaultdict(list)
    notes = []
    for old in splits:
        if not wanted or old in wanted:
            names[wanted.get(old) or usual(old) or old].append(old)
    for new, old in names.items():
        hidden = not new or new[0] == "."
        unusable = new in BESIDE_SPLITS or "::" in new or tk.CONTROLS.search(new)
        if hidden or os.path.basename(new) != new or unusable:
            raise UserError(f"a split cannot be called {new!r}; name it with --split_map OLD=NEW")
        if old != [new] and not wanted:
            said = f"written as {new}; --split_map OLD=NEW says otherwise"
            notes.append((old, said))
    if left := [old for old in splits if wanted and old not in wanted]:
        notes.append((left, "left out by --split_map"))
    for old, said in notes:
        note(f"{', '.join(old)} of {options.source}: {said}")
    return {new: [part for name in old for part in splits[name]()] for new, old in names.items()}


def usual(name: str) -> str | None:
    """Returns our name for a split with a usual name, or None."""
    return SPLIT_NAMES.get(name.lower()) or SPLIT_NAMES.get(NUMBER.sub("", name.lower()))


def choose_column(
    columns, wanted: str | None, names, place: str, flag: str = "--text_column"
) -> str:
    """Returns the column `wanted`, or the first of the usual `names`. Raises UserError."""
    found = [c for c in ([wanted] if wanted else names) if c in columns]
    if not found:
        raise UserError(
            f"{place} has no column {wanted or ' or '.join(names)}; its columns are "
            f"{', '.join(map(str, columns))}: name one with {flag}, or leave the split "
            "out by --split_map, which names the others"
        )
    return found[0]


def string(value, place: str) -> str:
    """Returns a cell as text; a speaker may be a number. Raises UserError for bytes and lists.

    NaN, which some programs write where a cell has no value, is "".
    """
    if isinstance(value, (bytes, list, dict)):
        raise UserError(
            f"{place}: a {type(value).__name__} is neither text nor speaker; name the "
            "column of the text with --text_column"
        )
    return "" if value is None or value != value else str(value)


# ---- A folder: which file belongs to which split


class Folder:
    """Holds the files of a source but hidden ones. State: the files that were read or named."""

    def __init__(self, source: str):
        self.source = source
        self.path = os.path.abspath(source)
        if not os.path.isdir(source):
            raise UserError(
                f"{source} has neither SRC/{{split}}/metadata.csv nor parquet files: "
                "it is a file; give a folder"
            )
        self.files = list(walk(self.path))
        self.read = set()

    def find(self, folder: str, name: str) -> tuple[str, str]:
        """Returns (path, why it cannot be used or "") of the file that a row in `folder` names.

        A name in another Unicode form (NFC, NFD) than on disk is the same name. Another case, other
        slashes or another folder may mean another file, which the reason then names.
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
            path = same[0] if same else path  # the decoder finds that it is missing
        self.read.add(path)
        return path, ""

    @functools.cached_property
    def by_name(self) -> dict[str, list[str]]:
        names = collections.defaultdict(list)
        for file in self.files:
            names[alike(os.path.basename(file))].append(file)
        return names

    def left_out(self) -> str:
        """Names the files that were neither read nor named by a row, and empty folders.

        For each top folder and each ending it names one file, and says how many more there are.
        """
        kinds = collections.defaultdict(list)
        tops = set()
        for file in self.files:
            name = os.path.relpath(file, self.path)
            top = name.partition(os.sep)[0] if os.sep in name else ""
            tops.add(top)
            manual = os.path.basename(name).lower().startswith(("readme", "license"))
            if file not in self.read and not manual:
                kinds[top, os.path.splitext(name)[1]].append(name)
        said = []
        for (top, kind), (name, *more) in kinds.items():
            others = f" and {len(more)} more {kind or 'other'} files in {top or 'it'}"
            said.append(name + (others if more else ""))
        for name in sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir()):
            if name not in tops and not name.startswith("."):
                said.append(f"{name}/ (empty)")
        return ", ".join(said)


def alike(name: str) -> str:
    """Returns the same text for names that are easily taken for each other.

    Such names differ in case, in Unicode form, in spaces at the ends, or in bytes of Latin-1.
    """
    name = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xDC00), name)
    return tk.nfc(name).casefold().strip()


def outside(source: str, path: str) -> str:
    """Returns why `path` may not be read, or "".

    A name must not lead out of `source`. A link may: its maker had access to the source.
    """
    inside = os.path.abspath(path).startswith(os.path.join(os.path.abspath(source), ""))
    return "" if inside else f"lies outside {source}; move it there, or put a link to it there"


class Table(NamedTuple):
    config: str  # the folder that holds the splits, or a configuration of a hub copy's README
    split: str
    path: str
    records: list[dict] | None = None  # rows, where metadata was read to find the splits


def is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def folder_source(folder: Folder, options) -> dict[str, Callable[[], list[Split]]]:
    """Returns the splits of a folder, to be opened, and prints which parquet shards are missing.

    Raises UserError where there are no splits.
    """
    tables = choose_config(find_tables(folder), folder.source, options.config)
    folder.read.update(table.path for table in tables)
    if not tables:
        there = folder.left_out()
        raise UserError(
            f"{folder.source} has neither SRC/{{split}}/metadata.csv (or .jsonl) nor parquet "
            f"files{there and f', only {there}'}; lay the speech out as SRC/train/metadata.csv and "
            "SRC/dev/metadata.csv with the columns file_name and text"
        )
    splits = collections.defaultdict(list)
    shards = collections.Counter()
    for table in tables:
        splits[table.split].append(table)
        stem = os.path.splitext(table.path)[0]
        if found := SHARD.search(stem):
            shards[stem[: found.start()], found[1]] += 1
    for (stem, total), count in shards.items():
        if count < int(total):
            note(
                f"of {stem}-*-of-{total} only {count} are there; get the others, or go on without "
                "them"
            )
    return {
        name: functools.partial(open_tables, folder, name, parts, options)
        for name, parts in splits.items()
    }


def open_tables(folder: Folder, name: str, tables: list[Table], options) -> list[Split]:
    """Returns the parts of the split `name`. Raises UserError where its files are of two kinds."""
    kinds = {os.path.splitext(table.path)[1].lower(): table.path for table in tables}
    if len(kinds) > 1:
        raise UserError(
            f"{folder.source}: split {name} has {' and '.join(sorted(kinds.values()))}; take one "
            "of them away, or move it to a folder of its own"
        )
    if is_parquet(tables[0].path):
        return [parquet_split(folder, name, table.path, options) for table in tables]
    return [metadata_split(folder, tables, options)]


def find_tables(folder: Folder) -> list[Table]:
    """Finds all metadata and parquet files, each with its split.

    The split is the first usual name among a file's folders (and a parquet file's own name). Where
    no name is usual, the rows of metadata may name the split. Otherwise the split is the name
    that stands beside usual names, or else the first name.
    """
    tables = readme_tables(folder)
    paths = {}  # {file: the names of its folders, and its own of a parquet file}
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
        place = known[file]
        records = None
        if place is None and not is_parquet(file):
            try:
                records = read_metadata(file)
            except UserError:
                if not names:
                    raise
                # The split of the folder's name may be left out; else its opening says the same.
            if records and (found := top_tables("/".join(names), file, records)):
                tables += found
                continue
        if place is None:
            place = max(
                (place for place in range(len(names)) if tuple(names[:place]) in above), default=0
            )
        tables.append(Table("/".join(names[:place]) or ".", names[place], file, records))
    return tables


def first_usual(names: list[str], file: str) -> int | None:
    """Returns the place of the first usual name of a split, or None.

    Raises UserError where a usual name of another split follows.
    """
    places = [place for place, name in enumerate(names) if usual(name)]
    if len({usual(names[place]) for place in places}) > 1:
        raise UserError(
            f"{file}: it may belong to the split {' or '.join(names[place] for place in places)}; "
            "rename the file or its folder"
        )
    return places[0] if places else None


def top_tables(folder: str, path: str, records: list[dict]) -> list[Table]:
    """Divides the rows of metadata that lies above the folders of the splits.

    A column `split`, or the folder in each file_name, names the split of a row. Metadata in a
    folder below the source need not: then [] is returned, and the folder is the split. A row with
    more fields than columns names nothing for certain, and goes with the first split. Raises
    UserError where only some rows name a split, or where none does at the top of the source.
    """
    broken = [None in record for record in records]
    broken = [False] * len(records) if all(broken) else broken
    if any("split" in record for record in records):
        names = [string(record.get("split"), path).strip() for record in records]
        where = "column split"
    else:
        files = [(record.get("file_name") or "").replace("\\", "/") for record in records]
        folders = [os.path.normpath(file).split("/")[:-1] for file in files]
        levels = itertools.zip_longest(*folders, fillvalue="")
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
    names = [None if bad else name for bad, name in zip(broken, names)]
    if "" in names:
        raise UserError(
            f"{path}: row {names.index('') + 1} names no split by its "
            f"{where}, as others do; name it there"
        )
    rows = collections.defaultdict(list)
    first = next(filter(None, names))
    for record, name in zip(records, names):
        rows[name or first].append(record)
    return [Table(folder or ".", name, path, own) for name, own in rows.items()]


def readme_tables(folder: Folder) -> list[Table]:
    """Returns the parquet files that the README of a hub copy gives to splits, or [].

    Raises UserError where one lies outside the folder.
    """
    try:
        text = read_text(os.path.join(folder.path, "README.md"), 2**20)
        card = parse_yaml(re.match(r"\s*---\s*\n(.*?\n)---", text, re.DOTALL)[1])
        said = [
            (str(config["config_name"]), *part)
            for config in card["configs"]
            for part in data_files(config)
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # there is no README, or it says nothing of files
    tables = []
    absent = []
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
        note(
            f"{folder.source}/README.md names {', '.join(absent)}, of which nothing is there; get "
            "it, or go on without it"
        )
    return list(dict.fromkeys(tables))


def data_files(config: dict) -> Iterator[tuple[str, str]]:
    """Yields (split, pattern of files) of a configuration, which may be written in many ways."""
    parts = config["data_files"]
    if isinstance(parts, dict):
        parts = [{"split": split, "path": paths} for split, paths in parts.items()]
    for part in [parts] if isinstance(parts, str) else parts:
        split, paths = (part["split"], part["path"]) if isinstance(part, dict) else ("train", part)
        for path in [paths] if isinstance(paths, str) else paths:
            yield str(split), os.path.join(config.get("data_dir") or "", path)


def choose_config(tables: list[Table], source: str, wanted: str | None) -> list[Table]:
    """Returns the tables of the configuration `wanted`, or all where it is None.

    Raises UserError where `wanted` is absent, or where None is wanted and two have the same split.
    """
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


# ---- Metadata


def read_metadata(path: str) -> list[dict]:
    """Reads the rows of a metadata.csv or metadata.jsonl.

    Raises UserError for a file that is not in UTF-8, has no column file_name, or has no rows.
    """
    try:
        content = read_small(path, LARGEST_METADATA).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        other = "UTF-16" if error.object.startswith(marks) else "LATIN1"
        raise UserError(
            f"{path} is not in UTF-8: line {line} has the byte 0x{error.object[error.start]:02x}; "
            f"save it in UTF-8 (iconv -f {other} -t UTF-8, if it is in {other})"
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
    """Returns the columns and the rows. Raises UserError where a line is no CSV."""
    csv.field_size_limit(LARGEST_METADATA)  # A text that is too long costs its own row alone.
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True, skipinitialspace=True)
    records = []
    line = 1  # where the next row begins
    try:
        while reader.fieldnames == []:  # a blank line
            reader.fieldnames = None
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        # A quotation mark may be left open in the header, too.
        for record in itertools.chain([{None: columns}], reader):
            if found := swallowed(record, os.path.dirname(path)):
                raise UserError(
                    f"{path}: one field of the row in lines {line} to {reader.line_num} holds "
                    f"{found!r}, which looks like a row of its own; close the quotation mark that "
                    "is left open there, or put the text on one line"
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
    """Returns a line that an open quotation mark has drawn into a field, or "".

    A text may have line breaks. But a line with a file's name between commas is a row, a record
    with too many fields and two such names is two rows, and a header has one line.
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
            row = fused or any(
                os.path.isfile(os.path.join(folder, cell))
                or len(cells[line]) > 1
                and ending(cell) in endings
                for cell in filter(None, cells[line])
            )
            if row and line.strip():
                return line
    return ""


def ending(name: str) -> str:
    """Returns a name's ending; in "Raise your hand. Wave" a space comes first, so it has none."""
    return os.path.splitext(name.strip())[1][1:].lower()


def read_jsonl(path: str, content: str) -> tuple[list[str], list[dict]]:
    """Returns the columns and the rows. Raises UserError where a line is no JSON object."""
    records = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=once_each)
            if "file_name" in record:
                record["file_name"] = string(record["file_name"], f"{path}: line {number}")
            for name, value in record.items():
                if name != "file_name" and isinstance(value, str):
                    value.encode()  # raises for half of a surrogate pair
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is no JSON object in Unicode ({error}); write "
                "one a line, with file_name and text"
            ) from None
        records.append(record)
    return list(dict.fromkeys(itertools.chain(*records))), records


def once_each(pairs: list[tuple]) -> dict:
    """Returns a JSON object's pairs as a dict. Raises ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"it has a key of {', '.join(found)} twice")
    return found


def metadata_split(folder: Folder, tables: list[Table], options) -> Split:
    """Joins the rows of all metadata files of a split."""
    parts = []  # (path, rows, column of the text, column of the speaker) of each table
    for table in tables:
        records = table.records or read_metadata(table.path)
        check_split(table, records)
        columns = [column for column in dict.fromkeys(itertools.chain(*records)) if column]
        text = choose_column(columns, options.text_column, TEXT_COLUMNS, table.path)
        speaker = next((column for column in SPEAKER_COLUMNS if column in columns), None)
        parts.append((table.path, records, text, speaker))

    def texts():
        for path, records, text, _ in parts:
            yield from (string(record.get(text), path) for record in records)

    def rows():
        return used_once([row for part in parts for row in metadata_rows(folder, *part)])

    count = sum(len(records) for _, records, _, _ in parts)
    return Split(count, any(speaker for *_, speaker in parts), texts, rows)


def kind_of(split: str) -> str | None:
    """Returns train, dev or eval for a split with a usual name, or None."""
    name = usual(split)
    return name and name.split("_")[0]


def check_split(table: Table, records: list[dict]) -> None:
    """Raises UserError where a row's column `split` contradicts the split of its table.

    Names of one kind do not: LibriSpeech's test is ours of eval_clean and of eval_other.
    """
    kind = kind_of(table.split)
    for record in records if kind else ():
        # A row with more fields than columns is rejected, and its cells are not those of their
        # columns.
        name = record.get("split") if None not in record else None
        if isinstance(name, str) and kind_of(name.strip()) not in (None, kind):
            raise UserError(
                f"{table.path}: {record.get('file_name')} is of split {name} by the column split "
                f"and of {table.split} by the folder; take the column out, or move the file above "
                "the folders of the splits"
            )


def metadata_rows(
    folder: Folder, table: str, records: list[dict], text: str, speaker: str | None
) -> Iterator[Row]:
    for record in records:
        name = record.get("file_name") or ""
        path, reason = folder.find(os.path.dirname(table), name)
        if None in record:  # DictReader puts fields without a column there
            reason = "more fields than columns; put a text with commas between quotation marks"
        yield Row(
            name,
            path,
            string(record.get(text), table),
            tk.normalize_text(string(speaker and record.get(speaker), table)),
            reason,
        )


def used_once(rows: list[Row]) -> Iterator[Row]:
    """Yields the rows. Where several name one file, all but the first get a reason.

    Where the texts of these rows differ, none can be trusted, and all get a reason.
    """
    texts = collections.defaultdict(set)
    seen = set()
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


# ---- Arrow's tables: parquet files, and datasets of the hub. audio.py decodes, not `datasets`.


def parquet_split(folder: Folder, name: str, path: str, options) -> Split:
    """Opens a parquet file of the split `name`. Raises UserError where the file is damaged."""
    try:
        if not os.path.isfile(path):  # to open a pipe could take for ever
            raise OSError("it is no file")
        with open(path, "rb") as file:  # pyarrow itself opens no path that is not in UTF-8
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
            count = parquet.metadata.num_rows
            check_unpacked(parquet, os.path.getsize(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"cannot load {path}: {error}; get the file anew (git lfs pull, if it is a pointer)"
        ) from None

    def batches(columns):
        with open(path, "rb") as file:  # page by page, as a row group may not fit into memory
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
            size = 1 if len(columns) > 1 else TEXTS_AT_ONCE
            yield from parquet.iter_batches(batch_size=size, columns=columns)

    def find(name):
        near, reason = folder.find(os.path.dirname(path), name)
        if not reason and os.path.isfile(near):
            return near, ""
        far, wrong = folder.find(folder.path, name)
        return (far, "") if not wrong and os.path.isfile(far) else (near, reason)

    place = f"split {name} of {folder.source}"
    return arrow_split(schema, count, batches, find, path, place, options)


def check_unpacked(parquet: pyarrow.parquet.ParquetFile, size: int) -> None:
    """Raises ValueError where a column of a row group takes far more memory than its bytes.

    size: bytes of the file. Compressed audio hardly shrinks again, and no raw speech shrinks by
    PACKED. Raises OSError where the footer is damaged.
    """
    metadata = parquet.metadata
    columns = range(metadata.num_columns)
    if not columns:
        raise ValueError("it has no columns")  # a batch of none would end the process
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        # A batch of no rows reads the footer alone. For a damaged footer it raises an error, where
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
    """Loads a dataset of the hub, and returns its splits, to be opened. Raises UserError."""
    try:
        loaded = datasets.load_dataset(source, options.config)
    except Exception as error:  # `datasets` raises many kinds, some of them bare
        raise UserError(
            f"cannot load {source}: {str(error).rstrip('.')}; give a folder with "
            "SRC/{split}/metadata.csv, a folder of parquet files or the id of a hub dataset"
        ) from None

    def batches(data, columns):
        return data.select_columns(columns).with_format("arrow").iter(TEXTS_AT_ONCE)

    def as_named(path):
        return path, ""

    def open_split(name):
        data = loaded[name]
        schema = data.features.arrow_schema
        read = functools.partial(batches, data)
        place = f"split {name} of {source}"
        return [arrow_split(schema, len(data), read, as_named, source, place, options)]

    return {name: functools.partial(open_split, name) for name in loaded}


def arrow_split(
    schema: pa.Schema, count: int, batches, find, path: str, place: str, options
) -> Split:
    """Makes a Split of an Arrow table.

    batches(columns) yields some rows at a time. find(name) returns a path, and why it cannot be
    used or "". Raises UserError where a column is missing or holds no audio, and, while rows are
    read, where `path` is damaged.
    """
    text = choose_column(schema.names, options.text_column, TEXT_COLUMNS, path)
    audio = choose_column(schema.names, options.audio_column, AUDIO_COLUMNS, path, "--audio_column")
    speaker = next((column for column in SPEAKER_COLUMNS if column in schema.names), None)
    check_audio_type(schema.field(audio).type, audio, path)

    def read(*columns):
        try:
            for batch in batches(list(columns)):
                yield from zip(*(batch[column] for column in columns))
        except Exception as error:  # pyarrow's, fsspec's and datasets' have no common base
            raise UserError(f"cannot read {place} to its end: {error}; get {path} anew") from None

    def words(cell):
        try:
            return string(cell.as_py(), path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not in UTF-8: {error.object!r}; write it anew") from None
        except (ValueError, OverflowError) as error:  # a time that Python has not
            raise UserError(
                f"{path}: a text or a speaker cannot be read ({error}); write it as text"
            ) from None

    def rows():
        for i, (sound, said, *who) in enumerate(read(*filter(None, (audio, text, speaker)))):
            content, name, reason = sound_of(sound)
            if content is None and name and not reason:
                content, reason = find(name)
            voice = tk.normalize_text(words(who[0])) if who else ""
            yield Row(name or f"row {i}", content, words(said), voice, reason)

    def texts():
        return (words(cell) for (cell,) in read(text))

    return Split(count, speaker is not None, texts, rows)


def check_audio_type(kind: pa.DataType, column: str, path: str) -> None:
    """Raises UserError where a column holds no audio that can be read."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    plain = kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.null())
    if not (plain or fields & {"bytes", "path"} or fields >= {"array", "sampling_rate"}):
        raise UserError(
            f"{path}: column {column} is {kind}; audio is the bytes of a file, its "
            "path, a struct of bytes and path, or one of array and sampling_rate: "
            "name its column with --audio_column"
        )


def sound_of(cell: pa.Scalar) -> tuple[bytes | None, str, str]:
    """Returns (bytes of a file or None, name of a file or "", why there is no sound or "")."""
    cell = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
    if isinstance(cell, pa.StringScalar):
        return None, name_of(cell), ""
    if not isinstance(cell, pa.StructScalar) or not cell.is_valid:
        return cell.as_py(), "", ""
    content = cell["bytes"].as_py() if "bytes" in cell else None
    name = name_of(cell["path"]) if "path" in cell else ""
    if isinstance(content, bytes) or "array" not in cell or not cell["array"].is_valid:
        return content if isinstance(content, bytes) else None, name, ""
    try:  # the array becomes a wav file, and so meets the same checks
        array = cell["array"].values.to_numpy(zero_copy_only=False)
        array = array.astype("float32") if array.dtype.kind == "f" else array
        kind = "FLOAT" if array.dtype.kind == "f" else f"PCM_{8 * array.itemsize}"  # 16 or 32 bits
        file = io.BytesIO()
        rate = int(cell["sampling_rate"].as_py())
        soundfile.write(file, array, rate, kind, format="WAV")
        return file.getvalue(), name, ""
    except Exception as error:  # NumPy, Arrow and soundfile raise many kinds
        return None, name, f"cannot be decoded: its array is no waveform with a rate ({error})"


def name_of(cell: pa.Scalar) -> str:
    """Returns the name of a file, which need not be in UTF-8, or ""."""
    named = isinstance(cell, pa.StringScalar) and cell.is_valid
    return os.fsdecode(cell.as_buffer().to_pybytes()) if named else ""
