"""Plans which rows make a batch, in which order, on which rank: pure functions of (seed, epoch).

A plan, for training or evaluation, yields lists of keys (epoch, row). The epoch travels with the
row, so a loader process needs no other state to draw this epoch's augmentation. Use a plan as
DataLoader(dataset, sampler=plan, batch_size=None).
LengthGroupedSampler plans for CPUs, where any shape of a batch costs the same. ShapedSampler plans
for GPUs, where each shape that was not seen before costs time; what it yields is `Shaped`.
"""

import itertools
import math
from typing import NamedTuple

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
CELLS = 63  # paddings of a ShapedSampler; the steps of the smallest may have one shape more
# A shape costs a GPU time once, padding costs time in every step: 3 cells for the root of the steps
# keep both small. Rows of one speed need no other cell in another epoch, and to meet other rows
# they need more steps of their cell.
CELLS_PER_ROOT = 3
STEPS_OF_ONE_SPEED = 4
CANDIDATES = 512  # lengths among which the cells' are chosen, 0.2 s; more would take seconds
# A cell has room for the labels of this share of the rows with its frames. The other rows go to
# cells of more frames, so that a few rows with many labels do not widen the labels of all. With
# this share, labels are padded less than in batches of LengthGroupedSampler.
LABEL_SHARE = 0.95
SPREAD = 2  # standard deviations of a draw of speeds for which the cells have room


