"""prepare.py: good rows come out whole, bad rows are named and left out, bad input changes
nothing."""

import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import cli
from cli import UserError

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

import audio
import files
import prepare
import tokenizer as tk
from files import MARK
from helpers import as_program, encoded, tree

PREPARE = Path(prepare.__file__)


def tone(seconds=0.5, rate=16000, channels=1, frequency=300.0):
    """Makes a sine of amplitude 0.5; with two channels the second is silent."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(
        np.float32
    )
    return wave if channels == 1 else np.stack([wave, np.zeros_like(wave)], axis=1)


def write_split(folder, rows, header=("file_name", "transcription", "speaker"), rate=16000):
    """Writes metadata.csv, and a wav for each row (file name, text, ...) that names one."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            if row[0]:
                soundfile.write(
                    folder / row[0], tone(rate=rate), rate, subtype="FLOAT", format="WAV"
                )


@pytest.fixture
def source(tmp_path):
    src = tmp_path / "src"
    write_split(
        src / "train", [(f"{i}.wav", f"hello book {'abcde'[i]}", f"s{i}") for i in range(5)]
    )
    write_split(src / "dev", [("0.wav", "hello", "s9"), ("1.wav", "book", "s9")])
    return src


def run(source, root, *more):
    options = prepare.prepare_options(["--source", str(source), "--data_root", str(root), *more])
    return prepare.prepare(options)


def rows_of(root, split="train"):
    shards = sorted((Path(root) / split).iterdir(), key=lambda p: int(p.name))
    return [
        row for shard in shards for row in datasets.load_from_disk(str(shard)).with_format("numpy")
    ]


def test_a_folder_becomes_shards_with_the_promised_columns(source, tmp_path):
    assert run(source, tmp_path / "root", "--shard_rows", "2") == (7, 0)
    assert sorted(os.listdir(tmp_path / "root")) == [
        MARK,
        "dev",
        "rejected.csv",
        "tokenizer.json",
        "train",
    ]
    assert sorted(os.listdir(tmp_path / "root/train")) == ["0", "1", "2"]
    features = datasets.load_from_disk(str(tmp_path / "root/train/0")).features
    assert features == datasets.Features(
        {
            "input_values": datasets.List(datasets.Value("float32")),
            "labels": {"input_ids": datasets.List(datasets.Value("int32"))},
            "length": datasets.Value("int64"),
            "text": datasets.Value("string"),
            "speaker": datasets.Value("string"),
        }
    )
    tokenizer = tk.load_tokenizer(tmp_path / "root/tokenizer.json")
    rows = rows_of(tmp_path / "root")
    assert [r["text"] for r in rows] == [f"hello book {c}" for c in "abcde"]
    assert [r["speaker"] for r in rows] == [f"s{i}" for i in range(5)]
    for row in rows:
        assert row["length"] == len(row["input_values"]) == 8000
        np.testing.assert_array_equal(row["input_values"], tone())
        assert tokenizer.decode(row["labels"]["input_ids"]) == row["text"]
    assert set(tokenizer.tokens[4:]) == set("hello book abcde")  # of the train split only


def folds_of(source, tmp_path, folds):
    """Prepares every fold -> the speakers of (train, dev) of each."""
    found = []
    for fold in range(folds):
        root = tmp_path / f"root{fold}"
        run(source, root, "--folds", str(folds), "--fold", str(fold))
        found.append(
            [{row["speaker"] for row in rows_of(root, split)} for split in ("train", "dev")]
        )
    return found


def test_each_speaker_of_train_is_in_the_dev_of_one_fold_and_never_in_its_train(
    source, tmp_path, capsys
):
    found = folds_of(source, tmp_path, 3)
    everyone = {f"s{i}" for i in range(5)}
    assert all(train | dev == everyone and not train & dev for train, dev in found)
    assert sorted(speaker for _, dev in found for speaker in dev) == sorted(everyone)
    assert sorted(len(dev) for _, dev in found) == [1, 2, 2]
    assert "(the dev of the source is left out)" in capsys.readouterr().out
    tokenizer = tk.load_tokenizer(tmp_path / "root0/tokenizer.json")
    assert "a" not in tokenizer.tokens  # which only s0 says, of fold 0


def test_folds_have_about_as_many_rows():
    rows = {"a": 9, "b": 5, "c": 4, "d": 4, "e": 3, "f": 2}
    groups = prepare.share_out(rows, 3)
    assert groups == prepare.share_out(dict(reversed(rows.items())), 3)
    assert sorted(sum(rows[speaker] for speaker in group) for group in groups) == [8, 9, 10]


