"""Attacks by kind: bad input or bad luck gets one line and status 2, and the files that were there
before are still there.

A file that could swell, or make its reader wait, is read in a process of its own with little memory
and a deadline: a bomb fails its test, and freezes nothing.
"""

import argparse
import contextlib
import copy
import csv
import errno
import functools
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import unquote_to_bytes

import cli
from cli import UserError

import datasets
import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import torch
from hypothesis import strategies as st
from pytorch_lightning.trainer.connectors import callback_connector

import audio
import containers
import context
import datamodule
import files
import prepare
import score
import sources
import train
import transcribe
import words
from checkpoint import CONFIG_PARTS, read_checkpoint, write_folder
from datamodule import rows_rate
from helpers import ROOT, TINY_FLAGS, encoded, forked, module, noise, tree, trusted
from helpers_model import save_model, tiny_model
from model import U2, load_checkpoint, make_net
from tokenizer import from_vocab, load_tokenizer, normalize_text, save_tokenizer, train_char
from tools import align, bench, compare, export, parity, torture, wenet_import
from transforms import STREAM_WINDOW, Frontend, feature_state, read_cmvn, stream_features

DEADLINE = 60  # seconds


# ---- Writing without destroying


def publish(root, text="old", overwrite=False, **kwargs) -> None:
    """Publishes a folder whose files all hold `text`."""
    with files.published(str(root), "a thing", overwrite, **kwargs) as folder:
        for shard in (0, 1):
            os.makedirs(f"{folder}/train/{shard}")
            Path(f"{folder}/train/{shard}/rows").write_text(text)
        Path(f"{folder}/notes.md").write_text(text)


