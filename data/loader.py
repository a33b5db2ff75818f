"""The loader of a split: it can start in the middle of an epoch, and carries the errors of its workers over."""

import os
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch.utils.data import DataLoader

from conf.errors import DataFailed
from conf.folders import printable
from data import limits
from data import workers as processes
from data.batch import Batch
from data.dataset import Carried, Failed, Samples, collate_carried, delivered
from data.order.sampler import EpochBatchSampler, EvaluationBatchSampler
from data.readers import Gone, Readers

MAX_AUTO_WORKERS = 8
SHOWN = 4  # files named in a message


class EpochLoader(DataLoader):
    """A loader that can start in the middle of an epoch, of samples whose errors are carried (`data.dataset`).

    Its position is kept by the data module, not here: the empty state tells Lightning that resuming is exact. Where one
    of its processes dies, all are started again at the batch that is due, which is the same batch: draws are pure.
    """

    RESTARTS = 3  # in an iteration

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.batch_sampler.start_epoch, self.batch_sampler.start_batch
        epoch = self.batch_sampler.epoch if epoch is None else epoch
        return self._delivered(self._started(), epoch, first)

    def _started(self) -> Iterator[Batch | Failed]:
        with processes.held():
            try:
                return super().__iter__()
            except Gone as gone:  # one that stayed from the iteration before: it had nothing to read
                print(f"data: a loader process {gone.why} between epochs; started again")
                processes.end(self)
                return super().__iter__()

    def _delivered(self, batches: Iterator[Batch | Failed], epoch: int, first: int) -> Iterator[Batch]:
        restarts, start = 0, first
        while True:
            try:
                batch = next(batches, None)
            except Gone as gone:
                restarts += 1
                at = f"while it read {self._described(epoch, start + gone.batch)}"
                processes.end(self)
                if gone.late or restarts > self.RESTARTS:
                    raise DataFailed(f"data: a loader process {gone.why} {at}; {_remedy(gone.late)}") from None
                print(f"data: a loader process {gone.why} {at}; started again ({restarts} of {self.RESTARTS} times)")
                self.batch_sampler.start_epoch, self.batch_sampler.start_batch, start = epoch, first, first
                batches = self._started()
                continue
            if batch is None:
                return
            first += 1
            yield delivered(batch)

    def _get_iterator(self) -> Any:
        return Readers(self) if self.num_workers > 0 else super()._get_iterator()

    def _described(self, epoch: int, number: int) -> str:
        """ "batch 12 of epoch 0: a.png, b.png and 6 more"."""
        sampler = copy(self.batch_sampler)
        sampler.start_epoch, sampler.start_batch = epoch, number
        draws = next(iter(sampler), [])
        split = self.dataset.samples.split
        names = [split.path(draw.index) if hasattr(split, "path") else f"image {draw.index}" for draw in draws]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"batch {number} of epoch {epoch}: {', '.join(map(printable, names[:SHOWN]))}{more}"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the sampler was given its position when the loader was made."""


def _remedy(late: bool) -> str:
    if late:
        return "the disk or the network may hang: mend it, or raise data.timeout"
    return f"set fewer data.workers, or none, which says what is wrong with an image ({limits.free()})"


def loader(
    samples: Samples, sampler: EpochBatchSampler | EvaluationBatchSampler, workers: int, timeout: float, seed: int
) -> EpochLoader:
    """Batches of `samples` in the order of `sampler`.

    Args:
        workers: processes that read; 0 reads in this one.
        timeout: seconds to wait for a batch from a worker before the run fails instead of hanging.
        seed: of the loader's own generator, or each epoch would draw from the model's randomness.
    """
    return EpochLoader(
        Carried(samples),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate_carried,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        timeout=timeout if workers > 0 else 0,
        worker_init_fn=processes.begin,
        generator=torch.Generator().manual_seed(seed),
    )


def worker_count(given: int | str, embedded: bool, processes: int) -> int:
    """Loader processes per training process.

    Args:
        given: a number, or `auto`: none for an embedded source, else one per CPU core that this process may count on.
        embedded: whether the source needs no reading.
        processes: training processes on this machine.
    """
    if given != "auto":
        return int(given)
    if embedded:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_AUTO_WORKERS, cores // processes))
