"""What cannot go together of a model and its data is refused before a run, with both settings named."""

import pytest
import torch
from torch import nn

from data.module import ImageData
from data.sources.fake import Fake
from models import create_model
from models.cost import image_channels
from models.tasks.classification import Classification
from models.tasks.fit import check_fits


def images(size=8, **changes):
    given = {"num_classes": 3, "image_size": size, "batch_size": 4, "drop_last": False, **changes}
    return ImageData(Fake(3, train_images=9, val_images=3), **given)


class Pooled(nn.Module):
    """A batch norm on a map of a quarter of the image's sides."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.norm, self.pooled = nn.BatchNorm2d(4), pooled

    def forward(self, x):
        x = self.stem(x)
        return self.norm(x.mean((2, 3), keepdim=True) if self.pooled else x)


@pytest.mark.parametrize("name", ["vit_32px", "coatnet_32px", "pvt_v2_b0", "davit_tiny", "biformer_tiny"])
def test_channels_follow_the_data_or_are_refused(name):
    sizes = {} if name.endswith("32px") else {"depths": [1, 1, 1, 1]}
    model = create_model(name, "softmax", in_channels=2, num_classes=3, image_size=32, **sizes)
    assert image_channels(model) == 2 and model.num_classes == 3
    with pytest.raises(
        ValueError, match=r"task: the model takes images of 2 channel\(s\), the data has 3; set model.in"
    ):
        check_fits(model.eval(), images(32))


@pytest.mark.parametrize("classes", [2, 5])
def test_the_model_has_the_classes_of_the_data(classes):
    with pytest.raises(
        ValueError, match=f"names one of {classes} classes, the data has 3; set model.num_classes=3, or"
    ):
        Classification(create_model("vit_32px", num_classes=classes), {}, {}, 3)
    Classification(create_model("vit_32px", num_classes=3, head="tversky"), {}, {}, 3)


def test_a_batch_norm_is_not_trained_on_one_value():
    model = Pooled(True)
    with pytest.raises(
        ValueError, match=r"batch norm of Pooled .* 9 images in batches of 4, .* set data.drop_last=true"
    ):
        check_fits(model, images())
    with pytest.raises(ValueError, match=r"set data.batch_size=2 or more"):
        check_fits(model, images(batch_size=1))
    for data in (images(batch_size=5), images(drop_last=True)):
        check_fits(model, data)
    check_fits(model.eval(), images())


def test_a_batch_norm_on_a_larger_map_trains_on_one_image_and_is_not_changed_by_the_trial():
    model, state = Pooled(False), torch.get_rng_state()
    check_fits(model, images())
    assert torch.equal(model.norm.running_mean, torch.zeros(4)) and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="batch norm"):
        check_fits(model, images(4))  # a map of one cell


def test_rectangles_are_trained_and_evaluated(command):
    small = ("model=vit_32px", "data=fake", "logger=none", "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    status, out, err = command("train", *small, "augment=light", "image_size=[32,48]", "run.name=r")
    assert status == 0, err
    assert "images of 32 x 48 px" in out
    status, out, err = command("eval", "ckpt=outputs/r/checkpoints/last")
    assert status == 0, err


@pytest.mark.parametrize(
    ("change", "message"),
    [("model.in_channels=1", "takes images of 1 channel"), ("model.num_classes=2", "names one of 2 classes")],
)
def test_contradictions_are_refused_before_a_run(command, change, message):
    status, _, err = command("train", "model=vit_32px", "debug=fast", change)
    assert status == 2 and message in err and "Traceback" not in err


def test_generation_takes_8_bit_rgb_alone():
    from models.tasks.generation import check_images

    plain = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    check_images(images(**plain))
    for form in ({"channels": 1}, {"depth": "float32"}):
        with pytest.raises(
            ValueError, match=r"generation works on 8-bit RGB images, got data.channels=.*; set data.ch"
        ):
            check_images(images(**plain, **form))
