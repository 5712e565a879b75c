"""Sources: every row that lies in a folder is kept, rejected by name, or its file is named; splits
are what their names say."""

import csv
import json
import math
import os
import unicodedata

from cli import UserError

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import sources
import tokenizer as tk
from helpers import encoded


def sound(samples=400, rate=16000):
    return encoded(0.1 * np.sin(np.arange(samples)), rate=rate)


def put(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        sound() if content is None else content.encode() if isinstance(content, str) else content
    )


def parquet(path, /, **columns):
    """Writes the columns, or two rows whose text is the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or {
        "audio": [{"bytes": sound(), "path": "a.wav"}] * 2,
        "text": [f"in {path.name}"] * 2,
    }
    with open(path, "wb") as file:
        pa.parquet.write_table(pa.table(columns), file)


@pytest.fixture
def src(tmp_path):
    (tmp_path / "src").mkdir()
    tk.save_tokenizer(
        tk.train_char(["abcdefghijklmnopqrstuvwxyz_ .0123456789"]), tmp_path / "letters.json"
    )
    return tmp_path / "src"


def run(src, *more, source=None):
    """Prepares the source. Returns ({split: texts}, {name: reason})."""
    root = src.parent / "root"
    letters = src.parent / "letters.json"
    options = prepare.prepare_options(
        [
            "--source",
            source or str(src),
            "--data_root",
            str(root),
            "--overwrite",
            "--tokenizer",
            str(letters),
            *more,
        ]
    )
    kept, _ = prepare.prepare(options)
    texts = {
        split.name: [
            text
            for shard in sorted(split.iterdir())
            for text in datasets.load_from_disk(str(shard))["text"]
        ]
        for split in sorted(root.iterdir())
        if split.is_dir()
    }
    with open(root / "rejected.csv", encoding="utf-8", newline="") as file:
        reasons = {row["file_name"]: row["reason"] for row in csv.DictReader(file)}
    assert kept == sum(map(len, texts.values()))
    return texts, reasons


def counts(texts):
    return {split: len(rows) for split, rows in texts.items()}


# Which file is whose


@pytest.mark.parametrize(
    "files, expected",
    [
        (
            "train/0 dev/0 dev_other/0 eval_clean/0 eval_other/0 podcasts/0",
            "train dev dev_other eval_clean eval_other podcasts",
        ),
        ("train extra", "train extra"),
        (
            "train-00000-of-00002 train-00001-of-00002-0a1b test-0 test_1",
            "train train eval_clean eval_clean",
        ),
        (
            "data/train-00000-of-00001 data/extra-00000-of-00001 data/validation-00000-of-00001",
            "train extra dev",
        ),
        ("clean/train.100/0000 clean/validation/0000 clean/more/0000", "train dev more"),
        ("train/part-0 train/part-1 dev/a/b/0", "train train dev"),
        ("train/dev_other_1", None),
        ("train dev/train-0", None),
        ("en/train-00000-of-00001 de/train-00000-of-00001", None),
        ("train data/train", None),
        ("train/metadata podcasts/metadata", "train podcasts"),
    ],
)
def test_parquet_files_are_the_splits_that_their_names_say(files, expected, src):
    for name in files.split():
        parquet(src / f"{name}.parquet")
    if expected is None:
        with pytest.raises(UserError, match="may belong to the split|more than once"):
            run(src)
        return
    expected = expected.split()
    assert counts(run(src)[0]) == {name: 2 * expected.count(name) for name in expected}


def test_a_split_that_is_left_out_may_have_no_text_or_be_damaged(src):
    parquet(src / "train.parquet")
    parquet(src / "unlabelled.parquet", audio=[sound()])
    put(src / "broken.parquet", "version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="unlabelled.parquet has no column .* --split_map"):
        run(src, "--split_map", "train=train", "unlabelled=dev")
    assert counts(run(src, "--split_map", "train=train")[0]) == {"train": 2}


@pytest.mark.parametrize("content", ["path,text\na.wav,x\n", b"file_name,text\na.wav,\xe9\n", ""])
def test_metadata_of_a_split_that_is_left_out_may_be_damaged(content, src):
    put(src / "train/metadata.csv", "file_name,text\na.wav,one\n")
    put(src / "train/a.wav")
    put(src / "scratch/metadata.csv", content)
    with pytest.raises(UserError, match="scratch/metadata.csv"):
        run(src)
    assert run(src, "--split_map", "train=train")[0] == {"train": ["one"]}


def test_parquet_without_columns_is_one_line(src):
    """pyarrow ends the process by SIGFPE where it is asked for a batch of no columns."""
    parquet(src / "train.parquet")
    with open(src / "dev.parquet", "wb") as file:
        pa.parquet.write_table(pa.table({}), file)
    with pytest.raises(UserError, match="dev.parquet: it has no columns"):
        run(src)


def test_files_that_others_say_are_there_and_are_not_are_told(src, capsys):
    for name in ("train-00000-of-00003", "train-00002-of-00003", "dev-00000-of-00001"):
        parquet(src / f"{name}.parquet")
    assert counts(run(src)[0]) == {"train": 4, "dev": 2}
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .startswith(f"note: of {src}/train-*-of-00003 only 2 are there")
    )
    put(src / "README.md", README.replace("a*", "[train-*, test-*]"))
    run(src)
    assert "README.md names test-* (split train), b.parquet (split train)" in (
        capsys.readouterr().out
    )


def test_joined_renamed_and_left_out_splits_are_named(src, capsys):
    for name in ("train.100", "train.360", "validation", "podcasts"):
        parquet(src / f"{name}.parquet")
    with pytest.raises(UserError, match="names a split twice"):
        run(src, "--split_map", "train.100=train", "train.100=dev")
    run(src)
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [
        f" train.100, train.360 of {src}",
        f" validation of {src}",
    ]
    assert counts(run(src, "--split_map", "train.100=train")[0]) == {"train": 2}
    assert "note: podcasts, train.360, validation of" in capsys.readouterr().out


README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: a*
- config_name: more
  data_files: [b.parquet]
---
"""


