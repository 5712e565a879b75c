"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
from transforms import STREAM_WINDOW, Frontend, feature_state, stream_features

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


def noise(seconds, loudness, seed=0):
    return loudness * torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed))


def click(samples, value):
    samples[100] = value
    return samples


DEAFENING = {
    "a click at the start": click(torch.zeros(800), 1e4), "a click in sound": click(noise(1, 0.05), -1e30),
    "20 s of loud noise": noise(20, 0.5), "20 s of a constant": torch.full((320000,), 0.9),
    "much too loud": noise(5, 1e6), "a row of nan": torch.full((16000,), math.nan),
    "one infinity": click(noise(1, 0.05), -math.inf), "half a minute of nothing": torch.zeros(480000)}


@pytest.mark.parametrize("frontend", [Frontend(), Frontend(frontend="fbank")], ids=["log_mel", "fbank"])
@pytest.mark.parametrize("attack", DEAFENING)
def test_no_sound_deafens_a_stream_for_good(attack, frontend):
    """After ten windows a stream hears what one hears that was spared; after a click, after two."""
    advance, quiet = stream_features(frontend), noise(1, 0.02, seed=1)

    def heard(state):
        for _ in range(int(STREAM_WINDOW * (2 if "click" in attack else 10))):
            features, state = advance(quiet, state)
            assert features.isfinite().all()
        return features

    hurt, state = advance(DEAFENING[attack], feature_state())
    assert len(hurt) and hurt.isfinite().all()
    torch.testing.assert_close(heard(state), heard(feature_state()), rtol=0, atol=0.5)



# --------------------------------------------------------------------------------------------------- small, but wrong
