"""`python eval.py` on published files of weights and with recipes; checkpoints of runs are in test_train.py."""

import csv
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models import create_model
from models.checkpoints import export

ROOT = Path(__file__).parents[1]
SHAPE = {"dims": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
SMALL = [f"model.{key}={value}".replace(" ", "") for key, value in SHAPE.items()]
FAKE = ("data=fake", "data.source.val_images=6", "data.batch_size=3", "image_size=64", "trainer.accelerator=cpu")
RECIPE = ("recipe=biformer/tiny_in1k", *SMALL, *FAKE)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("biformer_tiny", num_classes=10, **SHAPE)


@pytest.fixture
def published(model, tmp_path) -> Path:
    """A file as BiFormer's authors write them, with an average and their arguments in it."""
    path = tmp_path / "biformer_best.pth"
    raw = export(model.state_dict(), "biformer_tiny", **SHAPE)
    average = {key: value / 2 if key == "head.weight" else value for key, value in raw.items()}
    torch.save({"model": raw, "model_ema": average, "epoch": 299, "args": Namespace(lr=5e-4)}, path)
    return path


@pytest.mark.full
def test_an_authors_file_and_a_recipe(published, command, model):
    status, out, err = command("eval", *RECIPE, f"ckpt={published}")
    assert status == 0, err
    figures = json.loads(published.with_name("biformer_best.pth.metrics.json").read_text())
    assert figures["model"] == "biformer_tiny" and figures["recipe"] == "biformer/tiny_in1k"
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["val/loss"] != figures["val/loss_ema"], "the average in the file is another model"
    lines = out.strip().splitlines()
    assert lines[-1].startswith("not reproduced: val/top1 ") and lines[-1].endswith(
        "with data=fake instead of imagenet1k"
    )
    assert "biformer_tiny with biformer attention on fake, biformer_best.pth" in out


def test_our_own_names_and_no_recipe(model, tmp_path, command):
    path = tmp_path / "ours.safetensors"
    save_file(model.state_dict(), path)
    status, out, err = command("eval", "model=biformer_tiny", *SMALL, *FAKE, f"ckpt={path}")
    assert status == 0, err
    assert "reproduced" not in out and "loss" in out


@pytest.mark.full
def test_evaluation_needs_no_training_images(published, command, tmp_path):
    for label in range(10):
        folder = tmp_path / "images" / "val" / f"class{label}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((70, 90, 3), 25 * label, np.uint8)).save(folder / "a.png")
    data = ("data=imagefolder", f"data.root={tmp_path / 'images'}", "image_size=64", "data.workers=0")
    status, out, err = command("eval", "recipe=biformer/tiny_in1k", *SMALL, *data, f"ckpt={published}")
    assert status == 0, err
    assert out.strip().endswith("with data=imagefolder instead of imagenet1k")
    status, _, err = command("train", "model=vit_32px", *data, "logger=none")
    assert status == 2 and "no folder" in err and "train" in err


@pytest.mark.full
def test_a_model_with_another_option_of_its_attention(command, tmp_path):
    model = create_model("biformer_tiny", num_classes=10, lepe_kernel=3, **SHAPE)
    torch.save({"model": export(model.state_dict(), "biformer_tiny", lepe_kernel=3, **SHAPE)}, tmp_path / "theirs.pth")
    status, _, err = command("eval", *RECIPE, "attention.lepe_kernel=3", f"ckpt={tmp_path / 'theirs.pth'}")
    assert status == 0, err
    assert "lepe.weight' must have the shape" in refused(command, *RECIPE, f"ckpt={tmp_path / 'theirs.pth'}").replace(
        "lepe.weight must", "lepe.weight' must"
    )


def test_the_second_form_of_the_authors_code_is_named(command, tmp_path):
    state = export(
        create_model("biformer_stl_nchw", num_classes=10, **SHAPE).state_dict(), "biformer_stl_nchw", **SHAPE
    )
    torch.save(state, tmp_path / "nchw.pth")
    status, out, err = command("eval", "recipe=biformer/stl_in1k", *SMALL, *FAKE, f"ckpt={tmp_path / 'nchw.pth'}")
    assert status == 0, err
    assert "warning: " in out and "biformer_stl_nchw is the model that gives its results" in out


@pytest.mark.slow
@pytest.mark.full
def test_two_devices(published, tmp_path):
    """Lightning starts the second process with the command as it was typed."""
    command = [sys.executable, ROOT / "eval.py", *RECIPE, f"ckpt={published}", "trainer.devices=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("with data=fake instead of imagenet1k")


def refused(command, *arguments: str) -> str:
    status, _, err = command("eval", *arguments)
    assert status == 2 and "Traceback" not in err, err
    return err


def test_a_file_alone_is_not_enough(published, command):
    err = refused(command, f"ckpt={published}")
    assert "holds weights and no configuration; say of what: recipe=... or model=... data=..." in err
    assert "python train.py list recipes" in err
    assert "no configuration" in refused(command, f"ckpt={published}", "model=biformer_tiny")


@pytest.mark.full
def test_files_that_are_not_the_models(published, command, tmp_path, model):
    path = tmp_path / "davit.pth"
    torch.save(create_model("davit_tiny", dims=[32] * 4, depths=[1] * 4, num_heads=[1] * 4).state_dict(), path)
    assert "none of biformer_tiny" in refused(command, *RECIPE, f"ckpt={path}")

    raw = export(model.state_dict(), "biformer_tiny", **SHAPE)
    large = {"head.weight": torch.zeros(21841, 64), "head.bias": torch.zeros(21841)}
    torch.save({"model": raw | large}, path)
    assert "the file must have 10 classes, got 21841" in refused(command, *RECIPE, f"ckpt={path}")

    torch.save({"model": {key: value for key, value in raw.items() if key != "norm.bias"}}, path)
    assert "the file lacks 'norm.bias' of biformer_tiny" in refused(command, *RECIPE, f"ckpt={path}")


def test_files_that_are_broken(published, command, tmp_path):
    half = tmp_path / "half.pth"
    half.write_bytes(published.read_bytes()[: published.stat().st_size // 2])
    picture = tmp_path / "picture.pth"
    Image.new("RGB", (8, 8)).save(picture, format="PNG")
    for path in (half, picture):
        assert f"this file cannot be read, got {path}" in refused(command, *RECIPE, f"ckpt={path}")
    assert "there is nothing at this path" in refused(command, *RECIPE, f"ckpt={tmp_path / 'none.pth'}")


def test_wrong_recipes(published, command, tmp_path):
    err = refused(command, "recipe=biformer/tiny", f"ckpt={published}")
    assert "there is no 'biformer/tiny'; did you mean 'biformer/tiny_in1k'" in err
    run = ("trainer.max_steps=1", "trainer.max_epochs=1", "logger=none", "run.name=short", "data.workers=0")
    assert command("train", "model=vit_32px", "data=fake", "data.batch_size=4", *run)[0] == 0
    ckpt = tmp_path / "outputs" / "short" / "checkpoints" / "last"
    err = refused(command, "recipe=davit/tiny_in1k", f"ckpt={ckpt}")
    assert "the recipe davit/tiny_in1k is for davit_tiny, the checkpoint holds vit_32px; give the recipe" in err


@pytest.mark.full
def test_several_checkpoints_and_sizes_in_one_command(command, tmp_path):
    torch.manual_seed(0)
    save_file(create_model("vit_32px", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:900])
    command_line = ("model=vit_32px", "data=fake", "data.source.val_images=6", "image_size=[32,48]", "weights=raw")
    status, out, err = command("eval", "ckpt=w.safetensors,half.safetensors", *command_line, "output=here", "-m")
    assert status == 2 and "2 of 4 evaluations failed: ckpt=half.safetensors image_size=32; ckpt=half" in err, err
    assert "2 of 4 evaluations" in out and "ckpt=half.safetensors image_size=48: load_weights: not a valid" in out
    assert "Traceback" not in err and not (tmp_path / "multirun").exists()
    small, large = (json.loads((tmp_path / f"here/fake-{size}-w.json").read_text()) for size in (32, 48))
    assert large["flops"] > 2 * small["flops"] and large["val/loss"] != small["val/loss"]
    with (tmp_path / "here/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["ckpt"], row["image_size"]) for row in rows] == [("w.safetensors", "32"), ("w.safetensors", "48")]
    assert rows[0]["loss"] == f"{small['val/loss']:.4f}"


def test_weights_that_are_not_there_are_not_taken(command, tmp_path):
    save_file(create_model("vit_32px", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    weights = ("ckpt=w.safetensors", "model=vit_32px", "data=fake", "data.source.val_images=6")
    assert "no averaged weights, got weights=ema; leave that out" in refused(command, *weights, "weights=ema")
    assert "weights must be raw, ema or auto, got 'best'" in refused(command, *weights, "weights=best")


@pytest.mark.full
def test_other_photos_are_all_measured_and_a_copy_as_in_training(command, tmp_path):
    for root, count in (("photos", 5), ("copy", 5), ("new", 3)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / root / name).mkdir(parents=True)
            for number in range(count):
                name_of = f"{root if root == 'new' else 'i'}{number}.png"
                Image.new("RGB", (32, 32), (90 * label, 10 * number, 9)).save(tmp_path / root / name / name_of)
    data = ("data=imagefolder", "data.root=photos", "data.batch_size=4", "data.workers=0", "logger=none")
    assert command("train", "model=vit_32px", *data, "trainer.max_epochs=1", "run.name=r")[0] == 0
    for root, count in (("photos", 2), ("copy", 2), ("new", 6)):
        status, _, err = command("eval", "ckpt=outputs/r", f"data.root={root}", f"output={root}-result")
        assert status == 0, err
        rows = (tmp_path / f"{root}-result/imagefolder-32-best/images.csv").read_text().splitlines()[1:]
        assert len(rows) == count, root