def test_of_several_configurations_one_must_be_chosen_and_the_others_are_named(src, capsys):
    for name in "abc":
        parquet(src / f"{name}.parquet")
    put(src / "README.md", README)
    with pytest.raises(UserError, match=r"--config \(default, more\)"):
        run(src)
    with pytest.raises(UserError, match="no configuration other; it has default, more"):
        run(src, "--config", "other")
    assert run(src, "--config", "more")[0] == {"train": ["in b.parquet"] * 2}
    said = capsys.readouterr().out
    assert "neither read nor named by a row: a.parquet and 1 more .parquet files" in said


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("\n", "\r"), ("---\nc", "\n ---\nc")])
def test_a_readme_is_read_whatever_its_line_ends(change, src):
    for name in "ab":
        parquet(src / f"{name}.parquet")
    put(src / "README.md", README.replace(*change))
    assert counts(run(src, "--config", "more")[0]) == {"train": 2}


@pytest.mark.parametrize(
    "pattern", ["../b.parquet", "/b.parquet", "x/../../b.parquet", "hf://datasets/a/b/c.parquet"]
)
def test_a_readme_may_not_lead_out_of_the_source(pattern, src):
    parquet(src / "a.parquet")
    parquet(src.parent / "b.parquet")
    put(src / "README.md", README.replace("b.parquet", pattern))
    with pytest.raises(UserError, match="of configuration more lies outside"):
        run(src, "--config", "default")


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "---\n: [\n---\n",
        "---\nconfigs: 3\n---\n",
        "---\nconfigs: [{config_name: a}]\n---\n",
        "---\nconfigs: [{config_name: a, data_files: [3]}]\n---\n",
        "\udcff",
    ],
)
def test_a_readme_that_says_nothing_of_files_changes_nothing(readme, src):
    parquet(src / "train.parquet")
    put(src / "README.md", readme.encode(errors="surrogateescape"))
    assert counts(run(src)[0]) == {"train": 2}


def test_folders_and_files_that_no_row_names_are_named(src, capsys):
    put(src / "train/metadata.csv", "file_name,text\na.wav,hello\n")
    for name in (
        "train/a.wav",
        "train/b.wav",
        "train/c.wav",
        "other/d.mp3",
        "other/.hidden.wav",
        "train.csv",
        "LICENSE",
    ):
        put(src / name)
    parquet(src / "dev/0.parquet")
    (src / "eval_clean").mkdir()
    assert counts(run(src)[0]) == {"train": 1, "dev": 2}
    assert capsys.readouterr().out == (
        f"note: {src}: neither read nor named by a row: other/d.mp3, train/b.wav and 1 more .wav "
        "files in train, train.csv, eval_clean/ (empty)\n"
    )


