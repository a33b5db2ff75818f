"""What a training step costs: images per second, the share of waiting for data, gradient norm and peak memory."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor

from models.callbacks.gradients import total_norm

FETCH = "train_dataloader_next"  # Lightning's name for the wait for a batch
MIB = 2**20


class FetchClock(PassThroughProfiler):
    """Lightning's profiler that profiles nothing, but for the seconds in which training waits for its next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self._start = 0.0, 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self._start = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self.seconds += time.perf_counter() - self._start


class Throughput(Callback):
    """Logs images per second over all processes, validation excluded, with the rate, the wait and the gradient norm.

    Only as often as the trainer logs: a number that is logged is copied to the device, which is waited for.

    Attributes:
        clock: the profiler that the trainer must have for `data_wait`; that of the user may take its place.
    """

    def __init__(self) -> None:
        self.seconds, self.images, self.clock = 0.0, 0, FetchClock()
        self._waited, self._fetched = 0.0, 0.0  # of `seconds`; of the clock, when the current step began
        self._start, self._window = 0.0, (0.0, 0, 0.0)
        self._rate, self._warm = 0.0, False
        self.grad_norm: Tensor | None = None  # of the last step that was logged, before clipping

    @property
    def images_per_second(self) -> float:
        """Mean since the first batch after the first (which warms up kernels and workers)."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def total(self) -> tuple[float, int, float]:
        """Seconds, images, and those of the seconds in which the next batch was waited for."""
        return self.seconds, self.images, self._waited

    @property
    def measured(self) -> bool:
        """Whether the waiting is: a profiler of the user's takes the place of the clock."""
        return self.clock.seconds > 0

    @property
    def data_wait(self) -> float | None:
        """The share of all that time; None where it is not measured."""
        return self._waited / self.seconds if self.seconds and self.measured else None

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._restart()  # a run resumed within an epoch starts none
        reset_peak_memory(task.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._rate = trainer.optimizers[0].param_groups[-1]["lr"]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
            self.grad_norm = total_norm(gradients) if gradients else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._warm:
            self.seconds += now - self._start
            readers = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
            self.images += len(batch.images) * readers
            self._waited += self.clock.seconds - self._fetched
        self._start, self._fetched, self._warm = now, self.clock.seconds, True
        if trainer.global_step % trainer.log_every_n_steps:
            return
        task.log("lr", self._rate)
        if self.grad_norm is not None:
            task.log("grad_norm", self.grad_norm)
        if self.seconds > self._window[0]:
            seconds, images, waited = self._window
            rate = (self.images - images) / (self.seconds - seconds)
            task.log("images_per_second", rate, rank_zero_only=True)
            if self.measured:
                task.log("data_wait", (self._waited - waited) / (self.seconds - seconds), rank_zero_only=True)
            task.log("peak_memory", float(peak_memory(task.device)), rank_zero_only=True)
            self._window = self.total

    def _restart(self) -> None:
        self._start, self._fetched = time.perf_counter(), self.clock.seconds


def reset_peak_memory(device: torch.device) -> None:
    """Begins to measure anew, so that the runs of a sweep, one process, do not show each other's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return _peak_resident()


def _peak_resident() -> int:
    """The same where there is no /proc; 0 where it is not known."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
