"""Whatever the files and the texts are, a row is written as promised or rejected with a reason, and
none is lost."""

import csv
import io
import tempfile
from pathlib import Path

from cli import UserError, shown

import datasets
import numpy as np
import pytest
import soundfile
from hypothesis import event, given
from hypothesis import strategies as st

import prepare
import sources
import tokenizer as tk
from helpers import cases

datasets.disable_progress_bars()
# Nobody could catch such an exception.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


# Any file


FORMATS = (
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "MS_ADPCM"),
    ("AIFF", "PCM_16"),
    ("CAF", "ALAC_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", None),
)
RATES = (1, 3999, 4000, 8000, 11025, 16000, 22254, 44100, 96000, 384_000, 500_000_000)
SOUNDS = {
    "noise": 0.1,
    "clipped": 10.0,
    "16 bit steps": 32768.0,
    "tiny": 1e-40,
    "loud": 1e30,
    "silence": 0.0,
}
SPOILS = (None, None, None, np.nan, np.inf, -np.inf, 3e38)


@st.composite
def files(draw):
    """Draws (content, frames at 16 kHz that it must have, or None where it may have any)."""
    rate = draw(st.sampled_from((*RATES, 16000, 16000)))
    channels = draw(st.sampled_from((1, 1, 2, 8)))
    length = draw(st.one_of(st.sampled_from((0, 1, 2)), st.integers(3, 3000), st.integers(3, 3000)))
    kind = draw(st.sampled_from([*SOUNDS, "noise", "noise"]))
    spoil = draw(st.sampled_from(SPOILS))
    samples = SOUNDS[kind] * np.random.default_rng(length).normal(0, 1, (length, channels))
    if spoil is not None and length:
        samples[draw(st.integers(0, length - 1)), 0] = spoil
    format, subtype = draw(st.sampled_from(FORMATS))
    if subtype not in (
        "FLOAT",
        "DOUBLE",
    ):  # The other encoders crash over numbers that are no sound.
        samples = np.nan_to_num(samples).clip(-1, 1)
        rate = rate if 8000 <= rate <= 48000 or format in ("WAV", "FLAC") else 16000
    file = io.BytesIO()
    try:
        soundfile.write(file, samples, rate, format=format, subtype=subtype)
    except (RuntimeError, ValueError):  # The format does not have this rate or these channels.
        return draw(st.binary(max_size=100)), None
    content = bytearray(file.getvalue())
    damage = draw(st.sampled_from((*["none"] * 6, "cut", "byte", "hole")))
    if damage == "cut":
        del content[draw(st.integers(0, len(content))) :]
    elif damage == "byte" and content:
        content[draw(st.integers(0, min(len(content), 100) - 1))] = draw(st.integers(0, 255))
    elif damage == "hole":
        start = draw(st.integers(0, len(content)))
        content[start : start + 50] = bytes(len(content[start : start + 50]))
    sound = (
        (damage, spoil) == ("none", None)
        and format in ("WAV", "FLAC")
        and subtype != "MS_ADPCM"
        and length
    )
    fine = sound and 4000 <= rate <= 384_000 and kind == "noise"
    return bytes(content), -(-length * 16000 // (round(rate / 25) * 25)) if fine else None


def check_samples(samples):
    assert (
        samples.dtype == np.float32
        and samples.ndim == 1
        and len(samples)
        and np.isfinite(samples).all()
    )


def check_reason(reason):
    assert reason and len(reason) < 300 and "object at 0x" not in reason


@cases(200)
@given(files())
def test_any_file_becomes_finite_samples_or_one_reason(file):
    content, length = file
    try:
        samples = prepare.read_audio(content)
    except UserError as error:
        check_reason(str(error))
        assert length is None, error
        event(str(error).split(":")[0])
    else:
        check_samples(samples)
        assert length in (None, len(samples))
        event("used")


# Any text


TEXTS = st.one_of(
    # No UTF-8 file holds half of a surrogate pair.
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text(" \t\n\r\0\x1c\u00a0\u200b\ufeff", max_size=4),
    st.sampled_from(["<unk>", "\u2047", "e\u0301", "\u0130I\u00df", '"', ","]),
    st.text("ab ", min_size=1, max_size=3).map(lambda text: text * 9999),
)
CHANGES = st.sampled_from([(), ("--lowercase",), ("--uppercase",), ("--remove_punctuation",)])


@cases(100)
@given(files(), TEXTS, CHANGES, st.booleans())
def test_any_row_is_written_as_promised_or_has_a_reason(file, text, flags, bpe):
    options = prepare.prepare_options(["--source", "s", "--data_root", "r", *flags])
    clean = prepare.clean_text(text, options)
    texts = [clean, "hello"]
    tokenizer = tk.train_bpe(texts, 100) if bpe else tk.train_char(texts)
    try:
        example = prepare.make_example(prepare.Row("a.wav", file[0], text, "s"), tokenizer, options)
    except prepare.BadRow as reason:
        check_reason(str(reason))
        assert file[1] is None or not clean or prepare.CONTROL.search(clean)
        return
    check_samples(example["input_values"])
    assert example["length"] == len(example["input_values"])
    assert example["text"] == tk.normalize_text(clean) == clean
    # U+2581 is the sign of byte pairs for a space.
    heard = clean.replace("\u2581", " ") if bpe else clean
    assert tokenizer.decode(example["labels"]["input_ids"]) == tk.normalize_text(heard)


# Any metadata


NAMES = st.sampled_from(
    [
        *(f"{i}.wav" for i in range(1, 9)),
        "./1.wav",
        "gone.wav",
        "",
        " ",
        ".",
        "..",
        "../../../etc/passwd",
        "/etc/passwd",
        "a\nb.wav",
        "a\0b",
        "\u00e9" * 300,
        "metadata.csv",
    ]
)
ROWS = st.lists(
    st.tuples(
        NAMES,
        TEXTS,
        st.sampled_from(["s", "", "\u00e9,\n"]),
        st.sampled_from([1, 2, 3, 3, 3, 3, 3, 5]),
    ),
    min_size=2,
    max_size=8,
)


def write_source(folder, contents, rows, bom, newline):
    folder.mkdir(parents=True)
    for i, content in enumerate(contents):
        (folder / f"{i}.wav").write_bytes(content)
    file = io.StringIO()
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=newline)
    writer.writerow(("file_name", "text", "speaker"))
    writer.writerows([*fields, "more"][:count] for *fields, count in rows)
    (folder / "metadata.csv").write_bytes(file.getvalue().encode("utf-8-sig" if bom else "utf-8"))


