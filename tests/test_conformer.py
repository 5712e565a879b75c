"""The network: masks, losses, variants, and what may not depend on padding."""

import pytest
import torch
import torch.nn.functional as F

from conformer import Subsampling, U2Conformer, reverse
from frames import (
    SUBSAMPLING,
    chunk_mask,
    receptive_field,
    sinusoids,
    subsampled_length,
    valid_mask,
)
from helpers import VARIANTS, network, same
from presets import PRESETS, ModelOptions


@pytest.mark.parametrize("input_layer", SUBSAMPLING)
def test_predicted_length_is_the_length_that_the_convolutions_give(input_layer):
    subsampling = Subsampling(input_layer, 80, 4)
    field, rate = receptive_field(input_layer)
    for length in range(field, field + 40):
        frames = subsampling(torch.zeros(1, length, 80)).size(1)
        assert frames == subsampled_length(length, input_layer)
    assert subsampled_length(field - 1, input_layer) == 0
    assert subsampled_length(field + rate, input_layer) == 2
    lengths = torch.tensor([0, 1, field - 1, field, 100])
    assert subsampled_length(lengths, input_layer).tolist() == [
        subsampled_length(n, input_layer) for n in lengths.tolist()
    ]


def test_gradient_checkpointing_changes_no_gradient():
    net = network(dropout_rate=0.2).train()
    features, lengths = torch.randn(2, 60, 80), torch.tensor([60, 43])
    labels, label_lengths = torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([3, 2])
    gradients = []
    for recompute in (False, True):
        net.encoder.gradient_checkpointing = recompute
        torch.manual_seed(1)
        loss = net.loss(features, lengths, labels, label_lengths)["loss"]
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


@pytest.mark.parametrize("name, millions, vocab", [("base", 48.3, 4233), ("small", 4.6, 31)])
def test_presets_have_the_published_size(name, millions, vocab):
    model = U2Conformer(ModelOptions(**PRESETS[name]), 80, vocab, 0, 2, 3)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_chunk_mask_shows_the_own_chunk_and_the_left_ones():
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert chunk_mask(5, 2, left_chunks=1).int().tolist() == expected
    assert chunk_mask(5, 2).int().tolist()[4] == [1, 1, 1, 1, 1]
    assert chunk_mask(5, 2, left_chunks=0).int().tolist()[4] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_size, left_chunks", [(-1, -1), (4, -1), (4, 1), (1, 0)])
def test_padding_and_neighbours_change_nothing(chunk_size, left_chunks, causal):
    model = network(causal=causal).double()
    features = torch.randn(3, 90, 80, dtype=torch.float64)
    lengths = torch.tensor([90, 53, 30])
    together, frames = model.encode(features, lengths, chunk_size, left_chunks)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model.encode(
            features[row : row + 1, :length], lengths[row : row + 1], chunk_size, left_chunks
        )
        torch.testing.assert_close(together[row, : frames[row]], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_what_lies_beyond_the_chunk_is_never_seen(chunk_size):
    model = network().double()
    features, lengths = torch.randn(1, 127, 80, dtype=torch.float64), torch.tensor([127])
    before, _ = model.encode(features, lengths, chunk_size)
    field, rate = receptive_field("conv2d")
    for chunks in (1, 2):
        last = (chunks * chunk_size - 1) * rate + field  # feature frames that these chunks see
        changed = features.clone()
        changed[:, last:] = torch.randn_like(changed[:, last:])
        after, _ = model.encode(changed, lengths, chunk_size)
        seen = chunks * chunk_size
        torch.testing.assert_close(after[:, :seen], before[:, :seen], rtol=0, atol=1e-12)
        assert (after[:, seen] - before[:, seen]).abs().max() > 1e-6


def test_relative_attention_is_the_textbook_formula():
    """The formula (q+u).k + (q+v).p equals attention with keys k+p and a bias for each key."""
    attention = network().double().encoder.blocks[0].self_attn
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    positions = torch.randn(1, 9, 16, dtype=torch.float64)
    mask = valid_mask(torch.tensor([9, 6]), 9)[:, None, None].expand(2, 1, 9, 9)
    q = attention.split(attention.linear_q(x))
    k, v = attention.keys_values(x)
    p = attention.split(attention.linear_pos(positions))
    content = (q + attention.pos_bias_u[:, None]) @ k.transpose(2, 3)
    position = (q + attention.pos_bias_v[:, None]) @ p.transpose(2, 3)
    weights = ((content + position) / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = attention.linear_out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, positions, mask)[0], expected, rtol=0, atol=1e-12)


