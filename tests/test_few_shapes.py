"""Few shapes: an epoch has few shapes of batches and the next none that is new; every row fits."""

import itertools
import json
import pickle

from cli import UserError

import numpy as np
import pytest
import torch

import sampler
import train
from helpers import json_lines, trusted
from helpers_train import interrupted, make_data, ranks, run, weights
from sampler import LengthGroupedSampler, ShapedSampler, least_padding
from tools import workloads
from transforms import Frontend, num_frames, speed_length

SPEEDS = (0.9, 1.0, 1.1)
GRID = (6, 32)
SIZES = {"rows": {"batch_size": 4}, "seconds": {"max_batch": 6000.0}}


def made_up(rows, seed=0, speeds=SPEEDS):
    """Makes up the frames (speeds, rows) and labels (rows,) of speech."""
    rng = np.random.default_rng(seed)
    seconds = workloads.utterance_seconds(rng, rows)
    labels = (4 * seconds * np.exp(0.25 * rng.standard_normal(rows))).astype(np.int64)
    return frames_of((seconds * 16000).astype(np.int64), speeds), labels


def frames_of(samples, speeds=SPEEDS):
    return np.stack([num_frames(speed_length(samples, speed), Frontend()) for speed in speeds])


def outliers():
    frames, labels = made_up(300)
    labels[[5, 250]] = 400, 2000
    return frames, labels


def long_ones():
    """Makes rows of which two are longer than the bound of a batch, and must go alone."""
    frames, labels = made_up(200)
    frames[:, [3, 77]] = 7000
    return frames, labels


CORPORA = {
    **{f"{rows} rows": made_up(rows, rows) for rows in (3, 4, 5, 7, 20, 61, 700)},
    "one speed": made_up(300, speeds=(1.0,)),
    "outliers": outliers(),
    "long": long_ones(),
    "equal": (np.full((3, 100), 500), np.full(100, 20)),
    # Two ranks share the cell of the 96 rows, and one row is left for the next cell.
    "one left": (np.array([[500] * 96 + [300]]), np.full(97, 20)),
    "no labels": (made_up(50)[0], np.zeros(50, int)),
}


def epoch_of(frames, labels, epoch, world_size, **options):
    """Returns the batches of an epoch by [rank][step]."""
    result = []
    for rank in range(world_size):
        plan = ShapedSampler(
            frames=frames, labels=labels, grid=GRID, rank=rank, world_size=world_size, **options
        )
        plan.set_epoch(epoch)
        result.append(list(plan))
        assert len(plan) == len(result[-1])
    return result


def shape(batch):
    return len(batch.keys), batch.frames, batch.labels


