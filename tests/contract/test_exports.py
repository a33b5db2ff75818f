"""What conf/ lists exports to ONNX with any batch, and ONNX Runtime computes what the model does.

Mixers and parts are exported several at a time, on the same tokens: a new YAML is tested without a line.
"""

from collections.abc import Callable
from functools import partial

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from conf import families, names
from kernels.order import sorted_stably
from models import create_model, list_attentions
from models.attention import Grid, Mixer, Refused, Site, check, make
from tests.contract import test_layouts, test_parts
from tests.contract.test_options import mechanism

# opset 18 rounds like PyTorch up to the order of sums
ATOL = 1e-5
SITES = {
    "map": Site(dim=32, num_heads=4, grid=Grid(8, 8), stage=1, block=1, depth=2, kind="hierarchical"),
    "class token": Site(dim=32, num_heads=4, grid=Grid(6, 6, 1), stage=1, block=1, depth=2, kind="vit"),
}
SMALL = {"model": "vit_32px", "attention": "softmax", "depth": 1, "dim": 32, "num_heads": 4}
Given = tuple[nn.Module, tuple[Tensor, ...]]


class Together(nn.Module):
    """Mixers of one width on the tokens of their maps."""

    def __init__(self, mixers: list[Mixer]) -> None:
        super().__init__()
        self.mixers, self.grids = nn.ModuleList(mixers), [mixer.site.grid for mixer in mixers]

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.mixers, self.grids, strict=True)
        return tuple(mixer(x_BNC[:, : grid.tokens], grid).x for mixer, grid in pairs)


def placed(factory: Callable[[Site], Mixer], site: Site) -> Mixer | Refused:
    try:
        mixer = make(factory, site)
        check(mixer, site)
    except Refused as refused:
        return refused
    return mixer


def mechanisms(name: str) -> Given:
    """On a map, and with a class token where it takes one."""
    return together(placed(mechanism(name), site) for site in SITES.values())


def layouts(core: str) -> Given:
    """Softmax in every layout, other cores in one of each kind of keys."""
    chosen = test_layouts.layouts() if core == "softmax" else ("window", "reduced", "neighborhood", "boat")
    return together(test_layouts.placed(core, layout) for layout in chosen)


def parts(group: str, place: str) -> Given:
    """Every part of a group in one place."""
    named = [name for part, name in test_parts.PARTS if part == group and (part, name) not in test_parts.DROPS]
    return together(test_parts.mixer(group, name, place) for name in named)


def together(mixers) -> Given:
    module = Together([mixer for mixer in mixers if not isinstance(mixer, Refused)])
    return module, (torch.randn(2, max(grid.tokens for grid in module.grids), 32),)


def model(**settings) -> Given:
    made = create_model(settings.pop("model"), settings.pop("attention", None), num_classes=5, **settings)
    if getattr(made, "generates", False):
        return made, (torch.randn(2, 4, 4, 4), torch.arange(2) + 3, torch.arange(2))
    return made, (torch.randn(2, 3, 32, 32),)


CASES = {f"attention={name}": partial(mechanisms, name) for name in list_attentions() if "/" not in name}
CASES |= {f"{core} in layouts": partial(layouts, core) for core in test_layouts.cores()}
CASES |= {
    f"attention/{group}, {place}": partial(parts, group, place)
    for group in names.PARTS
    for place in ("class token", "shifted windows", "neighborhood")
    if group != "layout"
}
CASES |= {name: partial(model, model=name) for name in families.small()}
CASES["dit"] = partial(model, model="dit_s_2", image_size=32, depth=2)
CASES |= {
    f"{place}={name}": partial(model, **SMALL, class_token=(place, name) == ("pool", "class_token"), **{place: name})
    for place in names.PLACES
    if place != "adapter"  # which has no forward pass of its own
    for name in names.options(place)
}
# one of each kind of trouble: a sort, heads without a choice of their layout, as many groups as images
FEW = ("attention=biformer", "attention=window", "attention=inline")


def moved(module: nn.Module) -> nn.Module:
    """With parameters away from their start, where zeros hide much."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module.eval()


def session(module: nn.Module, given: tuple[Tensor, ...]) -> onnxruntime.InferenceSession:
    any_batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in given)
    program = torch.onnx.export(module, given, dynamo=True, dynamic_shapes=any_batch, verbose=False)
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


def computed(runs: onnxruntime.InferenceSession, given: tuple[Tensor, ...]) -> list[Tensor]:
    feeds = {place.name: tensor.numpy() for place, tensor in zip(runs.get_inputs(), given, strict=True)}
    return [torch.from_numpy(array) for array in runs.run(None, feeds)]


def another(batch: int, like: Tensor) -> Tensor:
    shape = (batch, *like.shape[1:])
    return torch.randn(shape) if like.is_floating_point() else torch.arange(batch) + 1


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FEW else pytest.mark.full) for c in CASES])
def test_onnx_runtime_computes_what_the_model_does(case):
    module, given = CASES[case]()
    runs = session(moved(module), given)
    for batch in (1, 3):
        images = tuple(another(batch, tensor) for tensor in given)
        with torch.no_grad():
            wanted = module(*images)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for got, want in zip(computed(runs, images), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("descending", [False, True])
def test_among_equals_the_lowest_index_comes_first_in_onnx_too(descending):
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sorted_stably(x, descending=descending).indices

    x = torch.randint(4, (3, 50)).float()
    (found,) = computed(session(Sorts().eval(), (x[:2],)), (x,))
    assert torch.equal(found, x.sort(dim=-1, descending=descending, stable=True).indices)
