"""ImageNet's relatives on tiny folders: classes by their names, 200 where a set has so many, what is missing."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from conf.errors import UserError
from data.module import ImageData
from data.sources.imagefolder import FolderSplit
from models.probes import Subject
from models.probes.imagenet_suite import ALEXNET, INFO, Seen, imagenet_suite, mean_corruption_error, real_labels

USUAL = (INFO / "imagenet_synsets.txt").read_text().split()
OF_A = (INFO / "imagenet_a_synsets.txt").read_text().split()


class Grey(nn.Module):
    """Says the label that the grey of the image is (up to 255), and a little less one that is not in A."""

    other = next(label for label, wnid in enumerate(USUAL) if wnid not in OF_A)

    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        self.offset, self.weight = offset, nn.Parameter(torch.zeros(()))

    def forward(self, images):
        said = (images.mean((1, 2, 3)) * 255).round().long() + self.offset
        logits = torch.nn.functional.one_hot(said, 1000).float()
        logits[:, self.other] = 2 * self.offset  # louder than any where the offset says so
        return logits


def write(folder, label, name="x.png", grey=None):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), label if grey is None else grey, np.uint8)).save(folder / name)


@pytest.fixture
def suite(tmp_path):
    """`suite(model, **options)` on what lies below `tmp_path`."""
    root = tmp_path / "imagenet"
    for label in (1, 7):
        write(root / "val" / USUAL[label], label, f"ILSVRC2012_val_0000000{label + 1}.png")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False,
    )  # fmt: skip

    def run(model, **options):
        source = Seen(FolderSplit(str(root / "val"), USUAL), USUAL)
        plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "eval": {"squash": True}, "workers": 0}
        data = ImageData(source, 1000, 8, 4, root=str(root), **plain)
        return imagenet_suite(model, data, trainer, Subject("", None, None, "raw", {}, tmp_path), **options)

    return run


def test_every_set_that_is_there(suite, tmp_path):
    in_a = next(label for label in range(256) if USUAL[label] in OF_A)
    write(tmp_path / "imagenet-a" / USUAL[in_a], in_a)
    write(tmp_path / "v2" / "3", 3)
    write(tmp_path / "v2" / "250", 250)
    write(tmp_path / "sketch" / USUAL[9], 9, grey=8)
    for severity in (1, 2):
        write(tmp_path / "imagenet-c" / "noise" / "gaussian_noise" / str(severity) / USUAL[5], 5, grey=6 - severity % 2)
    report = suite(Grey(), folders={"V2": "v2"})
    rows = {row["set"]: row for row in report.tables["sets"]}
    assert [rows[name]["top1"] for name in ("ImageNet-1k", "V2", "A", "Sketch")] == [1, 1, 1, 0]
    assert rows["V2"]["images"] == 2 and "R" not in rows
    assert any(line.startswith("R: not measured, there is no folder") for line in report.lines)
    by_severity = {row["severity"]: row["top1"] for row in report.tables["corruptions"]}
    assert by_severity == {1: 1.0, 2: 0.0}
    assert report.figures["C/mce"] == pytest.approx(0.5 / 0.886428)
    assert "C: gaussian_noise has 2 of 5 severities" in report.lines and report.lines[-2].startswith("C: without shot_")


def test_only_the_classes_of_a_set_can_be_said(suite, tmp_path):
    """One that shouts a class that A has not is right on A all the same, where the next is right."""
    in_a = next(label for label in range(1, 256) if USUAL[label] in OF_A)
    write(tmp_path / "imagenet-a" / USUAL[in_a], in_a - 1)
    report = suite(Grey(offset=1), corruptions=False)
    rows = {row["set"]: row for row in report.tables["sets"]}
    assert rows["A"]["top1"] == 1 and rows["ImageNet-1k"]["top1"] == 0
    assert not any(line.startswith("C:") for line in report.lines)


def test_real_has_several_labels_or_none(suite):
    rows = {row["set"]: row for row in suite(Grey(), corruptions=False).tables["sets"]}
    assert rows["ReaL"]["images"] in (1, 2) and 0 <= rows["ReaL"]["top1"] <= rows["ReaL"]["top5"] <= 1
    split = FolderSplit("", ())
    split._keep("", np.array([b"n/cat.jpg"]), np.array([0]))
    assert real_labels(split, None) is None


def test_the_published_mean_is_of_all_corruptions():
    rows = [{"corruption": name, "top1": 1 - value / 100} for name, value in ALEXNET.items() for _ in range(5)]
    assert mean_corruption_error(rows) == (pytest.approx(1.0), [])


def test_other_classes_are_refused(suite, tmp_path):
    write(tmp_path / "sketch" / "cats", 1)
    with pytest.raises(UserError, match=r"folders must be classes of ImageNet, got cats in .*sketch; give probe"):
        suite(Grey(), corruptions=False)
    with pytest.raises(UserError, match="there is no set 'B'; folders has V2, A, R, Sketch, C"):
        suite(Grey(), folders={"B": "x"})