def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_all_lengths(monkeypatch):
    original = torch.nn.Module.compile
    # aot_eager traces and differentiates as for a GPU, but runs torch's own kernels: no one waits
    # for a C++ compiler. With dropout the random numbers come in another order, so that there only
    # the graphs are counted, and these need no derivative.
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block, dynamic, options: original(
            block, backend="eager" if dropout else "aot_eager", dynamic=dynamic
        ),
    )
    # Else torch traces each block a second time, once it has seen that no number of it changes.
    monkeypatch.setattr(torch._dynamo.config, "specialize_float", True)

    def gradients(net, rows, frames):
        torch.manual_seed(frames)
        features, lengths = torch.randn(rows, frames, 80), torch.arange(rows) + frames - rows + 1
        loss = net.loss(
            features, lengths, torch.full((rows, 3), 5), torch.full((rows,), 3), chunk_size=4
        )["loss"]
        return [loss, *torch.autograd.grad(loss, list(net.parameters()))]

    for dropout, sizes in ((0.1, [(3, 90)]), (0.0, [(3, 90), (4, 150), (5, 70)])):
        rates = dict(dropout_rate=dropout, attention_dropout_rate=dropout)
        net, compiled = network(**rates).train(), network(**rates).train()
        compiled.encoder.compile_blocks()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for size in sizes:
            found = gradients(compiled, *size)
            if not dropout:
                for ours, theirs in zip(found, gradients(net, *size)):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        gradients(compiled, 1, 90)  # one row would be a kind of shape of its own
        compiled.eval()
        gradients(compiled, 3, 90)
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_reverse_reads_each_row_backwards_within_its_length():
    rows = torch.tensor([[4, 5, 6, 7], [4, 5, 9, 9]])
    assert reverse(rows, torch.tensor([4, 2]))[0].tolist() == [7, 6, 5, 4]
    assert reverse(rows, torch.tensor([4, 2]))[1, :2].tolist() == [5, 4]


def test_loss_is_the_weighted_sum_of_its_branches_and_ignores_the_padding_of_labels():
    model = network()
    features, lengths = torch.randn(2, 60, 80), torch.tensor([60, 44])
    labels, label_lengths = torch.tensor([[4, 5, 6], [7, -1, 99]]), torch.tensor([3, 1])
    losses = model.loss(features, lengths, labels, label_lengths)
    torch.testing.assert_close(losses["loss"], 0.3 * losses["loss_ctc"] + 0.7 * losses["loss_att"])
    again = model.loss(features, lengths, torch.tensor([[4, 5, 6], [7, 0, 0]]), label_lengths)
    assert torch.equal(losses["loss"], again["loss"])
    alone = [
        model.loss(
            features[i : i + 1, :n], lengths[i : i + 1], labels[i : i + 1], label_lengths[i : i + 1]
        )["loss"]
        for i, n in enumerate(lengths.tolist())
    ]
    torch.testing.assert_close(losses["loss"], sum(alone) / 2)