@contextlib.contextmanager
def no_room(size):
    """Lets the disk have no room for a file of more than `size` bytes, in a `with` block."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# Each of these functions of os is a step that changes something.
STEPS = "replace", "mkdir", "rmdir", "unlink", "remove", "fsync"


def killed_at(number, act) -> bool:
    """Runs `act` in a process that is killed before its step `number`.

    Returns whether the process was killed; it was not where it had fewer steps.
    """
    if not (child := os.fork()):
        step = itertools.count()

        def killing(call, *args, **kwargs):
            if next(step) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        for name in STEPS:
            setattr(os, name, functools.partial(killing, getattr(os, name)))
        act()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("before", ["old", None])
def test_a_folder_is_the_old_or_the_new_one_whatever_step_is_the_last(
    tmp_path, before, monkeypatch
):
    monkeypatch.setattr(files, "DYING", 0.0)
    new = tmp_path / "new"
    root = tmp_path / "home" / "root"
    publish(new, "new")
    for number in itertools.count():
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        if before:
            publish(root)
        old = tree(root) if before else None
        killed = killed_at(number, lambda: publish(root, "new", overwrite=True))
        found = tree(root) if root.exists() else None
        whole = (old, tree(new)) if before else (None, {}, tree(new))
        assert found in whole or killed and found is None  # then the old folder is aside
        if (aside := tmp_path / "home/.root.lightning-u2/old").exists():
            assert tree(aside) == old  # a folder that may come back is never half deleted
        if found or before:
            with pytest.raises(UserError, match="root exists"):  # the next run finds the old folder
                publish(root)
            assert tree(root) in (old, tree(new)) and os.listdir(tmp_path / "home") == ["root"]
        publish(root, "new", overwrite=True)
        assert tree(root) == tree(new) and os.listdir(tmp_path / "home") == ["root"]
        if not killed:
            break
    assert number > 20


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / "mine").write_text("x"),
        lambda root: (root / "train/mine").write_text("x"),
        lambda root: (root / "train/2").mkdir(),
        lambda root: os.symlink("/", root / "train/link"),
        lambda root: (root / "notes.md").write_text("OLD"),
        lambda root: (root / "train/0/rows").write_text("longer"),
        lambda root: os.mkfifo(root / "pipe"),
        lambda root: (root / files.MARK).unlink(),
        lambda root: (root / files.MARK).write_text("[" * 10**5),
        lambda root: (root / files.MARK).write_text('{"what": "another", "files": {}}'),
        lambda root: (root / files.MARK).write_text('{"what": "a thing", "files": ["notes.md"]}'),
        lambda root: (root / "notes.md").unlink() or os.symlink("train/0/rows", root / "notes.md"),
    ],
)
def test_only_what_we_wrote_is_replaced(tmp_path, spoil):
    root = tmp_path / "root"
    names = ("root.partial", ".root.partial", "root.tmp", ".root.old")
    neighbours = [tmp_path / name for name in names]
    for folder in neighbours:
        folder.mkdir()
        (folder / "mine").touch()
    publish(root)
    (root / "train" / "0" / "cache-0123456789abcdef.arrow").touch()
    publish(root, "old", overwrite=True)  # a file that the datasets library leaves may go
    spoil(root)
    before = tree(tmp_path) if not (root / "pipe").exists() else None
    with pytest.raises(UserError, match="root holds more than a thing .*, so --overwrite does not"):
        publish(root, overwrite=True)
    assert before in (None, tree(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(["root", *names])
    assert all((folder / "mine").exists() for folder in neighbours)


def test_a_folder_of_a_killed_run_never_takes_the_place_of_another_one(tmp_path):
    publish(tmp_path / "root")
    (tmp_path / ".root.lightning-u2").mkdir()
    os.replace(tmp_path / "root", tmp_path / ".root.lightning-u2" / "old")
    (tmp_path / "root").mkdir()  # as a container makes the folders that it mounts
    with pytest.raises(UserError, match="root exists"):
        publish(tmp_path / "root")
    (tmp_path / ".root.lightning-u2").mkdir()
    os.replace(tmp_path / "root", tmp_path / ".root.lightning-u2" / "old")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mine").touch()
    before = tree(tmp_path)
    with pytest.raises(UserError, match="move one of the two away"):
        publish(tmp_path / "root", overwrite=True)
    assert tree(tmp_path) == before


NO_FOLDER = [
    *((where, "is the current folder or holds it") for where in (".", "..")),
    ("", "is the current folder"),
    *((where, "is a file") for where in ("file", "loop")),
    *((where, "cannot be written") for where in ("file/below", "n" * 256, "/proc/none")),
]


@pytest.mark.parametrize("where, said", NO_FOLDER)
def test_where_no_folder_can_be_put_is_said_before_any_work(tmp_path, monkeypatch, where, said):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").touch()
    os.symlink("loop", "loop")
    before = sorted(os.listdir(".")), tree(tmp_path)
    with pytest.raises(UserError, match=said):
        with files.published(where, "a thing", True):
            raise AssertionError("work has begun")
    assert (sorted(os.listdir(".")), tree(tmp_path)) == before


def test_a_mount_point_is_said_before_any_work(tmp_path, monkeypatch):
    publish(tmp_path / "root")
    before = tree(tmp_path)
    replace = os.replace

    def busy(old, new):  # as the system refuses to move a mount point
        if str(old) == str(tmp_path / "root"):
            raise OSError(errno.EBUSY, "busy")
        replace(old, new)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UserError, match="root cannot be replaced, being a mount point"):
        with files.published(str(tmp_path / "root"), "a thing", True):
            raise AssertionError("work has begun")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["train/0", "notes.md"])
def test_what_is_mounted_within_a_folder_is_not_replaced(tmp_path, monkeypatch, place):
    """os.path.ismount does not see a mounted folder of the same disk, nor a mounted file."""
    assert "/proc" in files._mounts()
    publish(tmp_path / "root")
    before = tree(tmp_path)
    monkeypatch.setattr(files, "_mounts", lambda: {str(tmp_path / "root" / place)})
    with pytest.raises(UserError, match=f"root holds more than a thing .{place}"):
        publish(tmp_path / "root", "new", overwrite=True)
    assert tree(tmp_path) == before


def test_what_onnx_writes_in_half_on_a_full_disk_is_said(place, tmp_path, monkeypatch, capsys):
    def write_half(*_):
        raise ValueError("Wire format was corrupt")  # onnx reads what it has written

    monkeypatch.setattr(export, "write_graph", write_half)
    argv = ["--checkpoint", str(place / "best.ckpt"), "--out", str(tmp_path / "out")]
    with no_room(2**16):
        assert "out: cannot be written (File too large); make" in outcome("export", argv, capsys)
    with pytest.raises(ValueError, match="corrupt"):  # with room it is a mistake of the program
        outcome("export", argv, capsys)
    assert os.listdir(tmp_path) == []


def test_a_place_that_onnx_cannot_name_is_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flag in ("--out", "--hub_dir"):
        argv = ["--checkpoint", str(place / "best.ckpt"), flag, "caf\udce9"]
        line = outcome("export", argv, capsys)
        assert f"{flag} {tmp_path}/caf\\udce9: its name is not in UTF-8" in line
    assert os.listdir(tmp_path) == []


def test_a_folder_follows_its_link_keeps_its_permissions_and_may_have_any_name(tmp_path):
    long = tmp_path / ("n" * 255)
    publish(long)
    os.chmod(long, 0o700)
    os.symlink(long, tmp_path / "link")
    publish(tmp_path / "link", "new", overwrite=True)
    assert (long / "notes.md").read_text() == "new" and os.stat(long).st_mode & 0o777 == 0o700
    assert sorted(os.listdir(tmp_path)) == ["link", long.name]


def test_what_is_read_or_was_put_there_meanwhile_is_not_replaced(tmp_path):
    publish(tmp_path / "root")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="root holds .*rows, of which it is to be made"):
        publish(tmp_path / "root", overwrite=True, inputs=(str(tmp_path / "root/train/0/rows"),))
    assert tree(tmp_path) == before
    with pytest.raises(UserError, match="mine"):
        with files.published(str(tmp_path / "root"), "a thing", True):
            (tmp_path / "root" / "mine").touch()
    assert tree(tmp_path) == before | {"root/mine": b""}


def test_what_cannot_be_removed_beside_a_folder_is_named(tmp_path, monkeypatch):
    """Somebody else may have put such a file into the old folder."""
    (tmp_path / ".root.lightning-u2").mkdir()

    def denied(_):
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    monkeypatch.setattr(shutil, "rmtree", denied)
    with pytest.raises(UserError, match=r"\.root\.lightning-u2 is left .*; remove it"):
        publish(tmp_path / "root")


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    publish(tmp_path / "root")
    before = tree(tmp_path)
    model = dict.fromkeys(CONFIG_PARTS) | {"tokenizer": {}}
    model["state_dict"] = {"a": torch.zeros(10**5)}
    for write in (
        lambda folder: Path(folder, "a").write_bytes(bytes(10**5)),
        lambda folder: write_folder(model, folder),
        lambda folder: [Path(folder, str(number)).touch() for number in range(2000)],
    ):
        with no_room(2**14), pytest.raises(UserError, match="root: cannot be written .*make room"):
            with files.published(str(tmp_path / "root"), "a thing", True) as folder:
                write(folder)
        assert tree(tmp_path) == before


def test_a_file_is_written_under_a_name_of_its_own_as_any_new_file(tmp_path):
    path = tmp_path / "x"
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "x.tmp").write_text("mine")
    os.symlink(precious, files.aside(str(path)))
    files.write_whole(str(path), b"new")
    assert tree(tmp_path) == {"x": b"new", "x.tmp": b"mine", "precious": b"mine"}
    assert not path.is_symlink()
    assert os.stat(path).st_mode == os.stat(precious).st_mode  # all that the umask leaves
    os.chmod(path, 0o640)
    os.symlink(path, tmp_path / "link")
    files.write_whole(str(tmp_path / "link"), b"newer")
    assert (tmp_path / "link").is_symlink() and path.read_bytes() == b"newer"
    assert os.stat(path).st_mode & 0o777 == 0o640
    files.write_whole(str(tmp_path / ("n" * 255)), b"new")
    assert len(os.listdir(tmp_path)) == 5


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make):
    make(tmp_path / "x")
    before = os.stat(tmp_path / "x")
    with pytest.raises(UserError, match="x: cannot be written"):
        files.write_whole(str(tmp_path / "x"), b"new")
    assert os.path.samestat(before, os.stat(tmp_path / "x")) and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("number", range(6))
def test_a_file_is_the_old_or_the_new_one_whatever_step_is_the_last(tmp_path, number):
    files.write_whole(str(tmp_path / "x"), b"old")
    killed_at(number, lambda: files.write_whole(str(tmp_path / "x"), b"new"))
    assert (tmp_path / "x").read_bytes() in (b"old", b"new")
    with no_room(2), pytest.raises(UserError, match="x: cannot be written .*make room"):
        files.write_whole(str(tmp_path / "x"), b"newer")
    assert (tmp_path / "x").read_bytes() in (b"old", b"new")
    files.write_whole(str(tmp_path / "x"), b"newest")
    assert tree(tmp_path) == {"x": b"newest"}


def test_the_file_of_a_lock_is_never_somebodys_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    os.symlink(tmp_path / "none", tmp_path / "link")
    for name in ("mine", "link"):
        with pytest.raises(UserError, match="it: cannot be written"):
            with files.alone(str(tmp_path / name), "it"):
                pass
    assert tree(tmp_path) == {"mine": b"mine"}


@pytest.mark.parametrize("name", ["best.ckpt", "words.txt", "notes.md", "pipe", "folder", "link"])
def test_details_replace_details_alone(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("best.ckpt", "notes.md"):
        Path(path).write_text("precious")
    Path("words.txt").touch()  # empty as a new file is, but the command reads it
    os.mkfifo("pipe")
    os.mkdir("folder")
    os.symlink("best.ckpt", "link")
    inputs = ["words.txt", None]
    with pytest.raises(UserError, match=f"--details {name} .*; name another file"):
        score.check_details(score.ScoreOptions(checkpoint="best.ckpt", details=name), inputs)
    Path("details").write_text(json.dumps(score.describe("attention", 0, "a", "b")))
    for free in ("details", "new"):
        score.check_details(score.ScoreOptions(checkpoint="best.ckpt", details=free), inputs)


def test_details_do_not_go_where_the_scores_do(tmp_path):
    with open(tmp_path / "log", "w") as file:
        before = os.dup(1)
        options = score.ScoreOptions(details=str(tmp_path / "log"))
        os.dup2(file.fileno(), 1)
        try:
            with pytest.raises(UserError, match="where it prints"):
                score.check_details(options, [])
        finally:
            os.dup2(before, 1)
            os.close(before)


def test_where_no_transcript_can_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "a.wav").touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    with pytest.raises(UserError, match="--output_dir .*out cannot be written; choose another"):
        transcribe.main([str(tmp_path / "a.wav"), "--output_dir", str(tmp_path / "out")])


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.wav").touch()
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scan(path + "/none" * ("closed" in path)))
    found = [recording.path for recording in transcribe.recordings_at(str(tmp_path))]
    assert [os.path.relpath(path, tmp_path).split("/")[0] for path in found] == ["a.wav", "closed"]


def test_transcripts_stay_below_their_folder_and_off_what_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/one/two", "out/deep", "elsewhere"):
        os.makedirs(folder)
    for path in ("a/x.wav", "a/y.wav", "out/words.txt", "a/talk.txt"):
        Path(path).touch()

    def places(*paths, out="out", hotwords=""):
        options = transcribe.TranscribeOptions(output_dir=out, overwrite=True)
        found = [recording for path in paths for recording in transcribe.recordings_at(path)]
        return transcribe.output_paths(found, options, ("best.ckpt", hotwords))

    assert places("a/one/*/../../x.wav", out="a/one/out") == ["a/one/out/x.txt"]
    assert places("/no/such.wav", "../up.wav") == ["out/such.txt", "out/up.txt"]
    os.symlink("../elsewhere", "out/one")
    os.symlink("../elsewhere/z.txt", "out/x.txt")
    os.symlink("deep", "out/also")
    for path in ("in/one/z.wav", "in/deep/w.wav", "in/also/w.wav", "words.wav"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(path).touch()
    with pytest.raises(UserError, match="outside"):
        places("a/x.wav")
    for paths in (["in"], ["a/one/../y.wav", "a/y.wav"]):
        with pytest.raises(UserError, match="both"):
            places(*paths)
    with pytest.raises(UserError, match="is what this command reads"):
        places("words.wav", hotwords="out/words.txt")
    with pytest.raises(UserError, match="is what this command reads"):
        places("a/talk.txt", out="a")
    with pytest.raises(UserError, match="cannot be made"):
        places("a/y.wav", out="a/x.wav")


# ---- Files that promise too much


def refusal(function, *arguments, memory=2**30) -> str:
    """Returns the UserError with which a function ends in a forked process.

    The process may take `memory` bytes more than this one has, and DEADLINE seconds.
    """
    receive, send = os.pipe()
    if not (child := os.fork()):
        said = "no end"
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
            signal.alarm(DEADLINE)
            said = f"{function(*arguments)!r:.100} was returned"
        except cli.UserError as error:
            said = f"UserError: {error}"
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(send, said.encode(errors="backslashreplace")[:8000])
            os._exit(0)
    os.close(send)
    with open(receive, errors="backslashreplace") as file:
        said = file.read()
    assert os.waitpid(child, 0)[1] == 0, said
    check_refusal(said)
    return said


def check_refusal(said: str) -> None:
    assert said.startswith("UserError: ") and len(said) < 1500, said
    # Such a line would mean that somebody asked for the memory, and did not get it.
    assert "MemoryError" not in said and "allocate" not in said, said


def all_refused(*reads) -> None:
    """Checks several reads as `refusal` does, but in one process, because a fork takes time.

    A read is (function, path, what the refusal says).
    """

    def one_by_one():
        for function, path, expected in reads:
            said = "returned"
            try:
                function(path)
            except cli.UserError as error:
                said = f"UserError: {error}"
            check_refusal(said)
            assert expected in said, said
        raise cli.UserError("all of them were refused")

    assert refusal(one_by_one) == "UserError: all of them were refused"


def test_a_pipe_or_a_device_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="a pipe or a device"):
            files.open_file(str(path))


def nested(opening, middle, closing, deep=10_000):
    return opening * deep + middle + closing * deep


def billion(first, line, count=9):
    """Returns nine lines of YAML, each naming the line before nine times: 363 bytes, 9^9 words."""
    names = "abcdefghij"
    lines = (
        line.format(name=name, before=", ".join([f"*{before}"] * 9))
        for before, name in itertools.islice(itertools.pairwise(names), count)
    )
    return first + "".join(lines)


def read_hotwords(path):
    return context.load_hotwords(path, train_char(["abc"]), 1.0)


def read_folder(name):
    """Makes a reader of a path that gives the file this name, and reads its folder."""
    readers = {
        "run.json": compare.read_run,
        "train.yaml": wenet_import.load_wenet,
        "prepare.json": lambda root: rows_rate([root]),
    }

    def read(path):
        os.replace(path, os.path.join(os.path.dirname(path), name))
        return readers.get(name, load_tokenizer)(os.path.dirname(path))

    read.__name__ = name
    return read


def read_tokenizer_of_data(path):
    os.replace(path, os.path.join(os.path.dirname(path), "tokenizer.json"))
    datamodule.check_tokenizers([os.path.dirname(path)])


NAMES = ("vocab.json", "tokenizer.json", "run.json", "train.yaml", "prepare.json")
READERS = [
    *(read_tokenizer_of_data, load_tokenizer, load_checkpoint, read_hotwords, read_cmvn),
    *map(read_folder, NAMES),
]


def put(path: Path, kind: str) -> None:
    """Puts something else in the place of whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(path.parent.parent / "theirs")
    else:
        path.touch()
    if kind == "holes":
        os.truncate(path, 2**40)


