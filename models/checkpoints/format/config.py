"""Checks a configuration that came out of a file before anything in it is instantiated.

Hydra's own block list is no security boundary, and `torch.load` or `numpy.load` are reachable through it. Here the rule
is the other way round: a `_target_` may only name what conf/ offers of this project's own packages, and nothing may be
interpolated. What makes no part of a model or its data is never built, and only has to be plain data.
"""

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.folders import escaped
from conf.names import CONF, PLACES

MAX_DEPTH = 64
MAX_NUMBER, MAX_SIZE, MAX_BATCH = 2**20, 4096, 2**16  # of what makes a model; pixels of an image; images of a batch
MAX_PARTS, MAX_FILES = 4096, 2**20  # entries of a list or a mapping of what makes a model, and of other things
SIZES = {"image_size": MAX_SIZE, "size": MAX_SIZE, "resize": MAX_SIZE, "batch_size": MAX_BATCH}  # below `data`
# the parts of a configuration that are built; all others are looked at
BUILT = ("attention", "model", "augment", "data", *PLACES)
# Keys of Hydra that a configuration of ours uses: factories of attention, and plain lists and dicts as arguments.
_HARMLESS = {"_partial_": (True, False), "_convert_": ("all", "partial", "none")}
# What models and data are made of. Other modules of ours delete directories, start runs or reach for the network.
_ROOMS = "backbones|attention|layers|gates|pools|heads|reducers|wrappers|reparam|initializers|adapters|surgery"
_TARGET = re.compile(rf"(models\.({_ROOMS})|data\.(module|sources))(\.[A-Za-z][A-Za-z0-9_]*)+")


def check_stored(config: dict[str, Any], *, importing: bool = True) -> None:
    """Looks at a whole configuration out of a file, what is never built included.

    Raises:
        ValueError: with the path of the first offending key.
    """
    if not isinstance(config, dict):
        raise UserError(f"config: must be a mapping, got {type(config).__name__}; give a checkpoint of a run")
    for key, value in config.items():
        if key in BUILT:
            check_config({key: value}, importing=importing)
        else:
            _check(value, f"config.{key}", 1, importing, built=False)
    for key in ("attention", "model", "task"):
        _check_numbers(config.get(key), f"config.{key}")
    for key in ("image_size", "data"):
        _check_sizes(config.get(key), f"config.{key}", MAX_SIZE if key == "image_size" else None)
    _check_kinds(config)


def _check_kinds(config: dict[str, Any]) -> None:
    """What is looked at before anything is built."""
    for key in ("run", "model", "data", "task", "checkpoint", "callbacks"):
        if not isinstance(config.get(key), dict | None):
            raise UserError(f"config.{key}: must be a mapping, got {config[key]!r}; give a checkpoint of a run")
    for key, value in (config.get("run") or {}).items():
        if isinstance(value, dict | list):
            raise UserError(f"config.run.{key}: must be one word, got {value!r}; give a checkpoint of a run")
    classes = config.get("classes") or []
    if not isinstance(classes, list) or len(classes) > MAX_FILES or not all(isinstance(name, str) for name in classes):
        raise UserError("config.classes: must be a list of names, got another thing; give a checkpoint of a run")


def check_local(data: dict[str, Any], given: frozenset[str] | set[str] = frozenset()) -> None:
    """Data that a stored configuration names may only lie on this machine: a stranger would learn who looks at it.

    Args:
        data: the part `data` of the configuration; what could download, or write, is switched off in it.
        given: the keys that the command line sets itself.

    Raises:
        ValueError: with the key of an address, and how to say that it is meant.
    """
    source = data.get("source")
    if not isinstance(source, dict):
        raise UserError(f"config.data.source: must be a mapping, got {source!r}; give data=...")
    for key, switched_off in (("download", False), ("cache_dir", None)):
        if key in source and f"data.source.{key}" not in given:
            source[key] = switched_off
    for key, value in source.items():
        if f"data.source.{key}" not in given and (found := _address(key, value)) is not None:
            raise UserError(
                f"config.data.source.{key}: a stored configuration may only name data of this machine, got {found!r}; "
                f"give data.source.{key}={found} if you mean it, or other data by data=..."
            )