class PlannedSampler(Sampler):
    """Yields the batches of one rank, epoch by epoch, in an epoch that is resumed from start_batch.

    A subclass has `count`, the steps of every epoch, `steps` and `batches`.
    """

    def __init__(self, seed: int, rank: int, world_size: int):
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            # A run that resumes behind an epoch's last batch may never iterate over the epoch.
            self.start_batch = 0
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        """Yields each batch of this rank, from start_batch on in a resumed epoch."""
        epoch = self.epoch
        start = self.start_batch
        self.start_batch = 0
        yield from itertools.islice(self.batches(epoch), start, None)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Returns the steps of `epoch`, of each the rows of this rank alone."""
        return [step[self.rank :: self.world_size] for step in self.steps(epoch)]


class LengthGroupedSampler(PlannedSampler):
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
        super().__init__(seed, rank, world_size)
        self.lengths = np.asarray(lengths)
        self.rows = np.arange(len(lengths)) if rows is None else np.asarray(rows)
        self.batch_size = batch_size
        self.max_batch = max_batch
        self.group_by_length = group_by_length
        per_batch = batch_size or max(1, int(max_batch / max(self.lengths.mean(), 1)))
        self.megarows = megabatch * per_batch * world_size
        self.bands = self._bands()
        self.count = len(self._borders(self._order(0, 0))) - 1
        if max_batch and self.count > 1:
            # Batches by duration vary in number from epoch to epoch. The announced number leaves
            # room for 2 % more, which _split then fills exactly.
            self.count = min(self.count + self.count // 50 + 1, len(lengths) // world_size)

    def batches(self, epoch: int):
        """Yields the keys (epoch, row) of each batch of this rank in `epoch`."""
        for batch in self.plan(epoch):
            yield [(epoch, int(row)) for row in batch]

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
        """Halves the batches with most rows until there are `count`.

        Halves are of equally many rows, so that other numbers of ranks make the same batches. Where
        this leaves too few rows for every rank before there are `count`, halves have a multiple of
        the ranks, for which there is always room.
        """
        equal = self._halve(borders, 1)
        return equal if len(equal) > self.count else self._halve(borders, self.world_size)

    def _halve(self, borders: list[int], multiple: int) -> np.ndarray:
        """Halves at a multiple of rows until there are `count` batches, or none can be halved."""
        borders = np.asarray(borders)
        while (short := self.count - (len(borders) - 1)) > 0:
            sizes = np.diff(borders)
            widest = np.argsort(-sizes, kind="stable")[:short]
            widest = widest[sizes[widest] >= 2 * self.world_size]
            if not len(widest):
                break
            halves = sizes[widest] // multiple // 2 * multiple
            borders = np.sort(np.concatenate((borders, borders[widest] + halves)))
        return borders


class Shaped(NamedTuple):
    """Says what a batch holds and what it is padded to, however long its longest row is."""

    keys: list[tuple[int, int, int]]  # (epoch, row, number of the speed)
    frames: int
    labels: int


class ShapedSampler(PlannedSampler):
    """Makes batches of few shapes, the same shapes equally often in every epoch.

    A shape is (rows, frames, labels). Frames and labels are those of a cell; the cells are a chain,
    each has more frames than the one before and at least as many labels. A row needs the first cell
    that holds both its frames and its labels. The frames depend on the row's speed, which is drawn
    here and goes with the key. The number of steps of each cell is fixed at the beginning, so that
    the rows of almost any draw of speeds find room; a draw that does not fit is made again. The
    cells are filled from the largest down: where a cell has room left, it takes rows that need the
    next smaller one, and so all cells are full in every epoch, save the smallest that is in use.

    frames (speeds, n) are the frames of every row at every speed, labels (n,) its labels; `rows`
    (n,) are the row numbers to yield, by default 0 .. n-1. The frames of a cell are grid[0] plus a
    multiple of grid[1]. A batch has `batch_size` rows or, with `max_batch`, as many as keep rows *
    frames of the cell within it, at least one. The smallest cell's steps share evenly what is left
    for them. Every row comes once an epoch, every rank gets equally many batches, and the ranks'
    batches of a step have the same frames and labels. Raises UserError where there are fewer rows
    than ranks.
    """

    def __init__(
        self,
        *,
        frames,
        labels,
        grid: tuple[int, int] = (0, 1),
        batch_size: int | None = None,
        max_batch: float | None = None,
        rows=None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(seed, rank, world_size)
        start, step = grid
        blocks = np.maximum(-(-(np.asarray(frames) - start) // step), 1)
        labels = np.asarray(labels)
        check_share(len(labels), world_size)
        self.rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
        per_batch = batch_size or max(1, max_batch / (start + step * blocks.mean()))
        steps = len(labels) / (per_batch * world_size)
        cells = CELLS_PER_ROOT * math.sqrt(steps)
        cells = cells if len(blocks) > 1 else min(cells, steps / STEPS_OF_ONE_SPEED)
        tops = least_padding(blocks, min(CELLS, max(1, int(cells))))
        self.frames = start + step * tops  # (cells,)
        cells = np.searchsorted(tops, blocks).astype(np.uint8)
        self.labels = label_room(cells, labels)  # (cells,)
        # (speeds, n): the cell that each row needs at each speed.
        self.needs = np.maximum(cells, np.searchsorted(self.labels, labels).astype(np.uint8))
        self.per_step = world_size * (
            np.full(len(tops), batch_size)
            if batch_size
            else np.maximum(max_batch // self.frames, 1).astype(np.int64)
        )
        self._fill()

    def _fill(self) -> None:
        """Fixes the steps of every cell: the rows of each step, its cell, and the cells' room."""
        left = len(self.rows)
        wanted = self._wanted()
        sizes = []
        self.room = np.zeros(len(wanted), np.int64)  # rows of each cell and all larger ones
        for cell in reversed(range(len(wanted))):
            placed = len(self.rows) - left
            rows = self.per_step[cell] * -(-max(wanted[cell] - placed, 0) // self.per_step[cell])
            # This is the last cell where no rank, or not every rank, would find a row in the next.
            rows = left if left - rows < self.world_size else rows
            if rows:
                steps = min(-(-rows // self.per_step[cell]), rows // self.world_size)
                sizes += [(cell, rows // steps + (i < rows % steps)) for i in range(steps)]
            left -= rows
            self.room[cell] = len(self.rows) - left
        self.cell_of_step, sizes = np.array(sizes).T  # (count,) each
        self.borders = np.concatenate(([0], np.cumsum(sizes)))
        self.count = len(self.cell_of_step)

    def _wanted(self) -> np.ndarray:
        """Returns for how many rows each cell and all larger ones need room, (cells,) int64."""
        speeds = len(self.needs)
        mean = square = 0
        # The largest need of each row, then the second, and so on: a row needs a cell at share k /
        # speeds of its draws if its k-th need does, and the sum of 2k - 1 up to k is k squared.
        falling = np.sort(self.needs, axis=0)[::-1]
        for i, needs in enumerate(falling):
            share = self._rows_from(needs) / speeds
            mean = mean + share
            square = square + (2 * i + 1) * share / speeds
        spread = np.sqrt(np.maximum(mean - square, 0))
        likely = np.ceil(mean + SPREAD * spread).astype(np.int64)
        first = self._rows_from(self._needs_at(self._speeds(0, 0)))
        return np.maximum(np.minimum(likely, self._rows_from(falling[0])), first)

    def _rows_from(self, needs) -> np.ndarray:
        """Returns how many of the rows need each cell or a larger one, (cells,)."""
        return np.bincount(needs, minlength=len(self.frames))[::-1].cumsum()[::-1]

    def _speeds(self, epoch: int, draw: int) -> np.ndarray:
        """Draws the number of each row's speed, (n,) uint8, whatever rows there are besides it."""
        rng = np.random.default_rng((self.seed, epoch, 2, draw))
        size = int(self.rows.max()) + 1
        return rng.integers(len(self.needs), size=size, dtype=np.uint8)[self.rows]

    def _needs_at(self, speeds) -> np.ndarray:
        return self.needs[speeds, np.arange(len(speeds))]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the speeds and the needs of all rows, (n,) each, for which there is room."""
        for draw in range(DRAWS):
            speeds = self._speeds(epoch, draw)
            needs = self._needs_at(speeds)
            if np.all(self._rows_from(needs) <= self.room):
                return speeds, needs
        # This happens hardly ever. The speeds of the first epoch fit by definition.
        speeds = self._speeds(0, 0)
        return speeds, self._needs_at(speeds)

    def steps(self, epoch: int) -> list[np.ndarray]:
        """Returns the batches of all ranks together: of each step (rows, 2) row numbers and speeds.

        The ranks take the rows of a step in turn.
        """
        speeds, needs = self._draw(epoch)
        rng = np.random.default_rng((self.seed, epoch, 0))
        order = rng.permutation(len(needs))
        order = order[np.argsort(needs[order], kind="stable")[::-1]]
        for rows in np.split(order, self.room[:0:-1]):  # of a cell each, the largest first
            rng.shuffle(rows)
        keys = np.stack((self.rows[order], speeds[order]), axis=1)
        return [keys[self.borders[i] : self.borders[i + 1]] for i in self._sequence(epoch)]

    def _sequence(self, epoch: int) -> np.ndarray:
        """Draws the order of the steps."""
        return np.random.default_rng((self.seed, epoch, 1)).permutation(self.count)

    def batches(self, epoch: int):
        """Yields each batch of this rank in `epoch`, with its padding."""
        for step, i in zip(self.plan(epoch), self._sequence(epoch)):
            cell = self.cell_of_step[i]
            keys = [(epoch, row, speed) for row, speed in step.tolist()]
            yield Shaped(keys, int(self.frames[cell]), int(self.labels[cell]))


def least_padding(lengths, most: int) -> np.ndarray:
    """Returns at most `most` of the lengths, rising, to which all lengths are padded.

    Each length is padded to the next of them, the last is the longest, and the sum of all padded
    lengths is the least (Bellman's programme over the histogram of lengths).
    """
    counts = np.bincount(np.ravel(lengths))
    values = np.flatnonzero(counts)
    values = values[:: -1 - len(values) // CANDIDATES][::-1]  # the longest is one of them
    below = np.cumsum(counts)[values]  # lengths up to each value
    least = below * values  # the sum of the lengths up to each value, padded
    before = []
    for _ in range(most - 1):
        # [end, start]: the last cell has the lengths beyond `start` up to `end`.
        sums = least + (below[:, None] - below) * values[:, None]
        sums[np.triu_indices(len(values), 1)] = np.iinfo(np.int64).max
        before.append(sums.argmin(axis=1))
        least = sums.min(axis=1)
    ends = [len(values) - 1]
    for starts in reversed(before):
        ends.append(starts[ends[-1]])
    return values[np.unique(ends)]


def label_room(cells, labels) -> np.ndarray:
    """Returns how many labels each cell has room for, rising, the last for all; (cells,).

    cells (speeds, n) are those that hold the rows' frames. Where a cell would have more room than
    the next, one room is taken for the rows of both, so that a row with many labels among few
    others widens no cell beyond its own. With sos, the decoder sees a multiple of 8 labels, to
    which attention would otherwise pad its masks.
    """
    order = np.argsort(np.ravel(cells), kind="stable") % len(labels)
    parts = np.split(labels[order], np.cumsum(np.bincount(np.ravel(cells)))[:-1])
    pools = []  # of cells side by side: the labels of their rows, cell by cell, and their room

    def add(pool: list):
        pools.append((pool, np.quantile(np.concatenate(pool), LABEL_SHARE, method="higher")))

    for part in parts:
        add([part])
        while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
            (one, _), (other, _) = pools.pop(-2), pools.pop()
            add(one + other)
    room = np.array([room for pool, room in pools for _ in pool])
    room[-1] = labels.max()
    return -(-(room + 1) // 8) * 8 - 1


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