@pytest.mark.parametrize(
    "read",
    [*READERS, wenet_import.read_units, wenet_import.read_weights],
    ids=lambda read: read.__name__,
)
def test_a_file_without_end_a_pipe_and_a_large_one_are_refused_at_once(read, tmp_path):
    kinds = ("zeros", "pipe", "holes")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        put(tmp_path / kind / "file", kind)
    all_refused(*((read, str(tmp_path / kind / "file"), "") for kind in kinds))


NESTED = (
    nested("[", "", "]"),
    nested('{"a":', "1", "}"),
    '{"tokens": ' + nested("[", "", "]") + "}",
    '{"tokens": ["a"], "blank_id": NaN}',
    '{"options": {}, "metrics": {"x": 1e999}}',
)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_what_is_nested_deep_or_not_finite_is_refused(read, tmp_path):
    texts = list(NESTED)
    if read.__name__ == "train.yaml":  # it takes a second, with or without a name before the lists
        del texts[2]
    for number, text in enumerate(texts):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "file").write_text(text)
    all_refused(*((read, str(tmp_path / str(number) / "file"), "") for number in range(len(texts))))


@pytest.mark.parametrize(
    "text",
    [
        billion("a: &a [x" + 8 * ", x" + "]\n", "{name}: &{name} [{before}]\n") + "encoder: *j\n",
        billion("a: &a {x: 1}\n", "{name}: &{name} {{<<: [{before}]}}\n"),
        "encoder: &a [*a]",
        "encoder: " + nested("- ", "a", "", 2000),
        "a: !!python/object:os.system x",
        "? [a]\n: b",
        "a: \x01",
        "encoder: " + "x" * 10**5,
        "a: " + "9" * 5000,
        "[" * 10**6,
    ],
    ids=range(10),
)
def test_no_yaml_swells(text, tmp_path):
    (tmp_path / "train.yaml").write_text(text)
    assert len(refusal(wenet_import.load_wenet, str(tmp_path))) < 400


def test_yaml_may_name_a_list_twice():
    said = files.parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: *a}")
    assert said == {"a": [1, 2], "b": [1, 2], "c": {"d": 1, "e": [1, 2]}}


@pytest.mark.parametrize(
    "text",
    [
        "root:$6$secret:19000:0::\n",
        '{"mean_stat": ["secret"], "var_stat": [1], "frame_num": 1}',
        '{"mean_stat": [1e300], "var_stat": [1], "frame_num": 1}',
        "[ 1 secret\n 1 0 ]",
        '{"mean_stat": [1], "var_stat": [1], "frame_num": 1' + "0" * 400 + "}",
    ],
)
def test_nothing_of_a_file_that_is_no_cmvn_is_told(text, tmp_path):
    (tmp_path / "file").write_text(text)
    assert "secret" not in refusal(read_cmvn, str(tmp_path / "file"))


def test_hotwords_take_time_and_memory_as_their_number(tmp_path):
    """Where a phrase of one half breaks off, a phrase of the other half may go on."""
    tokens = [chr(0x4E00 + i) for i in range(4000)]
    phrases = [[0, i] if i % 2 else [i, 0, i - 1] for i in range(1, 4000)] * 5
    lines = ("".join(tokens[i] for i in phrase) for phrase in phrases)
    (tmp_path / "words").write_text("\n".join(lines))
    graph = context.load_hotwords(str(tmp_path / "words"), train_char(["".join(tokens)]), 1.0)
    assert sum(array.nbytes for array in graph) < 2**20


@pytest.mark.parametrize("score", ["1e308", "inf", "nan", "-1", "1001", "0x10", "9" * 5000])
def test_a_score_of_hotwords_is_finite_and_no_more_than_sound_can_outweigh(score, tmp_path):
    (tmp_path / "words").write_text(f"abc :{score}\n")
    with pytest.raises(cli.UserError, match="line 1: .* is no score"):
        read_hotwords(str(tmp_path / "words"))


def test_hotwords_are_bounded_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "MANY_TOKENS", 5)
    (tmp_path / "words").write_text("abc\nabc\n")
    with pytest.raises(cli.UserError, match="more than 5 tokens"):
        read_hotwords(str(tmp_path / "words"))


@pytest.mark.parametrize(
    "token", ["\x1b[2J", "a\nb", "\0", "\x85", "\u2028", "\ud800", "x" * 257, 5, None, ["a"]]
)
def test_a_vocabulary_of_control_characters_or_no_text_is_refused(token, tmp_path):
    whole = dict(tokens=["<blank>", "a", token], blank_id=0, unk_id=0, sos_id=1, eos_id=1)
    (tmp_path / "a.json").write_text(json.dumps(whole))
    names = ["a.json"]
    if isinstance(token, str):  # a key of JSON is always text
        (tmp_path / "b.json").write_text(json.dumps({"<pad>": 0, "a": 1, token: 2}))
        names.append("b.json")
    for name in names:
        with pytest.raises(cli.UserError) as raised:
            load_tokenizer(str(tmp_path / name))
        assert str(raised.value).isprintable()


