"""Whether what was exported computes what the model computes, on real images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from conf.errors import RunFailed, UserError
from models.export.subject import Subject

BOUND = 1e-4  # of the largest logit: float32 in another order of the same sums gives 1e-7 to 1e-5
Runs = Callable[[tuple[Tensor, ...]], Tensor]  # inputs -> output, by what was exported


class Agreement(NamedTuple):
    """How far the outputs are apart at most, how large those of the model are, and on what."""

    difference: float
    scale: float
    on: list[tuple[int, ...]]

    @property
    def holds(self) -> bool:
        return self.difference <= BOUND * self.scale

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.on)
        return f"largest difference {self.difference:.1e} of outputs up to {self.scale:.3g}, on {shapes}"


def agreement(subject: Subject, runs: Runs, name: str, resized: bool) -> Agreement:
    """Compares on one image and on three others; with `resized` on images of another height and width too.

    Raises:
        UserError: the model gives NaN or infinity.
        RunFailed: what was written cannot take one of them.
    """
    cases = [subject.of(0, 1), subject.of(1, 3)]
    if resized:
        cases.append(subject.larger())
    difference, scale = 0.0, 0.0
    with torch.no_grad():
        for inputs in cases:
            expected = subject.model(*inputs)
            if not torch.isfinite(expected).all():
                raise UserError(
                    "ckpt: the model itself gives no finite numbers for its images; export another checkpoint"
                )
            got = _run(runs, inputs, name)
            if got.shape != expected.shape or not torch.isfinite(got).all():
                difference = float("inf")
            else:
                difference = max(difference, (got.to(expected) - expected).abs().max().item())
            scale = max(scale, expected.abs().max().item())
    return Agreement(difference, scale, [tuple(inputs[0].shape) for inputs in cases])


def _run(runs: Runs, inputs: tuple[Tensor, ...], name: str) -> Tensor:
    try:
        return runs(inputs)
    except Exception as error:  # in the words of whoever runs it
        shape, words = "×".join(map(str, inputs[0].shape)), " ".join(str(error).split())[-160:]
        raise RunFailed(
            f"format={name}: what was written cannot take {shape} ({words}). Nothing is left; choose another format"
        ) from error


def refuse_difference(found: Agreement, name: str) -> None:
    """What computes something else is not left behind.

    Raises:
        RunFailed: the difference is above the bound.
    """
    if not found.holds:
        raise RunFailed(
            f"format={name}: what was written does not compute what the model computes: {found}; the bound is "
            f"{BOUND:g} of the largest output. Nothing is left; please report it with the command"
        )
