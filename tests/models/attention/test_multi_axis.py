"""MaxViT's attention, of softmax, the layout multi_axis and a relative bias, against timm's with its weights."""

from functools import partial

import pytest
import torch
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.attention import Grid, Mixer, Site
from models.attention.layouts.multi_axis import multi_axis
from models.factory import compose_model, instantiate


def ours(block: int, grid: Grid, window: int = 4) -> Mixer:
    factory = instantiate(compose_model("vit_32px", "multi_axis").attention)
    return factory(Site(32, 4, grid, 0, block, 2, "hierarchical"), layout=partial(multi_axis, size=window))


@pytest.mark.parametrize("table", ["bias", "bias_tf"])
@pytest.mark.parametrize(("block", "partition"), [(0, "block"), (1, "grid")])
def test_equals_timm(block: int, partition: str, table: str) -> None:
    """timm's tables of TensorFlow are indexed by key - query, ours by query - key."""
    torch.manual_seed(0)
    sides = {"window_size": (4, 4), "grid_size": (4, 4), "dim_head": 8, "head_first": False, "rel_pos_type": table}
    theirs = PartitionAttentionCl(32, partition, MaxxVitTransformerCfg(**sides)).eval()
    mixer, grid = ours(block, Grid(8, 12)), Grid(8, 12)
    state = {key: value for key, value in theirs.attn.state_dict().items() if "rel_pos" not in key}
    (learned,) = theirs.attn.rel_pos.parameters()
    nn.init.normal_(learned)
    flat = learned if table == "bias" else learned.flip(1, 2).permute(1, 2, 0).flatten(0, 1)
    mixer.load_state_dict(state | {"core.bias.table": flat.detach()})
    x = torch.randn(2, 96, 32)
    expected = theirs._partition_attn(x.unflatten(1, (8, 12))).flatten(1, 2)
    torch.testing.assert_close(mixer(x, grid).x, expected)


@pytest.mark.parametrize("block", [0, 1])
def test_tokens_see_their_window_or_their_grid(block: int) -> None:
    mixer, grid = ours(block, Grid(8, 8)), Grid(8, 8)
    x = torch.randn(1, 64, 32, requires_grad=True)
    mixer(x, grid).x[0, 9].sum().backward()
    seen = x.grad.abs().sum(-1).view(8, 8) > 0
    near, spread = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    near[:4, :4] = spread[1::2, 1::2] = True
    assert torch.equal(seen, spread if block else near)


@torch.no_grad()
def test_a_grid_is_the_windows_of_the_permuted_map() -> None:
    torch.manual_seed(0)
    grid = Grid(8, 12)
    window, dilated = ours(0, grid), ours(1, grid)
    dilated.load_state_dict(window.state_dict())
    x = torch.randn(2, 96, 32)
    order = torch.arange(96).view(4, 2, 4, 3).permute(1, 0, 3, 2)  # cell and place in it exchanged along both axes
    order = order.reshape(8, 12).flatten()
    expected = torch.empty_like(x)
    expected[:, order] = window(x[:, order], grid).x
    torch.testing.assert_close(dilated(x, grid).x, expected)


def test_a_window_and_a_grid_connect_every_pair_of_tokens() -> None:
    torch.manual_seed(0)
    grid = Grid(8, 8)
    x = torch.randn(1, 64, 32, requires_grad=True)
    ours(1, grid)(ours(0, grid)(x, grid).x, grid).x[0, 20].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1])
def test_four_times_the_tokens_cost_four_times_as_much(block: int) -> None:
    costs = []
    for side in (16, 32):
        with FlopCounterMode(display=False) as counter:
            ours(block, Grid(side, side))(torch.randn(1, side * side, 32), Grid(side, side))
        costs.append(counter.get_total_flops())
    assert costs[1] == 4 * costs[0] > 0


@pytest.mark.parametrize(("image", "side"), [((224, 224), (7, 7)), ((384, 512), (12, 16)), ((16, 70), (1, 2))])
@pytest.mark.parametrize("block", [0, 1])
def test_auto_is_the_image_over_32(block: int, image: tuple[int, int], side: tuple[int, int]) -> None:
    site = Site(32, 4, Grid(64, 64), 0, block, 2, "hierarchical", image_size=image)
    assert multi_axis(site, size="auto").window == side


def test_auto_needs_an_image() -> None:
    site = Site(32, 4, Grid(8, 8), 0, 0, 2, "hierarchical")
    with pytest.raises(ValueError, match=r"size=auto needs the image's size, which this .*; set attention.layout.size"):
        multi_axis(site, size="auto")
    with pytest.raises(
        ValueError, match=r"multi_axis: size must be one of auto, got 'all'; set attention.layout.size to"
    ):
        multi_axis(site, size="all")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["multi_axis", "axial", "window"])
def test_another_layout_takes_the_place_of_its_own(layout: str) -> None:
    torch.manual_seed(0)
    model = create_model("swin_32px", "multi_axis", num_classes=3, layout=layout).eval()
    assert type(model.stages[0].blocks[1].attn).__name__ == ("CrossShaped" if layout == "axial" else "MultiHead")
    assert model(torch.randn(1, 3, 40, 64)).isfinite().all()
