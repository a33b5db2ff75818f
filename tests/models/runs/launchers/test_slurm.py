"""`hydra/launcher=slurm`: what is submitted and how often, with a SLURM of this machine and a small program."""

import json
import subprocess
import sys
import time

import pytest

from conf.errors import UserError
from models.runs import launchers
from models.runs.launchers import job, slurm
from models.runs.launchers import queue as queue_of
from tests.faults.slurm import cluster, wait_for

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:])
folder = Path(given["hydra.run.dir"].strip("'"))
started = len(list(folder.glob("started-*")))
came = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: came.append(number))
(folder / f"started-{started}").write_text(json.dumps([sys.argv, os.environ["SLURM_JOB_ID"]]))
end = time.monotonic() + (60 if given["seed"] == "9" and not started else 0.1)
while time.monotonic() < end and not came:
    time.sleep(0.02)
if came:
    sys.exit(75)
(folder / "metrics.json").write_text(json.dumps({"val/top1": 0.5, "epochs": 30, "steps": 8}))
"""
GIVEN = {
    **{"partition": None, "account": None, "qos": None, "constraint": None, "mem": None, "hours": 24, "signal": 300},
    **{"nodes": None, "gpus_per_node": None, "tasks_per_node": None, "cpus_per_task": 8, "setup": [], "more": {}},
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The folder of the jobs of a SLURM of this machine."""
    with cluster(tmp_path / "queue") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield tmp_path / "queue"


@pytest.fixture
def train(launch):
    """`train("seed=1", ...) -> (exit status, output, errors)` of train.py with hydra/launcher=slurm, in `tmp_path`."""

    def job():
        assert launchers.sends_away()
        return slurm.send

    return lambda *arguments: launch(PROGRAM, job, "hydra/launcher=slurm", *arguments)


@pytest.mark.full
@pytest.mark.case(13)
def test_a_run_is_submitted_once_and_queued_again_when_its_time_is_over(train, queue, tmp_path):
    given = ("run.name=a", "seed=9", "hydra.launcher.partition=gpu", "trainer=gpu", "hydra.launcher.hours=2")
    status, output, errors = train(*given)
    assert status == 0, errors
    assert output.startswith(
        "job 4711: everything goes to outputs/a\n  watch: squeue -j 4711; tail -F outputs/a/slurm/"
    )
    script = (queue / "4711/script").read_text()
    for line in ("partition=gpu", "gpus-per-node=1", "ntasks-per-node=1", "time=120", "signal=USR2@300", "requeue"):
        assert f"#SBATCH --{line}\n" in script
    run_dir = tmp_path / "outputs/a"
    _until(lambda: (run_dir / "started-0").exists())

    status, output, _ = train(*given)
    assert status == 0 and output == "outputs/a is job 4711, running: nothing is submitted\n"

    subprocess.run(["scancel", "--signal=USR2", "4711"], check=True)
    wait_for(queue, "4711", "COMPLETED")
    assert (queue / "4711/requeued").read_text() == "asked\n"
    (command, job), (_, again) = (json.loads((run_dir / f"started-{n}").read_text()) for n in range(2))
    assert job == again == "4711"
    assert command[1:] == [*given[:2], "trainer=gpu", f"hydra.run.dir='{run_dir}'", "hydra.mode=RUN"]

    status, output, _ = train(*given)
    assert status == 0 and output.startswith("outputs/a has finished; raise trainer.max_epochs")
    status, output, _ = train(*given, "trainer.max_epochs=40")
    assert status == 0 and output.startswith("job 4712: everything goes to outputs/a\n")


