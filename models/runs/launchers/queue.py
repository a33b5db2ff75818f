"""SLURM's queue, asked by its own commands."""

import subprocess

from conf.errors import UserError

SECONDS = 60  # a busy controller takes its time


def state(job: str) -> str | None:
    """PENDING, RUNNING, COMPLETING …; None for a job that is no longer in the queue.

    Raises:
        UserError: the queue cannot be asked.
    """
    done = _asked("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    if done.returncode == 0:
        return next(iter(done.stdout.split()), None)
    if "Invalid job id" in done.stderr:
        return None
    raise UserError(f"slurm: the queue does not say what became of job {job}, got {_said(done)!r}; try again later")


def requeue(job: str) -> None:
    """Puts a running job into the queue again.

    Raises:
        UserError: SLURM refuses, as where the partition does not allow it.
    """
    done = _asked("scontrol", "requeue", job)
    if done.returncode:
        raise UserError(
            f"slurm: job {job} has saved but is not put into the queue again, got {_said(done)!r}; "
            "start the same command again"
        )


def _asked(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what it printed."""
    return next(reversed((done.stderr.strip() or done.stdout.strip()).splitlines()), f"status {done.returncode}")