@pytest.mark.parametrize(
    "header, rows, flags, reason",
    [
        (("file_name", "text"), [("0.wav", "a")], "2 0", "no column speaker or speaker_id"),
        (("file_name", "text", "speaker"), [("0.wav", "a", "s")], "2 0", "only 1 speakers"),
        (("file_name", "text", "speaker"), [("0.wav", "a", "")], "2 0", "name no speaker"),
        (
            ("file_name", "text", "speaker"),
            [("0.wav", "a", " s"), ("1.wav", "a", "s ")],
            "2 0",
            "only 1 speakers",
        ),
        ((), (), "3 3", "--fold 3: it must be less"),
    ],
)
def test_folds_that_cannot_be_are_refused(tmp_path, header, rows, flags, reason):
    folds, fold = flags.split()
    if rows:
        write_split(tmp_path / "src/train", rows, header)
    with pytest.raises(UserError, match=reason) as caught:
        run(tmp_path / "src", tmp_path / "root", "--folds", folds, "--fold", fold)
    assert "\n" not in str(caught.value) and not (tmp_path / "root").exists()


def test_speaker_is_left_out_where_it_is_not_known(tmp_path):
    write_split(tmp_path / "src/train", [("a.wav", "hello")], header=("file_name", "text"))
    run(tmp_path / "src", tmp_path / "root")
    assert "speaker" not in rows_of(tmp_path / "root")[0]


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 22254, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channel_count_becomes_16_khz_mono(rate, channels, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate, channels), rate, subtype="FLOAT")
    samples = prepare.read_audio(str(tmp_path / "a.wav"))
    assert samples.dtype == np.float32 and samples.ndim == 1 and abs(len(samples) - 16000) <= 5
    middle = slice(1000, 15000)
    np.testing.assert_allclose(np.abs(samples[middle]).max(), 0.5 / channels, rtol=0.02)
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(np.argmax(spectrum) * 16000 / len(samples) - 300) < 2


