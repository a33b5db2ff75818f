"""Names the module in which numbers stop being finite, in the forward or in the backward pass."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from conf.errors import UserError
from models.callbacks.culprit import tensors
from models.callbacks.guard import NonFinite


class Anomaly(Callback):
    """Looks at what every module gives and at its gradient, in training; slow, since each look waits for the device."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._where = "before training"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hooks every module.

        Raises:
            UserError: the model is compiled, and then nothing but the whole of it is called.
        """
        if getattr(pl_module, "compiled", False):
            raise UserError(
                "Anomaly: a compiled model does not call its modules, got compile=true; set task.compile=false"
            )
        for name, module in pl_module.model.named_modules():
            self._hooks.append(module.register_forward_hook(self._looks(name or "the model", module)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._where = f"step {trainer.global_step}, epoch {trainer.current_epoch}"
        if not torch.isfinite(batch.images).all():
            raise NonFinite(
                f"Anomaly: the images of the batch hold NaN or infinity, got it at {self._where}; look at data"
            )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                self._raise(
                    f"the gradient of the weight {name}", "lower the rate, or clip: trainer.gradient_clip_val=1"
                )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _looks(self, name: str, module: nn.Module) -> Callable[..., None]:
        kind = type(module).__name__

        def look(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if not module.training:
                return
            for tensor in tensors(output):
                if not torch.isfinite(tensor).all():
                    largest = max((float(t.detach().abs().max()) for t in tensors(given) if t.numel()), default=0.0)
                    self._raise(
                        f"the output of {name} ({kind}), whose input reaches {largest:.3g},", "look there first"
                    )
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._look_back(name, kind, gradient))

        return look

    def _look_back(self, name: str, kind: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            self._raise(f"the gradient of the output of {name} ({kind})", "look at what follows it")

    def _raise(self, what: str, fix: str) -> None:
        raise NonFinite(f"Anomaly: {what} holds NaN or infinity, got it at {self._where}; {fix}")

    def _remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
