"""What a run was computed with: command, code, packages, machine and devices, as plain data."""

import os
import platform
import shlex
import socket
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from conf.revision import revision


def environment() -> dict[str, Any]:
    """The content of env.json. Environment variables are left out: they may hold keys."""
    code = revision()
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "directory": os.getcwd(),
        "commit": code.commit,
        "changed": bool(code.patch),
        "untracked": code.untracked[:50],
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "process": os.getpid(),
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "devices": devices(),
        "driver": _driver(),
        "packages": packages(),
    }


@cache
def packages() -> dict[str, str]:
    """Every installed distribution and its version, by name; read once, as the runs of a sweep share a process."""
    found = {item.metadata["Name"]: item.version for item in distributions() if item.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def devices() -> list[dict[str, Any]]:
    """The GPUs that this process sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"{facts.major}.{facts.minor}"
        found.append({"name": facts.name, "capability": capability, "memory": facts.total_memory})
    return found


def _driver() -> str | None:
    """The release of NVIDIA's kernel driver, as the kernel names it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
