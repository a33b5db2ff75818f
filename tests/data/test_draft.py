"""JPEGs decoded smaller: the same crop, nearly the same pixels, and never in evaluation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import UserError
from data.augment import Augment
from data.dataset import Samples
from data.module import ImageData
from data.order.sampler import Draw
from data.sources.decode import before_decoding, read_image
from data.sources.imagefolder import FolderSplit, ImageFolder
from data.transforms import TrainTransform

MEAN = (0.485, 0.456, 0.406)


@pytest.fixture
def photos(tmp_path):
    """`root/{train,val}/{a,b}/*`: JPEGs and a PNG of 400 x 300 pixels, smooth."""
    for part in ("train", "val"):
        for seed, name in enumerate(("a/0.jpg", "a/1.jpg", "b/2.png", "b/3.jpg")):
            coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
            path = tmp_path / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(path)
    return tmp_path


def samples(root, size, draft, **values) -> list[torch.Tensor]:
    transform = TrainTransform(Augment.build({"draft": draft} | values), size, MEAN)
    read = Samples(FolderSplit(str(root / "train"), ["a", "b"]), transform, seed=3)
    return [sample.image.float() for sample in read.__getitems__([Draw(0, index) for index in range(4)])]


@pytest.mark.parametrize("values", [{"scale": (0.3, 1), "hflip": 0.5, "color_jitter": 0.3}, {}, {"shift": 0.2}])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_the_same_crop_of_fewer_pixels(photos, values, size):
    """All that is drawn is drawn alike; what is not a JPEG is the same bit for bit."""
    pairs = list(zip(samples(photos, size, False, **values), samples(photos, size, True, **values), strict=True))
    differences = [(exact - drafted).abs().mean() for exact, drafted in pairs]
    assert max(differences) < 4  # of 255
    assert differences[2] == 0 and sum(difference > 0 for difference in differences) == 3


def test_where_all_pixels_are_needed_nothing_changes(photos):
    values = {"scale": (0.2, 0.6)}
    pairs = zip(samples(photos, 280, False, **values), samples(photos, 280, True, **values), strict=True)
    assert all(torch.equal(exact, drafted) for exact, drafted in pairs)


def test_a_crop_never_has_fewer_pixels_than_the_model_sees(photos):
    size, seen = 40, []
    transform = TrainTransform(Augment.build({"draft": True, "scale": (0.1, 1)}), size, MEAN)

    def look(image):
        transform.look(image)
        (width, height), box = transform.steps[0]._drawn
        seen.append((image.width / width * box["width"], image.height / height * box["height"], image.width))

    for seed in range(20):
        torch.manual_seed(seed)
        with before_decoding(look):
            transform(read_image(photos / "train/a/0.jpg"))
    assert all(min(side) >= size - 1 for *side, _ in seen) and len({width for *_, width in seen}) > 1


def test_images_without_a_file_are_cut_as_ever():
    image = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))
    found = []
    for draft in (False, True):
        torch.manual_seed(1)
        found.append(TrainTransform(Augment.build({"draft": draft, "scale": (0.3, 1)}), 16, MEAN)(image))
    assert torch.equal(*found)


def test_evaluation_is_untouched(photos):
    def evaluated(draft: bool) -> list[torch.Tensor]:
        augment = {"draft": draft, "scale": [0.3, 1.0]}
        data = ImageData(ImageFolder(photos), 2, 32, 2, augment=augment, workers=0, root=str(photos))
        next(iter(data.train_dataloader()))
        return [batch.images for batch in data.val_dataloader()]

    assert all(torch.equal(a, b) for a, b in zip(evaluated(False), evaluated(True), strict=True))
    data = io.BytesIO()
    Image.new("RGB", (400, 300)).save(data, "JPEG")
    assert read_image(data.getvalue()).size == (400, 300)


def test_what_it_cannot_be_combined_with_is_said(photos):
    with pytest.raises(UserError, match=r"draft='yes', expected true or false"):
        Augment.build({"draft": "yes"})
    data = ImageData(ImageFolder(photos), 2, 32, 2, augment={"draft": True}, depth="uint16", root=str(photos))
    with pytest.raises(UserError, match=r"augment\.draft: it takes 8-bit RGB images, got .*; set augment\.draft=false"):
        data.check()
