"""metrics.csv, and the loggers that may fail without failing a run."""

import csv
import json
import socket
import struct
import sys
from pathlib import Path

import pytest

from models.loggers import build_loggers
from models.loggers import weights_and_biases as wandb_logger
from models.loggers.metrics_csv import MetricsCSV, read_metrics
from models.loggers.weights_and_biases import SafeWandb
from models.side_outputs import begin

WANDB = {"name": "wandb", "project": "p", "entity": None, "mode": "auto", "tags": []}


def test_rows_get_new_columns_later(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"train/loss": 2.0, "epoch": 0}, step=1)
    log.save()
    log.log_metrics({"train/loss": 1.0, "epoch": 0}, step=2)
    log.log_metrics({"val/top1": 0.5, "epoch": 0}, step=2)
    log.finalize("success")
    rows = list(csv.DictReader(path.open()))
    assert [row["train/loss"] for row in rows] == ["2.0", "1.0", ""]
    assert rows[2] == {"step": "2", "epoch": "0", "train/loss": "", "val/top1": "0.5"}
    assert read_metrics(path)[2] == {"step": "2", "epoch": "0", "val/top1": "0.5"}


def test_a_resumed_run_drops_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step=step)
    first.save()
    second = MetricsCSV(path, resume_step=4)
    second.log_metrics({"train/loss": 40.0, "lr": 1.0}, step=4)
    second.save()
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)][-2:] == [("3", "3.0"), ("4", "40.0")]


def test_csv_is_always_there(tmp_path):
    for name in ("csv", "none"):
        assert [type(log) for log in build_loggers({"name": name}, tmp_path, {}, 0)] == [MetricsCSV]


def test_an_unknown_logger_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"logger: name must be one of wandb, csv, tensorboard, none, got 'wandd'"):
        build_loggers({"name": "wandd"}, tmp_path, {}, 0)


# stands in for wandb in the process that imports it: `FAULT` is run by init, with the mode
STANDIN = """
import json, os
class Settings:
    def __init__(self, **given): pass
class Run:
    name, config = "r", {}
    def define_metric(self, *given, **named): pass
    def log(self, figures): print(json.dumps(figures), file=OUT, flush=True)
    def finish(self, status): print(json.dumps({"finish": status}), file=OUT, flush=True)
def init(mode, **given):
    FAULT
    return Run()
OUT = open(os.environ["STANDIN"], "a")
"""


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """`standin("raise OSError") -> the file of what it was told`, with a server that seems to answer."""

    def make(fault: str) -> Path:
        (tmp_path / "shim/wandb").mkdir(parents=True, exist_ok=True)
        (tmp_path / "shim/wandb/__init__.py").write_text(STANDIN.replace("FAULT", fault))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shim"))
        monkeypatch.setenv("STANDIN", str(tmp_path / "told"))
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setattr(wandb_logger, "_reachable", lambda: True)
        return tmp_path / "told"

    return make


def logged(tmp_path: Path) -> SafeWandb:
    """A logger that has been told of two steps and has ended."""
    logger = build_loggers(WANDB, tmp_path / "run", {}, 0, figures=["val/loss"])[1]
    logger.log_metrics({"loss": 0.5}, 0)  # of a validation that is made up for, before the run begins
    logger.start()
    logger.log_metrics({"loss": 0.5}, 1)
    logger.finalize("success")
    logger.close()
    return logger


@pytest.mark.case(46)
def test_wandb_falls_back_to_offline_and_then_to_nothing(tmp_path, standin, capsys):
    told = standin("if mode == 'online': raise OSError('no such server')")
    logger = logged(tmp_path)
    assert (logger.mode, logger.broken) == ("offline", False)
    rows = [{"loss": 0.5, "trainer/global_step": step} for step in range(2)]
    assert [json.loads(line) for line in told.read_text().splitlines()] == [*rows, {"finish": 0}]
    out = capsys.readouterr().out
    assert out.count("Weights & Biases failed (OSError: no such server); the run goes on") == 1
    assert out.count("Weights & Biases is offline; upload with: wandb sync") == 1