def test_u2_has_no_right_to_left_decoder():
    model = network(reverse_weight=0.0)
    assert model.right_decoder is None
    losses = model.loss(
        torch.randn(1, 40, 80), torch.tensor([40]), torch.tensor([[4, 5]]), torch.tensor([2])
    )
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_utterances_too_short_for_a_frame_have_a_finite_loss():
    model = network()
    losses = model.loss(
        torch.randn(2, 5, 80), torch.tensor([5, 1]), torch.tensor([[4], [5]]), torch.tensor([1, 1])
    )
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(
        p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_decoder_hears_the_positions_as_well_as_the_tokens(preset):
    decoder = network(**PRESETS[preset]).decoder.eval()
    embedded = decoder.embedding(torch.arange(12).repeat(20, 1).T).detach()  # (tokens,positions,D)
    of_tokens, of_positions = (embedded.mean(axis).std() for axis in (1, 0))
    assert 0.5 < of_positions / of_tokens < 2


def test_decoder_step_by_step_equals_the_full_pass():
    model = network()
    encoded, lengths = torch.randn(3, 9, 16), torch.tensor([9, 4, 1])
    tokens = torch.randint(0, 12, (3, 6))
    whole, state = model.decoder(tokens, encoded, lengths), None
    for step in range(tokens.size(1)):
        logits, state = model.decoder.step(tokens[:, : step + 1], state, encoded, lengths)
        torch.testing.assert_close(logits, whole[:, step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_all_of_its_weights(name):
    model = network(**VARIANTS[name]).train()
    losses = model.loss(
        torch.randn(2, 60, 80),
        torch.tensor([60, 44]),
        torch.tensor([[4, 5], [6, 0]]),
        torch.tensor([2, 1]),
        chunk_size=4,
    )
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_absolute_positions_are_added_to_the_scaled_input():
    plain, added = network(), network(pos_enc_layer_type="abs_pos")
    features = torch.randn(1, 40, 80)
    positions = added.encoder.subsample(features, offset=7) - plain.encoder.subsample(features)
    torch.testing.assert_close(positions[0], sinusoids(9, 16, offset=7), rtol=0, atol=1e-5)


def test_without_a_position_term_plain_attention_is_what_is_left():
    relative = network().encoder.blocks[0].self_attn
    plain = network(selfattention_layer_type="selfattn").encoder.blocks[0].self_attn
    with torch.no_grad():
        for parameter in (relative.pos_bias_u, relative.pos_bias_v, relative.linear_pos.weight):
            parameter.zero_()
    plain.load_state_dict(
        {k: v for k, v in relative.state_dict().items() if k in plain.state_dict()}
    )
    x, positions = torch.randn(2, 9, 16), torch.randn(1, 9, 16)
    mask = chunk_mask(9, 4)[None, None]
    torch.testing.assert_close(
        plain(x, None, mask)[0], relative(x, positions, mask)[0], rtol=1e-5, atol=1e-5
    )


def test_gradients_are_to_the_bit_those_of_ctc_before_the_decoders():
    """All documented figures were made in this order."""
    net = network(decoder_num_blocks=2, r_num_blocks=2).train()
    features, lengths = torch.randn(3, 60, 80), torch.tensor([60, 44, 5])
    labels, label_lengths = torch.randint(4, 9, (3, 5)), torch.tensor([5, 2, 1])
    parameters = list(net.parameters())
    torch.manual_seed(1)
    found = net.loss(features, lengths, labels, label_lengths)["loss"]
    torch.manual_seed(1)
    encoded, encoded_lengths = net.encode(features, lengths)
    ctc = net.ctc_losses([encoded], lengths, labels, label_lengths)["loss_ctc"]
    att = net.attention_losses(encoded, encoded_lengths, labels, label_lengths)
    weight = net.options.ctc_weight
    wanted = weight * (ctc.sum() / 3) + (1 - weight) * (att.sum() / 3)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, wanted))
    assert same([found, *ours], [wanted, *theirs])


@pytest.mark.parametrize("chunk_size", [-1, 4])
@pytest.mark.parametrize(
    "name", ["default", "not_causal", *sorted(VARIANTS.keys() - {"batch_norm"})]
)
def test_losses_and_gradients_do_not_depend_on_padding(name, chunk_size):
    """Batch norm is left out: in training it learns from padding too, as in WeNet."""
    changes = {"default": {}, "not_causal": {"causal": False}, **VARIANTS}[name]
    changes = {**changes, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    net = network(**changes).double().train()
    features, lengths = torch.randn(3, 60, 80).double(), torch.tensor([60, 44, 5])
    labels, label_lengths = torch.tensor([[4, 5, 6], [7, 8, 0], [9, 0, 0]]), torch.tensor([3, 2, 1])
    found = []
    for frames, width in ((0, 0), (1, 3), (67, 20)):
        batch = F.pad(features, (0, 0, 0, frames)), lengths, F.pad(labels, (0, width))
        losses = net.loss(*batch, label_lengths, chunk_size)
        gradients = torch.autograd.grad(losses["loss"], list(net.parameters()))
        found.append([*losses.values(), *gradients])
    for padded in found[1:]:
        for ours, alone in zip(padded, found[0]):
            torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-9)
