"""All that conf/ lists as small modules: mechanisms, layouts, parts, models, and what else goes into a model.

Mixers are put together, several on the same tokens: a new YAML is tested without a line.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conf import families, names
from models import create_model, list_attentions
from models.attention import Grid, Mixer, Refused, Site, check, make
from models.attention.pres.ssm2d import ssm2d
from models.attention.softmax import softmax_attention
from tests.contract import test_layouts, test_parts
from tests.contract.test_options import mechanism

SITES = {
    "map": Site(dim=32, num_heads=4, grid=Grid(8, 8), stage=1, block=1, depth=2, kind="hierarchical"),
    "class token": Site(dim=32, num_heads=4, grid=Grid(6, 6, 1), stage=1, block=1, depth=2, kind="vit"),
}
PLACES = ("class token", "shifted windows", "neighborhood")  # of parts
OF_CLASS_TOKENS = {("pool", "class_token"), ("wrapper", "dcal"), ("wrapper", "ifam")}
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


def mechanisms(name: str, most: int = len(SITES)) -> Given:
    """On a map, and with a class token where it takes one; in the last so many of the places that it takes."""
    mixers = [placed(mechanism(name), site) for site in SITES.values()]
    return together([mixer for mixer in mixers if not isinstance(mixer, Refused)][-most:])


def layouts(core: str) -> Given:
    """Softmax in every layout, other cores in one of each kind of keys."""
    chosen = test_layouts.layouts() if core == "softmax" else ("window", "reduced", "neighborhood", "boat")
    return together(test_layouts.placed(core, layout) for layout in chosen)


def parts(group: str, place: str) -> Given:
    """Every part of a group in one place."""
    named = [name for part, name in test_parts.PARTS if part == group and (part, name) not in test_parts.DROPS]
    return together(test_parts.mixer(group, name, place) for name in named)


def complex_states() -> Given:
    """What ONNX has no numbers for."""
    pre = partial(ssm2d, states=2, complex=True)
    return together(placed(partial(softmax_attention, pre=pre), site) for site in SITES.values())


def together(mixers: Iterable[Mixer | Refused]) -> Given:
    module = Together([mixer for mixer in mixers if not isinstance(mixer, Refused)])
    return module, (torch.randn(2, max(grid.tokens for grid in module.grids), 32),)


def model(**settings: Any) -> Given:
    made = create_model(settings.pop("model"), settings.pop("attention", None), num_classes=5, **settings)
    if getattr(made, "generates", False):
        return made, (torch.randn(2, 4, 4, 4), torch.arange(2) + 3, torch.arange(2))
    return made, (torch.randn(2, 3, 32, 32),)


CASES = {f"attention={name}": partial(mechanisms, name) for name in list_attentions() if "/" not in name}
CASES |= {f"{core} in layouts": partial(layouts, core) for core in test_layouts.cores()}
CASES |= {
    f"attention/{group}, {place}": partial(parts, group, place)
    for group in names.PARTS
    for place in PLACES
    if group != "layout"
}
CASES["attention/pre=ssm2d, complex"] = complex_states
CASES |= {name: partial(model, model=name) for name in families.small()}
CASES["dit"] = partial(model, model="dit_s_2", image_size=32, depth=2)
CASES |= {
    f"{place}={name}": partial(model, **SMALL, class_token=(place, name) in OF_CLASS_TOKENS, **{place: name})
    for place in names.PLACES
    for name in names.options(place)
}


def moved(module: nn.Module) -> nn.Module:
    """With parameters away from their start, where zeros hide much."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module.eval()


def another(batch: int, like: Tensor) -> Tensor:
    """Input of another batch size."""
    shape = (batch, *like.shape[1:])
    return torch.randn(shape, dtype=like.dtype) if like.is_floating_point() else torch.arange(batch) + 1
