"""What several test files share, without Lightning: files, sounds, tensors and tiny networks.

helpers_model.py holds what needs a whole model, helpers_train.py what runs train.py. Fixtures that
several files take are in conftest.py. No test file imports another.
"""

import ast
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, settings

from conformer import U2Conformer
from decode import SearchOptions
from presets import ModelOptions

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])  # of the project, without its tests

# Sizes of a model that trains in a blink, as options and as flags of train.py.
SIZES = dict(
    output_size=16,
    attention_heads=2,
    linear_units=32,
    num_blocks=1,
    cnn_module_kernel=3,
    decoder_num_blocks=1,
    r_num_blocks=1,
    decoder_linear_units=32,
)
TINY = ModelOptions(**SIZES)
TINY_FLAGS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
# With a second block, what one block hands to the next is tested as well.
TWO_BLOCKS = dataclasses.replace(TINY, num_blocks=2, cnn_module_kernel=5)
VARIANTS = {
    "transformer": dict(
        encoder="transformer", selfattention_layer_type="selfattn", pos_enc_layer_type="abs_pos"
    ),
    "transformer_rel": dict(encoder="transformer"),
    "batch_norm": dict(cnn_module_norm="batch_norm", causal=False),
    "abs_pos": dict(
        pos_enc_layer_type="abs_pos", selfattention_layer_type="selfattn", activation_type="relu"
    ),
    "heads": dict(decoder_attention_heads=4),
}


def module(name: str):
    """The module of a command, at the top or in tools/."""
    return importlib.import_module(
        f"tools.{name}" if (ROOT / "tools" / f"{name}.py").exists() else name
    )


def imported(path):
    """The modules that a file imports, tools.NAME as NAME."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("tools.").split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "tools":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.removeprefix("tools.").split(".")[0]


def tree(folder) -> dict:
    """Every file below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def json_lines(path) -> list:
    """The values in a file of one JSON value a line; none where the file is absent."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def one_line(caught: pytest.ExceptionInfo) -> str:
    """The message of a caught error, which must be a single line."""
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trusted(path) -> dict:
    """Reads a checkpoint that the tests wrote; torch reads faster where it trusts a file."""
    return torch.load(path, weights_only=False)


def forked(script, words, files, cwd=None, unused=()) -> int:
    """Starts a script as a program and returns its process's number.

    It runs in a fork of this process, because a new Python would import torch for seconds. `files`
    are {0, 1 or 2: descriptor}; the `unused` descriptors are closed in the child.
    """
    if child := os.fork():
        return child
    status = 1
    try:
        for number, file in files.items():
            os.dup2(file, number)
        for file in unused:
            os.close(file)
        os.chdir(cwd or ".")
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
        sys.argv = [str(script), *map(str, words)]
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def as_program(cwd, script, *words):
    """Runs a script as a program in the folder `cwd`: (exit status, stdout, stderr)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = forked(script, words, {1: out.fileno(), 2: err.fileno()}, cwd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


def cases(count: int) -> settings:
    """Settings of a property that is tried on `count` drawn examples.

    The draws are the same in every run, so that a test that passed passes again. There is no
    deadline, because a busy machine must not fail a test.
    """
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def encoded(samples, format="WAV", subtype=None, rate=16000, **how) -> bytes:
    """The content of a sound file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype, **how)
    return file.getvalue()


def noise(*size, seed=None, dtype=torch.float32):
    """Standard normal numbers. Without a seed, each size has its own, so that two noises differ."""
    generator = torch.Generator().manual_seed(sum(size) if seed is None else seed)
    return torch.randn(*size, dtype=dtype, generator=generator)


def same(left, right) -> bool:
    """Whether two sequences of tensors are equal to the bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def network(seed=0, **changes) -> U2Conformer:
    """A network with random weights for 80 features and 12 tokens; `changes` replace options."""
    torch.manual_seed(seed)
    return U2Conformer(dataclasses.replace(TWO_BLOCKS, **changes), 80, 12, 0, 2, 3).eval()


def distance(a, b) -> int:
    """Levenshtein distance of two sequences, by its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def beams(size):
    """SearchOptions with a beam of any size, beyond the bounds of the flag, too."""
    search = SearchOptions()
    object.__setattr__(search, "beam_size", size)
    return search


def random_log_probs(*shape, seed=0, sharpness=2.0):
    """Log-probabilities over the last axis; the larger `sharpness`, the surer they are."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator)).log_softmax(dim=-1)


def collapse(path, blank_id):
    """The token sequence of a CTC path: repetitions are joined, then blanks are removed."""
    return tuple(token for token, _ in itertools.groupby(path) if token != blank_id)


def all_sequences(log_probs, blank_id):
    """Every token sequence and its exact probability: the sum over all V^T paths."""
    frames, vocabulary = log_probs.shape
    sums = {}
    for path in itertools.product(range(vocabulary), repeat=frames):
        sequence = collapse(path, blank_id)
        sums[sequence] = sums.get(sequence, 0.0) + math.exp(
            sum(log_probs[t, v].item() for t, v in enumerate(path))
        )
    return sums


def earned(automaton, tokens) -> float:
    """What an automaton gives to a whole sequence."""
    state = np.zeros((), np.int64)
    total = 0.0
    for token in tokens:
        state, gain = automaton.step(state, np.array(token))
        total += float(gain)
    return total - float(automaton.pending(state))
