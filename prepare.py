"""Makes training data of speech and transcripts: python prepare.py --source SRC --data_root ROOT

ROOT/{split}/{shard}/ are datasets saved with save_to_disk. A row has input_values (N,) float32 at
--sample_rate, labels {input_ids: (U,) int32}, length N, text and, where known, speaker.
ROOT/tokenizer.json holds the vocabulary, ROOT/rejected.csv the rows that could not be used, and
ROOT/prepare.json a sample rate other than 16 kHz. ROOT appears whole, or not at all.

With --noise DIR, --rir DIR or both in the place of --source, ROOT/noise and ROOT/rir are made of
folders of recordings, for train.py's flags of these names. Their rows have no text and no labels.
"""

import collections
import contextlib
import functools
import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import cli
from cli import UserError, option, options_class, shown

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

import files
import tokenizer as tk
from audio import EXTENSIONS, read_audio
from sources import SPEAKER_COLUMNS, Folder, Row, SourceOptions, Split, ending, note, open_source
from transforms import RATES

SOUNDS = ("noise", "rir")  # flags, and the folders of ROOT that they make
# Control characters: clean_text leaves those that are no white space, and nobody writes them.
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
# Invisible characters that are taken out of a text: soft hyphens, zero-width spaces, byte order
# marks, directions. The characters of tk.NOTHING stay where others are beside them.
INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
# Characters: more than anybody says in an hour, and audio.py reads no longer recording whole.
LONGEST_TEXT = 2**16
SILENT = 20  # steps of 16 bits: in a recording that stays within them nothing is said
EDGE = 160  # samples: 10 ms
# Seconds of an impulse response: no room sounds as long, and convolving takes time with the length.
LONGEST_RIR = 10
# The most rows, and the most samples, that wait in memory to be written.
BATCH_ROWS = 100
BATCH_SAMPLES = 2**25  # 35 minutes at 16 kHz


@options_class
class PrepareOptions(SourceOptions):
    data_root: str | None = option(None, "folder to write")
    noise: str | None = option(None, "folder of recorded noise, for train.py --noise")
    rir: str | None = option(None, "folder of room impulse responses, for train.py --rir")
    sample_rate: int = option(
        16000, "samples per second of the rows", at_least=RATES[0], at_most=RATES[1]
    )
    tokenizer: str = option(
        "char",
        "char, bpe, or the path of a tokenizer.json, .ckpt, vocab.json or transformers folder",
    )
    vocab_size: int | None = option(
        None, "number of tokens of --tokenizer bpe; 500 if not given", at_least=1, at_most=10**6
    )
    shard_rows: int = option(2000, "rows of a shard", at_least=1, at_most=10**6)
    overwrite: bool = option(False, "replace the data that an earlier run left in data_root")
    lowercase: bool = option(
        False, "write all text in lower case, Unicode's: I becomes i in any language"
    )
    uppercase: bool = option(False, "write all text in upper case")
    remove_punctuation: bool = option(
        False, "leave punctuation out of the text, apostrophes excepted"
    )
    folds: int | None = option(
        None,
        "divide train's speakers into so many groups, of about as many rows each; --fold names one",
        at_least=2,
        at_most=1000,
    )
    fold: int | None = option(
        None,
        "the group, from 0, that becomes dev; the dev of the source is left out",
        at_least=0,
        at_most=999,
    )


class BadRow(Exception):
    """Says why one row cannot be used."""


# ---- Folds


