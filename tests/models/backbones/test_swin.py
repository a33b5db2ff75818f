"""Swin: equal to timm's with the same weights; where its mixers go; what it refuses."""

from functools import partial

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

from models import create_model
from models.attention import Grid
from models.attention.softmax import softmax_attention
from models.backbones.swin import Swin

RULES = [
    (r"^patch_embed\.", "stem.patch_embed."),
    (r"^layers\.", "stages."),
    (r"relative_position_bias_table$", "core.bias.table"),
    (r"^head\.fc\.", "head."),
]


def pair_of_models(depths: tuple[int, ...], window: int, image_size: int = 64) -> tuple[Swin, SwinTransformer]:
    dims, heads = [24 << s for s in range(len(depths))], [2 << s for s in range(len(depths))]
    attention = partial(softmax_attention, window=window, shift=True, relative_position_bias=True)
    ours = Swin(attention, image_size, 5, dims=dims, depths=depths, num_heads=heads)
    theirs = SwinTransformer(
        img_size=image_size,
        window_size=window,
        embed_dim=24,
        depths=depths,
        num_heads=heads,
        num_classes=5,
        strict_img_size=False,
        drop_path_rate=0.0,
    )
    return ours, theirs


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 96)])
def test_equals_timm_with_shifted_windows(assert_same, size):
    # maps of whole windows; timm rolls before it pads, the authors' code and ours pad first
    assert_same(*pair_of_models((2, 2, 3, 1), window=2), RULES, size)


@pytest.mark.parametrize("size", [(64, 64), (60, 52), (84, 36)])
def test_equals_timm_on_odd_maps(assert_same, size):
    assert_same(*pair_of_models((1, 1, 1, 1), window=3), RULES, size)


def test_equals_timm_when_a_window_covers_the_map(assert_same):
    assert_same(*pair_of_models((2, 2), window=7, image_size=28), RULES, (28, 28))


def test_parameters_of_the_tiny_size():
    with torch.device("meta"):
        ours = create_model("swin_tiny")
    assert sum(p.numel() for p in ours.parameters()) == 28_288_354  # timm's swin_tiny_patch4_window7_224


def test_sites_tell_where_a_mixer_goes(recorder):
    Swin(recorder, (64, 100), 5, dims=(8, 16), depths=(2, 1), num_heads=(2, 4))
    assert [site[:2] for site in recorder.sites] == [(8, 2), (8, 2), (16, 4)]
    assert [site.grid for site in recorder.sites] == [Grid(16, 25), Grid(16, 25), Grid(8, 13)]
    assert [site[3:7] for site in recorder.sites] == [
        (0, 0, 2, "hierarchical"),
        (0, 1, 2, "hierarchical"),
        (1, 0, 1, "hierarchical"),
    ]


def test_one_mechanism_per_stage(recorder):
    windows = partial(softmax_attention, window=2)
    model = Swin([windows, recorder], 16, 5, patch_size=2, dims=(8, 16), depths=(1, 2), num_heads=(2, 4))
    assert [site.stage for site in recorder.sites] == [1, 1]
    assert model.stages[0].blocks[0].attn.window == (2, 2)


def test_lists_of_unequal_length_are_refused(recorder):
    with pytest.raises(ValueError, match=r"Swin: .*differ in length, got .*'depths': 3.*; give as many of each"):
        Swin(recorder, 32, 5, dims=(8, 16), depths=(1, 1, 1), num_heads=(1, 2))


def test_stages_without_blocks_are_refused(recorder):
    with pytest.raises(ValueError, match=r"Swin: depths must be at least 1 in every stage, got \[1, 0\]; set"):
        Swin(recorder, 32, 5, dims=(8, 16), depths=(1, 0), num_heads=(1, 2))
