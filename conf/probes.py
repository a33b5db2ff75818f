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
    parameters = _parameters(function)
    return tuple(parameter.arg for parameter in parameters.posonlyargs + parameters.args if parameter.arg in GIVEN)


def needs(function: str) -> tuple[str, ...]:
    """Those that it cannot do without: which have no default."""
    parameters = _parameters(function)
    names = [parameter.arg for parameter in parameters.posonlyargs + parameters.args]
    return tuple(name for name in names[: len(names) - len(parameters.defaults)] if name in GIVEN)


@cache
def _parameters(function: str) -> ast.arguments:
    module, _, name = function.rpartition(".")
    tree = ast.parse(Path(CONF.parent, *module.split(".")).with_suffix(".py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name).args
