"""metrics.csv, and the loggers that may fail without failing a run."""

import csv
import socket

import pytest

from models.loggers import build_loggers
from models.loggers import weights_and_biases as wandb_logger
from models.loggers.metrics_csv import MetricsCSV, read_metrics
from models.loggers.weights_and_biases import SafeWandb

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


def test_wandb_falls_back_to_offline_and_then_to_nothing(tmp_path, monkeypatch, capsys):
    tried = []

    def start(self, config):
        tried.append(self._wandb_init["mode"] if not self._offline else "offline")
        self._try(lambda: 1 / 0)
        return not self.broken

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(wandb_logger, "_reachable", lambda: True)
    monkeypatch.setattr(SafeWandb, "start", start)
    assert len(build_loggers(WANDB, tmp_path, {}, 0)) == 1
    assert tried == ["online", "offline"]
    assert "Weights & Biases failed (division by zero); the run goes on" in capsys.readouterr().out


def test_wandb_is_offline_without_a_key_and_without_a_network(tmp_path, monkeypatch, capsys):
    modes = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_logger, "_wandb_logger", lambda settings, run_dir, mode: modes.append(mode) or Fake())
    monkeypatch.setattr(wandb_logger, "_has_key", lambda: False)
    build_loggers(WANDB, tmp_path, {}, 0)
    monkeypatch.setattr(wandb_logger, "_has_key", lambda: True)
    with socket.socket() as silent:  # bound and not listening: it refuses
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        build_loggers(WANDB, tmp_path, {}, 0)
    assert modes == ["offline", "offline"]
    assert "127.0.0.1 cannot be reached" in capsys.readouterr().out


class Fake:
    def start(self, config):
        return True


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
