"""Values that the configuration computes when it is composed. Torch-free: `--help` must be instant."""

import os
import re
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


def slurm(what: str) -> int | str:
    """Of the SLURM job that this process is a task of: its `nodes`, or its `tasks_per_node`; outside of one, of here.

    Raises:
        UserError: nodes have different numbers of tasks.
    """
    if what == "nodes":
        return int(os.environ.get("SLURM_NNODES") or os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    tasks = os.environ.get("SLURM_TASKS_PER_NODE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    if not tasks or "SLURM_PROCID" not in os.environ:
        return "auto"
    if not (match := re.fullmatch(r"(\d+)(?:\(x\d+\))?", tasks)):
        raise UserError(f"trainer: every node must have as many tasks, got {tasks}; ask for --ntasks-per-node")
    return int(match[1])


def register() -> None:
    """Make the resolvers known to OmegaConf; calling it again changes nothing."""
    # the name since OmegaConf 2.4; before, it was that of another function
    since_2_4 = tuple(map(int, version("omegaconf").split(".")[:2])) >= (2, 4)
    add = OmegaConf.register_resolver if since_2_4 else OmegaConf.register_new_resolver
    for name, resolver in [("run_name", run_name), ("slug", sweeps.folder)]:
        add(name, resolver, replace=True)
    for name, resolver in [("slurm", slurm), ("class_folders", count_class_folders)]:
        add(name, resolver, replace=True)
