"""The probe `benchmark`: crossings of known lines, honest rows, and every choice that is none refused by name."""

import csv

import pytest
import pytorch_lightning as pl
import torch

from conf.errors import UserError
from kernels.bench.timing import Spread
from models import list_attentions
from models.probes import benchmark as bench
from models.probes.drawing.crossings import crossings, verdict
from models.probes.reading.contenders import contenders


def curve(**medians: float) -> dict[int, Spread]:
    return {int(side[1:]): Spread(value, 0.9 * value, 1.1 * value) for side, value in medians.items()}


QUADRATIC, LINEAR = (curve(**{f"s{s}": f(s) for s in (2, 4, 8, 16)}) for f in (lambda s: s**4 / 36, lambda s: s**2))


@pytest.fixture(scope="module")
def trainer():
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def test_lines_of_powers_cross_where_they_are_equal():
    (found,) = crossings({"a": QUADRATIC, "b": LINEAR})
    assert found[:2] == ("b", "a") and found[2:] == pytest.approx((6, 36))
    assert crossings({"b": LINEAR, "a": QUADRATIC}) == [found]
    assert verdict("b", "a", {"a": QUADRATIC, "b": LINEAR}) == "faster from 6x6 on"
    assert verdict("a", "b", {"a": QUADRATIC, "b": LINEAR}) == "slower from 6x6 on"


def test_what_lies_within_the_spread_decides_nothing():
    near, far = curve(s2=1.1, s4=0.95, s8=1.1), curve(s2=5, s4=5, s8=5)
    curves = {"a": curve(s2=1, s4=1, s8=1), "near": near, "far": far, "none": {}}
    assert not crossings(curves)
    assert verdict("near", "a", curves) == "no difference beyond the spread"
    assert (
        verdict("far", "a", curves) == "slower at every size" and verdict("a", "far", curves) == "faster at every size"
    )
    assert verdict("none", "a", curves) == "not compared"


def test_a_crossing_lies_on_the_lines_that_are_drawn():
    """Between the sizes that decide it an undecided one bends them."""
    (found,) = crossings({"a": curve(s1=1, s2=1, s4=4), "b": curve(s1=2, s2=1.05, s4=1)})
    assert 2 < found.side < 4 and 1 < found.milliseconds < 1.05


def test_rows_of_every_size(trainer):
    report = bench.benchmark(trainer, ["softmax", "biformer topk=16"], [4, 2], dim=16, heads=2, seconds=0.0)
    rows = {(row["attention"], row["side"]): row for row in report.tables["benchmark"]}
    assert list(rows) == [(name, side) for name in ("softmax", "biformer topk=16") for side in (2, 4)]
    refused = rows["biformer topk=16", 2]
    assert refused["note"].startswith("topk=16 is more than the 2x2 regions of a 2x2 map; set attention.topk")
    assert not any(key.endswith(("_ms", "_bytes")) for key in refused)
    assert refused["note"] in report.rows["biformer topk=16 2x2"]
    for row in rows.values():
        if row is not refused:
            assert 0 < row["forward_low"] <= row["forward_ms"] <= row["forward_high"] and row["training_ms"] > 0
            assert row["training_bytes"] > row["forward_bytes"] > 0 and row["computed_by"] == "PyTorch"
    assert report.figures["softmax/1x4x4/forward_ms"] == rows["softmax", 4]["forward_ms"]
    assert report.lines[0].startswith("biformer topk=16 against softmax: forward ")
    assert report.lines[-1].endswith("peak memory besides weights and tokens is counted from the graph of a call")
    assert list(report.pictures) == ["benchmark"]


def test_memory_is_that_of_the_tensors_that_are_alive(trainer):
    """Of softmax attention without gradients at least the packed projection, and all that is made at most."""
    measure = bench.Bench(trainer, 16, 2, ("forward",), 0.0, 20.0)
    (softmax,) = contenders("softmax")
    tokens = {side: measure._part("forward", softmax, softmax.mixer(16, 2, side), 3, side) for side in (4, 8)}
    of_x = 3 * 16 * 16 * 4  # bytes of the tokens of a 4x4 map
    assert 4 * of_x <= tokens[4]["forward_bytes"] <= 8 * of_x
    assert tokens[8]["forward_bytes"] == pytest.approx(4 * tokens[4]["forward_bytes"], rel=0.01)


def test_several_batches_and_the_forward_pass_alone(trainer):
    report = bench.benchmark(trainer, "softmax", 2, batch=[1, 2], dim=8, heads=2, training=False, seconds=0)
    assert [row["batch"] for row in report.tables["benchmark"]] == [1, 2]
    assert not any("training" in key for row in report.tables["benchmark"] for key in row)
    assert set(report.pictures) == {"batch-1", "batch-2"} and "softmax 2x2, batch 2" in report.rows


