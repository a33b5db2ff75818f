"""Configurations from names and settings, outside of a run of Hydra's own."""

from importlib.metadata import version

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict

from conf import resolvers, source
from conf.names import CONF


def compose(config_name: str, overrides: list[str], **options: bool) -> DictConfig:
    """`conf/<config_name>.yaml` with these overrides; inside a job of Hydra too, which refuses to compose then."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF), **version_base()):
            return hydra.compose(config_name, overrides, **options)
    finally:
        GlobalHydra.instance().hydra = running


def compose_run(overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """What train.py would run with these arguments, outside of a run, and the option chosen in every group."""
    resolvers.register()
    source.register()
    cfg = compose("train", overrides, return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def version_base() -> dict[str, str]:
    """What Hydra has to be told: Hydra 1.4 deprecates the argument that 1.3 asks for."""
    return {} if tuple(map(int, version("hydra-core").split(".")[:2])) >= (1, 4) else {"version_base": "1.3"}
