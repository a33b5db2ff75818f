"""Watches a model while it learns: what attention does with a few images, and where gradients go.

After the first optimizer step and every `every_n_steps` it logs, for each place of the model by its path,
    watch/gradient/<path>     the norm of the gradient of every block, and of stem and head, before clipping
    watch/entropy/<path>      and the other figures of `models.attention.figures`, of those mixers that have them
    watch/routes_changed/<path>   the share of routes that were none at the look before
to all loggers, for the same images of validation at each look, evenly spread over them. A look is a forward pass in
evaluation mode: weights, statistics and random numbers of the run stay what they would be without it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from conf.values import whole
from models.attention.figures import changed, figures_of
from models.attention.parts import places
from models.side_outputs import attempt


class Watch(Callback):
    """See the module's docstring; what it cost is said at the end.

    Args:
        every_n_steps: optimizer steps between looks.
        images: that are looked at.
    """

    def __init__(self, every_n_steps: int = 100, images: int = 4) -> None:
        self.every_n_steps = whole("Watch", "every_n_steps", every_n_steps, fix="set callbacks.watch.every_n_steps=100")
        self.images = whole("Watch", "images", images, fix="set callbacks.watch.images=4")
        self._inputs: tuple[Tensor, ...] = ()
        self._norms: dict[str, Tensor] = {}
        self._routes: dict[str, Tensor] = {}
        self._seen_step, self._begun, self._looks, self._seconds = 0, 0.0, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, model = trainer.datamodule, pl_module.model
        with _untouched(model, pl_module.device):
            batch = data.evaluated(data.spread(self.images))
            self._inputs = pl_module.inputs(pl_module.transfer_batch_to_device(batch, pl_module.device, 0))
        paths = list(places(model, 2))
        finest = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
        self._parts = {path: list(model.get_submodule(path).parameters()) for path in finest}
        self._routes, self._seen_step = {}, trainer.global_step
        self._begun, self._looks, self._seconds = time.perf_counter(), 0, 0.0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._due(trainer.global_step + 1):
            start = time.perf_counter()
            gradients = {path: [p.grad for p in own if p.grad is not None] for path, own in self._parts.items()}
            self._norms = {path: torch.nn.utils.get_total_norm(own) for path, own in gradients.items() if own}
            self._seconds += time.perf_counter() - start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step or not self._due(step):
            return
        start, self._seen_step = time.perf_counter(), step
        figures = self._look(trainer, pl_module)
        figures |= {f"watch/gradient/{path}": float(norm) for path, norm in self._norms.items()}
        for logger in trainer.loggers:  # as Lightning counts the step that has just been taken
            attempt("watch", logger.log_metrics, figures | {"epoch": trainer.current_epoch}, step=step - 1)
        self._looks, self._seconds = self._looks + 1, self._seconds + time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._looks and trainer.is_global_zero:
            share = self._seconds / (time.perf_counter() - self._begun)
            each = 1e3 * self._seconds / self._looks
            print(f"watch: {self._looks} looks of {each:.0f} ms, {share:.2%} of the time of training", flush=True)

    def _due(self, step: int) -> bool:
        return step == 1 or step % self.every_n_steps == 0

    def _look(self, trainer: pl.Trainer, task: pl.LightningModule) -> dict[str, float]:
        with _untouched(task.model, task.device, task.compiled), trainer.precision_plugin.forward_context():
            found, routes = figures_of(task.model, *self._inputs)
        for name, now in routes.items():
            if name in self._routes:
                found[name]["routes_changed"] = changed(self._routes[name], now)
        self._routes = routes
        return {f"watch/{key}/{name}": value for name, own in found.items() for key, value in own.items()}


@contextmanager
def _untouched(model: nn.Module, device: torch.device, compiled: bool = False) -> Iterator[None]:
    """Evaluation mode, and nothing compiled; afterwards modes and random numbers are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with torch.random.fork_rng(devices), eager:
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
