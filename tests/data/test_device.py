"""The device stage: exact normalisation, memory format, and randomness named by epoch, batch number and rank."""

import pytest
import torch
from timm.data.mixup import Mixup

from data.augment import Augment
from data.batch import Batch
from data.device import DeviceStage
from data.order.randomness import MIX, seed_all

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch(size=4, epoch=0, number=0, pixels=8):
    images = torch.randint(
        0, 256, (size, 3, pixels, pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Batch(images, torch.arange(size) % 5, torch.arange(size), epoch, number)


def stage(seed=0, **augment):
    return DeviceStage(MEAN, STD, Augment(**augment), num_classes=5, seed=seed)


def devices():
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("training", [True, False])
def test_normalises_like_torchvision(training):
    from torchvision.transforms.v2 import functional as F

    given = batch()
    done = stage()(given, training)
    expected = F.normalize(F.to_dtype(given.images, torch.float32, scale=True), list(MEAN), list(STD))
    torch.testing.assert_close(done.images, expected, rtol=0, atol=1e-6)  # a few roundings of values up to 3
    assert done.images.is_contiguous(memory_format=torch.channels_last)
    assert done.labels.dtype == torch.int64 and torch.equal(done.labels, given.labels)
    assert given.images.dtype == torch.uint8


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)],
)
def test_refuses_what_is_not_from_the_loader(images):
    with pytest.raises(ValueError, match=r"DeviceStage: images must be uint8 \(B, 3, H, W\), got torch"):
        stage()(batch()._replace(images=images), training=False)


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("augment", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_targets_are_soft_and_not_smoothed(size, augment):
    done = stage(**augment)(batch(size), training=True)
    assert done.labels.shape == (size, 5) and done.labels.dtype == torch.float32
    torch.testing.assert_close(done.labels.sum(1), torch.ones(size))
    assert ((done.labels > 0).sum(1) <= 2).all()  # smoothing would spread over all classes
    assert done.images.is_contiguous(memory_format=torch.channels_last)


def test_mixing_equals_timms(monkeypatch):
    for number in range(8):
        given = batch(6, epoch=2, number=number)
        done = stage(seed=3, mixup=0.8, cutmix=1.0)(given, training=True, rank=1)
        images = stage()(given, training=False).images
        seed_all(3, MIX, 2, number, 1)
        theirs = Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=5)(images, given.labels)
        assert torch.equal(done.images, theirs[0])
        assert torch.equal(done.labels, theirs[1])


@pytest.mark.parametrize("device", devices())
def test_randomness_is_named_not_remembered(device):
    make = stage(mixup=0.8, cutmix=1.0, erasing=0.5)

    def run(epoch, number, rank):
        given = batch(8, epoch, number)
        given = given._replace(images=given.images.to(device), labels=given.labels.to(device))
        return make(given, training=True, rank=rank).images

    first = run(1, 2, 0)
    torch.rand(3, device=device)
    others = [run(*name) for name in ((1, 3, 0), (2, 2, 0), (1, 2, 1))]
    assert torch.equal(first, run(1, 2, 0))
    assert all(not torch.equal(first, other) for other in others)


def test_leaves_the_global_generators_alone():
    import random

    import numpy as np

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    stage(mixup=0.8, cutmix=1.0, erasing=1.0)(batch(), training=True)
    assert state() == before


def test_erasing_touches_training_images_only_and_about_its_share():
    plain = stage()(batch(64, pixels=16), training=False).images
    make = stage(erasing=0.25)
    assert torch.equal(make(batch(64, pixels=16), training=False).images, plain)
    changed = [
        (make(batch(64, number=n, pixels=16), training=True).images != plain).flatten(1).any(1) for n in range(20)
    ]
    share = torch.stack(changed).float().mean().item()
    assert abs(share - 0.25) < 0.05  # 1280 draws: four standard deviations


def test_mixing_probability():
    soft = [stage(mixup=0.8, mix_probability=0.3)(batch(number=n), training=True).labels.max() < 1 for n in range(200)]
    assert abs(sum(map(bool, soft)) / 200 - 0.3) < 0.13  # four standard deviations


def test_erasing_before_or_after_mixing(monkeypatch):
    order = []
    monkeypatch.setattr("data.device.RandomErasing", lambda *a, **k: lambda x: order.append("erase") or x)
    for erase_mixed in (False, True):
        made = stage(erasing=1.0, mixup=0.8, erase_mixed=erase_mixed)
        mix = made._mixup
        made._mixup = lambda x, y, mix=mix: order.append("mix") or mix(x, y)
        made(batch(), training=True)
    assert order == ["erase", "mix", "mix", "erase"]
