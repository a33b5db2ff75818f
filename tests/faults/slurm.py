"""A SLURM of one machine: sbatch, srun, squeue, scontrol and scancel that run a job script in local processes.

As the real one it signals all processes of a job's steps and not its script, keeps a job that was asked to be queued
again, and forgets one that has ended. What a test starts ends with it:

    with cluster(tmp_path / "slurm") as variables:      # PATH and where the jobs are
        subprocess.run([...], env=os.environ | variables)
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
FIRST = 4711  # number of the first job


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The variables with which the commands are found; whatever still runs at the end is killed."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name in COMMANDS:
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} {name} "$@"\n')
        (commands / name).chmod(0o755)
    try:
        yield {"PATH": f"{commands}:{os.environ['PATH']}", "LOCAL_SLURM": str(folder)}
    finally:
        for path in sorted(folder.glob("*/*.pid")):  # the daemon of a job first
            with contextlib.suppress(OSError, ValueError):
                number = int(path.read_text())
                if f"LOCAL_SLURM={folder}".encode() in Path(f"/proc/{number}/environ").read_bytes():  # it is still ours
                    os.killpg(number, signal.SIGKILL)


def wait_for(folder: Path, job: str, wanted: str, timeout: float = 240) -> None:
    """Until a job has this state.

    Raises:
        AssertionError: it took too long; the message has what the job has printed.
    """
    end = time.monotonic() + timeout
    while (found := (folder / job / "state").read_text()) != wanted:
        assert time.monotonic() < end, f"job {job} is {found}, not {wanted}"
        time.sleep(0.1)


def sbatch(words: list[str]) -> int:
    path = Path(next(word for word in words if not word.startswith("-")))
    text = path.read_text()
    options = dict(re.findall(r"--([\w-]+)(?:=(\S+))?", " ".join(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))))
    if shlex.split(options.get("partition", ""))[:1] == ["none"]:
        print("sbatch: error: invalid partition specified: none", file=sys.stderr)
        return 1
    folder = _root()
    number = str(FIRST + len([child for child in folder.iterdir() if child.name.isdigit()]))
    job = folder / number
    job.mkdir()
    (job / "script").write_text(text)
    (job / "options").write_text(json.dumps(options))
    (job / "state").write_text("PENDING")
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, "execute", number],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    (job / "execute.pid").write_text(str(process.pid))
    print(f"Submitted batch job {number}")
    return 0


def execute(words: list[str]) -> int:
    """The daemon of one job: its script, again while somebody asks for it."""
    job = _root() / words[0]
    options = json.loads((job / "options").read_text())
    nodes, tasks = int(options.get("nodes") or 1), int(options.get("ntasks-per-node") or options.get("ntasks") or 1)
    variables = {
        **{"SLURM_JOB_ID": job.name, "SLURM_JOB_NAME": options.get("job-name", "script"), "SLURM_NNODES": str(nodes)},
        **{"SLURM_NTASKS": str(nodes * tasks), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_JOB_NUM_NODES": str(nodes)},
        **{"SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost", "SLURM_SUBMIT_DIR": os.getcwd()},
    }
    output = options.get("output", "slurm-%j.out").replace("%j", job.name)
    for start in range(5):
        restarted = {"SLURM_RESTART_COUNT": str(start)} if start else {}
        _set(job, "RUNNING")
        with open(output, "ab") as said:
            script = subprocess.Popen(
                ["bash", str(job / "script")], env=os.environ | variables | restarted,
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
            (job / "script.pid").write_text(str(script.pid))
            status = script.wait()
        (job / f"status-{start}").write_text(str(status))
        if not (job / "again").exists():
            break
        (job / "again").unlink()
        _set(job, "PENDING")
    _set(job, "CANCELLED" if (job / "cancelled").exists() else "FAILED" if status else "COMPLETED")
    return 0


def srun(words: list[str]) -> int:
    """Every task in a process group of its own, which gets the signals of the job."""
    options: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).lstrip("-").partition("=")
        options[name] = value or (words.pop(0) if name in ("output", "error") else "")
    job, tasks = _root() / os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NTASKS"])
    running = []
    for rank in range(tasks):
        streams = {"stdout": options.get("output"), "stderr": options.get("error", options.get("output"))}
        named = {key: name.replace("%j", job.name).replace("%t", str(rank)) for key, name in streams.items() if name}
        opened = {key: open(name, "ab") for key, name in named.items()}  # noqa: SIM115
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
        task = subprocess.Popen(words, env=os.environ | place, start_new_session=True, **opened)
        (job / f"task-{rank}.pid").write_text(str(task.pid))
        running.append(task)
    return max(abs(task.wait()) for task in running)


def squeue(words: list[str]) -> int:
    number = next(word.partition("=")[2] for word in words if word.startswith("--jobs"))
    state = _root() / number / "state"
    if not state.exists() or state.read_text() in ("COMPLETED", "FAILED", "CANCELLED"):
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    print("COMPLETING" if (state.parent / "cancelled").exists() else state.read_text())
    return 0


def scontrol(words: list[str]) -> int:
    """`scontrol requeue`: ends what runs, which is started again."""
    job = _root() / words[1]
    (job / "again").touch()
    with (job / "requeued").open("a") as file:
        file.write("asked\n")
    _signal(job, "TERM")
    return 0


def scancel(words: list[str]) -> int:
    number = next(word for word in words if word.isdigit())
    asked = next((word.partition("=")[2] for word in words if word.startswith("--signal")), None)
    job = _root() / number
    if asked is None:
        (job / "cancelled").touch()
        _signal(job, "TERM", "script")
    _signal(job, asked or "TERM")
    return 0


def _signal(job: Path, name: str, which: str = "task-*") -> None:
    for path in job.glob(f"{which}.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), getattr(signal, f"SIG{name.removeprefix('SIG')}"))


def _set(job: Path, state: str) -> None:
    (job / "state.new").write_text(state)
    (job / "state.new").rename(job / "state")


def _root() -> Path:
    return Path(os.environ["LOCAL_SLURM"])


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