def test_bad_rows_are_rejected_by_name_and_the_rest_goes_on(source, tmp_path):
    folder = source / "train"
    with open(folder / "metadata.csv", "a", newline="") as file:
        names = ["gone.wav", "empty.wav", "none.wav", "noise.wav", "nan.wav", "0.wav"]
        csv.writer(file).writerows([[n, "hi" if n != "0.wav" else " ", "s"] for n in names])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "noise.wav").write_bytes(bytes(range(256)) * 4)
    soundfile.write(folder / "none.wav", tone(0), 16000)
    soundfile.write(folder / "nan.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    assert run(source, tmp_path / "root") == (7, 6)
    with open(tmp_path / "root/rejected.csv", newline="") as file:
        rejected = {row["file_name"]: row for row in csv.DictReader(file)}
    assert sorted(rejected) == sorted(names)
    reasons = {name: row["reason"] for name, row in rejected.items()}
    assert reasons["gone.wav"] == "file missing" and reasons["0.wav"] == "empty text"
    assert reasons["none.wav"] == "no samples" and reasons["nan.wav"] == "samples are not finite"
    assert all(reasons[name].startswith("cannot be decoded") for name in ("empty.wav", "noise.wav"))
    assert {row["split"] for row in rejected.values()} == {"train"}


# Odd files


def spoiled(value, at=50):
    samples = tone()
    samples[at] = value
    return encoded(samples, subtype="FLOAT")


MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(500)
# This file was written to a pipe, where the size was not known.
STREAMED = encoded(tone())[:40] + b"\xff\xff\xff\xff" + encoded(tone())[44:]
# This file promises 2^36 - 1 samples.
UNENDING = encoded(tone(), format="FLAC")[:21] + b"\xff" * 5 + encoded(tone(), format="FLAC")[26:]
ODD = {  # name: (content, samples kept or reason)
    "8 bit.wav": (encoded(tone(), subtype="PCM_U8"), 8000),
    "24 bit.wav": (encoded(tone(), subtype="PCM_24"), 8000),
    "32 bit.wav": (encoded(tone(), subtype="PCM_32"), 8000),
    "float.wav": (encoded(tone(), subtype="FLOAT"), 8000),
    "double.wav": (encoded(tone(), subtype="DOUBLE"), 8000),
    "telephone.wav": (encoded(tone(rate=8000), rate=8000, subtype="ULAW"), 8000),
    "96 kHz.flac": (encoded(tone(rate=96000), "FLAC", "PCM_24", 96000), 8000),
    "8 channels.wav": (encoded(np.stack([tone()] * 8, axis=1)), 8000),
    "mp3 in truth.wav": (encoded(tone(), format="MP3"), 8000),
    "streamed.wav": (STREAMED, 8000),
    "scaled as 16 bit.wav": (encoded(32768 * tone(), subtype="FLOAT"), 8000),
    "one sample.wav": (encoded(tone()[50:51]), 1),
    "no byte.wav": (b"", "cannot be decoded: it has 0 bytes"),
    "text.wav": (b"hello\n" * 20, "cannot be decoded: Format not recognised."),
    "film.mp4": (MP4, "cannot be decoded: Format not recognised."),
    "film.wav": (MP4, "cannot be decoded: Format not recognised."),
    "no sample.wav": (encoded(tone(0)), "no samples"),
    "silence.wav": (encoded(0 * tone()), "silent: all samples are 0"),
    "constant.wav": (
        encoded(np.full(8000, 0.25)),
        "silent: all samples are 0.25, give or take 0 steps of 16 bits",
    ),
    "constant at 8 kHz.wav": (
        encoded(np.full(8000, -0.5), rate=8000),
        "silent: all samples are -0.5",
    ),
    "hiss.mp3": (
        encoded(np.random.default_rng(0).normal(0, 3, 8000) / 32768, format="MP3"),
        "silent: all samples are ",
    ),
    "hiss.flac": (
        encoded(np.random.default_rng(0).integers(-4, 5, 8000) / 32768, format="FLAC"),
        "silent: all samples are ",
    ),
    "hiss.wav": (
        encoded(0.1 + np.random.default_rng(0).normal(0, 3, (8000, 2)) / 32768),
        "silent: all samples are 0.0999",
    ),
    "soft.wav": (encoded(tone() / 200), 8000),
    "a word in a long silence.wav": (
        encoded(np.concatenate([np.zeros(160000), tone(0.3), np.zeros(160000)])),
        324800,
    ),
    "inverted.wav": (encoded(np.stack([tone(), -tone()], axis=1)), 8000),
    "nan.wav": (spoiled(np.nan), "samples are not finite"),
    "inf.wav": (spoiled(-np.inf), "samples are not finite"),
    "both infs.wav": (
        encoded(np.array([[np.inf, -np.inf]] * 9), subtype="FLOAT"),
        "samples are not finite",
    ),
    "loud.wav": (spoiled(3e38), "samples as large as 3e+38; full scale is 1"),
    "loud 48 kHz.wav": (
        encoded(np.full(999, -3.4e38), rate=48000, subtype="FLOAT"),
        "samples as large as 3e+38; full scale is 1",
    ),
    "1 Hz.wav": (encoded(tone(), rate=1), "sample rate 1: it must be 4000 to 384000"),
    "500 MHz.wav": (
        encoded(tone(), rate=500_000_000),
        "sample rate 500000000: it must be 4000 to 384000",
    ),
    "unending.flac": (UNENDING, "cut short: 0.5 s of 4294967.3 s"),
    "gone.wav": (None, "file missing"),
    "folder.wav": ("a folder", "no file"),
}


def rejections(root):
    with open(Path(root) / "rejected.csv", newline="") as file:
        return [(row["file_name"], row["reason"]) for row in csv.DictReader(file)]


def test_odd_files_are_used_or_rejected_with_their_reason(tmp_path):
    folder = tmp_path / "src/train"
    folder.mkdir(parents=True)
    for name, (content, _) in ODD.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content:
            (folder / name).mkdir()
    (folder / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{name},{name}\n" for name in ODD)
    )
    kept, rejected = run(tmp_path / "src", tmp_path / "root")
    lengths = {row["text"]: row["length"] for row in rows_of(tmp_path / "root")}
    reasons = dict(rejections(tmp_path / "root"))
    assert kept + rejected == len(lengths) + len(reasons) == len(ODD)
    for name, (_, expected) in ODD.items():
        got = lengths.get(name, reasons.get(name))
        assert got == expected if isinstance(expected, int) else got.startswith(expected), (
            name,
            got,
        )


@pytest.mark.parametrize(
    "format, subtype",
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAVEX", "PCM_16"),
        ("AIFF", "PCM_24"),
        ("AU", "ULAW"),
        ("FLAC", "PCM_16"),
        ("MP3", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
    ],
)
def test_a_file_that_is_cut_short_is_refused_and_the_whole_one_is_not(format, subtype):
    content = encoded(tone(2.0), format, subtype)
    assert len(prepare.read_audio(content)) == 32000
    for share in (0.8, 0.5, 0.1, 0.01):
        with pytest.raises(UserError, match="^(cut short|cannot be decoded): "):
            prepare.read_audio(content[: int(share * len(content))])


def test_many_channels_take_no_more_memory_than_one(tmp_path):
    samples = np.stack([tone(60.0)] * 8, axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="PCM_16")
    tracemalloc.start()
    try:
        waveform = prepare.read_audio(str(tmp_path / "a.wav"))
        assert tracemalloc.get_traced_memory()[1] < 2 * waveform.nbytes < samples.nbytes / 3
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(waveform, samples[:, 0], atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22254, 44100, 96000])
def test_a_long_recording_resampled_in_pieces_has_no_seams(rate, monkeypatch):
    samples = np.random.default_rng(0).normal(0, 0.1, int(7.3 * rate)).astype(np.float32)
    whole = audio.resample(samples, rate)
    monkeypatch.setattr(audio, "SECONDS", 2)
    np.testing.assert_allclose(audio.resample(samples, rate), whole, atol=1e-6)


