"""A finished model from its weights alone, where they carry or have beside them the configuration that makes it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from conf.errors import UserError
from models.checkpoints.format.config import check_stored
from models.checkpoints.format.directory import read_config
from models.checkpoints.packed import config_of
from models.checkpoints.weights import load_weights
from models.checkpoints.within import built_within

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    from torch import nn


def create_from(path: str | os.PathLike, ema: bool = False) -> nn.Module:
    """The model that a run trained, with its weights, in evaluation mode on the CPU.

    Args:
        path: a run, a checkpoint of it, or what `python -m models.export` wrote as `safetensors` or `hf`: a file, a
            folder, or that folder on the hub (`hf-hub:<owner>/<name>`).
        ema: the averaged weights of a checkpoint.

    Raises:
        ValueError: there is nothing, it has no configuration of ours, or that names what is not ours.
    """
    from omegaconf import OmegaConf

    from models.factory import instantiate

    config = config_of(path)
    if config is None:
        config = _of_run(path)
    check_stored(config)
    weights = load_weights(path, ema)  # first: a head that claims more than its file holds allows no larger model
    model = built_within(path, lambda: instantiate(OmegaConf.create(config["model"])))
    model.load_state_dict(weights)
    return model.eval()


def _of_run(path: str | os.PathLike) -> dict:
    if os.path.isfile(path) and os.path.basename(path) not in ("best", "last"):
        raise UserError(
            f"create_from: these weights carry no configuration, got {path}; give create_model(name) and load_weights"
        )
    return read_config(path)
