"""Recipes: one YAML file per published result, offered to Hydra as `recipe=<path below recipes/>`; and what states
no result: `finetune`, `pathfinder`.

A recipe names its building blocks from conf/, sets every number in which the paper differs from their defaults, and
states under `target` the result that it must give. What several recipes share stands in `_bases/`, from which they
take it in their defaults list.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[1] / "recipes"


def names() -> list[str]:
    """Every recipe of a published result as written on the command line, e.g. `biformer/tiny_in1k`."""
    return [name for name in offered() if "/" in name]


def offered() -> list[str]:
    """Those, and the ones that state no result."""
    found = (path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))
    return sorted(name for name in found if not name.startswith("_"))


def load(name: str) -> DictConfig:
    """One recipe as it is written, not composed."""
    return OmegaConf.load(ROOT / f"{name}.yaml")