def test_a_large_vocabulary_costs_a_text_no_more_than_a_small_one(monkeypatch):
    """Nothing goes through all the tokens again for each text."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4, "ab": 5}
    tokenizer = from_vocab(vocabulary | {f"x{i}": i + 6 for i in range(100)})
    monkeypatch.setattr("tokenizer.sorted", None, raising=False)
    assert tokenizer.encode("a abx7b") == [3, 5, 13, 4]


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73\u0316", "\u0f71\u0344\u0f73\u0316a"])
def test_marks_on_a_letter_are_put_in_order(marks):
    assert normalize_text("a" + marks * 600) == unicodedata.normalize("NFC", "a" + marks * 600)


def test_marks_on_a_letter_take_no_square_of_their_number(tmp_path):
    """The first of these marks becomes two, so that unicodedata alone takes minutes."""
    (tmp_path / "words").write_text("a" + "\u0f73\u0316" * 2**17)
    assert "cannot spell" in refusal(read_hotwords, str(tmp_path / "words"))


@pytest.mark.parametrize("text", [nested("[", "", "]"), "pipe", "zeros", "holes"])
def test_the_tokenizer_of_a_data_root_is_read_within_bounds(text, tmp_path):
    path = tmp_path / "tokenizer.json"
    if text in ("pipe", "zeros", "holes"):
        put(path, text)
    else:
        path.write_text(text)
    assert "tokenizer.json" in refusal(datamodule.check_tokenizers, [tmp_path])


def pickled(program: bytes, **records) -> bytes:
    """Makes a .ckpt whose pickle is `program`."""
    content = {"data.pkl": b"\x80\x02" + program + b".", "byteorder": b"little", "version": b"3\n"}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, record in {**content, **records}.items():
            archive.writestr(f"a/{name}", record)
    return file.getvalue()


def torch_file(data) -> bytes:
    torch.save(data, file := io.BytesIO())
    return file.getvalue()


def rewritten(content: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """Returns an archive with all of its records after `change`, a function of the open archive."""
    old = zipfile.ZipFile(io.BytesIO(content))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        change(new)
    return file.getvalue()


def repeat_records(archive):
    archive.filelist += [copy.copy(record) for record in archive.filelist] * 5


# Attacks on a reader of checkpoints: the bytes of a file, made of a good checkpoint's dict.
ATTACKS = {
    "a key of a million tuples ends Python": lambda _: pickled(b"})" + b"\x85" * 10**6 + b"K\x01s"),
    "ten gigabytes of zeros": lambda _: pickled(
        b"cbuiltins\nbytearray\n\x8a\x05\0\xe4\x0b\x54\x02\x85R"
    ),
    "a list within itself": lambda _: pickled(b"]q\0h\0a"),
    "lists that stand for 2^60": lambda _: pickled(
        b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    ),
    "a dict copied from another": lambda _: pickled(b"ccollections\nOrderedDict\n}\x85R"),
    "lists in lists": lambda _: pickled(b"]" * 10**4 + b"a" * (10**4 - 1)),
    "names that are tuples": lambda _: torch_file({("a", 1): 2}),
    "what is no plain data": lambda _: torch_file({"a": {1, 2}}),
    "sparse": lambda c: torch_file(c | {"x": torch.zeros(3, 3).to_sparse()}),
    "complex": lambda c: torch_file(c | {"x": torch.zeros(3, dtype=torch.complex64)}),
    "quantized": lambda c: torch_file(
        c | {"x": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)}
    ),
    "without memory": lambda c: torch_file(c | {"x": torch.zeros(3, device="meta")}),
    "4 bytes that stand for 4 TB": lambda c: torch_file(c | {"x": torch.zeros(1).expand(10**12)}),
    "the same numbers a thousand times": lambda c: torch_file(
        c | {"x": [torch.zeros(10**5)] * 1000}
    ),
    "compressed": lambda c: rewritten(
        torch_file(c | {"x": torch.zeros(10**6)}), lambda archive: None, zipfile.ZIP_DEFLATED
    ),
    "records that overlap": lambda c: rewritten(torch_file(c), repeat_records),
    "an archive within another": lambda c: b"PK\3\4" + torch_file(c),
    "a comment": lambda c: rewritten(
        torch_file(c), lambda archive: setattr(archive, "comment", b"x" * 100)
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_checkpoint_takes_more_memory_than_it_has_bytes(attack, place, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.MANY_PARTS", 2**16)  # which 2^60 parts reach within a moment
    checkpoint = trusted(place / "best.ckpt")
    for name in ("x.ckpt", "final.pt"):
        (tmp_path / name).write_bytes(ATTACKS[attack](checkpoint))
    path = str(tmp_path / "x.ckpt")
    all_refused(
        (load_checkpoint, path, "x.ckpt"),
        (load_tokenizer, path, "x.ckpt"),
        (wenet_import.read_weights, str(tmp_path / "final.pt"), "final.pt"),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"linear_units": 2**16, "decoder_linear_units": 2**16},
        {"linear_units": 10**7},
        {"num_blocks": 200},
        {"num_blocks": 10**9},
        {"r_num_blocks": 200},
        {"output_size": 8192},
        {"cnn_module_kernel": 999},
        {"attention_heads": 3},
        {"attention_heads": 0},
        {"linear_units": 32.0},
        {"causal": 1},
        {"dropout_rate": math.nan},
        {"encoder": "x" * 10**6},
        {"no_such": 1},
        {3: 1},
    ],
)
def test_options_that_the_weights_are_not_of_are_refused_before_memory_is_taken(
    options, place, tmp_path
):
    checkpoint = trusted(place / "best.ckpt")
    checkpoint["model_options"] |= options
    torch.save(checkpoint, tmp_path / "x.ckpt")
    refusal(load_checkpoint, str(tmp_path / "x.ckpt"), memory=2**28)


def test_wenets_options_that_the_weights_are_not_of_are_refused_before_memory_is_taken(
    place, tmp_path
):
    wenet_import.export_model(str(place / "best.ckpt"), str(tmp_path / "exp"), False)
    path = tmp_path / "exp" / "train.yaml"
    text = path.read_text()
    for name in ("linear_units: 32", "num_blocks: 1", "output_size: 16"):
        path.write_text(text.replace(name, name.split()[0] + " 60000", 1))
        refusal(wenet_import.load_wenet, str(tmp_path / "exp"), memory=2**28)


JUNK = (
    *(None, -1, 2.5, math.nan, True, "x", [], {}, [[1]]),
    *(torch.zeros(2), torch.zeros(3, 2, dtype=torch.int64)),
    *(10**30, {1: 2}, "\x1b[2J" * 3000, b"x", (1, 2), float(10**300)),
)


def places_in(data, path=()):
    """Yields the keys to each value in dicts, and to the first two in each list, as a tuple."""
    if isinstance(data, dict):
        keys = list(data)
    else:
        keys = range(min(len(data), 2)) if isinstance(data, list) else ()
    for key in keys:
        yield *path, key
        yield from places_in(data[key], (*path, key))


def test_any_checkpoint_is_one_line_or_a_model_that_hears(place, tmp_path):
    """One value of the checkpoint is junk, or is missing."""
    checkpoint = trusted(place / "best.ckpt")
    rng = random.Random(0)
    counts = Counter()
    everywhere = [p for p in places_in(checkpoint) if p[0] != "state_dict" or len(p) == 1]
    weights = rng.sample(list(checkpoint["state_dict"]), 5)
    for path in everywhere + [("state_dict", name) for name in weights]:
        data = copy.deepcopy(checkpoint)
        within = functools.reduce(lambda part, name: part[name], path[:-1], data)
        if (junk := rng.choice((*JUNK, ...))) is ...:
            del within[path[-1]]
        else:
            within[path[-1]] = junk
        torch.save(data, tmp_path / "x.ckpt")
        try:
            model, tokenizer, frontend = load_checkpoint(str(tmp_path / "x.ckpt"))
            features = torch.randn(1, 40, frontend.num_mel_bins)
            (heard,) = model.decode(
                features, torch.tensor([40]), "attention_rescoring", beam_size=3
            )
            tokenizer.decode(heard.tokens)
            counts["heard"] += 1
        except cli.UserError as error:
            assert "x.ckpt" in str(error) and len(str(error)) < 1000, path
            counts["refused"] += 1
    assert counts["heard"] > 1 and counts["refused"] > 20


def saved(folder, state=(), packed=None, **columns) -> Path:
    """Writes a shard of three rows as save_to_disk leaves it, with these columns besides or
    instead, and `state` in its state.json."""
    rows = {
        "input_values": pa.array([[0.1, 0.2], [0.3], [0.4]], pa.list_(pa.float32())),
        "labels": pa.array([[3], [4, 5], [3]], pa.list_(pa.int32())),
        "text": pa.array(["a", "b", "c"]),
    }
    table = pa.table(rows | columns)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(table.schema))
    info.write_to_directory(str(folder))
    options = pa.ipc.IpcWriteOptions(compression=packed)
    data = f"{folder}/data-00000-of-00001.arrow"
    with pa.ipc.new_stream(data, table.schema, options=options) as file:
        file.write_table(table)
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(state)))
    return folder


OFFSETS = {"input_values": [0, 2, 3, 4], "labels": [0, 1, 3, 4], "text": [0, 1, 2, 3]}


def test_a_shard_as_it_should_be_is_read(tmp_path):
    assert len(datamodule.load_shard(saved(tmp_path / "0"))) == 3


@pytest.mark.parametrize(
    "offsets", [[0, 2**30, 3, 4], [0, 3, 1, 4], [-(2**30), 1, 3, 4], [0, 1, 3, 2**31 - 1]]
)
@pytest.mark.parametrize("column", OFFSETS)
def test_offsets_that_lead_out_of_a_shard_are_refused(column, offsets, tmp_path):
    data = saved(tmp_path / "0") / "data-00000-of-00001.arrow"
    right, wrong = (np.array(numbers, np.int32).tobytes() for numbers in (OFFSETS[column], offsets))
    assert data.read_bytes().count(right) == 1
    data.write_bytes(data.read_bytes().replace(right, wrong))
    with pytest.raises(cli.UserError, match="0: cannot be read as a dataset .*[Oo]ffset"):
        datamodule.load_shard(tmp_path / "0")


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "../other/data-00000-of-00001.arrow", "a/../../b.arrow", "pipe", "zeros", "none"],
)
def test_a_shard_is_read_from_its_own_files_alone(name, tmp_path):
    shard = saved(tmp_path / "0", state={"_data_files": [{"filename": name}]})
    saved(tmp_path / "other")
    os.mkfifo(shard / "pipe")
    os.symlink("/dev/zero", shard / "zeros")
    said = "0: cannot be read as a dataset .its state.json names .*, which"
    with pytest.raises(cli.UserError, match=said):
        datamodule.load_shard(shard)


def test_a_shard_may_be_a_link_to_another_disk(tmp_path):
    shard = saved(tmp_path / "0")
    os.rename(shard / "data-00000-of-00001.arrow", tmp_path / "elsewhere.arrow")
    os.symlink(tmp_path / "elsewhere.arrow", shard / "data-00000-of-00001.arrow")
    assert len(datamodule.load_shard(shard)) == 3


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        '{"features": {"a": %s1%s}}' % ("[" * 900, "]" * 900),
        '{"_data_files": [{"filename": 1}], "features": {"a": {"_type": "Nothing"}}}',
        "pipe",
    ],
)
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
    count = 2**31 - 1

    def empty(kind):
        none = pa.array([], kind)
        lists = pa.FixedSizeListArray
        return lists.from_buffers(pa.list_(kind, 0), count, [None], children=[none])

    columns = {"input_values": empty(pa.float32()), "labels": empty(pa.int32())}
    columns["text"] = pa.Array.from_buffers(pa.null(), count, [None])
    with pytest.raises(cli.UserError, match="promises 2147483647 rows"):
        datamodule.load_shard(saved(tmp_path / "0", **columns))


@pytest.mark.parametrize("text", [[1, 2, 3], [["a"], ["b"], ["c"]], [b"a", b"b", b"c"]])
def test_references_that_are_no_text_are_refused(text, place, tmp_path, capsys):
    saved(tmp_path / "train/0", text=pa.array(text))
    argv = ["--checkpoint", str(place / "best.ckpt"), "--data_root", str(tmp_path)]
    with pytest.raises(cli.UserError, match="train: column text is .*, not text"):
        score.main([*argv, "--split", "train"])


NOISE = np.random.default_rng(0).normal(0, 0.1, (16000, 2)).astype(np.float32)


def sound_file(samples=NOISE, rate=16000, kind="WAV", **how) -> bytes:
    return encoded(samples, kind, rate=rate, **how)


@pytest.mark.parametrize("channels", [1, 2])
def test_of_a_recording_that_is_too_long_no_more_is_decoded(channels, monkeypatch):
    monkeypatch.setattr(audio, "LONGEST", 1)
    blocks_of = audio.blocks_of
    decoded = []

    def counted(*given):
        for block in blocks_of(*given):
            decoded.append(len(block))
            yield block

    monkeypatch.setattr(audio, "blocks_of", counted)
    assert len(audio.read_audio(sound_file(NOISE[:, :channels], kind="FLAC"))) == 16000
    decoded.clear()
    with pytest.raises(cli.UserError, match="longer than 1 s; cut it"):
        audio.read_audio(sound_file(np.tile(NOISE[:, :channels], (20, 1)), kind="FLAC"))
    assert sum(decoded) <= (1 + audio.BLOCK) * 16000


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

    # Each of 300 heads has a chunk that ends behind them all. There chunks of no length follow, and
    # then bytes that are no chunk.
    count = 300
    heads = b"".join(
        b"RIFF" + number(4) + b"WAVEdata" + number(0) + b"JUNK" + number(28 * left)
        for left in reversed(range(count))
    )
    file = Counted(heads + (b"JUNK" + number(0)) * 10 * count + bytes(12))
    assert len(containers.parts(file)) == count and file.reads < 300 * count


KINDS = ("WAV", "W64", "CAF", "AIFF", "AU", "RF64", "FLAC", "MP3", "OGG", "NIST", "VOC")


@pytest.mark.parametrize(
    "kind", [*({"kind": kind} for kind in KINDS), {"subtype": "IMA_ADPCM"}], ids=str
)
def test_a_damaged_recording_is_refused_or_gives_samples(kind):
    whole = sound_file(NOISE[:3000], **kind)
    for seed in range(25):
        chance = random.Random(seed)
        content = bytearray(whole)
        for _ in range(chance.choice([1, 2, 8])):
            place = chance.randrange(120 if chance.random() < 0.6 else len(content))
            number = chance.choice([0, 1, 8, 255, 2**24, 2**31, 2**32 - 9])
            content[place : place + 4] = number.to_bytes(4, "little")
        try:
            samples = audio.read_audio(bytes(content[: chance.randrange(9, 2 * len(content))]))
        except cli.UserError:
            continue
        assert len(samples) < 10 * len(NOISE)


def folder_of(path, text="a b") -> Path:
    """Writes a source of one sound split."""
    (path / "train").mkdir(parents=True)
    for name in ("a.wav", "b.wav"):
        (path / "train" / name).write_bytes(sound_file())
    (path / "train/metadata.csv").write_text(f"file_name,text\na.wav,a b\nb.wav,{text}\n")
    return path


def prepared(source) -> list[str]:
    """Returns the lines of rejected.csv."""
    prepare.main(["--source", str(source), "--data_root", f"{source}-out"])
    return (Path(f"{source}-out") / "rejected.csv").read_text().splitlines()[1:]


@pytest.mark.parametrize("name", ["train/metadata.csv", "train/metadata.jsonl", "dev/x.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "holes"])
def test_a_table_is_a_file_of_a_size_that_can_be_read(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_METADATA", 2**20)
    path = folder_of(tmp_path / "source") / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "metadata.csv").unlink(missing_ok=True)
    put(path, kind)
    with pytest.raises(cli.UserError, match=f"cannot (load|read) .*{name}: "):
        prepared(tmp_path / "source")


def test_a_recording_that_is_a_pipe_or_a_device_is_rejected(tmp_path):
    source = folder_of(tmp_path / "source")
    (source / "train/a.wav").unlink()
    os.mkfifo(source / "train/a.wav")
    assert prepared(source) == ["train,a.wav,no file; make a file of its sound"]


@pytest.mark.parametrize(
    "links",
    [lambda i: [(i + 1, "a"), (i + 1, "b")], lambda i: [(j, j) for j in range(12) if j != i]],
    ids=["chain", "mesh"],
)
def test_links_to_links_are_not_followed_for_ever(links, tmp_path):
    source = folder_of(tmp_path / "source")
    for i in range(12):
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
    said = "train,b.wav,a text of 3000000 characters; 65536 is the most"
    assert prepared(source)[0].startswith(said)
    assert "x" not in json.loads(Path(f"{source}-out/tokenizer.json").read_text())["tokens"]


README = """---
configs:
- config_name: a
  data_files:
  - split: train
    path: %s