def good_file():
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(400)), 16000, format="WAV")
    return file.getvalue()


@cases(40)
@given(
    st.lists(files(), min_size=4, max_size=4),
    ROWS,
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\r"]),
    CHANGES,
    st.integers(1, 3),
)
def test_rows_written_and_rejected_are_the_rows_given(
    some_files, rows, bom, newline, flags, shard_rows
):
    # Bad rows alone would make no data.
    rows = [("0.wav", "hello", "s", 3), *rows]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "src")
        root = Path(folder, "root")
        write_source(
            source / "train",
            [good_file()] * 5 + [content for content, _ in some_files],
            rows,
            bom,
            newline,
        )
        options = prepare.prepare_options(
            [
                "--source",
                str(source),
                "--data_root",
                str(root),
                "--shard_rows",
                str(shard_rows),
                *flags,
            ]
        )
        kept, rejected = prepare.prepare(options)
        shards = [
            datasets.load_from_disk(str(root / "train" / str(i)))
            for i in range(-(-kept // shard_rows))
        ]
        written = [row for shard in shards for row in shard.with_format("numpy")]
        with open(root / "rejected.csv", encoding="utf-8", newline="") as file:
            reasons = list(csv.reader(file))[1:]
        tokenizer = tk.load_tokenizer(root / "tokenizer.json")
    assert len(written) == kept and len(reasons) == rejected and kept + rejected == len(rows)
    event(f"{kept} kept, {rejected} rejected")
    given_texts = [prepare.clean_text(text, options) for _, text, _, count in rows if count > 1]
    for row in written:
        check_samples(row["input_values"])
        assert row["length"] == len(row["input_values"])
        assert tokenizer.decode(row["labels"]["input_ids"]) == row["text"]
        given_texts.remove(row["text"])
    names = [shown(name) for name, *_ in rows]  # "a\nb.wav" in one line
    for split, name, reason in reasons:
        check_reason(reason)
        assert split == "train"
        names.remove(name)


@cases(100)
@given(
    st.sampled_from(
        [b"", b"file_name,text\n", b"\xef\xbb\xbffile_name,text\r\n", b"text,file_name,text\n"]
    ),
    st.one_of(st.binary(max_size=60), st.text('",\n\ra0./\0\u00e9', max_size=60).map(str.encode)),
)
def test_any_bytes_as_metadata_are_rows_or_one_clear_line(header, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metadata.csv")
        path.write_bytes(header + content)
        try:
            records = sources.read_metadata(str(path))
            found = sources.metadata_rows(sources.Folder(folder), folder, records, "text", None)
            rows = list(sources.used_once(list(found)))
        except UserError as error:
            assert str(path) in str(error)
            return
    assert len(rows) == len(records) and all(
        row.reason or row.audio.startswith(folder) for row in rows
    )
