"""Models of timm in our runs: trained, measured, started from files, frozen, adapted, with a mechanism of ours."""

import copy
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from models import create_model, list_models
from models.adapters.lora import lora
from models.benchmark import partners
from models.callbacks.freezing import Freezing
from models.checkpoints import convert, load_weights
from models.reparam import fold
from models.surgery.any_timm import fitted
from models.tasks.base import _optimizer

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = (
    "model=timm", "image_size=32", "data.batch_size=4", "data.workers=0", "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1", "trainer.max_epochs=1", "logger=none",
)  # fmt: skip


def make(name="test_vit", **settings):
    torch.manual_seed(1)
    return create_model(f"timm/{name}", num_classes=5, image_size=32, **settings).eval()


def test_it_is_timms_model_with_its_names():
    model, plain = make(), timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(IMAGES), plain(IMAGES)) and isinstance(model, type(plain))
    logits, losses = model(IMAGES, return_losses=True)
    assert torch.equal(logits, plain(IMAGES)) and losses == {}
    assert model.no_weight_decay() == plain.no_weight_decay() and "timm" not in list_models()
    for alike in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(alike(IMAGES), logits) and type(alike) is type(model)


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize("ours", partners.USUAL)
def test_a_file_gives_the_same_logits_as_timms_model_and_as_ours(ours, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model(partners.TIMM[ours], num_classes=7)
    for parameter in plain.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    save_file(plain.state_dict(), tmp_path / "theirs.safetensors")
    weights, size = load_weights(tmp_path / "theirs.safetensors"), plain.default_cfg["input_size"][-1]
    theirs = create_model(f"timm/{partners.TIMM[ours]}", num_classes=7, image_size=size).eval()
    theirs.load_state_dict(weights)
    mine = create_model(ours, num_classes=7, image_size=size).eval()
    mine.load_state_dict(convert(weights, ours, num_classes=7, image_size=size))
    images = torch.randn(1, 3, size, size)
    torch.testing.assert_close(mine(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_settings_reach_timm():
    model = make("test_convnext", in_channels=4, drop_path=0.2, options={"head_init_scale": 0.5})
    assert model(torch.randn(1, 4, 32, 48)).shape == (1, 5) and model.in_channels == 4
    assert any(getattr(module, "drop_prob", 0) > 0.1 for module in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_frozen_decayed_by_layer_and_adapted(name):
    model = make(name)
    groups = _optimizer(model, {"opt": "adamw", "lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}).param_groups
    assert len({group["lr_scale"] for group in groups}) > 2
    Freezing(model, ["all"])
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key in model.state_dict() if key.startswith(model.answer) and "norm" not in key}
    adapted = make(name)
    lora(adapted, targets=["qkv"] if name == "test_vit" else ["conv1"] if name == "test_resnet" else None)
    torch.testing.assert_close(adapted(IMAGES), make(name)(IMAGES))
    fold(adapted)
    assert adapted.state_dict().keys() == make(name).state_dict().keys()


def test_blocks_are_recomputed():
    model = make().train()
    model(IMAGES).sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_gradient_checkpointing(True)
    model(IMAGES).sum().backward()
    assert all(torch.allclose(p.grad, grad, atol=1e-6) for p, grad in zip(model.parameters(), wanted, strict=True))


def test_files_of_other_sizes_classes_and_channels():
    plain = timm.create_model("test_vit", num_classes=7, img_size=64)
    model = make(in_channels=1)
    state, notes = fitted(plain.state_dict(), model)
    model.load_state_dict(state)
    assert notes == [
        "the head starts anew: 7 classes in the weights, 5 in the data",
        "the first convolution is adapted to 1 channels",
    ]
    assert torch.equal(state["blocks.0.attn.qkv.weight"], plain.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match=r"timm: the file must have 5 classes, got 7; fine-tune it, or evaluate it on"):
        fitted(plain.state_dict(), model, new_head=False)
    with pytest.raises(ValueError, match=r"timm: the weights must be those of VisionTransformer, got another"):
        fitted(timm.create_model("test_resnet").state_dict(), model)


def test_a_mechanism_takes_the_place_of_its_own():
    model = make(attention="agent", agent_tokens=4)
    assert type(model.blocks[0].attn).__name__ == "MultiHead"
    plain = timm.create_model("test_vit", num_classes=5, img_size=32)
    state, notes = fitted(plain.state_dict(), model)
    model.load_state_dict(state)
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    assert notes[0].startswith("the weights are of another attention or other parts:\n  kept ")
    for same in (make(attention="softmax"),):
        same.load_state_dict(plain.state_dict())
        torch.testing.assert_close(same(IMAGES), plain.eval()(IMAGES))


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("resnt50", {}, "timm: there is no model 'resnt50'; did you mean"),
        ("hf-hub:timm/resnet50", {}, "timm: there is no model 'hf-hub:timm/resnet50'"),
        ("test_resnet", {"gate": "eca"}, "timm: gate goes with backbones of ours, got test_resnet; leave gate= out"),
        ("test_resnet", {"attention": "agent"}, "replace: the model must be a VisionTransformer (ViT, DeiT) or a Swin"),
        ("test_vit", {"options": {"pretrained": True}}, "timm: options must be keywords of test_vit's own, got pretra"),
        ("test_vit", {"options": {"depht": 3}}, "timm: test_vit cannot be made with num_classes=5, in_chans=3, img_"),
        ("vgg11", {"drop_path": 0.1}, "timm: vgg11 cannot be made with num_classes=5, in_chans=3, drop_path_rate=0.1:"),
    ],
)
def test_what_a_model_has_not_is_refused(name, settings, text):
    with pytest.raises(ValueError) as error:
        make(name, **settings)
    assert str(error.value).startswith(text)


def test_gradient_checkpointing_where_there_is_none():
    with pytest.raises(ValueError, match="cannot recompute blocks, got gradient_checkpointing=true; set task"):
        make("vgg11").set_gradient_checkpointing(True)


@pytest.mark.full
def test_a_run_from_a_file_and_its_evaluation(command, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=7)
    save_file(plain.state_dict(), tmp_path / "vit.safetensors")
    arguments = (*SMALL, "model.name=test_vit", "init=vit.safetensors", "optimizer.lr=0", "attention=softmax")
    status, out, err = command("train", "run.name=t", *arguments, "adapter=lora", "freeze=patch_embed")
    assert status == 0, err
    assert "timm's test_vit with softmax attention, adapter lora on digits" in out
    assert "starts from vit.safetensors" in out and "7 classes in the weights, 10 in the data" in out
    saved = load_file(tmp_path / "outputs/t/checkpoints/last/model.safetensors")
    assert torch.equal(saved["blocks.0.mlp.fc1.parametrizations.weight.original"], plain.blocks[0].mlp.fc1.weight)
    status, out, err = command("eval", "ckpt=outputs/t/checkpoints/last", "data.workers=0")
    assert status == 0, err

    save_file(timm.create_model("test_vit", num_classes=10, img_size=32).state_dict(), tmp_path / "ten.safetensors")
    named = ("model=timm", "model.name=test_vit", "image_size=32", "data=digits", "data.workers=0")
    status, out, err = command("eval", "ckpt=ten.safetensors", *named)
    assert status == 0, err
    status, _, err = command("eval", "ckpt=vit.safetensors", *named)
    assert status == 2 and "the file must have 10 classes, got 7" in err
