"""The probes of cost, of speed and of the machine: right sums, honest limits, remedies for what is wrong."""

from importlib.metadata import version
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from conf.errors import UserError
from models import create_model
from models.cost import multiply_adds, parameters
from models.probes import Subject, doctor, loader, throughput
from models.probes.cost import cost


def subject(size: int | list[int]) -> Subject:
    return Subject("", None, None, "raw", {"image_size": size}, Path())


@pytest.mark.parametrize("name", ["swin_32px", "vit_32px"])
def test_costs_add_up(name):
    model = create_model(name, num_classes=10)
    report = cost(model, subject(32))
    rows = {row["part"]: row for row in report.tables["parts"]}
    assert report.figures["flops"] == multiply_adds(model, (32, 32))
    assert report.figures["parameters"] == parameters(model)
    blocks = [row for part, row in rows.items() if "blocks." in part]
    assert len(blocks) > 3
    outer = [row for part, row in rows.items() if "blocks." not in part]
    for key, whole in (("multiply_adds", "flops"), ("activations", "activations")):
        assert sum(row[key] for row in outer) == report.figures[whole]
    stages = cost(model, subject([32, 64]), blocks=False)
    assert stages.figures["flops"] > 1.5 * report.figures["flops"] and len(stages.tables["parts"]) <= len(rows)


def test_activations_are_what_convolutions_and_linear_layers_give():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5)
    )
    report = cost(model, subject(8))
    assert report.figures["activations"] == 4 * 4 * 4 + 5
    assert report.figures["flops"] == 4 * 4 * 4 * 12 + 64 * 5


def test_throughput_of_each_batch():
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    model = create_model("vit_32px", num_classes=10).eval()
    report = throughput.throughput(model, trainer, subject(32), batches=[1, 3], seconds=0.05)
    first, second = report.tables["batches"]
    assert (first["batch"], second["batch"]) == (1, 3) and 0 < first["p50_ms"] <= first["p95_ms"]
    assert report.figures["images_per_second"] >= first["images_per_second"] == pytest.approx(1e3 / first["p50_ms"])
    assert report.figures["largest_batch"] is None and first["passes"] >= throughput.LEAST
    slow = throughput.throughput(model, trainer, subject(32), batches=[1, 2, 4], seconds=0.0)
    assert len(slow.tables["batches"]) == 1 and slow.lines[0].startswith("batches left out: 2, 4: a pass took longer")
    with pytest.raises(UserError, match=r"throughput: batches must be a whole number of at least 1, got 0; set probe"):
        throughput.throughput(model, trainer, subject(32), batches=0)


def test_the_largest_batch_is_found_to_five_percent():
    def prepared(batch):
        def run():
            if batch > 300:
                raise torch.OutOfMemoryError

        return run

    assert 285 <= throughput._largest(prepared, 128) <= 300


def test_the_doctor_says_what_helps(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    well = doctor.doctor(check_kernels=True)
    assert well.rows["packages"].startswith("ok: ") and well.rows["W&B"] == "ok: WANDB_MODE=offline"
    assert sum(name.startswith("kernel ") for name in well.rows) >= 10
    assert all(row.startswith("ok: ") for name, row in well.rows.items() if name.startswith("kernel "))
    assert torch.cuda.is_available() or "no GPU: of the kernels only the definitions" in well.lines[0]
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "torch" else version(package))
    monkeypatch.setattr(doctor, "SPACE", 1e12)
    ill = doctor.doctor(check_kernels=False)
    assert "torch is missing" in ill.rows["packages"] and "python -m pip install" in ill.rows["packages"]
    assert ill.rows["disk"].endswith("; make room")
    assert "packages" in ill.lines[0] and "disk" in ill.lines[0]


def test_the_word_doctor(command):
    status, out, err = command("eval", "doctor", "probe.check_kernels=false")
    assert status == 0 and "constraints.txt" in out, err


def test_a_loader_is_measured_beside_pillow_and_torchvision(tmp_path):
    report = loader.loader(sizes=[16, 24], images=3, rounds=1)
    first, second = report.tables["loader"]
    assert (first["size"], second["size"]) == (16, 24) and min(first.values()) > 0
    assert list(first)[1:] == ["training", "training with augment.draft", "evaluation", "Pillow", "torchvision"]
    assert report.figures["24/Pillow"] == second["Pillow"] and "3 500 x 375 JPEGs, generated" in report.lines[0]
    for part in ("train/a", "val/a"):
        loader.generate(tmp_path / part, 1)
    own = loader.loader(sizes=16, images=5, rounds=1, root=str(tmp_path))
    assert f"1 images of {tmp_path}" in own.lines[0]
    with pytest.raises(UserError, match=r"loader: images must be a whole number of at least 1, got 0; set probe"):
        loader.loader(images=0)
