"""Plans which rows make a batch, in which order, on which rank: pure functions of (seed, epoch).

A plan, for training or evaluation, yields lists of keys (epoch, row). The epoch travels with the
row, so a loader process needs no other state to draw this epoch's augmentation. Use a plan as
DataLoader(dataset, sampler=plan, batch_size=None).
"""

import math

from cli import UserError

import numpy as np
from torch.utils.data import Sampler

DRAWS = 20  # attempts at an epoch that has no more batches than the first epoch
# BANDS are the quantiles that divide the rows by length: the shorter half, the longer half without
# its end, and the longest tenth, which spans most of the range of lengths. Megabatches of one band
# are padded a quarter as much as mixed ones. Bands are used where the longest tenth fills at least
# BAND_MEGABATCHES megabatches: with fewer, the same long rows would meet in a batch in every epoch.
BANDS = (0.5, 0.9)
BAND_MEGABATCHES = 4


class LengthGroupedSampler(Sampler):
    """Makes batches of rows alike in length: random megabatches, each sorted by length and cut.

    A megabatch has the rows of `megabatch` batches of every rank. Its rows are of one band of
    length (BANDS) where there are enough rows, else of any length. The batch with the longest row
    is the first of an epoch, the others come in random order. Memory needs no such order, because
    recovery.MemoryCheck runs the largest batches before the first update. The order stays because
    all measured figures depend on it.

    lengths (n,) may be in any unit; `rows` (n,) are the row numbers to yield, by default 0 .. n-1.
    A batch has `batch_size` rows or, with `max_batch`, as many as keep rows * longest within it (in
    the unit of lengths; a longer row goes alone). Every row comes once an epoch, every rank gets
    equally many batches, and the ranks' batches of a step are cut from the same stretch of lengths.
    With batch_size, the rows of a step depend on batch_size * world_size alone, but for the last
    steps where fewer rows than ranks are left over; with max_batch they depend on world_size.
    Raises UserError where there are fewer rows than ranks.
    """

    def __init__(
        self,
        *,
        lengths,
        batch_size: int | None = None,
        max_batch: float | None = None,
        rows=None,
        group_by_length: bool = True,
        megabatch: int = 50,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        check_share(len(lengths), world_size)
        self.lengths = np.asarray(lengths)
        self.rows = np.arange(len(lengths)) if rows is None else np.asarray(rows)
        self.batch_size = batch_size
        self.max_batch = max_batch
        self.group_by_length = group_by_length
        per_batch = batch_size or max(1, int(max_batch / max(self.lengths.mean(), 1)))
        self.megarows = megabatch * per_batch * world_size
        self.bands = self._bands()
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0
        self.count = len(self._borders(self._order(0, 0))) - 1
        if max_batch and self.count > 1:
            # Batches by duration vary in number from epoch to epoch. The announced number leaves
            # room for 2 % more, which _split then fills exactly.
            self.count = min(self.count + self.count // 50 + 1, len(lengths) // world_size)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            # A run that resumes behind an epoch's last batch may never iterate over the epoch.
            self.start_batch = 0
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        """Yields the keys of each batch of this rank, from start_batch on in a resumed epoch."""
        epoch = self.epoch
        start = self.start_batch
        self.start_batch = 0
        for batch in self.plan(epoch)[start:]:
            yield [(epoch, int(row)) for row in batch]

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Returns the batches of this rank in `epoch`, as row numbers."""
        return [step[self.rank :: self.world_size] for step in self.steps(epoch)]

    def steps(self, epoch: int) -> list[np.ndarray]:
        """Returns the batches of all ranks together: the row numbers of each step.

        The ranks take the rows of a step in turn.
        """
        for draw in range(DRAWS):
            order = self._order(epoch, draw)
            borders = self._borders(order)
            if len(borders) - 1 <= self.count:
                break
        else:  # This happens hardly ever. The batches of the first epoch fit by definition.
            order = self._order(0, 0)
            borders = self._borders(order)
        borders = self._split(borders)
        longest = np.maximum.reduceat(self.lengths[order], borders[:-1])
        sequence = np.random.default_rng((self.seed, epoch, 1)).permutation(len(longest))
        first = np.argmax(longest[sequence])
        sequence[[0, first]] = sequence[[first, 0]]
        rows = self.rows[order]
        return [rows[borders[i] : borders[i + 1]] for i in sequence]

    def _bands(self) -> np.ndarray:
        """Returns the band of every row, (n,) uint8."""
        if (1 - max(BANDS)) * len(self.lengths) < BAND_MEGABATCHES * self.megarows:
            return np.zeros(len(self.lengths), np.uint8)
        return np.searchsorted(np.quantile(self.lengths, BANDS), self.lengths).astype(np.uint8)

    def _order(self, epoch: int, draw: int) -> np.ndarray:
        """Draws a permutation; with group_by_length, megabatches are sorted by falling length."""
        order = np.random.default_rng((self.seed, epoch, 0, draw)).permutation(len(self.lengths))
        if not self.group_by_length:
            return order
        order = order[np.argsort(self.bands[order], kind="stable")]
        megabatch = np.arange(len(order)) // self.megarows
        return order[np.lexsort((-self.lengths[order], megabatch))]

    def _borders(self, order) -> list[int]:
        """Returns where the batches of all ranks together begin, and the end.

        Each of these batches has at least one row for every rank.
        """
        if self.batch_size:
            borders = list(range(0, len(order), self.batch_size * self.world_size))
        else:
            borders = borders_by_duration(
                self.lengths[order], self.world_size, self.max_batch, megarows=self.megarows
            )
        return end_of_borders(borders, len(order), self.world_size)

    def _split(self, borders: list[int]) -> np.ndarray:
        """Halves the batches with most rows until there are `count`, or none can be halved."""
        borders = np.asarray(borders)
        while (short := self.count - (len(borders) - 1)) > 0:
            sizes = np.diff(borders)
            widest = np.argsort(-sizes, kind="stable")[:short]
            widest = widest[sizes[widest] >= 2 * self.world_size]
            if not len(widest):
                break
            borders = np.sort(np.concatenate((borders, borders[widest] + sizes[widest] // 2)))
        return borders


def borders_by_duration(
    lengths,
    world_size: int,
    max_batch: float,
    batch_size: float = math.inf,
    megarows: float = math.inf,
) -> list[int]:
    """Returns where the batches of all ranks together begin.

    A batch takes as many rows as keep rows * longest of every rank within max_batch, and at most
    batch_size rows a rank. No batch crosses a multiple of `megarows`.
    """
    borders = [0]
    rows = 0  # of every rank in the batch that is being filled
    longest = 0
    # A stride is one row for every rank.
    strides = np.maximum.reduceat(lengths, np.arange(0, len(lengths), world_size))
    for start, length in zip(range(0, len(lengths), world_size), strides.tolist()):
        longest = max(longest, length)
        too_long = (rows + 1) * longest > max_batch
        if rows and (too_long or rows == batch_size or start % megarows == 0):
            borders.append(start)
            rows = 0
            longest = length
        rows += 1
    return borders


def end_of_borders(borders: list[int], size: int, world_size: int) -> list[int]:
    """Returns the borders and the end; the last batch has a row for every rank, too."""
    if len(borders) > 1 and size - borders[-1] < world_size:
        # Too few rows are left for all ranks, so the last batch takes some from the one before.
        borders[-1] = size - world_size
        if borders[-1] - borders[-2] < world_size:
            borders.pop()
    return borders + [size]


def check_share(rows: int, world_size: int, split: str = "") -> None:
    """Raises UserError where a rank would have no row."""
    if rows < world_size:
        raise UserError(
            f"{rows} rows{split and f' of {split}'} cannot be spread over {world_size} processes; "
            "give more rows or lower --devices"
        )


def eval_batches(
    lengths, batch_size: float, rank: int = 0, world_size: int = 1, max_batch: float = math.inf
) -> list[list[tuple[int, int]]]:
    """Returns batches of keys (0, row): every row once, by falling length.

    Every rank gets equally many batches, at least one, because Lightning stops with a traceback
    where a rank has none. A batch has at most `batch_size` rows and, unless it is one row, at most
    max_batch of rows * longest (in the unit of lengths); where the rows do not divide, it has one
    row more. Raises UserError where there are fewer rows than ranks.
    """
    check_share(len(lengths), world_size)
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    borders = borders_by_duration(lengths[order], world_size, max_batch, batch_size)
    borders = end_of_borders(borders, len(order), world_size)
    return [
        [(0, int(row)) for row in order[start:end][rank::world_size]]
        for start, end in zip(borders, borders[1:])
    ]
