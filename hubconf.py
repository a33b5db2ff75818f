"""Every model for `torch.hub.load(repository, "biformer_tiny")`; keywords are those of `models.create_model`."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

dependencies = ["torch", "timm", "hydra", "omegaconf", "yaml", "safetensors"]
if str(Path(__file__).parent) not in sys.path:  # torch.hub takes it away again; parts of a model are imported later
    sys.path.append(str(Path(__file__).parent))


def _entry(name: str) -> Callable[..., Any]:
    from models import create_model

    entry = partial(create_model, name)
    entry.__doc__ = f"{name} with random weights; attention=, num_classes=, image_size= ...: see models.create_model."
    return entry


def _entries() -> dict[str, Callable[..., Any]]:
    from models import list_models

    return {name: _entry(name) for name in list_models()}


globals().update(_entries())
