"""The runs of a sweep side by side on one machine: each a process of its own, on GPUs of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from conf import values
from conf.errors import Failure, UserError
from conf.names import short
from conf.stops import ASKING, INTERRUPTED, PREEMPTED
from data.cores import usable_cores

# by which a task of SLURM is known: a run of the sweep is none, even if the sweep is
OF_A_TASK = tuple(f"SLURM_{name}" for name in ("PROCID", "LOCALID", "NODEID", "NTASKS", "NPROCS", "NTASKS_PER_NODE"))
LOOK = 0.1  # seconds between looks at the runs
PATIENCE = 60.0  # seconds in which runs save and end when this process cannot go on


@dataclass
class Child:
    """A run of the sweep: what it is, and its process once it has begun."""

    number: int
    config: DictConfig
    overrides: Sequence[str]
    process: subprocess.Popen | None = None
    said: IO[bytes] | None = None
    began: float = 0.0
    failed: str | None = None  # once it has ended: what it printed last, of one that failed

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.runtime.output_dir)

    def start(self, gpus: Sequence[str] | None, threads: int | None) -> None:
        """Begins it, with these GPUs and threads; None leaves what the environment says."""
        environment = {name: value for name, value in os.environ.items() if name not in OF_A_TASK}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.said, self.began = _file(Path(str(self.config.hydra.sweep.dir))), time.monotonic()
        command = [sys.executable, str(Path(sys.argv[0]).absolute()), *as_one_run(self.overrides, self.folder)]
        # a session of its own: signals of the terminal reach it through this process, and once
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self.said, stderr=self.said,
            start_new_session=True,
        )  # fmt: skip

    def end(self) -> None:
        """Notes how it ended, and gives its file back: a sweep may have more runs than a process files."""
        self.failed = self._sentence() if self.process.returncode else None
        self.said.close()

    def _sentence(self) -> str:
        """What it printed last: the error of a run that failed."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").rstrip().splitlines()
        program = f"{Path(sys.argv[0]).name}: "
        at = max((i for i, line in enumerate(lines) if line.startswith(program)), default=len(lines) - 1)
        return "\n".join(lines[at:]).removeprefix(program) or "it printed nothing"


def as_one_run(overrides: Sequence[str], folder: Path) -> list[str]:
    """The arguments by which a process computes one run of a sweep, even where its recipe says that it is a sweep."""
    return [*overrides, f"hydra.run.dir='{folder}'", "hydra.mode=RUN"]


def _file(folder: Path) -> IO[bytes]:
    """A file without a name for what a run prints; nowhere where there is no room for it."""
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return open(os.devnull, "rb+")