def test_audio_without_metadata_is_refused_with_what_to_do(src):
    put(src / "train/a.wav")
    put(src / "train/b.wav")
    with pytest.raises(UserError, match="only train/a.wav and 1 more .wav files in train; lay"):
        run(src)


@pytest.mark.parametrize(
    "content, file",
    [
        ("file_name,text,split\na.wav,one,train\nx/b.wav,two,validation\n", "metadata.csv"),
        ("file_name,text\ntrain/a.wav,one\ndev/b.wav,two\n", "metadata.csv"),
        ("file_name,text\ndata/train/a.wav,one\ndata/dev/b.wav,two\n", "metadata.csv"),
        (
            '{"file_name": "train/a.wav", "text": "one"}\n'
            '{"file_name": "dev/b.wav", "text": "two"}\n',
            "metadata.jsonl",
        ),
        ('file_name, text, split\n a.wav, "one", train\nx/b.wav, "two", dev\n', "metadata.csv"),
        (
            "\n\nfile_name,text,split\ntrain/a.wav,one,train\ndev/b.wav,two,dev\n",
            "data/metadata.csv",
        ),
        ("file_name,text\ntrain/a.wav,one\ndev/b.wav,two\n", "data/metadata.csv"),
    ],
)
def test_metadata_at_the_top_says_by_column_or_folder_whose_its_rows_are(content, file, src):
    for name in (
        "a.wav",
        "x/b.wav",
        "train/a.wav",
        "dev/b.wav",
        "data/train/a.wav",
        "data/dev/b.wav",
    ):
        put(src / name)
    put(src / file, content)
    assert run(src) == ({"train": ["one"], "dev": ["two"]}, {})


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "file_name,text\na.wav,one\n",
            "neither a column split nor names that begin with a split's folder",
        ),
        ("file_name,text\nclips/a.wav,one\n", "neither a column split"),
        ("file_name,text\ntrain/a.wav,one\nb.wav,two\n", "row 2 names no split"),
        ("file_name,text,split\na.wav,one,train\nb.wav,two,\n", "row 2 names no split"),
        ("file_name,text,split\na.wav,one,../train\n", "a split cannot be called '../train'"),
        (
            "file_name,text,split\na.wav,one,prepare.json\n",
            "a split cannot be called 'prepare.json'",
        ),
        ("file_name,text,split\na.wav,one,de\0v\n", r"a split cannot be called 'de\\x00v'"),
        ("file_name,text,split\na.wav,one,a::b\n", "a split cannot be called 'a::b'"),
    ],
)
def test_metadata_at_the_top_that_does_not_say_it_is_refused(content, message, src):
    put(src / "metadata.csv", content)
    with pytest.raises(UserError, match=message):
        run(src)


def test_a_text_with_a_comma_costs_its_own_row_alone_where_a_column_names_the_split(src):
    for name in "abcd":
        put(src / f"{name}.wav")
    rows = "a.wav,hello, world,train\nb.wav,one,train\nc.wav,two,dev\nd.wav,hello, test,dev\n"
    put(src / "metadata.csv", f"file_name,text,split\n{rows}")
    texts, reasons = run(src)
    assert texts == {"train": ["one"], "dev": ["two"]}
    assert all("more fields than columns" in reasons[f"{name}.wav"] for name in "ad")
    put(src / "metadata.csv", "file_name,text,split\na.wav,hello, world,train\n")
    with pytest.raises(UserError, match="no usable row"):
        run(src)


