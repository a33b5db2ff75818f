"""What fits the machine where the configuration leaves it open: precision on a GPU, threads on a CPU."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.accelerators import MPSAccelerator

from conf.errors import UserError
from data.cores import free_cores, quota, usable_cores

ENOUGH = 0.75  # of the cores free: all of them are used
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
USUAL = torch.get_num_threads()  # before a run of a sweep has changed it


def check_accelerator(trainer: dict[str, Any]) -> None:
    """Refuses a GPU where there is none.

    Raises:
        UserError: with the reason that can be seen, and what to set.
    """
    wanted = trainer.get("accelerator")
    found = {"gpu": torch.cuda.is_available() or MPSAccelerator.is_available(), "cuda": torch.cuda.is_available()}
    if not found.get(str(wanted), True):
        raise UserError(
            f"trainer: accelerator={wanted} needs a GPU that torch can use, got none ({_why_none()}); "
            "set trainer.accelerator=auto, which takes a GPU where there is one, or cpu"
        )


def fit_precision(cfg: DictConfig) -> list[str]:
    """Writes what `trainer.precision=auto` means here into `cfg`; what there is to say about it."""
    if cfg.trainer.get("precision") != "auto":
        return []
    if not _on_gpu(cfg.trainer):
        cfg.trainer.precision = "32-true"
        return []
    if torch.cuda.is_bf16_supported(including_emulation=False):
        cfg.trainer.precision = "bf16-mixed"
        return ["bf16-mixed, since this GPU has it; trainer.precision=32-true for all 32 bits"]
    cfg.trainer.precision = "32-true"
    torch.set_float32_matmul_precision("high")
    return ["32 bits with products in TF32 where this GPU has it; trainer.precision=16-mixed is faster"]


def fit_threads(cfg: DictConfig, before: int | None) -> tuple[int, list[str]]:
    """Lets torch use as many threads as there are free cores, where the run is one process on the CPU.

    Threads that wait for each other spin: two of them on one free core were eighty times slower than one.

    Args:
        before: the threads of the checkpoint that the run goes on from, for the same bits; None for a new run.

    Returns:
        The number of threads, and what there is to say about it.
    """
    alone = cfg.trainer.get("devices") in (1, "1", "auto") and cfg.trainer.get("num_nodes") == 1
    given = any(name in os.environ for name in (*VARIABLES, "LOCAL_RANK"))
    if _on_gpu(cfg.trainer) or not alone or given:
        return torch.get_num_threads(), []
    free, allowed = free_cores(), quota()
    if before is not None and before <= usable_cores():
        chosen, why = before, "as before the stop"
    else:
        chosen = choose_threads(USUAL, allowed, free)
        found = f"{allowed:g} allowed" if free is None or allowed < free else f"{free:.1f} free"
        why = f"of {USUAL} cores {found}, and threads that share a core wait for each other"
    torch.set_num_threads(chosen)
    counted = f"{chosen} thread{'s' if chosen > 1 else ''}"
    return chosen, [f"{counted}: {why}; OMP_NUM_THREADS={USUAL} insists on {USUAL}"] * (chosen < USUAL)


def choose_threads(usual: int, quota: float, free: float | None) -> int:
    """`usual` where nearly all these cores are free and allowed, else as many as are, at least one."""
    allowed = min(usual, max(1, math.floor(quota))) if math.isfinite(quota) else usual
    if free is None or free >= ENOUGH * allowed:
        return allowed
    return max(1, min(allowed, math.floor(free)))


def _on_gpu(trainer: DictConfig) -> bool:
    return str(trainer.get("accelerator")) in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r}"
    if torch.version.cuda is not None and not Path("/proc/driver/nvidia/version").exists():
        return "no NVIDIA driver is loaded"
    return f"torch {torch.__version__} finds none; nvidia-smi says whether the driver does"
