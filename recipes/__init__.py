"""Recipes: one YAML file per published result, offered to Hydra as `recipe=<path below recipes/>`.

A recipe names its building blocks from conf/, sets every number in which the paper differs from their defaults, and
states under `target` the result that it must give.
"""

from collections.abc import Iterable
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parent
_read: set[str] = set()  # stored with their content


def names() -> list[str]:
    """Every recipe as written on the command line, e.g. `biformer/tiny_in1k`."""
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))


def load(name: str) -> DictConfig:
    """One recipe as it is written, not composed."""
    return OmegaConf.load(ROOT / f"{name}.yaml")


def register(arguments: Iterable[str] | None = None) -> None:
    """Make every recipe an option of the group `recipe`, from any directory; call before composing.

    With the arguments of a command line only what they name is read. The others are options without content: Hydra
    copies all of it again and again, which would cost seconds.
    """
    wanted = None if arguments is None else " ".join(a for a in arguments if a.startswith(("recipe=", "+recipe=")))
    for name in names():
        if wanted is None or name in wanted or "(" in wanted:
            _store(name, load(name))
            _read.add(name)
        elif name not in _read:
            _store(name, OmegaConf.create())


def _store(name: str, node: DictConfig) -> None:
    group, _, variant = f"recipe/{name}".rpartition("/")
    ConfigStore.instance().store(variant, node, group=group, package="_global_", provider=f"recipes/{name}.yaml")