def test_a_column_split_may_not_say_otherwise_than_the_folder(src):
    put(src / "train/a.wav")
    for names in ["train", ""], ["train", "extra"]:
        rows = "".join(f"a.wav,one,{name}\n" for name in names)
        put(src / "train/metadata.csv", f"file_name,text,split\n{rows}")
        assert counts(run(src)[0]) == {"train": 1}
    shifted = "file_name,text,split\na.wav,one,train\na.wav,two,test,train\n"  # a text with a comma
    put(src / "train/metadata.csv", shifted)
    put(src / "eval_other/a.wav")
    put(src / "eval_other/metadata.csv", "file_name,text,split\na.wav,one,test\n")
    assert counts(run(src)[0]) == {"train": 1, "eval_other": 1}
    put(src / "train/metadata.csv", "file_name,text,split\na.wav,one,train\nb.wav,two,test\n")
    with pytest.raises(UserError, match="b.wav is of split test by the column split and of train"):
        run(src)


def test_nan_is_no_text_and_no_speaker(src):
    rows = [
        {"file_name": f"{name}.wav", "text": text, "speaker": math.nan}
        for name, text in (("a", "one"), ("b", math.nan))
    ]
    for row in rows:
        put(src / "train" / row["file_name"])
    put(src / "train/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert run(src) == ({"train": ["one"]}, {"b.wav": "empty text"})
    with pytest.raises(UserError, match="name no speaker"):
        run(src, "--folds", "2", "--fold", "0")


def test_a_text_beyond_all_measure_costs_its_own_row_alone(src):
    for name in "ab":
        put(src / f"train/{name}.wav")
    put(src / "train/metadata.csv", f"file_name,text\na.wav,{'a' * 200_000}\nb.wav,two\n")
    texts, reasons = run(src)
    assert texts == {"train": ["two"]} and "a text of 200000 characters" in reasons["a.wav"]


def test_folders_whose_metadata_have_the_same_splits_are_not_mixed(src):
    for name in ("en", "de"):
        put(src / name / "metadata.csv", "file_name,text,split\na.wav,one,train\n")
        put(src / name / "a.wav")
    with pytest.raises(UserError, match=r"the split train more than once, .* --config \(de, en\)"):
        run(src)
    assert counts(run(src, "--config", "en")[0]) == {"train": 1}


def test_each_split_may_have_its_own_kind_of_table_but_only_one(src):
    put(src / "train/metadata.csv", "file_name,text\na.wav,one\n")
    put(
        src / "dev/metadata.jsonl",
        '{"file_name": "a.wav", "text": "two", "speaker": 3}\n\n'
        '{"file_name": "b.wav", "text": null}\n',
    )
    for name in ("train/a.wav", "dev/a.wav", "dev/b.wav"):
        put(src / name)
    parquet(src / "podcasts/0.parquet")
    texts, reasons = run(src)
    assert counts(texts) == {"train": 1, "dev": 1, "podcasts": 2}
    assert reasons == {"b.wav": "empty text"}
    for second in ("train/metadata.jsonl", "train/more/0.parquet"):
        put(src / second, '{"file_name": "a.wav", "text": "one"}')
        with pytest.raises(
            UserError, match="split train has .*metadata.csv and .*; take one of them away"
        ):
            run(src)
        (src / second).unlink()


def test_nested_metadata_belongs_to_its_split_and_a_file_is_used_once_there(src):
    put(src / "train/metadata.csv", "file_name,text\na.wav,one\nb.wav,three\n")
    put(src / "train/old/metadata.csv", "file_name,text\n../a.wav,one\nc.wav,two\n../b.wav,four\n")
    for name in ("train/a.wav", "train/b.wav", "train/old/c.wav"):
        put(src / name)
    differ = "several rows with different texts name this file"
    same = "an earlier row with the same text names this file"
    reasons = {"../a.wav": same, "b.wav": differ, "../b.wav": differ}
    assert run(src) == ({"train": ["one", "two"]}, reasons)


def test_links_are_followed_but_not_in_circles(src, tmp_path):
    put(tmp_path / "real/metadata.csv", "file_name,text\na.wav,one\n")
    put(tmp_path / "real/a.wav")
    for name in ("train", "dev"):
        (src / name).symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(src)
    assert run(src) == ({"train": ["one"], "dev": ["one"]}, {})


# Cells of parquet files


@pytest.mark.parametrize("column", ["audio", "path", "file_name", "words"])
def test_paths_are_found_beside_their_parquet_file_and_from_the_source_on(column, src):
    put(src / "train/wavs/a.wav")
    put(src / "b.wav")
    put(src / "elsewhere/c.wav")
    names = ["wavs/a.wav", "b.wav", "c.wav", "gone.wav", "", None, "../../x.wav", "/etc/passwd"]
    parquet(src / "train/0.parquet", **{column: names, "text": [f"text {i}" for i in range(8)]})
    texts, reasons = run(src, *(["--audio_column", column] if column == "words" else []))
    out = f"lies outside {src}; move it there, or put a link to it there"
    assert texts == {"train": ["text 0", "text 1"]} and reasons == {
        "c.wav": "file missing; there is ../elsewhere/c.wav",
        "gone.wav": "file missing",
        "row 4": "no audio",
        "row 5": "no audio",
        "../../x.wav": out,
        "/etc/passwd": out,
    }


def strings(content, cut):
    """Makes two strings of any bytes."""
    places = pa.array([0, cut, len(content)], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(2, places, pa.py_buffer(content))


def test_names_in_parquet_need_not_be_in_utf_8_but_texts_must(src):
    put(src / "caf\udce9.wav")
    names = strings(b"caf\xe9.wavgone.wav", 8)
    parquet(src / "train.parquet", audio=names, text=["one", "two"])
    assert run(src) == ({"train": ["one"]}, {"gone.wav": "file missing"})
    parquet(src / "train.parquet", audio=names, text=strings(b"on\xe9two", 3))
    with pytest.raises(UserError, match="train.parquet is not in UTF-8: .*on.xe9"):
        run(src)


@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.timestamp("ms", "Nowhere/City")], ids=str)
def test_a_speaker_that_python_cannot_say_is_one_line(kind, src):
    sounds = [{"bytes": sound(), "path": "a.wav"}]
    parquet(src / "train.parquet", audio=sounds, text=["one"], speaker=pa.array([10**16], kind))
    with pytest.raises(UserError, match="train.parquet: a text or a speaker cannot be read"):
        run(src)


