"""Runs beside a Weights & Biases that is broken, away, frozen or killed: all figures, and an end within seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.loggers.messenger import _children
from models.loggers.metrics_csv import read_metrics
from tests.faults.programs import ROOT, TINY, Program, run, start
from tests.faults.wandb_server import Server, serving

pytestmark = pytest.mark.case(46)
CHOSEN = (*(argument for argument in TINY if argument != "logger=none"), "run.name=a")
STEPS = 24
SLOWLY = """
import time
from models.callbacks.progress import RunProgress
RunProgress.on_train_batch_end = lambda *_: time.sleep(0.2)
"""
# waits at a step, as long as W&B takes to send the rows so far, until the file `go` is there
HELD = """
import os, time
from models.callbacks.progress import RunProgress
def hook(self, trainer, *_):
    end = time.monotonic() + 120
    while trainer.global_step == 30 and not os.path.exists("go") and time.monotonic() < end:
        time.sleep(0.02)
RunProgress.on_train_batch_end = hook
"""


def env(folder: Path, **more: str) -> dict[str, str | None]:
    """Nothing of the user's own W&B."""
    return {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(folder), "NETRC": str(folder / "none")} | more


def complete(folder: Path, steps: int = STEPS) -> bool:
    rows = [row["step"] for row in read_metrics(folder / "outputs/a/metrics.csv") if "train/loss" in row]
    return rows == [str(step) for step in range(steps)]


def begun(program: Program, server: Server) -> int:
    """Waits until the server has the first rows; the process that W&B has started."""
    while not server.rows:
        assert not program.ended, program.text
        time.sleep(0.05)
    ours = [pid for pid in _children(program.pid) if b"wandb_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return _children(ours[0])[0]


@pytest.mark.parametrize("error", ["ModuleNotFoundError", pytest.param("RuntimeError", marks=pytest.mark.full)])
def test_wandb_cannot_be_imported(tmp_path, error):
    (tmp_path / "shim/wandb").mkdir(parents=True)
    (tmp_path / "shim/wandb/__init__.py").write_text(f"raise {error}('no wandb here')\n")
    status, text = run(tmp_path, *CHOSEN, "trainer.max_epochs=1", env=env(tmp_path, PYTHONPATH=str(tmp_path / "shim")))
    assert (status, complete(tmp_path, 8)) == (0, True), text
    assert text.count("Weights & Biases failed") == 1 and f"({error}: no wandb here); the run goes on" in text


@pytest.mark.full
def test_a_broken_wandb_breaks_no_import(tmp_path):
    """timm imports W&B where it finds it: of a process of its own, which has imported nothing yet."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text("raise RuntimeError('broken')\n")
    for program in ("train.py", "eval.py"):
        source = "import runpy\nimport models.runs.launchers as launchers\nlaunchers.sends_away = lambda: False\n"
        source += f"runpy.run_path({program!r})['job']()"
        variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", source], env=variables, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.parametrize("how", ["silent", 401, 429, 500])
def test_a_server_that_is_bad_from_the_start(tmp_path, how):
    with serving(how) as server:
        status, text = run(tmp_path, *CHOSEN, env=env(tmp_path, **server.env))
    assert (status, complete(tmp_path)) == (0, True), text
    assert text.count("wandb sync outputs/a/wandb/") >= 1
    assert list(tmp_path.glob("outputs/a/wandb/offline-run-*/run-*.wandb"))


@pytest.mark.full
@pytest.mark.parametrize("how", ["silent", *(pytest.param(how, marks=pytest.mark.faults) for how in (429, 500))])
def test_a_server_that_goes_away_holds_no_stop(tmp_path, how):
    with serving("good") as server:
        program = start(tmp_path, *CHOSEN, "trainer.max_epochs=50", env=env(tmp_path, **server.env), before=SLOWLY)
        begun(program, server)
        server.how = how
        program.wait_for("epoch 1/50")
        program.send(signal.SIGTERM)
        program.wait_for("stopped by SIGTERM")
        told = time.monotonic()
        assert program.wait() == 75
    assert time.monotonic() - told < 30  # 6 s for W&B, and curves drawn on a machine that has other things to do
    assert "upload with: wandb sync outputs/a/wandb/run-*" in program.text or "failed" not in program.text


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_wandb_starts_is_killed_or_frozen(tmp_path, number):
    with serving("good") as server:
        program = start(tmp_path, *CHOSEN, "trainer.max_epochs=6", env=env(tmp_path, **server.env), before=HELD)
        core = begun(program, server)
        os.kill(core, number)
        (tmp_path / "go").touch()
        assert program.wait() == 0, program.text
    assert complete(tmp_path, 48)
    assert program.text.count("Weights & Biases failed") == 1
    assert program.text.count("upload with: wandb sync outputs/a/wandb/run-*") == 1
    assert not Path(f"/proc/{core}").exists() or "Z" in Path(f"/proc/{core}/stat").read_text()


@pytest.mark.full
def test_a_good_server_gets_everything(tmp_path):
    with serving("good") as server:
        status, text = run(tmp_path, *CHOSEN, env=env(tmp_path, **server.env), before=SLOWLY)
    assert status == 0 and "failed" not in text, text
    assert server.rows >= STEPS


@pytest.mark.case(46)
@pytest.mark.full
def test_a_file_beside_what_is_trained_on_names_no_server(tmp_path):
    """W&B would take its server from ./wandb/settings, and send it the key."""
    (tmp_path / "wandb").mkdir()
    with serving("good") as server:
        (tmp_path / "wandb/settings").write_text(f"[default]\nbase_url = {server.env['WANDB_BASE_URL']}\n")
        known = env(tmp_path, WANDB_API_KEY=server.env["WANDB_API_KEY"]) | {"WANDB_BASE_URL": None}
        status, text = run(tmp_path, *CHOSEN, "trainer.max_epochs=1", "logger.mode=online", env=known)
    assert (status, server.asked) == (0, 0), text
