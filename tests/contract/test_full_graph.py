"""What conf/ lists trains as one graph: `task.compile=true` finds no break in it, and computes the same."""

import inspect
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tests.contract.cases import CASES, moved

# two small models, and mechanisms that select; all of the others with `make test-all`
FEW = ("vit_32px", "pvt_32px", "attention=biformer", "attention=moh")


def trained(module: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, auxiliary losses, and the gradient of the first parameter, of one training step."""
    more = {"return_losses": True} if "return_losses" in inspect.signature(module.forward).parameters else {}
    torch.manual_seed(0)
    found = module(*given, **more)
    outputs, losses = found if more else (found, {})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.square().mean() for o in outputs).backward()
    gradient = next(p.grad for p in module.parameters() if p.grad is not None)
    return [*outputs, *losses.values(), gradient]


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FEW else pytest.mark.full) for c in CASES])
def test_a_training_step_is_one_graph(case):
    module, given = CASES[case]()
    module = moved(module).train()
    wanted = trained(deepcopy(module), given)
    torch.compiler.reset()
    compiled = deepcopy(module)
    compiled.compile(fullgraph=True, backend="eager")
    for found, want in zip(trained(compiled, given), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_break_is_found():
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    module = Breaks()
    module.compile(fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        module(torch.ones(2))