def test_arrays_with_their_rate_are_read_without_a_decoder(src):
    wave = np.float32(0.1) * np.sin(np.arange(800, dtype=np.float32))
    arrays = [
        (wave, 16000),
        (wave, 8000),
        (wave[:0], 16000),
        (None, 16000),
        (wave, None),
        (wave * np.nan, 16000),
        (wave, 3),
    ]
    kind = pa.struct(
        {"array": pa.list_(pa.float32()), "sampling_rate": pa.int64(), "path": pa.string()}
    )
    audio = pa.array(
        [
            {"array": array, "sampling_rate": rate, "path": f"{i}.wav"}
            for i, (array, rate) in enumerate(arrays)
        ],
        kind,
    )
    parquet(src / "train.parquet", audio=audio, text=["hello"] * len(arrays))
    audio = [{"bytes": sound(), "path": None}, {"bytes": None, "path": None}]
    parquet(src / "dev.parquet", audio=audio, text=["hello"] * 2)
    parquet(src / "podcasts.parquet", audio=[sound(), None], text=["hello"] * 2)
    texts, reasons = run(src)
    assert counts(texts) == {"train": 2, "dev": 1, "podcasts": 1}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "2.wav": "no samples",
        "3.wav": "file missing",
        "4.wav": "cannot be decoded",
        "5.wav": "samples are not finite",
        "6.wav": "sample rate 3",
        "row 1": "no audio",
    }
    rows = datasets.load_from_disk(str(src.parent / "root/train/0")).with_format("numpy")
    np.testing.assert_array_equal(rows[0]["input_values"], wave)
    assert rows[1]["length"] == 1600


@pytest.mark.parametrize("kind, scale", [("int16", 2**15), ("int32", 2**31), ("float64", 1)])
def test_arrays_of_whole_numbers_are_samples_of_so_many_bits(kind, scale, src):
    wave = np.array([0.5, -0.25, 0.125])
    kind = pa.struct({"array": pa.list_(pa.from_numpy_dtype(kind)), "sampling_rate": pa.float64()})
    audio = pa.array(
        [{"array": list(map(int if scale > 1 else float, wave * scale)), "sampling_rate": 16000.0}],
        kind,
    )
    parquet(src / "train.parquet", audio=audio, text=["hello"])
    run(src)
    rows = datasets.load_from_disk(str(src.parent / "root/train/0"))
    assert rows[0]["input_values"] == list(wave)


