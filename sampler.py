"""Which rows make a batch, in what order, on which rank: plans are pure functions of (seed, epoch).

Training takes LengthGroupedSampler, scoring takes `eval_batches`. Both give every row exactly once and every rank the
same number of batches, so that no rank waits for a collective that another one never enters.
"""

import numpy as np
from torch.utils.data import Sampler

from cli import UserError

TRIES = 10  # draws of an epoch until its batches are no more than epoch 0 has


def _check(rows: int, world_size: int) -> None:
    if rows < world_size:
        raise UserError(f"{rows} rows cannot be spread over {world_size} processes; use more rows or fewer --devices")


def _starts(lengths: np.ndarray, groups: np.ndarray, batch_size: int | None, max_batch: float | None) -> list[int]:
    """Where a new batch begins in rows ordered as `lengths`; never across the border of two groups."""
    if batch_size is not None:  # a group is a whole number of batches, so borders fall into place
        return list(range(0, len(lengths), batch_size))
    starts, longest, group = [0], 0.0, groups[0]
    for row, (length, row_group) in enumerate(zip(lengths.tolist(), groups.tolist())):
        longest = max(longest, length)
        if row > starts[-1] and ((row - starts[-1] + 1) * longest > max_batch or row_group != group):
            starts.append(row)
            longest = length
        group = row_group
    return starts


def _split(starts: list[int], rows: int, count: int) -> np.ndarray:
    """Borders (count+1,) of exactly `count` batches, made by halving those with most rows (the last of them first)."""
    if count > rows:  # single rows throughout, and too few to give every rank as many: the closest to the limit
        return np.linspace(0, rows, rows // (count // -(-count // rows)) + 1).astype(np.int64)
    borders = starts + [rows]
    while len(borders) - 1 < count:
        sizes = np.diff(borders)
        widest = len(sizes) - 1 - int(np.argmax(sizes[::-1]))
        borders.insert(widest + 1, borders[widest] + int(sizes[widest]) // 2)
    return np.array(borders)
