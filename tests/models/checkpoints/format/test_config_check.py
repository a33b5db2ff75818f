"""A configuration out of a file builds nothing but what this project defines."""

import sys
import types

import pytest
import torch

from models.checkpoints import check_config


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """A module of ours with one class, one foreign function and one plain value."""
    module = types.ModuleType("models.backbones.stand_in")
    module.Net = type("Net", (), {"__module__": module.__name__})
    module.load, module.torch, module.SIZE = torch.load, torch, 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    listed = {f"{module.__name__}.{name}" for name in ("Net", "load", "torch.load", "SIZE", "torch", "Missing")}
    monkeypatch.setattr("models.checkpoints.format.config.offered", lambda: listed)


GOOD = {
    "model": {
        "_target_": "models.backbones.stand_in.Net",
        "_convert_": "all",
        "attention": [{"_target_": "models.backbones.stand_in.Net", "_partial_": True}],
        "depths": [2, 2],
        "drop": 0.1,
        "name": None,
    }
}


def test_our_own_targets_pass():
    check_config(GOOD)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.load",
        "numpy.load",
        "torch.hub.load",
        "models",
        "modelsx.backbones.Net",
        "models..Net",
        "models.backbones.stand_in.Net ",
        "models.backbones.stand_in.Net\n",
        "models.backbones.stand_in.Net()",
        "models.backbones.__builtins__",
        "models.backbones._private",
        "mоdels.backbones.stand_in.Net",  # a Cyrillic o
        "models/backbones",
        "models.checkpoints.format.write.remove_checkpoint",
        "data:os.system",
        ["models.backbones.stand_in.Net"],
        None,
    ],
)
def test_foreign_targets_are_refused_with_their_path(target):
    with pytest.raises(ValueError, match=r"^config\.model\.attention\[0\]\._target_: must name something below"):
        check_config({"model": {"attention": [{"_target_": target}]}})


@pytest.mark.parametrize("name", ["load", "torch.load", "SIZE", "torch", "Missing"])
def test_what_our_modules_merely_import_is_refused(name):
    with pytest.raises(
        ValueError, match=r"config\.model\._target_: (must name a class or function of|there is no such)"
    ):
        check_config({"model": {"_target_": f"models.backbones.stand_in.{name}"}})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"a": {"b": "${oc.env:TOKEN}"}}, r"^config\.a\.b: interpolations are refused"),
        ({"a": ["x", {"b": "${seed}"}]}, r"^config\.a\[1\]\.b: interpolations are refused"),
        ({"${x}": 1}, r"interpolations are refused .* key"),
        ({"model": {"_args_": [1]}}, r"^config\.model\._args_: this key is refused"),
        ({"model": {"_recursive_": False}}, r"^config\.model\._recursive_: this key is refused"),
        ({"model": {"_convert_": "os"}}, r"^config\.model\._convert_: must be one of"),
        ({"model": {"_partial_": "yes"}}, r"^config\.model\._partial_: must be one of"),
        ({"model": {"__class__": 1}}, r"this key is refused"),
        ({"a": object()}, r"^config\.a: must be plain data, got object"),
        ({("a",): 1}, r"keys must be text"),
    ],
)
def test_other_surprises_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        check_config(config)


def test_deep_nesting_is_refused():
    config = {}
    for _ in range(100):
        config = {"a": config}
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        check_config(config)


def test_what_conf_does_not_offer_is_refused():
    """Ours alone is not enough: some of our functions write files."""
    with pytest.raises(ValueError, match=r"conf/ offers, got 'data.sources.split_file.write_split'"):
        check_config({"data": {"source": {"_target_": "data.sources.split_file.write_split", "path": "x"}}})
