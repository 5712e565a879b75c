"""Which rows make a batch, in what order, on which rank: plans are pure functions of (seed, epoch).

Both plans yield lists of keys (epoch, row): the epoch travels with the row, so that a worker needs no other state to
draw this epoch's augmentation. Use them as DataLoader(dataset, sampler=plan, batch_size=None).
"""

import math

from cli import UserError

import numpy as np
from torch.utils.data import Sampler

DRAWS = 20  # of an epoch, until one has no more batches than the first epoch
# The shorter half of the rows, the longer half, and of that the longest tenth, which spans most of the range of lengths:
# megabatches of one band are padded a quarter as much as mixed ones. In use where that tenth fills so many megabatches that
# its rows meet other company in every epoch.
BANDS, BAND_MEGABATCHES = (0.5, 0.9), 4


class LengthGroupedSampler(Sampler):
    """Batches of rows alike in length: random megabatches, each sorted by length and cut; the longest batch comes first.

    A megabatch has rows for `megabatch` batches of every rank, of one of three bands of length (BANDS) where there are rows
    enough, else of any length.

    lengths (n,) in any unit; `rows` (n,) are the row numbers to yield (default 0 .. n-1). A batch has `batch_size` rows or,
    with `max_batch`, as many as keep rows * longest within it (in the unit of lengths; a longer row goes alone).
    Every row comes once an epoch and every rank gets equally many batches, the ranks' batches of a step cut from the same
    stretch of lengths. batch_size * world_size alone makes the steps, save that the last ones shift where fewer rows than
    ranks are left over; with max_batch they depend on world_size. Raises UserError when there are fewer rows than ranks.
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
        self.batch_size, self.max_batch, self.group_by_length = (
            batch_size,
            max_batch,
            group_by_length,
        )
        per_batch = batch_size or max(1, int(max_batch / max(self.lengths.mean(), 1)))
        self.megarows = megabatch * per_batch * world_size
        self.bands = self._bands()
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.start_batch = 0, 0
        self.count = len(self._borders(self._order(0, 0))) - 1
        if (
            max_batch and self.count > 1
        ):  # batches by duration vary in number from epoch to epoch: leave a little room,
            self.count = min(
                self.count + self.count // 50 + 1, len(lengths) // world_size
            )  # then fill it exactly

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.start_batch = 0  # also where none was asked for: the resumed epoch had been left after its last batch
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        start, self.start_batch = (
            self.start_batch,
            0,
        )  # a resumed epoch begins where it was left, the next ones do not
        epoch = self.epoch
        for batch in self.plan(epoch)[start:]:
            yield [(epoch, int(row)) for row in batch]

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of this rank in `epoch`, as row numbers."""
        return [step[self.rank :: self.world_size] for step in self.steps(epoch)]

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The batches of all ranks together: the row numbers of each step, which the ranks take in turn."""
        for draw in range(DRAWS):
            order = self._order(epoch, draw)
            borders = self._borders(order)
            if len(borders) - 1 <= self.count:
                break
        else:  # hardly ever; the first epoch's batches fit by definition
            order = self._order(0, 0)
            borders = self._borders(order)
        borders = self._split(borders)
        longest = np.maximum.reduceat(self.lengths[order], borders[:-1])
        sequence = np.random.default_rng((self.seed, epoch, 1)).permutation(len(longest))
        first = np.argmax(longest[sequence])
        sequence[[0, first]] = sequence[
            [first, 0]
        ]  # the longest first: memory runs out at once or never
        rows = self.rows[order]
        return [rows[borders[i] : borders[i + 1]] for i in sequence]

    def _bands(self) -> np.ndarray:
        """(n,) uint8, the band of every row."""
        if (1 - max(BANDS)) * len(self.lengths) < BAND_MEGABATCHES * self.megarows:
            return np.zeros(len(self.lengths), np.uint8)
        return np.searchsorted(np.quantile(self.lengths, BANDS), self.lengths).astype(np.uint8)

    def _order(self, epoch: int, draw: int) -> np.ndarray:
        """A permutation; with group_by_length, sorted by falling length within megabatches."""
        order = np.random.default_rng((self.seed, epoch, 0, draw)).permutation(len(self.lengths))
        if not self.group_by_length:
            return order
        order = order[np.argsort(self.bands[order], kind="stable")]
        megabatch = np.arange(len(order)) // self.megarows
        return order[np.lexsort((-self.lengths[order], megabatch))]

    def _borders(self, order) -> list[int]:
        """Where the batches of all ranks together begin, and the end; each has at least one row for every rank."""
        size, world = len(order), self.world_size
        if self.batch_size:
            borders = list(range(0, size, self.batch_size * world))
        else:
            borders = borders_by_duration(
                self.lengths[order], world, self.max_batch, megarows=self.megarows
            )
        return end_of_borders(borders, size, world)

    def _split(self, borders: list[int]) -> np.ndarray:
        """Halves the batches with most rows until there are `count` of them, or none can be halved."""
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
    """Where batches of all ranks together begin: as many rows as keep rows * longest of every rank within max_batch, and rows
    within batch_size. No batch crosses `megarows`."""
    longest_of_step = np.maximum.reduceat(
        lengths, np.arange(0, len(lengths), world_size)
    )  # a step: one row for every rank
    borders, rows, longest = [0], 0, 0
    for step, length in enumerate(longest_of_step.tolist()):
        longest = max(longest, length)
        if rows and (
            (rows + 1) * longest > max_batch
            or rows == batch_size
            or step * world_size % megarows == 0
        ):
            borders.append(step * world_size)
            rows, longest = 0, length
        rows += 1
    return borders


def end_of_borders(borders: list[int], size: int, world_size: int) -> list[int]:
    """With the end behind them, and so that the last batch too has at least one row for every rank."""
    if (
        len(borders) > 1 and size - borders[-1] < world_size
    ):  # too few left for all ranks: take some from the batch before
        borders[-1] = size - world_size
        if borders[-1] - borders[-2] < world_size:
            borders.pop()
    return borders + [size]


def check_share(rows: int, world_size: int, split: str = "") -> None:
    """UserError where a rank would have no row."""
    if rows < world_size:
        raise UserError(
            f"{rows} rows{split and f' of {split}'} cannot be spread over {world_size} processes; give more rows "
            "or lower --devices"
        )


def eval_batches(
    lengths, batch_size: float, rank: int = 0, world_size: int = 1, max_batch: float = math.inf
) -> list[list[tuple[int, int]]]:
    """All rows once, sorted by falling length, equally many batches on every rank. Keys are (0, row).

    A batch has at most `batch_size` rows and, unless it is one row, at most max_batch of rows * longest (in the unit of
    lengths); where rows do not divide, one more. Lightning stops with a traceback where a rank has no batch. Raises UserError
    when there are fewer rows than ranks.
    """
    check_share(len(lengths), world_size)
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    borders = end_of_borders(
        borders_by_duration(lengths[order], world_size, max_batch, batch_size),
        len(order),
        world_size,
    )
    return [
        [(0, int(row)) for row in order[start:end][rank::world_size]]
        for start, end in zip(borders, borders[1:])
    ]
