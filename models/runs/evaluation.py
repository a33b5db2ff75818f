"""Evaluation of a checkpoint of ours, or of a published file of weights, and of what a recipe promises."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from conf.errors import UserError
from models.attention.backend import describe_backend
from models.checkpoints import check_config, load_weights, read_config, read_manifest, resolve
from models.cost import example_inputs, multiply_adds, parameters
from models.runs.initial import in_our_names
from models.runs.preflight import check_data, part_of, quiet, resolved
from models.runs.report import print_table, write_json
from models.runs.resume import differences
from models.runs.training import title
from models.runs.verdict import deviations, judge
from models.tasks.base import Task
from models.tasks.classification import Classification


def evaluate(cfg: DictConfig) -> float:
    """Measures `cfg.ckpt`, prints a table and writes metrics.json beside the checkpoint; returns top-1.

    With a recipe the last line says whether the published result is reproduced. Of a model that generates images the
    loss is returned, and samples are made.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    quiet()
    given = resolved(cfg)
    weights = _of_file(cfg, given) if Path(cfg.ckpt).is_file() else _of_directory(cfg, given)
    data = part_of(cfg, "data")
    _check_number(weights.num_classes, data)
    check_data(data, training=False)
    _check_classes(weights.classes, data)
    model, ema = (_model(cfg, weights, ema) for ema in (False, True))
    task = _task(given, model, ema, data)
    trainer = part_of(cfg, "trainer", logger=False, enable_model_summary=False, use_distributed_sampler=False)
    if trainer.is_global_zero:
        print(describe_backend(model, trainer.strategy.root_device))
    figures = trainer.validate(task, data, verbose=False)[0]
    size = data.evaluation.size or data.image_size
    with trainer.precision_plugin.forward_context():
        figures |= cost(model, size, data.batch_size, trainer.strategy.root_device)
        if _generates(given) and trainer.is_global_zero:
            from models.runs.sample_files import show_samples

            figures |= show_samples(task, data, weights.output.parent, given["samples"], trainer.strategy.root_device)
    if trainer.is_global_zero:
        images = len(data.source.val)
        measured = images if trainer.limit_val_batches == 1.0 else 0
        _report(weights, given, figures, images, measured)
    return figures["val/loss" if _generates(given) else "val/top1"]


def _task(given: dict[str, Any], model: nn.Module, ema: nn.Module | None, data: pl.LightningDataModule) -> Task:
    """What measures: samples where the configuration says how they are made, else classes."""
    if _generates(given):
        from models.runs.sample_files import generation

        task = generation(given, model, data.num_classes)
    else:
        task = Classification(model, {}, {}, data.num_classes)
    task.prepare(data)
    task.ema_model = ema
    return task


def _generates(given: dict[str, Any]) -> bool:
    return "samples" in given


class Weights(NamedTuple):
    """What is evaluated, and what is known of it.

    title: for people. known: for metrics.json, which is written to `output`. load: `ema -> weights, or None`.
    num_classes, classes: of the model, and the names in training where they are known.
    """

    title: str
    known: dict[str, Any]
    output: Path
    load: Callable[[bool], dict[str, Tensor] | None]
    num_classes: int | None
    classes: list[str] | None


def _of_directory(cfg: DictConfig, given: dict[str, Any]) -> Weights:
    """A checkpoint of ours: it says itself what it is."""
    try:
        path = resolve(cfg.ckpt)
        config, step = read_config(path), read_manifest(path)["step"]
        check_config({key: config[key] for key in ("model", "data")})
    except OSError as error:
        raise UserError(str(error)) from error
    if changed := differences(config, given, ("attention", "model")):
        raise UserError(
            f"eval: the checkpoint was trained with {', '.join(changed)} as this command asks; leave that out, "
            "or train a model with it"
        )

    def load(ema: bool) -> dict[str, Tensor] | None:
        return None if ema and not (path / "ema.safetensors").exists() else load_weights(path, ema=ema)

    known = {"checkpoint": str(path), "step": step}
    output = Path(cfg.ckpt).parent / "metrics.json"
    return Weights(
        f"{title(config)}, step {step}", known, output, load, config["model"]["num_classes"], config.get("classes")
    )


