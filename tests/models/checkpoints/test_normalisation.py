"""Mean and standard deviation belong to the weights: where they are read, and who uses them."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from models.checkpoints.format.directory import step_name
from models.checkpoints.format.write import point
from models.checkpoints.normalisation import for_channels, normalisation
from models.checkpoints.write import write_checkpoint
from models.runs import evaluated
from models.runs.initial import follow_weights, start_from

HALF, OTHER = ([0.5] * 3, [0.5] * 3), ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])


def data(known=OTHER):
    return {"mean": list(known[0]), "std": list(known[1])}


def checkpoint(folder, config):
    path = folder / "checkpoints" / step_name(1)
    weights = {"model.safetensors": {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}}
    write_checkpoint(path, weights, {"config.json": config}, {"step": 1, "epoch": 0, "metrics": {}, "versions": {}})
    point(path.parent / "best", path)
    return path


def test_where_they_are_read(tmp_path):
    path = checkpoint(tmp_path / "run", {"data": data()})
    for ours in (path, path.parent / "best", tmp_path / "run", path / "model.safetensors"):
        assert normalisation(ours) == OTHER
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file({"w": torch.zeros(1)}, hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": data()}))
    assert normalisation(hub) == normalisation(hub / "model.safetensors") == OTHER
    (tmp_path / "vit_tiny.augreg_in21k.pth").touch()
    assert normalisation(tmp_path / "vit_tiny.augreg_in21k.pth") == HALF
    assert normalisation(tmp_path / "vit_tiny.pth") is None


@pytest.mark.parametrize(
    "node", [None, {"mean": 0.5, "std": 0.5}, {"mean": [0.5], "std": [0]}, {"mean": ["x"], "std": [1]}]
)
def test_what_is_none_is_left_alone(tmp_path, node):
    assert normalisation(checkpoint(tmp_path, {"data": node})) is None
    assert normalisation(tmp_path / "nothing") is None


def test_other_numbers_of_channels():
    assert for_channels(OTHER, 3) == OTHER and for_channels(OTHER, 4) is None
    assert for_channels(([0.2, 0.4, 0.6], [0.1, 0.2, 0.3]), 1) == (pytest.approx([0.4]), pytest.approx([0.2]))


def given(monkeypatch, *overrides):
    config = SimpleNamespace(overrides=SimpleNamespace(task=list(overrides)))
    monkeypatch.setattr("models.runs.initial.HydraConfig.get", lambda: config)


def test_a_run_follows_the_weights_unless_it_is_told_otherwise(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, {"data": data()})
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr("models.runs.initial._given", lambda *_: [])
    for typed, used, said in (
        ((), OTHER, "images are normalised as for these weights: mean [0.48, 0.46, 0.41], std [0.27, 0.26, 0.28]"),
        (
            ("data.mean=[0.5,0.5,0.5]",),
            HALF,
            "images are normalised with mean 0.5, std 0.5; the weights had mean [0.48",
        ),
    ):
        given(monkeypatch, f"init={path}", *typed)
        config = {"init": str(path), "data": data(HALF), "model": {"reparam": None}}
        cfg = OmegaConf.create(config)
        follow_weights(cfg, config, None)
        assert config["data"] == cfg.data == data(used)
        assert start_from(str(path), model, config)[-1].startswith(said)


def test_a_run_that_goes_on_keeps_what_it_had(tmp_path, monkeypatch):
    given(monkeypatch)
    config = {"init": "gone.pth", "data": data(HALF)}
    follow_weights(OmegaConf.create(config), config, checkpoint(tmp_path, {"data": data()}))
    assert config["data"] == data()
    config = {"init": None, "data": data(HALF)}
    follow_weights(OmegaConf.create(config), config, checkpoint(tmp_path, {"data": data()}))
    assert config["data"] == data(HALF)


def test_an_evaluation_follows_them_too(tmp_path):
    node = data() | {"root": "x"}
    evaluated._as_the_weights_had_it(node, "vit_tiny.augreg_in21k.pth")
    assert node == data(HALF) | {"root": "x"}
    config = {"data": data(HALF), "seed": 0, "image_size": 32, "attention": {}, "model": {}, "augment": {}, "task": {}}
    path = checkpoint(tmp_path, config)
    assert evaluated._of_checkpoint({"ckpt": str(path), "data": "imagefolder"}, None)["data"] == data(HALF)
