"""ViT: equal to timm's with the same weights; class token or mean; where its mixers go."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from models import create_model
from models.attention import Grid, Site
from models.attention.softmax import softmax_attention
from models.backbones.vit import ViT

RULES = [
    (r"^cls_token$", "stem.class_token"),
    (r"^pos_embed$", "stem.position.table"),
    (r"^patch_embed\.", "stem.patch_embed."),
    (r"^blocks\.(\d+)\.", r"stages.\1.blocks.0."),
]
small = partial(ViT, softmax_attention, 32, 5, patch_size=8, dim=48, depth=4, num_heads=3)


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (64, 96)])
def test_equals_timm(assert_same, size):
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5, dynamic_img_size=True
    )
    assert_same(small(), theirs, RULES, size)


def test_parameters_of_the_tiny_size():
    with torch.device("meta"):
        ours = create_model("vit_tiny")
    assert sum(p.numel() for p in ours.parameters()) == 5_717_416  # timm's vit_tiny_patch16_224


def test_mean_pooling_without_a_class_token():
    model = small(class_token=False).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 16, 48)
    torch.testing.assert_close(model(images), model.head(tokens.mean(1)))


def test_the_class_token_decides():
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 17, 48)
    torch.testing.assert_close(model(images), model.head(tokens[:, 0]))


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_sites_and_pyramid_at_any_depth(recorder, depth):
    model = ViT(recorder, (32, 40), 5, patch_size=8, dim=16, depth=depth, num_heads=2)
    assert [site.block for site in recorder.sites] == list(range(depth))
    assert {site._replace(block=0) for site in recorder.sites} == {
        Site(16, 2, Grid(4, 5, 1), 0, 0, depth, "vit", image_size=(32, 40))
    }
    assert sum(len(stage.blocks) for stage in model.stages) == depth
    assert [m.shape for m in model.forward_pyramid(torch.randn(1, 3, 32, 40))] == [(1, 16, 4, 5)] * 4