def _of_file(cfg: DictConfig, given: dict[str, Any]) -> Weights:
    """A file of weights, in the authors' names or in ours, of the model that the recipe or the command line names."""
    path, classes = Path(cfg.ckpt), given["model"]["num_classes"]

    def load(ema: bool) -> dict[str, Tensor] | None:
        try:
            content = load_weights(path, ema)
        except UserError:
            if not ema:
                raise
            return None  # the raw weights were there: the file has no average
        state, notes = in_our_names(content, given, classes)
        for note in notes if not ema else ():
            print(note)
        return state

    known = {"checkpoint": str(path), "model": given["run"]["model"]}
    output = path.with_name(f"{path.name}.metrics.json")
    return Weights(f"{title(given)}, {path.name}", known, output, load, None, None)


def _report(weights: Weights, given: dict[str, Any], figures: dict[str, Any], images: int, measured: int) -> None:
    print_table(weights.title, _rows(figures))
    recipe = given["run"].get("recipe")
    verdict = judge(recipe, figures, deviations(recipe, given, images, measured)) if recipe else None
    known = weights.known | ({"recipe": recipe, "reproduced": verdict.reproduced} if verdict else {})
    write_json(weights.output, figures | known)
    print(f"metrics: {weights.output}")
    if verdict:
        print(verdict.text)


@torch.no_grad()
def cost(model: nn.Module, image_size: int | list[int], batch_size: int, device: torch.device) -> dict[str, Any]:
    """Parameters; multiply-adds of one image, as papers count FLOPs; images per second of the forward pass.

    The model is timed in evaluation mode for about a second on a batch of random inputs.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    model = model.eval().to(device)
    image, *others = example_inputs(model, size, batch_size)
    inputs = (image.contiguous(memory_format=torch.channels_last), *others)
    return {
        "parameters": parameters(model),
        "flops": multiply_adds(model, size),
        "images_per_second": _throughput(model, inputs),
    }


def _throughput(model: nn.Module, inputs: tuple[Tensor, ...], seconds: float = 1.0) -> float:
    """Images per second; the device is waited for only once in eight passes, as in a real evaluation."""

    def wait() -> float:
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    model(*inputs)  # warm up
    start, passes = wait(), 0
    while (elapsed := wait() - start) < seconds:
        for _ in range(8):
            model(*inputs)
        passes += 8
    return passes * len(inputs[0]) / elapsed


def _check_number(num_classes: int | None, data: pl.LightningDataModule) -> None:
    """Raises when there are more or fewer classes than in training."""
    if num_classes not in (None, data.num_classes):
        raise UserError(
            f"eval: the checkpoint has {num_classes} classes, the data has {data.num_classes}; "
            "evaluate on the data it was trained for"
        )


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


def _model(cfg: DictConfig, weights: Weights, ema: bool) -> nn.Module | None:
    """The model with the weights of the checkpoint, or None where it has no average."""
    try:
        state = weights.load(ema)
        if state is None:
            return None
        model = part_of(cfg, "model")
        model.load_state_dict(state)
    except (OSError, RuntimeError) as error:
        raise UserError(str(error)) from error
    return model.eval()


def _rows(figures: dict[str, Any]) -> dict[str, Any]:
    names = {"val/top1": "top-1", "val/top5": "top-5", "val/recognised": "recognised", "val/loss": "loss"}
    rows = {
        f"{label}{', EMA' * bool(s)}": figures[k + s]
        for s in ("", "_ema")
        for k, label in names.items()
        if k + s in figures
    }
    if "val/recogniser_top1" in figures:
        rows["recogniser, of real images"] = figures["val/recogniser_top1"]
    return {key: f"{v:.4f}" if "loss" in key else f"{v:.2%}" for key, v in rows.items()} | {
        "parameters": figures["parameters"],
        "FLOPs (multiply-adds)": f"{figures['flops'] / 1e9:.4g} G",
        "images/s (forward)": figures["images_per_second"],
    }
