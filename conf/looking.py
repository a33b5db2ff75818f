"""Options of probes: of the kind that their file gives, and those that several probes share. Torch-free."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from conf import values
from conf.errors import UserError
from conf.names import CONF

SEVERAL_KINDS = ("layers", "heads", "target", "batch")  # a number, a word or a list

Point = tuple[float, float]


def check(given: Mapping[str, Any]) -> None:
    """Refuses a value of another kind than the one in conf/probe: text for a number, a number for true or false.

    Args:
        given: the options of a probe, with its `_target_`.

    Raises:
        UserError: naming the first.
    """
    name = str(given.get("_target_", "")).rpartition(".")[2]
    path = CONF / "probe" / f"{name}.yaml"
    for option, usual in (OmegaConf.load(path) if path.exists() else {}).items():
        if option.startswith("_") or option in SEVERAL_KINDS or option not in given:
            continue
        value, fix = given[option], f"set probe.{option}={str(usual).lower() if usual is not None else 'null'}"
        if isinstance(usual, bool):
            values.flag(name, option, value, fix=fix)
        elif isinstance(usual, int):
            values.whole(name, option, value, int(option == "images"), fix=fix)
        elif isinstance(usual, float):
            values.number(name, option, value, fix=fix)
    point(given.get("point"))


def point(value: Any) -> Point | None:
    """A place in an image as fractions from its left and from its top, or None.

    Raises:
        UserError: it is none, or outside.
    """
    if value is None:
        return None
    given = list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    if len(given) != 2 or not all(values.is_number(each, 0, 1) for each in given):
        raise UserError(
            f"probe: point must be two fractions from 0 to 1, from the left and from the top, got {value}; "
            "set e.g. 'probe.point=[0.5,0.4]', or null"
        )
    return float(given[0]), float(given[1])
