"""Checks a configuration that came out of a file before anything in it is instantiated.

Hydra's own block list is no security boundary, and `torch.load` or `numpy.load` are reachable through it. Here the rule
is the other way round: a `_target_` may only name this project's own packages, and nothing may be interpolated.
"""

import importlib
import re
from typing import Any

from conf.errors import UserError

MAX_DEPTH = 64
# Keys of Hydra that a configuration of ours uses: factories of attention, and plain lists and dicts as arguments.
_HARMLESS = {"_partial_": (True, False), "_convert_": ("all", "partial", "none")}
# What models and data are made of. Other modules of ours delete directories, start runs or reach for the network.
_ROOMS = "backbones|attention|layers|gates|pools|heads|reducers|reparam|initializers|adapters|surgery"
_TARGET = re.compile(rf"(models\.({_ROOMS})|data\.(module|sources))(\.[A-Za-z][A-Za-z0-9_]*)+")


def check_config(config: Any, path: str = "config", depth: int = 0, *, importing: bool = True) -> None:
    """Refuses a configuration with a foreign `_target_`, an interpolation, or a key that changes how Hydra builds.

    Args:
        config, path, depth: what is checked, where it stands, and how deep.
        importing: look at what is named too; without it, at the names alone, which takes no time. Nothing may be
            built before both.

    Raises:
        ValueError: with the path of the first offending key.
    """
    if depth > MAX_DEPTH:
        raise UserError(f"{path}: nested deeper than {MAX_DEPTH} levels; this is not a configuration of ours")
    if isinstance(config, dict):
        for key, value in config.items():
            if type(key) not in (str, int):
                raise UserError(f"{path}: keys must be text, got {key!r}")
            _check_key(key, value, f"{path}.{key}", importing)
            check_config(value, f"{path}.{key}", depth + 1, importing=importing)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            check_config(value, f"{path}[{index}]", depth + 1, importing=importing)
    elif isinstance(config, str):
        if "${" in config:
            raise UserError(f"{path}: interpolations are refused in a stored configuration, got {config!r}")
    elif config is not None and type(config) not in (bool, int, float):
        raise UserError(f"{path}: must be plain data, got {type(config).__name__}")


def _check_key(key: str | int, value: Any, path: str, importing: bool) -> None:
    """The rules for one key: which keys with Hydra's underscores may stand there, and with which values."""
    if not isinstance(key, str):
        return
    if "${" in key:
        raise UserError(f"{path}: interpolations are refused in a stored configuration, got the key {key!r}")
    if key == "_target_":
        _check_target(value, path, importing)
    elif key in _HARMLESS:
        if value not in _HARMLESS[key]:
            raise UserError(f"{path}: must be one of {_HARMLESS[key]}, got {value!r}")
    elif key.startswith("_") and key.endswith("_"):
        raise UserError(f"{path}: this key is refused in a stored configuration, got {value!r}")


def _check_target(target: Any, path: str, importing: bool) -> None:
    """A target must be `<module of ours>.<name>` and defined by us: `models.x.torch.load` is torch's, not ours."""
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise UserError(f"{path}: must name something below models. or data., got {target!r}; it will not be built")
    if not importing:
        return
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}: there is no such thing in this project, got {target!r} ({error})") from error
    owner = getattr(found, "__module__", None)
    if not callable(found) or not isinstance(owner, str) or not _TARGET.fullmatch(f"{owner}.{name}"):
        raise UserError(f"{path}: must name a class or function of ours, got {target!r} of {owner}; it is not built")
