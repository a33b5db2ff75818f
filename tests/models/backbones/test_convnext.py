"""ConvNeXt: equal to timm's without attention; which stages get the chosen attention, and in which block."""

from functools import partial

import pytest
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt

from models import create_model
from models.attention import Grid
from models.attention.conv import conv
from models.attention.softmax import softmax_attention
from models.backbones.convnext import ConvNeXt
from models.layers.block import Block
from models.layers.convnext_block import ConvNeXtBlock

RULES = [
    (r"^stem\.0\.", "stem.patch_embed.proj."),
    (r"^stem\.1\.", "stem.patch_embed.norm."),
    (r"\.downsample\.0\.", ".downsample.norm."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.conv_dw\.", ".attn.proj."),
    (r"\.gamma$", ".scale.gamma"),
    (r"^head\.norm\.", "head_norm."),
    (r"^head\.fc\.", "head."),
]
small = partial(ConvNeXt, convolution=conv, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), head_dim=8)


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@pytest.mark.parametrize("stages", [(0,), (2, 3), (0, 1, 2, 3)])
def test_equals_timm_without_attention(assert_same, size, stages):
    theirs = TimmConvNeXt(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), num_classes=5)
    assert_same(small(conv, 64, 5, attention_stages=stages, layer_scale=1e-6), theirs, RULES, size)


def test_parameters_of_the_tiny_size():
    with torch.device("meta"):
        ours = create_model("convnext_tiny")
    assert sum(p.numel() for p in ours.parameters()) == 28_589_128  # timm's convnext_tiny


def test_layer_scale_starts_at_its_value():
    small_tiny = create_model("convnext_tiny", dims=[16, 32, 48, 64], depths=[1, 1, 2, 1], head_dim=8)
    gammas = [p for name, p in small_tiny.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 5 and all((gamma == 1e-6).all() for gamma in gammas)
    assert not any(name.endswith("gamma") for name, _ in small(conv, 64, 5).named_parameters())


def test_attention_replaces_the_convolution_of_the_chosen_stages(recorder):
    model = small(recorder, 64, 5, attention_stages=(1, 3))
    assert [type(stage.blocks[0]) for stage in model.stages] == [ConvNeXtBlock, Block, ConvNeXtBlock, Block]
    assert [(site.stage, site.dim, site.num_heads, site.grid, site.kind) for site in recorder.sites] == [
        (1, 32, 4, Grid(8, 8), "convnet"),
        (3, 64, 8, Grid(2, 2), "convnet"),
    ]
    assert model(torch.randn(2, 3, 50, 70)).shape == (2, 5)


def test_a_choice_of_attention_on_a_named_model_takes_effect():
    model = create_model("convnext_32px", attention="softmax")
    names = [type(stage.blocks[0].attn).__name__ for stage in model.stages]
    assert names == ["DepthwiseConv", "DepthwiseConv", "MultiHead", "MultiHead"]


@pytest.mark.parametrize("stages", [[], [4], [-1, 2]])
def test_stages_that_do_not_exist_are_refused(stages):
    with pytest.raises(
        ValueError, match=r"ConvNeXt: attention_stages must name at least one of the stages 0 to 3, got .*; set model"
    ):
        small(conv, 64, 5, attention_stages=stages)


@pytest.mark.parametrize(
    "attention", [[softmax_attention, None, conv, conv], [None, None, softmax_attention, None], [softmax_attention] * 2]
)
def test_a_list_that_does_not_go_with_the_chosen_stages_is_refused(attention):
    with pytest.raises(ValueError, match=r"ConvNeXt: a list of mechanisms has 4 entries, .*, \[2, 3\], got \d"):
        small(attention, 64, 5)


def test_a_list_gives_each_stage_its_own():
    model = small([None, None, softmax_attention, conv], 64, 5)
    names = [type(stage.blocks[0].attn).__name__ for stage in model.stages]
    assert names == ["DepthwiseConv", "DepthwiseConv", "MultiHead", "DepthwiseConv"]


def test_channels_that_do_not_make_whole_heads_are_refused(recorder):
    with pytest.raises(ValueError, match=r"ConvNeXt: 16 channels are not a multiple of head_dim, got 12; change"):
        small(recorder, 64, 5, head_dim=12)
