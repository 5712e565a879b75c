"""Speech and transcripts in, training data out: python prepare.py --source SRC --data_root ROOT

ROOT/{split}/{shard}/ are datasets saved with save_to_disk; a row has input_values (N,) float32 at --sample_rate,
labels {input_ids: (U,) int32}, length N, text and, where known, speaker. ROOT/tokenizer.json holds the vocabulary,
ROOT/rejected.csv the rows that could not be used, ROOT/prepare.json a sample rate other than 16 kHz. ROOT appears when
all of it is written, or not at all.
"""

import collections
import contextlib
import itertools
import logging
import os
import re
import unicodedata

import cli
from cli import UserError, option, options_class, shown

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

import files
import tokenizer as tk
from audio import read_audio
from sources import Row, SourceOptions, Split, open_source
from transforms import RATES

CONTROL = re.compile(
    "[\0-\x1f\x7f-\x9f]"
)  # after clean_text: no white space, and nothing that is said or written
# What shows nothing and is taken out of a text: soft hyphens, zero-width spaces, byte order marks,
# directions. tk.NOTHING stays where it has something beside it.
INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
LONGEST_TEXT = (
    2**16
)  # characters of a row: in an hour, the longest that audio.py reads whole, nobody says as many
QUIET = 20  # steps of 16 bits: in nothing that stays within so many is anything said
EDGE = 160  # samples: 10 ms


@options_class
class PrepareOptions(SourceOptions):
    data_root: str | None = option(None, "folder to write")
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


class BadRow(Exception):
    """Why one row cannot be used."""


# One row


def waveform_of(audio: str | bytes | None, sample_rate: int) -> np.ndarray:
    """Returns the waveform (N,) float32, mono, at `sample_rate`, of a file. Raises BadRow.

    audio: a path, or the bytes of a file.
    """
    if audio is None:
        raise BadRow("no audio")
    try:
        return read_audio(audio, sample_rate)
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
    return (
        f"silent: all samples are {middle:.4g}, give or take {level:.0f} steps of 16 bits; "
        "if it is speech, make it louder"
    )


def clean_text(text: str, options: PrepareOptions) -> str:
    """NFC with single spaces, without invisible characters; case and punctuation as the options say.
    Empty where nothing shows."""
    text = INVISIBLE.sub("", tk.normalize_text(text))
    if options.remove_punctuation:
        text = "".join(
            " " if unicodedata.category(c).startswith("P") and c not in "'\u2019" else c
            for c in text
        )
    if options.lowercase:
        text = text.replace("\u0130", "i").lower()  # of which lower() would leave a combining dot
    elif options.uppercase:
        text = text.upper()
    text = tk.normalize_text(text)
    return text if tk.NOTHING.sub("", text).strip() else ""


