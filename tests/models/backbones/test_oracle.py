"""The comparison with timm finds what it is for: an error of one percent in one weight of a model."""

import pytest
from timm.models.convnext import ConvNeXt

from tests.models.backbones import oracle

SMALL = {"dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "head_dim": 8, "attention": "conv"}


def small() -> ConvNeXt:
    return ConvNeXt(depths=SMALL["depths"], dims=SMALL["dims"])


def test_equal_models_are_equal():
    oracle.equal("convnext_tiny", small(), 64, at=(96, 64), **SMALL)


@pytest.mark.parametrize(
    "place", ["stages.2.blocks.1.mlp.fc1.weight", "stages.1.blocks.0.scale.gamma", "stem.patch_embed.norm.bias"]
)
def test_an_error_of_one_percent_is_found(monkeypatch, place):
    right = oracle.convert

    def wrong(*given, **settings):
        weights = right(*given, **settings)
        return weights | {place: weights[place] * 1.01}

    monkeypatch.setattr(oracle, "convert", wrong)
    with pytest.raises(AssertionError, match="logits differ by"):
        oracle.equal("convnext_tiny", small(), 64, **SMALL)
