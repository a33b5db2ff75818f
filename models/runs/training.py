"""A training run from its composed configuration: check everything, build, fit, report."""

from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from conf.folders import escaped
from conf.names import short
from conf.settings import check_settings, resolved
from data.cores import usable_cores
from data.place import readers
from data.sources.split_file import take_split
from models.attention.backend import describe_backend
from models.callbacks.checkpoint import Checkpoints, saver_of
from models.callbacks.directory_io import DirectoryCheckpointIO, restoring
from models.callbacks.freezing import freezing
from models.callbacks.preemption import Preemption
from models.callbacks.progress import RunProgress, duration
from models.callbacks.signals import listening
from models.callbacks.throughput import Throughput, peak_memory
from models.checkpoints import read_config, read_manifest
from models.engines.sequence_parallel import share_tokens
from models.engines.strategies import engine
from models.engines.together import apart, together
from models.loggers import build_loggers
from models.runs import batch_size
from models.runs.ending import ending
from models.runs.facts import facts_of
from models.runs.headline import headline, title
from models.runs.identity import compare_configs, compare_data, usual_settings
from models.runs.initial import check_given, follow_weights, start_from
from models.runs.machine import check_accelerator, fit_precision, fit_threads
from models.runs.memory import explained
from models.runs.over import limit_of, out_of_time, reported_step, saved_figures
from models.runs.preflight import (
    check_data,
    check_monitor,
    lock_folder,
    part_of,
    quiet,
)
from models.runs.record import Record, RunLog, recorded
from models.runs.report import next_steps, print_table, write_json
from models.runs.resume import begins_again, find_resume, position_of
from models.side_outputs import attempt
from models.tasks.base import Task
from models.tasks.effective_batch import accumulate, go_on

# of the table at the end
SHOWN = (
    *("val/top1", "val/top1_ema", "val/top5", "val/map", "val/map_ema", "val/f1"),
    *("val/recognised", "val/recognised_ema", "val/recogniser_top1", "val/loss", "train/loss"),
)


class Run(NamedTuple):
    """A run before its first step; `step` is that of the checkpoint that it goes on from, `notes` end its headline."""

    trainer: pl.Trainer
    task: Task
    data: pl.LightningDataModule
    progress: RunProgress
    record: Record
    checkpoint: Path | None
    step: int
    notes: list[str]


def train(cfg: DictConfig) -> float | None:
    """Runs `cfg`; returns the best monitored value.

    Raises:
        UserError: something in the configuration or the data is wrong; nothing has been started.
    """
    quiet()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    left_open = cfg.trainer.get("precision") == "auto"
    precision = fit_precision(cfg)
    config = resolved(cfg)
    check_settings(config)
    check_accelerator(config["trainer"])
    with recorded() as log, listening() as asked, lock_folder(run_dir), apart(run_dir):
        with explained(config):
            run = _prepared(cfg, config, run_dir, log, left_open)
        run.notes.extend(precision if run.checkpoint is None else [])
        trainer = run.trainer
        if trainer.is_global_zero:
            print(escaped(headline(config, run.trainer, run.task, run.data, run_dir, run.notes), keep="\n"))
        told = reported_step(run_dir) == run.step
        if (saver := saver_of(trainer)) is not None:
            saver.unfinished = not told
        asked.unsaved = not any(isinstance(callback, Preemption) for callback in trainer.callbacks)
        with ending(trainer, run_dir, config), restoring(run.checkpoint), together(trainer, run_dir):
            trainer.fit(run.task, run.data, ckpt_path=run.checkpoint)
        asked.unsaved = False
        if not trainer.is_global_zero:
            return None
        limit = limit_of(trainer)
        if trainer.global_step == run.step and told and limit is not None:
            print(f"the run has finished at step {run.step}; raise {limit} to go on, or give another run.name")
            return None
        run.record.begin(run.step, run.data)  # of a run without a step
        best = _report(config, run, run_dir)
        if limit is None and config["trainer"].get("max_time") is not None:
            print(out_of_time(trainer, config["trainer"]["max_time"]))
        return best