def make_example(row: Row, tokenizer: tk.Tokenizer, options: PrepareOptions) -> dict:
    """The row as it is written. Raises BadRow."""
    if row.reason:
        raise BadRow(row.reason)
    if len(row.text) > LONGEST_TEXT:
        raise BadRow(
            f"a text of {len(row.text)} characters; {LONGEST_TEXT} is the most: cut it into utterances"
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


# Writing


def write_split(
    name: str, parts: list[Split], folder: str, tokenizer, options, rejected: list
) -> int:
    """Writes the shards folder/0, folder/1, ...; bad rows are added to `rejected`. Returns the rows kept."""
    rows = itertools.chain.from_iterable(part.rows() for part in parts)
    bar = tqdm(rows, desc=shown(name), unit=" rows", total=sum(part.count for part in parts))
    speakers, tokens, unknown = any(part.speakers for part in parts), 0, collections.Counter()
    examples, changed, change = {}, 0, ""
    with contextlib.closing(ShardWriter(folder, options.shard_rows, speakers)) as writer:
        for row in bar:
            try:
                example = make_example(row, tokenizer, options)
            except BadRow as reason:
                rejected.append((name, row.name, str(reason)))
                continue
            writer.write(example)
            text, ids = example["text"], example["labels"]["input_ids"]
            tokens += len(tokenizer.spell(text))
            for piece in (missing := tokenizer.unknown(text)):
                unknown[piece] += 1
                examples.setdefault(piece, row.name)
            if not missing and (heard := tokenizer.decode(ids)) != text:
                changed += 1
                change = change or f"{heard[:80]!r} for {text[:80]!r} of {row.name}"
    if writer.rows == 0:
        first = next((f": {r[1]}: {r[2]}" for r in rejected if r[0] == name), "")
        raise UserError(f"split {name} has no usable row{first}; nothing was written")
    told = tk.most_frequent(unknown, examples)
    if 2 * unknown.total() > tokens:
        raise UserError(
            f"{unknown.total()} of {tokens} tokens of split {name} are unknown to "
            f"{options.tokenizer}: {told}; "
            "try --uppercase or --lowercase, or another --tokenizer"
        )
    if unknown:
        print(
            shown(
                f"{name}: {unknown.total()} of {tokens} tokens are unknown to the tokenizer: {told}"
            )
        )
    if changed:
        print(
            shown(
                f"{name}: the labels of {changed} rows say something else than their text, "
                f"because the tokenizer cannot tell it apart: {change}"
            )
        )
    return writer.rows


BATCH_ROWS, BATCH_SAMPLES = (
    100,
    2**25,
)  # written at a time: an hour of speech waits in memory, however long the rows are


class ShardWriter:
    """Streams rows into datasets of at most `shard_rows` rows; a shard's audio passes through a file, not memory."""

    def __init__(self, folder: str, shard_rows: int, speakers: bool):
        self.folder, self.shard_rows = folder, shard_rows
        columns = {
            "input_values": datasets.List(datasets.Value("float32")),
            "labels": {"input_ids": datasets.List(datasets.Value("int32"))},
            "length": datasets.Value("int64"),
            "text": datasets.Value("string"),
        }
        self._features = datasets.Features(
            columns | ({"speaker": datasets.Value("string")} if speakers else {})
        )
        self.rows = self.shards = self._waiting = 0
        self._writer, self._stream = None, f"{folder}.arrow"
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


def make_tokenizer(splits: dict[str, list[Split]], options: PrepareOptions) -> tk.Tokenizer:
    """Loads --tokenizer PATH, or trains on the text of the train split."""
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
    return (
        tk.train_char(texts)
        if options.tokenizer == "char"
        else tk.train_bpe(texts, options.vocab_size or 500)
    )


def prepare(options: PrepareOptions) -> tuple[int, int]:
    """Writes ROOT from the source. Returns the rows kept and rejected. Raises UserError, leaving ROOT as it was."""
    files.check_utf8(os.path.realpath(options.data_root), "--data_root", "Arrow")
    with files.published(
        options.data_root, "data of prepare.py", options.overwrite, (options.source,)
    ) as folder:
        splits, left_out = open_source(options)
        tokenizer = make_tokenizer(splits, options)
        rejected: list[tuple[str, str, str]] = []
        kept = sum(
            write_split(name, parts, os.path.join(folder, name), tokenizer, options, rejected)
            for name, parts in splits.items()
        )
        table = files.csv_text([("split", "file_name", "reason"), *rejected])
        files.write_whole(os.path.join(folder, "rejected.csv"), table.encode())
        if options.sample_rate != 16000:
            mark = files.json_text({"sample_rate": options.sample_rate}).encode()
            files.write_whole(os.path.join(folder, "prepare.json"), mark)
        tk.save_tokenizer(tokenizer, os.path.join(folder, "tokenizer.json"))
    if names := left_out():
        note = f"note: {options.source}: neither read nor named by a row: {names}"
        print(shown(note), flush=True)
    return kept, len(rejected)


def options_of(argv: list[str]) -> PrepareOptions:
    """Returns the options of a command line. Raises UserError where they contradict each other."""
    given = vars(cli.make_parser(__doc__, PrepareOptions).parse_args(argv))
    options = cli.build(PrepareOptions, given)
    if options.source is None:
        raise UserError(
            "give --source SRC, what to read, and --data_root ROOT, the folder to write"
        )
    if options.data_root is None:
        raise UserError("give --data_root ROOT, the folder to write")
    if "vocab_size" in given and options.tokenizer != "bpe":
        raise UserError("--vocab_size has no effect here; leave it out")
    if options.lowercase and options.uppercase:
        raise UserError("give --lowercase or --uppercase, not both")
    if options.sample_rate % 25:
        raise UserError(
            f"--sample_rate {options.sample_rate}: it must lie within {RATES[0]} .. "
            f"{RATES[1]}, in steps of 25"
        )
    return options


def main(argv: list[str]) -> None:
    options = options_of(argv)
    datasets.disable_progress_bars()  # save_to_disk's; ours counts rows
    for library in (
        "datasets",
        "huggingface_hub",
        "fsspec",
    ):  # their errors reach the user as ours, in one line
        logging.getLogger(library).setLevel(logging.CRITICAL)
    kept, rejected = prepare(options)
    root = shown(options.data_root)
    print(
        f"{root}: kept {kept} rows, rejected {rejected} rows"
        + (f" (reasons in {os.path.join(root, 'rejected.csv')})" if rejected else "")
    )


if __name__ == "__main__":
    cli.run(main)
