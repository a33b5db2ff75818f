"""The weights that a new run starts from: a checkpoint of ours, or a file in our names, its authors' or timm's.

Weights of a model without head gates also start the same model with gates (attention=moh), and weights of a backbone
the same one with another mechanism or other parts: what fits is loaded, and what is new is said. Raw weights are taken,
as the authors' fine-tuning does (what is below `model` in their files); averaged ones are named by their own file,
`…/checkpoints/best/ema.safetensors`. Everything else begins anew: steps, optimizer, schedule, and averages, which start
from the loaded weights.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from conf.errors import UserError
from conf.names import OWN, PLACES
from models.attention.moh import active_heads
from models.checkpoints import load_weights, settings_of
from models.checkpoints.conversion import converted
from models.checkpoints.fitting import classes_of, is_of_classes
from models.checkpoints.normalisation import KEYS, for_channels, normalisation
from models.factory import instantiate
from models.reparam import adopt, fold, is_reparametrised
from models.runs.broken import refuse_broken
from models.surgery.any_timm import NAME, OfTimm, fitted
from models.surgery.dense_to_moh import gated_weights
from models.surgery.transplant import transplanted

REPARAMETRISED = (".parametrizations.", ".spectral_normed_weight.")  # in names of weights, ours and σReparam's authors'
_OF_INPUT = ("in_channels", "class_token", "image_size")  # in which a file may differ, see `transplanted`


def check_given(config: dict[str, Any]) -> None:
    """Refuses a new run of a recipe that fine-tunes without weights.

    `fine_tunes` is the recipe of its weights, or true for any.
    """
    begins_with = config.get("fine_tunes")
    if config["init"] is not None or begins_with is None or config["model"].get("pretrained"):
        return
    if begins_with is True:
        raise UserError(
            "init: this recipe fine-tunes, got no weights; give a file, the folder of a run or a name of the hub: "
            "init=..., or fine_tunes=null to begin without"
        )
    raise UserError(
        f"init: this recipe fine-tunes, got no weights; give those of recipe={begins_with}: init=..., "
        "or fine_tunes=null to begin without"
    )


def follow_weights(cfg: DictConfig, config: dict[str, Any], checkpoint: Path | None) -> None:
    """Has images normalised as the weights of `init` know them, unless the command line says how.

    Args:
        cfg: of the run; its data get the mean and standard deviation.
        config: the same as plain data.
        checkpoint: that the run goes on from, which then decides.
    """
    data, given = config["data"], HydraConfig.get().overrides.task
    typed = any(override.lstrip("+").startswith(("data.mean=", "data.std=")) for override in given)
    if config["init"] is None or typed or not set(KEYS) <= data.keys():
        return
    found = normalisation(config["init"] if checkpoint is None else checkpoint)
    if found is not None and (fitting := for_channels(found, len(data["mean"]))) is not None:
        for key, values in zip(KEYS, fitting, strict=True):
            data[key] = cfg.data[key] = values


def _normalised(path: str, data: dict[str, Any]) -> list[str]:
    """How images are normalised, where it is known how the weights had them."""
    found = normalisation(path)
    if found is None or not set(KEYS) <= data.keys():
        return []
    used, known = (f"mean {_short(mean)}, std {_short(std)}" for mean, std in ((data["mean"], data["std"]), found))
    if [list(data[key]) for key in KEYS] == list(for_channels(found, len(data["mean"])) or ()):
        return [f"images are normalised as for these weights: {known}"]
    return [f"images are normalised with {used}; the weights had {known}"]


def _short(values: Sequence[float]) -> str:
    """One number where all are the same."""
    return f"{values[0]:.3g}" if len(set(values)) == 1 else str([round(value, 3) for value in values])


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
        notes = _started(path, model, config)
    except OSError as error:
        raise UserError(f"init: {path} cannot be read: {error.strerror or error}; give a file that can") from error
    except ValueError as error:
        text = str(error)
        raise UserError(text if text.startswith("init: ") else f"init: {text.partition(': ')[2] or text}") from error
    refuse_broken(model, f"init: the weights of {path}")
    return notes


def _started(path: str, model: nn.Module, config: dict[str, Any]) -> list[str]:
    state = load_weights(path)
    if not is_reparametrised(model) or any(mark in key for key in state for mark in REPARAMETRISED):
        return [f"starts from {path}", *_given(state, model, config), *_normalised(path, config.get("data") or {})]
    plain = deepcopy(model)
    fold(plain)
    without = dict.fromkeys(("reparam", "adapter", *OWN) & config["model"].keys())
    notes = _given(state, plain, config | {"model": config["model"] | without})
    adopt(model, plain.state_dict())
    chosen = [config["model"].get(key) for key in ("reparam", *OWN)]
    reparam = ["its weights are reparametrised"] if any(chosen) else []
    return [f"starts from {path}", *notes, *reparam, *_normalised(path, config.get("data") or {})]


def _given(state: dict[str, Tensor], model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Gives the model these weights; what there is to say about it."""
    if isinstance(model, OfTimm):
        state, notes = fitted(state, model)
        model.load_state_dict(state)
        return notes
    own, notes = model.state_dict(), []
    if (gated := gated_weights(state, model)) is not None and _fits(gated, own):
        own, notes = model.state_dict(), [f"its attention gets head gates: {active_heads(model):.2%} of heads active"]
        state = gated
    if not _fits(state, own):
        state, notes = _of_other_names(state, model, config)
        own = model.state_dict()
    if wrong := sorted(key for key in state.keys() ^ own.keys() if key in state or not is_of_classes(key)):
        if classes_of(state) is None:
            raise UserError(
                "init: the weights have no classifier, got the backbone of a detector or segmenter; "
                "give a classification checkpoint"
            )
        raise UserError(f"init: the weights must be those of the model, got others: {wrong[0]}; give the same options")
    anew = {
        key: value
        for key, value in own.items()
        if is_of_classes(key) and (key not in state or value.shape != state[key].shape)
    }
    parametrised = tuple(key.removesuffix("original") for key in anew if key.endswith(".original"))
    anew |= {key: value for key, value in own.items() if key.startswith(parametrised)}
    if anew:
        what = "head starts" if any(key.startswith("head.") for key in anew) else "table of classes starts"
        was = classes_of(state)
        notes.append(
            f"the {what} anew: {f'{was} classes' if was else 'none'} in the weights, {classes_of(own)} in the data"
        )
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
        if found := transplanted(state, model):
            return found.weights, [str(found)]
        given = {
            key: value for key, value in settings_of(config).items() if key in config["model"] and key != "attention"
        }
        usual = {key: value for key, value in given.items() if key not in PLACES}
        problem: Exception | None = None
        for settings in (usual, {key: value for key, value in usual.items() if key not in _OF_INPUT}, {}):
            try:
                found = converted(state, config["run"]["model"], **settings)
            except (ValueError, TypeError) as other:
                problem = problem or other  # of the model with its own mechanism, whose names are those of the file
                continue
            if moved := transplanted(found.weights, model):
                return moved.weights, [*_warnings(found.notes), str(moved.with_resized(found.resized))]
        raise problem or error from None


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
    if name == NAME:
        with torch.device("meta"):
            model = instantiate(config["model"])
        return fitted(content, model, new_head=num_classes is None)
    found = converted(content, name, num_classes=num_classes, **settings_of(config))
    return found.weights, _warnings(found.told())


def _warnings(notes: list[str]) -> list[str]:
    return [f"warning: {note}" for note in notes]