def _address(key: str, value: Any) -> str | None:
    """What in a setting is asked for over a network."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return next((found for part in parts if (found := _address("", part)) is not None), None)
    if not isinstance(value, str):
        return None
    hub = key == "path" and value not in ("parquet", "imagefolder", "arrow") and not Path(value).expanduser().is_dir()
    return value if hub or "://" in value or "::" in value else None


def legible(node: Any) -> Any:
    """A configuration whose texts cannot steer a terminal: control characters but tabs and line ends are escaped."""
    if isinstance(node, dict):
        return {legible(key): legible(value) for key, value in node.items()}
    if isinstance(node, list):
        return [legible(part) for part in node]
    return escaped(node, keep="\t\n") if isinstance(node, str) else node


def _check_numbers(node: Any, path: str) -> None:
    """A depth, a width or a list of stages that no model has would be computed for ever, or fill the memory."""
    _check_length(node, path, MAX_PARTS)
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _check_numbers(value, f"{path}.{key}")
    elif isinstance(node, int) and abs(node) > MAX_NUMBER:
        raise UserError(f"{path}: must be at most {MAX_NUMBER} in a stored configuration, got {node}")


def _check_length(node: Any, path: str, most: int) -> None:
    if isinstance(node, dict | list) and len(node) > most:
        raise UserError(f"{path}: must have at most {most} entries in a stored configuration, got {len(node)}")


def _check_sizes(node: Any, path: str, most: int | None) -> None:
    """Images and batches that no model has would fill the memory; numbers in lists are as what holds them."""
    _check_length(node, path, MAX_FILES)
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _check_sizes(value, f"{path}.{key}", most if isinstance(node, list) else SIZES.get(key))
    elif most is not None and isinstance(node, int | float) and node > most:
        raise UserError(f"{path}: must be at most {most} in a stored configuration, got {node}")
    elif path.endswith(".crop_fraction") and isinstance(node, int | float) and not 0.05 <= node <= 1:
        raise UserError(f"{path}: must be from 0.05 to 1 in a stored configuration, got {node}")


def check_config(config: Any, path: str = "config", depth: int = 0, *, importing: bool = True) -> None:
    """Refuses a configuration with a foreign `_target_`, an interpolation, or a key that changes how Hydra builds.

    Args:
        config, path, depth: what is checked, where it stands, and how deep.
        importing: look at what is named too; without it, at the names alone, which takes no time. Nothing may be
            built before both.

    Raises:
        ValueError: with the path of the first offending key.
    """
    _check(config, path, depth, importing)


def _check(config: Any, path: str, depth: int, importing: bool, built: bool = True) -> None:
    if depth > MAX_DEPTH:
        raise UserError(f"{path}: nested deeper than {MAX_DEPTH} levels; this is not a configuration of ours")
    if isinstance(config, dict):
        for key, value in config.items():
            if type(key) not in (str, int):
                raise UserError(f"{path}: keys must be text, got {key!r}")
            _check_key(key, value, f"{path}.{key}", importing, built)
            _check(value, f"{path}.{key}", depth + 1, importing, built)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            _check(value, f"{path}[{index}]", depth + 1, importing, built)
    elif isinstance(config, str):
        if "${" in config:
            raise UserError(f"{path}: interpolations are refused in a stored configuration, got {config!r}")
    elif config is not None and type(config) not in (bool, int, float):
        raise UserError(f"{path}: must be plain data, got {type(config).__name__}")


def _check_key(key: str | int, value: Any, path: str, importing: bool, built: bool) -> None:
    """The rules for one key: which keys with Hydra's underscores may stand there, and with which values."""
    if not isinstance(key, str):
        return
    if "${" in key:
        raise UserError(f"{path}: interpolations are refused in a stored configuration, got the key {key!r}")
    if not built:
        return
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
    if target not in offered():
        raise UserError(f"{path}: must name a class or function of ours that conf/ offers, got {target!r}; {_NOT}")
    if not importing:
        return
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}: there is no such thing in this project, got {target!r} ({error})") from error
    owner = getattr(found, "__module__", None)
    if not callable(found) or not isinstance(owner, str) or not _TARGET.fullmatch(f"{owner}.{name}"):
        raise UserError(f"{path}: must name a class or function of ours, got {target!r} of {owner}; {_NOT}")


_NOT = "it is not built"


@cache
def offered() -> frozenset[str]:
    """Every `_target_` in conf/."""
    files = (path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml"))
    return frozenset(found for text in files for found in re.findall(r"_target_: *([\w.]+)", text))