@pytest.mark.full
@pytest.mark.case(13)
def test_a_job_that_somebody_cancels_stays_cancelled(train, queue, tmp_path):
    assert train("run.name=a", "seed=9", "trainer=gpu")[0] == 0
    _until(lambda: (tmp_path / "outputs/a/started-0").exists())
    subprocess.run(["scancel", "4711"], check=True)
    wait_for(queue, "4711", "CANCELLED")
    run_dir = tmp_path / "outputs/a"
    assert not (queue / "4711/requeued").exists() and not (run_dir / "started-1").exists()
    (run_dir / "checkpoints/step-00000003").mkdir(parents=True)
    status, _, errors = train("run.name=a", "seed=9", "resume=null")
    assert status == 2 and "outputs/a holds checkpoints of an earlier start, got resume=null" in errors
    assert train("run.name=a", "seed=9", "trainer=gpu")[0] == 0  # the same command goes on
    wait_for(queue, "4712", "COMPLETED")
    assert json.loads((run_dir / "started-1").read_text())[0][-1] == "resume=auto"


@pytest.mark.full
def test_a_sweep_is_a_job_for_each_run_and_later_its_table(train, queue, tmp_path):
    given = ("-m", "seed=1,2", "run.name=s", "trainer.accelerator=cpu")
    status, output, errors = train(*given)
    assert status == 0, errors
    assert "run 2 of 2: seed=2\njob 4712: everything goes to outputs/s/seed-2\n" in output
    assert "0 of 2 runs" in output and "no result: defaults seed=1: job 4711, submitted" in output
    for number in ("4711", "4712"):
        wait_for(queue, number, "COMPLETED")
    assert "--gpus-per-node" not in (queue / "4711/script").read_text()
    status, output, errors = train(*given)
    assert status == 0 and "2 of 2 runs" in output and "job" not in output


def test_what_slurm_refuses_is_one_sentence_and_leaves_nothing(train, queue, tmp_path):
    status, _, errors = train("run.name=a", "hydra.launcher.partition=none")
    assert status == 2 and "SLURM refuses the job" in errors and "invalid partition specified: none" in errors
    assert not (tmp_path / "outputs").exists()


def test_without_slurm_or_submitit_there_is_one_sentence(train, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None if name == "srun" else f"/bin/{name}")
    status, _, errors = train("run.name=a")
    assert status == 2 and "slurm needs the commands of SLURM, got no srun; run it where" in errors
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(slurm, "find_spec", lambda name: None)
    status, _, errors = train("run.name=a")
    assert status == 2 and "hydra/launcher=slurm needs the package submitit, which is not installed" in errors
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("trainer", "given", "wanted"),
    [
        ({"devices": 1, "num_nodes": 1}, {}, (1, 1, 1)),
        ({"devices": 8, "num_nodes": 2}, {}, (2, 8, 8)),
        ({"devices": 2, "num_nodes": 1, "accelerator": "cpu"}, {}, (1, 2, None)),
        ({"devices": "auto", "num_nodes": 1}, {"gpus_per_node": 4}, (1, 4, 4)),
        ({"devices": "${slurm:tasks_per_node}", "num_nodes": "${slurm:nodes}"}, {"gpus_per_node": 4}, (1, 4, 4)),
        ({"devices": "auto", "num_nodes": "${slurm:nodes}"}, {"gpus_per_node": 4, "nodes": 3}, (3, 4, 4)),
    ],
)
def test_a_job_has_what_the_trainer_asks_for(trainer, given, wanted):
    options = slurm.asked_for(GIVEN | given, trainer)
    assert (options["nodes"], options["ntasks_per_node"], options.get("gpus_per_node")) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus_per_node": 4}, "got trainer.devices=1; add trainer=slurm"),
        ({"nodes": 2}, "got trainer.num_nodes=1; add trainer=slurm"),
        ({"hours": 0}, "hours must be a number of at least"),
        ({"hours": "24h"}, "hours must be a number of at least"),
        ({"signal": 90000}, "signal must be shorter than the job, got 90000"),
        ({"cpus_per_task": 0}, "cpus_per_task must be a whole number of at least 1, got 0"),
        ({"partition": "a b"}, "partition must be one word, got 'a b'"),
        ({"partition": "a\n#SBATCH --wrap=x"}, "partition must be one word"),
        ({"setup": "module load cuda"}, "setup must be a list of lines"),
        ({"more": [1]}, "more must be options with their values"),
        ({"exclude": "node7"}, "it has no exclude; of sbatch's options give more: {exclude: ...}"),
    ],
)
def test_a_wrong_setting_is_refused(given, message):
    with pytest.raises(UserError) as error:
        slurm.asked_for(GIVEN | given, {"devices": 1, "num_nodes": 1})
    assert message in str(error.value)


