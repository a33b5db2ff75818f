"""Batch norms over the batches of all processes, on a GPU and on the CPU.

The modules stay what they are, under their names: only their class changes for the time of training, so that nobody
who holds one of them holds a stale one. PyTorch's own works on GPUs alone.

Source: the statistics of the union of all batches, Peng et al., MegDet, CVPR 2018 (arXiv 1711.07240).
Shapes: B = batch of a process, C = channels.
"""

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as OnGpu

from models.layers.processes import all_reduce


class SyncNorms(TorchSyncBatchNorm):
    """Lightning's place for `trainer.sync_batchnorm`."""

    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            module.__class__ = SYNCED.get(type(module), type(module))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        plain = {synced: kind for kind, synced in SYNCED.items()}
        for module in model.modules():
            module.__class__ = plain.get(type(module), type(module))
        return model


class _Synced:
    """A batch norm whose training looks at all processes."""

    asks_others = True  # see models.callbacks.bad_steps

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        averages = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if x.device.type == "cuda":
            world = dist.get_world_size()
            return OnGpu.apply(x, self.weight, self.bias, *averages, self.eps, momentum, dist.group.WORLD, world)
        return _synced(x, self.weight, self.bias, *averages, self.eps, momentum)


def _synced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float,
) -> Tensor:
    """x normalised by mean and variance over all processes, which may have batches of different sizes."""
    over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    values = x if x.dtype == torch.float64 else x.float()
    count = values.new_tensor([x.numel() // x.shape[1]])
    dist.all_reduce(count)
    mean_C = all_reduce(values.sum(over)) / count
    centred = values - mean_C.view(shape)
    var_C = all_reduce(centred.square().sum(over)) / count
    if running_mean is not None:
        running_mean.lerp_(mean_C.detach().to(running_mean.dtype), momentum)
        unbiased = var_C.detach() * (count / (count - 1).clamp_min(1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    scale_C = (var_C + eps).rsqrt() if weight is None else (var_C + eps).rsqrt() * weight
    y = centred * scale_C.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SYNCED = {kind: type(f"Synced{kind.__name__}", (_Synced, kind), {}) for kind in _KINDS}
