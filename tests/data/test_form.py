"""Channels and depths from the file to the device: every value is what the file holds."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import Augment
from data.module import ImageData
from data.sources.arrays import read_array
from data.sources.decode import UnreadableImage, read_image
from data.sources.digits import Digits
from data.sources.fake import Fake
from data.sources.form import Form, fitted, from_float, to_tensor
from data.sources.imagefolder import ImageFolder
from data.transforms import Evaluation, EvaluationTransform, TrainTransform

GREY16, FIVE = Form(1, "uint16"), Form(5, "uint16")


def saved(pixels, name):
    file = io.BytesIO()
    np.save(file, pixels) if name == "npy" else Image.fromarray(pixels).save(file, name)
    return file.getvalue()


def tiff(pixels, order="<", planar=False, packed=False):
    """A TIFF of one strip (or one per band), by the specification."""
    height, width, bands = pixels.shape
    data = (pixels.transpose(2, 0, 1) if planar else pixels).astype(pixels.dtype.newbyteorder(order))
    strips = [zlib.compress(s.tobytes()) if packed else s.tobytes() for s in (data if planar else [data])]
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    count, start = len(strips), 8
    offsets = [start + sum(map(len, strips[:i])) for i in range(count)]
    tables = start + sum(map(len, strips))
    extra = [struct.pack(f"{order}{bands}H", *[pixels.itemsize * 8] * bands)]
    extra += [struct.pack(f"{order}{count}I", *values) for values in (offsets, map(len, strips))]
    places = [tables, tables + len(extra[0]), tables + len(extra[0]) + len(extra[1])]
    lone = count == 1
    tags = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, places[0]), (259, 4, 1, 8 if packed else 1)),
        *((262, 4, 1, 1), (273, 4, count, offsets[0] if lone else places[1]), (277, 4, 1, bands), (278, 4, 1, height)),
        *((279, 4, count, len(strips[0]) if lone else places[2]), (284, 4, 1, 1 + planar), (339, 4, 1, kind)),
    ]
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, tables + sum(map(len, extra)))
    entries = b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    return head + b"".join(strips + extra) + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def some(*shape, dtype):
    numbers = np.arange(np.prod(shape), dtype=np.int64).reshape(shape) * 257
    return numbers.astype(dtype)


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        (saved(some(3, 4, dtype=np.uint16), "PNG"), GREY16, some(3, 4, 1, dtype=np.uint16)),
        (saved(some(3, 4, dtype=np.uint16), "PNG"), Form(1), np.arange(12, dtype=np.uint8).reshape(3, 4, 1)),
        (saved(some(3, 4, dtype=np.uint16), "TIFF"), GREY16, some(3, 4, 1, dtype=np.uint16)),
        (saved(some(3, 4, dtype=np.float32), "TIFF"), Form(1, "float32"), some(3, 4, 1, dtype=np.float32)),
        (saved(some(3, 4, 5, dtype=np.uint16), "npy"), FIVE, some(3, 4, 5, dtype=np.uint16)),
        (saved(some(3, 4, 5, dtype=np.float64), "npy"), Form(5, "float32"), some(3, 4, 5, dtype=np.float32)),
        (saved(some(3, 4, 4, dtype=np.uint8), "PNG"), Form(4), some(3, 4, 4, dtype=np.uint8)),
        (saved(np.full((3, 4, 4), 9, np.uint8), "PNG"), Form(3, "uint16"), np.full((3, 4, 3), 9 * 257)),
        (tiff(some(3, 4, 5, dtype=np.uint16)), FIVE, some(3, 4, 5, dtype=np.uint16)),
        (tiff(some(3, 4, 5, dtype=np.uint16), ">", planar=True), FIVE, some(3, 4, 5, dtype=np.uint16)),
        (tiff(some(3, 4, 13, dtype=np.float32), packed=True), Form(13, "float32"), some(3, 4, 13, dtype=np.float32)),
        (tiff(some(3, 4, 3, dtype=np.uint16)), Form(3, "uint16"), some(3, 4, 3, dtype=np.uint16)),
    ],
    ids=range(12),
)
def test_a_file_keeps_its_bands_and_bits(content, form, expected):
    pixels = read_array(content, form)
    assert pixels.dtype == form.depth and np.array_equal(pixels, expected.astype(form.depth))


def test_colour_pngs_of_16_bits_keep_them():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in some(3, 4, 3, dtype=np.uint16))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(read_array(content, Form(3, "uint16")), some(3, 4, 3, dtype=np.uint16))


def test_bands_may_be_pages():
    file, pages = io.BytesIO(), [Image.fromarray(np.full((2, 3), n, np.uint8)) for n in range(6)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(
        read_array(file.getvalue(), Form(6)), np.broadcast_to(np.arange(6, dtype=np.uint8), (2, 3, 6))
    )


def test_grey_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(fitted(pixels, Form(1))[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))
    assert np.array_equal(fitted(pixels[..., 0], Form(3)), pixels[..., :1].repeat(3, 2))
    floats = fitted(pixels.astype(np.float32), Form(1, "float32"))
    assert np.allclose(floats, fitted(pixels, Form(1)), atol=0.51)


@pytest.mark.parametrize(
    ("pixels", "form", "message"),
    [
        (np.zeros((2, 2, 4), np.uint8), Form(5), r"4 channel\(s\), but data.channels=5"),
        (np.zeros((2, 2), np.float32), Form(1), r"floating-point values .* data.depth=uint8; set data.depth=float32"),
        (np.full((2, 2), 70000), Form(1, "uint16"), r"values outside 16 bits, but data.depth=uint16"),
        (np.full((2, 2), np.nan), Form(1, "float32"), "values that are not finite"),
        (np.zeros((2, 2, 2, 2)), Form(1), r"pixels must be numbers \(H, W\) or \(H, W, C\), got float64"),
    ],
)
def test_what_does_not_fit_is_refused(pixels, form, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fitted(pixels, form)
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(UnreadableImage, match=rf"got .*a.npy .*{message}"):
        read_image(tmp_path / "a.npy", form=form)


def test_a_pickle_in_an_array_file_is_not_opened():
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_array(file.getvalue(), FIVE)


@pytest.mark.parametrize("depth", ["uint8", "uint16", "float32"])
def test_transforms_move_pixels_and_keep_their_numbers(depth):
    form = Form(5, depth)
    pixels = Fake(size=(12, 16)).train.read(0, form)
    whole = EvaluationTransform(Evaluation(squash=True), (12, 16), form)(pixels)
    assert whole.dtype == getattr(torch, depth) and np.array_equal(whole.numpy(), pixels.transpose(2, 0, 1))
    strong = Augment(scale=(0.3, 1.0), shift=0.2, hflip=0.5)
    assert TrainTransform(strong, (8, 6), (0.5,) * 5, form)(pixels).shape == (5, 8, 6)
    mirrored = TrainTransform(Augment(hflip=1.0), (12, 16), (0.5,) * 5, form)(pixels)
    assert torch.equal(mirrored.double(), torch.from_numpy(pixels.transpose(2, 0, 1)[..., ::-1].astype(np.float64)))


def test_resized_numbers_are_rounded_and_stay_in_range():
    pixels = np.zeros((4, 4, 1), np.uint16)
    pixels[:, 2:] = 65535
    large = EvaluationTransform(Evaluation(squash=True), 16, GREY16)(pixels)
    assert large.dtype == torch.uint16 and large.int().min() == 0 and large.int().max() == 65535
    assert torch.equal(
        from_float(to_tensor(pixels), GREY16).int()[0], torch.from_numpy(pixels[..., 0].astype(np.int32))
    )


@pytest.mark.parametrize(("depth", "largest"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_the_device_stage_scales_by_the_depth(depth, largest):
    data = ImageData(
        Fake(), 10, 8, 4, mean=[0.25, 0.5], std=[0.5, 0.25], channels=2, depth=depth, eval={"squash": True}
    )
    batch = next(iter(data.val_dataloader()))
    seen = data._stage(batch, training=False).images
    expected = (batch.images.double() / largest - torch.tensor([0.25, 0.5]).view(1, 2, 1, 1)) / torch.tensor(
        [0.5, 0.25]
    ).view(1, 2, 1, 1)
    assert batch.images.dtype == getattr(torch, depth) and torch.allclose(seen.double(), expected, atol=1e-5)


def test_mixing_and_erasing_take_any_channels(recorder, trainer):
    model = recorder()
    model.layer = torch.nn.Linear(6, 10)
    options = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5, "hflip": 0.5}
    data = ImageData(Fake(), 10, 8, 16, mean=(0,) * 3, std=(1,) * 3, channels=6, depth="float32", augment=options)
    trainer(max_epochs=1).fit(model, data)
    assert model.seen[0][3].shape == (16, 6, 8, 8) and model.seen[0][4].dtype == torch.float32


def test_folders_of_arrays_are_read_by_workers(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            (folder := tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                np.save(folder / f"{i}.npy", np.full((9, 9, 7), 1000 * label + i, np.uint16))
    data = ImageData(
        ImageFolder(tmp_path), 2, 8, 4, mean=[0.5] * 7, std=[0.5] * 7, channels=7, depth="uint16", workers=1
    )
    data.check()
    (batch,) = data.val_dataloader()
    assert batch.images.dtype == torch.uint16 and batch.images.shape == (4, 7, 8, 8)
    assert batch.images.int().amax((1, 2, 3)).tolist() == [0, 1, 1000, 1001]


def test_a_source_of_rgb_gives_grey_and_says_what_it_cannot():
    data = ImageData(Digits(), 10, 8, 4, mean=(0.5,) * 3, std=(0.5,) * 3, channels=1)
    assert next(iter(data.val_dataloader())).images.shape == (4, 1, 8, 8)
    data = ImageData(Digits(), 10, 8, 4, mean=(0.5,) * 3, std=(0.5,) * 3, channels=4)
    with pytest.raises(ValueError, match=r"image \d+ of DigitsSplit .* got 3 channel\(s\), but data.channels=4"):
        next(iter(data.val_dataloader()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 17}, "data.channels: got 17; give a whole number from 1 to 16"),
        ({"depth": "int8"}, "data.depth: got 'int8'; give uint8, uint16, float32"),
        (
            {"augment": {"rand_augment": "rand-m9"}},
            r"augment.rand_augment: .* 8-bit RGB images, got 1 channel\(s\) of",
        ),
        ({"augment": {"color_jitter": 0.4}}, "augment.color_jitter: .*; set augment.color_jitter=0"),
        ({"eval": {"interpolation": "lanczos"}}, "data.eval.interpolation: lanczos takes 8-bit RGB .*; set bicubic"),
        ({"mean": [0.4, 0.5, 0.6]}, r"data.mean: got \(0.4, 0.5, 0.6\); give one number, one per channel"),
        ({"mean": [30000], "depth": "uint16"}, r"data.mean: got \[30000\], .* divide by 65535: data.mean=\[0.457771\]"),
    ],
)
def test_what_a_form_cannot_go_with_is_named(changes, message):
    given = {"channels": 1, "mean": [0.5], "std": [0.5], **changes}
    with pytest.raises(ValueError, match=message):
        ImageData(Fake(), 10, 8, 4, **given).check()
    ImageData(Fake(), 10, 8, 4, mean=[-3.0], std=[900.0], channels=1, depth="float32").check()


def test_a_model_is_trained_on_other_channels(command):
    arguments = ("model=vit_32px", "data=fake", "logger=none", "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    status, _, err = command("train", *arguments, "data.channels=5", "data.depth=uint16", "run.name=five")
    assert status == 0, err
