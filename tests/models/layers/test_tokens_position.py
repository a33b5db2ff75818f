"""Tokens and maps, patches, position tables and the convolutional encoding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.attention import Grid
from models.layers.patch_embed import PatchEmbed, cells
from models.layers.position import ConvPosition, LearnedPosition
from models.layers.tokens import completed, to_map, to_tokens


def test_tokens_of_a_map_are_row_major_after_the_prefix():
    x, grid = torch.randn(2, 2 + 12, 5), Grid(3, 4, 2)
    image = to_map(x, grid)
    assert torch.equal(image[:, :, 1, 3], x[:, 2 + 1 * 4 + 3])
    assert image.data_ptr() == x[:, 2:].data_ptr()
    assert torch.equal(to_tokens(image, x[:, :2]), x)
    assert torch.equal(to_tokens(image), x[:, 2:])


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 1)])
def test_patches_cover_the_whole_image(size):
    torch.manual_seed(0)
    embed, images = PatchEmbed(3, 6, 4, norm=nn.LayerNorm(6)), torch.randn(2, 3, *size)
    x, grid = embed(images)
    assert grid == cells(size, 4)
    padded = F.pad(images, (0, -size[1] % 4, 0, -size[0] % 4))
    torch.testing.assert_close(x, embed.norm(to_tokens(embed.proj(padded))))


@pytest.mark.parametrize(("stride", "kernel_size", "padding"), [(4, 7, 3), (4, 7, 2), (2, 3, 1)])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (6, 5), (1, 1)])
def test_overlapping_patches_have_as_many_cells_and_miss_no_pixel(size, stride, kernel_size, padding):
    torch.manual_seed(0)
    embed = PatchEmbed(1, 8, stride, kernel_size=kernel_size, padding=padding)
    images = torch.randn(4, 1, *size, requires_grad=True)
    x, grid = embed(images)
    assert grid == cells(size, stride)
    x.square().sum().backward()
    assert (images.grad.abs().sum((0, 1)) > 0).all()


def test_a_table_is_added_as_it_is_on_its_own_map():
    position, x = LearnedPosition(5, Grid(3, 4, 1)), torch.randn(2, 13, 5)
    torch.testing.assert_close(position(x, Grid(3, 4, 1)), x + position.table)


def test_a_table_is_resized_for_another_map_and_the_prefix_is_not():
    position = LearnedPosition(5, Grid(4, 6, 1))
    with torch.no_grad():
        rows = torch.linspace(-1, 1, 4)[:, None, None].expand(4, 6, 5)
        position.table[0, 1:] = rows.reshape(24, 5)
    added = position(torch.zeros(1, 1 + 8 * 3, 5), Grid(8, 3, 1))
    assert torch.equal(added[:, :1], position.table[:, :1])
    resized = to_map(added, Grid(8, 3, 1))[0, 0]
    assert (resized.diff(dim=0) > 0).all()  # rows stay rows: it grows downwards
    torch.testing.assert_close(resized, resized[:, :1].expand(8, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 3), (3, 4), (4, 6)])
def test_a_bilinear_table_is_resized_as_by_the_authors_of_pvt(size):
    position, grid = LearnedPosition(5, Grid(4, 6, 1), mode="bilinear"), Grid(*size, 1)
    table = to_map(position.table, Grid(4, 6, 1))
    expected = to_tokens(F.interpolate(table, size, mode="bilinear", align_corners=False), position.table[:, :1])
    torch.testing.assert_close(position(torch.zeros(1, grid.tokens, 5), grid), expected)


def test_an_unknown_way_to_resize_is_refused():
    with pytest.raises(ValueError, match=r"LearnedPosition: mode is unknown, got 'nearest'; use bicubic or bilinear"):
        LearnedPosition(5, Grid(4, 6), mode="nearest")


def test_conv_position_adds_to_the_map_alone():
    torch.manual_seed(0)
    position, x, grid = ConvPosition(5), torch.randn(2, 1 + 12, 5), Grid(3, 4, 1)
    y = position(x, grid)
    assert torch.equal(y[:, :1], x[:, :1])
    torch.testing.assert_close(y[:, 1:], x[:, 1:] + to_tokens(position.proj(to_map(x, grid))))


def test_a_map_is_copied_only_where_zeros_are_added():
    x = torch.randn(1, 2, 4, 5)
    assert completed(x, (0, 0, 0, 0)) is x
    assert torch.equal(completed(x, (0, 1, 0, 2)), torch.nn.functional.pad(x, (0, 1, 0, 2)))
