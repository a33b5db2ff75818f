"""Recipes: one YAML file per published result, offered to Hydra as `recipe=<path below recipes/>`.

A recipe names its building blocks from conf/, sets every number in which the paper differs from their defaults, and
states under `target` the result that it must give. What several recipes share stands in `_bases/`, from which they
take it in their defaults list.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[1] / "recipes"
_read: set[str] = set()  # stored with their content


def names() -> list[str]:
    """Every recipe as written on the command line, e.g. `biformer/tiny_in1k`."""
    return sorted(name for name in _files() if not _is_base(name))


def load(name: str) -> DictConfig:
    """One recipe as it is written, not composed."""
    return OmegaConf.load(ROOT / f"{name}.yaml")


def register(arguments: Iterable[str] | None = None) -> None:
    """Make every recipe an option of the group `recipe`, from any directory; call before composing.

    With the arguments of a command line only what they name is read, and once the bases. The others are options
    without content: Hydra copies all of it again and again, which would cost seconds.
    """
    wanted = None if arguments is None else " ".join(a for a in arguments if a.startswith(("recipe=", "+recipe=")))
    for name in _files():
        if wanted is None or name in wanted or "(" in wanted or (wanted and _is_base(name) and name not in _read):
            _store(name, load(name))
            _read.add(name)
        elif name not in _read:
            _store(name, OmegaConf.create())


def _files() -> Iterator[str]:
    return (path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))


def _is_base(name: str) -> bool:
    return name.startswith("_")


def _store(name: str, node: DictConfig) -> None:
    group, _, variant = f"recipe/{name}".rpartition("/")
    ConfigStore.instance().store(variant, node, group=group, package="_global_", provider=f"recipes/{name}.yaml")
