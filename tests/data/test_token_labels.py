"""Label maps: files, what a crop and a mirror make of them, and mixing in boxes of whole tokens."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import cutmix_bbox_and_lam
from torch.utils.data import default_collate

from data.augment import Augment
from data.batch import Batch, TokenLabels, collate
from data.dataset import Samples
from data.device import DeviceStage
from data.module import ImageData
from data.order.randomness import MIX, preserved, seed_all
from data.order.sampler import Draw
from data.sources.fake import Fake
from data.sources.imagefolder import ImageFolder
from data.token_labels import LabelMaps, UnreadableTokenLabels, token_targets
from data.transforms import TrainTransform, View

HIGH = 30.0  # a logit whose softmax is 1 to a part in 10^12
LITTLE = 1 / (1 + math.exp(15))  # of logits that differ by 15
WHOLE = (0.0, 0.0, 1.0, 1.0)
AUGMENT = Augment(scale=(0.2, 0.9), hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.2)


def certain(names):
    """Scores and classes (1, h, w) of a map with one certain class in each cell."""
    classes = np.array(names, np.int16)[None]
    return np.full(classes.shape, HIGH, np.float16), classes


HALVES = certain([[0, 0, 1, 1]] * 4)


@pytest.fixture
def labelled(image_tree, tmp_path):
    """A function that writes maps for the training images and gives the folders of images and of maps."""

    def make(scores=HALVES[0], classes=HALVES[1], **options):
        root = image_tree(**options)
        for image in (root / "train").rglob("*.png"):
            file = tmp_path / "maps" / image.parent.name / f"{image.stem}.npz"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, scores=scores, classes=classes)
        return root, tmp_path / "maps"

    return make


def maps_of(labelled, num_classes=2, **files):
    root, folder = labelled(**files)
    return LabelMaps(folder, ImageFolder(root).train, num_classes)


def targets(labels, grid, num_classes=2):
    return token_targets(default_collate([labels]), grid, num_classes)[0]


def test_a_map_lies_beside_its_image_by_class_and_stem(labelled):
    maps = maps_of(labelled)
    assert maps.path(1).endswith("/maps/ant/1.npz") and maps.path(5).endswith("/maps/bee/2.npz")
    scores, classes = maps.read(5)
    assert np.array_equal(scores, HALVES[0]) and np.array_equal(classes, HALVES[1])
    assert maps.problems() == []


@pytest.mark.parametrize(
    ("box", "mirrored", "of_class_1"),
    [
        (WHOLE, False, [0, 0, 1, 1]),
        (WHOLE, True, [1, 1, 0, 0]),
        ((0.0, 0.0, 0.5, 1.0), False, [0, 0, 0, LITTLE]),
        ((0.5, 0.25, 1.0, 0.75), False, [1, 1, 1, 1]),
        ((0.5, 0.25, 1.0, 0.75), True, [1, 1, 1, 1]),
        ((0.25, 0.0, 0.75, 1.0), False, [0, LITTLE, 1 - LITTLE, 1]),
        ((0.25, 0.0, 0.75, 1.0), True, [1, 1 - LITTLE, LITTLE, 0]),
    ],
)
def test_targets_show_what_the_image_shows(labelled, box, mirrored, of_class_1):
    """Left half class 0, right half class 1; a quarter of the way from one to the other, logits are 22.5 and 7.5."""
    found = targets(maps_of(labelled).crop(0, View(box, mirrored)), (4, 4))
    row = torch.tensor(of_class_1, dtype=torch.float32)
    torch.testing.assert_close(found[..., 1], row.expand(4, 4), atol=1e-9, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 4))


def test_rows_and_columns_are_not_exchanged(labelled):
    """A map of 2 × 3 cells with a class each: the box of the right column, the middle one mirrored, and the top row."""
    maps = maps_of(labelled, 6, **dict(zip(("scores", "classes"), certain([[0, 1, 2], [3, 4, 5]]), strict=True)))
    for view, grid, expected in [
        (View((2 / 3, 0, 1, 1), False), (2, 1), [[2], [5]]),
        (View((1 / 3, 0, 2 / 3, 1), True), (2, 1), [[1], [4]]),
        (View((0, 0, 1, 0.5), False), (1, 3), [[0, 1, 2]]),
        (View((0, 0, 2 / 3, 0.5), True), (1, 2), [[1, 0]]),
    ]:
        assert targets(maps.crop(0, view), grid, 6).argmax(-1).tolist() == expected


def test_targets_are_the_softmax_of_the_mean_logits_of_a_token():
    """One token over 2 × 2 cells, sampled at the centre of each; classes that no cell names have logit 0."""
    scores = torch.tensor([[[2.0, 4.0], [1.0, 3.0]], [[0.5, 1.0], [0.0, 2.5]]])
    classes = torch.tensor([[[0, 0], [1, 0]], [[1, 2], [2, 1]]], dtype=torch.int32)
    found = targets(TokenLabels(scores, classes, torch.tensor(WHOLE)), (1, 1), 4)
    logits = torch.tensor([2.0 + 4.0 + 3.0, 0.5 + 1.0 + 2.5, 1.0 + 0.0, 0.0]) / 4
    torch.testing.assert_close(found[0, 0], logits.softmax(0))


@pytest.mark.parametrize("size", [(12, 10), (10, 12), (40, 11)])
@pytest.mark.parametrize("scale", [None, (0.1, 0.9)], ids=["centre", "crop"])
def test_the_view_is_what_the_image_shows(size, scale):
    """An image whose colours are its coordinates tells where the crop was and whether it is mirrored."""
    width, height = size
    ramp = np.stack(np.broadcast_arrays(np.arange(width)[None], np.arange(height)[:, None], 0), -1)
    image = Image.fromarray((ramp * 4).astype(np.uint8)).resize((width * 8, height * 8), Image.Resampling.NEAREST)
    transform = TrainTransform(Augment(scale=scale, hflip=0.5, interpolation="nearest"), 64, (0.5,) * 3)
    mirrored = 0
    for seed in range(20):
        with preserved():
            seed_all(seed)
            pixels, view = transform.with_view(image)
        columns, rows = pixels[0, 0].float() / 4, pixels[1, :, 0].float() / 4
        left, top, right, bottom = view.box
        first, last = (right, left) if view.mirrored else (left, right)
        # a pixel tells the cell that it lies in, so a side of the box is known to one cell
        assert (columns[0], columns[-1]) == pytest.approx((first * width, last * width), abs=1.1)
        assert (rows[0], rows[-1]) == pytest.approx((top * height, bottom * height), abs=1.1)
        mirrored += view.mirrored
    assert 3 <= mirrored <= 17


@pytest.mark.parametrize("augment", [AUGMENT, Augment(hflip=0.5), Augment(scale=(0.1, 1.0))])
def test_label_maps_change_no_image(labelled, augment):
    root, folder = labelled(size=(40, 30))
    split = ImageFolder(root).train
    transform = TrainTransform(augment, 16, (0.5,) * 3)
    plain, mapped = Samples(split, transform, 7), Samples(split, transform, 7, None, LabelMaps(folder, split, 2))
    draws = [Draw(epoch, index) for epoch in range(5) for index in range(6)]
    before, after = collate(plain.__getitems__(draws)), collate(mapped.__getitems__(draws))
    assert torch.equal(before.images, after.images) and torch.equal(before.labels, after.labels)
    assert before.token_labels is None
    assert [tuple(part.shape) for part in after.token_labels] == [(30, 1, 4, 4), (30, 1, 4, 4), (30, 4)]
    assert [part.dtype for part in after.token_labels] == [torch.float32, torch.int32, torch.float32]


def stage(cutmix=0.0, num_classes=2, **augment):
    return DeviceStage((0.5,) * 3, (0.5,) * 3, Augment(cutmix=cutmix, **augment), num_classes, seed=3)


def batch(size=4, number=0, pixels=16):
    """Image i is of brightness 40 i, of class i and labelled so everywhere."""
    images = (40 * torch.arange(size, dtype=torch.uint8)).reshape(-1, 1, 1, 1).expand(size, 3, pixels, pixels).clone()
    classes = torch.arange(size, dtype=torch.int32).reshape(-1, 1, 1, 1).expand(size, 1, 3, 3).clone()
    labels = TokenLabels(torch.full((size, 1, 3, 3), HIGH), classes, torch.tensor(WHOLE).repeat(size, 1))
    return Batch(images, torch.arange(size), torch.arange(size), 0, number, labels)


def test_mixed_targets_are_the_shares_of_the_area():
    """Tokens, pixels and classes agree: a token is of one image, and the class target is the share of its tokens."""
    mixed = 0
    for number in range(20):
        done = stage(cutmix=1.0, num_classes=4)(batch(number=number), True, token_grid=(4, 4))
        brightness = ((done.images[:, 0] * 0.5 + 0.5) * 255 / 40).round()
        per_token = brightness.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)  # the 4 × 4 pixels of each token
        assert (per_token == per_token[..., :1]).all()
        torch.testing.assert_close(done.token_labels.argmax(-1), per_token[..., 0].long())
        torch.testing.assert_close(done.token_labels.mean((1, 2)), done.labels)
        mixed += bool(done.labels.max() < 1)
    assert mixed > 10


def test_the_box_is_drawn_by_the_numbers_of_the_batch():
    seed_all(3, MIX, 0, 5, 1)
    np.random.rand()
    share = np.random.beta(1.0, 1.0)
    (top, bottom, left, right), share = cutmix_bbox_and_lam((4, 4), share)
    done = stage(cutmix=1.0, num_classes=4)(batch(number=5), True, rank=1, token_grid=(4, 4))
    from_others = done.token_labels[0].argmax(-1) == 3
    assert from_others[top:bottom, left:right].all() and from_others.sum() == (bottom - top) * (right - left) > 0
    assert done.labels[0].tolist() == pytest.approx([share, 0, 0, 1 - share])


def test_without_mixing_labels_stay_hard():
    done = stage(num_classes=4)(batch(), True, token_grid=(2, 2))
    assert done.labels.dtype == torch.int64
    assert done.token_labels.shape == (4, 2, 2, 4) and done.token_labels.dtype == torch.float32
    assert (done.token_labels.argmax(-1) == done.labels[:, None, None]).all()


def test_the_device_stage_must_know_the_tokens():
    with pytest.raises(
        ValueError, match="DeviceStage: label maps need the grid of the model's tokens, got None; train"
    ):
        stage()(batch(2), True)


@pytest.mark.parametrize(
    ("scores", "classes", "text"),
    [
        (HALVES[0][0], HALVES[1][0], r"must be \(K, h, w\), not \(4, 4\) and \(4, 4\)"),
        (HALVES[0], HALVES[1][:, :2], r"must be \(K, h, w\), not \(1, 4, 4\) and \(1, 2, 4\)"),
        (HALVES[0].astype(np.float64), HALVES[1], "float16 or float32 and classes integers, not float64 and int16"),
        (HALVES[0], HALVES[1].astype(np.float16), "classes integers, not float16 and float16"),
        (np.full_like(HALVES[0], np.inf), HALVES[1], "scores must be finite"),
        (HALVES[0], HALVES[1] + 1, "class ids must be from 0 to 1, not 1 to 2"),
        (HALVES[0], HALVES[1] - 1, "class ids must be from 0 to 1, not -1 to 0"),
        (np.repeat(HALVES[0], 2, 0), np.repeat(HALVES[1], 2, 0), "a cell must name each class once"),
    ],
)
def test_a_wrong_map_is_named(labelled, scores, classes, text):
    maps = maps_of(labelled, scores=scores, classes=classes)
    with pytest.raises(
        UnreadableTokenLabels, match=rf"token labels: .*{text}, got .*/maps/ant/2.npz; mend the file, or set data.token"
    ):
        maps.read(2)
    (problem,) = maps.problems()
    assert "maps/ant/0.npz; mend the file" in problem


def test_missing_damaged_and_odd_files_are_named(labelled):
    maps = maps_of(labelled, train=4)
    with open(maps.path(1), "r+b") as file:
        file.truncate(100)
    with open(maps.path(2), "wb") as file:
        pickle.dump(HALVES, file)
    with open(maps.path(3), "wb") as file:
        np.save(file, HALVES[0])
    np.savez(maps.path(4), scores=HALVES[0])
    np.savez(maps.path(5), scores=HALVES[0][..., :3], classes=HALVES[1][..., :3])
    np.savez_compressed(maps.path(6), scores=HALVES[0], classes=HALVES[1])
    with open(maps.path(6), "r+b") as file:
        file.seek(60)
        file.write(b"spoiled" * 4)
    maps.split.files[7] = b"bee/none.png"
    for index, text in [
        (1, r"no readable label map, got .*ant/1.npz \(BadZipFile: File is not a zip file\); mend the file"),
        (2, r"no readable label map, got .*ant/2.npz \(ValueError: .*pickle.*\); mend"),
        (3, r"no readable label map, got .*ant/3.npz \(TypeError: .*ndarray"),
        (4, r"no readable label map, got .*bee/0.npz \(KeyError: .*classes"),
        (5, r"maps must be as the first one, \(1, 4, 4\), not \(1, 4, 3\), got .*bee/1.npz; mend"),
        (6, r"no readable label map, got .*bee/2.npz \("),
        (7, r"no readable label map, got .*bee/none.npz \(FileNotFoundError: No such file or directory\); mend"),
    ]:
        with pytest.raises(UnreadableTokenLabels, match=text):
            maps.read(index)


def images(root, folder, source=None, **changes):
    settings = {"num_classes": 2, "image_size": 8, "batch_size": 2, "workers": 0, "token_labels": folder, **changes}
    return ImageData(source or ImageFolder(root), **settings)


def test_the_check_looks_at_the_first_maps(labelled):
    root, folder = labelled()
    images(root, folder).check()
    images(root, str(folder), augment={"cutmix": 1.0}).check()
    (folder / "ant" / "1.npz").unlink()
    with pytest.raises(ValueError, match=r"1 problem\(s\) with the data\n  - token labels: no readable.*ant/1.npz"):
        images(root, folder).check()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"augment": {"mixup": 0.8}}, "augment.mixup: got 0.8, but token labels are mixed in .*; set augment.mixup=0"),
        ({"augment": {"shift": 0.1}}, "augment.shift: got 0.1, but label maps do not follow it; set augment.shift=0"),
        ({"token_labels": 3}, "data.token_labels: got 3; give the folder of the label maps, or null"),
        ({"token_labels": "none/such"}, "data.token_labels: no folder, got none/such; set it to that of the label"),
        ({"source": Fake(2), "num_classes": 2}, "label maps belong to image files, got Fake as source; set data.token"),
    ],
)
def test_what_label_maps_cannot_go_with_is_refused(labelled, changes, text):
    root, folder = labelled()
    with pytest.raises(ValueError, match=rf"1 problem\(s\) with the data\n  - .*{text}"):
        images(root, folder, **changes).check()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_have_targets_and_evaluation_has_none(labelled, trainer, recorder, workers):
    seen = []

    class Looker(recorder):
        def training_step(self, batch, batch_idx):
            seen.append(batch.token_labels)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert batch.token_labels is None

    data = images(*labelled(), num_classes=10, augment={"cutmix": 1.0, "hflip": 0.5}, workers=workers)
    data.token_grid = (2, 2)
    trainer(max_epochs=1).fit(Looker(), data)
    assert [tuple(found.shape) for found in seen] == [(2, 2, 2, 10)] * 3
    for found in seen:
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 2))
