"""Fully sharded data parallelism: every process keeps a share of weights, averages and optimizer (FSDP2).

Blocks are gathered when they are computed. Gradients are those of data parallelism, so that a run equals one of a
single process but for the order of sums. Under `bf16-mixed` weights are gathered in bf16, gradients summed and weights
kept in 32 bits; autocast computes as it does everywhere else, but for weights outside of products (norms, biases,
scales), which it would take in 32 bits.

What cannot be shared is whole on each process, and its gradients are averaged: weights that are single numbers, those
of parts beside the model, and those of batch norms in `bf16-mixed`, whose statistics have 32 bits. Validation holds
the weights whole: processes may have different numbers of batches, and may not wait for each other in them.

Source: ZeRO, Rajbhandari et al., SC 2020 (arXiv 1910.02054); FSDP, Zhao et al., VLDB 2023 (arXiv 2304.11277).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from conf.errors import UserError
from models.callbacks.gradients import total_norm
from models.engines.blocks import blocks_of
from models.engines.distributed import Distributed
from models.engines.shares import save

# what tasks call besides the model itself
CALLED = ("forward_tokens", "classify_with_losses")


class FullySharded(Distributed):
    """FSDP2 by Lightning's hooks of DDP, whose wrapper is not put around the model."""

    def model_to_device(self) -> None:
        """In training the shares travel, one block after the other."""
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            super().model_to_device()

    def configure_ddp(self) -> None:
        """Shares the model, and its average where there is one."""
        module = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        mixed = self.precision_plugin.precision == "bf16-mixed"
        for model in filter(None, (module.model, getattr(module, "ema_model", None))):
            share(model, mesh, mixed)
        module.to(self.root_device)
        self._whole = [weight for weight in module.parameters() if not isinstance(weight, DTensor)]
        if self._whole:  # Lightning's clipping, and torch's below it, takes one kind only
            self.precision_plugin.clip_grad_by_norm = clip

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages what is whole, once in a step."""
        if self.lightning_module.trainer.fit_loop._should_accumulate():
            return
        for weight in self._whole:
            if weight.grad is not None:
                dist.all_reduce(weight.grad)
                weight.grad /= self.world_size

    def on_validation_start(self) -> None:
        for _, part in self._parts():
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def on_validation_end(self) -> None:
        for model, part in self._parts():
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)

    def teardown(self) -> None:
        """Shares stay where they are: Lightning would move the model to the CPU."""
        if self.lightning_module is not None:
            for _, part in self._parts():
                part.reshard()
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The shares, also in the middle of a validation."""
        for _, part in self._parts():
            part.reshard()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(filepath), storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """From whole tensors, of whatever engine they are."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shared_state(optimizer, state))

    def _parts(self) -> list[tuple[nn.Module, FSDPModule]]:
        """Every module that is gathered as a whole, and the model that it is a part of."""
        module = self.lightning_module
        models = filter(None, (module.model, getattr(module, "ema_model", None)))
        return [(model, part) for model in models for part in model.modules() if isinstance(part, FSDPModule)]


def share(model: nn.Module, mesh: DeviceMesh, mixed: bool = False) -> None:
    """Makes the weights of a model shares, in place: its blocks one by one, then the rest.

    Args:
        model: whole, the same on all processes.
        mesh: of the processes.
        mixed: gather weights in bf16.

    Raises:
        UserError: a part looks at whole weights between steps.
    """
    if any(hasattr(part, "right_inverse") and hasattr(part, "step") for part in model.modules()):
        raise UserError(
            "trainer: strategy=fsdp shares every weight, got reparam=sigma, which looks at whole ones between steps; "
            "set trainer=ddp, or leave reparam out"
        )
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if mixed else None
    norms = [part for part in model.modules() if mixed and isinstance(part, _BatchNorm)]
    options = {
        "mesh": mesh,
        "mp_policy": policy or MixedPrecisionPolicy(),
        "ignored_params": {weight for weight in model.parameters() if weight.dim() == 0}
        | {weight for norm in norms for weight in norm.parameters()},
    }
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    for name in CALLED:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def shared_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer as its weights are shared: every process takes its part of whole tensors."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    places = dict(zip(numbers, weights, strict=True))

    def part(value: Any, weight: Tensor) -> Any:
        whole = isinstance(value, Tensor) and isinstance(weight, DTensor) and value.shape == weight.shape
        if not whole:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    shared = {
        number: {name: part(value, places[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": shared}


@torch.no_grad()
def clip(optimizer: Optimizer, clip_val: float) -> None:
    """Scales the gradients so that their norm, of shares and of what is whole together, is at most `clip_val`."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    norm = total_norm([weight.grad for weight in weights])
    for weight in weights:
        weight.grad.mul_((clip_val / (norm + 1e-6)).clamp(max=1.0))
