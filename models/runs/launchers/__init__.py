"""Runs that are not computed in this process: `hydra/launcher=local` and `hydra/launcher=slurm`. Torch-free."""

import sys
from types import ModuleType
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins

from models.runs.launchers.local import SideBySide


class Slurm(BasicLauncher):
    """Hydra's own launcher, one run after the other; each is sent away where it would begin (`slurm.send`)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()


def register() -> None:
    """Makes the launchers known to Hydra, which takes them from a package `hydra_plugins` only: they get a place there.

    It has no files of ours, and may have some of installed plugins.
    """
    try:
        import hydra_plugins
    except ImportError:
        hydra_plugins = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        hydra_plugins.__path__ = []
    module = sys.modules["hydra_plugins.vision_zoo"] = ModuleType("hydra_plugins.vision_zoo")
    hydra_plugins.vision_zoo = module
    for launcher in (SideBySide, Slurm):
        launcher.__module__ = module.__name__
        setattr(module, launcher.__name__, launcher)
        Plugins.instance().register(launcher)


def sends_away() -> bool:
    """Whether the run that Hydra is about to begin becomes a job of SLURM."""
    return HydraConfig.get().runtime.choices.get("hydra/launcher") == "slurm"