def test_long_rows_are_written_before_they_fill_the_memory(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_SAMPLES", 15000)  # the fixture's rows have 8000
    waiting = []
    write = prepare.ShardWriter.write
    monkeypatch.setattr(
        prepare.ShardWriter,
        "write",
        lambda self, example: (
            write(self, example),
            self._writer and waiting.append(len(self._writer.current_examples)),
        ),
    )
    run(source, tmp_path / "root")
    assert waiting == [1, 0, 1, 0, 1, 0, 1]
    assert [r["text"] for r in rows_of(tmp_path / "root")] == [f"hello book {c}" for c in "abcde"]


# Odd metadata


METADATA = 'file_name,transcription,speaker\n0.wav,hello,s\n1.wav,"book, two\nlines ""quoted""",s\n'


@pytest.mark.parametrize(
    "content",
    [
        METADATA.encode("utf-8-sig"),
        METADATA.replace("\n", "\r\n").encode(),
        METADATA.replace("\n", "\n\n").encode(),
        METADATA.replace("file_name,transcription", "file_name,notes,transcription")
        .replace(".wav", ".wav,-")
        .encode(),
    ],
)
def test_bom_crlf_blank_lines_quotes_and_more_columns_make_no_difference(content, source, tmp_path):
    (source / "train/metadata.csv").write_bytes(content)
    assert run(source, tmp_path / "root") == (4, 0)
    assert [r["text"] for r in rows_of(tmp_path / "root")] == ["hello", 'book, two lines "quoted"']


def test_a_row_that_does_not_fit_its_header_is_rejected(source, tmp_path):
    (source / "train/metadata.csv").write_text(
        "file_name,text,speaker\n0.wav,hello\n1.wav,well, well,s\n2.wav\n,hi,s\n"
    )
    assert run(source, tmp_path / "root") == (3, 3)
    assert rejections(tmp_path / "root") == [
        ("1.wav", "more fields than columns; put a text with commas between quotation marks"),
        ("2.wav", "empty text"),
        ("", "no file name"),
    ]


def test_a_name_may_not_lead_out_of_the_source_but_a_link_may(source, tmp_path):
    (tmp_path / "other").mkdir()
    for place in (tmp_path / "other/0.wav", tmp_path / "src-2.wav"):
        place.write_bytes(encoded(tone()))
    (source / "train/linked").symlink_to(tmp_path / "other")
    bad = [
        "../../other/0.wav",
        "/etc/passwd",
        str(tmp_path / "other/0.wav"),
        "linked/../../../other/0.wav",
        "../../src-2.wav",
        "..",
        "../../../../../../../../etc/passwd",
    ]
    good = ["linked/0.wav", "../dev/1.wav", str(source / "dev/0.wav"), "nowhere/../0.wav"]
    (source / "train/metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{name},hello\n" for name in good + bad)
    )
    assert run(source, tmp_path / "root") == (len(good) + 2, len(bad))
    assert [name for name, _ in rejections(tmp_path / "root")] == bad
    reasons = {reason for _, reason in rejections(tmp_path / "root")}
    assert reasons == {f"lies outside {source}; move it there, or put a link to it there"}


