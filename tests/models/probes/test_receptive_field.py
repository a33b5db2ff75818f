"""How far a token reaches: exactly as far as convolutions, windows and whole attention do."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model, list_models
from models.probes.receptive_field import Field, field_of, fields_of, figures_of, receptive_field

NONE = ("dit", "perceiver")  # without a map of their own
SMALL = [name for name in list_models() if name.endswith("_32px") and not any(word in name for word in NONE)]


@pytest.fixture
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return ImageData(Digits(), 10, 32, batch_size=16, workers=0)


@pytest.mark.parametrize(("layers", "side"), [(1, 3), (3, 7)])
def test_the_field_of_convolutions_is_theirs(layers, side):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers)))
    images = torch.randn(2, 3, 15, 15, requires_grad=True)
    found = field_of(model(images), images)
    expected = torch.zeros(15, 15, dtype=torch.bool)
    expected[7 - side // 2 : 8 + side // 2, 7 - side // 2 : 8 + side // 2] = True
    assert torch.equal(found.gradient_HW > 0, expected) and found.centre == (7, 7)
    figures = figures_of(found)
    assert (figures["height"], figures["width"]) == (side, side) and figures["reached"] == side**2 / 225
    assert 0 <= figures["radius_50"] <= figures["radius_95"] <= side / 2 * 2**0.5


def test_a_radius_holds_its_share():
    """A gradient of one half at the place, of one tenth each at the four neighbours and at one pixel far away."""
    gradient = torch.zeros(9, 9, dtype=torch.float64)
    gradient[4, 4] = 0.5
    gradient[3, 4] = gradient[5, 4] = gradient[4, 3] = gradient[4, 5] = gradient[4, 8] = 0.1
    figures = figures_of(Field(gradient, (4.0, 4.0)))
    assert (figures["radius_50"], figures["radius_95"]) == (0.0, 4.0)
    assert (figures["height"], figures["width"]) == (3, 4)


def test_a_norm_behind_the_map_hides_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8, affine=False))
    images = torch.randn(1, 3, 9, 9, requires_grad=True)
    assert float(field_of(model(images), images).gradient_HW.max()) > 1e-3


def test_models_reach_as_far_as_their_mixers():
    """One 7×7 convolution of patches of a few pixels; all of the image."""
    convnext = create_model("convnext_32px", depths=[1, 1, 1, 1], num_classes=2, image_size=64).eval()
    figures = figures_of(fields_of(convnext, torch.randn(1, 3, 64, 64))["stage 0"])
    assert (figures["height"], figures["width"]) == (7 * convnext.strides[0],) * 2
    vit = create_model("vit_32px", num_classes=2).eval()
    figures = figures_of(fields_of(vit, torch.randn(1, 3, 32, 32))["stage 0"])
    assert figures["reached"] == 1.0 and (figures["height"], figures["width"]) == (32, 32)


def test_the_report_of_a_model(digits, trainer):
    model = create_model("vit_32px", num_classes=10, attention="window").eval()
    report = receptive_field(model, digits, trainer, images=2, point=[0, 1])
    assert [row["stage"] for row in report.tables["stages"]] == [f"stage {i}" for i in range(4)]
    assert report.lines == ["mean of 2 images; the token at 0.00 from the left, 1.00 from the top"]
    assert report.tables["shares"][-1]["stage 0"] == pytest.approx(1.0) and set(report.captions) == set(report.pictures)
    assert report.tables["shares"][0]["radius"] == 0 and report.figures["stage 0/height"] < 32


@pytest.mark.full
@pytest.mark.parametrize("name", [*SMALL, "timm/resnet10t"])
def test_every_backbone(name, digits, trainer):
    model = create_model(name, num_classes=10).eval()
    figures = receptive_field(model, digits, trainer, images=1).figures
    radii = [value for key, value in figures.items() if key.endswith("radius_95")]
    stages = len(model.stages) if hasattr(model, "stages") else 2  # timm's have other names for theirs
    assert len(radii) >= min(2, stages) and min(radii) > 0


def test_what_cannot_be_looked_at_is_said_before_work(digits):
    for name, given, said in (
        (
            "vit_32px",
            {"point": [2, 0]},
            "probe: point must be two fractions from 0 to 1, from the left and from the",
        ),
        ("dit_s_2", {}, "receptive_field: DiT has no maps of its stages; choose a classifier, e.g. vit_tiny"),
    ):
        model = create_model(name, num_classes=10, depth=1, image_size=32)
        with pytest.raises(UserError) as error:
            receptive_field(model, digits, None, **given)
        assert str(error.value).startswith(said)
