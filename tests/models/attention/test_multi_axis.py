"""MaxViT's attention, of softmax, the layout multi_axis and a relative bias, against timm's with its weights."""

from functools import partial

import pytest
import torch
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from torch import nn

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
@pytest.mark.parametrize("layout", ["multi_axis", "axial", "window"])
def test_another_layout_takes_the_place_of_its_own(layout: str) -> None:
    torch.manual_seed(0)
    model = create_model("swin_32px", "multi_axis", num_classes=3, layout=layout).eval()
    assert type(model.stages[0].blocks[1].attn).__name__ == ("CrossShaped" if layout == "axial" else "MultiHead")
    assert model(torch.randn(1, 3, 40, 64)).isfinite().all()
