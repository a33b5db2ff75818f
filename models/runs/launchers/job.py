"""What a job of SLURM runs: a program in this process; one that was stopped is put into the queue again."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from conf.errors import UserError
from conf.stops import PREEMPTED
from models.runs.launchers.queue import requeue, state

FRUITLESS = 3  # starts without a new checkpoint, as where the time is too short for one step
AHEAD = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def run(program: str, arguments: list[str]) -> None:
    """Runs `program` with these arguments, as `python program arguments` would.

    Raises:
        SystemExit: it ended with a status; SLURM shows the job as failed.
    """
    for number in AHEAD:  # until the run has handlers of its own: there is nothing to be saved yet
        signal.signal(number, _leave)
    steps = _steps(arguments)
    if steps and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":  # its own: else this start would be refused
        arguments = going_on(arguments)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).parent))
    try:
        runpy.run_path(program, run_name="__main__")
        status: Any = 0
    except SystemExit as end:
        status = end.code or 0
    if status == PREEMPTED and os.environ.get("SLURM_PROCID", "0") == "0":
        _again(os.environ["SLURM_JOB_ID"], advanced=_steps(arguments) != steps)
    if status:
        sys.stdout.flush()
        raise SystemExit(status)


def going_on(arguments: list[str]) -> list[str]:
    """With `resume=auto`, whatever they said."""
    return [*(word for word in arguments if word.lstrip("+").partition("=")[0] != "resume"), "resume=auto"]


def _again(job: str, advanced: bool) -> None:
    """Asks SLURM to start the job once more, unless somebody has cancelled it, or it comes no further."""
    if not advanced and int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= FRUITLESS:
        print(f"job {job} has not come one checkpoint further: it is not put into the queue again", flush=True)
        return
    for number in AHEAD:  # SLURM ends a job that it puts into the queue
        signal.signal(number, signal.SIG_IGN)
    try:
        found = state(job)
    except UserError:  # the controller is busy: rather once too often than a run that is forgotten
        found = "RUNNING"
    if found != "RUNNING":
        print(f"job {job} is {found or 'gone'}: it is not put into the queue again", flush=True)
        return
    try:
        requeue(job)
    except UserError as error:
        print(error, flush=True)
    else:
        print(f"job {job} is put into the queue again, and continues there", flush=True)


def _steps(arguments: list[str]) -> list[str]:
    """The checkpoints in the folder of the run."""
    given = next(word for word in arguments if word.startswith("hydra.run.dir="))
    folder = Path(given.partition("=")[2].strip("'"), "checkpoints")
    return sorted(path.name for path in folder.glob("step-*"))


def _leave(number: int, frame: Any) -> NoReturn:
    raise SystemExit(PREEMPTED)
