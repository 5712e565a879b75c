"""prepare.py: what goes in comes out whole, bad rows are named and left out, bad input changes nothing."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

import prepare
import tokenizer as tk
from cli import UserError

PREPARE = Path(prepare.__file__)


def tone(seconds=0.5, rate=16000, channels=1, frequency=300.0):
    """A sine of amplitude 0.5; with two channels the second is silent."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(np.float32)
    return wave if channels == 1 else np.stack([wave, np.zeros_like(wave)], axis=1)


def write_split(folder, rows, header=("file_name", "transcription", "speaker"), rate=16000):
    """rows: (file name, text, ...) or (file name, text, ..., samples); a .wav is written for each."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            if row[0]:
                soundfile.write(folder / row[0], tone(rate=rate), rate, subtype="FLOAT", format="WAV")


@pytest.fixture
def source(tmp_path):
    src = tmp_path / "src"
    write_split(src / "train", [(f"{i}.wav", f"hello book {'abcde'[i]}", f"s{i}") for i in range(5)])
    write_split(src / "dev", [("0.wav", "hello", "s9"), ("1.wav", "book", "s9")])
    return src


def run(source, root, *more):
    options = prepare.parse(["--source", str(source), "--data_root", str(root), *more])
    return prepare.prepare(options)


def rows_of(root, split="train"):
    shards = sorted((Path(root) / split).iterdir(), key=lambda p: int(p.name))
    return [row for shard in shards for row in datasets.load_from_disk(str(shard)).with_format("numpy")]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_a_folder_becomes_shards_with_the_promised_columns(source, tmp_path):
    assert run(source, tmp_path / "root", "--shard_rows", "2") == (7, 0)
    assert sorted(os.listdir(tmp_path / "root")) == ["dev", "rejected.csv", "tokenizer.json", "train"]
    assert sorted(os.listdir(tmp_path / "root/train")) == ["0", "1", "2"]
    features = datasets.load_from_disk(str(tmp_path / "root/train/0")).features
    assert features == datasets.Features({
        "input_values": datasets.List(datasets.Value("float32")),
        "labels": {"input_ids": datasets.List(datasets.Value("int32"))}, "length": datasets.Value("int64"),
        "text": datasets.Value("string"), "speaker": datasets.Value("string")})
    tokenizer = tk.load_tokenizer(tmp_path / "root/tokenizer.json")
    rows = rows_of(tmp_path / "root")
    assert [r["text"] for r in rows] == [f"hello book {c}" for c in "abcde"]
    assert [r["speaker"] for r in rows] == [f"s{i}" for i in range(5)]
    for row in rows:
        assert row["length"] == len(row["input_values"]) == 8000
        np.testing.assert_array_equal(row["input_values"], tone())
        assert tokenizer.decode(row["labels"]["input_ids"]) == row["text"]
    assert set(tokenizer.tokens[4:]) == set("hello book abcde")  # of the train split only


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


def test_text_is_nfc_and_changes_only_where_flags_say(tmp_path):
    text = "Cafe\u0301,  DON'T\tstop - ПРИВЕТ!"
    write_split(tmp_path / "src/train", [("a.wav", text, "s")])
    expected = {(): "Caf\u00e9, DON'T stop - ПРИВЕТ!", ("--lowercase",): "caf\u00e9, don't stop - привет!",
                ("--uppercase", "--remove_punctuation"): "CAF\u00c9 DON'T STOP ПРИВЕТ"}
    for i, (flags, wanted) in enumerate(expected.items()):
        run(tmp_path / "src", tmp_path / f"root{i}", *flags)
        row = rows_of(tmp_path / f"root{i}")[0]
        assert row["text"] == wanted
        assert tk.load_tokenizer(tmp_path / f"root{i}/tokenizer.json").decode(row["labels"]["input_ids"]) == wanted


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
    np.testing.assert_array_equal(row["labels"]["input_ids"], [vocabulary[c] for c in "hello|book|a"])


def parquet_source(folder, names):
    """The layout of a hub repository: data/{split}-00000-of-00001.parquet with encoded audio, as LibriSpeech has it."""
    (folder / "data").mkdir(parents=True)
    for name in names:
        file = io.BytesIO()
        soundfile.write(file, tone(), 16000, format="FLAC")
        audio = [{"bytes": file.getvalue(), "path": f"{name}.flac"}, {"bytes": b"junk", "path": "junk.flac"}]
        features = datasets.Features({"audio": datasets.Audio(decode=False), "text": datasets.Value("string"),
                                      "speaker_id": datasets.Value("int64")})
        columns = {"audio": audio, "text": [f"IN {name}"] * 2, "speaker_id": [84, 85]}
        table = pyarrow.table(columns, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / f"data/{name}-00000-of-00001.parquet")


def test_local_parquet_is_read_like_librispeech_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ["train.clean.100", "train.clean.360", "validation.clean", "test.clean", "test.other"]
    parquet_source(tmp_path / "src", names)
    assert run(tmp_path / "src", tmp_path / "root") == (5, 5)
    texts = {split: [r["text"] for r in rows_of(tmp_path / "root", split)]
             for split in ("train", "dev", "eval_clean", "eval_other")}
    assert texts == {"train": ["IN train.clean.100", "IN train.clean.360"], "dev": ["IN validation.clean"],
                     "eval_clean": ["IN test.clean"], "eval_other": ["IN test.other"]}
    assert rows_of(tmp_path / "root")[0]["speaker"] == "84"
    np.testing.assert_allclose(rows_of(tmp_path / "root")[0]["input_values"], tone(), atol=1e-4)
    assert "junk.flac" in (tmp_path / "root/rejected.csv").read_text()


def test_a_torn_parquet_file_is_one_clear_error(tmp_path):
    parquet_source(tmp_path / "src", ["train", "test"])
    file = tmp_path / "src/data/train-00000-of-00001.parquet"
    file.write_bytes(b"PAR1" + bytes(200) + file.read_bytes()[204:])  # its first page; the footer is whole
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
    assert "train: 3 of 60 tokens are unknown" in capsys.readouterr().out


def test_split_map_takes_the_named_splits_only(tmp_path):
    parquet_source(tmp_path / "src", ["train.clean.100", "train.clean.360", "test.clean"])
    run(tmp_path / "src", tmp_path / "root", "--split_map", "train.clean.360=train", "test.clean=dev")
    assert sorted(os.listdir(tmp_path / "root")) == ["dev", "rejected.csv", "tokenizer.json", "train"]
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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_and_the_next_one_works(how, source, tmp_path):
    os.mkfifo(source / "dev/stuck.wav")  # reading it blocks: the run is stopped when train is written and dev is not
    with open(source / "dev/metadata.csv", "a") as file:
        file.write("stuck.wav,hello,s\n")
    command = [sys.executable, PREPARE, "--source", source, "--data_root", tmp_path / "root"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while not (tmp_path / ".root.partial/dev").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    if how == signal.SIGINT:  # a blocking open is retried by libsndfile: let it through
        time.sleep(0.2)
    assert not (tmp_path / "root").exists()
    process.kill()
    process.communicate()
    assert not (tmp_path / "root").exists()
    os.remove(source / "dev/stuck.wav")
    assert run(source, tmp_path / "root") == (7, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "src"]


@pytest.mark.parametrize("make, message", [
    (lambda s: s / "absent", "absent"),
    (lambda s: "no/such/folder", "no folder"),
    (lambda s: "no/such", "cannot load"),
    (lambda s: s / "train", "neither"),
    (lambda s: s / "train/0.wav", "neither"),
    (lambda s: (s / "train/metadata.csv").write_text("name,text\na,b\n") and s, "file_name"),
    (lambda s: (s / "train/metadata.csv").write_text("file_name,words\na,b\n") and s, "transcription or text"),
    (lambda s: (s / "train/metadata.csv").write_text("file_name,text\n") and s, "no rows"),
    (lambda s: (s / "train/metadata.csv").write_bytes(b"file_name,text\n\xff\xfe,b\n") and s, "UTF-8"),
    (lambda s: (s / "train").rename(s / "training").parent, "--tokenizer PATH"),
])
def test_a_bad_source_is_one_clear_error_and_writes_nothing(make, message, source, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        run(make(source), tmp_path / "root")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("argv, message", [
    (["--data_root", "r"], "--demo or --source"),
    (["--demo", "--source", "s"], "--demo or --source"),
    (["--source", "s"], "--data_root"),
    (["--demo", "--colour", "red"], "--colour"),
    (["--demo", "--shard", "5"], "--shard"),
    (["--demo", "--shard_rows", "0"], "--shard_rows"),
    (["--demo", "--vocab_size", "30"], "--vocab_size has no effect"),
    (["--demo", "--text_column", "x"], "--text_column has no effect"),
    (["--demo", "--lowercase", "--uppercase"], "not both"),
])
def test_flags_that_make_no_sense_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        prepare.parse(argv)


def test_the_command_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, PREPARE, "--source", tmp_path / "absent", "--data_root", tmp_path / "root"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "absent" in result.stderr


def test_the_last_line_counts_kept_and_rejected(source, tmp_path, capsys):
    (source / "dev/1.wav").unlink()
    prepare.main(["--source", str(source), "--data_root", str(tmp_path / "root")])
    assert "kept 6 rows, rejected 1 rows" in capsys.readouterr().out.splitlines()[-1]
