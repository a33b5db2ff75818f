"""What people read after a run."""

import json

import pytest
from rich.console import Console

from models.callbacks.progress import duration
from models.runs.curves import draw_curves, short_number
from models.runs.report import print_table, shown, write_json


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("val/top1", 0.98765, "98.77%"),
        ("val/loss", 0.123456, "0.1235"),
        ("images_per_second", 12345.6, "12,346"),
        ("parameters", 559322, "559,322"),
        ("curves", None, "-"),
        ("time", "0:51", "0:51"),
    ],
)
def test_figures_as_people_read_them(name, value, text):
    assert shown(name, value) == text


def test_durations():
    assert [duration(s) for s in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": 1.5, "c": "x"})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": None, "b": 1.5, "c": "x"}


def test_the_table_names_every_figure():
    console = Console(record=True, width=60)
    print_table("a run", {"val/top1": 0.5, "parameters": 1000}, console)
    text = console.export_text()
    assert "a run" in text and "50.00%" in text and "1,000" in text


def test_curves_are_drawn_from_what_was_logged(tmp_path):
    assert draw_curves(tmp_path) is None
    rows = ["step,epoch,train/loss,val/top1,lr", "1,0,2.0,,0.1", "2,0,1.0,0.5,0.2", "3,0,nan,,0.1"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    path = draw_curves(tmp_path, "a model on data", monitor="val/top1", per_epoch=1.5)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert draw_curves(tmp_path) == path


def test_the_rate_is_written_short():
    assert [short_number(value) for value in (2e-4, 2.5e-4, 0, 1, 1e-10)] == ["2e-4", "2.5e-4", "0", "1e0", "1e-10"]
