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
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from conf.errors import UserError
from models.callbacks.directory_io import EMA_KEY
from models.callbacks.gradients import total_norm
from models.checkpoints.format.directory import EMA, MODEL
from models.engines.blocks import blocks_of
from models.engines.distributed import Distributed
from models.engines.shares import Shares, Stored, check_outlines

# what tasks call besides the model itself
CALLED = ("forward_tokens", "classify_with_losses")


class FullySharded(Distributed):
    """FSDP2 by Lightning's hooks of DDP, whose wrapper is not put around the model."""

    _stored: Stored | None = None  # what a run goes on from
    _averaged = False

    def model_to_device(self) -> None:
        """In training the shares travel, one block after the other."""
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            super().model_to_device()

    def configure_ddp(self) -> None:
        """Shares the model, and its average where there is one."""
        module = self.lightning_module
        mesh, self._shares = init_device_mesh(self.root_device.type, (self.world_size,)), Shares()
        mixed = self.precision_plugin.precision == "bf16-mixed"
        for model in filter(None, (module.model, getattr(module, "ema_model", None))):
            share(model, mesh, mixed)
        module.to(self.root_device)
        self._whole = [weight for weight in module.parameters() if not isinstance(weight, DTensor)]
        if self._whole:  # Lightning's clipping, and torch's below it, takes one kind only
            self.precision_plugin.clip_grad_by_norm = clip
        if self._stored is not None:
            self._load_shares(self._stored)

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
        self._stored = None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The shares, also in the middle of a validation."""
        for _, part in self._parts():
            part.reshard()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self._shares.save(checkpoint, Path(filepath), storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """All but what there are shares of, which is read when they are made."""
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return super().load_checkpoint(checkpoint_path, weights_only)
        self._stored = Stored.at(checkpoint_path)
        return self._stored.state()

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """What is whole; outlines of the rest are compared, so that another model is refused here."""
        if self._stored is None:
            return super().load_model_state_dict(checkpoint, strict)
        self._averaged = EMA_KEY in checkpoint
        check_outlines(checkpoint["state_dict"], self.lightning_module.state_dict())
        whole = {name: value for name, value in checkpoint["state_dict"].items() if not value.is_meta}
        self.lightning_module.load_state_dict(whole, strict=False)
        if self._averaged:
            checkpoint[EMA_KEY] = {}

    def _load_shares(self, stored: Stored) -> None:
        module = self.lightning_module
        self._shares.load_model(module.model, stored, MODEL)
        average = getattr(module, "ema_model", None)
        if average is not None and self._averaged:
            self._shares.load_model(average, stored, EMA)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """From tensors of whatever engine they are."""
        for place, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            self._shares.load_optimizer(optimizer, state, f"optimizer_states.{place}", self._stored)

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


@torch.no_grad()
def clip(optimizer: Optimizer, clip_val: float) -> None:
    """Scales the gradients so that their norm, of shares and of what is whole together, is at most `clip_val`."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    norm = total_norm([weight.grad for weight in weights])
    for weight in weights:
        weight.grad.mul_((clip_val / (norm + 1e-6)).clamp(max=1.0))
