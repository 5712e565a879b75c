"""kernels.py computes the same numbers as torch's own layers."""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import conformer
import kernels
from conformer import Subsampling
from frames import SUBSAMPLING, chunk_mask, valid_mask
from helpers import TWO_BLOCKS, VARIANTS, network, noise
from kernels import (
    Dropout,
    Linear,
    attention,
    attention_mask,
    for_few_rows,
    in_eights,
    relative_attention,
)


def plain_kernels() -> types.ModuleType:
    """Makes a module with torch's own layers, under the names that kernels.py gives them."""

    def attention(q, k, v, mask=None, p=0.0, is_causal=False, scale=None):
        return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal, scale=scale)

    def conv_relu(x, conv, training):
        return F.relu(conv(x))

    def depthwise(x, weight, bias, padding=0, few=False):
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=padding, groups=x.size(2))
        return y.transpose(1, 2)

    def label_smoothing_loss(logits, labels, valid, smoothing):
        share = smoothing / (logits.size(-1) - 1)
        soft = torch.full_like(logits, share).scatter(2, labels[..., None], 1 - smoothing)
        divergence = F.kl_div(logits.log_softmax(-1), soft, reduction="none").sum(-1)
        return (divergence * valid).sum(-1)

    class Residual(nn.Dropout):
        def forward(self, x, y, scale=1.0):
            return x + scale * super().forward(y)

        def then(self, norm, x, y, scale=1.0):
            x = self(x, y, scale)
            return x, norm(x)

    class Activation(nn.Dropout):
        def __init__(self, p, activation):
            super().__init__(p)
            self.activation = activation

        def forward(self, x):
            return super().forward(self.activation(x))

    def ctc_loss(logits, labels, lengths, label_lengths, blank):
        log_probs = logits.log_softmax(-1)
        return F.ctc_loss(
            log_probs, labels, lengths, label_lengths, blank, "none", zero_infinity=True
        )

    plain = types.ModuleType("kernels")
    plain.LayerNorm = nn.LayerNorm
    plain.Residual = Residual
    plain.Activation = Activation
    plain.ctc_loss = ctc_loss
    plain.log_softmax = lambda logits: logits.log_softmax(-1)
    plain.attention_mask = lambda mask, x: mask
    plain.by_triton = lambda x: None
    plain.Linear = nn.Linear
    plain.Dropout = nn.Dropout
    plain.attention = attention
    plain.conv_relu = conv_relu
    plain.depthwise = depthwise
    plain.label_smoothing_loss = label_smoothing_loss
    return plain


@pytest.fixture
def plain_conformer(monkeypatch):
    """The module conformer, imported with torch's own layers in the place of kernels.py."""
    monkeypatch.setitem(sys.modules, "kernels", plain_kernels())
    spec = importlib.util.spec_from_file_location("plain_conformer", conformer.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["default", "not_causal", *VARIANTS])
def test_with_torchs_own_layers_the_network_computes_the_same(plain_conformer, name):
    """It compares losses, gradients, the encoder in its three uses, and a decoder."""
    changes = {"default": {}, "not_causal": {"causal": False}, **VARIANTS}[name]
    o = {**vars(TWO_BLOCKS), **changes, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    torch.manual_seed(0)
    ours = conformer.U2Conformer(conformer.ModelOptions(**o), 80, 12, 0, 2, 3)
    theirs = plain_conformer.U2Conformer(plain_conformer.ModelOptions(**o), 80, 12, 0, 2, 3)
    theirs.load_state_dict(ours.state_dict())
    ours_alone = {Linear, Dropout, kernels.LayerNorm, kernels.Residual, kernels.Activation}
    assert {type(layer) for layer in theirs.modules()}.isdisjoint(ours_alone)
    features, lengths = torch.randn(3, 90, 80), torch.tensor([90, 61, 5])
    labels, label_lengths = torch.randint(4, 12, (3, 4)), torch.tensor([4, 2, 1])

    def numbers(net):
        loss = net.train().loss(features, lengths, labels, label_lengths, 4, 1)["loss"]
        found = [loss, *torch.autograd.grad(loss, list(net.parameters()))]
        with torch.no_grad():
            whole, frames = net.eval().encode(features, lengths)
            found += [whole, net.encode(features, lengths, 4, 1)[0]]
            found += [net.decoder(labels, whole, frames)]
            found += [net.decoder.step(labels[:, :1], None, whole, frames)[0]]
            if net.options.causal:
                state = net.encoder.stream_state(4, 1)
                for piece in features[:1].split(25, dim=1):
                    encoded, state = net.encoder.stream(piece, state)
                    found.append(encoded)
                found.append(net.encoder.stream(features[:1, :0], state, last=True)[0])
        return found

    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("input_layer", SUBSAMPLING)
def test_the_faster_backward_of_the_subsampling_gives_autograds_gradients(input_layer):
    torch.manual_seed(0)
    subsampling = Subsampling(input_layer, 80, 6).double().to(memory_format=torch.channels_last)
    x = torch.randn(3, 67, 80, dtype=torch.float64)
    weights = None
    gradients = []
    for training in (True, False):  # by hand; by autograd
        y = subsampling.train(training)(x)
        weights = torch.randn_like(y) if weights is None else weights
        gradients.append(torch.autograd.grad((y * weights).sum(), list(subsampling.parameters())))
    for by_hand, expected in zip(*gradients):
        torch.testing.assert_close(by_hand, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["everything", "mask", "causal", "scale"])
def test_attention_by_hand_is_scaled_dot_product_attention(kind):
    q, k, v = torch.randn(
        3, 2, 4, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).unbind()
    more = {
        "everything": {},
        "mask": dict(mask=chunk_mask(7, 3)),
        "causal": dict(is_causal=True),
        "scale": dict(scale=0.7),
    }[kind]
    by_hand = attention(q, k, v, p=1e-9, **more)  # p is too small to drop anything
    torch.testing.assert_close(by_hand, attention(q, k, v, **more))


@pytest.mark.parametrize("width", [8, 9, 17])
def test_zeros_up_to_whole_eights_change_no_attention(width):
    q, k, v = torch.randn(3, 2, 4, 5, width, dtype=torch.float64)
    y = attention(*map(in_eights, (q, k, v)), scale=width**-0.5)
    assert y.size(-1) % 8 == 0
    torch.testing.assert_close(y[..., :width], attention(q, k, v))
    assert not y[..., width:].any()


def test_dropout_keeps_its_share_and_its_mean_and_is_reproducible():
    dropout, x = Dropout(0.1), torch.ones(1001, 999)
    torch.manual_seed(1)
    y = dropout(x)
    assert abs((y == 0).double().mean() - 0.1) < 0.001 and abs(y.double().mean() - 1) < 0.001
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.9))}
    torch.manual_seed(1)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is without oneDNN")
