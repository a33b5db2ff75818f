"""A run's folder with a small model that has learned nothing, and the command that exports it, in this process."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf, open_dict

from conf.compose import compose_run
from models.checkpoints.write import write_checkpoint
from models.export.__main__ import main
from models.factory import instantiate

TINY = ("model=vit_32px", "model.depth=1", "model.dim=32", "model.num_heads=2", "data=digits", "data.workers=0")


def run_of(folder: Path, *arguments: str, spread: float = 0.25) -> Path:
    """A run's folder with one checkpoint: of its raw weights, and of averaged ones that are others."""
    cfg, choices = compose_run([*arguments, "run.name=mine", "logger=none"])
    with open_dict(cfg):
        for group in ("model", "attention", "data", "recipe"):
            cfg.run[group] = choices.get(group)
    torch.manual_seed(0)
    config = OmegaConf.to_container(cfg, resolve=True)
    state = instantiate(OmegaConf.create(config["model"])).state_dict()
    for name, value in state.items():
        if value.is_floating_point() and not name.endswith("running_var"):
            value.normal_(std=spread)
    averaged = {name: value / 2 if value.is_floating_point() else value for name, value in state.items()}
    config["classes"] = [str(label) for label in range(config["model"]["num_classes"])]
    manifest = {"step": 7, "epoch": 1, "metrics": {"val/top1": 0.5, "val/top1_ema": 0.75}, "versions": {}}
    path = folder / "mine" / "checkpoints" / "step-00000007"
    tensors = {"model.safetensors": state, "ema.safetensors": averaged}
    write_checkpoint(path, tensors, {"config.json": json.loads(json.dumps(config))}, manifest)
    return folder / "mine"


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory.mktemp("outputs"), *TINY)


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """`export("ckpt=…", "format=onnx", "-o", "mine.onnx") -> (exit status, output, errors)` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command
