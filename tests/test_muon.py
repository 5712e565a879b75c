"""Muon: torch's own, for all matrices of a shape at once, beside AdamW."""

import pytest
import torch
from torch import nn

from helpers_model import tiny_model
from muon import Muon, hidden_matrices, orthogonal
from tokenizer import train_char


def gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matrices_move_as_by_torchs_muon_and_the_rest_as_by_adamw():
    """Torch's Muon multiplies in bfloat16, which keeps 8 bits."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (8, 24), (8,))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    rates = dict(lr=0.1, weight_decay=0.1)
    muon = Muon(ours, ours[:3], torch.bfloat16, **rates)
    others = [
        torch.optim.Muon(theirs[:3], adjust_lr_fn="match_rms_adamw", **rates),
        torch.optim.AdamW(theirs[3:], **rates),
    ]
    for seed in range(3):
        gradients(ours, seed)
        gradients(theirs, seed)
        for optimizer in (muon, *others):
            optimizer.step()
    for mine, other in zip(ours[:3], theirs[:3]):
        torch.testing.assert_close(mine, other, atol=0.03, rtol=0.0)
    assert torch.equal(ours[3], theirs[3])
    assert not torch.equal(ours[0].grad, torch.zeros(8, 24)), "gradients stay for the log"


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 16, 48), (2, 48, 16)])
def test_all_directions_become_about_equally_long(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    long = torch.linalg.svdvals(orthogonal(matrices))
    assert 0.6 < long.min() and long.max() < 1.3


def test_no_gradient_no_step():
    parameters = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    Muon(parameters, parameters[:1], torch.float32, lr=0.1).step()
    assert all(bool((p == 1).all()) for p in parameters)


def test_a_step_of_zeros_is_finite():
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], [parameter], torch.float32, lr=0.1, weight_decay=0.0).step()
    assert bool((parameter == 1).all())


def test_a_state_goes_on_after_saving():
    states = []
    for cut in (False, True):
        parameters = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4))]
        optimizer = Muon(parameters, parameters[:1], torch.float32, lr=0.1)
        for seed in range(4):
            gradients(parameters, seed)
            optimizer.step()
            if cut and seed == 1:
                saved = optimizer.state_dict()
                optimizer = Muon(parameters, parameters[:1], torch.float32, lr=0.1)
                optimizer.load_state_dict(saved)
        states.append(parameters)
    assert all(torch.equal(one, two) for one, two in zip(*states))


def test_heads_biases_and_embeddings_are_adams():
    net = tiny_model(train_char(["abc"])).net
    heads = net.ctc, net.decoder.output_layer, net.right_decoder.output_layer
    chosen = {id(p) for p in hidden_matrices(net, heads)}
    names = {name for name, p in net.named_parameters() if id(p) in chosen}
    assert all(net.get_parameter(name).dim() == 2 for name in names)
    assert not any(
        part in name for name in names for part in ("ctc", "output_layer", "decoder.embed")
    )
    assert "encoder.blocks.0.feed_forward.w_1.weight" in names
    assert "decoder.blocks.0.src_attn.linear_kv.weight" in names
