"""The CPU transforms: sizes, equality with torchvision's usual pipeline, and RandAugment on any Pillow."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torchvision.transforms import v2

from data.augment import Augment
from data.order.randomness import seed_all
from data.transforms import Evaluation, EvaluationTransform, TrainTransform, rand_augment, shift

MEAN = (0.485, 0.456, 0.406)


@pytest.fixture
def photo():
    ramp = np.add.outer(np.arange(60), np.arange(90)) % 256
    return Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], -1).astype(np.uint8))


def test_evaluation_equals_torchvision(photo):
    theirs = v2.Compose([v2.Resize(36, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()])
    ours = EvaluationTransform(Evaluation(crop_fraction=0.875), 32)
    assert torch.equal(ours(photo), theirs(photo))


@pytest.mark.parametrize(
    ("values", "shorter"),
    [
        ({}, 256),
        ({"crop_fraction": 0.9}, 248),
        ({"crop_fraction": 1}, 224),
        ({"resize": 230}, 230),
        ({"size": 288}, 329),
    ],
)
def test_evaluation_resizes_as_published_code_does(values, shorter):
    assert EvaluationTransform(Evaluation(**values), 224).target == [shorter]


@pytest.mark.parametrize(("size", "fraction", "shorter"), [(288, 0.9, 320), (252, 0.9, 280), (224, 0.7, 320)])
def test_whole_quotients_are_not_rounded_away(size, fraction, shorter):
    assert EvaluationTransform(Evaluation(crop_fraction=fraction), size).target == [shorter]


def test_a_rectangle_is_covered_and_cut_from_the_middle(photo):
    """A photo of 90 x 60 (width x height) for 32 rows of 24: rows decide, 32 / 0.875 = 36 of 60, hence 54 columns."""
    ours = EvaluationTransform(Evaluation(crop_fraction=0.875), (32, 24))(photo)
    resized = v2.functional.pil_to_tensor(photo.resize((54, 36), Image.Resampling.BICUBIC))
    assert torch.equal(ours, resized[:, 2:34, 15:39])
    squashed = EvaluationTransform(Evaluation(squash=True), (32, 24))(photo)
    assert torch.equal(squashed, v2.functional.pil_to_tensor(photo.resize((24, 32), Image.Resampling.BICUBIC)))
    assert EvaluationTransform(Evaluation(resize=64), (32, 24)).target == [85, 64]


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (8, 8), (1, 1), (300, 2)])
def test_training_gives_rectangles(size):
    for augment in (Augment(), Augment(scale=(0.08, 1.0), hflip=0.5), Augment(shift=0.125)):
        assert TrainTransform(augment, (24, 40), MEAN)(Image.new("RGB", size)).shape == (3, 24, 40)


def test_a_rectangle_sees_and_says_its_middle(photo):
    image, view = TrainTransform(Augment(), (20, 60), MEAN).with_view(photo)
    assert image.shape == (3, 20, 60) and view.box == (0, 0.25, 1, 0.75)  # 90 x 30 of 90 x 60


def test_shift_and_rand_augment_know_both_sides():
    image = Image.new("RGB", (9, 9))
    image.putpixel((4, 4), (255, 255, 255))
    random.seed(0)
    places = {tuple(np.argwhere(np.asarray(shift(image, (1, 3)))[..., 0])[0]) for _ in range(300)}
    assert places == {(y, x) for y in range(3, 6) for x in range(1, 8)}
    steps = TrainTransform(Augment(rand_augment="rand-m9"), (100, 200), MEAN).steps
    assert steps[-1].ops[0].hparams["translate_const"] == 45  # of the shorter side, as in timm


def test_squash_keeps_the_whole_image(photo):
    image = EvaluationTransform(Evaluation(squash=True, interpolation="bilinear"), 32)(photo)
    assert torch.equal(image, v2.functional.pil_to_tensor(photo.resize((32, 32), Image.Resampling.BILINEAR)))


def test_squash_and_a_centre_crop(photo):
    image = EvaluationTransform(Evaluation(squash=True, crop_fraction=0.875), 28)(photo)
    squashed = v2.functional.pil_to_tensor(photo.resize((32, 32), Image.Resampling.BICUBIC))
    assert torch.equal(image, squashed[:, 2:30, 2:30])


@pytest.mark.parametrize("augment", [{}, {"scale": (0.08, 1.0)}, {"shift": 0.125}, {"hflip": 0.5, "color_jitter": 0.4}])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (8, 8), (1, 1), (300, 2)])
def test_training_gives_uint8_of_the_image_size(augment, size):
    image = TrainTransform(Augment(**augment), 24, MEAN)(Image.new("RGB", size, "green"))
    assert image.shape == (3, 24, 24) and image.dtype == torch.uint8


def test_no_augmentation_has_no_randomness(photo):
    transform = TrainTransform(Augment(), 32, MEAN)
    assert torch.equal(transform(photo), transform(photo))


def test_shift_moves_by_whole_pixels_within_bounds():
    image = Image.new("RGB", (9, 9))
    image.putpixel((4, 4), (255, 255, 255))
    random.seed(0)
    places = {tuple(np.argwhere(np.asarray(shift(image, 2))[..., 0])[0]) for _ in range(300)}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_shift_is_black_outside():
    corners = []
    random.seed(1)
    for _ in range(20):
        moved = np.asarray(shift(Image.new("RGB", (8, 8), "white"), 4))
        corners.append(moved.mean())
    assert min(corners) < 255 * 0.5 and {0, 255} >= set(np.unique(moved))


def test_rand_augment_never_posterizes_to_nothing(photo):
    """timm with Pillow 13 raises here: about one image in 600 for this policy, more for stronger ones."""
    small = photo.resize((16, 16))
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m15-n2-mstd0.5-inc1", "rand-m1-mstd0.5"):
        transform = rand_augment(policy, 16, MEAN, "bicubic")
        ops = [op for op in transform.ops if op.name.startswith("Posterize")]
        assert ops
        for seed in range(300):
            seed_all(seed)
            assert transform(small).size == (16, 16)
            for op in ops:
                op(small)


def test_posterize_keeps_timms_other_levels():
    transform = rand_augment("rand-m9-mstd0.5-inc1", 16, MEAN, "bicubic")
    (op,) = [op for op in transform.ops if op.name == "PosterizeIncreasing"]
    theirs = AugmentOp("PosterizeIncreasing", magnitude=9)
    for level in range(11):
        assert op.level_fn(level, {}) == (max(1, theirs.level_fn(level, {})[0]),)


def test_rand_augment_has_timms_constants():
    op = rand_augment("rand-m9-mstd0.5-inc1", 224, MEAN, "bicubic").ops[0]
    assert op.hparams["translate_const"] == 100 and op.hparams["magnitude_std"] == 0.5
    assert op.kwargs == {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}


def test_transforms_travel_to_workers():
    augment = Augment(scale=(0.1, 1), shift=0.1, hflip=0.5, color_jitter=0.1, rand_augment="rand-m9-mstd0.5-inc1")
    assert len(pickle.loads(pickle.dumps(TrainTransform(augment, 8, MEAN))).steps) == 5


def test_a_drawn_filter_is_one_of_two():
    """The box is that of one for all; RandAugment turns by timm's own choice of filters."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    boxes = {"scale": (0.3, 0.5), "ratio": (1, 1)}
    found = {}
    for name in ("bilinear", "bicubic", "random"):
        transform = TrainTransform(Augment(interpolation=name, **boxes), 16, MEAN)
        found[name] = []
        for seed in range(12):
            torch.manual_seed(seed)
            random.seed(seed)
            found[name].append(transform(photo))
    drawn = zip(*found.values(), strict=True)
    like = {(torch.equal(third, first), torch.equal(third, second)) for first, second, third in drawn}
    assert like == {(True, False), (False, True)}
    policy = TrainTransform(Augment(interpolation="random", rand_augment="rand-m9", **boxes), 16, MEAN).steps[-1]
    turns = [op.kwargs["resample"] for op in policy.ops if "Rotate" in op.name]
    assert turns == [(Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hflip": 2}, "hflip=2, expected a probability"),
        ({"mixup": "much"}, "mixup='much', expected a number between 0 and 100"),
        ({"shift": 0.7}, "shift=0.7, expected a number between 0 and 0.5"),
        ({"scale": [1, 0.08]}, "scale=.*, expected two areas"),
        ({"scale": 0.08}, "scale=0.08, expected two areas"),
        ({"ratio": [0, 1]}, "ratio=.*, expected two aspect ratios"),
        ({"interpolation": "cubic"}, "interpolation='cubic', expected one of nearest, bilinear, bicubic, lanczos"),
        ({"interpolation": "random"}, "interpolation='random', expected one for all where scale is null or"),
        ({"interpolation": "random", "scale": [0.1, 1], "draft": True}, "interpolation='random', expected one for all"),
        ({"repeated": 0}, "repeated=0, expected a whole number from 1"),
        ({"rand_augment": "m9"}, "rand_augment='m9', expected a policy such as rand-m9"),
        ({"cutmx": 1}, "unknown key cutmx, known are .*cutmix"),
        ({"hflip": 2, "repeated": True}, "hflip=2.*; repeated=True"),
    ],
)
def test_wrong_augmentation(values, message):
    with pytest.raises(ValueError, match=rf"augment: wrong configuration, got .*{message}.*; see conf/augment"):
        Augment.build(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "eval.size=0, expected pixels"),
        ({"resize": "big"}, "eval.resize='big', expected pixels"),
        ({"crop_fraction": 1.2}, "eval.crop_fraction=1.2, expected a share"),
        ({"interpolation": None}, "eval.interpolation=None, expected one of"),
        ({"squash": 1}, "eval.squash=1, expected true or false"),
        ({"crop": 0.9}, "unknown key crop, known are size, resize, crop_fraction"),
    ],
)
def test_wrong_evaluation(values, message):
    with pytest.raises(ValueError, match=rf"eval: wrong configuration, got .*{message}.*; see conf/data"):
        Evaluation.build(values)
