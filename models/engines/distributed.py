"""Data parallelism: every process has the whole model, gradients are averaged (DDP).

Lightning's strategy, with what it lacks: gradients that travel compressed on any device, and a meeting of the
processes that outlives a restart by torchrun (`models.engines.meeting`).

Source: PyTorch Distributed, Li et al., VLDB 2020 (arXiv 2006.15704); PowerSGD, Vogels et al., NeurIPS 2019
(arXiv 1905.13727).
"""

from datetime import timedelta
from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from models.engines.meeting import meet

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

    def setup_distributed(self) -> None:
        """Meets the other processes."""
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        device = None if self.root_device.type == "cpu" else self.root_device
        meet(self.cluster_environment, self._process_group_backend, self._timeout, device)

    def _register_ddp_hooks(self) -> None:
        """Lightning registers its hooks on CUDA alone."""
        assert isinstance(self.model, DistributedDataParallel)
        if self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=100)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.compression is not None:
            self.model.register_comm_hook(None, HOOKS[self.compression])
