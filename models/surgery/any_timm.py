"""Any model of timm as one of ours: it trains, is measured, frozen, adapted and saved in the same runs.

The module stays timm's, with its names, so that its files load; it is given the methods that a run asks for.
"""

import copyreg
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from conf.errors import UserError
from conf.names import nearest
from models.attention import AttentionFactory
from models.surgery.replacement import replace
from models.surgery.transplant import transplanted

NAME = "timm"
REFUSED = ("gate", "pool", "head", "reducer", "wrapper", "reparam", "initializer")
# what an option may not be, since a configuration may come from a file: other weights, or another kind of model
NOT_OPTIONS = ("pretrained", "checkpoint", "cache_dir", "features_only", "num_classes", "in_chans", "img_size")


class OfTimm:
    """What a run asks of a model, for one of timm; mixed into its class.

    Attributes:
        answer: names of its classifier, or classifiers.
        in_channels: of the images.
        unmixed: what is said of a model without a mixer of ours.
    """

    answer: tuple[str, ...]
    in_channels: int
    unmixed = "everything as timm computes it"

    def forward(self, images: Tensor, return_losses: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, num_classes); with `return_losses` also the auxiliary losses, of which there are none."""
        logits = super().forward(images)
        if not isinstance(logits, Tensor):
            raise UserError(
                f"timm: a model must give one tensor of logits, got a {type(logits).__name__} of "
                f"{type(self).__name__}; choose another model.name"
            )
        return (logits, {}) if return_losses else logits

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """timm's, where the model has it.

        Raises:
            ValueError: it has not.
        """
        if not enabled:
            return
        try:
            self.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"timm: {type(self).__name__} cannot recompute blocks, got gradient_checkpointing=true; "
                "set task.gradient_checkpointing=false"
            ) from error

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm exempts from weight decay besides biases and norms."""
        own = getattr(super(), "no_weight_decay", None)
        return set(own()) if own is not None else set()

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Its class is made when it is asked for, so that copies and pickles find it by timm's."""
        return _remade, (type(self).__mro__[2],), self.__dict__


@cache
def _mixed(timms: type[nn.Module]) -> type[nn.Module]:
    return type(timms.__name__, (OfTimm, timms), {"__module__": timms.__module__})


def _remade(timms: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(_mixed(timms))


def timm_model(
    name: str,
    attention: AttentionFactory | Sequence[AttentionFactory] | None,
    image_size: int | Sequence[int],
    num_classes: int,
    *,
    in_channels: int = 3,
    drop_path: float | None = None,
    options: Mapping[str, Any] | None = None,
    adapter: Any = None,
    **places: Any,
) -> nn.Module:
    """A model of timm with random weights.

    Args:
        name: one of `timm.list_models()`.
        attention: takes the place of its own, see `models.surgery.replacement`; None leaves it.
        image_size: pixels, one number or (height, width), for models that are made for one size.
        num_classes, in_channels: outputs, and channels of the images.
        drop_path: rate of stochastic depth; None for timm's.
        options: further keywords of `timm.create_model`.
        adapter: see `models.adapters`.
        places: choices that go with backbones of ours alone; all None.

    Raises:
        ValueError: an unknown name, or something that this model has not.
    """
    if not isinstance(name, str) or name not in timm.list_models():
        raise UserError(
            f"timm: there is no model {name!r}{nearest(str(name), timm.list_models())} set model.name to one of the "
            f"{len(timm.list_models())} names of timm.list_models()"
        )
    if chosen := [place for place in REFUSED if places.get(place) is not None]:
        raise UserError(f"timm: {', '.join(chosen)} goes with backbones of ours, got {name}; leave {chosen[0]}= out")
    model = _created(name, image_size, num_classes, in_channels, drop_path, dict(options or {}))
    model.__class__ = _mixed(type(model))
    classifier = model.pretrained_cfg.get("classifier") or ()
    model.answer = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    model.in_channels = in_channels
    if attention is not None:
        replace(model, attention)
    if adapter is not None:
        adapter(model)
    return model


def _created(
    name: str,
    image_size: int | Sequence[int],
    num_classes: int,
    in_channels: int,
    drop_path: float | None,
    options: dict[str, Any],
) -> nn.Module:
    wrong = [key for key in options if not isinstance(key, str) or key.startswith(NOT_OPTIONS)]
    if wrong:
        raise UserError(f"timm: options must be keywords of {name}'s own, got {wrong[0]}; set model.* or init=")
    sides = {"img_size": image_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    rate = {} if drop_path is None else {"drop_path_rate": drop_path}
    given = {"num_classes": num_classes, "in_chans": in_channels, **sides, **rate, **options}
    try:
        return timm.create_model(name, pretrained=False, **given)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        said = ", ".join(f"{key}={value}" for key, value in given.items())
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"timm: {name} cannot be made with {said}: {reason}; change that") from error


def fitted(state: Mapping[str, Tensor], model: nn.Module, new_head: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """A state that the model can load, from a file of timm's or of a run, and what there is to say about it.

    timm's own filter resizes tables of positions; a classifier for another number of classes starts anew, and a first
    convolution is adapted to other channels as timm does.

    Args:
        state: of timm's names.
        model: of `timm_model`.
        new_head: whether the classifier may start anew.

    Raises:
        ValueError: the weights are not the model's.
    """
    own = model.state_dict()
    if state.keys() != own.keys() or any(value.shape != own[key].shape for key, value in state.items()):
        module = sys.modules[type(model).__module__]
        filtered = getattr(module, "checkpoint_filter_fn", None)
        state = dict(filtered(dict(state), model) if filtered is not None else state)
    state, notes = dict(state), []
    starts = tuple(f"{name}." for name in model.answer)
    if anew := [key for key in own if key.startswith(starts) and _shape(state.get(key)) != own[key].shape]:
        classes = next((len(state[key]) for key in anew if key in state), "no")
        if not new_head:
            raise UserError(
                f"timm: the file must have {len(own[anew[0]])} classes, got {classes}; fine-tune it, or evaluate it on "
                f"data with {classes} classes"
            )
        notes.append(f"the head starts anew: {classes} classes in the weights, {len(own[anew[0]])} in the data")
        state |= {key: own[key] for key in anew}
        state = {key: value for key, value in state.items() if key in own or not key.startswith(starts)}
    _adapt_channels(state, own, model, notes)
    if state.keys() != own.keys() and (found := transplanted(state, model)) is not None:
        return found.weights, [*notes, str(found)]
    wrong = sorted(state.keys() ^ own.keys()) or [key for key in own if state[key].shape != own[key].shape]
    if wrong:
        raise UserError(
            f"timm: the weights must be those of {type(model).__name__}, got another {wrong[0]}; give the model.name, "
            "image_size and options that they were saved with"
        )
    return state, notes


def _shape(value: Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def _adapt_channels(state: dict[str, Tensor], own: dict[str, Tensor], model: nn.Module, notes: list[str]) -> None:
    first = model.pretrained_cfg.get("first_conv") or ()
    for name in (first,) if isinstance(first, str) else first:
        key = f"{name}.weight"
        if key in state and key in own and state[key].shape[1] == 3 != own[key].shape[1]:
            state[key] = adapt_input_conv(own[key].shape[1], state[key])
            notes.append(f"the first convolution is adapted to {own[key].shape[1]} channels")
