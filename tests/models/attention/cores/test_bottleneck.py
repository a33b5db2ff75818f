"""Bottleneck attention against timm's module and dense attention, and what its relative logits depend on."""

import pytest
import torch
from timm.layers.bottleneck_attn import BottleneckAttn

from models.attention import Grid, Mixer, Refused, Site
from models.attention.cores.bottleneck import bottleneck_attention, resized
from models.attention.softmax import softmax_attention
from models.checkpoints.fitting import skeleton

MAP = Grid(4, 6)
SITE = Site(dim=32, num_heads=2, grid=MAP, stage=0, block=0, depth=2, kind="convnet")
BARE = {"qkv_bias": False, "output_projection": False}


def made(site: Site = SITE, **options: object) -> Mixer:
    torch.manual_seed(0)
    mixer = bottleneck_attention(site, **BARE, **options).double()
    torch.nn.init.normal_(mixer.qkv.weight, std=0.4)
    return mixer


def tokens(grid: Grid = MAP) -> torch.Tensor:
    return torch.randn(2, grid.tokens, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scaled", [False, True])
def test_equals_timm(scaled: bool) -> None:
    """Output and gradients, of the tables too, on a map that is no square."""
    ours = made(scale_position=scaled)
    theirs = BottleneckAttn(32, feat_size=MAP[:2], num_heads=2, scale_pos_embed=scaled).double()
    position = {f"pos_embed.{axis}_rel": getattr(ours.core.position, axis) for axis in ("height", "width")}
    theirs.load_state_dict({"qkv.weight": ours.qkv.weight[..., None, None], **position})
    x = tokens().requires_grad_()
    output, expected = ours(x, MAP).x, theirs(x.mT.unflatten(2, MAP[:2])).flatten(2).mT
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad(output.square().sum(), [x, ours.core.position.height, ours.core.position.width])
    wanted = torch.autograd.grad(expected.square().sum(), [x, theirs.pos_embed.height_rel, theirs.pos_embed.width_rel])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_without_tables_it_is_dense_attention_without_projection() -> None:
    ours, dense = made(), softmax_attention(SITE, **BARE).double()
    dense.load_state_dict({"qkv.weight": ours.qkv.weight})
    torch.nn.init.zeros_(ours.core.position.height)
    torch.nn.init.zeros_(ours.core.position.width)
    torch.testing.assert_close(ours(tokens(), MAP).x, dense(tokens(), MAP).x)
    assert not [name for name, _ in ours.named_parameters() if name.startswith("proj")]


def test_the_logits_of_one_query_depend_on_key_minus_query() -> None:
    position, q = made().core.position, torch.randn(16, dtype=torch.double)
    logits = position(q.expand(1, 1, MAP.cells, 16), MAP, MAP)[0, 0].unflatten(1, MAP[:2]).unflatten(0, MAP[:2])
    torch.testing.assert_close(logits[0, 1, 2, 4], logits[1, 2, 3, 5])  # two rows down, three columns right
    torch.testing.assert_close(logits[0, 1, 2, 4], q @ (position.height[3 + 2] + position.width[5 + 3]))
    assert not torch.isclose(logits[0, 1, 2, 4], logits[2, 4, 0, 1])


def test_transposing_map_and_tables_transposes_the_output() -> None:
    upright = Grid(MAP.width, MAP.height)
    ours, other = made(), made(SITE._replace(grid=upright))
    height, width = ours.core.position.height, ours.core.position.width
    state = {"qkv.weight": ours.qkv.weight, "core.position.height": width, "core.position.width": height}
    other.load_state_dict(state)
    turned = tokens().unflatten(1, MAP[:2]).transpose(1, 2).flatten(1, 2)
    expected = ours(tokens(), MAP).x.unflatten(1, MAP[:2]).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(other(turned, upright).x, expected)


def test_another_map_at_run_time_is_that_of_resized_tables() -> None:
    grid = Grid(7, 5)
    ours, other = made(), made(SITE._replace(grid=grid))
    state = {name: other.core.position.resized(name, getattr(ours.core.position, name)) for name in ("height", "width")}
    assert state["height"].shape == (13, 16) and state["width"].shape == (9, 16)
    other.load_state_dict({"qkv.weight": ours.qkv.weight, **{f"core.position.{n}": t for n, t in state.items()}})
    torch.testing.assert_close(ours(tokens(grid), grid).x, other(tokens(grid), grid).x)
    table = torch.randn(7, 3)
    torch.testing.assert_close(resized(table, 8)[[0, 7, 14]], table[[0, 3, 6]])  # the farthest, none, the farthest


def test_tables_in_files_may_be_of_another_map() -> None:
    settings = {"dims": [32, 64], "depths": [2, 1], "num_classes": 5}
    found = skeleton("resnet_32px", image_size=64, **settings).resized
    assert {key.rpartition(".")[2] for key in found if ".position." in key} == {"height", "width"}


def test_wrong_options_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"bottleneck: scale_position must be true or false, got 'no'; set attention.s"
    ):
        bottleneck_attention(SITE, scale_position="no")
    with pytest.raises(Refused, match=r"BottleneckCore cannot work on keys that are not its queries"):
        bottleneck_attention(SITE, sr_ratio=2)
    with pytest.raises(Refused, match=r"the 16 channels of the heads are not the 32 of the tokens; set attention.outp"):
        bottleneck_attention(SITE._replace(head_dim=8), **BARE)
    assert bottleneck_attention(SITE).accepts.prefix == "refused"
