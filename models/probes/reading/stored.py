"""Models beside the one that is looked at: of another checkpoint of ours, or as the training of a run began."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn

from conf.errors import UserError
from data.order.randomness import preserved
from models.checkpoints import built_within, check_stored, load_weights, read_config, resolve
from models.checkpoints.format.directory import EMA
from models.checkpoints.format.parts import has
from models.factory import build_model


class Stored(NamedTuple):
    """A model in evaluation mode, and the configuration of its run."""

    model: nn.Module
    config: dict[str, Any]


def stored(path: str | Path, averaged: bool = False) -> Stored:
    """The model of a checkpoint of ours.

    Args:
        path: the folder of a run, or one of its checkpoints.
        averaged: with the averaged weights, where the checkpoint has them.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        place = resolve(path)
        config = read_config(place)
        check_stored(config)
        weights = load_weights(place, averaged and has(place, EMA))
        model = built_within(place, lambda: _built(config))
        model.load_state_dict(weights)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"probe: {path} cannot be read: {error}; give a checkpoint of a run") from error
    return Stored(model.eval(), config)


def initial(config: dict[str, Any]) -> nn.Module:
    """The model with the weights that a run with this configuration, and without `init`, began with.

    As in a run the model is the first thing that draws from the seed.
    """
    check_stored(config)
    with preserved():
        torch.default_generator.manual_seed(config["seed"])
        return _built(config)


def _built(config: dict[str, Any]) -> nn.Module:
    return build_model(OmegaConf.create({"model": config["model"]}))