---
"""


def sound_bytes(*contents: bytes) -> pa.StructArray:
    """Makes a column of audio files."""
    return pa.StructArray.from_arrays([pa.array(contents)], ["bytes"])


def parquet(path, readme="", packed="zstd", **columns) -> Path:
    """Writes a source of one parquet file, with these columns besides or instead.

    readme: the path of the data in its README.md.
    """
    table = {"audio": sound_bytes(sound_file(NOISE[::-1]), sound_file()), "text": ["a b", "b c"]}
    path.mkdir()
    pyarrow.parquet.write_table(
        pa.table(table | columns),
        path / "train.parquet",
        compression=packed,
        use_dictionary=[] if packed else True,
    )
    if readme:
        path.joinpath("README.md").write_text(README % readme)
    return path


@pytest.mark.parametrize("column", ["audio", "text", "list"])
def test_a_parquet_column_that_swells_is_refused(column, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNPACKED", 2**23)  # the bombs are written within a moment
    packed = "zstd"
    if column == "audio":
        columns = {"audio": sound_bytes(sound_file(), bytes(2**24))}
    elif column == "text":
        columns = {"text": ["a", "b" * 2**24]}
    else:  # a dictionary holds the same value 2^22 times in a few bytes
        packed = None
        ends = pa.array([0, 2**22, 2**22], pa.int32())
        values = pa.ListArray.from_arrays(ends, pa.array(np.zeros(2**22, np.float32)))
        fields = {"array": values, "sampling_rate": pa.array([16000, 16000])}
        columns = {"audio": pa.StructArray.from_arrays([*fields.values()], [*fields])}
    source = parquet(tmp_path / "source", packed=packed, **columns)
    assert os.path.getsize(source / "train.parquet") < 2**17
    with pytest.raises(cli.UserError, match="cannot load .*train.parquet: .* promise 1"):
        prepared(source)


def test_no_footer_of_a_parquet_file_ends_the_process(tmp_path):
    """Bits of the footer are flipped; one footer then counts more levels than its column has."""
    source = parquet(tmp_path / "source")
    chance = random.Random(7)
    path = source / "train.parquet"
    whole = path.read_bytes()
    foot = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    options = prepare.PrepareOptions(source=str(source))

    def read_all():
        flips = [(chance.randrange(foot, len(whole)), 1 << chance.randrange(8)) for _ in range(260)]
        for place, bit in flips[190:]:  # the first 190 never ended a process
            content = bytearray(whole)
            content[place] ^= bit
            path.write_bytes(content)
            with contextlib.suppress(cli.UserError):
                sources.parquet_split(sources.Folder(str(source)), "train", str(path), options)
        raise cli.UserError("all of them were read or refused")

    refusal(read_all)


@pytest.mark.parametrize(
    "path",
    ["../other/train.parquet", "/etc/train.parquet", "a/*/../../../other/*", "'**/../../other/**'"],
)
def test_a_readme_names_no_file_outside(path, tmp_path):
    parquet(tmp_path / "other")
    with pytest.raises(cli.UserError, match="README.md: .* lies outside"):
        prepared(parquet(tmp_path / "source", path))


@pytest.mark.parametrize(
    "path",
    ["'**'", "'**/*.parquet'", f"'{'**/' * 3000}*'", f"'{'**/*' * 30}.parquet'", "'[.][.]/*/*'"],
)
def test_a_pattern_of_a_readme_leads_in_no_circles(path, tmp_path):
    source = parquet(tmp_path / "source", path)
    for i in range(3):
        (source / f"l{i}").symlink_to(".")
    assert prepared(source) == []


# ---- Text that reaches a terminal or another program


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\u202eb", "a\udce9", "a\x9b2J", "a\u2028b"])
def test_what_is_shown_moves_no_cursor_and_ends_no_line(text):
    assert cli.shown(text).isprintable() and cli.shown(text).isascii()


def test_what_is_shown_is_short_whatever_holds_it():
    bomb = "x" * 100
    for _ in range(40):
        bomb = [bomb] * 9
    assert len(cli.shown(bomb)) <= 1100 and len(cli.shown("x" * 10**7)) <= 1100


HOSTILE = [
    *("a\x1b[2Jb", "a\nb", "a\tb", "a\r\nb.wav\tforged"),
    *("\n\n7\n00:00:01,000 --> 00:00:02,000\nforged", "-->", "</v><b>&", ";;a"),
    *("a\udce9", "\ud800", "a\x9b2J", "a\u2028b", "a\u202eb", "\x0b\x0c\x1c\x85", "\u3000"),
    *("a b", "a%20b", "a_b", "\0"),
]
ANY = st.text(st.characters(), min_size=1) | st.sampled_from(HOSTILE)


def is_shown(text: str, *signs: str) -> bool:
    return not cli.UNSHOWN.search("".join(c for c in text if c not in signs))


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(ANY, st.lists(ANY, max_size=5))
def test_no_name_and_no_word_forges_a_line_a_column_or_a_cue(name, said):
    heard = [words.Word(text, i, i + 0.1, 0.5, i % 2 == 0) for i, text in enumerate(said)]
    transcript = words.Transcript(name, words.text_of(heard), math.inf, heard)
    texts = [text for text in said if text.strip()]
    line, rest = words.as_txt(transcript).split("\n")
    assert is_shown(line, "\t") and line.count("\t") == 1 and not rest
    line, rest = words.as_json(transcript).split("\n")
    assert is_shown(line) and not rest and "Infinity" not in line
    read = [word["word"] for word in json.loads(line)["words"]]
    assert read == said or "\ud800" <= max("".join(said))
    ctm = words.as_ctm(transcript)
    assert is_shown(ctm, "\n") and not ctm.startswith(";")
    assert [len(row.split()) for row in ctm.splitlines()] == [6] * len(texts)
    for made, arrow in ((words.as_srt(transcript), ","), (words.as_vtt(transcript)[8:], ".")):
        cues = made.split("\n\n")[:-1]
        assert is_shown(made, "\n") and made.count("-->") == len(cues) == len(words.cues(heard))
        assert all(line.strip() for cue in cues for line in cue.split("\n"))
        assert all(f"{arrow}000 --> " in cue for cue in cues)
    assert not set("<>") & set(words.as_vtt(transcript).replace("-->", ""))


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_a_recording_has_its_own_name_in_ctm(name):
    heard = [words.Word("x", 0.0, 0.1, 0.5)]
    made = words.as_ctm(words.Transcript(os.fsdecode(name), "x", 1.0, heard))
    assert unquote_to_bytes(made.split()[0]) == name


def test_honest_names_are_as_they_are():
    heard = [words.Word("50%", 0.0, 0.1, 0.5)]
    name = "Ü/今天;a-b_[1]+'.wav"
    transcript = words.Transcript(name, "50%", 1.0, heard)
    assert words.as_ctm(transcript) == f"{name} 1 0.000 0.100 50% 0.5000\n"
    assert words.as_txt(transcript) == f"{name}\t50%\n"
    assert files.csv_text([["train", name, "no audio"]]) == f"train,{name},no audio\r\n"


FORMULAS = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1")
FORMULAS += ("a;=1", "a; @b", '";=1')


@pytest.mark.parametrize("cell", [*FORMULAS, *HOSTILE])
def test_no_cell_is_a_formula_or_a_line_of_its_own(cell):
    text = files.csv_text([("split", "file_name", "reason"), ("train", cell, "why")])
    (_, row) = csv.reader(io.StringIO(text, newline=""))
    assert len(row) == 3 and row[2] == "why"
    assert is_shown(text, "\r", "\n") and text.count("\n") == 2
    assert all(part.strip()[:1] not in [*"=+-@＝"] for part in row[1].split(";"))


def test_what_is_not_finite_is_null_in_json():
    data = {"wer": math.nan, "rows": [math.inf, {"a": -math.inf}], "b": (1, 1e300, "NaN")}
    expected = '{"wer": null, "rows": [null, {"a": null}], "b": [1, 1e+300, "NaN"]}'
    assert files.json_text(data) == expected
    text = files.json_text({"a": "\x9b\x7fé\u202e\udce9"}, ensure_ascii=False, indent=1)
    assert text == '{\n "a": "\\u009b\\u007fé\\u202e\\udce9"\n}'


@pytest.mark.parametrize(
    "hostile", ["\x1b]0;title\x07", "a\nforged", "a\x9b2J", ["a\nb"], {"a": "\x1b"}, 1e308]
)
def test_tables_and_the_model_card_show_what_a_run_says_of_itself(hostile, capsys):
    compare.print_table(("run", "\x1b[2J"), [["a", hostile]])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 and is_shown(out, "\n") and len(out) < 250
    assert is_shown(export.markdown(compare.as_cell(hostile)))


def test_a_cell_of_the_model_card_is_one_cell_and_no_html():
    cell = export.markdown("a|<script>[x](https://x) &amp;")
    assert cell == "a\\|\\<script\\>\\[x\\](https\\://x) \\&amp;"


def test_what_libraries_log_and_warn_of_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    try:
        cli.run(lambda _: None)
        given = ("x", logging.INFO, "x", 1, "%s is\x1b[2J", ("a\nb\udce9",), None)
        record = logging.getLogger("x").makeRecord(*given)
        assert record.getMessage() == "a b\\udce9 is\\x1b[2J"
        line = warnings.formatwarning("a\nb\x1b", UserWarning, "x.py", 1)
        assert line == "x.py:1: UserWarning: a b\\x1b\n"
    finally:
        logging.setLogRecordFactory(before)


def test_what_is_told_of_a_recording_is_one_line(capsys):
    transcribe.tell("note", transcribe.Recording("a\n\x1b[2J.wav", "a"), "odd\n\x1b")
    transcribe.show_heard("a\x1b[2J\nb", 1.0, True)
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 2 and is_shown(err, "\n")


def command(code: str, redirect: str = "", **kwargs) -> subprocess.CompletedProcess:
    """Runs a command whose main is `code`, as a shell starts it with `redirect` behind it."""
    code = f"import cli, os, sys\ndef main(_):\n {code}\ncli.run(main)"
    kwargs["env"] = os.environ | {"PYTHONUNBUFFERED": ""} | kwargs.get("env", {})
    words = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(words, cwd=ROOT, timeout=DEADLINE, **pipes | kwargs)


full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
WAYS = {
    "midway": "print('x', flush=True); print('y')",
    "at the end": "print('x')",
    "before status 2": "print('x'); sys.exit(2)",
    "before an error": "print('x'); raise cli.UserError('first')",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("redirect", [pytest.param(">/dev/full", marks=full), ">&-"])
def test_output_that_cannot_be_written_is_one_line(redirect, way):
    done = command(WAYS[way], redirect)
    reason = b"No space left" if "full" in redirect else b"Bad file descriptor"
    if "error" in way:
        reason = b"first"
    assert done.returncode == 2 and done.stderr.startswith(b"-c: error: ") and reason in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_reader_that_has_enough_ends_a_command_quietly(way):
    reading, writing = os.pipe()
    os.close(reading)
    done = command(WAYS[way], stdout=writing)
    os.close(writing)
    expected = (2, b"-c: error: first\n") if "error" in way else (141, b"")
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize("redirect", ["2>&-", pytest.param("2>/dev/full", marks=full), "<&- 2>&-"])
def test_what_stderr_cannot_take_ends_nothing(redirect, tmp_path):
    mine = tmp_path / "mine"
    steps = ["print('n' * 9999, file=sys.stderr)", f"open({str(mine)!r}, 'w').write('x')"]
    if "full" not in redirect:
        steps.append("os.write(2, b'?')")
    done = command("; ".join([*steps, "print('out')"]), redirect)
    assert (done.returncode, done.stdout) == (0, b"out\n") and mine.read_text() == "x"
    assert command("raise cli.UserError('bad')", redirect).returncode == 2


def test_a_small_file_is_read_whole_and_takes_the_room_of_its_size(tmp_path, monkeypatch):
    asked = []

    class Asked(io.FileIO):
        def read(self, size):
            asked.append(size)
            return super().read(min(size, 2**15))  # as of a file that grows

    monkeypatch.setattr(files, "open_file", Asked)
    path = tmp_path / "file"
    for size in (0, 5, 2**17):
        path.write_bytes(size * b"x")
        for limit in (size, 2**34):
            assert files.read_small(str(path), limit) == size * b"x"
        for limit in range(max(size - 1, 0), size):
            with pytest.raises(ValueError, match=f"longer than {limit} bytes"):
                files.read_small(str(path), limit)
    assert max(asked) == 2**17 + 1
    # The files of /proc have no size.
    assert files.read_small("/proc/self/status").startswith(b"Name:")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:strict"])
def test_json_is_json_in_every_encoding(encoding):
    text = "a\\\xe9\u4eca\U0001f600\udce9\x9b"
    code = f"import files; print(files.json_text({text!r}, ensure_ascii=False)); print({text!r})"
    done = command(code, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    line, shown = done.stdout.decode(encoding.split(":")[0]).splitlines()
    assert json.loads(line) == text and shown.startswith("a\\") and len(shown) > 4


# ---- Tracebacks

# Some flags replace the file that they name, so no value names a place outside the test's folder.
VALUES = (
    *("0", "-1", "1", "2", "0.5", "-0.0", "nan", "inf", "-inf", "1e308", "1e-308"),
    *("1" + 30 * "0", "9" * 5000, "", "x", "\0", "\u00e9", "caf\udce9", "\x1b[2J\n"),
    *("x" * 300, "x/" * 3000, "1 2", "\uff12", ".", "data"),
)
SIZES = " ".join([*TINY_FLAGS, "--accelerator", "cpu"])
# The arguments with which each command works in the folder of `place`.
COMMANDS = {
    "train": f"--data_root data --output_dir new {SIZES}",
    "score": "--checkpoint best.ckpt --data_root data --split dev",
    "transcribe": "--checkpoint best.ckpt source/train/0.wav",
    "align": "--checkpoint best.ckpt",
    "export": "--checkpoint best.ckpt --out new",
    "parity": "--checkpoint best.ckpt --data_root data",
    "prepare": "--source source --data_root new",
    "demo": "--out new --texts source/train/metadata.csv",
    "bench": "growth",
    "torture": "--kills 1",
    "compare": ".",
    "wenet_import": "source --out new.ckpt",
}


class Reached(Exception):
    """The work has begun, so the options hold."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Makes a folder with data, a source of data, and a checkpoint on fbank of random weights."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for split in ("train", "dev"):
        rows = [rng.standard_normal(8000).astype(np.float32) for _ in range(2)]
        columns = {"input_values": rows, "labels": [{"input_ids": [4, 5]}] * 2, "text": ["ab"] * 2}
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "data" / split / "0"))
        (folder / "source" / split).mkdir(parents=True)
        soundfile.write(folder / "source" / split / "0.wav", rows[0] / 10, 16000)
        (folder / "source" / split / "metadata.csv").write_text("file_name,text\n0.wav,abc\n")
    tokenizer = train_char(["abcdefgh"])
    save_tokenizer(tokenizer, str(folder / "data" / "tokenizer.json"))
    model = tiny_model(tokenizer, frontend=Frontend(frontend="fbank"))
    save_model(model, folder / "best.ckpt")
    return folder