def hold_out(splits: dict[str, list[Split]], options: PrepareOptions) -> dict[str, list[Split]]:
    """Makes dev of the speakers of one fold, and train of the others, both of the train split.

    Raises UserError where train's rows do not name enough speakers.
    """
    where = f"--folds {options.folds}: train of {options.source}"
    parts = splits.get("train", ())
    if not parts or not all(part.speakers for part in parts):
        column = " or ".join(SPEAKER_COLUMNS)
        raise UserError(f"{where} {'has no column ' + column if parts else 'is not there'}")
    counts = [collections.Counter(row.speaker for row in part.rows()) for part in parts]
    rows = sum(counts, collections.Counter())
    if nameless := rows[""]:
        raise UserError(f"{where} has {nameless} rows that name no speaker; name them")
    if len(rows) < options.folds:
        raise UserError(f"{where} has only {len(rows)} speakers; give fewer")
    held = share_out(rows, options.folds)[options.fold]
    left = " (the dev of the source is left out)" if "dev" in splits else ""
    note(f"dev is {len(held)} of train's {len(rows)} speakers: {', '.join(sorted(held))}{left}")
    others = {name: split for name, split in splits.items() if name not in ("train", "dev")}
    return {
        "train": [said_by(rows.keys() - held, *both) for both in zip(parts, counts)],
        "dev": [said_by(held, *both) for both in zip(parts, counts)],
        **others,
    }


def share_out(rows: dict[str, int], folds: int) -> list[set[str]]:
    """Divides speakers, each with a number of rows, into groups of about equally many rows."""
    groups = [set() for _ in range(folds)]
    sizes = [0] * folds
    for speaker, count in sorted(rows.items(), key=lambda item: (-item[1], item[0])):
        smallest = sizes.index(min(sizes))
        groups[smallest].add(speaker)
        sizes[smallest] += count
    return groups


def said_by(speakers: set[str], part: Split, counts: dict[str, int]) -> Split:
    """Returns the rows of these speakers in a part of a split, whose rows `counts` has."""

    def rows():
        return (row for row in part.rows() if row.speaker in speakers)

    count = sum(counts[speaker] for speaker in speakers)
    return Split(count, True, lambda: (row.text for row in rows()), rows)


# ---- One row


def waveform_of(audio: str | bytes | None, sample_rate: int) -> np.ndarray:
    """Returns the waveform (N,) float32, mono, of a file's path or bytes. Raises BadRow."""
    if audio is None:
        raise BadRow("no audio")
    try:
        return read_audio(audio, sample_rate)
    except UserError as reason:
        raise BadRow(str(reason)) from None


def silence(samples: np.ndarray) -> str:
    """Returns why nothing can be said in samples (N,), or "".

    The ends do not count, because a constant signal rings there when it is resampled.
    """
    if not samples.any():
        return "silent: all samples are 0"
    inner = samples[EDGE:-EDGE] if len(samples) > 4 * EDGE else samples
    middle = np.median(inner)
    level = 32768 * np.quantile(np.abs(inner - middle), 0.999)
    # A constant signal of full scale ripples by 15 steps when it is resampled.
    if len(inner) == 1 or level > SILENT + 15 * abs(middle):
        return ""
    return (
        f"silent: all samples are {middle:.4g}, give or take {level:.0f} steps of 16 bits; "
        "if it is speech, make it louder"
    )


def clean_text(text: str, options: PrepareOptions) -> str:
    """Returns text in NFC, with single spaces, without invisible characters; "" if nothing shows.

    The options say what becomes of case and punctuation.
    """
    text = INVISIBLE.sub("", tk.normalize_text(text))
    if options.remove_punctuation:
        text = "".join(
            " " if unicodedata.category(c).startswith("P") and c not in "'\u2019" else c
            for c in text
        )
    if options.lowercase:
        # lower() alone would turn a capital i with a dot into an i and a combining dot.
        text = text.replace("\u0130", "i").lower()
    elif options.uppercase:
        text = text.upper()
    text = tk.normalize_text(text)
    return text if tk.NOTHING.sub("", text).strip() else ""


