"""Jobs of SLURM end to end: real runs on a SLURM of this machine, signalled and queued again."""

import json
import subprocess
import sys

import pytest

from tests.docs.pages import blocks
from tests.faults.programs import ROOT, TINY, digests, run
from tests.faults.slurm import cluster, wait_for

LONG = (*TINY, "trainer.max_epochs=20", "checkpoint.every_n_steps=1000")
pytestmark = [pytest.mark.faults, pytest.mark.case(13)]


@pytest.fixture
def queue(tmp_path):
    with cluster(tmp_path / "queue") as variables:
        yield tmp_path / "queue", variables


def signalled(folder, job, number):
    """The job `job` of the run `folder`, once it trains, is signalled as at the end of its time."""
    queue, variables = folder.parents[1] / "queue", dict(variables_of(folder.parents[1] / "queue"))
    log = folder / "train.log"
    for _ in range(2400):
        if log.exists() and "epoch 2/20" in log.read_text():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert "epoch 2/20" in log.read_text(), (queue / job / "state").read_text()
    subprocess.run(["scancel", f"--signal={number}", job], check=True, env=variables)


def variables_of(queue):
    import os

    return os.environ | {"PATH": f"{queue / 'bin'}:{os.environ['PATH']}", "LOCAL_SLURM": str(queue)}


def test_a_run_that_is_queued_again_ends_with_the_same_bits(tmp_path, queue):
    folder, variables = queue
    status, text = run(tmp_path, *LONG, "run.name=a", "hydra/launcher=slurm", env=variables)
    assert status == 0, text
    signalled(tmp_path / "outputs/a", "4711", "USR2")
    wait_for(folder, "4711", "COMPLETED")
    assert (folder / "4711/requeued").exists() and (folder / "4711/status-0").read_text() == "75"
    assert run(tmp_path, *LONG, "run.name=whole")[0] == 0
    assert digests(tmp_path / "outputs/a") == digests(tmp_path / "outputs/whole") != {}


def test_tasks_of_a_job_are_the_processes_of_one_run(tmp_path, queue):
    folder, variables = queue
    two = ("trainer=slurm", "trainer.accelerator=cpu", "trainer.precision=32-true", "hydra.launcher.tasks_per_node=2")
    status, text = run(tmp_path, *TINY, *two, "run.name=a", "hydra/launcher=slurm", env=variables)
    assert status == 0, text
    wait_for(folder, "4711", "COMPLETED")
    assert run(tmp_path, *TINY, "trainer=ddp_cpu", "run.name=b")[0] == 0
    assert digests(tmp_path / "outputs/a") == digests(tmp_path / "outputs/b") != {}
    assert json.loads((tmp_path / "outputs/a/metrics.json").read_text())["steps"] == 12


def test_the_script_of_the_documents_queues_itself_again(tmp_path, queue):
    folder, _ = queue
    script = next(block.text for block in blocks("docs/clusters.md") if block.text.startswith("#!/bin/bash"))
    program = " ".join((sys.executable, f"{ROOT}/train.py", *LONG))
    small = "--nodes=1 --ntasks-per-node=2 --time=1:00"
    for old, new in (
        ("--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00", small),
        ("python train.py recipe=biformer/tiny_in1k data.root=/data/imagenet", program),
        ("trainer=slurm", "trainer=slurm trainer.accelerator=cpu trainer.precision=32-true run.name=a"),
    ):
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["sbatch", "job.sh"], check=True, cwd=tmp_path, env=variables_of(folder))
    signalled(tmp_path / "outputs/a", "4711", "USR1")
    wait_for(folder, "4711", "COMPLETED")
    assert (folder / "4711/status-0").read_text() == "75"
    assert json.loads((tmp_path / "outputs/a/metrics.json").read_text())["epochs"] == 20