def flags(name) -> list:
    """Returns the actions of a command's parser."""
    found = []

    def parse_args(parser, _):
        found.extend(parser._actions)
        raise Reached

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        module(name).main([])
    return [action for action in found if action.option_strings and action.dest != "help"]


def reached(*_, **__):
    raise Reached


def train_a_little(trainer, model, datamodule, **_):
    """Stands for Lightning's fit: one step over the largest batch, unless `small` has left the
    model without numbers."""
    if not next(model.parameters()).is_meta:
        batch = datamodule.largest_batches()[0]
        labels = (batch.labels, batch.label_lengths)
        model.net.loss(batch.features, batch.feature_lengths, *labels)["loss"].backward()
    raise Reached


@functools.cache
def is_large(options, frontend) -> bool:
    """Tells whether weights with numbers would take much memory and time."""
    with torch.device("meta"):
        net = make_net(options, frontend, train_char(["abcdefgh"]))
    return sum(p.numel() for p in net.parameters()) > 10**7


def small(**given):
    """Makes a U2, whose weights have numbers where that takes little memory and time."""
    options = given["options"]
    if max(options.num_blocks, options.decoder_num_blocks, options.r_num_blocks) > 20:
        raise Reached
    if is_large(options, given["frontend"]):
        with torch.device("meta"):
            return U2(**given)
    return U2(**given)


