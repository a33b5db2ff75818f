"""Real commands that are ended at their ends: what a finished, a longer, a shorter and a timed run does then."""

import json

import pytest

from models.loggers.metrics_csv import read_metrics
from tests.faults.programs import TINY, digests, run

IN_VALIDATION = """
import os, signal
from models.tasks.base import Task
old = Task.validation_step
def validation_step(self, batch, batch_idx):
    if self.trainer.global_step == {step} and batch_idx == 1:
        os.kill(os.getpid(), signal.{signal})
    return old(self, batch, batch_idx)
Task.validation_step = validation_step
"""
AT_STEP = """
import os, signal
from models.tasks.classification import Classification
old = Classification.training_step
def training_step(self, batch, batch_idx):
    if self.trainer.global_step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return old(self, batch, batch_idx)
Classification.training_step = training_step
"""
BEFORE_THE_REPORT = "import os, models.runs.training as t\nt._report = lambda *_: os.kill(os.getpid(), 9)"


def figures(folder):
    found = json.loads((folder / "outputs/a/metrics.json").read_text())
    times = ("images_per_second", "data_wait", "peak_memory", "seconds")
    return {name: value for name, value in found.items() if name not in times}


@pytest.mark.full
@pytest.mark.case(15)
@pytest.mark.case(6)
def test_stopped_in_validations_and_started_until_it_is_finished(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "run.name=a", *TINY)[0] == 0
    for step, signal in ((8, "SIGTERM"), (8, "SIGHUP"), (10, "SIGKILL"), (24, "SIGINT")):
        before = (AT_STEP if step == 10 else IN_VALIDATION).format(step=step, signal=signal)
        status, text = run(parts, "run.name=a", *TINY, before=before)
        assert status == {"SIGKILL": -9, "SIGINT": 130}.get(signal, 75), text
    status, text = run(parts, "run.name=a", *TINY, before=BEFORE_THE_REPORT)
    assert status == -9
    assert run(parts, "run.name=a", *TINY)[0] == 0
    assert digests(parts / "outputs/a") == digests(whole / "outputs/a")
    assert figures(parts) == figures(whole)
    assert [(row["step"], row["epoch"]) for row in read_metrics(parts / "outputs/a/metrics.csv")] == [
        (row["step"], row["epoch"]) for row in read_metrics(whole / "outputs/a/metrics.csv")
    ]
    before = digests(parts / "outputs/a")
    status, text = run(parts, "run.name=a", *TINY)
    assert status == 0 and "the run has finished at step 24; raise trainer.max_epochs to go on" in text
    assert digests(parts / "outputs/a") == before


@pytest.mark.full
@pytest.mark.case(15)
@pytest.mark.case(23)
def test_a_run_can_be_made_longer_and_not_shorter(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "run.name=a", *TINY)[0] == 0
    assert run(parts, "run.name=a", *TINY, "trainer.max_epochs=2", before=BEFORE_THE_REPORT)[0] == -9
    before = digests(parts / "outputs/a")
    status, text = run(parts, "run.name=a", *TINY, "trainer.max_epochs=1")
    assert status == 2 and "the run stands at step 16, 2 epochs and 0 batches, got trainer.max_epochs=1" in text
    assert digests(parts / "outputs/a") == before
    assert run(parts, "run.name=a", *TINY)[0] == 0
    for folder in (whole, parts):
        assert figures(folder)["steps"] == 24
    assert [row["step"] for row in read_metrics(parts / "outputs/a/metrics.csv")] == [
        row["step"] for row in read_metrics(whole / "outputs/a/metrics.csv")
    ]


@pytest.mark.full
@pytest.mark.case(13)
@pytest.mark.case(23)
def test_a_command_that_says_where_to_begin_goes_on_when_it_is_given_again(tmp_path):
    """Stopped behind the other run's checkpoint; and one that begins anew, which a scheduler starts again."""
    assert run(tmp_path, "run.name=other", *TINY, "trainer.max_epochs=1")[0] == 0
    begun = (*TINY, "resume=outputs/other")
    assert run(tmp_path, "run.name=whole", *begun)[0] == 0
    status, text = run(tmp_path, "run.name=a", *begun, before=AT_STEP.format(step=12, signal="SIGTERM"))
    assert status == 75, text
    status, text = run(tmp_path, "run.name=a", *begun)
    assert status == 0 and "continues from outputs/a/checkpoints/step-00000013" in text, text
    assert digests(tmp_path / "outputs/a") == digests(tmp_path / "outputs/whole")
    anew = ("run.name=b", *TINY, "resume=null", "trainer.max_epochs=1")
    assert run(tmp_path, *anew, before=AT_STEP.format(step=3, signal="SIGTERM"))[0] == 75
    assert run(tmp_path, *anew)[0] == 2
    status, text = run(tmp_path, *anew, env={"SLURM_RESTART_COUNT": "1"})
    assert status == 0 and digests(tmp_path / "outputs/b") == digests(tmp_path / "outputs/other"), text


@pytest.mark.full
@pytest.mark.case(23)
def test_the_time_of_a_run_is_that_of_each_start(tmp_path):
    endless = [argument for argument in TINY if "max_epochs" not in argument]
    timed = ("run.name=a", *endless, "trainer.max_epochs=100000", "trainer.max_time=00:00:00:02")
    steps = []
    for _ in range(2):
        status, text = run(tmp_path, *timed)
        assert status == 0 and "trainer.max_time=00:00:00:02 ended this start at step" in text, text
        assert "has finished" not in text
        steps.append(figures(tmp_path)["steps"])
    assert 0 < steps[0] < steps[1]
