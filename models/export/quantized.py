"""Weights of linear layers as whole numbers of 8 bits, and what that costs in accuracy on the validation data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from conf.errors import UserError
from models.export.agreement import Runs
from models.export.graphs import runs_onnx
from models.export.program import silence
from models.export.subject import Subject, batches

LINEAR = ["MatMul", "Gemm"]


class Measured(NamedTuple):
    """Share of images whose first class is right, of so many."""

    top1: float
    images: int


def quantize(subject: Subject, path: Path) -> Runs:
    """Replaces an ONNX file: products with a weight take it in int8, a scale for each column; sums stay float32.

    Scales of what is multiplied with them are found while the graph runs ("dynamic"), so no data is needed.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.with_name(f".whole-{path.name}-{os.getpid()}")
    path.rename(whole)
    try:
        with silence():
            quantize_dynamic(whole, path, op_types_to_quantize=LINEAR, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        whole.unlink()
    return runs_onnx(path, subject.names[0])


def measured(subject: Subject, runs: Runs, images: int | None) -> Measured:
    """Top-1 on the first images of the validation data; with several labels for an image, any of them is right.

    Raises:
        UserError: the model names no class.
    """
    if getattr(subject.model, "generates", False):
        raise UserError("quantize: its cost is measured as top-1, which a model that generates has not; leave it out")
    right = count = 0
    for batch in batches(subject.data, subject.inputs[0].device):
        left = len(batch.labels) if images is None else min(len(batch.labels), images - count)
        if left <= 0:
            break
        best = runs((batch.images[:left].contiguous(),)).argmax(-1).cpu()
        labels = batch.labels[:left].cpu()
        hits = best == labels if labels.ndim == 1 else labels.gather(1, best[:, None])[:, 0] > 0
        right, count = right + int(torch.count_nonzero(hits)), count + left
    return Measured(right / count, count)