def make_example(row: Row, tokenizer: tk.Tokenizer, options: PrepareOptions) -> dict:
    """Returns the columns of a row, as they are written. Raises BadRow."""
    if row.reason:
        raise BadRow(row.reason)
    if len(row.text) > LONGEST_TEXT:
        raise BadRow(
            f"a text of {len(row.text)} characters; {LONGEST_TEXT} is the most: cut it into "
            "utterances"
        )
    text = clean_text(row.text, options)
    if not text:
        raise BadRow("empty text")
    if found := CONTROL.search(text):
        raise BadRow(f"the text holds the control character U+{ord(found[0]):04X}")
    samples = waveform_of(row.audio, options.sample_rate)
    if reason := silence(samples):
        raise BadRow(reason)
    return {
        "input_values": samples,
        "labels": {"input_ids": tokenizer.encode(text)},
        "length": len(samples),
        "text": text,
        "speaker": row.speaker,
    }


def make_sound(row: Row, kind: str, sample_rate: int) -> dict:
    """Returns the columns of a recording of --noise or --rir, `kind`. Raises BadRow."""
    samples = waveform_of(row.audio, sample_rate)
    if kind == "rir" and len(samples) > LONGEST_RIR * sample_rate:
        raise BadRow(f"longer than {LONGEST_RIR} s, so it is no impulse response")
    # An impulse response is silent but for a moment.
    reason = silence(samples) if kind == "noise" or not samples.any() else ""
    if reason:
        raise BadRow(reason)
    return {
        "input_values": samples,
        "labels": {"input_ids": []},
        "length": len(samples),
        "text": "",
    }


# ---- Writing


def write_split(
    name: str, parts: list[Split], folder: str, tokenizer, options, rejected: list
) -> int:
    """Writes the shards folder/0, folder/1, ... Returns the rows kept.

    Bad rows are added to `rejected`. Raises UserError where no row is usable, or where the
    tokenizer does not know most of the text.
    """
    rows = itertools.chain.from_iterable(part.rows() for part in parts)
    bar = tqdm(rows, desc=shown(name), unit=" rows", total=sum(part.count for part in parts))
    speakers = any(part.speakers for part in parts)
    labels = Labels(name, tokenizer)
    make = functools.partial(make_example, tokenizer=tokenizer, options=options)
    with contextlib.closing(ShardWriter(folder, options.shard_rows, speakers)) as writer:
        for row, example in usable(name, bar, make, rejected):
            writer.write(example)
            labels.add(row.name, example)
    labels.tell(options.tokenizer)
    return writer.rows


def usable(
    split: str, rows: Iterable[Row], make: Callable[[Row], dict], rejected: list
) -> Iterator[tuple[Row, dict]]:
    """Yields each row with what `make` makes of it. Rows that raise BadRow go to `rejected`.

    Raises UserError at the end where no row is usable.
    """
    kept = 0
    for row in rows:
        try:
            example = make(row)
        except BadRow as reason:
            rejected.append((split, row.name, str(reason)))
            continue
        yield row, example
        kept += 1
    if not kept:
        first = next((f": {r[1]}: {r[2]}" for r in rejected if r[0] == split), "")
        raise UserError(f"split {split} has no usable row{first}; nothing was written")


def write_sounds(kind: str, folder: str, options: PrepareOptions, rejected: list) -> int:
    """Writes the shards of --noise or --rir, `kind`. Returns the recordings kept.

    Raises UserError where no recording is usable.
    """
    source = Folder(getattr(options, kind))
    paths = [path for path in source.files if ending(path) in EXTENSIONS]
    source.read.update(paths)
    if not paths:
        there = source.left_out() or "nothing"
        raise UserError(f"--{kind} {source.source}: no recordings there, but {there}")
    rows = (Row(os.path.relpath(path, source.path), path, "", "") for path in paths)
    bar = tqdm(rows, desc=kind, unit=" rows", total=len(paths))
    make = functools.partial(make_sound, kind=kind, sample_rate=options.sample_rate)
    with contextlib.closing(ShardWriter(folder, options.shard_rows, speakers=False)) as writer:
        for _, example in usable(kind, bar, make, rejected):
            writer.write(example)
    if names := source.left_out():
        note(f"{source.source}: not read: {names}")
    return writer.rows


