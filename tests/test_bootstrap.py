"""bootstrap.py on made-up counts with known answers."""

import numpy as np
import pytest

from bootstrap import difference, interval, resample

RNG = np.random.default_rng(7)
WRONG = RNG.random((2, 1000)) < 0.3  # errors of two systems that know nothing of each other
ONE = np.ones(1000)  # each utterance has one word


def test_a_draw_has_as_many_utterances_as_there_are_and_each_is_as_likely():
    sums = resample(np.eye(5))
    assert (sums.sum(axis=1) == 5).all()
    np.testing.assert_allclose(sums.mean(axis=0), 1, atol=0.05)
    np.testing.assert_allclose(sums.var(axis=0), 0.8, atol=0.05)  # n p (1 - p)


def test_an_interval_of_single_words_is_as_wide_as_the_binomial_formula_says():
    rate = WRONG[0].mean()
    low, high = interval(WRONG[0], ONE)
    width = 1.96 * np.sqrt(rate * (1 - rate) / len(ONE))
    assert (low, high) == pytest.approx((rate - width, rate + width), abs=width / 20)


def test_an_interval_weighs_long_utterances_more_and_one_utterance_has_none():
    assert interval([1, 1, 0], [0, 0, 0]) == [0, 3]  # draws without words are divided by nothing
    assert interval([2, 5, 10], [4, 10, 20]) == [0.5, 0.5]
    assert interval([1], [4]) is None


def test_no_error_among_many_words_is_no_proof_that_there_never_is_one():
    low, high = interval([0] * 100, [5] * 100)
    assert low == 0 and (1 - high) ** 500 == pytest.approx(0.05, abs=0.001)
    assert interval([0, 0], [1, 1]) == [0, 1] == interval([0, 0], [0, 0])


def test_equal_systems_do_not_differ_and_one_that_is_always_better_is_surely_better():
    assert difference(WRONG[:1] * 1, WRONG[:1] * 1, ONE) == (0, 0, 0, 0.5)
    found = difference(WRONG[:1] * 1 + 1, WRONG[:1] * 1, ONE)
    assert found == (-1, -1, -1, 1)
    assert difference([[0, 1, 0]], [[1, 1, 1]], [2, 2, 2]).better < 0.05


def test_systems_that_stumble_together_are_told_apart_where_strangers_are_not():
    better = WRONG[:1] & (np.arange(1000) % 10 > 0)  # a tenth of the errors mended
    found = difference(WRONG[:1] * 1, better * 1, ONE)
    assert found.high < 0 and found.better == 1
    strange = difference(WRONG[:1] * 1, np.roll(better, 500, axis=1) * 1, ONE)
    assert strange.value == found.value and strange.low < 0 < strange.high
    width = 1.96 * np.sqrt(2 * 0.3 * 0.7 / 1000)
    assert strange.high - strange.low == pytest.approx(2 * width, rel=0.15)


def test_other_seeds_vary_as_students_t_says():
    first = np.zeros((3, 1000), int)
    second = np.array([[1], [1], [-1]]) * np.ones((1, 1000), int)
    found = difference(first, second, ONE)
    width = 4.303 * np.sqrt(4 / 3 / 3)  # of two degrees of freedom
    assert found.value == pytest.approx(1 / 3)
    assert (found.low, found.high) == pytest.approx((1 / 3 - width, 1 / 3 + width), rel=0.05)
    assert found.better == pytest.approx(1 / 3, abs=0.02)  # t below -1/2
    agreed = difference(first, np.ones((3, 1), int) * WRONG[:1], ONE)
    alone = difference(first[:1], WRONG[:1] * 1, ONE)
    assert agreed == pytest.approx(alone)


def test_three_seeds_without_an_effect_seldom_seem_to_have_one():
    errors = np.random.default_rng(3).normal(5, 1, (200, 2, 3, 1)) * np.ones(4)  # of all utterances
    found = [difference(first, second, np.ones(4)) for first, second in errors]
    assert 4 <= sum(one.low > 0 or one.high < 0 for one in found) <= 16  # 5 % of 200 are 10
