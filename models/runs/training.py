"""A training run from its composed configuration: check everything, build, fit, report."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from conf.errors import RunFailed, UserError
from conf.names import PARTS, PLACES, short
from conf.settings import check_settings, resolved
from data.cores import usable_cores
from data.sources.split_file import take_split
from models.attention.backend import describe_backend
from models.callbacks.checkpoint import Checkpoints, DirectoryCheckpointIO
from models.callbacks.freezing import freezing
from models.callbacks.guard import NonFinite
from models.callbacks.preemption import Stopped
from models.callbacks.progress import RunProgress, duration
from models.callbacks.throughput import Throughput, peak_memory
from models.checkpoints import read_config, read_manifest
from models.loggers import build_loggers
from models.loggers.weights_and_biases import SafeWandb, log_picture
from models.runs.curves import draw_curves
from models.runs.facts import facts_of
from models.runs.initial import check_given, follow_weights, start_from
from models.runs.machine import check_accelerator, fit_precision, fit_threads
from models.runs.preflight import (
    check_data,
    check_monitor,
    lock_folder,
    part_of,
    quiet,
)
from models.runs.record import Record, RunLog, recorded
from models.runs.report import next_steps, print_table, write_json
from models.runs.resume import compare_configs, find_resume
from models.tasks.base import Task
from models.tasks.effective_batch import accumulate, check_resumed
from models.tasks.effective_batch import describe as describe_batch


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
    precision = fit_precision(cfg)
    config = resolved(cfg)
    check_settings(config)
    check_accelerator(config["trainer"])
    with lock_folder(run_dir), recorded() as log:
        run = _prepared(cfg, config, run_dir, log)
        run.notes.extend(precision)
        trainer = run.trainer
        if trainer.is_global_zero:
            print(_headline(config, run, run_dir))
        with _ending(trainer, run_dir, config):
            trainer.fit(run.task, run.data, ckpt_path=run.checkpoint)
        if not trainer.is_global_zero:
            return None
        if trainer.global_step == run.step and (run_dir / "metrics.json").exists():
            print(
                f"the run has finished at step {run.step}; raise trainer.max_epochs to go on, or give another run.name"
            )
            return None
        run.record.begin(run.step, run.data)  # of a run without a step
        return _report(trainer, config, run.task, run_dir, run.progress)


def _prepared(cfg: DictConfig, config: dict[str, Any], run_dir: Path, log: RunLog) -> Run:
    """Everything built and checked; `config` gets what only the parts know."""
    checkpoint = _resume(cfg, run_dir, config)
    if checkpoint is None:
        check_given(config)
    config["threads"], threads = fit_threads(cfg, read_config(checkpoint).get("threads") if checkpoint else None)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    task = part_of(cfg, "task")
    origin = _origin(config, task, checkpoint)
    data = part_of(cfg, "data")
    if checkpoint is not None:
        take_split(data.source, checkpoint.resolve().parents[1])
    check_data(data)
    check_monitor(config, task)
    task.prepare(data)
    config["classes"] = data.class_names
    step = read_manifest(checkpoint)["step"] if checkpoint else 0
    progress = RunProgress(Throughput(), usable_cores())
    record = Record(run_dir, log, cfg, config)
    frozen = freezing(config, task.model)
    trainer = _trainer(cfg, config, run_dir, [*frozen, progress.throughput, progress, record])
    accumulate(config, trainer, data)
    if checkpoint is not None:
        check_resumed(read_config(checkpoint), trainer)
    attention = describe_backend(task.model, trainer.strategy.root_device)
    facts = facts_of(task.model, data)
    trainer.loggers = build_loggers(config["logger"], run_dir, config, step, facts, task.figures)
    notes = [*data.notes(), *data.warnings(trainer.world_size), attention, *threads, *origin, *map(str, frozen)]
    return Run(trainer, task, data, progress, record, checkpoint, step, notes)


def _resume(cfg: DictConfig, run_dir: Path, config: dict[str, Any]) -> Path | None:
    checkpoint = find_resume(None if cfg.resume is None else str(cfg.resume), run_dir)
    follow_weights(cfg, config, checkpoint)
    if checkpoint is not None:
        compare_configs(read_config(checkpoint), config)
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
    return part_of(
        cfg,
        "trainer",
        callbacks=callbacks,
        logger=False,
        profiler=cfg.trainer.get("profiler") or clocks[0],
        plugins=[DirectoryCheckpointIO()],
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,
        enable_checkpointing=False,  # Lightning's own; `Checkpoints` takes its place
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@contextmanager
def _ending(trainer: pl.Trainer, run_dir: Path, config: dict[str, Any]) -> Iterator[None]:
    """A stop on request and a loss that is not finite end the process with their status and what to do next."""
    try:
        yield
    except Stopped as stop:
        raise SystemExit(stop.status) from None
    except NonFinite as error:
        raise RunFailed(str(error)) from None
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    finally:
        curves = _curves(trainer, run_dir, config) if trainer.is_global_zero else None
        if curves is not None:
            log_picture(trainer.loggers, "curves", curves)
        for logger in trainer.loggers:
            if isinstance(logger, SafeWandb):
                logger.close()


def _curves(trainer: pl.Trainer, run_dir: Path, config: dict[str, Any]) -> Path | None:
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    best = config["checkpoint"]
    per_epoch = steps if 0 < steps < math.inf else None
    return draw_curves(run_dir, title(config), best["monitor"], best["mode"], per_epoch)


def _headline(config: dict[str, Any], run: Run, run_dir: Path) -> str:
    """What runs, on what, and where everything goes."""
    parameters = sum(p.numel() for p in run.task.model.parameters())
    device = run.trainer.strategy.root_device
    lines = [
        f"{title(config)}: {parameters / 1e6:.2f} M parameters, {run.data.num_classes} classes, "
        f"images of {_shown(config['image_size'])} px",
        *reduced(config),
        describe_batch(config, run.trainer, run.data),
        f"on {torch.cuda.get_device_name() if device.type == 'cuda' else device}, {run.trainer.precision}; "
        f"everything goes to {short(run_dir)}",
        *run.notes,
    ]
    return "\n".join(lines)


def _shown(size: int | list[int]) -> str:
    """ "32", "32 x 48"."""
    return " x ".join(map(str, size)) if isinstance(size, list) else str(size)


def _report(
    trainer: pl.Trainer, config: dict[str, Any], task: Task, run_dir: Path, progress: RunProgress
) -> float | None:
    """Writes metrics.json, prints the table at the end; returns the best monitored value."""
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()} | task.final_figures
    figures |= {
        "images_per_second": progress.throughput.images_per_second or None,
        "data_wait": progress.throughput.data_wait,
        "peak_memory": peak_memory(task.device),
        "seconds": progress.seconds,
        **facts_of(task.model, trainer.datamodule),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
    }
    checkpoints = next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)
    best = checkpoints.best_score if checkpoints is not None else None
    if best is not None:
        figures[f"best/{checkpoints.monitor}"] = best
    write_json(run_dir / "metrics.json", figures)
    names = (
        "val/top1",
        "val/top1_ema",
        "val/top5",
        "val/map",
        "val/map_ema",
        "val/f1",
        "val/recognised",
        "val/recognised_ema",
        "val/recogniser_top1",
        "val/loss",
        "train/loss",
        f"best/{config['checkpoint']['monitor']}",
    )
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


def title(config: dict[str, Any]) -> str:
    """ "coatnet_32px with softmax attention (weights sigmoid), gate eca, on digits"."""
    run, attention = config["run"], config.get("attention")
    size = ", reduced," if run.get("fit") else ""
    parts = _named(attention, PARTS) if isinstance(attention, dict) else []
    places = _named(config["model"], PLACES)
    composed = f" ({', '.join(parts)})" if parts else ""
    if run["model"] == "timm":
        mechanism = [] if attention is None else [f"{run['attention']} attention{composed}"]
        chosen = f" with {', '.join([*mechanism, *places])}" if mechanism or places else ""
        return f"timm's {config['model']['name']}{chosen} on {run['data']}"
    return (
        f"{run['model']}{size} with {', '.join([run['attention'] + ' attention' + composed, *places])} on {run['data']}"
    )


def _named(node: dict[str, Any], groups: Sequence[str]) -> list[str]:
    """What was chosen of these groups: a part is called as its file."""
    chosen = {group: node[group] for group in groups if isinstance(node.get(group), dict)}
    return [f"{group} {part['_target_'].split('.')[-2]}" for group, part in chosen.items()]


def reduced(config: dict[str, Any]) -> list[str]:
    """What a configuration of conf/fit made of the model, in one line; none where there is no such configuration."""
    fit, model = config["run"].get("fit"), config["model"]
    shown = ("dim", "depth", "patch_size", "num_heads", "latent_stride", "in_channels")
    sizes = ", ".join(f"{key} {model[key]}" for key in shown if key in model)
    return [f"reduced by conf/fit/{fit}.yaml: {sizes}"] if fit else []
