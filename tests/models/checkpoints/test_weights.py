"""`load_weights` reads our directories and the authors' files, and says what is wrong with others."""

import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import load_weights
from models.checkpoints.directory import step_name
from models.checkpoints.write import point, write_checkpoint

WEIGHTS = {"norm.weight": torch.ones(3), "head.weight": torch.arange(6.0).view(2, 3)}
AVERAGE = {name: value + 1 for name, value in WEIGHTS.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def directory(folder, ema=True):
    tensors = {"model.safetensors": WEIGHTS} | ({"ema.safetensors": AVERAGE} if ema else {})
    path = folder / step_name(800)
    write_checkpoint(path, tensors, {"config.json": {}}, {"step": 800, "epoch": 1, "metrics": {}, "versions": {}})
    return path


def test_directories_and_pointers(tmp_path):
    path = directory(tmp_path)
    point(tmp_path / "best", path)
    for source in (path, str(path), tmp_path / "best"):
        assert same(load_weights(source), WEIGHTS)
        assert same(load_weights(source, ema=True), AVERAGE)
    assert same(load_weights(path / "model.safetensors"), WEIGHTS)
    assert same(load_weights(path / "ema.safetensors", ema=True), AVERAGE)


def test_averaged_weights_that_are_not_there(tmp_path):
    path = directory(tmp_path, ema=False)
    with pytest.raises(
        ValueError, match=r"this checkpoint has no averaged weights, got .*step-00000800; use ema=False"
    ):
        load_weights(path, ema=True)
    with pytest.raises(ValueError, match="a single file has no averaged weights beside it"):
        load_weights(path / "model.safetensors", ema=True)
    torch.save({"model": WEIGHTS}, tmp_path / "paper.pth")
    with pytest.raises(ValueError, match="this file has no averaged weights"):
        load_weights(tmp_path / "paper.pth", ema=True)


def test_a_missing_path_lists_the_checkpoints_near_it(tmp_path):
    directory(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"nothing at this path, got .*model\.pth; choose one of step-00000800 in"):
        load_weights(tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no checkpoint was found"):
        load_weights(tmp_path / "a" / "b" / "c")


def test_a_damaged_weight_file_is_named(tmp_path):
    path = directory(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"checksum mismatch in .*model\.safetensors"):
        load_weights(path.parent)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load_weights(path)


@pytest.mark.parametrize(
    "nest",
    [
        lambda w: w,
        lambda w: {"model": w},
        lambda w: {"state_dict": w, "epoch": 299},
        lambda w: {"model": {"state_dict": w}},
        lambda w: {"model": {f"module.{name}": value for name, value in w.items()}},
        lambda w: {"state_dict": {f"module._orig_mod.{name}": value for name, value in w.items()}},
        lambda w: {"model": w, "model_ema": AVERAGE, "optimizer": {"state": {}}, "lr": 0.1},
    ],
)
def test_authors_nests_are_unwrapped(tmp_path, nest):
    torch.save(nest(WEIGHTS), tmp_path / "paper.pth")
    assert same(load_weights(tmp_path / "paper.pth"), WEIGHTS)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_authors_averages(tmp_path, key):
    torch.save(
        {"state_dict": WEIGHTS, key: {f"module.{name}": value for name, value in AVERAGE.items()}}, tmp_path / "p.pt"
    )
    assert same(load_weights(tmp_path / "p.pt", ema=True), AVERAGE)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    torch.save({"model": WEIGHTS, "args": Payload(tmp_path / "marker")}, tmp_path / "evil.pth")
    for force in (None, "1"):
        if force:
            monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
        with pytest.raises(ValueError, match=r"could run code, got .*evil\.pth: .*; export its state_dict"):
            load_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "marker").exists()


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    for name in ("empty.pth", "page.pth"):
        with pytest.raises(ValueError, match=rf"got .*{name}"):
            load_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"no weights were found, got .* with the keys: epoch"):
        load_weights(tmp_path / "none.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="a mapping of weights was expected, got Tensor"):
        load_weights(tmp_path / "tensor.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed, which torch never does"):
        load_weights(tmp_path / "bomb.pth")


def test_a_plain_safetensors_file(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert same(load_weights(tmp_path / "w.safetensors"), WEIGHTS)
