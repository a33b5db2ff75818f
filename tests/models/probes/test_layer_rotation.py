"""How far weights have turned: the definition, and the weights that a run began with."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from models import create_model
from models.probes import Subject
from models.probes.layer_rotation import layer_rotation, rotations
from models.probes.reading.stored import stored
from tests.models.probes.runs import written


def turned(weights: torch.Tensor, angle: float) -> torch.Tensor:
    """Turned by an angle towards a direction at right angles, and twice as long."""
    aside = torch.randn_like(weights)
    aside -= (aside * weights).sum() / (weights * weights).sum() * weights
    return 2 * (math.cos(angle) * weights + math.sin(angle) * aside / aside.norm() * weights.norm())


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, math.pi / 2, math.pi])
def test_an_angle_is_found_whatever_the_length(angle):
    w0 = torch.randn(20, 30, dtype=torch.float64)
    zero = torch.zeros(3)
    rows, left_out = rotations({"w": turned(w0, angle), "zero": zero, "new": zero + 1}, {"w": w0, "zero": zero + 1})
    (row,) = rows
    assert row["rotation"] == pytest.approx(1 - math.cos(angle), rel=1e-6, abs=1e-15)
    assert row["degrees"] == pytest.approx(math.degrees(angle), rel=1e-6, abs=1e-5)
    assert row["growth"] == pytest.approx(2) and left_out == ["zero", "new"]


def subject(run, weights="raw") -> Subject:
    return Subject("", run / "checkpoints/step-00000010", None, weights, {}, run)


@pytest.mark.parametrize(
    "name", ["vit_32px", *(pytest.param(n, marks=pytest.mark.full) for n in ("swin_32px", "pvt_32px"))]
)
def test_the_first_weights_are_made_again(name, tmp_path):
    torch.manual_seed(7)
    run = written(tmp_path, f"model={name}", "seed=7")
    model, state = stored(run).model, torch.get_rng_state()
    report = layer_rotation(model, subject(run))
    assert report.figures["most"] == 0.0 and report.rows["compared with"] == "the weights of seed 7, made again"
    assert torch.equal(state, torch.get_rng_state()), "what draws afterwards draws the same numbers"


@pytest.mark.slow
@pytest.mark.full
def test_a_run_that_learns_nothing_has_not_turned(command, tmp_path):
    small = ("logger=none", "model=vit_32px", "model.depth=1", "trainer.max_steps=1", "trainer.limit_val_batches=1")
    assert command("train", *small, "seed=3", "optimizer.lr=0", "optimizer.weight_decay=0", "run.name=idle")[0] == 0
    status, out, err = command("eval", "ckpt=outputs/idle/checkpoints/last", "probe=layer_rotation")
    assert status == 0 and "the weights of seed 3, made again" in out and "0.0000, 0.0000" in out, err
    assert (tmp_path / "outputs/idle/evaluation/digits-32-last-layer_rotation/rotation.png").exists()


def test_an_earlier_checkpoint_and_a_file(tmp_path):
    model = create_model("vit_32px", num_classes=10, depth=1)
    small = ("model=vit_32px", "model.depth=1")
    run = written(tmp_path, *small, model=model, init="weights.pth")
    with pytest.raises(UserError) as error:
        layer_rotation(model, subject(run))
    assert "has no checkpoint before step-00000010, and the run began with init=weights.pth; set probe.start" in str(
        error.value
    )
    with pytest.raises(UserError, match="the first weights cannot be made again, as the run began with init="):
        layer_rotation(model, subject(run), start="initial")
    written(tmp_path, *small, model=model, step=4)
    with torch.no_grad():
        model.head.weight.copy_(turned(model.head.weight, math.pi / 2))
    report = layer_rotation(model, subject(run))
    assert report.rows["compared with"] == "step 4" and report.figures["rotation/head.weight"] == pytest.approx(
        1, abs=1e-5
    )
    assert report.figures["least"] == 0 and report.figures["most"] == report.figures["rotation/head.weight"]
    file = tmp_path / "w.safetensors"
    save_file(load_file(run / "checkpoints/step-00000004/model.safetensors"), file)
    assert layer_rotation(model, subject(run), start=str(file)).figures == report.figures


def test_what_there_is_nothing_to_compare_with(tmp_path):
    model = create_model("vit_32px", num_classes=10, depth=1)
    run = written(tmp_path, "model=vit_32px", "model.depth=1", model=model)
    of_file = Subject("", tmp_path / "w.pth", None, "raw", {}, tmp_path)
    for where, start, said in (
        (of_file, "auto", "layer_rotation: start=auto needs a checkpoint of a run, got a file of weights; give the w"),
        (
            subject(run),
            3,
            "layer_rotation: start must be one of auto, initial, first or a path, got 3; set probe.start",
        ),
        (subject(run), "nowhere.pth", "checkpoint: there is nothing at this path, got nowhere.pth"),
        (subject(run), "first", "layer_rotation: "),
    ):
        with pytest.raises(UserError) as error:
            layer_rotation(model, where, start)
        assert str(error.value).startswith(said)
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"layer_rotation: no weight of the model is in .*other.safetensors; give a run"
    ):
        layer_rotation(model, subject(run), str(tmp_path / "other.safetensors"))
