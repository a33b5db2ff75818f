"""What conf/ lists exports to ONNX with any batch, and ONNX Runtime computes what the model does."""

from functools import partial

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kernels.order import sorted_stably
from tests.contract.cases import CASES, PLACES, another, moved
from tests.contract.test_layouts import cores

# opset 18 rounds like PyTorch up to the order of sums
ATOL = 1e-5
# heads without a choice of their layout, beside a sort below; the others with `make test-all`
FEW = ("attention=window",)
# exported with others already: what a core computes by itself, a layout with softmax, a part that knows no grid in
# another place; and two mechanisms are others with other numbers
AGAIN = {f"{core} in layouts" for core in cores() if core not in ("softmax", "linear")}
AGAIN |= {
    f"attention/{part}, {place}" for part in ("pre", "score", "weights") for place in PLACES if place != PLACES[0]
}
AGAIN |= {"attention=biformer_nchw", "attention=dual_384"}


def session(module: nn.Module, given: tuple[Tensor, ...]) -> onnxruntime.InferenceSession:
    any_batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in given)
    program = torch.onnx.export(module, given, dynamo=True, dynamic_shapes=any_batch, verbose=False)
    # the other ways of tracing do not know that they export to ONNX
    assert program._capture_strategy == "TorchExportNonStrictStrategy"
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


def computed(runs: onnxruntime.InferenceSession, given: tuple[Tensor, ...]) -> list[Tensor]:
    feeds = {place.name: tensor.numpy() for place, tensor in zip(runs.get_inputs(), given, strict=True)}
    return [torch.from_numpy(array) for array in runs.run(None, feeds)]


# tracing takes as long as there are operations: with a class token there are those of a map, and some more
EXPORTED = CASES | {case: partial(CASES[case], most=1) for case in CASES if case.startswith("attention=")}
CHOSEN = [pytest.param(c, marks=[] if c in FEW else pytest.mark.full) for c in CASES if c not in AGAIN]


@pytest.mark.parametrize("case", CHOSEN)
def test_onnx_runtime_computes_what_the_model_does(case):
    module, given = EXPORTED[case]()
    runs = session(moved(module), given)
    for batch in (1, 3):
        images = tuple(another(batch, tensor) for tensor in given)
        with torch.no_grad():
            wanted = module(*images)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for got, want in zip(computed(runs, images), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("descending", [pytest.param(False, marks=pytest.mark.full), True])
def test_among_equals_the_lowest_index_comes_first_in_onnx_too(descending):
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sorted_stably(x, descending=descending).indices

    x = torch.randint(4, (3, 50)).float()
    (found,) = computed(session(Sorts().eval(), (x[:2],)), (x,))
    assert torch.equal(found, x.sort(dim=-1, descending=descending, stable=True).indices)
