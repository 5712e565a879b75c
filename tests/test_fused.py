"""fused.py's kernels: in Triton's interpreter they compute torch's numbers, and they compile.

What only a GPU can show, `tools.gpu_check` looks at there.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT

pytest.importorskip("triton")
import triton.runtime.jit
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fused
import kernels

# Each of these scripts prints a line of JSON.
CHECKS = """
import json, torch, fused, kernels
from helpers import VARIANTS, network

torch.set_num_threads(1)
print(json.dumps({name: check("cpu") for name, check in fused.CHECKS}))
"""
NETWORKS = """
features, lengths = torch.randn(2, 40, 80), torch.tensor([40, 31])
labels, label_lengths = torch.randint(4, 12, (2, 4)), torch.tensor([4, 2])
worst = []
for options in ({}, dict(causal=False), VARIANTS["transformer"]):
    net = network(**options, dropout_rate=0.0, attention_dropout_rate=0.0).train()
    found = []
    for triton in (fused, None):
        kernels.by_triton = lambda x: triton
        loss = net.loss(features, lengths, labels, label_lengths, 4, 1)["loss"]
        found.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    worst.append([float((ours - theirs).abs().max()) for ours, theirs in zip(*found)])
print(json.dumps(worst))
"""
DROPOUT = """
x = torch.ones(64, 1001)
drops = [
    fused.dropped(None, x, torch.tensor(seed), 0.1, 1.0, x.dtype).flatten() == 0
    for seed in ([5, 6], [5, 7], [6, 6])
]
pairs = [(drops[0], drops[1]), (drops[0], drops[2])]
pairs += [(drops[0][n:], drops[0][:-n]) for n in (1, 2, 16, 1001, 1024)]
shares = [float(drop.float().mean()) for drop in drops]
print(json.dumps([shares, [float((a & b).float().mean()) for a, b in pairs]]))
"""


@pytest.fixture(scope="module")
def interpreted() -> list:
    """What the scripts print where Triton's kernels are Python."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    surroundings = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", CHECKS + NETWORKS + DROPOUT]
    ended = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_the_kernels_compute_the_numbers_and_gradients_of_torch(interpreted):
    found = interpreted[0]
    assert len(found) == 6 and all(0 <= value < 1e-5 for value in found.values()), found


def test_the_network_learns_the_same_with_the_kernels(interpreted):
    for loss, *gradients in interpreted[1]:
        assert loss < 1e-5 and max(gradients) < 1e-4


def test_dropout_draws_independent_numbers_for_places_and_seeds(interpreted):
    shares, both = interpreted[2]
    assert all(abs(share - 0.1) < 0.004 for share in shares), shares
    assert all(abs(share - 0.01) < 0.0015 for share in both), both


def kind(value, constant: bool, floats: str) -> str:
    """Returns the type of a kernel's argument as Triton's compiler writes it."""
    if constant:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*i64" if value.dtype == torch.int64 else floats
    return "fp32" if isinstance(value, float) else "i32"


@pytest.mark.parametrize("floats", ["*fp32", "*bf16"])
def test_the_kernels_compile_for_a_gpu(monkeypatch, tmp_path, floats):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = set()

    def compile_instead(kernel, *args, grid, warmup, num_warps=4, **named):
        values = {**dict(zip(kernel.arg_names, args)), **named}
        constants = {name: x for name, x in values.items() if name in named or x is None}
        signature = {name: kind(x, name in constants, floats) for name, x in values.items()}
        places = {(kernel.arg_names.index(name),): x for name, x in constants.items()}
        source = ASTSource(kernel, signature, places)
        target = GPUTarget("cuda", 90, 32)  # an H100
        asm = triton.compile(source, target, dict(num_warps=num_warps)).asm
        assert asm["cubin"]
        # This instruction drops NaN, which the interpreter does not show. Where log-sum-exp looks
        # for the largest number, NaN comes back with the exponentials.
        assert "max.f32" not in asm["ptx"] or kernel is fused.rows_kernel
        compiled.add(kernel.fn.__name__)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_instead)
    for _, check in fused.CHECKS:
        check("cpu")  # its numbers are those of memory that nothing wrote
    names = {name for name in vars(fused) if name.endswith("_kernel")}
    assert compiled == names


@pytest.mark.parametrize("found, used", [(1e-6, True), (0.1, False), (float("nan"), False)])
def test_kernels_that_compute_other_numbers_are_not_used(monkeypatch, recwarn, found, used):
    monkeypatch.setattr(fused, "CHECKS", [("norm", lambda *_: found)])
    assert kernels.proven.__wrapped__("cpu", torch.bfloat16) is (fused if used else None)
    messages = [str(warning.message) for warning in recwarn]
    assert messages == [] if used else "Triton's kernels: ['norm']" in messages[0]


def test_a_machine_on_which_the_kernels_do_not_start_uses_torchs_operations(monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(fused, "CHECKS", [("norm", fail)])
    with pytest.warns(UserWarning, match="RuntimeError: Failed to find C compiler.'"):
        assert kernels.proven.__wrapped__("cpu", torch.bfloat16) is None
    monkeypatch.setitem(sys.modules, "fused", None)  # no Triton: nothing to say
    assert kernels.proven.__wrapped__("cpu", torch.bfloat16) is None


def test_a_nan_is_the_worst_difference():
    assert torch.tensor(fused.worst([0.1, float("nan"), 0.2])).isnan()
