"""`load_weights` reads our directories and the authors' files, and says what is wrong with others."""

import argparse
import collections
import datetime
import functools
import importlib
import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import load_weights
from models.checkpoints.format.directory import step_name
from models.checkpoints.format.write import point
from models.checkpoints.write import write_checkpoint, write_weights
from models.runs.resume import find_resume

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


@pytest.mark.case(29)
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
        lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        lambda w: {"net": w, "acc": 91.2, "epoch": 3},
        lambda w: {"best_weights": w, "ema_weights": AVERAGE, "optimizer": {"state": {"w": dict.fromkeys("abc", 1)}}},
        lambda w: {"run": {"student": {"backbone": w}}, "teacher": AVERAGE, "rng": torch.ones(2).byte().tolist()},
        lambda w: {"state_dict": {f"model._orig_mod.{name}": value for name, value in w.items()}, "epoch": 1},
        lambda w: {"state_dict": {f"net.module.{name}": value for name, value in w.items()}},
        lambda w: {"module": {name.replace(".", "._checkpoint_wrapped_module."): value for name, value in w.items()}},
        lambda w: {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in w.items()}},
        lambda w: {
            **w,
            "total_ops": torch.zeros(1),
            "norm.total_ops": torch.ones(1),
            "norm.total_params": torch.ones(1),
        },
    ],
)
def test_authors_nests_are_unwrapped(tmp_path, nest):
    torch.save(nest(WEIGHTS), tmp_path / "paper.pth")
    assert same(load_weights(tmp_path / "paper.pth"), WEIGHTS)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict", "teacher"])
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
    with pytest.raises(ValueError, match=r"could run code, got .*evil\.pth: .*; export its state_dict"):
        load_weights(tmp_path / "evil.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match=r"got .*evil\.pth with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD set; unset that"):
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


YACS = """
from pathlib import Path
Path({marker!r}).touch()

class CfgNode(dict):
    def __init__(self, *args, **items):
        super().__init__(*args, **items)
        self.frozen = True

    def __setstate__(self, state):
        Path({marker!r}).touch()
"""


@pytest.fixture
def yacs(tmp_path, monkeypatch):
    """`yacs.config` as a module that leaves a marker when it is imported and when one of its objects is read.

    The test gets the class, the marker, and a function after which the module is not imported any more.
    """
    marker, package = tmp_path / "marker", tmp_path / "packages" / "yacs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "config.py").write_text(YACS.format(marker=str(marker)))
    monkeypatch.syspath_prepend(package.parent)

    def forget():
        marker.unlink(missing_ok=True)
        for name in ("yacs.config", "yacs"):
            sys.modules.pop(name, None)

    forget()
    yield importlib.import_module("yacs.config").CfgNode, marker, forget
    forget()


def test_settings_beside_the_weights_are_left_out_and_none_of_their_code_runs(tmp_path, yacs):
    node, marker, forget = yacs
    settings = argparse.Namespace(lr=np.float64(1e-3), path=Path("data"), betas=(0.9, np.float32(0.999)), sizes={1, 2})
    content = {
        "model": WEIGHTS,
        "args": settings,
        "config": node(MODEL=node(NAME="biformer"), KINDS=[node(), frozenset([1])]),
        "history": collections.defaultdict(list, {"loss": [np.float32(1.5)], np.int64(3): np.arange(3)}),
        "space": types.SimpleNamespace(dtype=np.dtype("float32"), name=np.str_("x"), raw=b"", whole=range(3)),
        Path("a/path/as/a/key"): 2**70,
        "max_accuracy": np.float64(81.4),
    }
    torch.save(content, tmp_path / "paper.pth")
    forget()
    torch.load(tmp_path / "paper.pth", weights_only=False)
    assert marker.exists(), "reading it without care runs the code"
    forget()
    assert same(load_weights(tmp_path / "paper.pth"), WEIGHTS)
    assert not marker.exists() and "yacs" not in sys.modules
    assert argparse.Namespace(lr=1).lr == 1 and collections.defaultdict(list)[0] == []


def test_weights_inside_a_mapping_of_a_known_kind(tmp_path, yacs):
    node, marker, forget = yacs
    torch.save({"state_dict": node(collections.defaultdict(list, WEIGHTS))}, tmp_path / "paper.pth")
    forget()
    assert same(load_weights(tmp_path / "paper.pth"), WEIGHTS)
    assert not marker.exists()


def test_settings_do_not_hide_a_file_that_would_run_code(tmp_path):
    settings = argparse.Namespace(payload=Payload(tmp_path / "marker"))
    torch.save({"model": WEIGHTS, "args": settings}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"could run code, got .*evil\.pth: it asks for posix\.mkdir; export its"):
        load_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "marker").exists()


