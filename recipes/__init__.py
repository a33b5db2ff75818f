"""Recipes: one YAML file per published result, offered to Hydra as `recipe=<path below recipes/>`.

A recipe names its building blocks from conf/, sets every number in which the paper differs from their defaults, and
states under `target` the result that it must give.
"""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parent


def names() -> list[str]:
    """Every recipe as written on the command line, e.g. `biformer/tiny_in1k`."""
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))


def load(name: str) -> DictConfig:
    """One recipe as it is written, not composed."""
    return OmegaConf.load(ROOT / f"{name}.yaml")


def register() -> None:
    """Make every recipe an option of the group `recipe`, from any directory; call before composing."""
    for name in names():
        group, _, variant = f"recipe/{name}".rpartition("/")
        ConfigStore.instance().store(
            variant, load(name), group=group, package="_global_", provider=f"recipes/{name}.yaml"
        )