def test_a_file_named_twice_is_used_once_and_not_at_all_where_the_texts_differ(source, tmp_path):
    rows = [
        ("0.wav", "hello"),
        ("1.wav", "one"),
        ("./0.wav", " hello "),
        ("1.wav", "two"),
        ("2.wav", ""),
        ("2.wav", "book"),
    ]
    (source / "train/metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows)
    )
    assert run(source, tmp_path / "root") == (4, 4)
    assert [r["text"] for r in rows_of(tmp_path / "root")] == ["hello", "book"]
    differ = "several rows with different texts name this file"
    same = "an earlier row with the same text names this file"
    assert rejections(tmp_path / "root") == [
        ("1.wav", differ),
        ("./0.wav", same),
        ("1.wav", differ),
        ("2.wav", "empty text"),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has no rows"),
        (b"\xef\xbb\xbf", "has no rows"),
        (
            b"file_name,text\n0.wav,ok\n1.wav,caf\xe9\n",
            r"metadata.csv is not in UTF-8: line 3 has the byte 0xe9; save it",
        ),
        ("file_name,text\n0.wav,hi\n".encode("utf-16"), "not in UTF-8: line 1 has the byte 0xff"),
        (
            b'file_name,text\n0.wav,hi\n1.wav,"hello\n2.wav,you\n',
            "from line 3 on: .* is a quotation mark left open",
        ),
        (b'file_name,text\n0.wav,"hi" he said\n', "from line 2 on"),
        (b"file_name,text,text\n0.wav,a,b\n", "two columns text"),
        (b"file_name;text\n0.wav;a\n", "no column file_name; its columns are file_name;text"),
        (b"file_name,words\n0.wav,a\n", "no column transcription or text .*--text_column"),
    ],
)
def test_metadata_that_cannot_be_read_is_one_line_that_says_where(
    content, message, source, tmp_path
):
    (source / "train/metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "root")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize(
    "columns, expected",
    [
        (
            {"audio": ["a.wav", "gone.wav", "/etc/passwd", "../a.wav", None]},
            ["file missing", "lies out", "lies out", "no audio"],
        ),
        (
            {"audio": [encoded(tone()), b"junk", b"", None]},
            ["cannot be decoded: Format", "cannot be decoded: it has", "no audio"],
        ),
        ({"audio": [1, 2]}, "--audio_column"),
        ({"audio": [[0.1], [0.2]]}, "--audio_column"),
        ({"audio": [encoded(tone())], "text": [["hello"]]}, "a list is neither text"),
        ({"audio": [encoded(tone())], "text": [b"hello"]}, "a bytes is neither text"),
    ],
)
def test_odd_parquet_columns_are_rejected_row_by_row_or_refused_in_one_line(
    columns, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.wav").write_bytes(encoded(tone()))
    table = pyarrow.table({"text": ["hello"] * len(columns["audio"]), **columns})
    pyarrow.parquet.write_table(table, tmp_path / "src/train-00000-of-00001.parquet")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            run(tmp_path / "src", tmp_path / "root")
        return
    assert run(tmp_path / "src", tmp_path / "root")[0] == 1
    reasons = [reason for _, reason in rejections(tmp_path / "root")]
    assert sorted(reason[:4] for reason in reasons) == sorted(
        e[:4] for e in expected + ["lies out"] * (len(columns["audio"]) - 1 - len(expected))
    )


def test_text_is_nfc_and_changes_only_where_flags_say(tmp_path):
    text = "Cafe\u0301,  DON'T\tstop - ПРИВЕТ!"
    write_split(tmp_path / "src/train", [("a.wav", text, "s")])
    expected = {
        (): "Caf\u00e9, DON'T stop - ПРИВЕТ!",
        ("--lowercase",): "caf\u00e9, don't stop - привет!",
        ("--uppercase", "--remove_punctuation"): "CAF\u00c9 DON'T STOP ПРИВЕТ",
    }
    for i, (flags, wanted) in enumerate(expected.items()):
        run(tmp_path / "src", tmp_path / f"root{i}", *flags)
        row = rows_of(tmp_path / f"root{i}")[0]
        assert row["text"] == wanted
        assert (
            tk.load_tokenizer(tmp_path / f"root{i}/tokenizer.json").decode(
                row["labels"]["input_ids"]
            )
            == wanted
        )


@pytest.mark.parametrize(
    "text, flags, wanted",
    [
        ("\u200b", (), ""),
        ("\ufeff \u00ad\u2060", (), ""),
        ("\u200d\ufe0f\u3164", (), ""),
        ("\u2800 \u034f", (), ""),
        ("\ufeffso\u00ad-and\u200b-so\u200e", (), "so-and-so"),
        ("e\u200b\u0301", (), "\u00e9"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", (), None),
        ("\u0915\u094d\u200d\u0937 \u2764\ufe0f", (), None),
        ("\u0130I\u0130 I\u0307 \u0131", ("--lowercase",), "iii i \u0131"),
        ("\u017e\u0117 \u0116", ("--lowercase",), "\u017e\u0117 \u0117"),
        ("stra\u00dfe i\u0307", ("--uppercase",), "STRASSE \u0130"),
        ("a\u037eb", ("--remove_punctuation",), "a b"),
    ],
)
def test_what_shows_nothing_goes_and_case_leaves_no_loose_mark(text, flags, wanted):
    options = prepare.prepare_options(["--source", "s", "--data_root", "r", *flags])
    assert prepare.clean_text(text, options) == (text if wanted is None else wanted)


def test_unknown_characters_and_labels_that_say_something_else_are_told_with_a_row(
    tmp_path, capsys
):
    rows = [
        ("a.wav", "chico bueno que chico", "s"),
        ("b.wav", "bueno \u00f1\u4e2d", "s"),
        ("c.wav", "\u4e2d\u0301 o\u2800", "s"),
    ]
    write_split(tmp_path / "src/train", rows)
    write_split(
        tmp_path / "src/dev",
        [
            (
                "d.wav",
                "bueno \u00e4\u00e4" + "".join(map(chr, range(0x4E00, 0x4E0B))) + "o" * 20,
                "s",
            )
        ],
    )
    tokens = ["<pad>", "<unk>", "|", "ch", *"bceinoqu"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    run(tmp_path / "src", tmp_path / "root", "--tokenizer", str(tmp_path / "vocab.json"))
    lines = capsys.readouterr().out.splitlines()
    assert (
        "train: 5 of 31 tokens are unknown to the tokenizer: '\u4e2d' x 2 (as in b.wav), "
        "'\u00f1' x 1 (as in b.wav), U+0301 x 1 (as in c.wav), U+2800 x 1 (as in c.wav)"
    ) in lines
    assert any(
        line.startswith("train: the labels of 1 rows say something else")
        and line.endswith("'chico bueno quechico' for 'chico bueno que chico' of a.wav")
        for line in lines
    )
    assert any(
        line.startswith(
            "dev: 13 of 39 tokens are unknown to the tokenizer: '\u00e4' x 2 (as in d.wav), "
        )
        and line.endswith(" and 2 others")
        for line in lines
    )


def test_bpe_and_a_given_tokenizer(source, tmp_path):
    run(source, tmp_path / "bpe", "--tokenizer", "bpe", "--vocab_size", "25")
    tokenizer = tk.load_tokenizer(tmp_path / "bpe/tokenizer.json")
    assert tokenizer.vocab_size == 25
    row = rows_of(tmp_path / "bpe")[0]
    assert len(row["labels"]["input_ids"]) < len(row["text"])
    assert tokenizer.decode(row["labels"]["input_ids"]) == row["text"]
    run(source, tmp_path / "same", "--tokenizer", str(tmp_path / "bpe/tokenizer.json"))
    assert tree(tmp_path / "same")["tokenizer.json"] == tree(tmp_path / "bpe")["tokenizer.json"]

    vocabulary = {"[PAD]": 14, **{c: i for i, c in enumerate("|abcdehlokxyz[")}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    run(source, tmp_path / "vocab", "--tokenizer", str(tmp_path / "vocab.json"))
    row = rows_of(tmp_path / "vocab")[0]
    np.testing.assert_array_equal(
        row["labels"]["input_ids"], [vocabulary[c] for c in "hello|book|a"]
    )


def parquet_source(folder, names):
    """Writes data/{split}-00000-of-00001.parquet with encoded audio, as LibriSpeech on the hub."""
    (folder / "data").mkdir(parents=True)
    for name in names:
        file = io.BytesIO()
        soundfile.write(file, tone(), 16000, format="FLAC")
        audio = [
            {"bytes": file.getvalue(), "path": f"{name}.flac"},
            {"bytes": b"junk", "path": "junk.flac"},
        ]
        features = datasets.Features(
            {
                "audio": datasets.Audio(decode=False),
                "text": datasets.Value("string"),
                "speaker_id": datasets.Value("int64"),
            }
        )
        columns = {"audio": audio, "text": [f"IN {name}"] * 2, "speaker_id": [84, 85]}
        table = pyarrow.table(columns, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / f"data/{name}-00000-of-00001.parquet")


def test_local_parquet_is_read_like_librispeech_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ["train.clean.100", "train.clean.360", "validation.clean", "test.clean", "test.other"]
    parquet_source(tmp_path / "src", names)
    assert run(tmp_path / "src", tmp_path / "root") == (5, 5)
    texts = {
        split: [r["text"] for r in rows_of(tmp_path / "root", split)]
        for split in ("train", "dev", "eval_clean", "eval_other")
    }
    assert texts == {
        "train": ["IN train.clean.100", "IN train.clean.360"],
        "dev": ["IN validation.clean"],
        "eval_clean": ["IN test.clean"],
        "eval_other": ["IN test.other"],
    }
    assert rows_of(tmp_path / "root")[0]["speaker"] == "84"
    np.testing.assert_allclose(rows_of(tmp_path / "root")[0]["input_values"], tone(), atol=1e-4)
    assert "junk.flac" in (tmp_path / "root/rejected.csv").read_text()


def test_a_torn_parquet_file_is_one_clear_error(tmp_path):
    parquet_source(tmp_path / "src", ["train", "test"])
    file = tmp_path / "src/data/train-00000-of-00001.parquet"
    # Its first page is damaged; the footer is whole.
    file.write_bytes(b"PAR1" + bytes(200) + file.read_bytes()[204:])
    with pytest.raises(UserError, match="split train of .* to its end"):
        run(tmp_path / "src", tmp_path / "root")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match="cannot load"):
        run(tmp_path / "src", tmp_path / "root")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_text_the_tokenizer_does_not_know_is_refused_or_counted(source, tmp_path, capsys):
    with pytest.raises(UserError, match="--uppercase"):
        tk.save_tokenizer(tk.train_char(["HELLO BOOK"]), tmp_path / "upper.json")
        run(source, tmp_path / "root", "--tokenizer", str(tmp_path / "upper.json"))
    tk.save_tokenizer(tk.train_char(["hello book abcd"]), tmp_path / "most.json")
    run(source, tmp_path / "root", "--tokenizer", str(tmp_path / "most.json"))
    assert "unknown" not in capsys.readouterr().out
    tk.save_tokenizer(tk.train_char(["hello book"]), tmp_path / "most.json")
    run(source, tmp_path / "root", "--overwrite", "--tokenizer", str(tmp_path / "most.json"))
    assert (
        "train: 3 of 60 tokens are unknown to the tokenizer: 'a' x 1 (as in 0.wav), 'c' x 1"
        in capsys.readouterr().out
    )


def test_split_map_takes_the_named_splits_only(tmp_path):
    parquet_source(tmp_path / "src", ["train.clean.100", "train.clean.360", "test.clean"])
    run(
        tmp_path / "src",
        tmp_path / "root",
        "--split_map",
        "train.clean.360=train",
        "test.clean=dev",
    )
    assert sorted(os.listdir(tmp_path / "root")) == [
        MARK,
        "dev",
        "rejected.csv",
        "tokenizer.json",
        "train",
    ]
    assert [r["text"] for r in rows_of(tmp_path / "root")] == ["IN train.clean.360"]
    with pytest.raises(UserError, match="no split nope"):
        run(tmp_path / "src", tmp_path / "other", "--split_map", "nope=train")
    with pytest.raises(UserError, match="no column words.*--text_column"):
        run(tmp_path / "src", tmp_path / "other", "--text_column", "words")


def test_data_is_replaced_only_when_asked_and_foreign_folders_never(source, tmp_path):
    root = tmp_path / "root"
    run(source, root)
    before = tree(root)
    with pytest.raises(UserError, match="--overwrite"):
        run(source, root)
    with pytest.raises(UserError, match="no usable row"):  # fails half way: the old data stays
        (source / "dev/metadata.csv").write_text("file_name,text\ngone.wav,hello\n")
        run(source, root, "--overwrite")
    assert tree(root) == before
    (source / "dev/metadata.csv").write_text("file_name,text\n0.wav,hello\n")
    assert run(source, root, "--overwrite", "--shard_rows", "3") == (6, 0)
    assert sorted(os.listdir(root / "train")) == ["0", "1"]
    (root / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        run(source, root, "--overwrite")
    assert (root / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "src"]


def start_stuck(source, root, handler=signal.SIG_DFL, how=cli.SIGNALS):
    """Starts prepare.py in a fork, which writes dev and stays in train until a signal comes.

    -> the process, and the file of its stderr.
    """
    with open(source / "train/metadata.csv", "a") as file:
        file.write("stuck.wav,hello,s\n")
    errors = source / "errors"
    decode = prepare.waveform_of

    def body():
        for number in how:
            signal.signal(number, handler)
        with open(errors, "w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)
        sys.argv = ["prepare.py", "--source", str(source), "--data_root", str(root)]
        prepare.waveform_of = lambda audio, rate: (
            time.sleep(600) if audio.endswith("stuck.wav") else decode(audio, rate)
        )
        cli.run(prepare.main)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    deadline = time.time() + 60
    while not (root.parent / f".{root.name}{files.ASIDE}/new/train.arrow").exists():
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.05)
    return process, errors


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_and_the_next_one_works(how, source, tmp_path):
    process, errors = start_stuck(source, tmp_path / "root")
    os.kill(process.pid, how)
    process.join(60)
    killed = how == signal.SIGKILL
    assert process.exitcode == (-how if killed else 128 + how)
    assert not (tmp_path / "root").exists()
    said = errors.read_text().splitlines()[-1]
    assert killed or said == f"prepare.py: interrupted ({how.name})"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".root")) == (
        [f".root{files.ASIDE}", f".root{files.ASIDE}.lock"] if killed else []
    )
    assert run(source, tmp_path / "root") == (7, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "src"]


def test_under_nohup_ignored_signals_do_nothing_and_sigterm_still_ends_it(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "DYING", 0.1)  # the first process does not end
    ignored = (signal.SIGINT, signal.SIGHUP)
    process, _ = start_stuck(source, tmp_path / "root", signal.SIG_IGN, ignored)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGHUP)
    process.join(0.5)
    assert process.is_alive()
    with pytest.raises(UserError, match="root: another process is writing there"):  # a second one
        run(source, tmp_path / "root", "--overwrite")
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_data_is_never_away_while_it_is_replaced(source, tmp_path, monkeypatch):
    """A signal at any of the steps, or a kill, leaves the old data or the new."""
    root = tmp_path / "root"
    run(source, root)
    before = tree(root)
    replace = os.replace

    def broken(old, new):
        if str(new) == str(root) and os.path.basename(old) != "old":
            raise OSError("pulled plug")
        replace(old, new)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(UserError, match="pulled plug"):
        run(source, root, "--overwrite", "--shard_rows", "2")
    assert tree(root) == before
    monkeypatch.undo()
    (tmp_path / f".root{files.ASIDE}").mkdir()
    os.replace(root, tmp_path / f".root{files.ASIDE}/old")  # killed between the two steps
    with pytest.raises(UserError, match="root exists; name another folder, or add --overwrite"):
        run(source, root)
    assert tree(root) == before and sorted(p.name for p in tmp_path.iterdir()) == ["root", "src"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: s / "absent", "absent"),
        (lambda s: "no/such/folder", "no folder"),
        (lambda s: "../such", "no folder"),  # This is no name on the hub.
        (lambda s: "no/such", "cannot load"),
        (lambda s: s / "train", "neither"),
        (lambda s: s / "train/0.wav", "neither"),
        (lambda s: (s / "train/metadata.csv").write_text("name,text\na,b\n") and s, "file_name"),
        (
            lambda s: (s / "train/metadata.csv").write_text("file_name,words\na,b\n") and s,
            "transcription or text",
        ),
        (lambda s: (s / "train/metadata.csv").write_text("file_name,text\n") and s, "no rows"),
        (
            lambda s: (s / "train/metadata.csv").write_bytes(b"file_name,text\n\xff\xfe,b\n") and s,
            "UTF-8",
        ),
        (lambda s: (s / "train").rename(s / "training").parent, "--tokenizer PATH"),
    ],
)
def test_a_bad_source_is_one_clear_error_and_writes_nothing(
    make, message, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        run(make(source), tmp_path / "root")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data_root", "r"], "give --source SRC, .* --data_root ROOT"),
        (["--source", "s"], "--data_root"),
        (["--source", "s", "--colour", "red"], "--colour"),
        (["--source", "s", "--shard", "5"], "--shard"),
        (["--source", "s", "--shard_rows", "0"], "--shard_rows"),
        (["--source", "s", "--vocab_size", "30"], "--vocab_size has no effect"),
        (["--source", "s", "--demo"], "unrecognized arguments: --demo"),
        (["--source", "s", "--lowercase", "--uppercase"], "not both"),
    ],
)
def test_flags_that_make_no_sense_are_refused(argv, message):
    more = [] if message.startswith(("give", "--data_root")) else ["--data_root", "r"]
    with pytest.raises(UserError, match=message):
        prepare.prepare_options(argv + more)


def test_the_command_exits_with_2_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    words = ["--source", tmp_path / "absent", "--data_root", tmp_path / "root"]
    status, out, err = as_program(tmp_path, PREPARE, *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and "absent" in err


def test_the_last_line_counts_kept_and_rejected(source, tmp_path, capsys):
    (source / "dev/1.wav").unlink()
    prepare.main(["--source", str(source), "--data_root", str(tmp_path / "root")])
    assert "kept 6 rows, rejected 1 rows" in capsys.readouterr().out.splitlines()[-1]
