"""What a run logs and writes of its routers, and the table and plot that end a sweep."""

import csv
import json
from pathlib import Path

import pytest

from models.callbacks.routing import Layer, draw, write

SMALL = ("model=vit_32px", "model.depth=2", "model.dim=32", "logger=none", "data.batch_size=16", "trainer.max_epochs=2")
STEPS = ("trainer.limit_train_batches=3", "trainer.limit_val_batches=2")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_with_gated_heads(command, tmp_path):
    heads = ("attention=moh", "attention.shared_heads=[4,1]", "attention.routed_heads=[0,2]")
    status, _, err = command("train", *SMALL, *STEPS, *heads, "attention.balance=bias", "run.name=mine")
    assert status == 0, err
    run = tmp_path / "outputs" / "mine"
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["routing/active"] == pytest.approx((4 + 1 + 2) / 8)
    assert 0 <= figures["routing/load_min"] <= 2 / 3 <= figures["routing/load_max"] <= 1
    assert 0 < figures["routing/entropy"] <= 1 and figures["routing/margin"] > 0
    assert (run / "routing.png").stat().st_size > 1000
    of_heads = rows(run / "routing.csv")
    assert [row["step"] for row in of_heads] == ["3"] * 8 + ["6"] * 8
    last = of_heads[8:]
    assert [row["kind"] for row in last] == ["shared"] * 5 + ["routed"] * 3
    assert sum(float(row["load"]) for row in last[5:]) == pytest.approx(2, abs=1e-3)
    assert len({row["layer"] for row in last}) == 2
    assert any(value for name, value in figures.items() if name == "train/loss")
    assert "train/load_balance" not in figures  # balanced by the bias, which has moved
    from safetensors.torch import load_file

    weights = load_file(run / "checkpoints" / "last" / "model.safetensors")
    bias = next(value for name, value in weights.items() if name.endswith("router.bias"))
    assert 0 < bias.abs().max() <= 6e-3 + 1e-6


def test_a_run_without_routers_writes_nothing_of_them(command, tmp_path):
    assert command("train", *SMALL, *STEPS, "run.name=plain")[0] == 0
    run = tmp_path / "outputs" / "plain"
    assert not list(run.glob("routing.*"))
    assert not [name for name in json.loads((run / "metrics.json").read_text()) if name.startswith("routing")]


def test_rows_of_later_steps_are_dropped_after_a_resume(tmp_path):
    layers = [Layer("a", [1.0, 0.5], 1, 0.9, 0.1)]
    for step in (10, 20, 30, 20):
        write(tmp_path / "routing.csv", step, layers)
    assert [row["step"] for row in rows(tmp_path / "routing.csv")] == ["10", "10", "20", "20"]


def test_layers_of_different_width_are_drawn(tmp_path):
    layers = [Layer("a", [1.0, 0.5], 1, 0.9, 0.1), Layer("b", [1.0] * 6, 6, float("nan"), float("nan"))]
    assert draw(tmp_path / "routing.png", layers).stat().st_size > 1000


@pytest.mark.full
def test_a_dense_model_becomes_a_mixture_of_heads_in_a_sweep(command, tmp_path):
    dense = ("recipe=moh/dense_digits", "logger=none", "model.depth=2", "model.dim=32", "data.batch_size=16", *STEPS)
    assert command("train", *dense, "trainer.max_epochs=1", "run.name=dense")[0] == 0
    weights = tmp_path / "outputs" / "dense" / "checkpoints" / "last"
    shape = dense[1:]
    arguments = ("recipe=moh/dense_to_moh_digits", *shape, f"init={weights}", "trainer.max_epochs=1", "run.name=moh")
    status, out, err = command("train", *arguments, "attention.routed_heads=2,6")
    assert status == 0, err
    assert "its attention gets head gates: 50.00% of heads active" in out and "active heads" in out
    assert (tmp_path / "outputs" / "moh" / "active_heads.png").exists()
    assert [row["routing/active"] for row in rows(tmp_path / "outputs" / "moh" / "runs.csv")] == ["0.5", "1.0"]