@pytest.mark.parametrize("room", ["", "tight"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_epoch_has_the_same_shapes_and_every_row_once_where_it_fits(
    corpus, size, world_size, room, monkeypatch
):
    if room:  # then hardly any draw of speeds fits but the first epoch's
        monkeypatch.setattr(sampler, "SPREAD", -9)
    frames, labels = CORPORA[corpus]
    bound = SIZES[size]
    before = None
    for epoch in (0, 1, 7):
        ranks = epoch_of(frames, labels, epoch, world_size, **bound)
        batches = list(itertools.chain(*ranks))
        keys = np.array([key for batch in batches for key in batch.keys])
        assert sorted(keys[:, 1]) == list(range(len(labels))) and set(keys[:, 0]) == {epoch}
        for batch in batches:
            _, rows, speeds = np.array(batch.keys).T
            assert frames[speeds, rows].max() <= batch.frames
            assert labels[rows].max() <= batch.labels
        # Each rank has the same shapes as often in every epoch, in another order.
        shapes = [sorted(map(shape, rank)) for rank in ranks]
        assert before in (None, shapes)
        before = shapes
        # The ranks are in step: what they pad to is the same.
        for step in zip(*ranks, strict=True):
            assert len({batch[1:] for batch in step}) == 1
            assert np.ptp([len(batch.keys) for batch in step]) <= 1
        # A rank takes one row more where there are fewer rows left than ranks, else none does.
        over = [
            rows
            for rows, wide, _ in itertools.chain(*shapes)
            if rows > bound.get("batch_size", max(1, bound.get("max_batch", 0) // wide))
        ]
        assert len(over) < world_size and set(over) <= {2}
    assert max(len(set(rank)) for rank in shapes) <= 64


@pytest.mark.parametrize("size", [{"max_batch": 40_000.0}, {"batch_size": 50}], ids=["s", "rows"])
def test_a_large_corpus_has_64_shapes_and_little_padding(size):
    frames, labels = made_up(20_000)
    plan = ShapedSampler(frames=frames, labels=labels, grid=GRID, **size)
    epochs = [list(plan.batches(epoch)) for epoch in (0, 1)]
    one, two = ({shape(batch) for batch in batches} for batches in epochs)
    assert one == two and 32 <= len(one) <= 64
    _, rows, speeds = np.array([key for batch in epochs[1] for key in batch.keys]).T
    padded = np.array([len(batch.keys) * np.array(batch[1:]) for batch in epochs[1]]).sum(axis=0)
    assert 1 - frames[speeds, rows].sum() / padded[0] < 0.045
    # In batches by length, whose rows differ in speed, labels waste as much, and frames more.
    grouped = LengthGroupedSampler(lengths=frames[1], **size).plan(1)
    by_length = [
        1 - some.sum() / sum(len(batch) * some[batch].max() for batch in grouped)
        for some in (frames[np.arange(20_000) % 3, np.arange(20_000)], labels)
    ]
    assert by_length[0] > 0.08
    assert 1 - labels.sum() / padded[1] < by_length[1] + 0.02


def test_few_rows_with_many_labels_do_not_widen_the_others():
    frames, labels = CORPORA["outliers"]
    wide = [
        batch.frames
        for batch in ShapedSampler(frames=frames, labels=labels, batch_size=4).batches(0)
        if batch.labels >= 400
    ]
    # They go to the last cell, and leave the rows of other lengths alone.
    assert set(wide) == {frames.max()} and len(wide) <= 2


def test_speeds_depend_on_seed_epoch_and_row_and_each_comes_as_often():
    frames, labels = made_up(3000)
    rows = np.arange(3000) * 2 + 1

    def speeds(epoch, some=slice(None), **options):
        plan = ShapedSampler(
            frames=frames[:, some],
            labels=labels[some],
            rows=rows[some],
            grid=GRID,
            batch_size=4,
            **options,
        )
        return {row: speed for batch in plan.batches(epoch) for _, row, speed in batch.keys}

    found = speeds(3)
    assert sorted(found) == rows.tolist()
    assert speeds(3, slice(500, 2500)) == {row: found[row] for row in rows[500:2500].tolist()}
    for other in (speeds(4), speeds(3, seed=1)):
        assert 0.6 < np.mean([found[row] != other[row] for row in found]) < 0.73
    for epoch in range(5):
        share = np.bincount(list(speeds(epoch).values())) / 3000
        assert abs(share - 1 / 3).max() < 0.04


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_plan_is_a_function_of_seed_and_epoch(size):
    frames, labels = CORPORA["700 rows"]
    plan, again, other = (
        ShapedSampler(frames=frames, labels=labels, seed=seed, **size) for seed in (5, 5, 6)
    )
    made = [list(plan.batches(epoch)) for epoch in (0, 1, 2)]
    # A plan does not depend on the plans that were asked for before.
    assert [list(again.batches(epoch)) for epoch in (2, 0, 1)] == [made[2], made[0], made[1]]
    assert list(other.batches(0)) != made[0]
    # Epochs differ in their batches, not only in the order of the batches.
    sets = [{frozenset(row for _, row, _ in batch.keys) for batch in batches} for batches in made]
    assert len(sets[0] & sets[1]) < len(sets[0]) / 4
    order = [batch.frames for batch in made[1]]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.25


def test_rows_that_fill_a_larger_cell_are_spread_over_its_steps():
    frames, labels = np.array([[500] * 60 + [300] * 100]), np.full(160, 20)
    plan = ShapedSampler(frames=frames, labels=labels, batch_size=8)
    spread = []
    for epoch in range(5):
        short = [
            sum(row >= 60 for _, row, _ in batch.keys)
            for batch in plan.batches(epoch)
            if batch.frames == 500
        ]
        assert len(short) == 8 and sum(short) == 4
        spread.append(np.count_nonzero(short))
    assert np.mean(spread) > 2


def test_steps_depend_on_the_rows_of_all_ranks_together():
    frames, labels = CORPORA["700 rows"]
    one, two, four = (
        ShapedSampler(frames=frames, labels=labels, batch_size=8 // ranks, world_size=ranks)
        for ranks in (1, 2, 4)
    )
    for epoch in (0, 3):
        assert one.count == two.count == four.count
        for step, *others in zip(one.steps(epoch), two.steps(epoch), four.steps(epoch)):
            assert all(np.array_equal(step, other) for other in others)


def test_start_batch_skips_once_and_keys_are_small_enough_to_travel():
    frames, labels = CORPORA["61 rows"]
    plan = ShapedSampler(frames=frames, labels=labels, rows=np.arange(61) * 7 + 3, batch_size=4)
    whole = list(plan)
    plan.start_batch = 7
    assert list(plan) == whole[7:] and plan.start_batch == 0
    assert list(plan) == whole and len(plan) == len(whole)
    assert pickle.loads(pickle.dumps(whole)) == whole
    assert all(type(number) is int for batch in whole for key in batch.keys for number in key)
    plan.start_batch = 7
    plan.set_epoch(1)
    assert len(list(plan)) == len(whole)


def test_fewer_rows_than_ranks_are_refused():
    with pytest.raises(UserError, match="3 rows cannot be spread over 4 processes"):
        ShapedSampler(frames=np.ones((1, 3), int), labels=np.ones(3), batch_size=2, world_size=4)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_lengths_pads_less(seed, monkeypatch):
    lengths = np.random.default_rng(seed).integers(1, 15, (2, 12))
    there = np.unique(lengths)

    def padded(ends):
        return sum(min(end for end in ends if end >= length) for length in lengths.flat)

    for most in range(1, len(there) + 3):
        chosen = least_padding(lengths, most)
        assert len(chosen) <= most and chosen[-1] == lengths.max()
        assert padded(chosen) == min(
            padded((*ends, there[-1]))
            for ends in itertools.combinations(there[:-1], min(most, len(there)) - 1)
        )
    # Of too many lengths, some are left out; the longest is not.
    monkeypatch.setattr(sampler, "CANDIDATES", 4)
    chosen = least_padding(lengths, 20)
    assert len(chosen) <= 4 and chosen[-1] == lengths.max()


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), train=22, dev=2)


def kept_choice(output):
    """Returns what run.json, the options and the plan of last.ckpt say of few_shapes."""
    checkpoint = trusted(output / "last.ckpt")
    options = json.loads((output / "run.json").read_text())["options"]
    found = checkpoint["plan"]["few_shapes"]
    return options["few_shapes"], checkpoint["run_options"]["few_shapes"], found


def test_auto_is_resolved_by_the_accelerator_and_stays_so_at_a_resume(data, tmp_path, monkeypatch):
    words = ("--max_steps", 1, "--batch_size", 8)
    longer = ("--max_steps", 2, "--batch_size", 8, "--resume")
    run(data, tmp_path / "cpu", *words, "--few_shapes", "auto")
    assert kept_choice(tmp_path / "cpu") == ("off", "off", "off")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(train, "CPUAccelerator", type("Other", (), {}))
        run(data, tmp_path / "plain", *words, "--no-group_by_length")
        assert kept_choice(tmp_path / "plain") == ("off", "off", "off")
        run(data, tmp_path / "gpu", *words)
        run(data, tmp_path / "cpu", *longer)
    chosen = ("on", "on", "on (speeds 0.9 1.0 1.1)")
    assert kept_choice(tmp_path / "gpu") == chosen
    run(data, tmp_path / "gpu", *longer)
    assert kept_choice(tmp_path / "gpu") == chosen
    assert kept_choice(tmp_path / "cpu") == ("off", "off", "off")


def test_a_checkpoint_older_than_the_choice_goes_on_without_few_shapes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CPUAccelerator", type("Other", (), {}))
    words = ("--batch_size", 8, "--few_shapes", "off")
    run(data, tmp_path / "run", "--max_steps", 1, *words)
    checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert checkpoint["plan"].pop("few_shapes") == "off"
    del checkpoint["run_options"]["few_shapes"]
    torch.save(checkpoint, tmp_path / "run/last.ckpt")
    run(data, tmp_path / "run", "--batch_size", 8, "--max_steps", 2, "--resume")
    assert kept_choice(tmp_path / "run") == ("off", "off", "off")


@pytest.mark.parametrize("size", [("--batch_size", 5), ("--max_batch_seconds", 5)], ids=str)
def test_a_run_that_was_cut_within_an_epoch_ends_as_the_whole_one(data, tmp_path, size):
    words = (*size, "--few_shapes", "on", "--max_epochs", 2)
    run(data, tmp_path / "whole", *words)
    interrupted(data, tmp_path / "cut", 3, *words)
    assert len(json_lines(tmp_path / "whole/steps.jsonl")) >= 8  # the cut is in the first epoch
    run(data, tmp_path / "cut", "--resume", *size)
    for one, other in zip(
        weights(tmp_path / "whole/last.ckpt"), weights(tmp_path / "cut/last.ckpt")
    ):
        assert torch.equal(one, other)
    steps = [json_lines(tmp_path / name / "steps.jsonl") for name in ("whole", "cut")]
    assert steps[0] == steps[1]


def test_two_processes_train_on_every_row_once_an_epoch(data, tmp_path):
    words = ("--few_shapes", "on", "--batch_size", 4, "--max_epochs", 2)
    assert ranks(data, tmp_path / "run", *words) == [0, 0]
    rows = [step["rows"] for step in json_lines(tmp_path / "run/steps.jsonl")]
    first, second = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(22))
    assert first != second
