"""The loader of a split: it can start in the middle of an epoch, and carries the errors of its workers over."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from conf.errors import DataFailed
from data import workers as processes
from data.batch import Batch
from data.dataset import Carried, Samples, collate_carried, delivered
from data.order.sampler import EpochBatchSampler, EvaluationBatchSampler

MAX_AUTO_WORKERS = 8


class EpochLoader(DataLoader):
    """A loader that can start in the middle of an epoch, of samples whose errors are carried (`data.dataset`).

    Its position is kept by the data module, not here: the empty state tells Lightning that resuming is exact.
    """

    def __iter__(self) -> Iterator[Batch]:
        with processes.held():
            batches = super().__iter__()
        return self._delivered(batches)

    def _delivered(self, batches: Iterator[Any]) -> Iterator[Batch]:
        try:
            yield from map(delivered, batches)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise DataFailed(
                f"data: no batch came from {self.num_workers} loader processes within data.timeout={self.timeout:g} "
                "seconds; look whether the storage answers, or raise data.timeout"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the sampler was given its position when the loader was made."""


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