@pytest.mark.case(46)
def test_a_wandb_that_cannot_be_used_is_done_without(tmp_path, standin, capsys, monkeypatch):
    standin("raise BaseException('none')")
    assert logged(tmp_path).broken
    assert "Weights & Biases failed (BaseException: none); the run goes on" in capsys.readouterr().out
    (tmp_path / "shim/wandb/__init__.py").write_text("raise RuntimeError('broken')")
    assert logged(tmp_path).broken
    assert "Weights & Biases failed (RuntimeError: broken); the run goes on" in capsys.readouterr().out
    monkeypatch.setattr(wandb_logger, "find_spec", lambda name: None)
    assert [type(log) for log in build_loggers(WANDB, tmp_path, {}, 0)] == [MetricsCSV]
    assert "Weights & Biases is not installed; the run goes on" in capsys.readouterr().out


@pytest.mark.case(46)
def test_a_server_that_never_answers_leaves_the_run_on_the_disk(tmp_path, standin, capsys, monkeypatch):
    """A run that is over before W&B has given up on its server begins anew offline, with all that it was told."""
    told = standin("if mode == 'online': import time; time.sleep(600)")
    monkeypatch.setattr(wandb_logger, "START_ONLINE", 0.1)
    logger = logged(tmp_path)
    assert (logger.mode, logger.broken) == ("offline", False)
    assert len(told.read_text().splitlines()) == 3
    assert "failed (the server does not answer)" in capsys.readouterr().out


@pytest.mark.case(46)
def test_a_wandb_that_hangs_at_the_end_is_left(tmp_path, standin, capsys, monkeypatch):
    standin("Run.finish = lambda *_: __import__('time').sleep(600)")
    monkeypatch.setattr(wandb_logger, "END", 0.5)
    monkeypatch.setattr(wandb_logger, "START_ONLINE", 60.0)
    (tmp_path / "run/wandb/run-1").mkdir(parents=True)
    assert logged(tmp_path).broken
    out = capsys.readouterr().out
    assert "failed (it has not ended within 0 s)" in out and out.count("wandb sync") == 1 and "/wandb/run-*" in out


@pytest.mark.case(46)
def test_a_stop_waits_for_nothing_remote(tmp_path, standin, capsys, monkeypatch):
    """It begins offline what has not begun online, and what does not end then is ended."""
    told = standin("if mode == 'online': import time; time.sleep(600)")
    monkeypatch.setattr(wandb_logger, "START_STOPPED", 0.1)
    monkeypatch.setattr(wandb_logger, "STOP", 60.0)
    assert _stopped(tmp_path).mode == "offline"
    assert [json.loads(line) for line in told.read_text().splitlines()][-1] == {"finish": 1}
    assert "failed (it has not ended within" not in capsys.readouterr().out
    standin("import time; time.sleep(600)")
    monkeypatch.setattr(wandb_logger, "STOP", 0.5)
    assert _stopped(tmp_path).mode == ""
    assert capsys.readouterr().out.count("failed (it has not ended within") == 1


def _stopped(folder):
    """The logger of a run that logged one figure and was stopped."""
    logger = build_loggers(WANDB, folder / "run", {}, 0)[1]
    logger.start()
    logger.log_metrics({"loss": 0.5}, 0)
    logger.finalize("failed")
    logger.close()
    return logger


@pytest.mark.case(46)
def test_a_failure_in_one_run_of_a_sweep_is_none_in_the_next(tmp_path, standin):
    told = standin("if os.path.exists(os.environ['STANDIN'] + '-bad'): raise OSError('away')")
    bad = tmp_path / "told-bad"
    bad.touch()
    assert logged(tmp_path).broken
    bad.unlink()
    assert not logged(tmp_path).broken and '"finish": 0' in told.read_text()


def test_wandb_is_offline_without_a_key_and_without_a_network(tmp_path, monkeypatch, capsys):
    modes = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_logger, "_has_key", lambda: False)
    modes.append(build_loggers(WANDB, tmp_path, {}, 0)[1].given["modes"])
    monkeypatch.setattr(wandb_logger, "_has_key", lambda: True)
    with socket.socket() as silent:  # bound and not listening: it refuses
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        modes.append(build_loggers(WANDB, tmp_path, {}, 0)[1].given["modes"])
    assert modes == [["offline"], ["offline"]]
    assert "127.0.0.1 cannot be reached" in capsys.readouterr().out


