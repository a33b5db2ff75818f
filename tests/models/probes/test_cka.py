"""Centred kernel alignment: what it does not see, what it sees, over batches and between two runs."""

import pytest
import pytorch_lightning as pl
import torch

from conf.errors import UserError
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model, list_models
from models.probes import Subject
from models.probes.cka import Alignment, cka, grams, hsic
from models.probes.reading.blocks import blocks_of, outputs
from tests.models.probes.runs import written

SMALL = [name for name in list_models() if name.endswith("_32px") and "dit" not in name]


def alignment(left: list[torch.Tensor], right: list[torch.Tensor], batch: int = 50) -> torch.Tensor:
    sums = Alignment()
    for i in range(0, len(left[0]), batch):
        sums.add(*(grams([x[i : i + batch] for x in layers]) for layers in (left, right)))
    return sums.alignment()


def test_rotation_scale_and_shift_change_nothing():
    x = torch.randn(200, 24, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    found = alignment([x], [x, 3 * x @ turn + 5, x @ torch.diag(torch.arange(24.0).double())])
    assert found[0, :2].tolist() == pytest.approx([1.0, 1.0], abs=1e-12) and found[0, 2] < 0.95


def test_independent_layers_have_none():
    """The biased estimate would give 0.5 here: as many numbers as images."""
    x, y = torch.randn(2, 2000, 50)
    assert abs(float(alignment([x], [y]))) < 0.02


def test_the_unbiased_estimate_is_that_of_the_definition():
    k, m = grams([torch.randn(7, 3), torch.randn(7, 4)])
    k0, m0 = (x - torch.diag(x.diagonal()) for x in (k, m))
    one = torch.ones(7, dtype=torch.float64)
    expected = (k0 @ m0).trace() + (one @ k0 @ one) * (one @ m0 @ one) / (6 * 5) - 2 / 5 * (one @ k0 @ m0 @ one)
    assert float(hsic(k[None], m[None])) == pytest.approx(float(expected) / (7 * 4), rel=1e-12)


@pytest.fixture
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return ImageData(Digits(), 10, 32, batch_size=16, workers=0, mean=[0.5] * 3, std=[0.5] * 3)


@pytest.fixture
def subject(tmp_path) -> Subject:
    return Subject("", None, None, "raw", {}, tmp_path)


def test_the_layers_of_a_model(digits, trainer, subject):
    model = create_model("vit_32px", num_classes=10).eval()
    report = cka(model, digits, trainer, subject, images=33)
    table = report.tables["cka"]
    names = [row["layer"] for row in table]
    assert names == [f"stages.{i}.blocks.0" for i in range(4)] and report.lines[0].startswith("of 33 images")
    assert all(row[row["layer"]] == pytest.approx(1.0, abs=1e-12) for row in table)
    assert table[0][names[1]] == pytest.approx(table[1][names[0]]) and len(report.figures) == 3


def test_two_runs(digits, trainer, subject, tmp_path):
    model = create_model("vit_32px", num_classes=10, depth=2).eval()
    path = written(tmp_path / "b", "model=vit_32px", "model.depth=2", model=model)
    report = cka(model, digits, trainer, subject, other=str(path), images=32)
    assert report.figures["same/stages.1.blocks.0"] == pytest.approx(1.0, abs=1e-9)
    assert report.lines[1].endswith("is nearest to stages.1.blocks.0") and str(path) in report.lines[0]
    small = written(tmp_path / "c", "model=vit_32px", "model.depth=1", "image_size=16", "data.std=[0.5,0.5,0.25]")
    with pytest.raises(UserError) as error:
        cka(model, digits, trainer, subject, other=str(small))
    assert str(error.value).startswith(
        "cka: both models are shown the same images, got image_size [32, 32] and [16, 16], std"
    )


def test_what_cannot_be_compared_is_one_sentence(digits, trainer, subject, tmp_path):
    model = create_model("vit_32px", num_classes=10, depth=1).eval()
    for given, said in (
        ({"images": 3}, "cka: 4 images at once are needed, got 3; set data.batch_size=64"),
        ({"images": "all"}, "cka: images must be a whole number of at least 1, or null for all, got 'all'; set probe."),
        ({"other": str(tmp_path / "none")}, "checkpoint: there is nothing at this path, got "),
    ):
        with pytest.raises(UserError) as error:
            cka(model, digits, trainer, subject, **given)
        assert str(error.value).startswith(said)


@pytest.mark.full
@pytest.mark.parametrize("name", [*SMALL, "timm/resnet10t", "timm/vit_tiny_patch16_224"])
def test_every_backbone(name, digits, trainer, subject):
    size = {"image_size": 32} if "patch16" in name else {}
    report = cka(create_model(name, num_classes=10, **size).eval(), digits, trainer, subject, images=8)
    assert all(row[row["layer"]] == pytest.approx(1, abs=1e-9) for row in report.tables["cka"])


@pytest.mark.full
def test_neighbouring_layers_are_more_alike(digits_vit):
    """Measured 0.73 and 0.88 to the next, 0.68 from the first to the third."""
    model, images, _ = digits_vit
    blocks = blocks_of("cka", model)
    with torch.no_grad(), outputs(blocks) as found:
        model(images[:256])
    layers = grams(list(found.values()))
    sums = Alignment()
    sums.add(layers, layers)
    values = sums.alignment()
    assert values[0, 1] > values[0, 2] and values[2, 1] > values[2, 0] and float(values.max()) <= 1 + 1e-9
