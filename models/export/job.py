"""From a composed configuration to a file that has been compared with the model, and what to say about it."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from conf.names import short
from models.export.agreement import Runs, agreement, refuse_difference
from models.export.arguments import Wanted
from models.export.graphs import Written, preparation, write_onnx, write_pt2, write_torchscript
from models.export.quantized import measured, quantize
from models.export.subject import Subject, subject_of
from models.export.weights import write_folder, write_safetensors
from models.layers.folded_norms import fold_norms
from models.runs.preflight import quiet
from models.runs.report import write_json

WRITERS = {
    "onnx": write_onnx,
    "pt2": write_pt2,
    "torchscript": write_torchscript,
    "safetensors": write_safetensors,
    "hf": write_folder,
}


def export(cfg: DictConfig, asked: Wanted) -> Iterator[str]:
    """Writes what is asked for; a line for each thing that is known.

    Raises:
        UserError: the model, the data or the format cannot have it.
        RunFailed: what was written computes something else; it is gone.
    """
    quiet()
    subject = subject_of(cfg)
    yield f"{subject.title}: {subject.chosen} weights"
    try:
        yield from _exported(subject, asked)
    except BaseException:
        _remove(asked.output)
        raise


def _exported(subject: Subject, asked: Wanted) -> Iterator[str]:
    start = time.perf_counter()
    form = subject._replace(model=folded(subject.model)) if asked.fold_norms else subject
    written: Written = WRITERS[asked.format](form, asked.output, asked)
    seconds = time.perf_counter() - start
    found = agreement(subject, written.runs, asked.format, asked.dynamic_size)
    refuse_difference(found, asked.format)
    facts = facts_of(subject, asked) | written.facts
    facts |= {"largest_difference": found.difference, "largest_output": found.scale, "seconds": round(seconds, 2)}
    yield f"written: {short(asked.output)}, {size_of(asked.output) / 2**20:.1f} MiB in {seconds:.0f} s{_told(facts)}"
    yield f"checked: {found}"
    if asked.quantize is not None:
        of_int8 = quantized(subject, written.runs, asked)
        facts |= of_int8
        yield (
            f"int8:    {size_of(asked.output) / 2**20:.1f} MiB; top-1 {of_int8['top1']:.2%}, before "
            f"{of_int8['top1_before']:.2%}, on {of_int8['images']} images; outputs differ by "
            f"{of_int8['largest_difference_quantized']:.2g} at most"
        )
    facts["bytes"] = size_of(asked.output)
    if asked.output.is_file():
        beside = asked.output.with_name(f"{asked.output.name}.json")
        write_json(beside, facts)
        yield f"facts:   {short(beside)}"
    yield f"use:     {written.use}"


def quantized(subject: Subject, before: Runs, asked: Wanted) -> dict[str, Any]:
    """Replaces the file by one of int8 weights; what that changes."""
    was = measured(subject, before, asked.images)
    runs = quantize(subject, asked.output)
    now, apart = measured(subject, runs, asked.images), agreement(subject, runs, asked.format, asked.dynamic_size)
    facts = {"quantize": asked.quantize, "images": was.images, "top1_before": was.top1, "top1": now.top1}
    return facts | {"largest_difference_quantized": apart.difference}


def folded(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are one with the products in front of them, as in `fold_norms`."""
    model = copy.deepcopy(model)
    fold_norms(model)
    return model


def facts_of(subject: Subject, asked: Wanted) -> dict[str, Any]:
    """What somebody needs who has the file and not the run."""
    inputs = {}
    for place, (name, value) in enumerate(zip(subject.names[0], subject.inputs, strict=True)):
        shape: list[Any] = ["batch", *value.shape[1:]]
        if asked.dynamic_size and place == 0:
            shape[-2:] = ["height", "width"]
        inputs[name] = shape
    known = {"format": asked.format, "model": subject.title, "weights": subject.chosen, "inputs": inputs}
    return known | {"output": subject.names[1]} | subject.weights.known | preparation(subject)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _told(facts: dict[str, Any]) -> str:
    """ "; opset 20; images (batch, 3, 32, 32) → logits" """
    shapes = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in facts["inputs"].items())
    opset = f"; opset {facts['opset']}" if "opset" in facts else ""
    return f"{opset}; {shapes} → {facts['output']}"


def _remove(path: Path) -> None:
    """What is not finished does not stay."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.json").unlink(missing_ok=True)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
