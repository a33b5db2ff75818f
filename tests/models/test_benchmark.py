"""Whole steps: `python -m kernels.bench --model ...`, counted and timed on a CPU; and beside timm's."""

import json

import pytest
import timm
import torch

from kernels.bench import command
from models import create_model
from models.benchmark import Steps, __main__, pairs, partners


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
            "there is no attention of this name, got agend; choose from additive",
        ),
    ],
)
def test_unknown_names_are_one_error(bench, arguments, message):
    status, _, errors, _ = bench(*arguments)
    assert (status, message in errors) == (2, True), errors


# `python -m models.benchmark`


@pytest.fixture
def against(monkeypatch, capsys):
    """`against("--model", "vit_32px") -> (exit status, output, errors)`, with ours for timm's."""
    monkeypatch.setitem(partners.TIMM, "vit_32px", "zoo_test")
    monkeypatch.setattr(pairs.timm, "create_model", lambda name: create_model("vit_32px"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str):
        try:
            status = __main__.main(["--against", "timm", *arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_both_take_turns_and_the_ratio_is_theirs_by_ours(against):
    status, output, _ = against("--model", "vit_32px", "--batch", "2", "--pairs", "2", "--json")
    found = json.loads(output)
    assert status == 0 and found["environment"]["threads"]
    assert [(row["step"], row["timm"], row["batch"], row["image_size"]) for row in found["rows"]] == [
        ("forward", "zoo_test", 2, 32),
        ("training", "zoo_test", 2, 32),
    ]
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["ours_ms"] > 0 for row in found["rows"])


def test_the_first_of_a_pair_is_the_other_one_next_time():
    called = []
    times = pairs.timed([lambda: called.append("ours"), lambda: called.append("timm")], 2, torch.device("cpu"))
    assert called == ["timm", "ours", "ours", "timm", "timm", "ours"]  # the first pair warms up
    assert [len(of_one) for of_one in times] == [2, 2]


def test_a_table_names_models_and_machine(against):
    status, output, _ = against("--model", "vit_32px", "--batch", "1", "--pairs", "1", "--step", "forward")
    assert status == 0 and "timm ÷ ours" in output and "threads" in output
    assert [line.split()[:4] for line in output.splitlines() if line.startswith("vit_32px")] == [
        ["vit_32px", "forward", "1", "32"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "biformer_tiny"], "--model: timm has no such model, got biformer_tiny"),
        (["--model", "swim_tiny"], "did you mean 'swin_tiny'"),
        (["--batch", "0"], "must be at least 1, got 0"),
        (["--step", "backward"], "invalid choice: 'backward'"),
    ],
)
def test_what_cannot_be_compared_is_one_error(against, arguments, message):
    status, _, errors = against(*arguments)
    assert (status, message in errors) == (2, True), errors


def test_another_architecture_under_the_name_is_refused(monkeypatch):
    monkeypatch.setattr(pairs.timm, "create_model", lambda name: torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"vit_32px and timm's b must have the same number of parameters, got 555,"):
        next(pairs.compare("vit_32px", "b", ["forward"], 1, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    "name", [n if n in partners.USUAL else pytest.param(n, marks=pytest.mark.full) for n in partners.TIMM]
)
def test_partners_have_the_same_parameters(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(partners.TIMM[name])
    kernels = [sorted(_kernels(model)) for model in (ours, theirs)]
    assert kernels[0] == kernels[1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def _kernels(model):
    """Shapes of the convolutions; pointwise ones may be linear layers here or there."""
    convs = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d) and max(m.kernel_size) > 1)
    return (tuple(conv.weight.shape[:4]) for conv in convs)  # of lambdas timm's are 3-D, one deep
