"""Which settings an evaluation makes use of: any other is refused, as the user would believe that it did something."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf import probes, text
from conf.errors import UserError
from conf.inputs import images_of
from conf.names import CONF, PARTS, PLACES, choosable, nearest, options
from models.checkpoints.hub import downloaded, is_name

OF_MODEL = ("model", "attention", *PLACES, *(f"attention/{part}" for part in PARTS))
OF_WEIGHTS = ("weights", "compile", "channels_last", "backend")


def is_weights(ckpt: str) -> bool:
    """Whether it is a file of weights, here or on the hub or in a folder from there, and no pointer to a checkpoint."""
    return (
        is_name(ckpt)
        or downloaded(ckpt) is not None
        or (Path(ckpt).is_file() and Path(ckpt).name not in ("best", "last"))
    )


def refuse_useless(arguments: Mapping[str, str], node: Mapping[str, Any], probe: str) -> None:
    """Refuses what an evaluation would take without using it.

    Args:
        arguments: of the command line, by key.
        node: what is evaluated, by key of the configuration; empty where a probe looks at neither model nor data.
        probe: its name.

    Raises:
        UserError: naming the first of them.
    """
    target = probes.target(probe)
    wanted, groups = set(probes.wants(target)), _groups(arguments, node)
    known = _keys("eval") | {*node, *groups, "hydra"}
    of_training = (_keys("train") | {*choosable()}) - known
    idle = ({"input"} - wanted) | (set() if wanted & set(probes.OF_A_MODEL) else {*OF_WEIGHTS})
    for key, value in arguments.items():
        name = key.lstrip("+~")
        top = name.partition(".")[0]
        if name == "task" and "task" not in groups:
            raise UserError(
                f"eval: there is no setting 'task={value}', as a checkpoint knows its task; to predict the classes of "
                "images give input=<image, folder, glob or list>"
            )
        if name in idle:
            raise UserError(f"eval: probe={probe} makes no use of {name}, got {name}={value}; leave it out")
        if (name in choosable() and name not in groups) or top in of_training:
            raise UserError(f"eval: {name}={value} has no effect on this evaluation; leave it out")
        if key.startswith("+") and top not in known:
            raise UserError(f"eval: there is no setting {name!r}{nearest(name, known)}")
    if "input" in wanted and ("input" in arguments or "input" in probes.needs(target)):
        if "input" not in arguments:
            raise UserError("input: no value; give one on the command line: input=<image, folder, glob or list>")
        images_of(text.listed(arguments["input"]))


def _groups(arguments: Mapping[str, str], node: Mapping[str, Any]) -> set[str]:
    """Groups of which something can be chosen here: a checkpoint has its model, a file of weights is told."""
    ckpt = arguments.get("ckpt")
    if not node or (ckpt is not None and not is_weights(ckpt)):
        return {"probe", *(("recipe", "data") if node else ())}
    found = {"probe", "recipe", "data", *OF_MODEL, *(() if ckpt else ("augment",))}
    return found | ({"task"} if arguments.get("task") in options("task") else set())


def _keys(name: str) -> set[str]:
    """At the top of a configuration, with the groups that its table of contents lists."""
    return {*OmegaConf.load(CONF / f"{name}.yaml")} - {"defaults"}
