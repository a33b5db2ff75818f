"""What a benchmark ran on, and how long it may go on."""

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Date, device, driver and versions; the commit where the checkout has one."""
    gpu = torch.cuda.is_available()
    found = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }
    return {name: value for name, value in found.items() if value}


class Budget:
    """Seconds that may be spent; `spent()` is true afterwards. None for no limit."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock, self._start = seconds, clock, clock()

    def spent(self) -> bool:
        return self.seconds is not None and self._clock() - self._start >= self.seconds


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
