"""When signals to a process that hangs end it, by the clock; and what a handler does where nobody looks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from models.callbacks.preemption import Preemption
from models.callbacks.signals import ECHO, GRACE, ONCE, PATIENCE, Requests, Stopped, listening, requests

ROOT = Path(__file__).parents[3]
TERM, USR1, INT, XCPU = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGXCPU


def told(*signals):
    found = Requests()
    for number, when in signals:
        found._count(number, when)
    return found


@pytest.mark.parametrize(
    ("signals", "ends"),
    [
        ([], None),
        ([(TERM, 1)], 1 + GRACE),
        ([(TERM, 1), (TERM, 1 + ONCE / 2)], 1 + GRACE),  # as one: torchrun sends another to each process of a group
        ([(TERM, 1), (TERM, 6)], 6 + PATIENCE),
        ([(USR1, 1), (TERM, 6)], 6 + PATIENCE),
        ([(INT, 1), (INT, 1.5)], 1.5 + PATIENCE),
        ([(INT, 1), (INT, 1 + ECHO / 2)], 1 + GRACE),
        ([(XCPU, 1), (XCPU, 2), (XCPU, 9)], 1 + GRACE),  # the kernel repeats it
    ],
)
def test_when_a_process_that_hangs_is_ended(signals, ends):
    found = told(*signals)
    if ends is None:
        assert not found._overdue(1e9)
    else:
        assert not found._overdue(ends - 0.1) and found._overdue(ends + 0.1)


def test_a_second_signal_waits_for_a_save_and_one_for_batches_that_go_on():
    found = told((TERM, 1), (TERM, 6))
    found.saving = True
    assert not found._overdue(6 + 2 * PATIENCE) and found._overdue(1 + GRACE + 1)
    found = told((TERM, 1))
    found.alive = 200.0
    assert not found._overdue(GRACE + 2) and found._overdue(200 + GRACE + 1)


@pytest.mark.parametrize(("number", "status"), [(TERM, 75), (signal.SIGHUP, 75), (INT, 130)])
def test_where_nobody_looks_a_signal_ends_the_run_at_once(capsys, number, status):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    handlers = [signal.getsignal(known) for known in Preemption.SIGNALS]
    try:
        with pytest.raises(SystemExit) as ended, listening() as found:
            assert requests() is found
            os.kill(os.getpid(), number)
            raise AssertionError("not reached")
        assert ended.value.code == status
        assert f"stopped by {signal.Signals(number).name}; to go on" in capsys.readouterr().err
        assert [signal.getsignal(known) for known in Preemption.SIGNALS] == handlers and requests() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_ends_itself_waits_for_no_terminal():
    """Its standard error is a pipe that is full and that nobody reads."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writes, b" " * 65536)
    os.set_blocking(writes, True)
    code = "import sys; from conf.stops import leave; leave('stopped', 75, sys.stderr)"
    assert subprocess.run([sys.executable, "-c", code], stderr=writes, cwd=ROOT, timeout=30).returncode == 75
    os.close(reads), os.close(writes)


def test_where_somebody_looks_it_is_noted():
    with listening() as found:
        found.looked_at = True
        os.kill(os.getpid(), TERM)
        os.kill(os.getpid(), USR1)
        assert found.number == TERM and found.status == 75
    assert not isinstance(Stopped(75, ""), Exception)  # or guards against failures would swallow it


def test_what_a_signal_to_the_job_breaks_is_no_failure_of_the_run(capsys):
    with pytest.raises(SystemExit) as ended, listening() as found:
        found.looked_at = True
        os.kill(os.getpid(), TERM)
        raise RuntimeError("a compiler was killed\nwith details")
    assert ended.value.code == 75
    assert "stopped by SIGTERM, and then RuntimeError: a compiler was killed; the last" in capsys.readouterr().err
    with pytest.raises(UserError), listening() as found:
        found.looked_at = True
        os.kill(os.getpid(), TERM)
        raise UserError("a setting")
    with pytest.raises(RuntimeError), listening():
        raise RuntimeError("without a signal")


@pytest.mark.parametrize("grace", [0, -1, "long", True, float("nan")])
def test_grace_is_checked(grace):
    with pytest.raises(ValueError, match="Preemption: grace must be a number of seconds above 0, got"):
        Preemption(grace)
