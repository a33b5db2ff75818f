"""What a run records, and that a command which is refused leaves nothing."""

import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf import leftovers, revision
from conf.errors import UserError
from models.checkpoints import read_manifest
from models.loggers.metrics_csv import read_metrics
from models.runs import record
from models.runs.preflight import lock_folder

SMALL = (
    *("model=vit_32px", "logger=none", "data.batch_size=8", "trainer.max_epochs=1", "trainer.limit_train_batches=2"),
    *("trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", "data.workers=0"),
)


def lines(text: str) -> list[str]:
    """What stands behind the times of a log."""
    found = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:  (.*))?", line) for line in text.splitlines()]
    assert all(found), text
    return [match[1] or "" for match in found]


def test_the_log_has_what_a_reader_of_the_terminal_sees(tmp_path, monkeypatch):
    """No colours, no progress bars, no half lines; what was printed before the folder is known comes first."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(out)])  # without those of tests before
    with record.recorded() as log:
        print("before")
        log.begin(tmp_path / "train.log")
        out_of_a_bar = (
            "\r\x1b[2Kstep 1 ━━",
            "\r\x1b[2Kstep 2 ━━",
            "\r\x1b[2K\x1b[1mepoch 1\x1b[0m\nstep 3 ━━",
            "\r\x1b[2K",
        )
        for text in out_of_a_bar:
            sys.stdout.write(text)
        print("one", "two", "", sep="\n")
        logging.warning("of a library")
    assert lines((tmp_path / "train.log").read_text()) == ["before", "epoch 1", "one", "two", "", "of a library"]
    assert "\x1b[2Kstep 2" in out.getvalue() and "of a library" in out.getvalue() and sys.stdout is out


@pytest.mark.parametrize(
    ("error", "text"), [(UserError("lr: wrong"), ": lr: wrong"), (KeyError("bug"), "KeyError: 'bug'")]
)
def test_what_ends_a_run_stands_in_its_log(tmp_path, error, text):
    with pytest.raises(type(error)), record.recorded() as log:
        log.begin(tmp_path / "train.log")
        raise error
    assert lines((tmp_path / "train.log").read_text())[-1].endswith(text)


def test_a_run_records_what_it_was_made_with(command, tmp_path):
    status, out, err = command("train", *SMALL, "run.name=mine")
    assert status == 0, err
    run = tmp_path / "outputs" / "mine"
    assert [line for line in lines((run / "train.log").read_text()) if line] == [
        line for line in out.splitlines() if line
    ]
    environment = json.loads((run / "env.json").read_text())
    assert environment["command"].endswith("run.name=mine") and environment["directory"] == str(tmp_path)
    assert environment["packages"]["torch"] and environment["host"] and environment["python"]
    assert environment["commit"] == revision.revision().commit
    manifest = json.loads((run / "checkpoints/last/manifest.json").read_text())
    assert manifest["commit"] == str(revision.revision())
    assert "- run.name=mine" in (run / ".hydra/overrides.yaml").read_text()
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["peak_memory"] > 1e7 and 0 <= figures["data_wait"] < 1 and figures["grad_norm"] > 0
    assert re.search(r"^epoch 1/1  step 2/2  loss .*val top-1 .* images/s  data wait .*grad norm .*MiB", out, re.M)
    record.write_environment(run, {"step": 2})  # of a run that goes on
    again = json.loads((run / "env.json").read_text())
    assert [start["step"] for start in [*again["earlier"], again]] == [0, 2] and "packages" not in again["earlier"][0]


def test_a_refused_command_leaves_a_folder_as_it_was(command, tmp_path):
    (tmp_path / "outputs/kept").mkdir(parents=True)
    (tmp_path / "outputs/kept/notes.txt").write_text("mine")
    for name, wrong in [
        ("kept", "callbacks.checkpoints=null"),
        ("new", "trainer.max_epochs=-1"),
        ("new", "optimizer.lr=a"),
    ]:
        assert command("train", *SMALL, wrong, f"run.name={name}")[0] == 2
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.name != ".lock")
    assert found == ["outputs", "outputs/kept", "outputs/kept/notes.txt"]


def test_of_a_sweep_the_runs_that_began_stay(tmp_path):
    """At any depth, and those of other commands whatever they hold; nothing of a sweep of which none began."""
    outputs, noted = tmp_path / "outputs", leftovers.Leftovers()
    (outputs / "some/earlier/seed-0/.hydra").mkdir(parents=True)
    (outputs / "some/mine").mkdir()
    (outputs / "some/mine/notes.txt").touch()  # a folder of the user's, with the name of a run
    for name, began in [("some", "agent/seed-1"), ("none", None)]:
        folder = outputs / name
        noted.on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
        for job in ("earlier/seed-0", "agent/seed-0", "agent/seed-1", "softmax/seed-0", "mine"):
            if name == "none" or job != "earlier/seed-0":
                (folder / job / ".hydra").mkdir(parents=True)
            noted.on_job_start(OmegaConf.create({"hydra": {"runtime": {"output_dir": str(folder / job)}}}))
            if job == began:
                (folder / job / "train.log").touch()
        (folder / "multirun.yaml").touch()
        (outputs / "some/other/seed-0/.hydra").mkdir(parents=True, exist_ok=True)  # of a command beside this one
    leftovers.remove()
    found = sorted(str(path.parent.relative_to(outputs)) for path in outputs.rglob(".hydra"))
    assert found == ["some/agent/seed-1", "some/earlier/seed-0", "some/mine", "some/other/seed-0"]
    names = ["agent", "earlier", "mine", "multirun.yaml", "other"]
    assert sorted(path.name for path in (outputs / "some").iterdir()) == names
    assert (outputs / "some/mine/notes.txt").exists()
    assert [path.name for path in outputs.iterdir()] == ["some"]


def test_a_folder_is_only_removed_where_the_command_made_it(tmp_path):
    made, there, busy = tmp_path / "a/b/made", tmp_path / "there", tmp_path / "busy"
    there.mkdir()
    for folder in (made, there, busy):
        leftovers._note(folder, sweep=False)
        (folder / "checkpoints").mkdir(parents=True)
    with lock_folder(busy):  # another command has made the same folder at the same moment, and prepares its run
        leftovers.remove()
    assert sorted(tmp_path.iterdir()) == [busy, there] and not list(there.iterdir())


def test_uncommitted_changes_are_kept_beside_the_run(tmp_path, monkeypatch):
    changed = revision.Revision("abc", "--- a\n+++ b\n", [])
    monkeypatch.setattr(record, "revision", lambda: changed)
    kept = record._keep_patch(tmp_path)
    assert (tmp_path / kept["file"]).read_text() == changed.patch and str(changed) == "abc+changes"
    monkeypatch.setattr(record, "MAX_PATCH", 3)
    assert record._keep_patch(tmp_path)["file"] is None
    monkeypatch.setattr(record, "revision", lambda: changed._replace(patch=""))
    assert record._keep_patch(tmp_path) is None and str(revision.Revision(None, "", [])) == "unknown"


def test_the_code_of_another_repository_is_not_taken_for_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(revision, "CONF", Path(tmp_path, "conf"))
    revision.revision.cache_clear()
    try:
        assert revision.revision() == revision.Revision(None, "", [])
    finally:
        revision.revision.cache_clear()


@pytest.mark.full
def test_the_last_weights_are_measured_wherever_the_steps_end(command, tmp_path):
    """In the middle of an epoch, and between two validations; a run that goes on from there is that of more steps."""
    free = [setting for setting in SMALL if not setting.startswith("trainer.max")]
    found = {}
    for name, steps, every in [("x", 3, 1), ("x", 5, 3), ("whole", 5, 3)]:
        more = ("trainer.max_epochs=-1", f"trainer.max_steps={steps}", f"trainer.check_val_every_n_epoch={every}")
        status, _, err = command("train", *free, *more, "schedule=constant", f"run.name={name}")
        assert status == 0, err
        run = tmp_path / "outputs" / name
        assert json.loads((run / "metrics.json").read_text())["val/top1"] >= 0
        assert (run / "checkpoints/last").resolve().name == f"step-{steps:08d}"
        assert read_manifest(run / "checkpoints/last")["metrics"]["val/top1"] >= 0
        rows = read_metrics(run / "metrics.csv")
        found[name] = [[row[key] for row in rows if key in row] for key in ("train/loss", "val/loss")]
        found[name, steps] = [row["step"] for row in rows if "val/top1" in row]
    assert found["x", 3] == ["1", "2"] and found["x", 5] == ["1", "2", "4"] and found["whole", 5] == ["4"]
    assert found["x"][0] == found["whole"][0] and len(found["whole"][0]) == 5
    assert found["x"][1][-1] == found["whole"][1][-1]


@pytest.mark.full
def test_a_run_that_goes_on_elsewhere_has_a_best_of_its_own(command, tmp_path):
    assert command("train", *SMALL, "run.name=a")[0] == 0
    resume = f"resume={tmp_path / 'outputs/a/checkpoints/last'}"
    status, out, err = command("train", *SMALL, "trainer.max_epochs=2", resume, "run.name=b")
    assert status == 0, err
    best = tmp_path / "outputs/b/checkpoints/best"
    figures = json.loads((tmp_path / "outputs/b/metrics.json").read_text())
    assert "the best is chosen anew from here" in out
    assert (
        figures["best/val/top1"] == read_manifest(best)["metrics"]["val/top1"]
        and best.resolve().name == "step-00000004"
    )