def write_texts(model, options, chunks, folder):
    """Stands for export.write_checked: makes the texts beside the graphs, and no graph."""
    return export.texts(model, chunks) and []


def work_is_short(patch):
    """Lets commands end where their long work begins, or do little of it, and read files once."""
    read = functools.cache(read_checkpoint)
    patch.setattr("model.read_checkpoint", lambda path: copy.deepcopy(read(path)))
    patch.setattr(train.L.Trainer, "fit", train_a_little)
    patch.setattr(train, "U2", small)
    patch.setattr(callback_connector, "_load_external_callbacks", lambda _: [])  # of all packages
    opened = functools.cache(datamodule.get_concat_dataset)
    patch.setattr(
        datamodule, "get_concat_dataset", lambda roots, split: opened(tuple(roots), split)
    )
    patch.setattr(align.demo, "plan", lambda *_: [align.speak.Utterance("ab", "f1", 150, 50)])
    patch.setattr(align.speak, "speak_with_words", lambda _: (np.zeros(9000, np.float32), []))
    patch.setattr(align.demo, "write_wavs", reached)
    patch.setattr(align, "summary", lambda _: defaultdict(float, words=1))
    patch.setattr(export, "write_checked", write_texts)
    patch.setattr(parity, "all_outcomes", reached)
    patch.setattr(torture, "unbroken", reached)
    patch.setattr(sources, "hub_source", reached)
    for what, (_, *takes) in bench.COMMANDS.items():
        patch.setitem(bench.COMMANDS, what, (lambda *_: {}, *takes))


