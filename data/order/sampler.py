"""Which images make which batch: a pure function of the seed and the epoch, split over the processes.

Training batches are global: batch `b` of an epoch holds the same images however many processes share it, and
process `r` of `W` takes every `W`-th of them. The order does not depend on workers or on earlier epochs, so a
run resumes in the middle of an epoch by starting at a batch number, and nothing else has to be stored. With another
number of processes, or another batch, it goes on with the steps of the layout that it began with (`data.order.layout`).

Repeated augmentation (`repeats=3`) follows Hoffer et al., "Augment your batch", CVPR 2020 (arXiv 1901.09335), in
the form that DeiT trains with (arXiv 2012.12877): each image appears `repeats` times in a row, so the copies fall
on different processes, and the epoch ends after as many samples as there are images; an epoch sees about
`1 / repeats` of the images. As there, the number of samples is rounded down to a multiple of 256 (when there are
that many). Copies here differ by their augmentation even when one process takes them all.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data.order.layout import Layout
from data.order.randomness import ORDER, generator

REPEAT_ROUND = 256  # DeiT's rounding of the epoch under repeated augmentation, in samples
TOGETHER = 4  # shards that are read at the same time, their images mixed


class Draw(NamedTuple):
    """One sample to read: image `index` in `epoch`, for the `repeat`-th time, in batch `number`.

    `named` is the number and the process by which the randomness of the batch is named; `None` for its own.
    """

    epoch: int
    index: int
    repeat: int = 0
    number: int = 0
    named: tuple[int, int] | None = None


class EpochBatchSampler(Sampler[list[Draw]]):
    """Batches of an epoch for one process.

    Args:
        length: images in the source.
        batch_size: images per process and batch.
        seed: names the order together with the epoch.
        rank, world: this process and the number of processes.
        repeats: appearances of an image in a row; 1 is ordinary training.
        blocks: images of each shard, for a source whose neighbours are read together: the shards are shuffled, and of a
            few that follow each other (`TOGETHER`) the images; `None` shuffles all.
        accumulated: batches of an optimizer step. They are dealt like the batches of as many processes, so that with
            repeated augmentation too a batch is the same on one device that accumulates as on many.
        drop_last: leave out the last batch when it is not full. When kept, it is split as evenly as possible and
            still left out when some process would get nothing.
        labels: of the images, to draw as many of every class (`balanced`); `None` draws every image once.
        shuffle: `False` keeps the source's order in every epoch (overfitting on the first batches).
        begun: the layout whose steps are dealt here, where the run began in another one.

    `start_batch` (and `start_epoch`, if set) apply to the next iteration only: batches before them are skipped
    without being read. `len()` is always the full epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
        drop_last: bool = True,
        shuffle: bool = True,
        accumulated: int = 1,
        blocks: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        begun: Layout | None = None,
    ) -> None:
        self.labels, self.begun = labels, begun
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.repeats, self.accumulated = rank, world, repeats, accumulated
        self.drop_last, self.shuffle, self.blocks = drop_last, shuffle, blocks
        self.epoch = 0
        self.start_epoch: int | None = None
        self.start_batch = 0

    @property
    def sampler(self) -> "EpochBatchSampler":
        """Lightning calls `set_epoch` on `loader.batch_sampler.sampler`, not on the batch sampler itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def samples(self) -> int:
        """Samples of an epoch before batching, all processes together."""
        if self.repeats > 1 and self.length >= REPEAT_ROUND:
            return self.length // REPEAT_ROUND * REPEAT_ROUND
        return self.length

    def __len__(self) -> int:
        if self.begun is not None:
            return self.begun.shared_anew(self.batch_size, self.world, self.accumulated).batches
        full, rest = divmod(self.samples, self.batch_size * self.world)
        return full + int(not self.drop_last and rest >= self.world)

    @property
    def smallest(self) -> int:
        """Samples of the smallest batch that some process gets."""
        if self.begun is not None:
            return min(len(self._anew(number, rank)[0]) for number in (0, len(self) - 1) for rank in range(self.world))
        rest = self.samples % (self.batch_size * self.world)
        return self.batch_size if self.drop_last or rest < self.world else rest // self.world

    def __iter__(self) -> Iterator[list[Draw]]:
        # A generator, so nothing is used up before the first batch is asked for: torch's loader makes two iterators
        # when it starts its workers and drops the first.
        epoch = self.epoch if self.start_epoch is None else self.start_epoch
        start, self.start_epoch, self.start_batch = self.start_batch, None, 0
        order = self._order(epoch)
        for number in range(start, len(self)):
            positions, named = self._own(number) if self.begun is None else self._anew(number, self.rank)
            yield [Draw(epoch, int(order[p // self.repeats]), int(p % self.repeats), number, named) for p in positions]

    def _own(self, number: int) -> tuple[range, None]:
        return self._positions(number, self.rank, Layout(self.batch_size, self.world, self.accumulated, 0)), None

    def _positions(self, number: int, rank: int, layout: Layout) -> range:
        """Where the samples of a batch are in the epoch; batches that make no whole step are dealt one by one."""
        size = layout.batch * layout.processes
        step, part = divmod(number, layout.accumulated)
        if (step + 1) * layout.images <= self.samples:
            first = step * layout.images
            return range(first + part * layout.processes + rank, first + layout.images, layout.hands)
        return range(number * size + rank, min((number + 1) * size, self.samples), layout.processes)

    def _anew(self, number: int, rank: int) -> tuple[Sequence[int], tuple[int, int] | None]:
        """Where the samples of a batch are in the epoch of the layout that the run began with, and its name there."""
        begun, (step, part) = self.begun, divmod(number, self.accumulated)
        first = step * begun.accumulated
        numbers = range(first, min(first + begun.accumulated, begun.batches))
        hand = part * self.world + rank
        if self.batch_size == begun.batch:
            named = first + hand // begun.processes, hand % begun.processes
            return self._positions(*named, begun), named
        dealt = [self._positions(number, process, begun) for number in numbers for process in range(begun.processes)]
        hands = len(dealt) * self.world * self.accumulated // begun.hands
        return np.sort(np.concatenate(dealt))[hand::hands], None

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.length)
        random = generator(self.seed, ORDER, epoch)
        if self.labels is not None:
            return balanced(self.labels, random)
        return random.permutation(self.length) if self.blocks is None else by_blocks(self.blocks, random)


def by_blocks(blocks: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """All positions, shards in random order, the images of `TOGETHER` shards in a row shuffled among each other."""
    ends = np.cumsum(blocks)
    shards = random.permutation(len(blocks))
    parts = [
        random.permutation(np.concatenate([np.arange(ends[shard] - blocks[shard], ends[shard]) for shard in few]))
        for few in (shards[start : start + TOGETHER] for start in range(0, len(shards), TOGETHER))
    ]
    return np.concatenate(parts) if parts else np.arange(0)


def balanced(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """As many draws as there are images, of every class the same number (or one more), in random order.

    The images of a class come in turn: none for the second time before all have come.
    """
    classes = np.unique(labels)
    share, rest = divmod(len(labels), len(classes))
    more = set(random.permutation(len(classes))[:rest].tolist())
    drawn = []
    for number, label in enumerate(classes):
        images, wanted = np.flatnonzero(labels == label), share + (number in more)
        rounds = [random.permutation(images) for _ in range(-(-wanted // len(images)))]
        drawn.append(np.concatenate([*rounds, images[:0]])[:wanted])
    return random.permutation(np.concatenate(drawn))


class EvaluationBatchSampler(Sampler[list[Draw]]):
    """All images once, in order: process `rank` takes `rank`, `rank + world`, … without padding.

    No image is seen twice, so figures do not depend on the number of processes; processes may differ by one image
    and hence by one batch, so a task reduces its metrics once at the end, not per batch.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, length, world)
        self.batch_size = batch_size
        self.epoch, self.start_epoch, self.start_batch = 0, None, 0  # of the next iteration only, as in training

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        start, self.start_batch = self.start_batch, 0
        for number in range(start, len(self)):
            part = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
            yield [Draw(0, index, 0, number) for index in part]
