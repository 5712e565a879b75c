"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

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


# --------------------------------------------------------------------------------------------------- small, but wrong
