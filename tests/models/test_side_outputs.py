"""What a run writes besides its checkpoints, on a disk that is full for a while."""

import errno
import os

import pytest

from models import side_outputs
from models.loggers.metrics_csv import MetricsCSV, read_metrics
from models.side_outputs import append, attempt, put

pytestmark = pytest.mark.case(17)


@pytest.fixture
def disk(monkeypatch):
    """`disk.full = True` lets every file take some bytes of a write and then no more."""

    class Disk:
        full = False

    def stop(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_append, real_put = side_outputs.append, side_outputs.put
    monkeypatch.setattr("models.loggers.metrics_csv.append", lambda *a: stop() if Disk.full else real_append(*a))
    monkeypatch.setattr("models.loggers.metrics_csv.put", lambda *a: stop() if Disk.full else real_put(*a))
    side_outputs.begin()
    return Disk


def test_a_failure_is_said_once_and_for_every_run_anew(capsys):
    side_outputs.begin()
    assert attempt("fine", int) and capsys.readouterr().err == ""
    assert not attempt("curves.png", open, "/nowhere/curves.png")
    assert not attempt("curves.png", int, "x")
    assert capsys.readouterr().err == "curves.png failed (No such file or directory); the run goes on\n"
    side_outputs.begin()
    assert not attempt("curves.png", int, "x")
    assert "curves.png failed (ValueError: invalid literal" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, other = tmp_path / "a.json", tmp_path / "other"
    put(path, "old")
    with monkeypatch.context() as full:
        full.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            put(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    other.write_text("of somebody")
    path.unlink()
    path.symlink_to(other)
    put(path, b"new")
    assert other.read_text() == "of somebody" and path.read_bytes() == b"new" and not path.is_symlink()


def test_what_is_added_is_added_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    append(path, "one\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))  # 2 bytes more are written before the error
    try:
        with pytest.raises(OSError, match="too large"):
            append(path, "second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "one\n"
    append(path, "three\n")
    assert path.read_text() == "one\nthree\n"


def test_rows_wait_for_room_and_none_is_lost(tmp_path, disk, capsys):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    for step in range(9):
        disk.full = 3 <= step < 7
        log.log_metrics({"train/loss": float(step)} | ({"val/top1": 0.5} if step == 4 else {}), step)
        log.save()
    assert [row["train/loss"] for row in read_metrics(path)] == [str(float(step)) for step in range(9)]
    assert read_metrics(path)[4]["val/top1"] == "0.5"
    assert capsys.readouterr().err.count("metrics.csv, whose rows wait in memory until there is room, failed") == 1


def test_a_step_that_is_logged_again_has_one_row(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    first.log_metrics({"train/loss": 1.0}, 3)
    first.log_metrics({"val/top1": 0.5}, 3)  # stopped before the checkpoint that knows of this validation
    again = MetricsCSV(path, resume_step=4)
    again.log_metrics({"val/top1": 0.5}, 3)
    again.log_metrics({"train/loss": 0.9}, 4)
    again.log_metrics({"train/loss": 0.9}, 4)
    assert [(row["step"], row.get("train/loss"), row.get("val/top1")) for row in read_metrics(path)] == [
        ("3", "1.0", None),
        ("3", None, "0.5"),
        ("4", "0.9", None),
    ]


def test_half_a_row_and_rows_of_nonsense_count_for_nothing(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\n0,0,2.5\n\0\0\0\n,,\nx,0,1\n1,0,1.2")  # 1.25, and then the power went
    assert read_metrics(path) == [{"step": "0", "epoch": "0", "train/loss": "2.5"}]
    MetricsCSV(path, resume_step=1).log_metrics({"train/loss": 1.25}, 1)
    assert path.read_text().splitlines()[1:] == ["0,0,2.5", "1,0,1.25"]


def test_a_metrics_csv_that_cannot_be_read_ends_nothing(tmp_path, capsys):
    side_outputs.begin()
    (tmp_path / "metrics.csv").mkdir()
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(3):
        log.log_metrics({"train/loss": 1.0}, step)
    (tmp_path / "metrics.csv").rmdir()
    log.finalize("success")
    assert len(read_metrics(tmp_path / "metrics.csv")) == 3
    assert capsys.readouterr().err.count("failed (Is a directory)") == 2