def test_parquet_of_several_row_groups_is_read_to_its_end(src):
    texts = pa.array([f"row {i}" for i in range(70)])
    table = pa.table({"audio": [sound()] * 70, "text": texts.dictionary_encode()})
    pa.parquet.write_table(table, src / "train.parquet", row_group_size=20)
    assert run(src)[0] == {"train": [f"row {i}" for i in range(70)]}


def test_what_the_hub_sends_is_read_the_same_way(src, monkeypatch):
    features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
    audio = [{"bytes": sound(), "path": "a.wav"}, {"bytes": None, "path": None}]
    table = pa.table({"audio": audio, "text": ["one", "two"]}, schema=features.arrow_schema)
    data = datasets.DatasetDict(
        {name: datasets.Dataset(table) for name in ("train.clean.100", "test")}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: data)
    texts, reasons = run(src, source="some/where")
    assert texts == {"train": ["one"], "eval_clean": ["one"]} and reasons == {"row 1": "no audio"}


# Metadata that is read otherwise than it was meant


SWALLOWED = {  # content: lines
    'file_name,text\n0.wav,a\n1.wav,"hello\n2.wav,b\n3.wav,c\n4.wav,bye"\n5.wav,d\n': "3 to 6",
    'file_name,text\r\n0.wav,a\r\n1.wav,"hello\r\n2.wav,bye"\r\n': "3 to 4",
    'file_name,text,speaker\n1.wav,"hello,anna\n2.wav,bye",anna\n': "2 to 3",
    'text,file_name\na,0.wav\n"hello,1.wav\nbye",2.wav\n': "3 to 4",
    # One record, with a field too many, holds two rows.
    'file_name,text\n1.wav,"hello\n2.wav",bye\n': "2 to 3",
    'text,file_name\nhello,"1.wav\nbye",2.wav\n': "2 to 3",
    '"file_name",text\n"1.wav,hello\n2.wav",bye\n': "2 to 3",
    'file_name,text\n1.wav,"hello\ngone.flac,yes\nbye"\n': "2 to 4",
    'file_name,text\n1.wav,"hello\ngone.xyz,yes\n2.wav,bye"\n': "2 to 4",
    'speaker,text,file_name\na,hi,"1.wav\na",bye,2.wav\n': "2 to 3",
    'file_name,text,"speaker\n1.wav,hello,anna\n2.wav,hi,ben"\n3.wav,bye,eve\n': "1 to 3",
}


@pytest.mark.parametrize("content", SWALLOWED)
def test_rows_that_a_stray_quotation_mark_swallows_are_told_with_their_lines(content, src):
    for i in range(6):
        put(src / f"train/{i}.wav")
    put(src / "train/metadata.csv", content)
    with pytest.raises(UserError, match=f"lines {SWALLOWED[content]} .* a row of its own"):
        run(src)


def test_a_text_of_two_lines_may_have_a_word_that_is_an_ending(src):
    for name in "ab":
        put(src / f"train/{name}.wav")
    two = '"We stood there.\nRaise your hand. Wave, she said."'
    put(src / "train/metadata.csv", f"file_name,text\na.wav,{two}\nb.wav,bye\n")
    assert counts(run(src)[0]) == {"train": 2}


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.permutations(["file_name", "text", "speaker"]),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
)
def test_wherever_stray_quotation_marks_stand_no_row_is_lost(columns, newline, places):
    rows = [
        dict(zip(columns, columns)),
        *({"file_name": f"{i}.wav", "text": f"text {i}", "speaker": "anna"} for i in range(6)),
    ]
    content = newline.join(",".join(row[column] for column in columns) for row in rows)
    starts = [0, *(i + 1 for i, c in enumerate(content) if c in ",\n")]
    for place in places:  # Half of them are where a field begins.
        place = starts[place % len(starts)] if place % 2 else place
        content = content[:place] + '"' + content[place:]
    try:
        columns, records = sources.read_csv("metadata.csv", content)
    except UserError:
        return
    assert "file_name" not in columns or sum(any(row.values()) for row in records) == 6


