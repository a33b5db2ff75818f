"""`init=`: a new run starts from the weights of another one, of another image size, or of the authors' file."""

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from models import create_model
from models.callbacks.ema import EMA
from models.checkpoints import export
from models.factory import instantiate
from models.runs.initial import start_from
from tests.compositions import compose_once

DEIT = ("model=agent_deit_tiny", "model.dim=32", "model.depth=2", "model.num_heads=2", "model.patch_size=8")
SHAPE = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
ONE_STEP = ("trainer.max_steps=1", "logger=none", "data.workers=0", "trainer.accelerator=cpu", "data.batch_size=4")
FAKE = ("data=fake", "data.source.train_images=10", "data.source.val_images=4", *ONE_STEP)
STILL = ("optimizer.lr=0", "schedule.warmup_lr=0", "schedule.min_lr=0")  # a step that changes nothing


def trained(command, tmp_path, *arguments: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights after a run of one step, and what it printed."""
    status, out, err = command("train", *arguments)
    assert status == 0, err
    name = next(argument for argument in arguments if argument.startswith("run.name=")).removeprefix("run.name=")
    return load_file(tmp_path / "outputs" / name / "checkpoints" / "last" / "model.safetensors"), out


@pytest.fixture
def first(command, tmp_path) -> dict[str, torch.Tensor]:
    """A run of 32 pixels, named `first`."""
    return trained(command, tmp_path, *DEIT, *FAKE, "image_size=32", "run.name=first")[0]


def equal(left, right, but=()) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left if key not in but)


@pytest.mark.case(28)
def test_a_run_starts_from_another_one_of_smaller_images(first, command, tmp_path):
    last = tmp_path / "outputs" / "first" / "checkpoints" / "last"
    arguments = (*DEIT, *FAKE, *STILL, "image_size=48", f"init={last}", "run.name=second")
    second, out = trained(command, tmp_path, *arguments)
    resized = {key for key in first if first[key].shape != second[key].shape}
    assert "stem.position.table" in resized and any("gather_bias.row" in key for key in resized)
    assert equal(first, second, but=resized)
    assert f"starts from {last}\nwarning: " in out and "the head" not in out
    warning = out.partition(f"starts from {last}\nwarning: ")[2].partition("\n")[0]
    assert "resized" in warning and f"'stem.position.table' and {len(resized) - 1} more" in warning
    status, out, err = command("train", *arguments)
    assert status == 0, err
    assert "continues from " in out and "step-00000001; init is not used" in out and "starts from" not in out


@pytest.mark.case(26)
def test_the_same_size_and_other_classes(first, command, tmp_path):
    """Of averaged weights, which are a file of their own."""
    average = tmp_path / "outputs" / "first" / "checkpoints" / "last" / "ema.safetensors"
    arguments = (*DEIT, *FAKE, *STILL, "image_size=32", "data.num_classes=7", f"init={average}", "run.name=second")
    second, out = trained(command, tmp_path, *arguments)
    assert equal(load_file(average), second, but=("head.weight", "head.bias"))
    assert len(second["head.weight"]) == 7 and second["head.weight"].abs().sum() > 0
    assert "the head starts anew: 10 classes in the weights, 7 in the data" in out and "resized" not in out


def test_settings_inside_of_settings(command, tmp_path):
    """Weights that fit are taken as they are, whatever the model was made with."""
    model = ("model=vit_32px", "model.depth=1", "model.dim=32", "attention=moh", "attention.core.qkv_bias=false")
    before, _ = trained(command, tmp_path, *model, *FAKE, "run.name=first")
    last = tmp_path / "outputs" / "first" / "checkpoints" / "last"
    after, out = trained(command, tmp_path, *model, *FAKE, *STILL, f"init={last}", "run.name=second")
    assert equal(before, after) and f"starts from {last}\n" in out and "warning: convert" not in out


def test_a_file_of_the_authors(command, tmp_path):
    """Raw weights are taken from it, as the authors do."""
    torch.manual_seed(1)
    model = create_model("agent_deit_tiny", num_classes=10, image_size=32, **SHAPE)
    raw = export(model.state_dict(), "agent_deit_tiny", image_size=32, **SHAPE)
    torch.save(
        {"model": raw, "state_dict_ema": {key: 0 * value for key, value in raw.items()}}, tmp_path / "theirs.pth"
    )
    arguments = (*DEIT, *FAKE, *STILL, "image_size=32", "init=theirs.pth", "run.name=from_theirs")
    found, out = trained(command, tmp_path, *arguments)
    assert equal(model.state_dict(), found) and "starts from theirs.pth" in out


def test_the_average_starts_from_the_weights_that_were_loaded(first, command, tmp_path, monkeypatch):
    """The average is copied from the model after the weights have arrived."""
    seen = []
    setup = EMA.setup

    def watched(self, trainer, task, stage):
        setup(self, trainer, task, stage)
        seen.append({key: value.clone() for key, value in self.model.state_dict().items()})

    monkeypatch.setattr(EMA, "setup", watched)
    last = tmp_path / "outputs" / "first" / "checkpoints" / "last"
    trained(command, tmp_path, *DEIT, *FAKE, "image_size=32", f"init={last}", "run.name=second")
    assert equal(first, seen[0])


def refused(command, *arguments: str) -> str:
    """The error of a run, which must not have looked at its data: there are none."""
    data = ("data=imagefolder", "data.root=/nowhere", "data.num_classes=10", *ONE_STEP)
    status, out, err = command("train", *data, "run.name=wrong", *arguments)
    assert status == 2 and "Traceback" not in err and out == ""
    return err


def test_what_is_no_checkpoint(command, tmp_path):
    assert "init: there is nothing at this path, got none.pth" in refused(command, *DEIT, "init=none.pth")
    (tmp_path / "empty").mkdir()
    assert "init: " in (text := refused(command, *DEIT, "init=empty")) and "got empty" in text
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image.pth", format="PNG")
    assert "init: this file cannot be read, got image.pth" in refused(command, *DEIT, "init=image.pth")
    assert not (tmp_path / "outputs" / "wrong" / "checkpoints").exists()


def test_a_file_that_may_not_be_read(monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("models.runs.initial.load_weights", denied)
    with pytest.raises(UserError, match=r"^init: secret.pth cannot be read: Permission denied; give a file that can$"):
        start_from("secret.pth", torch.nn.Linear(2, 2), {})


@pytest.mark.case(27)
def test_weights_of_another_mechanism(tmp_path):
    """Of the same backbone: what fits is loaded, and what is new is said."""
    path, small = tmp_path / "softmax.safetensors", {"num_classes": 10, "dim": 32, "depth": 1, "num_heads": 4}
    softmax = create_model("vit_32px", **small | {"num_classes": 4})
    save_file(softmax.state_dict(), path)
    chosen = ["model=vit_32px", "model.dim=32", "model.depth=1", "model.num_heads=4", "data=fake"]
    cfg, _ = compose_once([*chosen, "attention=agent", "pool=simpool"])
    cfg.run = {"model": "vit_32px", "attention": "agent"}
    model = create_model("vit_32px", "agent", pool="simpool", **small)
    said = start_from(str(path), model, OmegaConf.to_container(cfg, resolve=True))
    assert said[0] == f"starts from {path}" and said[1].startswith("the weights are of another attention or other")
    kept, new, dropped, head = said[1].splitlines()[1:]
    counted = sum(value.numel() for key, value in softmax.state_dict().items() if not key.startswith("head."))
    assert kept == f"  kept     {counted:,} parameters: stem, norm1, qkv, proj, norm2, mlp, norm"
    assert "core.dwc.weight" in new and "pooling." in new
    assert (dropped, head) == ("  dropped  nothing", "  head     new: 10 classes, 4 in the weights")
    (name,) = [name for name in model.state_dict() if name.endswith("attn.qkv.weight")]
    assert torch.equal(model.state_dict()[name], softmax.state_dict()[name])


TIMM = {"embed_dim": 32, "depth": 4, "num_heads": 2}
OURS = ("model=vit_tiny", "model.dim=32", "model.depth=4", "model.num_heads=2", "data=fake")


@pytest.mark.parametrize(
    ("given", "theirs", "said"),
    [
        (
            ("attention=agent",),
            {},
            ("new      62,432 parameters: core.gather_bias", "head     new: 10 classes, 1000 in"),
        ),
        (
            ("attention=window", "model.class_token=false"),
            {"num_classes": 0},
            ("resized  6,272 parameters: stem.position.table", "dropped  32 parameters: stem.class_token", ", none in"),
        ),
        (("model.in_channels=1",), {}, ("resized  8,192 parameters: stem.patch_embed.proj.weight",)),
        ((), {"num_classes": 0}, ("the head starts anew: none in the weights, 10 in the data",)),
    ],
)
def test_files_of_timm_start_what_they_fit(tmp_path, given, theirs, said):
    state = timm.create_model("vit_tiny_patch16_224", **TIMM | theirs).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    cfg, choices = compose_once([*OURS, *given])
    cfg.run = {key: choices[key] for key in ("model", "attention")}
    config = OmegaConf.to_container(cfg, resolve=True)
    model = instantiate(cfg.model)
    lines = "\n".join(start_from(str(tmp_path / "timm.safetensors"), model, config))
    assert all(text in lines for text in said), lines
    own = model.state_dict()
    assert torch.equal(own["stages.0.blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    places = state["pos_embed"] if own["stem.position.table"].shape[1] == 197 else state["pos_embed"][:, 1:]
    assert torch.equal(own["stem.position.table"], places)
    patches = state["patch_embed.proj.weight"]
    of_one = patches.sum(1, keepdim=True) if own["stem.patch_embed.proj.weight"].shape[1] == 1 else patches
    assert torch.equal(own["stem.patch_embed.proj.weight"], of_one)


@pytest.mark.full
def test_the_other_blocks_of_a_convnet_keep_their_mlp(tmp_path):
    """Of timm's ConvNeXt, with attention in the last two stages, whose blocks are then a transformer's."""
    shape = {"dims": [32, 32, 64, 64], "depths": [1, 1, 1, 1]}
    state = timm.create_model("convnext_tiny", **shape).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    given = [f"model.{key}={value}".replace(" ", "") for key, value in shape.items()]
    cfg, choices = compose_once(["model=convnext_tiny", "attention=softmax", "data=fake", *given])
    cfg.run = {key: choices[key] for key in ("model", "attention")}
    model = instantiate(cfg.model)
    start_from(str(tmp_path / "timm.safetensors"), model, OmegaConf.to_container(cfg, resolve=True))
    own = model.state_dict()
    for ours, theirs in (("norm2.weight", "norm.weight"), ("mlp.fc1.weight",) * 2, ("scale2.gamma", "gamma")):
        assert torch.equal(own[f"stages.2.blocks.0.{ours}"], state[f"stages.2.blocks.0.{theirs}"])


@pytest.mark.full
def test_weights_of_another_model(command, tmp_path):
    torch.save({"model": {"stem.weight": torch.zeros(3), "head.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    text = refused(command, "model=vit_32px", "init=other.pth")
    assert "train.py: init: the file lacks 'stem." in text and "of vit_32px" in text
    save_file(create_model("vit_32px", num_classes=10).state_dict(), tmp_path / "vit.safetensors")
    text = refused(command, "model=vit_32px", "model.depth=2", "init=vit.safetensors")
    assert "train.py: init: the file has 'stages.0.blocks.0." in text and "which vit_32px has not" in text


def test_a_backbone_without_its_head(command, tmp_path):
    pyramid = create_model("swin_32px", features_only=True).state_dict()
    save_file(pyramid, tmp_path / "detector.safetensors")
    assert (
        "init: the weights have no classifier, got the backbone of a detector or segmenter; "
        "give a classification checkpoint"
    ) in refused(command, "model=swin_32px", "init=detector.safetensors")
