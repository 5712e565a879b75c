"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import io
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile

import audio
import cli
import containers
import datamodule
import prepare
import sources

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 6 * 2**30  # bytes of address space; torch and datasets alone take 3 to 4
DEADLINE = 60  # seconds


def limited(*command, memory=MEMORY, deadline=DEADLINE, **kwargs) -> subprocess.CompletedProcess:
    """python COMMAND, with little memory and time."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (deadline, deadline))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run([sys.executable, *map(str, command)], cwd=kwargs.pop("cwd", ROOT), preexec_fn=limit, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=4 * deadline, env=environment, **kwargs)


def refused(*command, **kwargs) -> str:
    """The one line that `limited` refuses with."""
    done = limited(*command, **kwargs)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    *notes, line = done.stderr.strip().splitlines()
    assert ": error: " in line and len(line) < 2000, done.stderr[-2000:]
    return line


def tree(folder) -> dict:
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------ writing without destroying


# ------------------------------------------------------------------------------------- files that promise too much


def saved(folder, state=(), packed=None, **columns) -> Path:
    """A shard as save_to_disk leaves it, of three rows; with other columns, or more in its state.json."""
    rows = {"input_values": pa.array([[0.1, 0.2], [0.3], [0.4]], pa.list_(pa.float32())),
            "labels": pa.array([[3], [4, 5], [3]], pa.list_(pa.int32())), "text": pa.array(["a", "b", "c"])}
    table = pa.table(rows | columns)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(table.schema))
    info.write_to_directory(str(folder))
    with pa.ipc.new_stream(f"{folder}/data-00000-of-00001.arrow", table.schema,
                           options=pa.ipc.IpcWriteOptions(compression=packed)) as file:
        file.write_table(table)
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(state)))
    return folder


OFFSETS = {"input_values": [0, 2, 3, 4], "labels": [0, 1, 3, 4], "text": [0, 1, 2, 3]}


def test_a_shard_as_it_should_be_is_read(tmp_path):
    assert len(datamodule.load_shard(saved(tmp_path / "0"))[0]) == 3


@pytest.mark.parametrize("offsets", [[0, 2**30, 3, 4], [0, 3, 1, 4], [-(2**30), 1, 3, 4], [0, 1, 3, 2**31 - 1]])
@pytest.mark.parametrize("column", OFFSETS)
def test_offsets_that_lead_out_of_a_shard_are_refused(column, offsets, tmp_path):
    data = saved(tmp_path / "0") / "data-00000-of-00001.arrow"
    right, wrong = (np.array(numbers, np.int32).tobytes() for numbers in (OFFSETS[column], offsets))
    assert data.read_bytes().count(right) == 1
    data.write_bytes(data.read_bytes().replace(right, wrong))
    with pytest.raises(cli.UserError, match="0: cannot be read as a dataset .*[Oo]ffset"):
        datamodule.load_shard(tmp_path / "0")


@pytest.mark.parametrize("name", ["/dev/zero", "../other/data-00000-of-00001.arrow", "a/../../b.arrow", "pipe", "zeros", "none"])
def test_a_shard_is_read_from_its_own_files_alone(name, tmp_path):
    shard = saved(tmp_path / "0", state={"_data_files": [{"filename": name}]})
    saved(tmp_path / "other")
    os.mkfifo(shard / "pipe")
    os.symlink("/dev/zero", shard / "zeros")
    with pytest.raises(cli.UserError, match="0: cannot be read as a dataset .its state.json names .*, which"):
        datamodule.load_shard(shard)


def test_a_shard_may_be_a_link_to_another_disk(tmp_path):
    shard = saved(tmp_path / "0")
    os.rename(shard / "data-00000-of-00001.arrow", tmp_path / "elsewhere.arrow")
    os.symlink(tmp_path / "elsewhere.arrow", shard / "data-00000-of-00001.arrow")
    assert len(datamodule.load_shard(shard)[0]) == 3


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"features": {"a": %s1%s}}' % ('[' * 900, ']' * 900),
                                  '{"_data_files": [{"filename": 1}], "features": {"a": {"_type": "Nothing"}}}', "pipe"])
def test_what_a_shard_says_of_itself_is_read_within_bounds(name, text, tmp_path):
    shard = saved(tmp_path / "0")
    (shard / name).write_text(text)
    if text == "pipe":
        os.remove(shard / name)
        os.mkfifo(shard / name)
    with pytest.raises(cli.UserError, match="0: cannot be read as a dataset"):
        datamodule.load_shard(shard)


@pytest.mark.parametrize("packed", ["zstd", "lz4"])
def test_a_packed_shard_is_refused(packed, tmp_path):
    with pytest.raises(cli.UserError, match="is packed"):
        datamodule.load_shard(saved(tmp_path / "0", packed=packed))


def test_rows_without_bytes_are_refused(tmp_path):
    def nothing(kind):
        return pa.FixedSizeListArray.from_buffers(pa.list_(kind, 0), 2**31 - 1, [None], children=[pa.array([], kind)])
    none = pa.Array.from_buffers(pa.null(), 2**31 - 1, [None])
    with pytest.raises(cli.UserError, match="promises 2147483647 rows"):
        datamodule.load_shard(saved(tmp_path / "0", input_values=nothing(pa.float32()), labels=nothing(pa.int32()), text=none))


NOISE = np.random.default_rng(0).normal(0, 0.1, (16000, 2)).astype(np.float32)


def sound_file(samples=NOISE, rate=16000, kind="WAV", **how) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **how)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2])
def test_of_a_recording_that_is_too_long_no_more_is_decoded(channels, monkeypatch):
    monkeypatch.setattr(audio, "LONGEST", 1)
    blocks, decoded = audio.blocks_of, []
    monkeypatch.setattr(audio, "blocks_of", lambda *given: (decoded.append(len(b)) or b for b in blocks(*given)))
    assert len(audio.read_audio(sound_file(NOISE[:, :channels], kind="FLAC"))) == 16000
    decoded.clear()
    with pytest.raises(cli.UserError, match="longer than 1 s; cut it"):
        audio.read_audio(sound_file(np.tile(NOISE[:, :channels], (20, 1)), kind="FLAC"))
    assert sum(decoded) <= 1.2 * 16000


@pytest.mark.parametrize("rate", [1, 3999, 400_000, 2**31 - 1])
def test_odd_rates_are_refused_before_anything_is_decoded(rate, monkeypatch):
    monkeypatch.setattr(audio, "blocks_of", None)
    with pytest.raises(cli.UserError, match=f"sample rate {rate}: it must be"):
        audio.read_audio(sound_file(rate=rate))


def test_heads_and_chunks_of_no_length_do_not_take_the_square_of_their_number():
    class Counted(io.BytesIO):
        reads = 0

        def read(self, *size):
            self.reads += 1
            return super().read(*size)

    def number(n):
        return n.to_bytes(4, "little")

    count = 300  # heads, each with a chunk that leads behind them all, where chunks of no length lead to what is none
    heads = b"".join(b"RIFF" + number(4) + b"WAVEdata" + number(0) + b"JUNK" + number(28 * left)
                     for left in reversed(range(count)))
    file = Counted(heads + (b"JUNK" + number(0)) * 10 * count + bytes(12))
    assert len(containers.parts(file)) == count and file.reads < 300 * count


@pytest.mark.parametrize("kind", [{"kind": kind} for kind in ("WAV", "W64", "CAF", "AIFF", "AU", "RF64", "FLAC", "MP3", "OGG")] + [
    {"kind": "NIST"}, {"kind": "VOC"}, {"subtype": "IMA_ADPCM"}], ids=str)
def test_a_damaged_recording_is_refused_or_gives_samples(kind):
    whole = sound_file(NOISE[:3000], **kind)
    for seed in range(25):
        chance, content = random.Random(seed), bytearray(whole)
        for _ in range(chance.choice([1, 2, 8])):
            place = chance.randrange(120 if chance.random() < 0.6 else len(content))
            content[place:place + 4] = (chance.choice([0, 1, 8, 255, 2**24, 2**31, 2**32 - 9]) % 2**32).to_bytes(4, "little")
        try:
            samples = audio.read_audio(bytes(content[:chance.randrange(9, 2 * len(content))]))
        except cli.UserError:
            continue
        assert len(samples) < 10 * len(NOISE)


def folder_of(path, text="a b") -> Path:
    """A source of one split that is as it should be."""
    (path / "train").mkdir(parents=True)
    for name in ("a.wav", "b.wav"):
        (path / "train" / name).write_bytes(sound_file())
    (path / "train/metadata.csv").write_text(f"file_name,text\na.wav,a b\nb.wav,{text}\n")
    return path


def prepared(source) -> list[str]:
    """The lines of rejected.csv."""
    prepare.main(["--source", str(source), "--data_root", f"{source}-out"])
    return (Path(f"{source}-out") / "rejected.csv").read_text().splitlines()[1:]


@pytest.mark.parametrize("name", ["train/metadata.csv", "train/metadata.jsonl", "dev/x.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "holes"])
def test_a_table_is_a_file_of_a_size_that_can_be_read(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "METADATA", 2**20)
    path = folder_of(tmp_path / "source") / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "metadata.csv").unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises(cli.UserError, match=f"cannot (load|read) .*{name}: "):
        prepared(tmp_path / "source")


def test_a_recording_that_is_a_pipe_or_a_device_is_rejected(tmp_path):
    source = folder_of(tmp_path / "source")
    (source / "train/a.wav").unlink()
    os.mkfifo(source / "train/a.wav")
    assert prepared(source) == ["train,a.wav,file missing"]


@pytest.mark.parametrize("links", [lambda i: [(i + 1, "a"), (i + 1, "b")], lambda i: [(j, j) for j in range(12) if j != i]],
                         ids=["chain", "mesh"])
def test_links_to_links_are_not_followed_for_ever(links, tmp_path):
    source = folder_of(tmp_path / "source")
    for i in range(30):
        (source / f"d{i}").mkdir()
        for target, name in links(i):
            (source / f"d{i}" / str(name)).symlink_to(f"../d{target}")
    with pytest.raises(cli.UserError, match="more than 100 ways lead there"):
        prepared(source)


def test_a_folder_may_not_lie_too_deep(tmp_path):
    source = folder_of(tmp_path / "source")
    (source / "/".join("a" * 300)).mkdir(parents=True)
    with pytest.raises(cli.UserError, match="it lies below 100 folders"):
        prepared(source)


def test_a_text_of_megabytes_is_rejected(tmp_path):
    source = folder_of(tmp_path / "source")
    (source / "train/metadata.csv").rename(tmp_path / "unused.csv")
    rows = [{"file_name": "a.wav", "text": "a b"}, {"file_name": "b.wav", "text": "xyz" * 10**6}]
    (source / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prepared(source)[0].startswith("train,b.wav,a text of 3000000 characters; 65536 is the most")
    assert "x" not in json.loads(Path(f"{source}-out/tokenizer.json").read_text())["tokens"]


def parquet(path, readme="", packed="zstd", **columns) -> Path:
    cells = pa.StructArray.from_arrays([pa.array([sound_file(NOISE[::-1]), sound_file()])], ["bytes"])
    path.mkdir()
    pyarrow.parquet.write_table(pa.table({"audio": cells, "text": ["a b", "b c"]} | columns), path / "train.parquet",
                                compression=packed, use_dictionary=[] if packed else True)
    if readme:
        path.joinpath("README.md").write_text(
            f"---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: {readme}\n---\n")
    return path


@pytest.mark.parametrize("columns", [
    {"audio": pa.StructArray.from_arrays([pa.array([sound_file(), bytes(2**27)])], ["bytes"])},
    {"text": ["a", "b" * 2**27]},
    {"audio": pa.array([[0.5] * 2, None], pa.list_(pa.float32()))},
], ids=["audio", "text", "list"])
def test_a_parquet_column_that_swells_is_refused(columns, tmp_path):
    if "list" in str(columns.get("audio", pa.array([])).type):  # the same value 2^25 times, in a few bytes
        values = pa.ListArray.from_arrays(pa.array([0, 2**25, 2**25], pa.int32()), pa.array(np.zeros(2**25, np.float32)))
        columns = {"audio": pa.StructArray.from_arrays([values, pa.array([16000, 16000])], ["array", "sampling_rate"])}
    source = parquet(tmp_path / "source", packed=None if "array" in str(columns) else "zstd", **columns)
    assert os.path.getsize(source / "train.parquet") < 2**17
    with pytest.raises(cli.UserError, match="cannot load .*train.parquet: .* promise 1"):
        prepared(source)


@pytest.mark.parametrize("path", ["../other/train.parquet", "/etc/train.parquet", "a/*/../../../other/*", "'**/../../other/**'"])
def test_a_readme_names_no_file_outside(path, tmp_path):
    parquet(tmp_path / "other")
    with pytest.raises(cli.UserError, match="README.md: .* lies outside"):
        prepared(parquet(tmp_path / "source", path))


@pytest.mark.parametrize("path", ["'**'", "'**/*.parquet'", f"'{'**/' * 3000}*'", f"'{'**/*' * 30}.parquet'", "'[.][.]/*/*'"])
def test_a_pattern_of_a_readme_leads_in_no_circles(path, tmp_path):
    source = parquet(tmp_path / "source", path)
    for i in range(3):
        (source / f"l{i}").symlink_to(".")
    assert prepared(source) == []


# ----------------------------------------------------------------------- what reaches a terminal or another program


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\u202eb", "a\udce9", "a\x9b2J", "a\u2028b"])
def test_what_is_shown_moves_no_cursor_and_ends_no_line(text):
    assert cli.shown(text).isprintable() and cli.shown(text).isascii()


def test_what_is_shown_is_short_whatever_holds_it():
    bomb = "x" * 100
    for _ in range(40):
        bomb = [bomb] * 9
    assert len(cli.shown(bomb)) <= 1100 and len(cli.shown("x" * 10**7)) <= 1100


# ------------------------------------------------------------------------------------------------------- tracebacks


# ----------------------------------------------------------------------------------------------------------- streams


# --------------------------------------------------------------------------------------------------- small, but wrong