def test_a_text_may_have_line_breaks_and_commas(src):
    put(
        src / "train/metadata.csv",
        'file_name,text,speaker\n0.wav,"one, two, three\nfour, five, six\n\nseven.",s\n1.wav,a,s\n',
    )
    for i in range(2):
        put(src / f"train/{i}.wav")
    assert run(src) == ({"train": ["one, two, three four, five, six seven.", "a"]}, {})


@pytest.mark.parametrize("divider", [";", "\t", "|"])
def test_another_divider_than_the_comma_is_told(divider, src):
    put(src / "train/metadata.csv", f"file_name{divider}text\n0.wav{divider}a\n")
    with pytest.raises(UserError, match="they seem to be divided by .*; save it with commas"):
        run(src)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"file_name": "a.wav", "text": "a"}\nnonsense\n', "line 2 is no JSON object"),
        ('{"file_name": "a.wav", "text": "a"}\n[1]\n', "line 2 is no JSON object"),
        ('{"file_name": "a.wav", "text": "\\ud83d"}\n', "line 1 is no JSON object in Unicode"),
        ("[" * 99999, "line 1 is no JSON object"),
        ('{"file_name": "a.wav", "text": "a", "text": "b"}\n', "a key of file_name, text twice"),
        ('{"text": "a"}\n', "no column file_name; its columns are text"),
        ('{"file_name": "a.wav"}\n', "no column transcription or text"),
        ('{"file_name": "a.wav", "text": ["a"]}\n', "metadata.jsonl: a list is neither text"),
        ('\n{"file_name": ["a.wav"], "text": "a"}\n', "line 2: a list is neither text"),
        ("\n", "no rows"),
        (b"\xff", "UTF-8: line 1 .* if it is in LATIN1"),
        ("a".encode("utf-16"), "line 1 .* if it is in UTF-16"),
    ],
)
def test_jsonl_that_cannot_be_read_is_one_line_that_says_where(content, message, src):
    put(src / "train/metadata.jsonl", content)
    with pytest.raises(UserError, match=message):
        run(src)


# Names of files


def test_a_name_composed_otherwise_is_the_same_and_other_near_misses_are_named(src):
    nfd, nfc = (unicodedata.normalize(form, "caf\u00e9.wav") for form in ("NFD", "NFC"))
    for name in (nfd, "x.WAV", "d/y.wav", "Z.wav", "deep/q.wav"):
        put(src / "train" / name)
    names = [nfc, "x.wav", "d\\y.wav", "z.wav", "q.wav", "gone.wav", "Z.wav "]
    put(
        src / "train/metadata.csv",
        "file_name, text\n" + "".join(f"{name}, text {i}\n" for i, name in enumerate(names)),
    )
    missing = "file missing; there is "
    assert run(src) == (
        {"train": ["text 0"]},
        {
            "x.wav": missing + "x.WAV",
            "d\\y.wav": missing + "d/y.wav",
            "z.wav": missing + "Z.wav",
            "q.wav": missing + "deep/q.wav",
            "gone.wav": "file missing",
            "Z.wav ": missing + "Z.wav",
        },
    )


def test_of_two_files_with_one_name_the_one_that_is_spelled_alike_is_used(src):
    nfd, nfc = (unicodedata.normalize(form, "caf\u00e9.wav") for form in ("NFD", "NFC"))
    put(src / "train" / nfd, sound(500))
    put(src / "train" / nfc, sound(600))
    put(src / "train/metadata.csv", f"file_name,text\n{nfc},long\n{nfd},short\n")
    assert run(src) == ({"train": ["long", "short"]}, {})
    rows = datasets.load_from_disk(str(src.parent / "root/train/0"))
    assert rows["length"] == [600, 500]