def test_what_takes_too_long_or_too_much_is_left_out(trainer, monkeypatch):
    report = bench.benchmark(trainer, "softmax", [2, 4], dim=8, heads=2, seconds=0, longest=0)
    first, second = report.tables["benchmark"]
    assert "note" not in first and second["note"] == "a call took 0 s at 2x2, longer than probe.longest"
    monkeypatch.setattr(bench, "free_memory", lambda: 2.0**10)
    report = bench.benchmark(trainer, "softmax", [8], dim=8, heads=2, seconds=0)
    assert report.tables["benchmark"][0]["note"] == "forward would hold 0.0 GiB, 0.0 are free"


def test_an_error_of_a_mechanism_is_a_row(trainer, monkeypatch):
    monkeypatch.setattr(bench, "count", lambda prepare: (_ for _ in ()).throw(RuntimeError("no\nsuch thing")))
    report = bench.benchmark(trainer, ["softmax", "agent"], [4], dim=8, heads=2, seconds=0)
    assert [row["note"] for row in report.tables["benchmark"]] == ["RuntimeError: no"] * 2
    assert report.lines[0] == "agent against softmax: forward not compared, training not compared"


def test_counting_leaves_no_tensor_without_numbers_behind(trainer):
    """What is cached by shape while fake tensors are counted must not be met by a real call."""
    (window,) = contenders("window")
    measure = bench.Bench(trainer, 16, 2, ("forward",), 0.0, 20.0)
    mixer = window.mixer(16, 2, 9).eval()
    measure._part("forward", window, mixer, 1, 9)
    out = mixer(torch.randn(1, 81, 16), bench.Grid(9, 9)).x
    assert type(out) is torch.Tensor and out.isfinite().all()


@pytest.mark.full
@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_can_be_measured(trainer, name):
    (row,) = bench.benchmark(trainer, name, 8, dim=32, heads=4, seconds=0.0).tables["benchmark"]
    assert "note" not in row and row["forward_ms"] > 0 and row["training_ms"] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"attentions": []},
            r"benchmark: attentions must be all, or names of mechanisms, got \[\]; set probe.attentions",
        ),
        ({"attentions": [3]}, r"benchmark: attentions must be all, or names of mechanisms, got \[3\]"),
        ({"attentions": ["agent", "agent"]}, r"attentions must be different mechanisms, got 'agent'; name it once"),
        (
            {"attentions": "agnt"},
            r"benchmark: there is no attention 'agnt'; did you mean 'agent'\?; choose from additive, ",
        ),
        ({"attentions": "agent windw=7"}, r"benchmark: agent has no setting 'windw'; did you mean 'window'\?; it has "),
        ({"attentions": "agent layout=grd"}, r"benchmark: there is no layout 'grd' for agent; choose from axial, boat"),
        ({"sizes": [0]}, r"benchmark: sizes must be a whole number of at least 1, got 0; set probe.sizes=\[16,32\]"),
        ({"sizes": []}, r"benchmark: sizes must be at least one number, got \[\]; set probe.sizes=\[16,32\]"),
        ({"batch": "two"}, r"benchmark: batch must be a whole number of at least 1, got 'two'; set probe.batch=1"),
        ({"heads": 5}, r"benchmark: heads must be a divisor of the 192 channels, got 5; set probe.heads or probe.dim"),
        ({"training": "no"}, r"benchmark: training must be true or false, got 'no'; set probe.training=true"),
        ({"longest": -1}, r"benchmark: longest must be a number of at least 0, got -1; set probe.longest=20"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(trainer, options, text):
    with pytest.raises(UserError, match=text):
        bench.benchmark(trainer, **options)


def test_the_command(command, tmp_path):
    chosen = ("probe.attentions=[softmax,'softmax layout=grid weights=sigmoid']", "probe.sizes=[4]", "probe.seconds=0")
    status, out, err = command("eval", "probe=benchmark", *chosen, "probe.dim=16", "probe.heads=2")
    assert status == 0 and "results: evaluation/benchmark.json" in out, err
    folder = tmp_path / "evaluation" / "benchmark"
    with (folder / "benchmark.csv").open() as file:
        assert [row["attention"] for row in csv.DictReader(file)] == ["softmax", "softmax layout=grid weights=sigmoid"]
    assert 1000 < (folder / "benchmark.png").stat().st_size < 200_000
    assert command("eval", "probe=benchmark", "backend=torch")[0] == 2
