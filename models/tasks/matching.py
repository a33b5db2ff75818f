"""Matching: a model whose attention was replaced learns to do what the original one, which is not trained, did.

With p, q the rows of attention of the original and of the model, o', o what their mixers give and y', y what the models
predict, each term is a mean over layers, tokens and images, and its weight one of the settings:

    rows: KL(p ‖ q), the mean over heads too     outputs: (o − o')²     prediction: (y − y')²     own: the task's loss

Source: rows with the tokens of the original, by which features of linear attention come to mimic those of softmax: The
Hedgehog & the Porcupine, Zhang et al., ICLR 2024, arXiv:2402.04347; the cross-entropy there differs from KL by the
entropy of p: one gradient, and KL says how far apart they are. Outputs and prediction, each model with its own tokens,
besides the loss of the task: CLEAR, Liu et al., NeurIPS 2025, arXiv:2412.16112; distill.py of Huage001/CLEAR at commit
98e9fed weights them 1/2, 1/2 and 1, and compares the heads of every fourth layer, here the outputs of all.
Shapes: B = batch, N = tokens, C = channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from conf.errors import UserError
from conf.values import is_number
from models.checkpoints import create_from
from models.checkpoints.fitting import classes_of
from models.tasks.layers_apart import check_layers, check_places, followed, layers_apart
from models.tasks.teacher import finished

TERMS = ("rows", "outputs", "prediction")
TOKENS = ("original", "own")
IN_PIECES = ("FullySharded", "SequenceParallel")
Predict = Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]]


class Matched(NamedTuple):
    """Prediction and auxiliary losses of the model, None and {} where nothing asks for them; the terms, scalars."""

    prediction: Tensor | None
    losses: dict[str, Tensor]
    terms: dict[str, Tensor]


class Matching:
    """The terms of a training step. It is no module: the original is in no checkpoint and no optimizer.

    Args:
        original: the folder of its run or a checkpoint, or with `model` a file of weights.
        model: its name for `create_model`, where the file does not say what it is of.
        rows, outputs, prediction: weights of the terms; 0 leaves one out.
        own: weight of the task's own loss.
        tokens: whose tokens a layer is given where rows and outputs are compared: those that the layer of the original
            had ("original"; then the layers learn one by one), or its own model's ("own").

    Raises:
        ValueError: a setting out of range, or nothing to match.
    """

    def __init__(
        self,
        original: Any,
        *,
        model: Any = None,
        rows: Any = 0.0,
        outputs: Any = 0.0,
        prediction: Any = 0.0,
        own: Any = 1.0,
        tokens: Any = "original",
    ) -> None:
        self.weights = dict(zip(TERMS, (rows, outputs, prediction), strict=True))
        _check(original, tokens, own, self.weights)
        self.path, self.name, self.own, self.tokens = original, model, own, tokens
        self.original: nn.Module | None = None

    @property
    def layers_alone(self) -> bool:
        """Whether the model itself need not predict anything."""
        return self.tokens == "original" and self.own == 0 and self.weights["prediction"] == 0

    def prepare(self, model: nn.Module, data: pl.LightningDataModule, num_classes: int) -> None:
        """Reads the original, once, with no random number of the run's, and compares it with the model.

        Raises:
            ValueError: it cannot be read, is another backbone, or a term has no meaning for these mechanisms.
        """
        if self.original is not None:
            return
        found = self._read(data, num_classes)
        check_places(found, model)
        classes = [classes_of(net.state_dict()) for net in (found, model)]
        if self.weights["prediction"] and classes[0] != classes[1]:
            raise UserError(
                f"task: match.prediction needs the same classes, got {classes[0]} in the original and {classes[1]}; "
                "set task.match.prediction=0"
            )
        check_layers(found, model, rows=self.weights["rows"] > 0, alone=self.tokens == "original")
        self.original = found.eval().requires_grad_(False)

    def spread(self, strategy: Any) -> None:
        """Tells DDP that layers which are called one by one leave parameters without gradients.

        Raises:
            ValueError: the model is in pieces, which such calls do not put together.
        """
        if (kind := type(strategy).__name__) in IN_PIECES:
            raise UserError(f"task: match needs whole layers in every process, got {kind}; set trainer.strategy=ddp")
        if isinstance(strategy, DDPStrategy):
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def __call__(self, model: nn.Module, predict: Predict) -> Matched:
        """Of one batch; `predict` calls a model with it, and gives what it predicts and its auxiliary losses."""
        self._follow(model)
        with torch.no_grad(), followed(self.original) as theirs:
            said, _ = predict(self.original)
        with followed(model) as seen:
            prediction, losses = (None, {}) if self.layers_alone else predict(model)
        own = seen if self.tokens == "own" else None
        terms = {}
        for term in TERMS[:2]:
            if self.weights[term]:
                apart = layers_apart(term, self.original, model, theirs, own)
                terms[term] = torch.stack(list(apart.values())).mean()
        if self.weights["prediction"]:
            terms["prediction"] = F.mse_loss(prediction.float(), said.float())
        return Matched(prediction, losses, terms)

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return sum(self.weights[name] * value for name, value in terms.items())

    def _read(self, data: pl.LightningDataModule, num_classes: int) -> nn.Module:
        try:
            with torch.random.fork_rng(devices=[]):
                if self.name is None:
                    return create_from(self.path)
                return finished(self.name, self.path, data, num_classes if self.weights["prediction"] else None)
        except (ValueError, OSError, RuntimeError) as error:
            text = " ".join(str(error).split())
            fix = "give a run or a checkpoint of it, or the name of the model in task.match.model"
            raise UserError(f"task: match.original={self.path} cannot be read: {text}; {fix}") from error

    def _follow(self, model: nn.Module) -> None:
        """The original goes where the model is."""
        ours, theirs = next(model.parameters()), next(self.original.parameters())
        if (ours.device, ours.dtype) != (theirs.device, theirs.dtype):
            self.original.to(ours)


def matching_of(settings: Any, compiled: bool) -> Matching | None:
    """That of a task; None without.

    Raises:
        ValueError: an unknown or missing setting, or a compiled model, whose layers cannot be followed.
    """
    if settings is None:
        return None
    known = ("original", "model", "tokens", "own", *TERMS)
    if not isinstance(settings, dict) or "original" not in settings or settings.keys() - set(known):
        raise UserError(
            f"task: match must be a dict with original, and may have {', '.join(known[1:])}, got {settings!r}; "
            "set task.match"
        )
    if compiled:
        raise UserError("task: match follows single layers, got task.compile=true; set task.compile=false")
    return Matching(**settings)


def _check(original: Any, tokens: Any, own: Any, weights: dict[str, Any]) -> None:
    if original is None:
        raise UserError(
            "task: match needs the original, got task.match.original=null; give what was converted, e.g. by init=..."
        )
    if tokens not in TOKENS:
        raise UserError(f"task: match.tokens must be {' or '.join(TOKENS)}, got {tokens!r}; set task.match.tokens")
    for name, value in (*weights.items(), ("own", own)):
        if not is_number(value, 0):
            raise UserError(f"task: match.{name} must be a number of at least 0, got {value!r}; set task.match.{name}")
    if not any(weights.values()):
        raise UserError("task: match has nothing to match, got rows, outputs and prediction 0; set task.match.rows=1")