def test_objects_of_unknown_kinds_are_refused(tmp_path):
    torch.save({"model": WEIGHTS, "when": datetime.date(2023, 3, 1)}, tmp_path / "paper.pth")
    with pytest.raises(
        ValueError, match=r"holds more than weights .*: it asks for datetime\.date; export its state_dict"
    ):
        load_weights(tmp_path / "paper.pth")


def test_files_of_torch_before_1_6(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_weights(tmp_path / "old.pth"), WEIGHTS)
    content = {"model": WEIGHTS, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_weights(tmp_path / "old.pth"), WEIGHTS)
    content["payload"] = Payload(tmp_path / "marker")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"could run code, got .*: it asks for posix\.mkdir; export its state_dict"):
        load_weights(tmp_path / "old.pth")
    assert not (tmp_path / "marker").exists()


def test_what_lightning_keeps_beside_the_weights(tmp_path):
    given = {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-3), "criterion": torch.nn.CrossEntropyLoss()}
    content = {"state_dict": {f"net.{name}": value for name, value in WEIGHTS.items()}, "hyper_parameters": given}
    torch.save(content, tmp_path / "epoch_003.ckpt")
    assert same(load_weights(tmp_path / "epoch_003.ckpt"), WEIGHTS)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"holds a model itself, got .*model\.pt; save its state_dict\(\) instead"):
        load_weights(tmp_path / "model.pt")


def test_the_folder_of_a_run_means_its_best(tmp_path):
    path = directory(tmp_path / "run" / "checkpoints")
    for name in ("", "last", "best"):
        if name:
            point(path.with_name(name), path)
        assert same(load_weights(tmp_path / "run"), WEIGHTS) and same(load_weights(tmp_path / "run", ema=True), AVERAGE)
    assert find_resume(str(tmp_path / "run"), tmp_path) == path


def test_a_file_is_known_by_its_content(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.bin")
    torch.save(WEIGHTS, tmp_path / "weights.model")
    for name in ("weights.bin", "weights.model"):
        assert same(load_weights(tmp_path / name), WEIGHTS)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        path = directory(tmp_path)
        write_weights(tmp_path / "w.safetensors", WEIGHTS, {})
        write_weights(tmp_path / "w.pth", WEIGHTS, {})
    finally:
        os.umask(before)
    files = [*path.iterdir(), tmp_path / "w.safetensors", tmp_path / "w.pth"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask} and len(files) == 6


@pytest.mark.parametrize("size", [0, 3, 100, 700, -600, -1])
@pytest.mark.parametrize("kind", ["archive", "old", "safetensors"])
def test_a_truncated_file_gives_one_sentence_and_no_weights(tmp_path, kind, size):
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    weights = {"norm.weight": torch.ones(300), "head.weight": torch.ones(2, 300)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=kind == "archive")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"load_weights: (this file cannot be read|not a valid safetensors file), got .*cut"
    ) as raised:
        load_weights(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_other_kinds_of_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "picture.pth").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\nsize 52589568\n")
    (tmp_path / "picture.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    for name in ("archive.pth", "picture.pth", "pointer.pth"):
        with pytest.raises(
            ValueError, match=rf"cannot be read, got .*{name}: .*; give a file of weights, or fetch it again$"
        ):
            load_weights(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"not a valid safetensors file, got .*picture\.safetensors: .*; fetch it again$"
    ):
        load_weights(tmp_path / "picture.safetensors")


def test_a_file_that_holds_itself_ends(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "ring.pth")
    with pytest.raises(ValueError, match=r"no weights were found, got .*ring\.pth with the keys: model"):
        load_weights(tmp_path / "ring.pth")
