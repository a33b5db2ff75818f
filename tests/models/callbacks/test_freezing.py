"""What is frozen stands still and computes as in evaluation; the rest is trained, for how long it was said."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from models import create_model
from models.callbacks.freezing import Freezing, freezing
from models.runs.identity import compare_configs
from models.tasks.base import _optimizer
from models.tasks.classification import Classification

SMALL = (
    "logger=none", "data.batch_size=8", "data.workers=0", "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1", "trainer.max_epochs=1",
    "model.dims=[16,16,32]", "model.stem_dim=16", "model.depths=[1,1,1]",
)  # fmt: skip


def coatnet(**options):
    return create_model("coatnet_32px", num_classes=4, dims=[16, 16, 32], stem_dim=16, depths=[1, 1, 1], **options)


def weights(run, step, file="model"):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def moved(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.fixture
def run(command, tmp_path):
    def make(name, *arguments):
        status, out, err = command("train", f"run.name={name}", "checkpoint.keep=9", *SMALL, *arguments)
        assert status == 0, err
        return tmp_path / "outputs" / name, out

    return make


def test_frozen_parts_and_their_statistics_do_not_move(run):
    """The average of what does not move is what it was, too."""
    folder, out = run("some", "freeze=[stem,stages.0,'stages.2.blocks.*.attn']", "checkpoint.every_n_steps=1")
    assert "frozen: stem, stages.0, stages.2.blocks.*.attn; 0.01 of 0.02 M parameters are trained" in out
    for file in ("model", "ema"):
        names = moved(weights(folder, 1, file), weights(folder, 2, file))
        frozen = ("stem.", "stages.0.", "stages.2.blocks.0.attn.")
        assert not [name for name in names if name.startswith(frozen)]
        assert any(name.startswith("stages.1.") for name in names)
        assert any(name.startswith("head.") for name in names)


def test_linear_probing_then_fine_tuning(run):
    folder, out = run("both", "freeze=all", "freeze_epochs=1", "checkpoint.every_n_steps=1", "trainer.max_epochs=2")
    assert "frozen for the first epoch: all; 0.00 of 0.02 M parameters are trained, then all" in out
    probed = moved(weights(folder, 1), weights(folder, 2))
    assert probed == {"head.weight", "head.bias"}
    tuned = moved(weights(folder, 2), weights(folder, 3))
    assert tuned >= {"head.weight", "stages.2.blocks.0.attn.qkv.weight"} and any("running_mean" in n for n in tuned)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stop", "arguments"),
    [
        (1, ("freeze=all", "freeze_epochs=1")),
        (4, ("freeze=all", "freeze_epochs=1")),
        (4, ("adapter=lora", "adapter.dropout=0.5")),
    ],
    ids=["while frozen", "afterwards", "adapter"],
)
def test_a_stopped_run_goes_on_exactly(run, command, stop, arguments, monkeypatch):
    longer = ("trainer.max_epochs=2", "trainer.limit_train_batches=3")
    whole, _ = run("whole", *arguments, *longer)
    step = Classification.training_step

    def interrupted(task, batch, batch_idx):
        if task.trainer.global_step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(task, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", interrupted)
    assert command("train", "run.name=parts", "checkpoint.keep=9", *SMALL, *arguments, *longer)[0] == 75
    monkeypatch.setattr(Classification, "training_step", step)
    parts, out = run("parts", *arguments, *longer)
    assert "continues from" in out
    assert moved(weights(whole, 6), weights(parts, 6)) == set()


def test_a_continued_run_freezes_the_same():
    saved = {"freeze": ["stem"], "freeze_epochs": None}
    with pytest.raises(ValueError, match=r"trained with freeze stem and not None as this command asks; give the same"):
        compare_configs(saved, {"freeze": None, "freeze_epochs": None})
    compare_configs({}, {"freeze": None, "freeze_epochs": None})


def test_parts_in_evaluation_mode():
    model = coatnet(drop_path=0.5).train()
    frozen = Freezing(model, ["stages.1"])
    frozen._follow(0)
    assert model.training and not any(module.training for module in model.stages[1].modules())
    assert all(module.training for module in model.stages[2].modules())
    groups = _optimizer(model, {"opt": "adamw", "lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}).param_groups
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith("stages.1.")}


def test_a_pool_is_trained_with_the_head():
    model = coatnet(pool="simpool")
    Freezing(model, ["all"])
    trained = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"pooling", "head"}


def test_routers_that_do_not_count_keep_their_choice():
    """Nothing was counted: 0 uses of 0 tokens."""
    model = create_model("vit_32px", "moh", num_classes=4, router="relu", balance="bias", depth=4, dim=32).train()
    Freezing(model, ["stages"])._follow(0)
    router = model.stages[0].blocks[0].attn.router
    model(torch.randn(2, 3, 32, 32))
    router.after_step()
    assert torch.equal(router.bias, torch.zeros_like(router.bias))


def test_power_iteration_goes_on_behind_a_frozen_stem():
    model = coatnet(reparam="sigma").train()
    Freezing(model, ["stem"])._follow(0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".u")}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model(torch.randn(2, 3, 32, 32))
    still = {name for name, buffer in model.named_buffers() if name in before and torch.equal(buffer, before[name])}
    assert still == {name for name in before if name.startswith("stem.")}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"freeze": ["stages.9"]}, "freeze: nothing in the model is called 'stages.9'; did you mean 'stages.2' or"),
        ({"freeze": ["x*"]}, "freeze: nothing in the model is called 'x*'; it has stem, stages, norm, head; or set"),
        ({"freeze": "*"}, "freeze: something must be left to train, got *, which is the whole model; set freeze=all"),
        ({"freeze": "*", "freeze_epochs": 1}, "freeze: something must be left to train"),
        ({"freeze": 3}, "freeze: must be names of modules, got 3; e.g. freeze=[stem,stages.0], or freeze=all"),
        ({"freeze": "all", "freeze_epochs": 0}, "freeze_epochs: must be a whole number of at least 1, got 0; leave"),
        ({"freeze_epochs": 2}, "freeze_epochs: it says how long freeze= lasts, got 2 and no freeze; set freeze=all"),
    ],
)
def test_what_cannot_be_is_refused(settings, text):
    with pytest.raises(ValueError) as error:
        freezing({"model": {}, **settings}, coatnet())
    assert str(error.value).startswith(text)


@pytest.mark.full
def test_a_run_with_an_adapter(run, command):
    """Its file is small and has all that moved; eval reads the checkpoint."""
    plain, _ = run("plain", "checkpoint.every_n_steps=1")
    start = f"init={plain}/checkpoints/step-00000001"
    arguments = ("adapter=lora", "adapter.rank=2", start, "checkpoint.every_n_steps=1")
    folder, out = run("lora", *arguments)
    assert "coatnet_32px with softmax attention, adapter lora on digits" in out and "the adapter trains 0.0" in out
    trained = weights(folder, 2, "adapter")
    assert all(name.startswith("head.") or name.endswith((".up", ".down")) for name in trained)
    whole = weights(folder, 2)
    assert moved(weights(folder, 1), whole) == trained.keys() and moved(trained, whole) == set()
    began = {name.replace(".parametrizations.weight.original", ".weight"): value for name, value in whole.items()}
    left = {k: v for k, v in weights(plain, 1).items() if k not in trained}
    assert moved(left, began) == set()

    status, out, err = command("eval", f"ckpt={folder}/checkpoints/last", "data.workers=0")
    assert status == 0, err
