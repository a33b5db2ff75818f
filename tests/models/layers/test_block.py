"""Block and Stage: which branches there are, recomputation, drop path rates."""

import pytest
import torch
from torch import nn

from models.attention import Grid, Mixed, Mixer, Site
from models.layers.block import Block, Stage, drop_path_rates, frozen_statistics, scale
from models.layers.convnext_block import ConvNeXtBlock
from models.layers.position import ConvPosition


class Double(Mixer):
    def __init__(self):
        super().__init__(Site(8, 2, Grid(3, 4), 0, 0, 1, "vit"))

    def forward(self, x, grid):
        return Mixed(2 * x, {"half": x.mean()})


x, grid = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)), Grid(3, 4)


def test_block_is_two_residual_branches():
    block = Block(8, Double())
    y, losses = block(x, grid)
    middle = x + 2 * block.norm1(x)
    torch.testing.assert_close(y, middle + block.mlp(block.norm2(middle)))
    torch.testing.assert_close(losses["half"], block.norm1(x).mean())


def test_no_mlp():
    block = Block(8, Double(), mlp_ratio=0)
    torch.testing.assert_close(block(x, grid)[0], x + 2 * block.norm1(x))
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"norm1"}


def test_layer_scale_of_zero_closes_both_branches():
    assert torch.equal(Block(8, Double(), layer_scale=0.0)(x, grid)[0], x)
    assert isinstance(scale(8, None), nn.Identity)


def test_positions_come_before_their_branches():
    block = Block(8, Double(), position=ConvPosition(8), mlp_position=ConvPosition(8))
    first = block.position(x, grid)
    second = block.mlp_position(first + 2 * block.norm1(first), grid)
    torch.testing.assert_close(block(x, grid)[0], second + block.mlp(block.norm2(second)))


def test_convnext_block_is_one_residual_branch():
    block = ConvNeXtBlock(8, Double(), layer_scale=0.5)
    torch.testing.assert_close(block(x, grid)[0], x + 0.5 * block.mlp(block.norm(2 * x)))


def test_drop_path_drops_whole_samples_in_training_only():
    block = Block(8, Double(), mlp_ratio=0, drop_path=0.5)
    torch.manual_seed(0)
    many = torch.randn(64, 12, 8)
    kept = (block.train()(many, grid)[0] != many).flatten(1)
    assert (kept.all(1) | ~kept.any(1)).all() and 10 < kept.all(1).sum() < 54
    assert (block.eval()(many, grid)[0] != many).all()


@pytest.mark.parametrize(("depth", "expected"), [(1, [0.0]), (3, [0.0, 0.1, 0.2])])
def test_drop_path_rates_grow_linearly(depth, expected):
    assert drop_path_rates(0.2, depth) == pytest.approx(expected)


def test_stage_collects_the_losses_of_its_blocks():
    stage = Stage([Block(8, Double()), Block(8, Double())])
    y, same, losses = stage(x, grid)
    assert y.shape == x.shape and same == grid and [list(loss) for loss in losses] == [["half"], ["half"]]


def test_frozen_statistics_leave_a_batch_norm_as_it_was():
    norm, batch = nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    norm(batch)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with frozen_statistics([norm]):
        inside = norm(batch + 3)
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers()) and norm.momentum == 0.1
    torch.testing.assert_close(inside, norm(batch + 3))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("dim", [8, 1032])
def test_position_and_norm_in_one_pass_or_in_two(dim):
    """Wider than the kernel goes, they are computed one after the other."""
    torch.manual_seed(0)
    position, norm, tokens = ConvPosition(dim), nn.LayerNorm(dim, eps=1e-5), torch.randn(2, 12, dim)
    x, n = position.with_norm(tokens, grid, norm)
    torch.testing.assert_close(x, position(tokens, grid))
    torch.testing.assert_close(n, norm(x))


def test_post_norm_and_a_convolution_in_the_mlp():
    torch.manual_seed(0)
    block = Block(8, Double(), mlp_kernel=3, post_norm=True)
    middle = block.norm1(3 * x)
    hidden = block.mlp.fc1(middle).transpose(1, 2).unflatten(2, grid[:2])
    hidden = nn.functional.gelu(block.mlp.conv(hidden)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(x, grid)[0], block.norm2(middle + block.mlp.fc2(hidden)))
