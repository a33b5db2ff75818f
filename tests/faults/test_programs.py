"""The processes that the tests of faults use are those of the command line."""

import os
import signal

from tests.faults import table
from tests.faults.programs import TINY, digests, run, start


def test_a_program_runs_and_gives_its_status(tmp_path):
    status, text = run(tmp_path, "run.name=a", *TINY, "trainer.max_epochs=1")
    assert status == 0, text
    assert set(digests(tmp_path / "outputs/a")) == {"model.safetensors", "ema.safetensors", "trainer.safetensors"}
    status, text = run(tmp_path, "model=nothing")
    assert status == 2 and text.startswith("train.py: ")


def test_a_program_takes_signals_and_patches(tmp_path):
    sleeping = start(tmp_path, before="import time; print('asleep'); time.sleep(100)")
    sleeping.wait_for("asleep")
    assert os.getpgid(sleeping.pid) == sleeping.pid
    sleeping.send(signal.SIGKILL, group=True)
    assert sleeping.wait() == -signal.SIGKILL


def test_every_case_has_a_test_and_the_page_is_current():
    assert not [number for number, tests in table.counts().items() if tests == 0]
    assert table.PAGE.read_text() == table.page(), "run: python tests/faults/table.py"
