"""Our models through timm's registry and torch.hub: same models, timm's own names untouched."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_data_config

import models.timm
from models import create_model, list_models
from tests.conftest import ROOT

NAMES = models.timm.names()


def test_every_model_is_registered_once():
    assert sorted(NAMES) == list_models() and len(set(NAMES.values())) == len(NAMES)
    assert all(timm.is_model(name) for name in NAMES.values())
    assert sorted(timm.list_models(module="timm")) == sorted(NAMES.values())


def test_timms_own_names_stay_timms():
    taken = {ours for ours, theirs in NAMES.items() if ours != theirs}
    assert taken and all(NAMES[name] == f"zoo_{name}" for name in taken)
    for name in taken:
        assert timm.model_entrypoint(name).__module__.startswith("timm.")
        assert timm.model_entrypoint(NAMES[name]).__module__ == "models.timm"


def test_it_is_our_model_with_what_timm_reads_of_it():
    torch.manual_seed(0)
    model = timm.create_model("vit_32px", num_classes=7, img_size=48, in_chans=1, drop_path_rate=0.1).eval()
    torch.manual_seed(0)
    ours = create_model("vit_32px", num_classes=7, image_size=48, in_channels=1, drop_path=0.1).eval()
    images = torch.randn(2, 1, 48, 48)
    assert torch.equal(model(images), ours(images)) and model.num_classes == 7
    data = resolve_data_config({}, model=model)
    assert data["input_size"] == (1, 48, 48) and data["mean"] == (0.485, 0.456, 0.406)
    assert timm.get_pretrained_cfg("swin_32px").input_size == (3, 32, 32)
    assert timm.create_model("coatnet_32px", attention="agent").num_classes == 1000


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"pretrained": True},
            "vit_32px: there are no weights to download, got pretrained=True; give checkpoint_path=",
        ),
        ({"depht": 3}, "create_model: vit_32px has no setting 'depht'; did you mean 'depth'"),
    ],
)
def test_what_is_not_there_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        timm.create_model("vit_32px", **settings)


@pytest.mark.full
def test_torch_hub_from_any_folder(tmp_path):
    program = f"""
import functools, runpy
import torch
entries = runpy.run_path({str(ROOT / "hubconf.py")!r}).values()
names = [entry for entry in entries if type(entry) is functools.partial]
model = torch.hub.load({str(ROOT)!r}, "vit_32px", source="local", attention="agent", num_classes=4)
print(len(names), tuple(model(torch.randn(1, 3, 32, 32)).shape))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(list_models())} (1, 4)"