class Labels:
    """Counts where the labels of a split differ from their text. State: the counts."""

    def __init__(self, split: str, tokenizer: tk.Tokenizer):
        self.split = split
        self.tokenizer = tokenizer
        self.tokens = 0
        self.unknown = collections.Counter()  # {a piece that is unknown: how often it occurs}
        self.examples = {}  # {the same: a row with it}
        self.changed = 0  # rows without an unknown piece
        self.change = ""  # the first of them

    def add(self, name: str, example: dict) -> None:
        text = example["text"]
        self.tokens += len(self.tokenizer.spell(text))
        missing = self.tokenizer.unknown(text)
        for piece in missing:
            self.unknown[piece] += 1
            self.examples.setdefault(piece, name)
        if missing:
            return
        heard = self.tokenizer.decode(example["labels"]["input_ids"])
        if heard != text:
            self.changed += 1
            self.change = self.change or f"{heard[:80]!r} for {text[:80]!r} of {name}"

    def tell(self, tokenizer: str) -> None:
        """Prints the counts. Raises UserError where more than half of the tokens are unknown."""
        told = tk.most_frequent(self.unknown, self.examples)
        count = f"{self.unknown.total()} of {self.tokens} tokens"
        if 2 * self.unknown.total() > self.tokens:
            raise UserError(
                f"{count} of split {self.split} are unknown to {tokenizer}: {told}; try "
                "--uppercase or --lowercase, or another --tokenizer"
            )
        if self.unknown:
            print(shown(f"{self.split}: {count} are unknown to the tokenizer: {told}"))
        if self.changed:
            print(
                shown(
                    f"{self.split}: the labels of {self.changed} rows say something else than "
                    f"their text, because the tokenizer cannot tell it apart: {self.change}"
                )
            )


class ShardWriter:
    """Streams rows into datasets of at most `shard_rows` rows.

    State: the file through which a shard's audio passes, because it need not fit into memory.
    """

    def __init__(self, folder: str, shard_rows: int, speakers: bool):
        self.folder = folder
        self.shard_rows = shard_rows
        columns = {
            "input_values": datasets.List(datasets.Value("float32")),
            "labels": {"input_ids": datasets.List(datasets.Value("int32"))},
            "length": datasets.Value("int64"),
            "text": datasets.Value("string"),
        }
        self._features = datasets.Features(
            columns | ({"speaker": datasets.Value("string")} if speakers else {})
        )
        self.rows = 0
        self.shards = 0
        self._waiting = 0  # samples
        self._writer = None
        self._stream = f"{folder}.arrow"
        os.makedirs(folder)

    def write(self, example: dict) -> None:
        if self._writer is None:
            self._writer = ArrowWriter(
                path=self._stream, features=self._features, writer_batch_size=BATCH_ROWS
            )
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
        datasets.Dataset.from_file(self._stream).save_to_disk(
            os.path.join(self.folder, str(self.shards))
        )
        os.remove(self._stream)
        self.shards += 1


def tokenizer_of(splits: dict[str, list[Split]], options: PrepareOptions) -> tk.Tokenizer:
    """Loads --tokenizer PATH, or trains one on the text of the train split. Raises UserError."""
    if options.tokenizer not in ("char", "bpe"):
        return tk.load_tokenizer(options.tokenizer)
    if "train" not in splits:
        raise UserError(
            f"no split train to train a tokenizer on, only {', '.join(splits)}; name it with "
            "--split_map OLD=train, or give --tokenizer PATH, the tokenizer.json or .ckpt of "
            "the model this data is for"
        )
    texts = (
        clean_text(text, options)
        for part in splits["train"]
        for text in part.texts()
        if len(text) <= LONGEST_TEXT
    )
    texts = (text for text in texts if not CONTROL.search(text))
    if options.tokenizer == "char":
        return tk.train_char(texts)
    return tk.train_bpe(texts, options.vocab_size or 500)