def outcome(name, argv, capsys) -> str | None:
    """Returns None where the command runs, or the line with which it ends in status 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *argv])
        try:
            cli.run(module(name).main)
        except Reached:
            return None
        except SystemExit as ended:
            if ended.code != 2:
                raise
            *_, line = capsys.readouterr().err.splitlines()
            assert ": error: " in line and len(line) < 1200 and line.isprintable(), line
            return line


@pytest.mark.parametrize("name", COMMANDS)
def test_any_value_of_any_flag_is_one_line_or_a_run(name, place, tmp_path, monkeypatch, capsys):
    """Each flag gets two values by chance, and its own bounds; a switch is given."""
    rng = random.Random(name)
    counts = Counter()
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    work_is_short(monkeypatch)
    two_bounds = r"(?:within |above )(\S+?)(?: \.\.|,) (?:at most )?([^\s)]+)"
    for flag in flags(name):
        bounds = re.findall(two_bounds, flag.help)
        values = [[value] for value in (*rng.sample(VALUES, 2), *(bounds[0] if bounds else ()))]
        for value in values if flag.nargs != 0 else [[]]:
            argv = [*COMMANDS[name].split(), flag.option_strings[-1]]
            line = outcome(name, argv + value, capsys)
            counts[line is None] += 1
            for made in ("new", "new.ckpt"):
                shutil.rmtree(tmp_path / made, ignore_errors=True)
    assert counts[True] or name in ("compare", "wenet_import")
    assert counts[False] or name == "compare"  # compare has no flags


@pytest.mark.parametrize(
    "name, before",
    [
        ("transcribe", "--checkpoint best.ckpt"),
        ("compare", ""),
        ("wenet_import", "--out x.ckpt"),
        ("wenet_import", "--out x --export"),
        ("wenet_import", "--export best.ckpt --out"),
    ],
)
def test_what_is_no_flag_of_a_dataclass_is_text_too(name, before, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for value in ("", "\0", "x/" * 3000):
        assert "it must be text" in outcome(name, [*before.split(), value], capsys)


OUTPUTS = ("best.ckpt", "last.ckpt", "run.json", "scores.jsonl", "skipped.jsonl", "steps.jsonl")
OUTPUTS += ("logs/events.out.tfevents.1",)
IN_THE_WAY = [
    *((name, kind) for name in (*OUTPUTS[:-1], ".lock") for kind in ("folder", "link", "pipe")),
    *(("logs", kind) for kind in ("file", "link", "pipe")),
    *((f".last.ckpt{end}", "folder") for end in (files.ASIDE, f"{files.ASIDE}.lock")),
]


@pytest.mark.parametrize("name, kind", IN_THE_WAY)
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_what_lies_in_the_way_of_a_run_is_seen_before_anything_is_deleted(
    name, kind, flag, place, tmp_path
):
    for output in OUTPUTS:
        (tmp_path / "run" / output).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / output).write_text("mine")
    shutil.copytree(tmp_path / "run", tmp_path / "theirs")
    put(tmp_path / "run" / name, kind)
    before = tree(tmp_path)
    argv = ["--data_root", str(place / "data"), "--output_dir", str(tmp_path / "run"), flag]
    with pytest.raises(cli.UserError, match=f"--output_dir .*{name} is (no file|no folder|a link)"):
        train.main(argv)
    assert tree(tmp_path) == before


NO_RUN = ("file", "file/a/b", "pipe", "link", "x" * 300, "x/" * 3000, "/proc/x", "/dev/null")


@pytest.mark.parametrize("output", [*NO_RUN, "\0", "caf\udce9", "file::1/run"])
def test_where_no_run_can_be_written_is_one_line(output, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in ("file", "pipe", "link"):
        put(tmp_path / kind, kind)
    argv = f"--data_root {place / 'data'} --max_epochs 1 {SIZES}".split()
    assert "--output_dir" in outcome("train", [*argv, "--output_dir", output], capsys)


def test_a_data_root_of_two_colons_is_refused_and_no_other_file_written(place, tmp_path, capsys):
    """To fsspec, through which datasets writes, such a name is a file within the file before."""
    (tmp_path / "file").write_text("mine")
    argv = ["--source", str(place / "source"), "--data_root", str(tmp_path / "file::1" / "new")]
    assert "two colons in a name" in outcome("prepare", argv, capsys)
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", ["", "logs", "logs/events.out.tfevents.1", "last.ckpt"])
def test_a_run_that_may_not_be_changed_is_seen_before_anything_is_deleted(
    name, place, tmp_path, monkeypatch, capsys
):
    """os.access is replaced, because the tests may run as root, who may change everything."""
    for output in OUTPUTS:
        (tmp_path / output).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / output).write_text("mine")
    closed = str(tmp_path / ("logs" if "tf" in name else name))
    access = os.access

    def denied(path, mode):
        return os.path.realpath(path) != closed and access(path, mode)

    monkeypatch.setattr(os, "access", denied)
    argv = ["--data_root", str(place / "data"), "--output_dir", str(tmp_path), "--overwrite"]
    line = outcome("train", argv, capsys)
    assert "cannot be written" in line and tree(tmp_path) == dict.fromkeys(OUTPUTS, b"mine")


def starts(place, folder) -> list[list[str]]:
    """Returns the arguments of two trainings that go on from last.ckpt in a folder."""
    data = ["--data_root", str(place / "data")]
    new = ["--output_dir", str(folder / "new")]
    return [
        [*data, "--resume", str(folder)],
        [*data, "--init_from", str(folder / "last.ckpt"), *new],
    ]


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("run_options", "lr", float("nan")),
        ("run_options", "speeds", "fast"),
        ("run_options", "data_root", [1]),
        ("model_options", "dropout_rate", 7.0),
        ("frontend", "num_mel_bins", 10**30),
        ("optim_options", "warmup_steps", None),
    ],
)
def test_options_within_a_checkpoint_are_checked_as_flags_are(
    part, name, value, place, tmp_path, capsys
):
    checkpoint = trusted(place / "best.ckpt") | {"loops": {}}
    checkpoint[part] = checkpoint.get(part, {}) | {name: value}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    for argv in starts(place, tmp_path):
        line = outcome("train", argv, capsys)
        assert "last.ckpt: " in line and f"--{name} " in line
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("part", ["run_options", "optim_options"])
def test_options_within_a_checkpoint_that_are_none_are_one_line(part, place, tmp_path, capsys):
    checkpoint = trusted(place / "best.ckpt") | {"loops": {}, part: -1}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    for argv in starts(place, tmp_path):
        assert "last.ckpt: " in outcome("train", argv, capsys)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "a\nb"),
        OSError("odd"),
        MemoryError(),
        RecursionError("deep"),
        RuntimeError("CUDA out of memory. Tried to"),
    ],
)
def test_bad_luck_that_no_place_has_foreseen_is_one_line(error, monkeypatch, capsys):
    def main(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_mistake_of_the_program_is_still_a_traceback(monkeypatch):
    def main(_):
        raise RuntimeError("shape")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(RuntimeError, match="shape"):
        cli.run(main)


# ---- Streams


def click(samples, value):
    samples[100] = value
    return samples


DEAFENING = {
    "a click at the start": click(torch.zeros(800), 1e4),
    "a click in sound": click(0.05 * noise(16000), -1e30),
    "20 s of loud noise": 0.5 * noise(320000),
    "20 s of a constant": torch.full((320000,), 0.9),
    "too loud": 3 * noise(80000),
    "a bang": torch.cat((0.05 * noise(9600), 1e4 * noise(1600))),
    "a row of nan": torch.full((16000,), math.nan),
    "one infinity": click(0.05 * noise(16000), -math.inf),
    "half a minute of nothing": torch.zeros(480000),
}


def last_second(frontend, windows, state) -> torch.Tensor:
    """Returns the last features of a stream that goes on from `state` with a quiet sound."""
    advance = stream_features(frontend)
    quiet = 0.02 * noise(16000, seed=1)
    for _ in range(int(STREAM_WINDOW * windows)):
        features, state = advance(quiet, state)
        assert features.isfinite().all()
    return features


@functools.cache
def spared(frontend, windows) -> torch.Tensor:
    return last_second(frontend, windows, feature_state())


@pytest.mark.parametrize(
    "frontend", [Frontend(), Frontend(frontend="fbank")], ids=["log_mel", "fbank"]
)
@pytest.mark.parametrize("attack", DEAFENING)
def test_no_sound_deafens_a_stream_for_good(attack, frontend):
    """Twelve windows after the sound, or two after a click, a stream has the same features as a
    stream that was spared."""
    windows = 2 if "click" in attack else 12
    hurt, state = stream_features(frontend)(DEAFENING[attack], feature_state())
    assert len(hurt) and hurt.isfinite().all()
    heard = last_second(frontend, windows, state)
    torch.testing.assert_close(heard, spared(frontend, windows), rtol=0, atol=0.5)


@pytest.fixture
def pipe():
    """Returns a function that feeds pieces of bytes, perhaps without end, to standard input."""
    saved = os.dup(0)
    threads = []

    def feed(pieces):
        def write():
            with contextlib.suppress(BrokenPipeError), open(into, "wb", buffering=0) as file:
                for piece in pieces:
                    file.write(piece)

        out, into = os.pipe()
        os.dup2(out, 0)
        os.close(out)
        threads.append(threading.Thread(target=write))
        threads[-1].start()

    yield feed
    os.dup2(saved, 0)  # the writer finds its pipe broken
    os.close(saved)
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize(
    "start, repeated",
    [
        (b"RIFF\xff\xff\xff\xffWAVELIST\xff\xff\xff\xff", bytes(2**16)),
        (b"RIFF\xff\xff\xff\xffWAVELIST\xff\xff\x3f\0", bytes(2**16)),
        (b"RIFF\xff\xff\xff\xffWAVE", b"JUNK\0\0\0\0" * 2**13),
        (b"RF64\xff\xff\xff\xffWAVE", b"ds64\0\0\0\0" * 2**13),
        (b".snd\xff\xff\xff\xff" * 2, bytes(2**16)),
        (b"caff\0\1\0\0free" + b"\x7f" * 8, bytes(2**16)),
        (b"", bytes(2**16)),
        (b"ID3\4\0\0\x7f\x7f\x7f\x7f", bytes(2**16)),
        (b"fLaC\0", b"\xff" * 2**16),
    ],
    ids=["LIST", "LIST, small", "JUNK", "ds64", "au", "caf", "0", "ID3", "flac"],
)
def test_a_pipe_whose_header_has_no_end_is_refused_in_little_memory(pipe, start, repeated):
    pipe(itertools.chain([start], itertools.repeat(repeated)))
    tracemalloc.start()
    try:
        with pytest.raises(cli.UserError, match="cannot be decoded: .*; pipe wav"):
            next(audio.read_blocks("-", 16000))
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF"])
def test_a_pipe_whose_header_lies_is_sound_or_one_line(pipe, format):
    rng = np.random.default_rng(0)
    whole = sound_file(0.1 * np.sin(np.arange(3000)), kind=format)
    header = 60 if format == "AIFF" else min(whole.find(b"data") + 30, 120)
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 6)):
            content[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        pipe([bytes(content)])
        try:
            for block in audio.read_blocks("-", 16000, damaged=str):
                assert block.ndim == 1 and np.isfinite(block).all()
        except cli.UserError as error:
            assert len(str(error)) < 300 and "\n" not in str(error)


def test_a_pipe_on_which_nothing_comes_any_more_ends_with_ctrl_c_and_what_came_is_heard(world):
    words = ["--checkpoint", world / "best.ckpt", "--stream", "--chunk_size", "4", "-"]
    (given, stdin), (stdout, out), (stderr, err) = (os.pipe() for _ in range(3))
    files = dict(enumerate((given, out, err)))
    child = forked(ROOT / "transcribe.py", words, files, unused=[stdin])
    for file in (given, out, err):
        os.close(file)
    wav = sound_file(0.1 * np.sin(np.arange(3000)))
    samples = (np.random.default_rng(0).normal(0, 0.1, 14400) * 32767).astype("<i2").tobytes()
    with open(stdin, "wb") as pipe, open(stdout) as said, open(stderr) as told:
        pipe.write(wav[:40] + b"\xff" * 4 + samples)
        pipe.flush()  # the pipe stays open
        first = told.readline()
        os.kill(child, signal.SIGINT)
        final = (first + told.read()).splitlines()[-1]
        assert " s " in first  # the first chunk has been heard
        assert said.read()[:2] == "-\t" and os.waitpid(child, 0)[1] == 0
        assert final.split()[:3] == ["0.90", "s", "="]  # all of its samples


def test_a_stream_of_integer_steps_is_scaled_as_any_other():
    advance = stream_features(Frontend())
    fine, _ = advance(0.05 * noise(16000), feature_state())
    coarse, _ = advance(32768 * 0.05 * noise(16000), feature_state())
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-3)


# ---- Small mistakes


SCORE = dict(checkpoint="runs/a/best.ckpt", data_root="data/a", split="dev", stream=False)
SCORE |= dict(mode="attention_rescoring", concatenate=False, beam_size=10, chunk_size=-1)
SCORE |= dict(left_chunks=-1, ctc_weight=0.5, reverse_weight=0.3)
SCORE |= dict(utterances=9, wer=0.5, cer=0.25, rtf=0.1)


def write_scores(folder: Path, *scores: dict, end: str = "") -> None:
    """Writes a run with these scores, and then `end`, in its scores.jsonl."""
    folder.mkdir(exist_ok=True)
    (folder / "best.ckpt").touch()
    (folder / "run.json").write_text(json.dumps({"options": {}, "metrics": {}}))
    lines = "".join(json.dumps(score) + "\n" for score in scores)
    (folder / "scores.jsonl").write_text(lines + end)


@pytest.mark.parametrize(
    "asked",
    [
        {"hotwords": "names.txt", "context_score": 2.0},
        {"beam_size": 1},
        {"ctc_weight": 0.0},
        {"reverse_weight": 0},
        {"concatenate": True},
        {"checkpoint": "runs/a/last.ckpt"},
    ],
    ids=str,
)
@pytest.mark.parametrize("plain", [True, False])
def test_a_score_that_was_asked_for_otherwise_is_not_shown_as_the_plain_one(
    asked, plain, tmp_path, capsys
):
    write_scores(tmp_path / "run", *[SCORE] * plain, {**SCORE, **asked, "wer": 0.125})
    compare.main([str(tmp_path / "run")])
    header, *rows = capsys.readouterr().out.split("scores\n")[1].splitlines()
    assert len(rows) == 1 + plain
    assert set(asked) <= set(header.split()) or not plain and "checkpoint" in asked
    card = export.score_table(str(tmp_path / "run" / "best.ckpt"))
    assert "0.1250" not in card and ("0.5000" in card) == plain and ("None yet" in card) != plain


def test_scores_of_several_data_roots_say_so_and_an_older_one_gives_way_to_the_same_asked_again(
    tmp_path, capsys
):
    other = {**SCORE, "data_root": "data/b"}
    scores = ({**SCORE, "wer": 0.9}, other, {**SCORE, "rtf": 0.2})
    write_scores(tmp_path / "run", *scores, end='{"split": "dev", "mode": "att')
    compare.main([str(tmp_path / "run")])
    header, *rows = capsys.readouterr().out.split("scores\n")[1].splitlines()
    assert "data_root" in header and len(rows) == 2 and "0.9" not in "".join(rows)
    assert "data/b" in export.score_table(str(tmp_path / "run" / "best.ckpt"))


def test_the_scores_of_many_nights_are_read(tmp_path):
    write_scores(tmp_path, SCORE, end=" " * 2**24)
    assert len(compare.read_scores(str(tmp_path))) == 1


NO_SCORES = (b"\xff\xfe{", b"[" * 10**5, b"{}", b"[1]", b'{"wer": NaN, "mode": 1}', b"\0")


@pytest.mark.parametrize("line", [*NO_SCORES, b'{"mode": "\xe2\x82'])
def test_lines_that_are_no_scores_are_passed_over(line, tmp_path):
    write_scores(tmp_path / "run", SCORE)
    with open(tmp_path / "run" / "scores.jsonl", "ab") as file:
        file.write(line)
    assert [score["wer"] for score in compare.read_scores(str(tmp_path / "run"))] == [0.5]


def test_a_score_says_what_it_was_asked_for(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "names.txt").write_text("ab\n")
    score.main([*COMMANDS["score"].split(), "--hotwords", "names.txt", "--beam_size", "3"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(SCORE) <= set(said)
    assert said["data_root"] == "data" and said["checkpoint"] == "best.ckpt"
    assert set(compare.unusual(said)) == {"hotwords", "context_score", "beam_size"}


def test_no_validation_is_of_an_epoch_behind_the_last(place, tmp_path, caplog):
    argv = f"--data_root {place / 'data'} --output_dir {tmp_path / 'run'} {SIZES}".split()
    argv += "--num_workers 0 --check_val_every_n_epoch 2 --max_epochs 3".split()
    with caplog.at_level("INFO"):
        train.main(argv)
    assert re.findall(r"epoch (\d+), step", caplog.text) == ["2", "3"]
