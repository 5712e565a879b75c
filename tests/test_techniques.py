"""What training adds to WeNet: two views (CR-CTC), InterCTC, stochastic depth, shorter masks."""

from functools import partial

from cli import UserError

import pytest
import torch

from conformer import disagreement
from datamodule import SpeechDataset
from helpers import network, noise, same
from presets import ModelOptions
from transforms import Augment, Frontend, make_generator, spec_aug, train_transform

FEATURES, LENGTHS = torch.randn(2, 60, 80, generator=torch.Generator().manual_seed(0)), (60, 43)
LABELS, LABEL_LENGTHS = torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([3, 2])
QUIET = dict(dropout_rate=0.0, attention_dropout_rate=0.0)


def losses(net, features=FEATURES, lengths=LENGTHS, labels=LABELS, sizes=LABEL_LENGTHS, **more):
    return net.loss(features, torch.tensor(lengths), labels, sizes, **more)


def test_disagreement_is_the_divergence_from_the_other_view_which_stands_still():
    logits = torch.randn(5, 4, 7, requires_grad=True)  # (T',B,V): rows 0, 1 and again 0, 1
    lengths = torch.tensor([5, 3, 5, 3])
    found = disagreement(logits, lengths)
    p = logits.softmax(-1)
    for row, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
        apart = p[:, other] * (p[:, other].log() - p[:, row].log())
        torch.testing.assert_close(found[row], apart[: lengths[row]].sum())
    (grad,) = torch.autograd.grad(found[0], logits)
    assert grad[:, 0].any() and not grad[:, 1:].any()


def test_equal_views_agree_and_cost_what_one_view_costs():
    net = network(cr_ctc_weight=0.2, **QUIET).train()
    both = [part.repeat(2, *[1] * (part.dim() - 1)) for part in (FEATURES, LABELS, LABEL_LENGTHS)]
    of_both = losses(net, both[0], LENGTHS * 2, *both[1:], views=2)
    assert of_both["loss_cr"] < 1e-6
    torch.testing.assert_close(of_both["loss"], losses(net)["loss"])
    other = both[0] + torch.cat((torch.zeros_like(FEATURES), torch.ones_like(FEATURES)))
    of_others = losses(net, other, LENGTHS * 2, *both[1:], views=2)
    parts = [of_others[name] for name in ("loss_ctc", "loss_cr", "loss_att")]
    assert parts[1] > 0
    weight = net.options.ctc_weight
    expected = weight * (parts[0] + 0.2 * parts[1]) + (1 - weight) * parts[2]
    torch.testing.assert_close(of_others["loss"], expected)


def test_interctc_is_a_ctc_loss_of_the_middle_block_in_training_alone():
    net = network(interctc_weight=0.25, num_blocks=3, **QUIET)
    assert "loss_interctc" not in losses(net.eval())
    found = losses(net.train())
    parts = [found[name] for name in ("loss_ctc", "loss_interctc", "loss_att")]
    weight = net.options.ctc_weight
    expected = weight * (0.75 * parts[0] + 0.25 * parts[1]) + (1 - weight) * parts[2]
    torch.testing.assert_close(found["loss"], expected)
    del net.encoder.blocks[1:]  # what remains is the middle block
    torch.testing.assert_close(losses(net.eval())["loss_ctc"], parts[1])


def test_stochastic_depth_leaves_out_late_blocks_most_and_none_in_evaluation():
    net = network(num_blocks=4, stochastic_depth=0.8, **QUIET)
    plain = network(num_blocks=4, **QUIET)
    assert same(*(torch.stack(list(losses(each.eval()).values())[:3]) for each in (net, plain)))
    encoder = net.encoder.train()
    x, y = torch.ones(4000, 1, 1), torch.full((4000, 1, 1), 3.0)
    torch.manual_seed(0)
    drawn = encoder.perhaps(y, x, 0.2)
    assert drawn.unique().tolist() == [1.0, 3.5]
    assert abs((drawn == 1).float().mean() - 0.2) < 0.03 and abs(drawn.mean() - 3) < 0.05
    left_out = []
    encoder.perhaps = lambda y, x, p: left_out.append(p) or y
    losses(net)
    assert left_out == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_every_weight_has_its_gradient_though_blocks_are_left_out():
    """DDP waits for all of them."""
    net = network(stochastic_depth=0.9, interctc_weight=0.3).train()
    gradients = torch.autograd.grad(losses(net)["loss"], list(net.parameters()))
    assert all(gradient is not None for gradient in gradients)


def test_a_mask_is_at_most_its_share_of_the_frames():
    augment = Augment(num_time_masks=1, num_freq_masks=0, max_time_mask_share=0.05)
    widths = {
        int((spec_aug(augment)({"features": torch.ones(8, 101)}, generator)["features"] == 0).sum())
        for generator in (make_generator(0, 0, row) for row in range(100))
    }
    assert {width // 8 for width in widths} == {1, 2, 3, 4, 5, 6}


def test_two_views_are_the_same_speech_at_the_same_times_under_other_masks():
    augment, unmasked = (
        Augment(max_trim=50),
        Augment(max_trim=50, num_freq_masks=0, num_time_masks=0),
    )
    example = {"input_values": noise(32000)}
    chains = [train_transform(Frontend(), augment, views=views) for views in (1, 2)]
    plain = train_transform(Frontend(), unmasked)
    one, both = (chain(example, make_generator(0, 0, 3))["features"] for chain in chains)
    speech = plain(example, make_generator(0, 0, 3))["features"]
    assert one.dim() == 2 and both.shape == (2, *speech.shape)
    assert not torch.equal(both[0], both[1])
    for view in both:
        assert torch.equal(view[view != 0], speech[view != 0])


def test_a_batch_has_the_first_views_of_all_rows_before_the_second_ones(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"input_values": noise(n).tolist(), "labels": {"input_ids": [4, 5]}} for n in (8000, 9600)
    ]
    make = partial(train_transform, Frontend(), Augment(), views=2)
    batch = SpeechDataset(datasets.Dataset.from_list(rows), make, 0)[[(0, 0), (0, 1)]]
    assert batch.rows.tolist() == [0, 1, 0, 1]
    assert batch.feature_lengths[:2].equal(batch.feature_lengths[2:])
    assert batch.labels[:2].equal(batch.labels[2:])
    assert not batch.features[:2].equal(batch.features[2:])


def test_interctc_needs_a_middle_block():
    with pytest.raises(UserError, match="no middle block"):
        ModelOptions(interctc_weight=0.3, num_blocks=1)
