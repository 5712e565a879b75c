"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
import context
import files
import hub
import score
import transcribe
from cli import UserError

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


def publish(root, text="old", overwrite=False, **kwargs) -> None:
    with files.published(str(root), "a thing", overwrite, **kwargs) as folder:
        for shard in (0, 1):
            os.makedirs(f"{folder}/train/{shard}")
            Path(f"{folder}/train/{shard}/rows").write_text(text)
        Path(f"{folder}/notes.md").write_text(text)


@contextlib.contextmanager
def no_room(size):
    """Files of `size` bytes are all that the disk has room for."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


STEPS = "replace", "mkdir", "rmdir", "unlink", "remove", "fsync"  # of os, by which anything changes


def killed_at(number, act) -> bool:
    """Whether a process that does `act` was killed, which it is before its step `number`."""
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
        tmp_path, before, monkeypatch):
    monkeypatch.setattr(files, "DYING", 0.0)
    new, root = tmp_path / "new", tmp_path / "home" / "root"
    publish(new, "new")
    for number in itertools.count():
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        if before:
            publish(root)
        old = tree(root) if before else None
        killed = killed_at(number, lambda: publish(root, "new", overwrite=True))
        found = tree(root) if root.exists() else None
        whole = (old, tree(new)) if before else (None, {}, tree(new))
        assert found in whole or killed and found is None  # then the old one is aside
        if (aside := tmp_path / "home/.root.lightning-u2/old").exists():
            assert tree(aside) == old  # what may come back is never half deleted
        if found or before:
            with pytest.raises(UserError, match="root exists"):  # the next run finds it
                publish(root)
            assert tree(root) in (old, tree(new)) and os.listdir(tmp_path / "home") == ["root"]
        publish(root, "new", overwrite=True)
        assert tree(root) == tree(new) and os.listdir(tmp_path / "home") == ["root"]
        if not killed:
            break
    assert number > 20


@pytest.mark.parametrize("spoil", [
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
    lambda root: (root / "notes.md").unlink() or os.symlink("train/0/rows", root / "notes.md")])
def test_only_what_we_wrote_is_replaced(tmp_path, spoil):
    root, names = tmp_path / "root", ("root.partial", ".root.partial", "root.tmp", ".root.old")
    neighbours = [tmp_path / name for name in names]
    for folder in neighbours:
        folder.mkdir()
        (folder / "mine").touch()
    publish(root)
    (root / "train" / "0" / "cache-0123456789abcdef.arrow").touch()
    publish(root, "old", overwrite=True)  # what the datasets library leaves may go
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
    (tmp_path / "root").mkdir()  # as a container does that mounts it
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


@pytest.mark.parametrize("where, said", [
    (".", "is the current folder or holds it"), ("..", "is the current folder or holds it"),
    ("", "is the current folder"), ("file", "is a file"), ("loop", "is a file"),
    ("file/below", "cannot be written"), ("n" * 256, "cannot be written"),
    ("/proc/none", "cannot be written")])
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
    before, replace = tree(tmp_path), os.replace

    def busy(old, new):  # as the system has it
        if str(old) == str(tmp_path / "root"):
            raise OSError(errno.EBUSY, "busy")
        replace(old, new)
    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UserError, match="root cannot be replaced, being a mount point"):
        with files.published(str(tmp_path / "root"), "a thing", True):
            raise AssertionError("work has begun")
    assert tree(tmp_path) == before


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


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    publish(tmp_path / "root")
    before = tree(tmp_path)
    model = dict.fromkeys(hub.CONFIG_PARTS) | {"tokenizer": {}}
    model["state_dict"] = {"a": torch.zeros(10**5)}
    for write in (lambda folder: Path(folder, "a").write_bytes(bytes(10**5)),
                  lambda folder: hub.write_model(model, folder),
                  lambda folder: [Path(folder, str(number)).touch() for number in range(2000)]):
        with no_room(2**14), pytest.raises(UserError, match="root: cannot be written .*make room"):
            with files.published(str(tmp_path / "root"), "a thing", True) as folder:
                write(folder)
        assert tree(tmp_path) == before


def test_a_file_is_written_under_a_name_of_its_own_as_any_new_file(tmp_path):
    path, precious = tmp_path / "x", tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "x.tmp").write_text("mine")
    os.symlink(precious, files.aside(str(path)))
    files.write_whole(str(path), b"new")
    assert tree(tmp_path) == {"x": b"new", "x.tmp": b"mine", "precious": b"mine"}
    assert not path.is_symlink()
    assert os.stat(path).st_mode == os.stat(precious).st_mode  # what the umask leaves
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
    Path("words.txt").touch()  # empty, as a new file is, but read
    os.mkfifo("pipe")
    os.mkdir("folder")
    os.symlink("best.ckpt", "link")
    words = context.HotwordOptions(hotwords="words.txt")
    with pytest.raises(UserError, match=f"--details {name} .*; name another file"):
        score.check_details(score.ScoreOptions(checkpoint="best.ckpt", details=name), words)
    Path("details").write_text(json.dumps(score.describe("attention", 0, "a", "b")))
    for free in ("details", "new"):
        score.check_details(score.ScoreOptions(checkpoint="best.ckpt", details=free), words)


def test_details_do_not_go_where_the_scores_do(tmp_path):
    with open(tmp_path / "log", "w") as file:
        before, options = os.dup(1), score.ScoreOptions(details=str(tmp_path / "log"))
        os.dup2(file.fileno(), 1)
        try:
            with pytest.raises(UserError, match="where it prints"):
                score.check_details(options, context.HotwordOptions())
        finally:
            os.dup2(before, 1)
            os.close(before)


def test_transcripts_stay_below_their_folder_and_off_what_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/one/two", "out/deep", "elsewhere"):
        os.makedirs(folder)
    for path in ("a/x.wav", "a/y.wav", "out/words.txt", "a/talk.txt"):
        Path(path).touch()

    def places(*paths, out="out", words="", overwrite=True):
        options = transcribe.TranscribeOptions(output_dir=out, overwrite=overwrite)
        found = [recording for path in paths for recording in transcribe.find(path)]
        return transcribe.place(found, options, ("best.ckpt", words))
    assert places("a/one/*/../../x.wav", out="a/one/out") == ["a/one/out/x.txt"]
    assert places("/no/such.wav", "../up.wav") == ["out/such.txt", "out/up.txt"]
    os.symlink("../elsewhere", "out/one")
    os.symlink("../elsewhere/z.txt", "out/x.txt")
    os.symlink("deep", "out/also")
    os.makedirs("in/one"), os.makedirs("in/deep"), os.makedirs("in/also")
    for path in ("in/one/z.wav", "in/deep/w.wav", "in/also/w.wav", "words.wav"):
        Path(path).touch()
    for paths, said in ((["a/x.wav"], "outside"), (["in"], "both"),
                        (["a/one/../y.wav", "a/y.wav"], "both")):
        with pytest.raises(UserError, match=said):
            places(*paths)
    for path, words, out in (("words.wav", "out/words.txt", "out"), ("a/talk.txt", "", "a")):
        with pytest.raises(UserError, match="is what this command reads"):
            places(path, words=words, out=out)
    with pytest.raises(UserError, match="cannot be made"):
        places("a/y.wav", out="a/x.wav")


# ------------------------------------------------------------------------------------- files that promise too much


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
