"""Weights by their name on the hub: from its cache, downloaded, or one sentence."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import hub, load_weights
from models.runs.early import find_weights

NAME = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
WEIGHTS = {"norm.weight": torch.ones(3), "head.weight": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""

    def unreachable(*_, **__):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    return tmp_path / "hub"


def downloaded(cache, repository=NAME, file="model.safetensors") -> Path:
    """What the hub's own command leaves there."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(WEIGHTS, snapshot / file) if file.endswith("safetensors") else torch.save(WEIGHTS, snapshot / file)
    (snapshot / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    return snapshot


@pytest.mark.parametrize("name", [NAME, f"hf-hub:{NAME}", f"hf_hub:{NAME}@abc", "timm/vit_tiny_patch16_224"])
def test_what_the_cache_has_needs_no_network(cache, name):
    snapshot = downloaded(cache)
    for path in (name, snapshot):  # the folder too
        assert load_weights(path).keys() == WEIGHTS.keys()
    assert find_weights([f"init={name}"]) == [f"init={name}"]


def test_an_older_file_of_torch(cache):
    downloaded(cache, "someone/vit", "pytorch_model.bin")
    weights = load_weights("hf-hub:someone/vit:pytorch_model.bin")
    assert torch.equal(weights["head.weight"], WEIGHTS["head.weight"])


def test_a_pickle_must_be_asked_for_by_its_name(cache, tmp_path, monkeypatch):
    def download(repository, file, **where):
        torch.save(WEIGHTS, tmp_path / file)
        return str(tmp_path / file)

    def info(api, repository, revision, timeout):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in ("README.md", "vit.pth")])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    downloaded(cache, "someone/vit", "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickles, got hf-hub:someone/vit; .*: hf-hub:someone/vit:vit\.pth$"):
        load_weights("hf-hub:someone/vit")
    assert load_weights("hf-hub:someone/vit:vit.pth").keys() == WEIGHTS.keys()
    folder = downloaded(cache, "other/vit", "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=rf"only a pickle, got {folder}; .* name the file: {folder}/pytorch_model\.bin$"
    ):
        load_weights(folder)
    assert load_weights(folder / "pytorch_model.bin").keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match=r"this repository has no other\.bin, got"):
        load_weights("hf-hub:someone/vit@main:other.bin")


def test_weights_are_downloaded_with_the_configuration_beside_them(cache, tmp_path, monkeypatch):
    asked = []

    def download(repository, file, **where):
        asked.append((repository, file, where["revision"]))
        save_file(WEIGHTS, tmp_path / "weights.safetensors")
        return str(tmp_path / "weights.safetensors")

    def info(api, repository, revision, timeout):
        files = ("README.md", "config.json", "vit.ckpt", "vit.safetensors")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_weights("hf-hub:someone/vit@v2").keys() == WEIGHTS.keys()
    assert asked == [("someone/vit", "config.json", "v2"), ("someone/vit", "vit.safetensors", "v2")]


def test_without_a_network_there_is_one_sentence(cache):
    with pytest.raises(ValueError, match=rf"^load_weights: {NAME} is not in .*hub, and the hub cannot be reached \(.*"):
        load_weights(NAME)
    with pytest.raises(ValueError, match=rf"^init: .*run `hf download {NAME}` where there is a network, or give a"):
        find_weights([f"init={NAME}"])
    with pytest.raises(ValueError, match=r"no model of this name, got timm/vit_tinny.*; did you mean 'vit_tiny_"):
        hub.fetch("timm/vit_tinny_patch16_224")


def test_what_the_hub_does_not_have(cache, monkeypatch):
    def unknown(*_, **__):
        raise huggingface_hub.errors.HFValidationError("Repo id must be in the form 'namespace/repo_name'")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    with pytest.raises(ValueError, match=r"has nothing .* under this name, got hf-hub:a/b c; look it up at https"):
        load_weights("hf-hub:a/b c")


def test_a_run_that_goes_on_does_not_look_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^init: there is nothing at this path, got none\.pth"):
        find_weights(["init=none.pth", "run.name=mine"])
    Path("outputs/mine/checkpoints").mkdir(parents=True)
    assert find_weights(["init=none.pth", "run.name=mine"])
    assert find_weights(["-m", "init=a,b"]) and find_weights(["init=null"])