@pytest.mark.full
def test_settings_of_a_cluster_come_from_its_file(train, queue, tmp_path):
    """conf/local/slurm.yaml, here in another folder of configurations."""
    (tmp_path / "mine/local").mkdir(parents=True)
    written = "partition: mine\nsetup: ['echo ready']\nmore: {exclude: node7}\n"
    (tmp_path / "mine/local/slurm.yaml").write_text(written)
    status, _, errors = train("run.name=a", "hydra.launcher.account=me", "--config-dir=mine")
    assert status == 0, errors
    script = (queue / "4711/script").read_text()
    assert all(f"#SBATCH --{line}\n" in script for line in ("partition=mine", "account=me", "exclude=node7"))
    assert "\necho ready\n" in script


def test_an_evaluation_is_not_sent_away(command):
    status, _, errors = command("eval", "ckpt=outputs/a", "hydra/launcher=slurm")
    assert status == 2 and "eval.py measures in its own process, got slurm" in errors


def _until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.case(13)
@pytest.mark.parametrize(
    ("state", "restarts", "advances", "queued", "said"),
    [
        ("RUNNING", "0", True, True, "is put into the queue again, and continues there"),
        ("RUNNING", "0", False, True, "is put into the queue again, and continues there"),
        ("RUNNING", "9", True, True, "is put into the queue again, and continues there"),
        ("RUNNING", "3", False, False, "has not come one checkpoint further"),
        ("COMPLETING", "0", True, False, "is COMPLETING: it is not put into the queue again"),
        (None, "0", True, False, "is gone: it is not put into the queue again"),
    ],
)
def test_a_job_is_queued_again_where_that_leads_further(
    state, restarts, advances, queued, said, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(job, "state", lambda number: state)
    monkeypatch.setattr(job, "requeue", asked.append)
    monkeypatch.setattr(job.signal, "signal", lambda *given: None)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": restarts}.items():
        monkeypatch.setenv(name, value)
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, [*getattr(sys, name)])
    step = tmp_path / "checkpoints/step-8"
    (tmp_path / "train.py").write_text(f"import os\nif {advances}: os.makedirs({str(step)!r})\nraise SystemExit(75)\n")
    with pytest.raises(SystemExit, match="75"):
        job.run(str(tmp_path / "train.py"), [f"hydra.run.dir='{tmp_path}'"])
    assert asked == ["7"] * queued and said in capsys.readouterr().out


@pytest.mark.case(13)
@pytest.mark.parametrize(
    ("restarts", "saved", "given"),
    [("0", True, "resume=null"), ("1", False, "resume=other"), ("1", True, "resume=auto")],
)
def test_a_job_that_is_queued_again_goes_on_whatever_it_began_with(restarts, saved, given, tmp_path, monkeypatch):
    """A new run, or one from another's checkpoint, would begin again, or be refused, where it has saved."""
    monkeypatch.setattr(job.signal, "signal", lambda *given: None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, [*getattr(sys, name)])
    (tmp_path / "checkpoints/step-8" if saved else tmp_path).mkdir(parents=True, exist_ok=True)
    (tmp_path / "train.py").write_text("import sys\nprint(*sys.argv[1:])\n")
    began = given if given != "resume=auto" else "++resume=null"
    job.run(str(tmp_path / "train.py"), [began, "seed=1", f"hydra.run.dir='{tmp_path}'"])
    assert [word for word in sys.argv if "resume" in word] == [given] and "seed=1" in sys.argv


def test_a_queue_that_does_not_answer_is_said(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "slurm_load_jobs error: Unable to contact slurm controller\n")
    monkeypatch.setattr(queue_of.subprocess, "run", lambda *given, **options: done)
    with pytest.raises(UserError, match="what became of job 7, got 'slurm_load_jobs error: Unable to contact"):
        queue_of.state("7")
    with pytest.raises(UserError, match="job 7 has saved but is not put into the queue again"):
        queue_of.requeue("7")
