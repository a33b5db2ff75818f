"""Runs that were never trained, as folders on disk: for probes that look at a second model or at the first weights."""

from pathlib import Path

from omegaconf import OmegaConf
from torch import nn

from conf.compose import compose_run
from models.checkpoints.write import write_checkpoint
from models.factory import build_model


def written(folder: Path, *settings: str, model: nn.Module | None = None, step: int = 10, **others: object) -> Path:
    """The folder of a run with one checkpoint more, whose configuration is what these settings compose.

    Args:
        folder: of the run.
        settings: of `train.py`, besides `data=digits` and `logger=none`.
        model: whose weights are written; None for those that the configuration makes.
        step: of the checkpoint.
        others: further top-level keys of the configuration.
    """
    cfg, choices = compose_run(["data=digits", "logger=none", *settings])
    kept = ("seed", "image_size", "attention", "model", "augment", "data", "init")
    resolved = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in kept if OmegaConf.is_config(cfg[key])}
    plain = {key: cfg[key] for key in kept} | resolved
    plain |= {"run": {key: choices.get(key) for key in ("model", "attention", "data")}, "classes": list("0123456789")}
    plain |= {"task": {"_target_": "models.tasks.classification.Classification"}, **others}
    model = build_model(OmegaConf.create({"model": plain["model"]})) if model is None else model
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    manifest = {"step": step, "epoch": 1, "metrics": {}, "commit": None, "versions": {}}
    path = folder / "checkpoints" / f"step-{step:08d}"
    write_checkpoint(path, {"model.safetensors": state}, {"config.json": plain}, manifest)
    return folder