def test_names_in_latin_1_disturb_nothing(src):
    good = "caf\udce9.wav"
    bad = "a\udce9/b.wav"
    other = "\udcfc.wav"
    for name in (good, bad, other):
        put(src / "train" / name, None if name != bad else "no sound")
    rows = [
        {"file_name": name, "text": f"text {i}"} for i, name in enumerate((good, bad, "\u00fc.wav"))
    ]
    put(src / "train/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    parquet(src / "dev\udce9/0.parquet")
    with pytest.raises(UserError, match="a split cannot be called 'dev.udce9'"):
        run(src)
    with pytest.raises(UserError, match="not in UTF-8.*another --data_root"):
        prepare.main(["--source", str(src), "--data_root", str(src.parent / "r\udce9")])
    texts, reasons = run(src, "--split_map", "train=train", "dev\udce9=dev")
    assert counts(texts) == {"train": 1, "dev": 2}
    assert reasons == {
        "a\\udce9/b.wav": "cannot be decoded: Format not recognised.",
        "\u00fc.wav": "file missing; there is \\udcfc.wav",
    }


# Any folder


NAMES = ("dev", "dev_other", "eval_clean", "eval_other", "podcasts", "2024", "a b")
KINDS = ("metadata.csv", "metadata.jsonl", "train.parquet", "part-0.parquet", "shards")


@st.composite
def folders(draw):
    """Draws {split: (kind, [the rows of each file], how many files no row names)}.

    A row is good, missing or without text.
    """
    splits = ["train", *draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))]
    rows = st.lists(
        st.sampled_from(["good", "good", "missing", "empty"]), min_size=1, max_size=3
    ).map(lambda r: ["good", *r])
    files = st.tuples(
        st.sampled_from(KINDS), st.lists(rows, min_size=1, max_size=2), st.integers(0, 2)
    )
    return {split: draw(files) for split in splits}


def write_table(path, kind, split, number, rows):
    """Writes metadata or parquet and the files. Returns the texts that must come out."""
    names = [f"{number}-{i}.wav" for i in range(len(rows))]
    texts = ["" if row == "empty" else f"{split} {number} {i}" for i, row in enumerate(rows)]
    for name, row in zip(names, rows):
        if row != "missing":
            put(path.parent / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "metadata.csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([("file_name", "text"), *zip(names, texts)])
    elif kind == "metadata.jsonl":
        path.write_text(
            "".join(
                json.dumps({"text": text, "file_name": name}) + "\n"
                for name, text in zip(names, texts)
            )
        )
    else:
        parquet(path, file_name=names, text=texts)
    return [text for text, row in zip(texts, rows) if row == "good"]


def place(above, kind, split, number, count):
    """Returns where file `number` of `count` of a split may lie."""
    if kind == "shards":
        return above / f"{split}-{number:05d}-of-{count:05d}.parquet"
    if kind.startswith("metadata"):
        return above / split / (str(number) if number else "") / kind
    return (
        above
        / split
        / (f"{number}-{kind}" if number and kind != "train.parquet" else f"{number}.parquet")
    )


@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(folders(), st.sampled_from(["", "data"]))
def test_rows_kept_and_rejected_are_the_rows_of_all_files_and_the_other_files_are_named(
    tmp_path_factory, layout, above
):
    src = tmp_path_factory.mktemp("any") / "src"
    tk.save_tokenizer(
        tk.train_char(["abcdefghijklmnopqrstuvwxyz_ 0123456789"]), src.parent / "letters.json"
    )
    expected = {}
    total = 0
    unnamed = 0
    for split, (kind, files, others) in layout.items():
        expected[split] = []
        for number, rows in enumerate(files):
            path = place(src / above, kind, split, number, len(files))
            expected[split] += write_table(path, kind, split, f"{split}{number}", rows)
            total += len(rows)
        for i in range(others):
            put(src / above / f"others of {split}" / f"{i}.ogg")
        unnamed += others
    root = src.parent / "root"
    options = prepare.prepare_options(["--source", str(src), "--data_root", str(root)])
    folder = sources.Folder(str(src))
    found = sources.select_splits(sources.folder_source(folder, options), options)
    rows = {split: [row for part in parts for row in part.rows()] for split, parts in found.items()}
    counted = sum(part.count for parts in found.values() for part in parts)
    assert sum(map(len, rows.values())) == counted == total
    assert {
        split: sorted(
            row.text for row in read if row.text and not row.reason and os.path.isfile(row.audio)
        )
        for split, read in rows.items()
    } == {split: sorted(texts) for split, texts in expected.items()}
    assert len(set(folder.files) - folder.read) == unnamed
    assert bool(folder.left_out()) == bool(unnamed)
    assert sum(len(texts) for texts in run(src)[0].values()) == sum(map(len, expected.values()))
