"""Starts the other processes of this machine, and says which of them has ended and how.

Lightning's own launcher kills the process that waits for the others, without a word, when one of them has failed.
"""

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from conf.stops import INTERRUPTED, PREEMPTED, ended_by

MEANT = (0, PREEMPTED, INTERRUPTED)  # the job as a whole has ended so: done, or stopped on request
PATIENCE = 15.0  # seconds in which processes end by themselves once one has failed


class Launcher(_SubprocessScriptLauncher):
    """As Lightning's, with another watch over the processes.

    Args:
        failed: called with number, status and how it ended in words, of the first process that has failed.
        inherited: arguments of Lightning's.
    """

    def __init__(self, failed: Callable[[int, int, str], None], *inherited: Any) -> None:
        super().__init__(*inherited)
        self._failed = failed

    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._observe, daemon=True, name="observer").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def end(self, patience: float = PATIENCE) -> None:
        """After a failure: waits for the processes, and ends those that do not end by themselves."""
        limit = time.monotonic() + patience
        for process in self.procs:
            try:
                process.wait(max(limit - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _observe(self) -> None:
        while True:
            codes = [process.poll() for process in self.procs]
            for number, code in enumerate(codes, 1):
                if code is not None and code not in MEANT:
                    return self._failed(number, code, ended_by(code))
            if None not in codes:
                return None
            time.sleep(0.5)
