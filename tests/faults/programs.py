"""Real processes of train.py and eval.py, cheaply: forked from a process that has imported everything (`server.py`).

A child is in a session of its own, so a signal can be sent to it or to its whole process group, as a scheduler does.
What it starts itself (loader processes, further ranks) are ordinary processes.

    program = start(tmp_path, "run.name=a", *TINY)
    program.wait_for("epoch 1/3")
    program.send(signal.SIGTERM, group=True)
    assert program.wait() == 75
"""

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAIT = 240  # seconds, on a machine that does other things too
# 8 steps per epoch, 3 epochs, 4 batches of validation, a model of 0.01 M parameters
TINY = (
    *("model=vit_32px", "model.dim=16", "model.depth=2", "model.num_heads=2", "model.patch_size=8"),
    *("data=fake", "data.num_classes=4", "data.source.train_images=128", "data.source.val_images=64"),
    *("trainer.accelerator=cpu", "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "logger=none"),
)
ENVIRONMENT = {
    **{"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    **{"VISION_ZOO_RUN_NAME": None, "TRITON_INTERPRET": None, "PYTHONUNBUFFERED": "1"},
}


class Program:
    """A program that runs, or has ended."""

    def __init__(self, pid: int, output: Path, status: Path) -> None:
        self.pid, self._output, self._status = pid, output, status

    @property
    def text(self) -> str:
        """Everything printed so far, output and errors."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    @property
    def ended(self) -> bool:
        return self._status.exists()

    def wait(self, timeout: float = WAIT) -> int:
        """The exit status; negative for the signal that ended it.

        Raises:
            AssertionError: it still runs after so many seconds; it is killed.
        """
        if not _until(lambda: self.ended, timeout):
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.text[-3000:]}")
        return int(self._status.read_text())

    def wait_for(self, text: str, timeout: float = WAIT) -> None:
        """Until it has printed this.

        Raises:
            AssertionError: it ended first, or it took too long.
        """
        _until(lambda: text in self.text or self.ended, timeout)
        assert text in self.text, f"{text!r} was not printed:\n{self.text[-3000:]}"

    def send(self, number: int, group: bool = False) -> None:
        """A signal to the program, or to its process group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """Ends it and its process group at once."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        _until(lambda: self.ended, 30)


def start(
    folder: Path,
    *arguments: str,
    program: str = "train.py",
    env: dict[str, str | None] | None = None,
    before: str = "",
    pictures: bool = False,
) -> Program:
    """Starts a program with `folder` as its working directory.

    Args:
        folder: outputs/ is made in it.
        arguments: of the command line.
        program: train.py or eval.py.
        env: variables that are set, or with None removed.
        before: Python source that the process runs first: what makes the fault.
        pictures: draw curves and charts too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = len(list(folder.glob("*.output")))
    output, status = folder / f"{taken}.output", folder / f"{taken}.status"
    output.touch()
    request = {
        **{"program": program, "arguments": list(arguments), "folder": str(folder), "before": before},
        **{"pictures": pictures, "env": ENVIRONMENT | (env or {}), "output": str(output), "status": str(status)},
    }
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return Program(int(server.stdout.readline()), output, status)


def run(folder: Path, *arguments: str, timeout: float = WAIT, **options: object) -> tuple[int, str]:
    """The status of a program that has ended, and what it printed."""
    program = start(folder, *arguments, **options)
    return program.wait(timeout), program.text


def digests(run_folder: Path, pointer: str = "last") -> dict[str, str]:
    """SHA-256 of the files of weights and of the trainer's tensors of a checkpoint."""
    files = sorted((run_folder / "checkpoints" / pointer).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


_SERVERS: list[subprocess.Popen] = []


def _server() -> subprocess.Popen:
    """Of this test process, started when it is first needed."""
    if not _SERVERS:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {name: value for name, value in ENVIRONMENT.items() if value is not None}
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert server.stdout.readline() == "ready\n"
        _SERVERS.append(server)
        atexit.register(server.stdin.close)  # which ends it, and what it started
    return _SERVERS[0]


def _until(true: object, timeout: float) -> bool:
    end = time.monotonic() + timeout
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
