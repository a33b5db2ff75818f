"""Twins' attention: windows and the whole map in turn, each as timm computes it."""

from functools import partial

import pytest
import torch
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn

from models.attention import Grid, Mixer, Refused, Site, build
from models.attention.layouts.twins import twins
from models.attention.softmax import softmax_attention
from models.checkpoints.names.twins import LAYOUTS


def made(block: int, grid: Grid, **options) -> Mixer:
    torch.manual_seed(0)
    site = Site(24, 3, grid, 0, block, 2, "hierarchical")
    return build(partial(softmax_attention, layout=partial(twins, **options)), [site])[0].eval()


def tokens(grid: Grid) -> torch.Tensor:
    return torch.randn(2, grid.tokens, 24, generator=torch.Generator().manual_seed(1))


def named(mixer: Mixer, block: int) -> dict[str, torch.Tensor]:
    """Its weights under the names of timm."""
    start = f"stages.0.blocks.{block}.attn."
    ours = {f"{start}{key}": value for key, value in mixer.state_dict().items()}
    names = LAYOUTS[0].names(ours)
    theirs = {k: v for mine, value in ours.items() for k, v in LAYOUTS[0].give(mine, value, names[mine]).items()}
    return {key.removeprefix(f"blocks.0.{block}.attn."): value for key, value in theirs.items()}


@pytest.mark.parametrize("grid", [Grid(14, 7), Grid(9, 16), Grid(3, 5)])
def test_local_equals_timm(grid):
    mixer, theirs = made(0, grid), LocallyGroupedAttn(24, 3, ws=7).eval()
    theirs.load_state_dict(named(mixer, 0))
    torch.testing.assert_close(mixer(tokens(grid), grid).x, theirs(tokens(grid), grid[:2]))


@pytest.mark.parametrize("ratio", [4, 2, 1])
def test_global_equals_timm(ratio):
    grid = Grid(8, 12)
    mixer, theirs = made(1, grid, ratio=ratio), GlobalSubSampleAttn(24, 3, sr_ratio=ratio).eval()
    theirs.load_state_dict(named(mixer, 1))
    torch.testing.assert_close(mixer(tokens(grid), grid).x, theirs(tokens(grid), grid[:2]))


@pytest.mark.parametrize(("block", "options"), [(0, {"size": (6, 5)}), (1, {"ratio": 1})])
def test_one_window_and_keys_of_full_length_are_dense_attention(block, options):
    grid = Grid(6, 5)
    mixer, dense = made(block, grid, **options), softmax_attention(Site(24, 3, grid, 0, 0, 1, "vit")).eval()
    dense.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(tokens(grid), grid).x, dense(tokens(grid), grid).x)


def test_a_window_alone_then_everything():
    grid = Grid(8, 8)
    local, wide = made(0, grid, size=4), made(1, grid, ratio=2)
    x = tokens(grid)[:1].requires_grad_()
    near = torch.zeros(8, 8, dtype=torch.bool)
    near[4:, :4] = True
    (seen,) = torch.autograd.grad(local(x, grid).x[0, 5 * 8 + 2].sum(), x)
    assert torch.equal((seen.abs().sum(-1) > 0).view(8, 8), near)
    (seen,) = torch.autograd.grad(wide(local(x, grid).x, grid).x[0, 5 * 8 + 2].sum(), x)
    assert bool((seen.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("block", [0, 1])
def test_class_tokens_and_wrong_numbers_are_refused(block):
    """Whatever the block, and where keys keep their length too."""
    with pytest.raises(ValueError, match=r"cannot take the 1 class token.*set model.class_token=false"):
        made(block, Grid(4, 4, prefix=1), ratio=1)
    with pytest.raises(ValueError, match=r"twins: size must be a whole number of at least 1, or two, got 0; give the"):
        made(block, Grid(4, 4), size=0)
    with pytest.raises(ValueError, match=r"attention: sr_ratio must be a whole number of at least 1, got 0; set"):
        made(block, Grid(4, 4), ratio=0)
    with pytest.raises((Refused, ValueError), match=r"sr_ratio=\[8\] has no entry for stage 2; set attention.sr_ratio"):
        site = Site(24, 3, Grid(4, 4), 2, block, 2, "hierarchical")
        build(partial(softmax_attention, layout=partial(twins, ratio=[8])), [site])
