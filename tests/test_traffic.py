"""tools.traffic: a training step on a fake GPU."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from helpers import VARIANTS, network
from tools import traffic
from tools.traffic import Traffic, TrafficOptions, step

SMALL = TrafficOptions(rows=3, frames=90, labels=4, vocab_size=12)


def test_what_an_operation_reads_and_writes_counts_once():
    with FakeTensorMode(), Traffic() as found:
        x = torch.empty(6, 5, device="cuda")
        row = torch.empty(5, device="cuda").expand(6, 5)
        y = (x + row).T.view(5, 6)
        y.to(torch.bfloat16)
        torch.empty(7) + 1  # on a CPU
    assert found.moved["add"] == [1, 4 * (30 + 5 + 30)]
    assert found.moved["_to_copy"] == [1, 30 * (4 + 2)]
    assert set(found.moved) == {"add", "_to_copy"}


@pytest.mark.parametrize("name", ["default", "not_causal", *VARIANTS])
def test_a_step_on_a_gpu_gives_every_weight_a_gradient(name):
    changes = {"default": {}, "not_causal": {"causal": False}, **VARIANTS}[name]
    net = network(**changes)
    _, gradients = step(net, SMALL)
    assert len(gradients) == len(list(net.parameters()))
    for weight, gradient in gradients.items():
        assert gradient.shape == net.get_parameter(weight).shape, weight
        assert gradient.dtype == torch.float32 and gradient.is_cuda


def test_the_kernels_halve_the_bytes_that_move_besides_products(capsys):
    rest = []
    for flags in ([], ["--no-triton"]):
        sizes = ["--preset", "tiny", "--rows", "8", "--frames", "600"]
        traffic.main([*flags, *sizes, "--json"])
        rest.append(json.loads(capsys.readouterr().out))
    assert rest[0]["rest_mb"] < 0.5 * rest[1]["rest_mb"]
    assert rest[0]["rest_launches"] < 0.85 * rest[1]["rest_launches"]
    assert sum(line["bytes"] for line in rest[0]["table"]) > 1e6 * rest[0]["rest_mb"]
