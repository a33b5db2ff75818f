"""Data parallelism: every process has the whole model, gradients are averaged (DDP).

Lightning's strategy, with what it lacks: gradients that travel compressed on any device, and a meeting of the
processes that outlives a restart by torchrun (`models.engines.meeting`).

Source: PyTorch Distributed, Li et al., VLDB 2020 (arXiv 2006.15704); PowerSGD, Vogels et al., NeurIPS 2019
(arXiv 1905.13727).
"""

import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from conf.stops import leave
from models.engines.launcher import Launcher
from models.engines.meeting import meet, watch_store
from models.engines.watch import TICK, Failure, Watch

HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}


class Distributed(DDPStrategy):
    """DDP.

    Args:
        timeout: seconds that processes wait for each other.
        compression: what gradients travel as: `fp16`, `bf16`, `powersgd`; None for their own precision.
        options: of `torch.nn.parallel.DistributedDataParallel`.
    """

    def __init__(self, timeout: float, compression: str | None = None, **options: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout), **options)
        self.compression = compression
        self.watch: Watch | None = None
        self.folder: Path | None = None  # for files of errors

    def _configure_launcher(self) -> None:
        if not self.cluster_environment.creates_processes_externally:
            arguments = (self.cluster_environment, self.num_processes, self.num_nodes)
            self._launcher = Launcher(self._child_failed, *arguments)

    def setup_distributed(self) -> None:
        """Meets the other processes."""
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        device = None if self.root_device.type == "cpu" else self.root_device
        meet(self.cluster_environment, self._process_group_backend, self._timeout, device)
        store = watch_store()
        if store is not None:
            self.watch = Watch(store, self.global_rank, self.world_size, self._step, self.folder)
            self.watch.start()

    def wait_for_the_others(self) -> None:
        """After a failure: until they have read of it and ended; those that do not are ended."""
        if isinstance(self.launcher, Launcher):
            self.launcher.end()
        else:
            time.sleep(3 * TICK)  # whoever started them does it

    def _step(self) -> int:
        module = self.lightning_module
        return -1 if module is None or module._trainer is None else module._trainer.global_step

    def _child_failed(self, number: int, status: int, how: str) -> None:
        """What the launcher has seen; before the processes have met, nothing waits for anybody but process 0."""
        rank, host, step = self.node_rank * self.num_processes + number, socket.gethostname(), -1
        if self.watch is not None:
            _, step = self.watch.place(rank)
        failure = Failure(rank, host, how, step, max(status, 1))
        if self.watch is not None:
            return self.watch.fail(failure)
        self.launcher.end(patience=0)
        leave(f"{failure.told(self.world_size)}, before all had met", failure.status, sys.__stderr__)

    def end_alone(self) -> None:
        """This process ends before it has met the others; those that it has started would wait for it."""
        if self.watch is None and isinstance(self.launcher, Launcher):
            self.launcher.end(patience=0)

    def _register_ddp_hooks(self) -> None:
        """Lightning registers its hooks on CUDA alone."""
        assert isinstance(self.model, DistributedDataParallel)
        if self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=100)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.compression is not None:
            self.model.register_comm_hook(None, HOOKS[self.compression])
