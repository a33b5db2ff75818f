"""A run as a job of SLURM: submitted where it would begin, and not twice."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf import extras, values
from conf.errors import Failure, UserError
from conf.files import put
from conf.names import short
from models.runs.launchers import job, queue
from models.runs.launchers.local import as_one_run

FOLDER = "slurm"  # in the folder of the run: SLURM's script and logs, and which job it is
WORDS = ("partition", "account", "qos", "constraint", "mem")
WHO = "hydra.launcher"
ROOT = Path(__file__).parents[3]


def send(cfg: DictConfig) -> Failure | None:
    """Submits the run that `cfg` describes, unless it is queued, running or finished.

    Returns:
        None for a finished run, else what becomes of it: for the table of a sweep.

    Raises:
        UserError: there is no SLURM here, a setting is wrong, or SLURM refuses the job.
    """
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    arguments = as_one_run(hydra.overrides.task, run_dir)
    if not any(argument.lstrip("+").startswith("run.name=") for argument in arguments):
        arguments.append(f"run.name='{cfg.run.name}'")
    if finished(run_dir, cfg.trainer):
        print(f"{short(run_dir)} has finished; raise trainer.max_epochs to go on, or give another run.name")
        return None
    options = asked_for(OmegaConf.to_container(hydra.launcher, resolve=True), OmegaConf.to_container(cfg.trainer))
    check_here()
    known, before = submitted(run_dir)
    if known and (state := queue.state(known)):
        print(f"{short(run_dir)} is job {known}, {state.lower()}: nothing is submitted")
        return Failure(f"job {known}, {state.lower()}")
    again = before == arguments
    if cfg.resume is None and not again and any(run_dir.glob("checkpoints/step-*")):
        raise UserError(  # as the job would, hours later
            f"{WHO}: {short(run_dir)} holds checkpoints of an earlier start, got resume=null; "
            "give resume=auto to continue it, or another run.name"
        )
    number = submit(run_dir, cfg.run.name, options, arguments, again)
    print(_how_to_watch(number, run_dir), flush=True)
    return Failure(f"job {number}, submitted")


def asked_for(given: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """The options of submitit's executor.

    Args:
        given: `hydra.launcher`.
        trainer: says how many processes there are where `given` does not, unless it takes them from the job.

    Raises:
        UserError: a value is wrong, or the two contradict each other.
    """
    _check(given)
    on_cpu = str(trainer.get("accelerator")) == "cpu"
    devices, num_nodes = (trainer.get(key) if values.is_whole(trainer.get(key)) else None for key in _COUNTS)
    gpus = given["gpus_per_node"]
    if gpus is None:
        gpus = 0 if on_cpu else given["tasks_per_node"] or devices or 1
    tasks = given["tasks_per_node"] or gpus or devices or 1
    nodes = given["nodes"] or num_nodes or 1
    for name, has, needs in (("devices", devices, tasks), ("num_nodes", num_nodes, nodes)):
        if has is not None and has != needs:
            raise UserError(
                f"{WHO}: the job has {nodes} node(s) with {tasks} process(es) each, got trainer.{name}={has}; "
                "add trainer=slurm, which takes both from the job"
            )
    options = {name: given[name] for name in WORDS if given[name] is not None}
    options |= {"nodes": nodes, "ntasks_per_node": tasks, "cpus_per_task": given["cpus_per_task"]}
    options |= {"gpus_per_node": gpus} if gpus else {}
    options |= {"time": round(60 * given["hours"]), "signal_delay_s": given["signal"]}
    path = f'export PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"'
    return options | {
        "setup": [path, *given["setup"]],
        "additional_parameters": {"requeue": True, **given["more"]},
    }


_COUNTS = ("devices", "num_nodes")


def _check(given: dict[str, Any]) -> None:
    known = {*WORDS, "nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "hours", "signal", "setup", "more"}
    for name in given.keys() - known - {"_target_"}:
        raise UserError(f"{WHO}: it has no {name}; of sbatch's options give more: {{{name}: ...}}")
    for name in WORDS:
        if given[name] is not None and not re.fullmatch(r"[^\s\x00-\x1f]+", str(given[name])):
            values.refuse(WHO, name, "one word", given[name], f"set {WHO}.{name}")
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1)):
        if given[name] is not None:
            values.whole(WHO, name, given[name], least, fix="leave it out to follow the trainer")
    values.whole(WHO, "cpus_per_task", given["cpus_per_task"], fix="give the cores of one process")
    values.number(WHO, "hours", given["hours"], 1 / 60, fix="give the hours until the job is ended")
    values.whole(WHO, "signal", given["signal"], 1, fix="give the seconds that a step and a checkpoint take")
    if given["signal"] >= 3600 * given["hours"]:
        values.refuse(WHO, "signal", "shorter than the job", given["signal"], f"raise {WHO}.hours")
    if not isinstance(given["setup"], list) or not all(isinstance(line, str) for line in given["setup"]):
        values.refuse(WHO, "setup", "a list of lines", given["setup"], "write setup: ['module load cuda']")
    if not isinstance(given["more"], dict):
        values.refuse(WHO, "more", "options with their values", given["more"], "write more: {exclude: node7}")


def check_here() -> None:
    """Refuses where no job can be submitted.

    Raises:
        UserError: a command of SLURM or the package submitit is missing.
    """
    absent = [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]
    if absent:
        raise UserError(
            f"hydra/launcher: slurm needs the commands of SLURM, got no {', '.join(absent)}; "
            "run it where jobs are submitted, or give hydra/launcher=local"
        )
    if find_spec("submitit") is None:
        raise UserError(extras.sentence("hydra/launcher=slurm", "submitit"))


def finished(run_dir: Path, trainer: DictConfig) -> bool:
    """Whether the run in this folder has come to its end, as far as its metrics.json says."""
    try:
        figures = json.loads((run_dir / "metrics.json").read_text())
        epochs, steps = figures["epochs"], figures["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    most_epochs, most_steps = trainer.get("max_epochs"), trainer.get("max_steps")
    return (values.is_whole(most_epochs) and epochs >= most_epochs) or (
        values.is_whole(most_steps) and steps >= most_steps
    )


def submitted(run_dir: Path) -> tuple[str | None, list[str] | None]:
    """The job that this run was given before, and its arguments."""
    try:
        known = json.loads((run_dir / FOLDER / "job.json").read_text())
        return str(known["job"]), known.get("arguments")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


def submit(run_dir: Path, name: str, options: dict[str, Any], arguments: list[str], again: bool = False) -> str:
    """The number of the new job; its script and logs are in the folder of the run.

    Args:
        run_dir: the folder of the run.
        name: of the job.
        options: of submitit's executor.
        arguments: of the program.
        again: this command was submitted before: the run goes on, wherever it began.

    Raises:
        UserError: SLURM refuses it.
    """
    import submitit

    folder = run_dir / FOLDER
    new = not folder.exists()
    executor = submitit.SlurmExecutor(folder=folder)
    executor.update_parameters(job_name=str(name), **options)
    try:
        given = job.going_on(arguments) if again else arguments
        sent = executor.submit(job.run, str(Path(sys.argv[0]).absolute()), given)
    except submitit.core.utils.FailedJobError as error:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        said = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"hydra/launcher: SLURM refuses the job, got {said[-1]!r}; see hydra.launcher") from None
    put(folder / "job.json", json.dumps({"job": sent.job_id, "arguments": arguments}) + "\n")
    return sent.job_id


def _how_to_watch(number: str, run_dir: Path) -> str:
    logs = short(run_dir / FOLDER)
    return "\n".join(
        [
            f"job {number}: everything goes to {short(run_dir)}",
            f"  watch: squeue -j {number}; tail -F {logs}/{number}_0_log.out (errors: {number}_0_log.err)",
            f"  save and queue again: scancel --signal=USR2 {number}     end: scancel {number}",
        ]
    )
