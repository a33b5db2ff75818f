"""Runs one of our modules on a reference case and compares it with what the authors' code returned."""

from collections.abc import Callable

import numpy as np
import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.checkpoints.names.layout import Layout

OUTPUT, GRADIENT = (
    1e-4,
    1e-3,
)  # relative; set with the cases (README): float32 order-of-summation noise is 100 times smaller


class Case(nn.Module):
    """A module, and how to call it on the case's input."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def check(
    name: str,
    module: nn.Module,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    call: Callable[[nn.Module, Tensor], Tensor],
    kept: dict[str, Tensor] | None = None,
) -> None:
    """Output, input gradient and every parameter's gradient norm equal the recorded ones.

    Args:
        name: the case, e.g. "agent/deit_attn__d64h2_a16_w7".
        module: ours, built for the case.
        convert: the authors' state → all of ours, by differentiable operations (renaming, reshaping, concatenation), so
            that gradients arrive at the authors' own tensors.
        call: `(module, input) -> output` in the layout that the case records.
        kept: under the authors' names, what the case leaves as it was made, although it recorded a gradient for it.
    """
    learned = set(reference.info(name)["param_names"])
    given = reference.weights(name) | (kept or {})
    theirs = {key: value.requires_grad_(key in learned) for key, value in given.items()}
    ours = convert(theirs)
    expected = set(module.state_dict())
    assert set(ours) == expected, f"missing {sorted(expected - set(ours))}, unexpected {sorted(set(ours) - expected)}"
    x = reference.model_input(name).requires_grad_()
    output = functional_call(Case(module.eval(), call), {f"module.{key}": value for key, value in ours.items()}, (x,))
    assert reference.compare(name, "output", output) <= OUTPUT
    names = [key for key in reference.info(name)["param_names"] if key in theirs]
    grads = torch.autograd.grad(
        output.square().mean(), [x, *(theirs[key] for key in names)], allow_unused=True, materialize_grads=True
    )
    recorded = reference.arrays(name)
    if "input_grad" in recorded:
        assert reference.compare(name, "input_grad", grads[0]) <= GRADIENT
    wanted = dict(zip(reference.info(name)["param_names"], recorded["grad_norms"], strict=True))
    floor = 1e-7 * max(wanted.values())
    for key, grad in zip(names, grads[1:], strict=True):
        np.testing.assert_allclose(
            float(grad.norm()), wanted[key], rtol=GRADIENT, atol=floor, err_msg=f"gradient of {key}"
        )
    skipped = set(wanted) - set(names)
    assert not skipped, f"no weights for {sorted(skipped)}"


def through(layout: Layout, module: nn.Module, ours: str, theirs: str) -> Callable[[dict], dict]:
    """A `convert` for `check`: the weights of a part of a model, by the layout of whole models.

    Args:
        layout: of the authors' files.
        module: our part.
        ours, theirs: what stands in front of the names of the part in a whole model, here and there.
    """

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, parts in layout.names(f"{ours}{key}" for key in module.state_dict()).items():
            pieces = [layout.take(part.name, state[part.name.removeprefix(theirs)]) for part in parts]
            found[name.removeprefix(ours)] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return found

    return convert
