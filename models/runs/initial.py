"""The weights that a new run starts from: a checkpoint of ours, or a file in our names, its authors' or timm's.

Weights of a model without head gates also start the same model with gates (attention=moh), and weights of a backbone
the same one with another mechanism or other parts: what fits is loaded, and what is new is said. Raw weights are taken,
as the authors' fine-tuning does (what is below `model` in their files); averaged ones are named by their own file,
`…/checkpoints/best/ema.safetensors`. Everything else begins anew: steps, optimizer, schedule, and averages, which start
from the loaded weights.
"""

import warnings
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from conf.errors import UserError
from conf.names import PLACES
from models.attention.moh import active_heads
from models.checkpoints import convert, load_weights, settings_of
from models.checkpoints.fitting import classes_of, is_of_classes
from models.reparam import adopt, fold, is_reparametrised
from models.surgery.dense_to_moh import gated_weights
from models.surgery.transplant import transplanted


def check_given(config: dict[str, Any]) -> None:
    """Refuses a new run of a recipe that fine-tunes (`fine_tunes`: the recipe of its weights) without weights."""
    if config["init"] is None and config.get("fine_tunes") is not None:
        raise UserError(
            f"init: this recipe fine-tunes, got no weights; give those of recipe={config['fine_tunes']}: init=..., "
            "or fine_tunes=null to begin without"
        )


def start_from(path: str, model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Gives the model the weights at `path`; a head for another number of classes stays as it is.

    Args:
        path: a checkpoint directory (`step-…`, `best`, `last`), or a file of weights.
        model: what `config["model"]` builds.
        config: the resolved configuration.

    Returns:
        What was done, one line each.

    Raises:
        UserError: there are no weights, or they are not the model's.
    """
    try:
        state = load_weights(path)
        if not is_reparametrised(model) or any(".parametrizations." in key for key in state):
            return [f"starts from {path}", *_given(state, model, config)]
        plain = deepcopy(model)
        fold(plain)
        notes = _given(state, plain, config | {"model": config["model"] | {"reparam": None, "adapter": None}})
        adopt(model, plain.state_dict())
        reparam = ["its weights are reparametrised"] if config["model"].get("reparam") is not None else []
        return [f"starts from {path}", *notes, *reparam]
    except OSError as error:
        raise UserError(f"init: {path} cannot be read: {error.strerror or error}; give a file that can") from error
    except ValueError as error:
        text = str(error)
        raise UserError(text if text.startswith("init: ") else f"init: {text.partition(': ')[2] or text}") from error


def _given(state: dict[str, Tensor], model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Gives the model these weights; what there is to say about it."""
    own, notes = model.state_dict(), []
    if (gated := gated_weights(state, model)) is not None and _fits(gated, own):
        own, notes = model.state_dict(), [f"its attention gets head gates: {active_heads(model):.2%} of heads active"]
        state = gated
    if not _fits(state, own):
        state, notes = _of_other_names(state, model, config)
        own = model.state_dict()
    if classes_of(state) is None:
        raise UserError(
            "init: the weights have no classifier, got the backbone of a detector or segmenter; "
            "give a classification checkpoint"
        )
    if wrong := sorted(state.keys() ^ own.keys()):
        raise UserError(f"init: the weights must be those of the model, got others: {wrong[0]}; give the same options")
    anew = {key: value for key, value in own.items() if is_of_classes(key) and value.shape != state[key].shape}
    parametrised = tuple(key.removesuffix("original") for key in anew if key.endswith(".original"))
    anew |= {key: value for key, value in own.items() if key.startswith(parametrised)}
    if anew:
        what = "head starts" if any(key.startswith("head.") for key in anew) else "table of classes starts"
        notes.append(f"the {what} anew: {classes_of(state)} classes in the weights, {classes_of(own)} in the data")
    try:
        model.load_state_dict(state | anew)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UserError(f"init: the weights must be those of the model, got {text}; give the same options") from error
    return notes


def _of_other_names(
    state: dict[str, Tensor], model: nn.Module, config: dict[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights in the names of their authors or of timm, or of the same backbone with another mechanism or other parts.

    Raises:
        ValueError: they are not the model's; where they are no other's either, the first problem that was found.
    """
    try:
        return in_our_names(state, config)
    except ValueError as error:
        settings = settings_of(config).items()
        usual = {key: value for key, value in settings if key in config["model"] and key not in PLACES}
        found = transplanted(state, model)
        if found is None:
            try:
                found = transplanted(convert(state, config["run"]["model"], num_classes=None, **usual), model)
            except (ValueError, TypeError):
                found = None
        if found is None:
            raise error
        return found.weights, [str(found)]


def _fits(state: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Whether weights have our names and shapes already, but for the number of classes."""
    same = state.keys() == own.keys()
    return same and all(is_of_classes(key) or state[key].shape == own[key].shape for key in own)


def in_our_names(
    content: dict[str, Tensor], config: dict[str, Any], num_classes: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights for the model of a configuration, and the warnings of their conversion.

    Args:
        content: in our names, its authors' or timm's.
        config: resolved; of it `model`, `attention` and `run` are looked at.
        num_classes: refuse a head for any other number.

    Raises:
        ValueError: they are not the model's.
    """
    name = config["run"]["model"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        state = convert(content, name, num_classes=num_classes, **settings_of(config))
    return state, [f"warning: {warning.message}" for warning in caught]
