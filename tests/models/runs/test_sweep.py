"""The table at the end of a sweep: seeds averaged, what failed named, everything in files."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf

from models import side_outputs
from models.runs.compare import CompareRuns, write_all
from models.runs.sweep import cell, columns_of, read_run, rows_of, table_of, write_comparison, write_runs
from models.runs.sweep_pictures import curve, draw_active_heads, draw_comparison, draw_pareto, pareto

TOP1 = "val/top1"


def run(folder, attention, seed, said="", **figures):
    path = folder / attention / f"seed-{seed}"
    path.mkdir(parents=True)
    if figures:
        (path / "metrics.json").write_text(json.dumps({key.replace("__", "/"): v for key, v in figures.items()}))
    return read_run({"attention": attention, "seed": str(seed)}, seed, path, said)


@pytest.fixture
def runs(tmp_path):
    return [
        run(tmp_path, "softmax", 0, val__top1=0.90, val__loss=0.5, parameters=100, flops=20_300_000),
        run(tmp_path, "softmax", 1, val__top1=0.92, val__loss=0.4, parameters=100, flops=20_300_000),
        run(tmp_path, "agent", 0, val__top1=0.95, val__loss=0.2, parameters=120, flops=2_100_000_000),
        run(tmp_path, "agent", 1, "the loss is NaN", val__top1=0.10, parameters=120),
        run(tmp_path, "window", 0),
    ]


def test_seeds_are_averaged_and_the_best_is_first(runs):
    rows = rows_of(runs, TOP1)
    assert [row.name for row in rows] == ["attention=agent", "attention=softmax"]
    assert rows[1].mean(TOP1) == pytest.approx(0.91) and rows[1].spread(TOP1) == pytest.approx(0.02 / 2**0.5)
    assert [row.name for row in rows_of(runs, "val/loss", "min")] == ["attention=agent", "attention=softmax"]
    columns = columns_of(rows, TOP1)
    assert list(columns) == [TOP1, "val/loss", "parameters", "flops"]
    assert table_of(rows, columns) == [
        ["run", "top-1", "loss", "parameters", "multiply-adds", "seeds"],
        ["attention=agent", "95.00%", "0.2", "120", "2.10 G", "1"],
        ["attention=softmax", "91.00 ± 1.41%", "0.45 ± 0.071", "100", "20.3 M", "2"],
    ]


def test_one_seed_each_has_no_spread_and_no_column_of_seeds(runs):
    rows = rows_of([runs[0], runs[2]], TOP1)
    assert table_of(rows, {TOP1: "top-1"}) == [
        ["run", "top-1"],
        ["attention=agent", "95.00%"],
        ["attention=softmax", "90.00%"],
    ]


def test_figures_of_an_earlier_command_are_not_those_of_a_run_that_failed(runs):
    assert runs[3].figures is None and runs[3].said == "the loss is NaN"
    assert runs[4].said == "it left no metrics.json"


def test_a_figure_that_is_not_there(tmp_path):
    rows = rows_of([run(tmp_path, "a", 0, val__top1=0.5), run(tmp_path, "b", 0, val__loss=None)], TOP1)
    assert cell(rows[1], TOP1) == "-" and rows[1].mean("val/loss") is None
    assert cell(rows_of([run(tmp_path, "c", 0, peak_memory=3 * 2**29)], TOP1)[0], "peak_memory") == "1.50 GiB"


def test_what_is_written(runs, tmp_path):
    rows = rows_of(runs, TOP1)
    each = list(csv.DictReader(write_runs(tmp_path / "runs.csv", runs, [TOP1]).open()))
    assert [(line["attention"], line["seed"], line[TOP1], line["failed"]) for line in each][2:] == [
        ("agent", "0", "0.95", ""),
        ("agent", "1", "", "the loss is NaN"),
        ("window", "0", "", "it left no metrics.json"),
    ]
    mean = list(csv.DictReader(write_comparison(tmp_path / "comparison.csv", rows, [TOP1]).open()))
    assert mean[0] == {"run": "attention=agent", "seeds": "1", TOP1: "0.95", f"{TOP1} sd": ""}
    assert float(mean[1][f"{TOP1} sd"]) == pytest.approx(0.0141, abs=1e-4)


def test_active_heads_are_drawn_where_they_differ(tmp_path):
    runs = [run(tmp_path, f"heads{k}", 0, val__top1=0.9, routing__active=k / 8) for k in (4, 5)]
    rows = rows_of(runs, TOP1)
    assert draw_active_heads(tmp_path / "one.png", rows[:1]) is None
    assert draw_active_heads(tmp_path / "two.png", rows) == tmp_path / "two.png"


# Pictures and the page


def test_nothing_on_the_front_is_beaten_in_cost_and_result():
    points = [(3.0, 0.9), (1.0, 0.8), (2.0, 0.7), (2.0, 0.85), (None, 1.0), (4.0, 0.9)]
    assert pareto(points, False, True) == [(1.0, 0.8), (2.0, 0.85), (3.0, 0.9)]
    assert pareto(points, True, True) == [(4.0, 0.9)]
    assert pareto([(1.0, 0.5), (2.0, 0.2), (3.0, 0.3)], False, False) == [(1.0, 0.5), (2.0, 0.2)]


def test_a_curve_has_one_point_per_epoch(tmp_path):
    found = run(tmp_path, "a", 0, val__top1=0.5)
    (found.folder / "metrics.csv").write_text("step,epoch,train/loss\n0,0,3.0\n5,0,1.0\n9,1,nan\n12,2,0.5\n")
    assert curve(found, "train/loss") == {1.0: 2.0, 3.0: 0.5} and curve(found, TOP1) == {}


def test_pictures_are_drawn_where_runs_differ(runs, tmp_path):
    rows = rows_of(runs, TOP1)
    assert draw_comparison(tmp_path / "curves.png", rows, TOP1) is None
    for number in (0, 1, 2):
        (runs[number].folder / "metrics.csv").write_text(f"step,epoch,{TOP1}\n5,0,0.5\n9,1,0.{number + 6}\n")
    assert draw_comparison(tmp_path / "curves.png", rows, TOP1) == tmp_path / "curves.png"
    assert draw_pareto(tmp_path / "one.png", rows[:1], TOP1, "max") is None
    assert draw_pareto(tmp_path / "pareto.png", rows, TOP1, "max") == tmp_path / "pareto.png"


class Page(HTMLParser):
    """Text and addresses of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.addresses, self.open = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.open += [tag] if tag in ("table", "tr", "figure") else []
        self.addresses += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert tag not in ("table", "tr", "figure") or self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_other_file(runs, tmp_path):
    said = "window: <no> 5 x 5 & set x"
    runs[4] = runs[4]._replace(said=said)
    rows = rows_of(runs, TOP1)
    written = write_all(tmp_path, rows, runs, TOP1, "max")
    assert [path.name for path in written] == ["runs.csv", "comparison.csv", "pareto.png", "report.html"]
    page = Page(written[-1].read_text())
    assert page.addresses and all(re.match(r"data:image/png;base64,\w", address) for address in page.addresses)
    text = "|".join(page.text)
    assert "91.00 ± 1.41%" in text and "3 of 5 runs have a result" in text and said in text and "agent/seed-0" in text


