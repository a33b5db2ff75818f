"""Several evaluations in one command: of each checkpoint, at each size, with each value of a setting that has many.

`ckpt=a,b`, `ckpt=[a,b]` and `ckpt='outputs/sweep/*'`; `image_size=192,224` and `image_size=[192,224]`, which are two
squares (a rectangle of height 192 and width 224 is `image_size=[[192,224]]`); and any other setting, such as
`data.eval.interpolation=bicubic,nearest`. `-m` changes nothing.
"""

import os
from glob import glob
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from conf import text

MULTIRUN = ("-m", "--multirun")


def cases(arguments: list[str]) -> list[list[str]]:
    """The arguments of every evaluation that a command asks for, the last ones varying first."""
    kept = [argument for argument in arguments if argument not in MULTIRUN]
    return [list(case) for case in product(*map(_alternatives, kept))]


def differing(alternatives: list[list[str]]) -> list[str]:
    """The keys whose values differ between evaluations."""
    return [values[0].partition("=")[0] for values in zip(*alternatives, strict=True) if len(set(values)) > 1]


def _alternatives(argument: str) -> list[str]:
    """The arguments that one stands for."""
    key, given, value = argument.partition("=")
    if not given or key.startswith("-"):
        return [argument]
    if key == "ckpt":
        return [text.literal([f"ckpt={path}"])[0] for path in _paths(value)]
    if key == "image_size":
        return [f"image_size={size}" for size in _sizes(value)]
    return [f"{key}={one}" for one in _swept(argument)] or [argument]


def _paths(value: str) -> list[str]:
    """One path, though it have commas in it, or several."""
    said = text.plain(value)
    if os.path.exists(said):
        return [said]
    if value.startswith("["):
        given = text.listed(value)
    else:
        given = [part for whole in text.parts(value) for part in text.parts(text.plain(whole))]
    return [path for part in given for path in (sorted(glob(part)) if "*" in part else ()) or [part]]


def _sizes(value: str) -> list[str]:
    inside = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return list(text.parts(inside))


def _swept(argument: str) -> list[str]:
    """The values of a sweep in Hydra's grammar; none where it is one value, or where Hydra has to say what is wrong."""
    try:
        override = OverridesParser.create().parse_override(argument)
        return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    except HydraException:
        return []
