"""The foveated view: where it looks, what a rotation and a change of size do to it, where it stands in the pipeline."""

import math

import pytest
import torch
from torch import nn

from data.augment import Augment
from data.batch import Batch
from data.device import DeviceStage
from data.module import ImageData
from data.sources.digits import Digits
from data.view import LogPolar, seen


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("angles", [8, 24, 40])
def test_a_quarter_turn_moves_it_by_a_quarter_of_the_columns(angles):
    images, view = noise(2, 3, 32, 32), LogPolar(radii=12, angles=angles)
    plain, turned = view(images), view(images.rot90(-1, (2, 3)))  # clockwise, as angles grow
    torch.testing.assert_close(turned, plain.roll(angles // 4, -1), rtol=0, atol=1e-5)
    assert (turned - plain).abs().max() > 0.1


def test_twice_the_size_moves_it_by_rows():
    """Of a smooth picture, where r₀ = 1/8 and 7 radii have a factor of two between every other two rows."""
    y, x = (torch.linspace(-1, 1, 257),) * 2
    picture = (3 * x[None] + 1).sin() * (2 * y[:, None]).cos()
    view = LogPolar(radii=7, angles=16, smallest=1 / 8)
    large, small = view(picture[None, None, 64:193, 64:193]), view(picture[None, None])
    torch.testing.assert_close(large[..., 2:6, :], small[..., :4, :], rtol=0, atol=0.01)


def test_it_looks_where_it_says():
    view = LogPolar(radii=3, angles=4, fixation=(0.25, 0.75), smallest=0.25)
    across, down = view.places(16, 32).unbind(-1)
    distance = torch.tensor([0.25, 0.5, 1.0])
    torch.testing.assert_close(across[:, 0], -0.5 + distance * 8 / 16)
    torch.testing.assert_close(down[:, 1], 0.5 + distance)
    torch.testing.assert_close(across[:, 1], torch.full((3,), -0.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(across[:, 2], -0.5 - distance * 8 / 16)
    outside = view(torch.ones(1, 1, 16, 32))
    assert outside[0, 0, 2, 1] == 0 and outside[0, 0, 0, 3] == 1, "below the image there is nothing"


def test_a_convolution_sees_the_circle_with_columns_that_repeat():
    """One column each side makes a 3×3 convolution turn with the image; without it does not."""
    images, conv = noise(1, 3, 32, 32), nn.Conv2d(3, 4, 3, padding=(1, 0))
    padded = nn.Conv2d(3, 4, 3, padding=1)
    padded.load_state_dict(conv.state_dict())

    def both(wrap: int, net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        view = LogPolar(radii=8, angles=16, wrap=wrap)
        return net(view(images)).roll(4, -1), net(view(images.rot90(-1, (2, 3))))

    torch.testing.assert_close(*both(1, conv), rtol=0, atol=1e-5)
    plain, turned = both(0, padded)
    assert (plain - turned).abs().max() > 0.01
    view = LogPolar(angles=16, wrap=3)(images)
    assert view.shape == (1, 3, 32, 22)
    torch.testing.assert_close(view[..., :6], view[..., -6:], rtol=0, atol=1e-5)


def test_it_is_the_last_step_in_training_and_evaluation():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch, view = Batch(images, torch.arange(4), torch.arange(4), 0, 0), LogPolar(radii=6, angles=20)
    for training in (True, False):
        given = ((0.5,) * 3, (0.5,) * 3, Augment(mixup=0.8, erasing=1.0), 5, 0)
        plain, viewed = (DeviceStage(*given, view=v)(batch, training) for v in (None, view))
        assert torch.equal(viewed.images, view(plain.images)) and torch.equal(viewed.labels, plain.labels)
        assert viewed.images.is_contiguous(memory_format=torch.channels_last)


def test_the_size_that_a_model_sees():
    assert seen(None, 32) == 32 and seen(LogPolar(), 32) == (32, 32)
    data = ImageData(Digits(), 10, 32, batch_size=4, workers=0, view={"name": "logpolar", "radii": 16, "wrap": 2})
    assert data.image_size == (16, 36) and data.crop_size == 32
    assert data.evaluated([0, 1]).images.shape == (2, 3, 16, 36)
    assert math.isclose(data.view.smallest, 0.05)


@pytest.mark.parametrize(
    ("view", "text"),
    [
        ("polar", r"data.view: must be logpolar, or a mapping .*, got 'polar'; set data.view=logpolar or null"),
        ({"angles": 3}, r"data.view: must be logpolar, or a mapping with name: logpolar and its options, got None"),
        ({"name": "logpolar", "angels": 3}, r"data.view: wrong configuration, got unknown key angels, known are rad"),
        ({"name": "logpolar", "radii": 1}, r"got radii=1, expected a whole number from 2 or null; see data/view.py"),
        ({"name": "logpolar", "fixation": [2, 0]}, r"fixation=\(2, 0\), expected shares from the left and from the"),
        ({"name": "logpolar", "smallest": 1}, r"smallest=1, expected a distance between 0 and 1"),
        ({"name": "logpolar", "angles": 4, "wrap": 5}, r"wrap=5, expected a whole number from 0, at most as many"),
    ],
)
def test_wrong_views_are_named(view, text):
    with pytest.raises(ValueError, match=text):
        ImageData(Digits(), 10, 32, batch_size=4, view=view)


def test_label_maps_do_not_follow_it():
    data = ImageData(Digits(), 10, 32, batch_size=4, workers=0, view="logpolar", token_labels="maps")
    with pytest.raises(ValueError, match=r"data.view: got logpolar, but label maps .* do not follow it; set data.v"):
        data.check()
