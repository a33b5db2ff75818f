"""Terminator: no residual sums, full context in each block, a signal that lasts, its options."""

import pytest
import torch
from timm.layers import DropPath

from models import create_model
from models.attention import Grid, Mixed, Site
from models.attention.hyper_kernel import HyperKernel
from models.layers.plain_block import PlainBlock

SHORT = {"dims": [32], "depths": [4], "num_heads": [2], "num_classes": 5}


def small(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("terminator_32px", **SHORT | options)


class Silent(HyperKernel):
    """Gives zeros."""

    def forward(self, x_BNC, grid, gates_BNM=None) -> Mixed:
        return Mixed(0 * x_BNC, {})


def test_nothing_goes_past_a_mixer():
    """Where it gives nothing, nothing goes on: a residual block would give its input."""
    grid = Grid(3, 4)
    block = PlainBlock(16, Silent(Site(16, 2, grid, 0, 0, 1, "vit")))
    assert not block(torch.randn(2, 12, 16), grid)[0].any()
    block = PlainBlock(16, HyperKernel(Site(16, 2, grid, 0, 0, 1, "vit")), layer_scale=0.5)
    x = torch.randn(2, 12, 16)
    expected = torch.nn.functional.gelu(0.5 * block.attn(block.norm1(x), grid).x)
    torch.testing.assert_close(block(x, grid)[0], expected)


def test_every_block_reads_the_whole_map():
    model = small().double()
    for stage in model.stages:
        for block in stage.blocks:
            x = torch.randn(1, 64, 32, dtype=torch.float64, requires_grad=True)
            (seen,) = torch.autograd.grad(block(x, Grid(8, 8))[0][0, 5].sum(), x)
            assert (seen[0].abs().sum(-1) > 0).all()


def test_the_image_still_counts_behind_many_blocks():
    """Branches are standardised, so that depth does not make the signal fade."""
    model = small(depths=[24]).eval()
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    tokens = model.forward_features(x)
    assert tokens.std(0).mean() > 1e-2
    (seen,) = torch.autograd.grad(tokens.square().sum(-1).sqrt().mean(), x)
    assert seen.isfinite().all() and seen.abs().max() > 0


def test_a_dropped_sample_passes_the_block_unchanged():
    grid = Grid(3, 4)
    block = PlainBlock(16, HyperKernel(Site(16, 2, grid, 0, 0, 1, "vit")), drop_path=0.5)
    x = torch.randn(64, 12, 16)
    torch.manual_seed(0)
    y = block.train()(x, grid)[0]
    passed = torch.tensor([torch.equal(*pair) for pair in zip(x, y, strict=True)])
    assert 10 < passed.sum() < 54
    torch.testing.assert_close((y - x)[~passed], 2 * (block.eval()(x, grid)[0] - x)[~passed], rtol=1e-4, atol=1e-4)
    assert isinstance(block.drop_path, DropPath)


def test_it_may_have_more_stages():
    model = small(dims=[16, 32], depths=[1, 2], num_heads=[2, 2])
    assert [tuple(x.shape[1:]) for x in model.forward_pyramid(torch.randn(1, 3, 32, 32))] == [(16, 8, 8), (32, 4, 4)]


def test_a_size_of_mlps_is_refused():
    with pytest.raises(ValueError, match=r"terminator_32px has no setting 'mlp_ratio'"):
        small(mlp_ratio=4.0)
    with pytest.raises(ValueError, match=r"no block has an MLP, got activation=relu; set model.activation=null"):
        small(activation="relu")
