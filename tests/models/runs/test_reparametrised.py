"""Runs whose weights are reparametrised: from plain weights, to other classes, and to a file of plain weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import create_model
from models.checkpoints import export
from models.checkpoints.__main__ import main
from models.cost import multiply_adds

SHAPE = {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
VIT = ("model=vit_32px", *(f"model.{key}={value}" for key, value in SHAPE.items()))
ONE_STEP = ("trainer.max_steps=1", "logger=none", "data.workers=0", "trainer.accelerator=cpu", "data.batch_size=4")
FAKE = ("data=fake", "data.source.train_images=10", "data.source.val_images=4", "image_size=32", *ONE_STEP)
STILL = ("optimizer.lr=0", "schedule.warmup_lr=0", "schedule.min_lr=0")  # a step that changes nothing


def vit(**options):
    return create_model("vit_32px", num_classes=10, **SHAPE | options)


@pytest.fixture
def run(command, tmp_path):
    def trained(name: str, *arguments: str) -> tuple[str, str]:
        status, out, err = command("train", *VIT, *FAKE, f"run.name={name}", *arguments)
        assert status == 0, err
        return str(tmp_path / "outputs" / name / "checkpoints" / "last"), out

    return trained


@pytest.mark.parametrize("reparam", ["sigma", "mhe"])
def test_from_plain_weights_and_to_plain_weights(reparam, run, tmp_path):
    torch.manual_seed(3)
    plain = vit().state_dict()
    save_file(plain, tmp_path / "plain.safetensors")
    last, out = run("first", *STILL, f"reparam={reparam}", f"init={tmp_path / 'plain.safetensors'}")
    assert f"starts from {tmp_path / 'plain.safetensors'}\nits weights are reparametrised" in out
    model = vit(reparam=reparam)
    model.load_state_dict(load_file(f"{last}/model.safetensors"))
    arguments = [last, "--model", "vit_32px", "-o", str(tmp_path / "folded.safetensors")]
    assert main(["convert", *arguments]) == 0
    folded = vit()
    folded.load_state_dict(load_file(tmp_path / "folded.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded.eval()(images), model.eval()(images))
    if reparam == "sigma":  # shared heads are another function
        for name, value in folded.state_dict().items():
            torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


def test_export_says_that_it_folds(run, tmp_path, capsys):
    last, _ = run("first", "reparam=sigma", "initializer=mimetic", "model.activation=relu2")
    arguments = [last, "--ema", "--model", "vit_32px", "-o", str(tmp_path / "theirs.pth")]
    assert main(["export", *arguments]) == 0
    said = capsys.readouterr().out
    assert "reparametrised weights were folded into plain ones" in said and "→ facebookresearch/deit" in said
    assert "blocks.0.attn.qkv.weight" in torch.load(tmp_path / "theirs.pth")["model"]


@pytest.mark.parametrize("of", ["plain", pytest.param("authors", marks=pytest.mark.full)])
def test_a_model_that_is_reparametrised_by_its_row(of, command, tmp_path):
    """From plain weights and from a file of the authors, in whose names it is written again."""
    torch.manual_seed(3)
    chosen = {"image_size": 32, "num_classes": 10, **SHAPE} | ({"own_reparam": None} if of == "plain" else {})
    file = create_model("sigma_vit_tiny", **chosen).state_dict()
    if of == "authors":
        file = export(file, "sigma_vit_tiny", **chosen)
    file = {name: value for name, value in file.items() if of == "authors" or "norm" not in name}
    save_file({name: value.contiguous() for name, value in file.items()}, tmp_path / "start.safetensors")
    sizes = (f"model.{key}={value}" for key, value in SHAPE.items())
    given = ("model=sigma_vit_tiny", *sizes, *FAKE, *STILL, f"init={tmp_path / 'start.safetensors'}", "run.name=first")
    status, out, err = command("train", *given)
    assert status == 0, err
    assert ("its weights are reparametrised" in out) == (of == "plain")
    last = tmp_path / "outputs" / "first" / "checkpoints" / "last"
    trained = load_file(last / "model.safetensors")
    weight = trained["head.parametrizations.weight.original"]
    torch.testing.assert_close(weight, file["head.weight"])
    assert main(["export", str(last), "--model", "sigma_vit_tiny", "-o", str(tmp_path / "theirs.pth")]) == 0
    theirs = torch.load(tmp_path / "theirs.pth")["model"]
    torch.testing.assert_close(theirs["head.sigma"], trained["head.parametrizations.weight.0.sigma"])


@pytest.mark.full
def test_a_head_for_other_classes_starts_anew_with_its_norm(run, tmp_path):
    last, _ = run("first", "reparam=sigma")
    _, out = run("second", *STILL, "reparam=sigma", "data.num_classes=7", f"init={last}")
    assert "the head starts anew: 10 classes in the weights, 7 in the data" in out
    second = load_file(tmp_path / "outputs/second/checkpoints/last/model.safetensors")
    head = second["head.parametrizations.weight.original"]
    norm = second["head.parametrizations.weight.0.sigma"]
    torch.testing.assert_close(torch.linalg.matrix_norm(head, 2), norm[0])


@pytest.mark.parametrize("chosen", [{"reparam": "sigma"}, {"reparam": "mhe"}, {"wiring": "parallel"}])
def test_costs_what_the_plain_model_costs(chosen):
    assert multiply_adds(vit(**chosen), (32, 32)) == multiply_adds(vit(), (32, 32))


def test_four_evaluations_cost_four_times_as_much():
    costs = [
        multiply_adds(vit(wiring=wiring, depth=depth), (32, 32)) for wiring, depth in (("rk4", 1), ("parallel", 4))
    ]
    assert costs[0] == costs[1]
