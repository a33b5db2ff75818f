"""Values that the configuration computes when it is composed. Torch-free: `--help` must be instant."""

import os
from datetime import datetime
from importlib.metadata import version

from omegaconf import OmegaConf

from conf import sweeps
from conf.errors import UserError
from conf.folders import count_class_folders


def run_name() -> str:
    """Date and time of the start, or the SLURM job id: one value for all processes of a run, and for a whole sweep."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm-{job}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ["TORCHELASTIC_RUN_ID"] == "none":
            raise UserError(
                "run.name: torchrun starts each process by itself, so they need one name; give run.name=..."
            )
        return f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}"
    # child processes of a multi-device run inherit the variable, and so agree with their parent
    now = datetime.now()
    return os.environ.setdefault("VISION_ZOO_RUN_NAME", f"{now:%Y-%m-%d_%H-%M-%S}-{now.microsecond // 1000:03d}")


def register() -> None:
    """Make the resolvers known to OmegaConf; calling it again changes nothing."""
    # the name since OmegaConf 2.4; before, it was that of another function
    since_2_4 = tuple(map(int, version("omegaconf").split(".")[:2])) >= (2, 4)
    add = OmegaConf.register_resolver if since_2_4 else OmegaConf.register_new_resolver
    for name, resolver in [("run_name", run_name), ("slug", sweeps.folder), ("class_folders", count_class_folders)]:
        add(name, resolver, replace=True)
