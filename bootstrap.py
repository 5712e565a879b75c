"""Says how far error rates would vary with other utterances, by resampling those that were heard.

As in Bisani and Ney (2004) and in Kaldi's compute-wer-bootci, a draw takes as many utterances as
there are, with replacement. Two systems are compared on the same draws: where both stumble over the
same utterances, their difference is known better than either rate. Seeds are too few to be drawn in
this way: what other seeds would give is Student's t (1908). The draws are always the same. They
know nothing of other speakers. Axes: N utterances, S seeds, R draws.
"""

import math
from typing import NamedTuple

import numpy as np

MOST_DRAWS = 10_000
FEWEST_DRAWS = 1000  # of many utterances, which need a long time and vary little
AT_ONCE = 2**20  # utterances drawn at a time, because all draws may not fit into memory
TAILS = (0.025, 0.975)


class Difference(NamedTuple):
    """Holds a difference of two error rates, its 95 % interval, and how sure its sign is."""

    value: float
    low: float
    high: float
    better: float  # share of the draws in which the second system is better; a tie is half of one


def resample(table: np.ndarray) -> np.ndarray:
    """Sums the rows of a table (N,K) over draws of N rows, with replacement -> (R,K) float64."""
    rng = np.random.default_rng(0)
    count = len(table)
    table = table.astype(float)  # BLAS multiplies no whole numbers, and sums of them stay exact
    draws = max(FEWEST_DRAWS, min(MOST_DRAWS, 16 * AT_ONCE // count))
    sums = []
    while draws:
        size = min(draws, max(1, AT_ONCE // count))
        rows = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(rows.ravel(), minlength=size * count).reshape(size, count)
        sums.append(times @ table)
        draws -= size
    return np.concatenate(sums)


def interval(errors, said) -> list[float] | None:
    """Returns the ends of the 95 % interval of sum(errors) / sum(said), both (N,).

    One utterance says nothing of others: then there is no interval. Where nothing is wrong, no draw
    is, and the upper end is that of the rule of three (Hanley and Lippman-Hand, 1983).
    """
    if len(said) < 2:
        return None
    if not np.any(errors):
        return [0.0, round(3 / max(float(np.sum(said)), 3.0), 5)]
    wrong, length = resample(np.stack((errors, said), axis=1)).T
    # A draw may have no words at all, where many references are empty.
    rates = wrong / np.maximum(length, 1)
    return [round(float(end), 5) for end in np.quantile(rates, TAILS)]


def difference(first, second, said) -> Difference:
    """Compares the errors (S,N) of two systems with S seeds on the same utterances.

    said: (N,) words or characters. The value is the second's rate minus the first's, the mean over
    seeds, each with both its systems. The interval is of other utterances and, of several seeds, of
    other seeds, too.
    """
    change = np.asarray(second) - np.asarray(first)
    seeds = len(change)
    of_seeds = change.sum(axis=1) / sum(said)  # (S,)
    sums, length = resample(np.stack((change.sum(axis=0), said), axis=1)).T  # (R,) each
    rates = sums / seeds / np.maximum(length, 1)
    if seeds > 1:
        t = np.random.default_rng(1).standard_t(seeds - 1, len(rates))
        rates += t * of_seeds.std(ddof=1) / math.sqrt(seeds)
    low, high = np.quantile(rates, TAILS)
    better = (rates < 0).mean() + (rates == 0).mean() / 2
    return Difference(*map(float, (of_seeds.mean(), low, high, better)))
