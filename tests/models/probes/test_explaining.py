"""Attribution, Grad-CAM, integrated gradients, NormGrad: from the command line to the files, and the deletion test."""

import csv
import json
import sys

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from conf import extras
from models import create_model
from models.probes.attribution import METHODS, attribution, relevance_map
from models.probes.deletion import deletion_curve
from models.probes.gradcam import gradcam, gradcam_maps
from models.probes.integrated_gradients import integrated, integrated_gradients, plain, positive
from models.probes.normgrad import combined, normgrad, normgrad_maps
from models.probes.reading.maps import chosen_places
from models.probes.reading.propagation import propagate

PROBES = ("attribution", "gradcam", "integrated_gradients", "normgrad")
EVAL = ("eval", "ckpt=w.safetensors", "model=vit_32px", "data=digits", "data.workers=0")


@pytest.fixture
def weights(tmp_path):
    """Of a model that is sure of something."""
    torch.manual_seed(0)
    model = create_model("vit_32px", num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "set.png")


@pytest.mark.parametrize(
    "probe",
    ["integrated_gradients", *(pytest.param(name, marks=pytest.mark.full) for name in PROBES if name[0] != "i")],
)
def test_a_picture_of_the_user(command, weights, tmp_path, probe):
    status, out, err = command(*EVAL, f"probe={probe}", "input=set.png", "probe.target=7")
    assert status == 0 and "deletion test on 1 image:" in out, err
    folder = tmp_path / "evaluation" / f"set-32-w-{probe}"
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == ["deletion.csv", "deletion.png", "images.csv", "map.csv", "report.html", "set.png"]
    (row,) = csv.DictReader((folder / "images.csv").open())
    assert row["image"] == "set" and row["class"] == "7"
    figures = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    assert {"deletion/most", "deletion/random", "deletion/least"} < figures.keys()
    if probe == "attribution":
        assert figures["conservation"] < 1e-3 and "conservation: of an image's relevance of 1 at most" in out
    if probe == "normgrad":
        assert figures["layers"] == 4
    if probe == "integrated_gradients":
        assert 0 <= figures["convergence"] < 0.5 and "convergence: the sums over the pixels are " in out
        assert abs(float(row["sum"]) - float(row["logit_difference"])) > 0


@pytest.mark.full
def test_images_of_validation_coupled_as_by_the_authors(command, weights, tmp_path):
    options = ("probe.images=2", "probe.coupled=true", "probe.deletion=false", "probe.target=label")
    status, _, err = command(*EVAL, "probe=attribution", *options)
    folder = tmp_path / "evaluation" / "digits-32-w-attribution"
    assert status == 0 and len(list(folder.glob("*.png"))) == 2, err
    rows = list(csv.DictReader((folder / "images.csv").open()))
    assert len(rows) == 2 and all(row["label"] == row["class"] for row in rows)
    assert json.loads(folder.with_suffix(".json").read_text())["conservation"] > 0.01


@pytest.mark.parametrize(
    ("probe", "option", "text"),
    [
        (
            attribution,
            {"method": "rollout"},
            "method must be one of transformer_attribution, last_layer, full, got 'rol",
        ),
        (attribution, {"start": 4}, "start must be a block from 0 to 3, got 4; set probe.start=0"),
        (attribution, {"coupled": 2}, "coupled must be true or false, got 2"),
        (attribution, {"deletion": 1}, "deletion must be true or false, got 1"),
        (gradcam, {"layers": "stages.7"}, "there is no layer 'stages.7'"),
        (gradcam, {"deletion": 1}, "deletion must be true or false, got 1"),
        (integrated_gradients, {"steps": 1}, "steps must be a whole number of at least 2, got 1; set probe.steps=50"),
        (integrated_gradients, {"baseline": "red"}, "baseline must be one of mean, black, white, got 'red'"),
        (normgrad, {"virtual": "linear"}, "virtual must be one of conv1x1, conv3x3, scaling, bias, got 'linear'"),
        (normgrad, {"combine": "max"}, "combine must be product or sum, got 'max'; set probe.combine=product"),
    ],
)
def test_a_wrong_option_is_refused_before_any_image(probe, option, text):
    with pytest.raises(ValueError, match=text):
        probe(create_model("vit_32px"), None, None, **option)


@pytest.mark.parametrize("probe", [gradcam, integrated_gradients, normgrad])
def test_a_model_that_names_no_class_is_refused(probe):
    class Painter(torch.nn.Module):
        generates = True

    with pytest.raises(
        ValueError, match=f"^{probe.__name__}: Painter generates images and names no class; choose a cl"
    ):
        probe(Painter(), None, None)


@pytest.mark.parametrize("probe", ["gradcam", "integrated_gradients"])
def test_without_captum_it_is_said_how_to_install_it(probe, monkeypatch):
    cfg = OmegaConf.create({"probe": {"_target_": f"models.probes.{probe}.{probe}"}})
    assert extras.missing(cfg) == []
    monkeypatch.setitem(sys.modules, "captum", None)
    (sentence,) = extras.missing(cfg)
    assert sentence == (
        f"probe={probe} needs the package captum, which is not installed; "
        f"run: python -m pip install '{extras.requirement('captum')}'"
    )
    assert extras.missing(OmegaConf.create({"probe": {"_target_": "models.probes.normgrad.normgrad"}})) == []


def test_the_plain_picture_is_of_the_colours_of_the_image():
    class Data:
        mean, std = (0.5, 0.4, 0.2), (0.25, 0.2, 0.1)

    image = torch.rand(1, 3, 4, 6)
    assert torch.equal(plain(image, "mean", Data)[..., 0, 0], image.mean((2, 3)))
    torch.testing.assert_close(plain(image, "black", Data)[0, :, 3, 5], torch.full((3,), -2.0))
    torch.testing.assert_close(plain(image, "white", Data)[0, :, 0, 1], torch.tensor([2.0, 3.0, 8.0]))


@pytest.mark.full
@pytest.mark.parametrize("method", [*METHODS, "gradcam", "integrated_gradients", "normgrad"])
def test_what_counts_is_what_the_class_needs(digits_vit, method):
    """Without a quarter of the picture: what counts most is missed more than as much at random.

    That more than what counts least, except for Grad-CAM, whose map is 0 in many cells.
    """
    model, images, labels = digits_vit
    images, labels = images[:64], labels[:64]
    if method in METHODS:
        maps = relevance_map(propagate(model, images, labels), method)
    elif method == "integrated_gradients":
        maps = positive(integrated(model, images, plain(images, "mean", None), labels, 50).attributions)
    elif method == "gradcam":
        (maps,) = gradcam_maps(model, images, labels, chosen_places(method, model, "last")).values()
    else:
        found = normgrad_maps(model, images, labels, chosen_places(method, model, "stages"))
        maps = combined(list(found.values()), "product")
    curves = deletion_curve(model, images, labels, maps)
    most, random, least = (curves[order][2] for order in ("most", "random", "least"))
    assert most < random - 0.05 and (random < least or method == "gradcam")
