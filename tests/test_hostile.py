"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

import cli
import datamodule

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
