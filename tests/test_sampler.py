"""The plan of batches: every row once, ranks in step, little padding, no batch beyond its bound."""

from cli import UserError

import numpy as np
import pytest
from torch.utils.data import DataLoader

from sampler import LengthGroupedSampler, eval_batches

BY_ROWS = {"batch_size": 4}
BY_DURATION = {"max_batch": 60.0}
KINDS = [
    {**size, "group_by_length": group} for size in (BY_ROWS, BY_DURATION) for group in (True, False)
]
IDS = ["rows-grouped", "rows-shuffled", "duration-grouped", "duration-shuffled"]


def random_lengths(rows, seed=0):
    return np.random.default_rng(seed).integers(1, 31, rows)


def plans(lengths, world_size, epoch=0, **options):
    """Return the row numbers of the batches, by [rank][step]."""
    samplers = [
        LengthGroupedSampler(lengths=lengths, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    result = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        result.append([[row for _, row in batch] for batch in sampler])
        assert len(result[-1]) == len(sampler)
    return result


@pytest.mark.parametrize("options", KINDS, ids=IDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_row_once_an_epoch_and_ranks_have_equally_many_batches(options, world_size):
    for rows in [*range(world_size, 34), 100, 997]:
        for epoch in range(2 if rows < 100 else 4):
            ranks = plans(
                random_lengths(rows), world_size, epoch, megabatch=5, seed=rows, **options
            )
            assert len({len(batches) for batches in ranks}) == 1
            assert all(batch for batches in ranks for batch in batches)
            assert sorted(row for batches in ranks for batch in batches for row in batch) == list(
                range(rows)
            )


@pytest.mark.parametrize(
    "lengths",
    [
        np.full(100, 20),
        np.full(100, 60),
        np.full(101, 70),
        np.zeros(50, int),
        np.arange(1, 200),
        np.array([5]),
        # Of these 2 and 3 ranks must halve a batch twice, to a row for each.
        np.array([20, 20, 30, 90, 5, 30, 5, 1, 90, 60, 1, 1, 20]),
        np.array([8, 90, 8, 1, 8, 30, 90, 10, 20, 20, 1, 60, 90, 8, 60, 8, 30, 10, 5]),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", KINDS, ids=IDS)
def test_the_announced_number_of_batches_is_the_real_one(lengths, options):
    for epoch in range(4):
        for world_size in (1, 2, 3, 4) if len(lengths) > 1 else (1,):
            plans(lengths, world_size, epoch, megabatch=3, **options)  # asserts it


@pytest.mark.parametrize("options", KINDS, ids=IDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_batch_never_exceeds_its_bound(options, world_size):
    rng = np.random.default_rng(1)
    for rows in (5, 23, 24, 331):
        lengths = rng.integers(1, 31, rows)
        # Two rows are longer than the bound of a batch, and must go alone.
        lengths[rng.integers(0, rows, 2)] = 100
        for epoch in range(3):
            ranks = plans(lengths, world_size, epoch, megabatch=5, seed=rows, **options)
            over = [
                batch
                for batches in ranks
                for batch in batches
                if len(batch) > 1
                and (
                    len(batch) > options["batch_size"]
                    if "batch_size" in options
                    else len(batch) * lengths[batch].max() > options["max_batch"]
                )
            ]
            # Where the rows do not divide by the ranks, a rank takes one more, once an epoch.
            assert len(over) <= (world_size > 1) * (world_size - 1) and all(
                len(batch) == 2 for batch in over
            )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_long_row_per_rank_is_the_only_excess(world_size):
    lengths = np.concatenate((np.full(2 * world_size, 100), np.full(30 * world_size, 10)))
    for group in (True, False):
        for batches in plans(lengths, world_size, max_batch=60.0, group_by_length=group):
            assert all(
                len(batch) == 1 or len(batch) * lengths[batch].max() <= 60 for batch in batches
            )
            assert all(len(batch) == 1 for batch in batches if lengths[batch].max() == 100)


@pytest.mark.parametrize("options", KINDS, ids=IDS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_longest_comes_first(options, world_size):
    lengths = random_lengths(500)
    lengths[137] = 31
    for epoch in range(3):
        ranks = plans(lengths, world_size, epoch, megabatch=5, **options)
        assert any(137 in batches[0] for batches in ranks)


@pytest.mark.parametrize("size", [BY_ROWS, BY_DURATION], ids=["rows", "duration"])
def test_batches_of_a_step_are_alike_in_length_over_ranks(size):
    lengths = random_lengths(4000)
    ranks = plans(lengths, 4, megabatch=50, **size)
    # (rank, step); the lengths are seconds, 1 .. 30.
    longest = np.array([[lengths[batch].max() for batch in batches] for batches in ranks])
    assert np.ptp(longest, axis=0).mean() < 0.5
    assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in zip(*ranks))


@pytest.mark.parametrize("group", [True, False], ids=["grouped", "shuffled"])
def test_rows_of_all_ranks_together_make_the_steps_whatever_the_number_of_ranks(group):
    # These numbers leave the last step a row for each of four ranks.
    for rows in (8, 20, 64, 100, 1004, 3007):
        for epoch in (0, 3):
            one, two, four = (
                LengthGroupedSampler(
                    lengths=random_lengths(rows),
                    batch_size=8 // world_size,
                    megabatch=5,
                    world_size=world_size,
                    group_by_length=group,
                ).steps(epoch)
                for world_size in (1, 2, 4)
            )
            assert as_lists(one) == as_lists(two) == as_lists(four)


def waste(lengths, batches):
    """Return the share of all batches that is padding."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - lengths.sum() / padded


@pytest.mark.parametrize(
    "size", [{"batch_size": 16}, {"max_batch": 250.0}], ids=["rows", "duration"]
)
def test_grouping_wastes_far_less_on_padding_than_shuffling(size):
    lengths = random_lengths(5000)
    grouped, shuffled = (
        waste(lengths, plans(lengths, 1, group_by_length=group, **size)[0])
        for group in (True, False)
    )
    assert shuffled > 0.3 and grouped < 0.05


def test_grouped_batches_come_in_random_order():
    lengths = random_lengths(4000)
    longest = [lengths[batch].max() for batch in plans(lengths, 1, **BY_ROWS)[0]]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.1


@pytest.mark.parametrize("options", KINDS, ids=IDS)
def test_a_plan_is_a_function_of_seed_and_epoch(options):
    lengths = random_lengths(800)
    sampler = LengthGroupedSampler(lengths=lengths, seed=5, megabatch=10, **options)
    again = LengthGroupedSampler(lengths=lengths, seed=5, megabatch=10, **options)
    other = LengthGroupedSampler(lengths=lengths, seed=6, megabatch=10, **options)
    made = [as_lists(sampler.plan(epoch)) for epoch in (0, 1, 2)]
    # A plan does not depend on the plans that were asked for before.
    assert [as_lists(again.plan(epoch)) for epoch in (2, 0, 1)] == [made[2], made[0], made[1]]
    assert made[0] != made[1] and made[1] != made[2] and as_lists(other.plan(0)) != made[0]
    # Epochs differ in their batches, not only in the order of the batches.
    sets = [{frozenset(batch) for batch in plan} for plan in made]
    assert len(sets[0] & sets[1]) < len(sets[0]) / 4


def as_lists(plan):
    return [batch.tolist() for batch in plan]


def test_no_epoch_repeats_the_first_ones_batches():
    # The number of batches by duration varies. An epoch that has too many must be drawn anew and
    # not take the first one's.
    for seed in range(20):
        sampler = LengthGroupedSampler(
            lengths=random_lengths(60, seed), max_batch=60.0, group_by_length=False, seed=seed
        )
        made = [{frozenset(batch.tolist()) for batch in sampler.plan(epoch)} for epoch in range(6)]
        assert all(len(made[0] & other) < len(made[0]) / 2 for other in made[1:])


@pytest.mark.parametrize("size", [{"batch_size": 4}, {"max_batch": 60.0}], ids=["rows", "duration"])
def test_the_longest_rows_of_a_large_corpus_keep_to_themselves_but_change_company(size):
    lengths = np.random.default_rng(0).lognormal(2, 0.5, 8000)
    sampler = LengthGroupedSampler(lengths=lengths, megabatch=10, **size)
    long = np.quantile(lengths, 0.9)
    made = [
        {frozenset(batch.tolist()) for batch in sampler.plan(epoch) if lengths[batch].max() > long}
        for epoch in (0, 1)
    ]
    mixed = [batch for batch in made[0] if lengths[list(batch)].min() <= long]
    # One megabatch takes the last rows of a band and the first of the next.
    assert len(mixed) <= 2
    shared = [batch for batch in made[0] & made[1] if len(batch) > 1]
    assert len(shared) < len(made[0]) / 20


def test_keys_carry_the_epoch_and_the_given_row_numbers():
    sampler = LengthGroupedSampler(
        lengths=random_lengths(10), rows=np.arange(10) * 7 + 3, batch_size=4
    )
    sampler.set_epoch(2)
    keys = [key for batch in sampler for key in batch]
    assert {epoch for epoch, _ in keys} == {2} and sorted(row for _, row in keys) == [
        3 + 7 * i for i in range(10)
    ]
    assert all(type(number) is int for key in keys for number in key)


def test_start_batch_skips_once():
    sampler = LengthGroupedSampler(lengths=random_lengths(40), batch_size=4)
    whole = list(sampler)
    sampler.start_batch = 7
    assert list(sampler) == whole[7:] and sampler.start_batch == 0
    assert list(sampler) == whole and len(sampler) == len(whole)


def test_a_loader_takes_the_sampler_as_it_is():
    rows = list(
        DataLoader(
            Echo(),
            sampler=LengthGroupedSampler(lengths=random_lengths(11), batch_size=4),
            batch_size=None,
        )
    )
    assert sorted(row for batch in rows for _, row in batch) == list(range(11))


class Echo:
    def __getitem__(self, keys):
        return keys


def test_fewer_rows_than_ranks_are_refused():
    with pytest.raises(UserError, match="3 rows cannot be spread over 4 processes"):
        LengthGroupedSampler(lengths=[1, 2, 3], batch_size=2, world_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_every_row_once_and_no_rank_is_left_out(world_size):
    for rows in (world_size, 5, 50, 51, 64):
        lengths = random_lengths(rows)
        ranks = [eval_batches(lengths, 4, rank, world_size) for rank in range(world_size)]
        keys = [key for batches in ranks for batch in batches for key in batch]
        assert sorted(keys) == [(0, row) for row in range(rows)]
        assert all(1 <= len(batch) <= 4 for batches in ranks for batch in batches)
        assert len({len(batches) for batches in ranks}) == 1
    assert [lengths[row] for batch in eval_batches(lengths, 4) for _, row in batch] == sorted(
        lengths, reverse=True
    )
    with pytest.raises(UserError, match="cannot be spread"):
        eval_batches(lengths[:3], 4, 0, 4)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_takes_no_more_at_once_than_allowed_save_a_row_that_is_longer_alone(world_size):
    lengths = random_lengths(200)
    lengths[7] = 50 * max(lengths)
    most = 4 * np.median(lengths)
    batches = [
        batch
        for rank in range(world_size)
        for batch in eval_batches(lengths, 8, rank, world_size, most)
    ]
    rows = [[row for _, row in batch] for batch in batches]
    assert sorted(sum(rows, [])) == list(range(200)) and [7] in rows and max(map(len, rows)) == 8
    assert all(
        len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= most for batch in rows
    )