def test_keys_are_found_in_the_environment_and_in_netrc(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_logger._has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_logger._has_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_logger._has_key()


RUN = {"name": "s", "model": "vit_tiny", "attention": "agent", "data": "digits", "recipe": None}


def opened_with(run_dir, run, **settings):
    """What W&B would be started with."""
    return wandb_logger.start_with({**WANDB, **settings}, run_dir, "offline", {"run": run})["init"]


@pytest.mark.case(46)
def test_tensorboard_cannot_end_a_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    begin()
    logger = build_loggers({"name": "tensorboard"}, tmp_path / "run", {}, 0)[1]
    (tmp_path / "run").touch()  # no folder can be made there
    logger.log_metrics({"loss": 0.5}, 0)
    logger.save()
    (tmp_path / "run").unlink()
    logger.log_metrics({"loss": 0.4}, 1)
    logger.finalize("success")
    assert capsys.readouterr().err.count("logger: TensorBoard failed") == 1
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "models.loggers.event_files", None)  # as where its import fails
    assert [type(log) for log in build_loggers({"name": "tensorboard"}, tmp_path, {}, 0)] == [MetricsCSV]


def test_a_run_of_a_sweep_is_called_by_what_differs(tmp_path):
    given = opened_with(tmp_path / "outputs/s/agent/seed-0", RUN, job_type="train", tags=["mine", "agent", 7])
    assert (given["name"], given["group"], given["job_type"]) == ("agent/seed-0", "s", "train")
    assert given["tags"] == ["vit_tiny", "agent", "digits", "mine", "7"]


def test_a_single_run_is_called_as_its_folder(tmp_path):
    alone = opened_with(tmp_path / "s" / "outputs" / "s", RUN)
    assert (alone["name"], alone["group"]) == ("s", None)
    published = opened_with(tmp_path / "s", RUN | {"recipe": "agent/deit_tiny_in1k"})
    assert published["group"] == "agent/deit_tiny_in1k" and "agent/deit_tiny_in1k" in published["tags"]
    assert opened_with(tmp_path / "s", RUN, group="mine")["group"] == "mine"


def records(path: Path):
    """The records of a .wandb file, which are stored in blocks of 32 KiB as LevelDB stores its log."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.full
@pytest.mark.slow
def test_what_wandb_writes(tmp_path, monkeypatch):
    """Offline: facts beside the configuration, the best of every figure, and the checkpoint as an artifact."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "outputs/s/agent/seed-0"
    (run_dir / "checkpoints/step-1").mkdir(parents=True)
    (run_dir / "checkpoints/step-1/config.json").write_text("{}")
    (run_dir / "checkpoints/best").symlink_to("step-1")
    settings, figures = WANDB | {"artifacts": True}, ["val/top1", "val/loss"]
    logger = build_loggers(settings, run_dir, {"seed": 0, "run": RUN}, 0, {"flops": 123}, figures)[1]
    logger.start()
    for step, (top1, loss) in enumerate([(0.5, 1.0), (0.7, 0.5), (0.6, 0.8)]):
        logger.log_metrics({"val/top1": top1, "val/loss": loss}, step)
    logger.finalize("success")
    logger.close()
    assert not logger.broken
    found = list(records(next(run_dir.glob("wandb/offline-run-*/run-*.wandb"))))
    config = {item.key: item.value_json for record in found for item in record.config.update}
    summary = {item.nested_key[0]: item.value_json for r in found for item in r.summary.update if item.nested_key}
    artifact = next(record.artifact for record in found if record.WhichOneof("record_type") == "artifact")
    assert config["flops"] == "123" and config["seed"] == "0"
    assert '"max":0.7' in summary["val/top1"] and '"min":0.5' in summary["val/loss"]
    assert (artifact.name, artifact.type, len(artifact.manifest.contents)) == ("agent-seed-0", "model", 1)
