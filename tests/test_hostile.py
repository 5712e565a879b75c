"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import contextlib
import io
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_score import world  # noqa: F401 (a fixture)

import audio
import cli

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


@pytest.fixture
def pipe():
    """A function that has pieces of bytes, of which there may be no end, come on standard input."""
    saved, threads = os.dup(0), []

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


def sound_file(format, subtype="PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(3000)), 16000, format=format, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("start, repeated", [
    (b"RIFF\xff\xff\xff\xffWAVELIST\xff\xff\xff\xff", bytes(2**16)),
    (b"RIFF\xff\xff\xff\xffWAVELIST\xff\xff\x3f\0", bytes(2**16)),
    (b"RIFF\xff\xff\xff\xffWAVE", b"JUNK\0\0\0\0" * 2**13),
    (b"RF64\xff\xff\xff\xffWAVE", b"ds64\0\0\0\0" * 2**13),
    (b".snd\xff\xff\xff\xff" * 2, bytes(2**16)), (b"caff\0\1\0\0free" + b"\x7f" * 8, bytes(2**16)),
    (b"", bytes(2**16)), (b"ID3\4\0\0\x7f\x7f\x7f\x7f", bytes(2**16)),
    (b"fLaC\0", b"\xff" * 2**16)],
    ids=["LIST", "LIST, small", "JUNK", "ds64", "au", "caf", "0", "ID3", "flac"])
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
    rng, whole = np.random.default_rng(0), sound_file(format)
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
    command = [sys.executable, ROOT / "transcribe.py", "--checkpoint", world / "best.ckpt",
               "--stream", "--chunk_size", "4", "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes)
    wav = sound_file("WAV")
    samples = (np.random.default_rng(0).normal(0, 0.1, 14400) * 32767).astype("<i2").tobytes()
    try:
        process.stdin.write(wav[:40] + b"\xff" * 4 + samples)
        process.stdin.flush()  # and the pipe stays open
        assert b" s " in process.stderr.readline()  # the first chunk has been heard
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE)
        assert (process.returncode, process.stdout.read()[:2]) == (0, b"-\t")
        *_, final = process.stderr.read().decode().splitlines()
        assert final.split()[:3] == ["0.84", "s", "="]  # all frames of it
    finally:
        process.kill()
        process.communicate()


# --------------------------------------------------------------------------------------------------- small, but wrong
