"""What eval.py can measure, by name, and what each measurement needs: read from its file, without importing it."""

import ast
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from conf.errors import UserError
from conf.names import CONF, nearest, options

GIVEN = ("model", "ema", "network", "data", "trainer", "subject", "input")  # see models/probes/__init__.py
OF_A_CHECKPOINT, OF_A_MODEL = ("model", "ema"), ("model", "ema", "network")


def target(name: str) -> str:
    """The function of a probe, `models.probes.accuracy.accuracy`.

    Raises:
        UserError: there is no such probe.
    """
    if name not in options("probe"):
        raise UserError(
            f"probe: there is no {name!r}{nearest(name, options('probe'))}\navailable: {', '.join(options('probe'))}"
        )
    return OmegaConf.load(CONF / "probe" / f"{name}.yaml")["_target_"]


@cache
def wants(function: str) -> tuple[str, ...]:
    """Which of `GIVEN` a probe asks for, by the names of its parameters."""
    module, _, name = function.rpartition(".")
    tree = ast.parse(Path(CONF.parent, *module.split(".")).with_suffix(".py").read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    parameters = (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)
    return tuple(parameter.arg for parameter in parameters if parameter.arg in GIVEN)
