"""What the probes that explain images write, from the command line to the files."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conf.errors import UserError
from models import create_model
from models.probes.explanations import explained_images
from models.probes.flow import flow
from models.probes.relevance import relevance
from models.probes.rollout import rollout

SMALL = ("model=vit_32px", "model.patch_size=8", "model.dim=32", "model.depth=2", "data=digits", "probe.images=2")


@pytest.fixture
def evaluate(command, tmp_path):
    """`evaluate("probe=rollout", …) -> (status, output, errors)` of a small ViT with weights of its own."""
    torch.manual_seed(0)
    model = create_model("vit_32px", patch_size=8, dim=32, depth=2, num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    return lambda *given: command("eval", "ckpt=w.safetensors", *SMALL, *given)


def test_pictures_tables_and_the_deletion_test(evaluate, tmp_path):
    status, out, err = evaluate("probe=relevance", "probe.target=label")
    assert status == 0, err
    assert "deletion test on 2 images: without the most relevant 25% of the picture the class has" in out
    folder = tmp_path / "evaluation" / "digits-32-w-relevance"
    names = ["0.png", "359.png", "deletion.csv", "deletion.png", "images.csv", "map.csv", "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == names
    rows = list(csv.DictReader((folder / "images.csv").open()))
    assert [row["image"] for row in rows] == ["0", "359"] and all(row["class"] == row["label"] for row in rows)
    cells = list(csv.DictReader((folder / "map.csv").open()))
    assert len(cells) == 32 and [cells[-1][key] for key in ("image", "row", "column")] == ["359", "3", "3"]
    figures = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    assert figures["layers"] == 2 and 0 < figures["deletion/most"] < 1
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 3 and f"359: what counts for {rows[1]['label']} (" in page


@pytest.mark.full
@pytest.mark.parametrize("probe", ["rollout", "flow"])
def test_a_picture_of_the_user(probe, evaluate, tmp_path):
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "set.png")
    status, out, err = evaluate("input=set.png", f"probe={probe}", "probe.deletion=false")
    assert status == 0, err
    folder = tmp_path / "evaluation" / f"set-32-w-{probe}"
    assert sorted(path.name for path in folder.iterdir()) == ["images.csv", "map.csv", "report.html", "set.png"]
    weights = [float(row["weight"]) for row in csv.DictReader((folder / "map.csv").open())]
    assert sum(weights) == pytest.approx(1.0, abs=1e-4) and "4 × 4 cells" in out
    status, out, err = evaluate("input=set.png", f"probe={probe}", "probe.point=[0.1,0.9]")
    page = folder.with_name(f"{folder.name}-2") / "report.html"
    assert status == 0 and "where the marked point comes from" in page.read_text() and "deletion" not in out, err
    status, _, err = evaluate("input=set.png", "probe=relevance", "probe.target=label")
    assert status == 2 and "relevance: the images of input= have no labels" in err and "Traceback" not in err, err


@pytest.mark.parametrize("probe", [rollout, relevance, flow])
def test_options_are_judged_first(probe):
    with pytest.raises(UserError, match=r"probe: deletion must be true or false, got 'maybe'; set probe.deletion=tru"):
        probe(None, None, None, deletion="maybe")


def test_a_model_that_generates_has_no_class_to_explain():
    model = SimpleNamespace(generates=True)
    with pytest.raises(UserError, match=r"flow: SimpleNamespace generates images and has no class to explain; give a"):
        explained_images("flow", model, None, 1, None)
