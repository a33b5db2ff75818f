"""A model as weights and the configuration that makes their model: one file, or a folder for Hugging Face's hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints import create_from, read_config, read_manifest
from models.checkpoints.hub import CONFIG
from models.checkpoints.write import write_weights
from models.export.agreement import Runs
from models.export.arguments import Wanted
from models.export.card import card
from models.export.graphs import Written, preparation
from models.export.subject import Subject
from models.runs.report import write_json

# what makes the model and prepares its images, and how it was trained; a run's logger and paths are nobody's business
KEPT = (
    "run",
    "seed",
    "image_size",
    "attention",
    "model",
    "data",
    "augment",
    "task",
    "optimizer",
    "schedule",
    "classes",
)
PRIVATE = ("root", "split", "token_labels", "lists", "class_names", "train", "val")  # of data: where it lies


def write_safetensors(subject: Subject, path: Path, asked: Wanted) -> Written:
    """The weights under our names; the configuration, as JSON, is text beside them in the same file."""
    config = configuration(subject)
    write_weights(path, subject.model.state_dict(), {"model": config["run"]["model"], "config": json.dumps(config)})
    return Written(
        runs_again(subject, path), {}, f"python eval.py ckpt={path.name}; init={path.name} starts a run from it"
    )


def write_folder(subject: Subject, path: Path, asked: Wanted) -> Written:
    """README.md, config.json, model.safetensors, metrics.json, labels.json, preprocessor_config.json.

    They are written under a hidden name beside the target, then renamed.
    """
    config, prepared = configuration(subject), preparation(subject)
    folder = path.with_name(f".writing-{path.name}-{os.getpid()}")
    folder.mkdir()
    try:
        write_weights(folder / "model.safetensors", subject.model.state_dict(), {"model": config["run"]["model"]})
        write_json(folder / CONFIG, config)
        write_json(folder / "labels.json", {str(label): name for label, name in enumerate(prepared.pop("classes"))})
        write_json(folder / "preprocessor_config.json", prepared)
        write_json(folder / "metrics.json", figures := figures_of(subject))
        (folder / "README.md").write_text(card(subject, config, figures, path.name), encoding="utf-8")
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Written(
        runs_again(subject, path), {}, f"hf upload <you>/{path.name} {path.name}; then ckpt=hf-hub:<you>/{path.name}"
    )


def configuration(subject: Subject) -> dict[str, Any]:
    """That of the run, else that of the command, without what is true on one machine only."""
    place = subject.weights.path
    config = read_config(place) if place.is_dir() and "step" in subject.weights.known else subject.config
    config = json.loads(json.dumps({key: config[key] for key in KEPT if config.get(key) is not None}))
    config.setdefault("classes", subject.classes)
    for node in (config["data"], config["data"].get("source") or {}):
        node |= {key: None for key in PRIVATE if isinstance(node.get(key), str) and os.sep in node[key]}
    return config


def figures_of(subject: Subject) -> dict[str, Any]:
    """Those that were measured when the checkpoint was written; a file of weights has none."""
    if "step" not in subject.weights.known:
        return {}
    manifest = read_manifest(subject.weights.path)
    return {"step": manifest["step"], "epoch": manifest.get("epoch"), **(manifest.get("metrics") or {})}


def runs_again(subject: Subject, path: Path) -> Runs:
    """The model as what was written makes it again."""
    model = create_from(path).to(next(subject.model.parameters()).device)

    def runs(inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return model(*inputs)

    return runs