def _prepared(cfg: DictConfig, config: dict[str, Any], run_dir: Path, log: RunLog, left_open: bool) -> Run:
    """Everything built and checked; `config` gets what only the parts know."""
    checkpoint = _resume(cfg, run_dir, config, left_open)
    if checkpoint is None:
        check_given(config)
    config["threads"], threads = fit_threads(cfg, read_config(checkpoint).get("threads") if checkpoint else None)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    task = part_of(cfg, "task")
    origin = _origin(config, task, checkpoint)
    auto = batch_size.begin(cfg, config, read_config(checkpoint) if checkpoint else None)
    data = part_of(cfg, "data")
    if checkpoint is not None:
        take_split(data.source, checkpoint.resolve().parents[1])
    check_data(data)
    if auto and checkpoint is None:
        batch_size.bound(config, data)
    check_monitor(config, task)
    task.prepare(data)
    if checkpoint is not None:
        position = position_of(checkpoint, config)
        compare_data(read_config(checkpoint), position, data, checkpoint.resolve().parents[1])
    config["classes"] = data.class_names
    step = read_manifest(checkpoint)["step"] if checkpoint else 0
    progress = RunProgress(Throughput(), usable_cores())
    record = Record(run_dir, log, cfg, config)
    frozen = freezing(config, task.model)
    trainer = _trainer(cfg, config, run_dir, [*frozen, progress.throughput, progress, record])
    spread = share_tokens(trainer.strategy, task, trainer.world_size)
    if checkpoint is None:
        origin += batch_size.settle(cfg, config, trainer, task, data) if auto else []
        accumulate(config, trainer, data)
    else:
        origin += go_on(config, read_config(checkpoint), position, trainer, data)
    attention = describe_backend(task.model, trainer.strategy.root_device)
    facts = facts_of(task.model, data)
    trainer.loggers = build_loggers(config["logger"], run_dir, config, step, facts, task.figures)
    notes = [*data.notes(), *data.warnings(readers(trainer)), *spread, attention, *threads, *origin, *map(str, frozen)]
    notes += begins_again(run_dir) if checkpoint is None and cfg.resume == "auto" else []
    return Run(trainer, task, data, progress, record, checkpoint, step, notes)


def _resume(cfg: DictConfig, run_dir: Path, config: dict[str, Any], left_open: bool) -> Path | None:
    """The checkpoint to go on from, which asks for the same; a precision that the command leaves open is its own."""
    checkpoint = find_resume(None if cfg.resume is None else str(cfg.resume), run_dir)
    follow_weights(cfg, config, checkpoint)
    if checkpoint is None:
        return None
    saved = read_config(checkpoint)
    if left_open and isinstance(saved.get("trainer"), dict) and saved["trainer"].get("precision") is not None:
        cfg.trainer.precision = config["trainer"]["precision"] = saved["trainer"]["precision"]
    compare_configs(saved, config, usual_settings(cfg), "data" in position_of(checkpoint, saved))
    return checkpoint


def _origin(config: dict[str, Any], task: pl.LightningModule, checkpoint: Path | None) -> list[str]:
    """Where the weights come from, in lines; those of `init` are loaded, unless the run continues."""
    given = config["init"]
    if checkpoint is not None:
        return [f"continues from {short(checkpoint)}{'; init is not used' if given is not None else ''}"]
    return [] if given is None else start_from(str(given), task.model, config)


def _trainer(cfg: DictConfig, config: dict[str, Any], run_dir: Path, own: list[Callback]) -> pl.Trainer:
    callbacks = [*filter(None, part_of(cfg, "callbacks").values()), *own]
    for callback in callbacks:
        if isinstance(callback, Checkpoints):
            callback.describe_run(run_dir, config)
    clocks = [callback.clock for callback in own if isinstance(callback, Throughput)]
    settings, spread = engine(cfg.trainer)
    return part_of(
        settings,
        "trainer",
        callbacks=callbacks,
        logger=False,
        profiler=cfg.trainer.get("profiler") or clocks[0],
        **spread | {"plugins": [DirectoryCheckpointIO(), *spread["plugins"]]},
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,
        enable_checkpointing=False,  # Lightning's own; `Checkpoints` takes its place
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _report(config: dict[str, Any], run: Run, run_dir: Path) -> float | None:
    """Writes metrics.json, prints the table at the end; returns the best monitored value."""
    trainer, task, progress = run.trainer, run.task, run.progress
    figures = saved_figures(trainer) if trainer.global_step == run.step else {}
    figures |= {name: float(value) for name, value in trainer.callback_metrics.items()} | task.final_figures
    figures |= {
        "images_per_second": progress.throughput.images_per_second or None,
        "data_wait": progress.throughput.data_wait,
        "peak_memory": peak_memory(task.device),
        "seconds": progress.seconds,
        **facts_of(task.model, trainer.datamodule),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
    }
    checkpoints = saver_of(trainer)
    best = checkpoints.best_score if checkpoints is not None else None
    if best is not None:
        figures[f"best/{checkpoints.monitor}"] = best
    attempt("metrics.json", write_json, run_dir / "metrics.json", figures)
    names = (*SHOWN, f"best/{config['checkpoint']['monitor']}")
    rows = {name: figures[name] for name in names if name in figures}
    rows |= {
        "parameters": figures["parameters"],
        "images/s": figures["images_per_second"],
        "time": duration(figures["seconds"]),
        "epochs, steps": f"{figures['epochs']}, {figures['steps']}",
    }
    for picture in ("curves.png", *task.pictures):
        if (run_dir / picture).exists():
            rows[picture.removesuffix(".png")] = short(run_dir / picture)
    print_table(title(config), rows)
    print("\n".join(next_steps(run_dir, config)))
    return best