def test_a_sweep_without_any_result_still_says_why(runs, tmp_path):
    written = write_all(tmp_path, [], runs[3:], TOP1, "max")
    assert [path.name for path in written] == ["runs.csv", "report.html"]
    assert "the loss is NaN" in written[-1].read_text()


@pytest.mark.parametrize(("name", "first"), [("LOCAL_RANK", "0"), ("LOCAL_RANK", "1"), ("SLURM_PROCID", "1")])
def test_of_several_processes_the_first_one_tells_of_the_sweep(runs, tmp_path, monkeypatch, capsys, name, first):
    monkeypatch.setenv(name, first)
    monkeypatch.setattr("models.runs.compare.write_all", lambda folder, *given: [folder / "runs.csv"])
    sweep = CompareRuns()
    sweep.jobs = [({}, 0, tmp_path / "softmax/seed-0", "")]
    sweep.on_multirun_end(
        OmegaConf.create({"checkpoint": {"monitor": TOP1, "mode": "max"}, "hydra": {"sweep": {"dir": str(tmp_path)}}})
    )
    assert ("1 of 1 runs" in capsys.readouterr().out) is (first == "0")


@pytest.mark.case(17)
def test_what_cannot_be_written_or_read_takes_nothing_along(runs, tmp_path, monkeypatch, capsys):
    """A picture that fails, a table for which there is no room, a metrics.json of which half is there."""
    side_outputs.begin()
    rows = rows_of(runs, TOP1)
    monkeypatch.setattr("models.runs.sweep_pictures.draw_pareto", lambda *_: 1 / 0)
    (tmp_path / "runs.csv").mkdir()
    written = write_all(tmp_path, rows, runs, TOP1, "max")
    assert [path.name for path in written] == ["comparison.csv", "report.html"]
    said = capsys.readouterr().err
    assert "runs.csv failed (Is a directory)" in said and "pareto.png failed (ZeroDivisionError" in said
    (runs[0].folder / "metrics.json").write_text('{"val/to')
    assert read_run({}, 0, runs[0].folder).figures is None