@pytest.mark.parametrize(
    "rows, size, width, bias", [((3, 7), 5, 9, True), ((4,), 9, 5, False), ((0, 7), 5, 5, True)]
)
def test_the_linear_layers_of_both_libraries_give_the_same_numbers_and_gradients(
    monkeypatch, rows, size, width, bias
):
    torch.manual_seed(0)
    layer = Linear(size, width, bias)
    x = torch.randn(*rows, size, requires_grad=True)
    weights = torch.randn(*rows, width)
    found = []
    for onednn in (True, False):
        monkeypatch.setattr(kernels, "ONEDNN", onednn)
        monkeypatch.setattr(kernels, "AVX512", onednn)
        y = layer(x)
        inputs = [x, *layer.parameters()]
        numbers = [y, *torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True)]
        numbers += torch.autograd.grad(y.sum(), inputs)  # the gradient of y is one number, expanded
        with torch.no_grad():
            numbers += [layer(x), for_few_rows(layer)(x)]
        found.append(numbers)
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, avx512, faster",
    [
        ("AMD EPYC 9B14", True, True),
        ("AMD EPYC 7763", False, False),
        ("Intel Xeon 2.50GHz", True, False),
        ("", True, True),
    ],
)
def test_linear_layers_take_onednn_only_where_it_is_faster(monkeypatch, name, avx512, faster):
    monkeypatch.setattr(kernels, "AVX512", avx512)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name} if name else {})
    assert kernels.onednn_is_faster() is faster


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_the_divergence_from_the_smoothed_one_hot(smoothing):
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    valid = valid_mask(torch.tensor([5, 3]), 5)
    torch.testing.assert_close(
        kernels.label_smoothing_loss(logits, labels, valid, smoothing),
        plain_kernels().label_smoothing_loss(logits, labels, valid, smoothing),
    )


@pytest.mark.parametrize("width, heads", [(16, 2), (18, 2), (64, 4)])
def test_attention_with_wider_heads_is_relative_attention(width, heads):
    net = network(output_size=width, attention_heads=heads, attention_dropout_rate=0.0).double()
    layer = net.encoder.blocks[0].self_attn
    x, positions = (noise(n, 11, width, dtype=torch.float64).requires_grad_() for n in (3, 1))
    mask = chunk_mask(11, 4).expand(3, 1, 11, 11)
    expected = layer(x, positions, mask)[0]
    found = relative_attention(layer, x, layer.project(positions), mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights, inputs = torch.randn_like(found), [x, positions, *layer.parameters()]
    pairs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected))
    for one, other in zip(*pairs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_mask_of_numbers_masks_as_its_bools_do():
    class OnGpu(torch.Tensor):
        is_cuda = True

    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = chunk_mask(9, 4).expand(2, 1, 9, 9)
    numbers = attention_mask(mask, q.as_subclass(OnGpu)).as_subclass(torch.Tensor)
    assert numbers.dtype == q.dtype and numbers.stride(2) % 8 == 0 and numbers.shape == mask.shape
    torch.testing.assert_close(attention(q, k, v, numbers), attention(q, k, v, mask))
    assert attention_mask(mask, q) is mask


def test_ctc_over_a_rows_own_tokens_is_ctc_over_the_vocabulary():
    """Labels repeat, next to each other and apart, and the third row has no path."""

    def rows(x, tokens, first):
        return x.logsumexp(-1), x.sum(-1), x.gather(-1, tokens)

    torch.manual_seed(0)
    logits = (torch.randn(20, 5, 50, dtype=torch.float64) * 3).requires_grad_()
    labels, label_lengths = torch.randint(1, 50, (5, 6)), torch.tensor([6, 5, 6, 3, 0])
    labels[0, 2], labels[1, 3], labels[2] = labels[0, 1], labels[1, 0], 7
    labels = labels.masked_fill(~valid_mask(label_lengths, 6), 0)
    lengths = torch.tensor([20, 17, 7, 20, 9])
    expected = kernels.ctc_loss(logits, labels, lengths, label_lengths, 0)
    assert expected[2] == 0 and (expected[[0, 1, 3, 4]] > 0).all()
    triton = types.SimpleNamespace(rows=rows)
    found = kernels.ctc_loss_of_few(triton, logits, labels, lengths, label_lengths, 0)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(5, dtype=torch.float64)
    pairs = (torch.autograd.grad((loss * weights).sum(), [logits]) for loss in (found, expected))
    for one, other in zip(*pairs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