def write_corpus(folder: str, options: PrepareOptions, rejected: list) -> int:
    """Writes the splits and the tokenizer of --source. Returns the rows kept."""
    splits, left_out = open_source(options)
    if options.folds:
        splits = hold_out(splits, options)
    tokenizer = tokenizer_of(splits, options)
    kept = sum(
        write_split(name, parts, os.path.join(folder, name), tokenizer, options, rejected)
        for name, parts in splits.items()
    )
    tk.save_tokenizer(tokenizer, os.path.join(folder, "tokenizer.json"))
    if names := left_out():
        note(f"{options.source}: neither read nor named by a row: {names}")
    return kept


def prepare(options: PrepareOptions) -> tuple[int, int]:
    """Writes ROOT from the source. Returns the rows kept and rejected.

    Raises UserError, and leaves ROOT as it was, where that cannot be done.
    """
    files.check_path(os.path.realpath(options.data_root), "--data_root", "Arrow")
    inputs = (options.source, options.noise, options.rir)
    with files.published(
        options.data_root, "data of prepare.py", options.overwrite, inputs
    ) as folder:
        rejected: list[tuple[str, str, str]] = []
        kept = write_corpus(folder, options, rejected) if options.source else 0
        for kind in SOUNDS:
            if getattr(options, kind):
                kept += write_sounds(kind, os.path.join(folder, kind), options, rejected)
        table = files.csv_text([("split", "file_name", "reason"), *rejected])
        files.write_whole(os.path.join(folder, "rejected.csv"), table.encode())
        if options.sample_rate != 16000:
            mark = files.json_text({"sample_rate": options.sample_rate}).encode()
            files.write_whole(os.path.join(folder, "prepare.json"), mark)
    return kept, len(rejected)


def prepare_options(argv: list[str]) -> PrepareOptions:
    """Returns the options of a command line. Raises UserError where they contradict each other."""
    given = vars(cli.make_parser(__doc__, PrepareOptions).parse_args(argv))
    options = cli.build(PrepareOptions, given)
    if options.noise or options.rir:
        check_sounds(given)
    elif options.source is None:
        raise UserError(
            "give --source SRC, what to read, and --data_root ROOT, the folder to write"
        )
    if options.data_root is None:
        raise UserError("give --data_root ROOT, the folder to write")
    if "vocab_size" in given and options.tokenizer != "bpe":
        raise UserError("--vocab_size has no effect here; leave it out")
    if options.lowercase and options.uppercase:
        raise UserError("give --lowercase or --uppercase, not both")
    if (options.folds is None) != (options.fold is None):
        raise UserError("--folds says how many groups, --fold which one; give both or neither")
    if options.folds and options.fold >= options.folds:
        raise UserError(
            f"--fold {options.fold}: it must be less than --folds {options.folds}; the first is 0"
        )
    if options.sample_rate % 25:
        raise UserError(
            f"--sample_rate {options.sample_rate}: it must lie within {RATES[0]} .. "
            f"{RATES[1]}, in steps of 25"
        )
    return options


def check_sounds(given: dict) -> None:
    """Raises UserError for flags that have no effect on --noise and --rir, or no such folder."""
    for name in given.keys() - {*SOUNDS, "data_root", "sample_rate", "shard_rows", "overwrite"}:
        raise UserError(
            f"--{name} has no effect with --noise or --rir, whose recordings have no text; leave "
            "it out, or give it to a run of its own"
        )
    for kind in given.keys() & SOUNDS:
        if not os.path.isdir(given[kind]):
            raise UserError(f"--{kind} {given[kind]}: no such folder; name one with recordings")


def main(argv: list[str]) -> None:
    options = prepare_options(argv)
    datasets.disable_progress_bars()  # save_to_disk has one; ours counts rows
    # The errors of these libraries become one line of ours.
    for library in ("datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    kept, rejected = prepare(options)
    root = shown(options.data_root)
    reasons = f" (reasons in {os.path.join(root, 'rejected.csv')})" if rejected else ""
    print(f"{root}: kept {kept} rows, rejected {rejected} rows{reasons}")


if __name__ == "__main__":
    cli.run(main)
