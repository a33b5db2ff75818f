"""PVT: the sizes of the paper, what a stage begins with, class token or mean, the three kinds of last norm."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.softmax import softmax_attention
from models.backbones.base import Pyramid
from models.backbones.pvt import PVT
from models.layers.tokens import to_map, to_tokens

# millions of parameters and billions of multiply-adds at 224 pixels, table 2 of the paper
SIZES = {"pvt_tiny": (13.2, 1.9), "pvt_small": (24.5, 3.8), "pvt_medium": (44.2, 6.7), "pvt_large": (61.4, 9.8)}
SHAPE = {"dims": (8, 12, 16), "depths": (1, 2, 1), "num_heads": (1, 2, 2), "mlp_ratios": (2, 2, 1)}
small = partial(PVT, partial(softmax_attention, sr_ratio=[4, 2, 1]), 32, 5, **SHAPE)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds(name):
    """As recorded, which tests/models/test_tables.py counts."""
    counted = families.models()[name]["counted"]
    assert (round(counted["parameters"] / 1e6, 1), round(counted["multiply_adds"] / 1e9, 1)) == SIZES[name]


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
@torch.no_grad()
def test_stages_begin_with_patches_token_and_table(size):
    """Section 3.2 step by step: patches, norm, position, blocks; the class token joins in the last stage."""
    torch.manual_seed(0)
    model = small().eval()
    x, stride, grid = images(*size), 4, Grid(*size)
    for s, stage in enumerate(model.stages):
        embed, norm, start = (
            (stage.downsample.conv, stage.downsample.out_norm, stage.downsample.start)
            if s
            else (model.stem.patch_embed.proj, model.stem.patch_embed.norm, model.stem.start)
        )
        y = F.conv2d(x, embed.weight, embed.bias, stride=2 if s else 4)
        grid = Grid(*y.shape[2:])
        table = start.position.table
        token, rows = (table[:, :1], table[:, 1:]) if s == 2 else (None, table)
        side = 32 // stride
        rows = F.interpolate(to_map(rows, Grid(side, side)), grid[:2], mode="bilinear", align_corners=False)
        tokens = norm(to_tokens(y)) + to_tokens(rows)
        if token is not None:
            tokens, grid = torch.cat([(start.class_token + token).expand(2, 1, -1), tokens], 1), grid._replace(prefix=1)
        for block in stage.blocks:
            tokens, _ = block(tokens, grid)
        x, stride = to_map(tokens, grid), 2 * stride
    expected = model.head(model.norm(tokens)[:, 0])
    torch.testing.assert_close(model(images(*size)), expected, rtol=1e-4, atol=1e-5)


def test_a_class_token_stands_in_front_of_the_last_map_alone(recorder):
    model = PVT(recorder, (32, 40), 5, **SHAPE)
    assert [site.grid for site in recorder.sites] == [Grid(8, 10), Grid(4, 5), Grid(4, 5), Grid(2, 3, 1)]
    assert model.forward_features(images(32, 40)).shape == (2, 1 + 2 * 3, 16)
    assert [m.shape for m in model.forward_pyramid(images(32, 40))] == [(2, 8, 8, 10), (2, 12, 4, 5), (2, 16, 2, 3)]


def test_mean_without_a_class_token(recorder):
    model = PVT(recorder, 32, 5, class_token=False, **SHAPE).eval()
    assert {site.grid.prefix for site in recorder.sites} == {0}
    tokens = model.forward_features(images(32, 32))
    assert tokens.shape == (2, 4, 16) and not any("class_token" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(images(32, 32)), model.head(tokens.mean(1)))


@pytest.mark.parametrize("class_token", [True, False])
def test_no_last_norm_and_an_unused_one_give_the_same(class_token):
    models = []
    for norm in ("none", "unused", "used"):
        torch.manual_seed(0)
        models.append(small(norm=norm, class_token=class_token).eval())
    none, unused, used = models
    assert torch.equal(none(images(32, 32)), unused(images(32, 32)))
    assert not torch.allclose(none(images(32, 32)), used(images(32, 32)))
    assert set(unused.state_dict()) == set(used.state_dict()) == set(none.state_dict()) | {"norm.weight", "norm.bias"}


def test_an_unused_norm_is_frozen_and_everything_else_learns():
    model = small(norm="unused").train()
    model(images(32, 32)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"norm.weight", "norm.bias"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_position_tables_decay_and_class_tokens_do_not():
    model = small()
    assert model.no_weight_decay() == Pyramid(model).no_weight_decay() == {"stages.2.downsample.start.class_token"}
    assert "stages.2.downsample.start.position.table" in dict(model.named_parameters())


def test_attention_without_class_tokens_is_refused_in_the_last_stage():
    with pytest.raises(ValueError) as error, torch.device("meta"):
        create_model("pvt_tiny", attention="window")
    assert "2 of 8 places" in str(error.value)
    assert "stage 3 blocks 0-1 (dim 512, heads 8, grid 7x7+1, hierarchical)" in str(error.value)
    assert "set model.class_token=false" in str(error.value)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r"PVT: norm must be one of used, none, unused, got 'last'; set model.norm"):
        small(norm="last")


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"PVT: .*differ in length, got .*'mlp_ratios': 2.*; give as many of each"):
        small(mlp_ratios=(4, 4))
