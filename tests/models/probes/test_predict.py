"""Predicting a user's images, from the command line to the files."""

import csv
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models import create_model
from models.runs.finished import legible


@pytest.fixture
def photos(tmp_path):
    """Three images, one of them below, a broken one, and a text."""
    folder = tmp_path / "new photos (1)"
    (folder / "more").mkdir(parents=True)
    for place, grey in (("a.png", 10), ("b.jpg", 200), ("more/c.webp", 90)):
        Image.new("RGB", (50, 40), (grey, 255 - grey, 40)).save(folder / place)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("a.png\nnowhere.png\n")
    return folder


@pytest.mark.full
def test_a_folder_and_a_list(command, photos, tmp_path, image_tree):
    root = image_tree(("ant", "bee", "cat"))
    model = create_model("vit_32px", num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    weights = ("ckpt=w.safetensors", "model=vit_32px", "data=imagefolder", f"data.root={root}", "data.workers=0")
    status, out, err = command("eval", *weights, f"input={photos}")
    assert status == 0, err
    assert "3 images: " in out and "; 1 unreadable (unreadable.csv)" in out and "left out" in out and "1 .txt" in out
    folder = tmp_path / "evaluation" / "new photos (1)-32-w-predict"
    rows = list(csv.DictReader((folder / "predictions.csv").open()))
    assert [row["file"] for row in rows] == [str(photos / name) for name in ("a.png", "b.jpg", "more/c.webp")]
    assert {row["class"] for row in rows} <= {"ant", "bee", "cat"} and "class_3" in rows[0] and "class_4" not in rows[0]
    (broken,) = csv.DictReader((folder / "unreadable.csv").open())
    assert broken["file"].endswith("broken.jpg") and "UnidentifiedImageError" in broken["reason"]
    page = (folder / "predictions.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "http" not in page
    assert json.loads(folder.with_name(f"{folder.name}.json").read_text())["unreadable"] == 1

    status, out, err = command("eval", *weights, f"input={photos / 'notes.txt'}", "probe.thumbnails=0", "probe.top=1")
    assert status == 0 and "1 image: 1 " in out and "FileNotFoundError" in out, err
    again = next(csv.DictReader((tmp_path / "evaluation/notes-32-w-predict/predictions.csv").open()))
    assert again == {name: rows[0][name] for name in ("file", "class", "probability")}


def test_nothing_to_predict(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.pth").touch()
    for given, text in (("nowhere", "there is nothing at this path, got nowhere"), ("empty", "no image, got empty")):
        status, _, err = command("eval", "ckpt=w.pth", "model=vit_32px", f"input={given}")
        assert status == 2 and text in err and "Traceback" not in err


def test_names_for_people():
    assert legible([], 1000)[0] == legible(["n01440764"] * 1000, 1000)[0] == "tench, Tinca tinca"
    assert legible(["a", "b"], 2) == ["a", "b"] and legible([], 2) == ["class 0", "class 1"]
