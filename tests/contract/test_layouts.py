"""Every core in every layout: it runs, with a gradient for every parameter, or it is refused with the reason.

Both are what conf/ lists: a new YAML is tested without a line. `python tests/contract/test_layouts.py` prints the
table.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from conf.names import CONF
from models.attention import Grid, Mixed, Mixer, Refused, Site, build, check, make, options_of, unwrapped
from models.attention.cross_shaped import CrossShaped
from models.factory import instantiate

# the second block of a second stage: shifted, alternating and dilated layouts are what they are there
SITE = Site(dim=32, num_heads=4, grid=Grid(8, 8), stage=1, block=1, depth=2, kind="hierarchical")
SHORT_FORMS = {"window": None, "stripe": None, "sr_ratio": 1, "kv_pool": None, "layout": None}
SHIFTED = "window, shifted"
# one core of each kind: on a kernel, a bias by itself, a convolution, a state, channels
SAMPLE = {"softmax", "agent", "hedgehog", "xca"}


@cache
def read(group: str) -> dict[str, partial]:
    """What the files of a group make by themselves, without other files or defaults."""
    nodes = {path.stem: OmegaConf.load(path) for path in sorted((CONF / group).glob("*.yaml"))}
    return {n: instantiate(node) for n, node in nodes.items() if "_target_" in node and "defaults" not in node}


@cache
def cores() -> list[str]:
    """Mechanisms that take a layout and bring none; of several names of one, the first."""
    found: dict[Callable, str] = {}
    for name, mechanism in sorted(read("attention").items(), key=lambda item: item[0] != "softmax"):
        function, given = unwrapped(mechanism)
        free = all(given.get(option, usual) == usual for option, usual in SHORT_FORMS.items())
        if free and "layout" in options_of(mechanism) and isinstance(placed(name, "whole"), Mixer):
            found.setdefault(function, name)
    return list(found.values())


@cache
def layouts() -> dict[str, partial]:
    """And one more, since most cores take no mask."""
    found = read("attention/layout")
    return found | {SHIFTED: partial(found["window"], shift=True)}


def placed(core: str, layout: str, prefix: int = 0) -> Mixer | Refused:
    """The mixer, or why there is none."""
    site = SITE._replace(grid=SITE.grid._replace(prefix=prefix))
    torch.manual_seed(0)
    try:
        mixer = make(partial(read("attention")[core], layout=layouts()[layout]), site)
        check(mixer, site)
    except Refused as refused:
        return refused
    return mixer


def table() -> dict[tuple[str, str], str]:
    """By core and layout "", or the reason for which it is refused."""
    pairs = [(core, layout) for core in cores() for layout in layouts()]
    made = {pair: placed(*pair) for pair in pairs}
    return {pair: mixer.reason if isinstance(mixer, Refused) else "" for pair, mixer in made.items()}


PAIRS = [
    pytest.param(core, layout, id=f"{core}-{layout}", marks=[] if core in SAMPLE else pytest.mark.full)
    for core in cores()
    for layout in layouts()
]


def step(mixer: Mixer, x: Tensor, grid: Grid) -> Mixed:
    """A training step; every parameter is to have a gradient."""
    mixed = mixer(x, grid)
    (mixed.x.square().mean() + sum(mixed.losses.values())).backward()
    missing = [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    return mixed


@pytest.mark.parametrize(("core", "layout"), PAIRS)
def test_a_core_in_a_layout_trains_or_is_refused(core: str, layout: str) -> None:
    mixer = placed(core, layout)
    if isinstance(mixer, Refused):
        assert len(mixer.reason.split()) > 4 and mixer.fix
        assert layout not in ("whole", "window", "grid") and core != "softmax"
        return
    x = torch.randn(2, 64, 32)
    assert step(mixer, x, SITE.grid).x.isfinite().all()
    mixer.eval()
    for grid in (SITE.grid, Grid(7, 10)):
        x = torch.randn(2, grid.tokens, 32)
        both = mixer(x, grid).x
        torch.testing.assert_close(mixer(x[1:], grid).x, both[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("core", "layout"), PAIRS)
def test_weights_times_values_are_the_output(core: str, layout: str) -> None:
    """Where a core has a matrix, less what it adds to it; rows sum to one where it says so."""
    mixer = placed(core, layout)
    if isinstance(mixer, Refused) or not mixer.has_matrix:
        return
    mixer.eval()
    for grid in (SITE.grid, Grid(7, 10)):
        x = torch.randn(2, grid.tokens, 32)
        weights = mixer.attention_matrix(x, grid)
        crossed = isinstance(mixer, CrossShaped)  # on the map, without what completes it to stripes
        made = mixer.cores[0] if crossed else mixer.core
        if made.row_stochastic and (not crossed or grid == SITE.grid):
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-4, atol=1e-4)
        if not made.adds:
            torch.testing.assert_close(mixer.attend(weights, x, grid), mixer(x, grid).x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", layouts())
def test_class_tokens_are_attended_or_refused(layout: str) -> None:
    mixer = placed("softmax", layout, prefix=1)
    if isinstance(mixer, Refused):
        assert mixer.fix == "set model.class_token=false"
        return
    grid = SITE.grid._replace(prefix=1)
    assert step(mixer, torch.randn(2, 65, 32), grid).x.shape == (2, 65, 32)


def test_cores_and_layouts_are_found() -> None:
    assert {"softmax", "agent", "focused_linear", "inline", "cosine", "xca", "flow", "galerkin"} <= set(cores())
    assert not {"window", "cswin", "multi_axis", "moh", "conv"} & set(cores())
    reasons = table()
    assert sum(not reason for reason in reasons.values()) >= len(reasons) * 2 // 3


def test_two_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two layouts, attention/layout and a window.*; leave out attention/layout"):
        build(partial(read("attention")["softmax"], layout=layouts()["grid"], window=4), [SITE])


if __name__ == "__main__":
    reasons = table()
    print(f"{sum(not reason for reason in reasons.values())} of {len(reasons)} combinations work")
    for reason in sorted(set(reasons.values()) - {""}):
        pairs = ", ".join(f"{core} in {layout}" for (core, layout), said in reasons.items() if said == reason)
        print(f"- {pairs}: {reason}")
