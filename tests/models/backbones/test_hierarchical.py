"""What hierarchical families share: a family is its blocks and its downsampling, and no option goes unnoticed."""

import pytest
import torch
from torch import nn

from models import create_model
from models.attention import Grid
from models.backbones.hierarchical import Hierarchical
from models.layers.downsample import PatchMerging

SHAPE = {"dims": (8, 16), "depths": (2, 1), "num_heads": (2, 4)}


class Merging(Hierarchical):
    """The shortest family: patches, plain blocks, and 2×2 tokens side by side."""

    def between(self, s: int) -> nn.Module:
        return PatchMerging(*self.channels[s - 1 : s + 1])


class Pooled(Merging):
    norm_pooled, last_prefix, positioned, kind = True, 1, True, "convnet"
    order = ("stages", "stem")


def test_a_family_is_what_lies_between_its_stages(recorder):
    model = Merging(recorder, (20, 36), 3, **SHAPE, patch_size=2, mlp_ratio=3.0, drop_path=0.2, layer_scale=0.5)
    assert (model.channels, model.strides) == ([8, 16], [2, 4])
    assert [(s.stage, s.block, s.depth, s.dim, s.num_heads, s.grid, s.kind, s.positioned) for s in recorder.sites] == [
        (0, 0, 2, 8, 2, Grid(10, 18), "hierarchical", False),
        (0, 1, 2, 8, 2, Grid(10, 18), "hierarchical", False),
        (1, 0, 1, 16, 4, Grid(5, 9), "hierarchical", False),
    ]
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0.0, 0.1, 0.2])
    assert [block.mlp.fc1.out_features for block in blocks] == [24, 24, 48]
    assert all((block.scale1.gamma == 0.5).all() for block in blocks)
    assert [name for name, _ in model.named_children()] == ["stem", "stages", "norm", "head"]


def test_attributes_of_a_family(recorder):
    model = Pooled(recorder, 16, 0, **SHAPE)
    assert [(s.grid.prefix, s.kind, s.positioned) for s in recorder.sites] == [
        (0, "convnet", True),
        (0, "convnet", True),
        (1, "convnet", True),
    ]
    assert [name for name, _ in model.named_children()] == ["stages", "stem", "norm", "head_norm", "head"]
    x_BNC = torch.randn(2, 4, 16)
    assert isinstance(model.norm, nn.Identity)
    assert torch.equal(model.pool(x_BNC, Grid(2, 2)), model.head_norm(x_BNC.mean(1)))


def test_mlps_of_one_ratio_or_one_per_stage(recorder):
    model = Merging(recorder, 16, 3, **SHAPE, mlp_ratio=[2, 5])
    assert [stage.blocks[0].mlp.fc1.out_features for stage in model.stages] == [16, 80]
    with pytest.raises(ValueError, match=r"Merging: .* differ in length, got .*'mlp_ratios': 3\}; give as many"):
        Merging(recorder, 16, 3, **SHAPE, mlp_ratio=[2, 5, 5])


@pytest.mark.parametrize("name", ["cswin_32px", "davit_32px", "biformer_32px", "coatnet_32px"])
def test_a_stem_of_one_stride_takes_no_other(name):
    """`create_model` knows what the table has; the constructor says it of itself."""
    with pytest.raises(ValueError, match=f"{name} has no setting 'patch_size'"):
        create_model(name, patch_size=2)
    kind = type(create_model(name))
    with pytest.raises(ValueError, match=rf"{kind.__name__}: patch_size must be 4, got 2; leave it out"):
        options = {"strides": (2, 2), "attention_stages": (1,), "head_dim": 8} if name.startswith("coatnet") else {}
        shape = {key: value for key, value in SHAPE.items() if key != "num_heads" or not options}
        kind(None, 32, 3, **shape, **options, patch_size=2)


@pytest.mark.parametrize("name", ["pvt_32px", "convnext_32px", "davit_32px", "transnext_32px"])
def test_unknown_options_are_refused_by_every_constructor(name):
    kind = type(create_model(name))
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        own = {"PVT": {"mlp_ratios": (4, 4)}, "TransNeXt": {"mlp_ratios": (4, 4)}, "ConvNeXt": {"convolution": None}}
        shape = {key: value for key, value in SHAPE.items() if key != "num_heads" or name != "convnext_32px"}
        options = {"attention_stages": (1,), "head_dim": 8} if name == "convnext_32px" else {}
        kind(None, 32, 3, **shape, **options, **own.get(kind.__name__, {}), windows=3)


def test_a_family_without_a_downsampling_cannot_be_made(recorder):
    with pytest.raises(TypeError, match=r"abstract method '?between"):
        Hierarchical(recorder, 16, 3, **SHAPE)
