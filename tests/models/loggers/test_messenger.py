"""A process beside the run is never waited for, but at the end, for a limited time."""

import os
import time
from pathlib import Path

import pytest

from models.loggers import messenger
from models.loggers.messenger import Messenger

pytestmark = pytest.mark.case(46)


def program(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "program.py"
    path.write_text(f"import json, os, signal, subprocess, sys, time\n{text}\n")
    return path


def test_it_is_told_and_heard(tmp_path):
    echo = "print('noise', flush=True)\nfor line in sys.stdin:\n    print(json.dumps({'told': json.loads(line)}))"
    other = Messenger(program(tmp_path, echo))
    other.tell(("log", {"loss": 0.5, "path": Path("x")}))
    other.tell("finish")
    assert other.close(60)
    assert [event["told"] for event in other.heard()] == [["log", {"loss": 0.5, "path": "x"}], "finish"]


def test_one_that_does_not_listen_costs_nothing(tmp_path, monkeypatch):
    deaf = Messenger(program(tmp_path, "time.sleep(600)"))
    start = time.process_time()
    for _ in range(200):
        deaf.tell("x" * 1000)  # more than a pipe holds
    assert not deaf.lost and time.process_time() - start < 1
    monkeypatch.setattr(messenger, "LIMIT", 10)
    deaf.tell("x" * 1000)
    assert deaf.lost and not deaf.close(0.1)
    deaf.tell("to nobody")


def test_one_that_dies_is_noticed(tmp_path):
    dead = Messenger(program(tmp_path, "os._exit(3)"))
    while not dead.lost:
        dead.tell("x" * 1000)
    assert dead.close(60) and dead.heard() == []


def test_one_that_hangs_is_ended_with_what_it_started(tmp_path):
    hangs = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
print(json.dumps({'child': child.pid}), flush=True)
time.sleep(600)"""
    hanging, found = Messenger(program(tmp_path, hangs)), []
    while not found:
        found = hanging.heard()
        time.sleep(0.02)
    assert not hanging.close(0.1)
    child = found[0]["child"]
    while Path(f"/proc/{child}/stat").exists():  # until the system has taken it away
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.02)
    with pytest.raises(ProcessLookupError):
        os.kill(hanging._process.pid, 0)


def test_a_loader_process_is_not_the_run(tmp_path, monkeypatch):
    echo = Messenger(program(tmp_path, "for line in sys.stdin:\n    print(line, end='')"))
    monkeypatch.setattr(messenger.os, "getpid", lambda: -1)
    echo.tell({"from": "a worker"})
    assert not echo.close(60) and echo.heard() == []
    monkeypatch.undo()
    assert echo.close(60) and echo.heard() == []
