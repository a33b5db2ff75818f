"""Counter-based randomness: every random choice of the data side is a function of numbers that name it.

An image's augmentation is named by (seed, epoch, index, repeat), a batch's mixing by (seed, epoch, number, rank).
Nothing depends on what was drawn before, on the number of workers or on where a run was interrupted.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

ORDER, AUGMENT, MIX, NOISE = range(4)  # the purpose is part of the name, so two uses never share a stream


def generator(*name: int) -> np.random.Generator:
    """A NumPy generator that depends on `name` (non-negative integers) only."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(name)))


def seed_all(*name: int, device: torch.device | None = None) -> None:
    """Seeds `random`, NumPy, torch's CPU generator and, if given, the generator of a CUDA `device`.

    torchvision draws from torch, timm from `random` and NumPy. `torch.manual_seed` is not used: before CUDA is
    initialised it records a stack trace per call, which costs more than the augmentation.
    """
    words = np.random.SeedSequence(name).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:2])
    seed = int(words[2]) << 32 | int(words[3])
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextlib.contextmanager
def preserved(device: torch.device | None = None) -> Iterator[None]:
    """Restores the global random state on exit: with no workers, loading shares a process with the model."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
