"""What computes the attention of a model on a device, in one line."""

from collections import Counter

import torch
from torch import nn

from conf.errors import UserError
from kernels.dispatch import INTERPRETED
from models.attention import Mixer, Runs, mixers_of


def describe_backend(model: nn.Module, device: torch.device) -> str:
    """One line: which operations run as Triton kernels, which in PyTorch, and why.

    Raises:
        ValueError: `attention.backend=triton` on a device where no kernel runs.
    """
    mixers = [mixer for _, mixer in mixers_of(model)]
    if not mixers:
        return getattr(model, "unmixed", "no attention")
    if device.type != "cuda" and not INTERPRETED:
        if any(mixer.backend == "triton" for mixer in mixers):
            raise UserError(
                f"attention.backend=triton: Triton kernels run on CUDA devices, got {device.type}; "
                "set attention.backend=auto, which computes the same in PyTorch there"
            )
        return f"attention in PyTorch: Triton kernels run on CUDA devices, this is a {device.type.upper()}"
    counts = Counter(_runs(mixer) for mixer in mixers)
    return "attention: " + ", ".join(_part(runs, count, len(mixers)) for runs, count in counts.items())


def _runs(mixer: Mixer) -> Runs:
    runs = mixer.runs()
    return Runs(runs.operation, False, "attention.backend=torch") if mixer.backend == "torch" else runs


def _part(runs: Runs, count: int, total: int) -> str:
    where = "Triton" if runs.fused else "PyTorch"
    share = "" if count == total else f"{count} of {total} places"
    notes = ", ".join(note for note in (share, runs.reason) if note)
    return f"{runs.operation} in {where}" + (f" ({notes})" if notes else "")
