"""Evaluation of a checkpoint: the model is rebuilt from what the checkpoint holds."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conf.cli import UserError
from models.attention.backend import describe
from models.checkpoints import check_config, load_weights, read_config, read_manifest, resolve
from models.tasks.classification import Classification
from models.tasks.preflight import build, check_data, quiet, resolved
from models.tasks.report import print_table, write_json
from models.tasks.resume import without_backend
from models.tasks.running import title


def evaluate(cfg: DictConfig) -> float:
    """Measures `cfg.ckpt`, prints a table and writes metrics.json beside the checkpoint; returns top-1.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    quiet()
    path, config = _read(cfg.ckpt)
    if without_backend(resolved(cfg)["model"]) != without_backend(config["model"]):
        raise UserError("eval: the configuration is of another checkpoint than ckpt; give one checkpoint per command")
    data = build(cfg, "data")
    if data.num_classes != config["model"]["num_classes"]:
        raise UserError(
            f"eval: the checkpoint has {config['model']['num_classes']} classes, the data has {data.num_classes}; "
            "evaluate on the data it was trained for"
        )
    check_data(data)
    _check_classes(config.get("classes"), data)
    model, ema = _load(cfg, path, ema=False), _load(cfg, path, ema=True)
    task = Classification(model, {}, {}, data.num_classes, label_smoothing=config["task"]["label_smoothing"])
    task.ema_model = ema
    trainer = build(cfg, "trainer", logger=False, enable_model_summary=False, use_distributed_sampler=False)
    if trainer.is_global_zero:
        print(_attention(model, trainer.strategy.root_device))
    figures = trainer.validate(task, data, verbose=False)[0]
    size = data.evaluation.size or data.image_size
    with trainer.precision_plugin.forward_context():
        figures |= cost(model, size, data.batch_size, trainer.strategy.root_device)
    manifest = read_manifest(path)
    if trainer.is_global_zero:
        print_table(f"{title(config)}, step {manifest['step']}", _rows(figures))
        output = Path(cfg.ckpt).parent / "metrics.json"
        write_json(output, figures | {"checkpoint": str(path), "step": manifest["step"]})
        print(f"metrics: {output}")
    return figures["val/top1"]


def _attention(model: nn.Module, device: torch.device) -> str:
    """What computes the attention, in one line."""
    try:
        return describe(model, device)
    except ValueError as error:
        raise UserError(str(error)) from error


@torch.no_grad()
def cost(model: nn.Module, image_size: int | list[int], batch_size: int, device: torch.device) -> dict[str, Any]:
    """Parameters; multiply-adds of one image, as papers count FLOPs; images per second of the forward pass.

    The model is timed in evaluation mode for about a second on random images of `batch_size`.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    model = model.eval().to(device)
    images = torch.randn(batch_size, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": counter.get_total_flops() // 2,
        "images_per_second": _throughput(model, images),
    }


def _throughput(model: nn.Module, images: Tensor, seconds: float = 1.0) -> float:
    """Images per second; the device is waited for only once in eight passes, as in a real evaluation."""

    def wait() -> float:
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    model(images)  # warm up
    start, passes = wait(), 0
    while (elapsed := wait() - start) < seconds:
        for _ in range(8):
            model(images)
        passes += 8
    return passes * len(images) / elapsed


def _check_classes(trained: list[str] | None, data: pl.LightningDataModule) -> None:
    """Raises when a label means another class than in training."""
    if trained is None or trained == data.class_names:
        return
    pairs = enumerate(zip(trained, data.class_names, strict=False))
    label, (was, now) = next(((i, names) for i, names in pairs if names[0] != names[1]), (-1, ("", "")))
    raise UserError(
        f"eval: the classes are not those of training: label {label} was {was!r} and is {now!r} here; "
        "evaluate on folders with the same names"
    )


def _read(ckpt: str) -> tuple[Path, dict[str, Any]]:
    try:
        path = resolve(ckpt)
        config = read_config(path)
        check_config({key: config[key] for key in ("model", "data")})
        return path, config
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _load(cfg: DictConfig, path: Path, ema: bool) -> nn.Module | None:
    if ema and not (path / "ema.safetensors").exists():
        return None
    model = build(cfg, "model")
    try:
        model.load_state_dict(load_weights(path, ema=ema))
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(str(error)) from error
    return model.eval()


def _rows(figures: dict[str, Any]) -> dict[str, Any]:
    names = {"val/top1": "top-1", "val/top5": "top-5", "val/loss": "loss"}
    rows = {
        f"{label}{', EMA' * bool(s)}": figures[k + s]
        for s in ("", "_ema")
        for k, label in names.items()
        if k + s in figures
    }
    return {key: f"{v:.2%}" if "top" in key else f"{v:.4f}" for key, v in rows.items()} | {
        "parameters": figures["parameters"],
        "FLOPs (multiply-adds)": f"{figures['flops'] / 1e9:.4g} G",
        "images/s (forward)": figures["images_per_second"],
    }