class SideBySide(Launcher):
    """See conf/hydra/launcher/local.yaml.

    Args:
        gpus: how many of this machine are shared out; None for all.
        per_run: GPUs of each run.
        jobs: runs at once; None for as many as have GPUs, or one.
    """

    def __init__(self, gpus: int | None = None, per_run: int = 1, jobs: int | None = None, **unknown: Any) -> None:
        self.gpus, self.per_run, self.jobs, self.unknown = gpus, per_run, jobs, unknown

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        if self.unknown:
            raise UserError(
                f"hydra.launcher: gpus, per_run and jobs can be set, got {next(iter(self.unknown))}; "
                "mend conf/local/launcher.yaml"
            )
        if self.gpus is not None:
            values.whole("hydra.launcher", "gpus", self.gpus, 0, fix="leave it out for all GPUs")
        if self.jobs is not None:
            values.whole("hydra.launcher", "jobs", self.jobs, fix="leave it out for one run per GPU")
        values.whole("hydra.launcher", "per_run", self.per_run, fix="leave it out for one GPU per run")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Computes the runs; one that fails does not end the others.

        Raises:
            SystemExit: on a signal, once all runs have saved; with the status of a run that was stopped.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        runs = [self._composed(initial_job_idx + i, overrides) for i, overrides in enumerate(job_overrides)]
        groups = shared_out(gpus_here(), self.gpus, self.per_run)
        at_once = self.jobs or max(1, len(groups))
        threads = max(1, usable_cores() // at_once) if not groups and at_once > 1 else None
        with _stopping(runs) as stopped:
            try:
                self._compute(runs, groups or [None], at_once, threads, stopped)
            except BaseException:
                _end(runs)
                raise
        if stopped:
            print("the runs that had begun have saved; the same command goes on with them", flush=True)
            raise SystemExit(INTERRUPTED if stopped[0] == signal.SIGINT else PREEMPTED)
        return [self._returned(run) for run in runs]

    def _composed(self, number: int, overrides: Sequence[str]) -> Child:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with read_write(config), open_dict(config), read_write(config.hydra.runtime):
            config.hydra.job.id = config.hydra.job.num = number
            HydraConfig.instance().set_config(config)
            folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
            config.hydra.runtime.output_dir = str(folder.absolute())
        return Child(number, config, overrides)

    def _compute(
        self,
        runs: list[Child],
        groups: list[Sequence[str] | None],
        at_once: int,
        threads: int | None,
        stopped: list[int],
    ) -> None:
        """Until all have ended, or those that had begun when a signal came."""
        waiting, running = deque(runs), dict.fromkeys(range(at_once))
        while any(running.values()) or (waiting and not stopped):
            for place, run in running.items():
                if run is not None and run.process.poll() is not None:
                    running[place] = None
                    run.end()
                    print(_ended(run), flush=True)
                if running[place] is None and waiting and not stopped:
                    run = running[place] = waiting.popleft()
                    HydraConfig.instance().set_config(run.config)
                    self.hydra_context.callbacks.on_job_start(config=run.config, task_function=self.task_function)
                    run.start(groups[place % len(groups)], threads)
            time.sleep(LOOK)

    def _returned(self, run: Child) -> JobReturn:
        returned = JobReturn(
            overrides=run.overrides, cfg=run.config, hydra_cfg=run.config, working_dir=str(run.folder),
            status=JobStatus.COMPLETED,
        )  # fmt: skip
        status = run.process.returncode
        returned.return_value = Failure(run.failed) if status else None
        if status:
            self.task_function.statuses.append(status if status > 0 else 1)
        HydraConfig.instance().set_config(run.config)
        self.hydra_context.callbacks.on_job_end(config=run.config, job_return=returned)
        return returned


def gpus_here() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; asked of the kernel's driver."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word for word in visible.replace(" ", "").split(",") if word not in ("", "-1")]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def shared_out(found: list[str], wanted: int | None, per_run: int) -> list[list[str]]:
    """GPUs in groups of `per_run`; none where there are none.

    Raises:
        UserError: fewer than are wanted, or than one run needs.
    """
    if wanted is not None and wanted > len(found):
        raise UserError(f"hydra.launcher: gpus={wanted}, but this machine shows {len(found)}; give gpus={len(found)}")
    used = found if wanted is None else found[:wanted]
    if used and len(used) < per_run:
        raise UserError(f"hydra.launcher: per_run={per_run}, but there are {len(used)} GPUs; give per_run={len(used)}")
    return [used[first : first + per_run] for first in range(0, len(used) - per_run + 1, per_run)]


def _ended(run: Child) -> str:
    status, seconds = run.process.returncode, time.monotonic() - run.began
    how = {0: "done", PREEMPTED: "stopped", INTERRUPTED: "stopped"}.get(status, f"failed with status {status}")
    return f"run {run.number + 1} {how} after {seconds:.0f} s: {short(run.folder)}"


def _end(runs: Sequence[Child]) -> None:
    """Has those that go on save and end, and kills those that do not."""
    running = [run.process for run in runs if run.process is not None and run.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    limit = time.monotonic() + PATIENCE
    for process in running:
        try:
            process.wait(max(limit - time.monotonic(), LOOK))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _stopping(runs: Sequence[Child]) -> Iterator[list[int]]:
    """Gives every signal to the runs that go on; the numbers of those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        for run in runs:
            if run.process is not None and run.process.poll() is None:
                run.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (*ASKING, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
