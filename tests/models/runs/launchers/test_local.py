"""`hydra/launcher=local`: a sweep's runs side by side, with a small program in the place of train.py."""

import json
import os
import signal
import threading
import time

import pytest

from conf.errors import UserError
from models.runs.launchers import local

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:])
folder = Path(given["hydra.run.dir"].strip("'"))
gpus, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
folder.mkdir(parents=True, exist_ok=True)
(folder / "train.log").write_text("begun")
(folder / "seen.json").write_text(json.dumps([given, gpus, threads, time.monotonic()]))
if given["attention"] == "moh":
    print("train.py: attention: there is no luck today", file=sys.stderr)
    sys.exit(2)
came = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: came.append(number))
(folder / "ready").touch()
end = time.monotonic() + (60 if given.get("seed") == "9" else 0.5)
while time.monotonic() < end and not came:
    time.sleep(0.02)
if came:
    (folder / "saved").write_text(str(came))
    sys.exit(130 if came[0] == signal.SIGINT else 75)
(folder / "metrics.json").write_text(json.dumps({"val/top1": 0.5, "epochs": 1, "steps": 8, "end": time.monotonic()}))
"""


@pytest.fixture
def sweep(launch):
    """`sweep("seed=1,2", ...) -> (exit status, output, errors)` of train.py -m, in `tmp_path`."""
    given = ("-m", "hydra/launcher=local", "run.name=s")
    return lambda *arguments: launch(PROGRAM, lambda: pytest.fail("a run began in this process"), *given, *arguments)


def seen(tmp_path, name):
    return json.loads((tmp_path / "outputs/s" / name / "seen.json").read_text())


@pytest.mark.full
def test_runs_are_computed_side_by_side_on_a_cpu(sweep, tmp_path):
    status, output, errors = sweep("hydra.launcher.jobs=2", "attention=softmax,agent")
    assert status == 0, output + errors
    first, second = (seen(tmp_path, f"{name}/seed-0") for name in ("softmax", "agent"))
    end = json.loads((tmp_path / "outputs/s/softmax/seed-0/metrics.json").read_text())["end"]
    assert second[3] < end, "the second run waited for the first"
    assert first[0]["attention"] == "softmax" and first[0]["run.name"] == "s" and first[1] is None
    assert int(first[2]) == max(1, local.usable_cores() // 2)
    lines = output.split("\n")
    assert next(line for line in lines if line.startswith("run 1")) == "run 1 of 2: attention=softmax"
    assert any(line.startswith("run 2 done after ") and "outputs/s/agent/seed-0" in line for line in lines)
    assert "2 of 2 runs" in output and (tmp_path / "outputs/s/runs.csv").exists()


@pytest.mark.full
def test_gpus_are_shared_out_and_a_run_that_fails_does_not_end_the_others(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "gpus_here", lambda: list("0123"))
    given = ("hydra.launcher.gpus=4", "hydra.launcher.per_run=2", "attention=moh,softmax,agent")
    status, output, _ = sweep(*given)
    assert status == 2
    assert "run 1 failed with status 2" in output and "2 of 3 runs" in output
    assert "no result: attention=moh: attention: there is no luck today" in output
    assert {seen(tmp_path, f"{name}/seed-0")[1] for name in ("softmax", "agent")} <= {"0,1", "2,3"}
    assert seen(tmp_path, "moh/seed-0")[1:3] == ["0,1", None]


@pytest.mark.case(13)
def test_no_run_goes_on_without_the_process_that_began_it(sweep, tmp_path, monkeypatch):
    """It fails when the first run has ended; the other one would go on for a minute."""
    ready = tmp_path / "outputs/s/softmax/seed-9/ready"

    def fails(run):
        while not ready.exists():
            time.sleep(0.02)
        raise RuntimeError("of the launcher")

    monkeypatch.setattr(local, "_ended", fails)
    with pytest.raises(RuntimeError, match="of the launcher"):
        sweep("hydra.launcher.jobs=2", "attention=moh,softmax", "seed=9")
    assert ready.with_name("saved").read_text() == f"[{signal.SIGTERM:d}]"


@pytest.mark.case(13)
@pytest.mark.parametrize(
    ("number", "wanted"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.full)]
)
def test_a_signal_saves_the_runs_that_go_on_and_begins_no_other(sweep, tmp_path, number, wanted):
    ready = [tmp_path / f"outputs/s/{name}/seed-9/ready" for name in ("softmax", "agent")]

    def send():
        end = time.monotonic() + 60
        while not all(path.exists() for path in ready) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    status, output, errors = sweep("hydra.launcher.jobs=2", "attention=softmax,agent,linear", "seed=9")
    assert status == wanted, errors
    assert all(path.with_name("saved").read_text() == f"[{number:d}]" for path in ready)
    assert "the same command goes on" in output
    assert not (tmp_path / "outputs/s/linear/seed-9/seen.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("jobs=0", "hydra.launcher: jobs must be a whole number of at least 1, got 0"),
        pytest.param(
            "per_run=many", "per_run must be a whole number of at least 1, got 'many'", marks=pytest.mark.full
        ),
        pytest.param("gpus=-1", "gpus must be a whole number of at least 0, got -1", marks=pytest.mark.full),
        pytest.param(
            "job=2",
            "there is no setting 'hydra.launcher.job'; did you mean 'jobs'? valid keys of hydra.launcher: "
            "gpus, jobs, per_run",
            marks=pytest.mark.full,
        ),
        pytest.param("gpus=2", "gpus=2, but this machine shows 0; give gpus=0", marks=pytest.mark.full),
    ],
)
def test_a_wrong_setting_is_refused_before_any_run(sweep, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(local, "gpus_here", list)
    status, _, errors = sweep(f"hydra.launcher.{given}", "attention=softmax,agent")
    assert status == 2 and message in " ".join(errors.split()) and not (tmp_path / "outputs").exists()


def test_gpus_come_in_groups():
    assert local.shared_out(list("0123456"), None, 2) == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert local.shared_out(list("0123"), 1, 1) == [["0"]] and local.shared_out([], None, 4) == []
    with pytest.raises(UserError, match="per_run=4, but there are 2 GPUs"):
        local.shared_out(["5", "7"], None, 4)


def test_gpus_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert local.gpus_here() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.gpus_here() == []


def test_a_recipe_that_is_a_sweep_is_one_run_in_each_process(tmp_path):
    assert local.as_one_run(["recipe=pathfinder", "seed=1"], tmp_path)[-1] == "hydra.mode=RUN"


@pytest.mark.case(18)
def test_what_a_run_prints_needs_no_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(local.tempfile, "tempdir", str(tmp_path / "gone"))
    with local._file(tmp_path) as file:
        assert file.write(b"x") == 1
    with local._file(tmp_path / "gone") as file:
        assert file.write(b"x") == 1 and file.seek(0) == 0 and file.read() == b""
