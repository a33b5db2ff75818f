"""Results have files of their own, wherever something can be written."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conf import places
from models.probes import Report
from models.runs.results import keep, keep_table


def report(value: float) -> Report:
    tables = {"classes": [{"class": "ä", "f1": value}]}
    return Report({"val/top1": value}, tables=tables, pictures={"p": Image.new("L", (2, 2))}, pages={"page": "<p>"})


def test_nothing_is_overwritten(tmp_path):
    for value in (0.25, 0.5, 0.75):
        said = keep(report(value), tmp_path / "evaluation", "digits-32-v1.5", {"step": 3})
    assert said[0].endswith("digits-32-v1.5-3.json") and "classes.csv, p.png, page.html" in said[1]
    for name, value in (("", 0.25), ("-2", 0.5), ("-3", 0.75)):
        path = tmp_path / f"evaluation/digits-32-v1.5{name}"
        assert json.loads(Path(f"{path}.json").read_text()) == {"val/top1": value, "step": 3}
        assert (path / "classes.csv").read_text("utf-8").split() == ["class,f1", f"ä,{value}"]
    keep_table([{"ckpt": "a", "top-1": 1}, {"ckpt": "b", "loss": 2}], tmp_path)
    assert (tmp_path / "table.csv").read_text().split() == ["ckpt,top-1,loss", "a,1,", "b,,2"]


def test_tensors_are_a_file_that_others_may_read(tmp_path):
    keep(Report({}, tensors={"vectors": {"a": torch.arange(3)}}), tmp_path, "mine", {})
    path = tmp_path / "mine/vectors.safetensors"
    assert load_file(path)["a"].tolist() == [0, 1, 2]
    assert path.stat().st_mode == (tmp_path / "mine.json").stat().st_mode


@pytest.mark.parametrize("place", ["file/evaluation", "full"])
def test_a_place_that_can_be_written_is_found_and_said(place, tmp_path, monkeypatch):
    """A place that is no folder, as root may write into any; and one where no file can be made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    make = places.tempfile.TemporaryFile

    def full(dir: Path, **options: object) -> object:
        if dir.name == "full" and dir.parent == tmp_path / "theirs":
            raise OSError(30, "Read-only file system")
        return make(dir=dir, **options)

    monkeypatch.setattr(places.tempfile, "TemporaryFile", full)
    folder = tmp_path / ("theirs/full" if place == "full" else place)
    said = keep(report(0.5), folder, "digits", {})
    assert "cannot be written" in said[0] and (tmp_path / folder.name / "digits.json").exists()
