"""What a run is called and what it says of itself before its first step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from conf.names import PARTS, PLACES, short
from models.tasks.effective_batch import describe as describe_batch


def headline(
    config: dict[str, Any],
    trainer: pl.Trainer,
    task: pl.LightningModule,
    data: pl.LightningDataModule,
    run_dir: Path,
    notes: list[str],
) -> str:
    """What runs, on what, and where everything goes."""
    parameters = sum(p.numel() for p in task.model.parameters())
    device = trainer.strategy.root_device
    lines = [
        f"{title(config)}: {parameters / 1e6:.2f} M parameters, {data.num_classes} classes, "
        f"images of {_shown(config['image_size'])} px",
        *reduced(config),
        describe_batch(config, trainer, data),
        f"on {torch.cuda.get_device_name() if device.type == 'cuda' else device}, {trainer.precision}; "
        f"everything goes to {short(run_dir)}",
        *notes,
    ]
    return "\n".join(lines)


def _shown(size: int | list[int]) -> str:
    """ "32", "32 x 48"."""
    return " x ".join(map(str, size)) if isinstance(size, list) else str(size)


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
