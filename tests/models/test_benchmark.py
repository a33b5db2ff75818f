"""`python -m kernels.bench --model ...`: whole steps, counted and timed on a CPU."""

import json

import pytest
import torch

from kernels.bench import command
from models.benchmark import Steps


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """`bench("--model", "vit_32px") -> (exit status, output, errors, rows)`, as on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str):
        try:
            status = command.main([*arguments, "--output", str(tmp_path)])
        except SystemExit as exit:
            status = exit.code
        files = list(tmp_path.glob("*.json"))
        return status, *capsys.readouterr(), json.loads(files[0].read_text())["models"] if files else []

    return run


def test_a_training_step_updates_the_weights_and_uses_all_losses():
    steps = Steps("vit_32px", "moh", 2, None, "cpu")
    before = {name: p.detach().clone() for name, p in steps.model.named_parameters()}
    steps.training()
    same = [name for name, p in steps.model.named_parameters() if torch.equal(p, before[name])]
    assert not same
    assert steps.image_size == 32
    assert not steps.inference().requires_grad


@pytest.mark.full
def test_steps_are_counted_fused_against_eager(bench):
    """Windows of Swin are fused, and PyTorch copies them: the whole step shows it."""
    status, output, _, rows = bench("--model", "swin_32px", "--batch", "4")
    assert status == 0
    assert "## Models, counted from the graph" in output
    assert [(r["step"], r["way"]) for r in rows] == [
        ("training", "fused"), ("training", "eager"), ("inference", "fused"), ("inference", "eager"),
    ]  # fmt: skip
    assert all(r["model"] == "swin_32px" and r["batch"] == 4 and r["image"] == 32 for r in rows)
    for fused, eager in (rows[:2], rows[2:]):
        assert fused["kernels"] < eager["kernels"]
        assert eager["÷ fused"] == eager["MiB moved/image"] / fused["MiB moved/image"] > 1
    assert rows[1]["peak MiB/image"] > rows[0]["peak MiB/image"]


def test_steps_are_timed_where_asked_for(bench):
    _, output, _, rows = bench("--model", "vit_32px", "--attention", "conv", "--batch", "2", "--steps", "2")
    timed = [r for r in rows if "ms" in r]
    assert "## Models, timed" in output
    assert [(r["step"], r["way"]) for r in timed] == [("training", "eager"), ("inference", "eager")]
    assert all(r["images/s"] == pytest.approx(2 / r["ms"] * 1e3) for r in timed)


def test_a_spent_budget_starts_no_model(bench):
    status, output, _, rows = bench("--model", "vit_32px,swin_32px", "--budget", "1e-9")
    assert (status, rows) == (0, [])
    assert "the budget of 1e-09 s was spent; left out: vit_32px, swin_32px" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_33px"], "there is no model of this name, got vit_33px; choose from agent_cswin_base"),
        (
            ["--model", "vit_32px", "--attention", "agend"],
            "there is no attention of this name, got agend; choose from agent",
        ),
    ],
)
def test_unknown_names_are_one_error(bench, arguments, message):
    status, _, errors, _ = bench(*arguments)
    assert (status, message in errors) == (2, True), errors
