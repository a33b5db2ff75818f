"""Ahead-of-time compilation: what it records, what it prints, and that the kernels fit on the chips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parents[2]


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "kernels.compile", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", kernels.OPERATIONS)
def test_kernels_compile_and_fit(module):
    """For sm_80 and sm_90, without spilled registers and within 99 KB of shared memory."""
    done = compiled(module, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) >= 4 and {row.split()[2] for row in rows} == {"sm_80", "sm_90"}


def test_wrong_names_are_one_error():
    done = compiled("no_such_operation")
    assert (
        done.returncode == 2 and "no operation is called no_such_operation; choose from agent_attention" in done.stderr
    )
    done = compiled("--target", "h200")
    assert done.returncode == 2 and "--target must be like sm_90, got h200" in done.stderr
