"""Parts of a model that are not trained: their parameters stand still, and they compute as in evaluation.

Without an update there is no weight decay either, and an average of such weights stays what it is. In evaluation mode
running statistics do not move, and neither dropout nor drop path is drawn. Of a model with an adapter the parts in
between are trained, so that only running statistics stand still.
Frozen for the first epochs it is linear probing, then fine-tuning: Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution, Kumar et al., ICLR 2022, arXiv:2202.10054.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from conf.errors import UserError
from conf.names import nearest
from models.callbacks.directory_io import ADAPTER_KEY

ALL = "all"
ANSWER = ("pooling", "head")  # what makes logits of features, unless a model has other names for it


class Freezing(Callback):
    """Freezes modules and parameters of a model, throughout or for the first epochs of a run.

    Args:
        model: with its weights.
        names: of modules or parameters, or globs of these; `all` is everything but pool and head.
        epochs: how long; None throughout.
        adapted: the model has an adapter: running statistics stand still, and checkpoints get a file of its own.

    Raises:
        ValueError: no module or parameter has such a name, or nothing is left to train.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], epochs: int | None = None, adapted: bool = False
    ) -> None:
        self.names, self.epochs, self.adapted = names, epochs, adapted
        chosen = [part for name in names for part in _called(model, name)]
        self.modules = [part for part in chosen if isinstance(part, nn.Module)]
        frozen = {id(p): p for part in chosen for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
        self.parameters = [parameter for parameter in frozen.values() if parameter.requires_grad]
        self.averages = [module for module in _features(model) if _has_averages(module)] if adapted else []
        kept = {id(parameter) for parameter in self.parameters}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
        if not trained:
            raise UserError(
                f"freeze: something must be left to train, got {', '.join(names)}, which is the whole model; "
                "set freeze=all, which leaves the head"
            )
        self.total, self.trained = (sum(p.numel() for p in some) for some in (model.parameters(), trained))
        if epochs is None:
            self._freeze(True)

    def __str__(self) -> str:
        """What is frozen, and how much of the model is trained."""
        trained = f"{self.trained / 1e6:.2f} of {self.total / 1e6:.2f} M parameters"
        if not self.names:
            return f"the adapter trains {trained}"
        if self.epochs is None:
            return f"frozen: {', '.join(self.names)}; {trained} are trained"
        first = "epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"frozen for the first {first}: {', '.join(self.names)}; {trained} are trained, then all"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gradients of several processes are joined for all parameters, some of which have none at first."""
        if self.epochs is not None and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy._ddp_kwargs["find_unused_parameters"] = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(trainer.current_epoch)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """What an adapter trains is also a small file of its own."""
        if self.adapted:
            trained = {name for name, parameter in pl_module.model.named_parameters() if parameter.requires_grad}
            state = pl_module.model.state_dict()
            checkpoint[ADAPTER_KEY] = {name: value for name, value in state.items() if name in trained}

    def _follow(self, epoch: int) -> None:
        """The state of an epoch, counted from 0; a run that goes on asks again."""
        frozen = self.epochs is None or epoch < self.epochs
        self._freeze(frozen)
        for module in (*self.modules, *self.averages):
            module.train(not frozen and module not in self.averages)

    def _freeze(self, frozen: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)


def freezing(config: dict[str, Any], model: nn.Module) -> list[Freezing]:
    """What the configuration of a run freezes, as a callback; none for nothing.

    Raises:
        ValueError: see `Freezing`, or a value of another type.
    """
    names, epochs, adapted = config.get("freeze"), config.get("freeze_epochs"), config["model"].get("adapter")
    names = [names] if isinstance(names, str) else names
    if names is not None and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError(f"freeze: must be names of modules, got {names!r}; e.g. freeze=[stem,stages.0], or freeze=all")
    if epochs is not None and (type(epochs) is not int or epochs < 1):
        raise UserError(f"freeze_epochs: must be a whole number of at least 1, got {epochs!r}; leave it out for all")
    if epochs is not None and names is None:
        raise UserError(f"freeze_epochs: it says how long freeze= lasts, got {epochs} and no freeze; set freeze=all")
    if names is None and adapted is None:
        return []
    return [Freezing(model, names or [], epochs, adapted=adapted is not None)]


def answer_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the parts that make logits of features."""
    return getattr(model, "answer", ANSWER)


def _called(model: nn.Module, name: str) -> list[nn.Module | nn.Parameter]:
    if name == ALL:
        return [*_features(model), *_loose(model)]
    known = dict(model.named_modules()) | dict(model.named_parameters())
    found = [part for own, part in known.items() if own and fnmatchcase(own, name)]
    if not found:
        near = nearest(name, [own for own in known if own and own.count(".") == name.count(".")])
        listed = ", ".join(own for own, _ in model.named_children())
        raise UserError(
            f"freeze: nothing in the model is called {name!r}{near or ';'} it has {listed}; or set freeze=all"
        )
    return found


def _features(model: nn.Module) -> Iterator[nn.Module]:
    """Every module that is no part of pool and head, and has none of them in it."""
    answer = answer_of(model)
    for name, module in model.named_modules():
        outside = not any(f"{name}.".startswith(f"{end}.") or f"{end}.".startswith(f"{name}.") for end in answer)
        if name and outside:
            yield module


def _loose(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that stand beside pool and head, as the class token of a ViT of timm."""
    inside = {id(parameter) for module in _features(model) for parameter in module.parameters()}
    ends = tuple(f"{end}." for end in answer_of(model))
    yield from (p for name, p in model.named_parameters() if not name.startswith(ends) and id(p) not in inside)


def _has_averages(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or getattr(module, "averages", False)
