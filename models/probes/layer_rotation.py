"""How far each weight tensor has turned in training.

Source: Layer rotation: a surprisingly powerful indicator of generalization in deep networks?, Carbonnelle & De
Vleeschouwer, 2018, arXiv:1806.01603, section 2: the cosine distance of the weights to those of the start.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.checkpoints import load_weights, read_config, read_manifest, resolve
from models.checkpoints.format.directory import EMA, step_directories
from models.checkpoints.format.parts import has
from models.probes import Report, Subject
from models.probes.drawing.charts import BLUE, ORANGE, canvas
from models.probes.reading.stored import initial

NAMED = 60  # tensors up to which the chart names each
STARTS = ("auto", "initial", "first")


class Start(NamedTuple):
    """Weights by name, and where they are from."""

    weights: dict[str, Tensor]
    told: str


def layer_rotation(model: nn.Module, subject: Subject, start: str = "auto") -> Report:
    """1 − cos(w, w₀) of every weight tensor w against what it was: 0 for one that stayed or was only scaled, 1 for a
    right angle.

    Vectors (biases, norms, scales of layers) are in the table and not in the means, since layers turn by their
    matrices and kernels. What was zero has no direction and is left out.

    Args:
        model, subject: see `models.probes`.
        start: "initial" makes the weights again that the run began with, from its seed; "first" takes the earliest
            checkpoint of the run; "auto" the former where the run began without other weights, else the latter; or a
            checkpoint or file of weights in the names of the model.

    Raises:
        UserError: an option, or there is nothing to compare with.
    """
    if not isinstance(start, str) or not start:
        raise UserError(
            f"layer_rotation: start must be one of {', '.join(STARTS)} or a path, got {start!r}; set probe.start=auto"
        )
    began = _start(start, subject)
    rows, left_out = rotations(dict(model.named_parameters()), began.weights)
    if not rows:
        raise UserError(f"layer_rotation: no weight of the model is in {began.told}; give a run of the same model")
    kept = [row for row in rows if row["dimensions"] > 1] or rows
    figures: dict[str, Any] = {f"rotation/{row['tensor']}": row["rotation"] for row in kept}
    turned, most = [row["rotation"] for row in kept], max(kept, key=lambda row: row["rotation"])
    figures |= {"mean": sum(turned) / len(turned), "least": min(turned), "most": max(turned)}
    shown = {
        "compared with": began.told,
        "mean of weight tensors": f"{figures['mean']:.4f}",
        "least, most": f"{figures['least']:.4f}, {figures['most']:.4f} ({most['tensor']})",
    }
    lines = [f"left out, as they were zero or of another shape: {len(left_out)} tensors"] if left_out else []
    return Report(
        figures,
        shown,
        tables={"tensors": rows},
        pictures={"rotation": chart(kept)},
        captions={"rotation": f"how far each weight tensor has turned, against {began.told}"},
        lines=lines,
    )


def rotations(now: dict[str, Tensor], then: dict[str, Tensor]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for every tensor with a direction in both, in the order of the model; and the names of the others."""
    rows, left_out = [], []
    for name, weight in now.items():
        w, w0 = (None if x is None else x.detach().double().flatten().cpu() for x in (weight, then.get(name)))
        if w0 is None or w.shape != w0.shape or not (w.any() and w0.any()):
            left_out.append(name)
            continue
        turned = rotation(w, w0)
        row = {"tensor": name, "dimensions": weight.ndim, "numbers": weight.numel(), "rotation": turned}
        rows.append(
            row | {"degrees": math.degrees(2 * math.asin(math.sqrt(turned / 2))), "growth": float(w.norm() / w0.norm())}
        )
    return rows, left_out


def rotation(w: Tensor, w0: Tensor) -> float:
    """1 − cos, from 0 to 2; by the difference of the directions, which small angles do not lose to rounding."""
    return min(float((w / w.norm() - w0 / w0.norm()).square().sum() / 2), 2.0)


def _start(start: str, subject: Subject) -> Start:
    if start not in STARTS:
        return _given(start)
    path = subject.path
    if path is None or not (path.is_dir() or path.name in ("best", "last")):
        raise UserError(
            f"layer_rotation: start={start} needs a checkpoint of a run, got a file of weights; "
            "give the weights that it began with: probe.start=<path>"
        )
    config = read_config(path)
    why = _not_made_again(config)
    if start == "initial" and why:
        raise UserError(f"layer_rotation: the first weights cannot be made again, as {why}; set probe.start=<path>")
    if start == "initial" or (start == "auto" and not why):
        return _initial(config, path)
    return _first(path, subject.weights, why if start == "auto" else "")


def _given(path: str) -> Start:
    try:
        return Start(load_weights(path), path)
    except OSError as error:
        raise UserError(f"layer_rotation: {path} cannot be read: {error.strerror or error}; set probe.start") from error


def _not_made_again(config: dict[str, Any]) -> str:
    """Why the seed alone does not give the first weights; "" where it does."""
    if config.get("init") is not None:
        return f"the run began with init={config['init']}"
    if config["model"].get("pretrained"):
        return "the model began with pretrained weights"
    return ""


def _initial(config: dict[str, Any], path: Path) -> Start:
    told = f"the weights of seed {config['seed']}, made again"
    was, now = (read_manifest(path).get("versions") or {}).get("torch"), torch.__version__.partition("+")[0]
    told += f" (by torch {now}, the run had {was})" if was and was.partition("+")[0] != now else ""
    return Start(dict(initial(config).named_parameters()), told)


def _first(path: Path, weights: str, why: str) -> Start:
    """The earliest checkpoint beside this one."""
    here = resolve(path)
    steps = step_directories(here.parent)
    if not steps or next(iter(steps.values())).resolve() == here:
        besides = f", and {why}" if why else ""
        raise UserError(
            f"layer_rotation: {here.parent} has no checkpoint before {here.name}{besides}; "
            "set probe.start=<path> to weights, or checkpoint.keep in training"
        )
    step, first = next(iter(steps.items()))
    ema = weights == "ema" and has(first, EMA)
    return Start(load_weights(first, ema), f"step {step}")


def chart(rows: list[dict[str, Any]]) -> Any:
    """A bar for each tensor, the first of the model at the top."""
    named = len(rows) <= NAMED
    figure = canvas(8.0, 1.2 + min(13.0, max(1.5, (0.19 if named else 0.06) * len(rows))))
    axis = figure.subplots()
    of_attention = [".attn." in f".{row['tensor']}" for row in rows]
    axis.barh(
        range(len(rows)), [row["rotation"] for row in rows], color=[ORANGE if found else BLUE for found in of_attention]
    )
    axis.set(title="rotation of weight tensors: 1 − cosine to the start", ylim=(len(rows) - 0.4, -0.6))
    axis.set_xlabel("orange: of attention" if any(of_attention) else "")
    axis.set_yticks(range(len(rows)) if named else [], [row["tensor"] for row in rows] if named else [], fontsize=6)
    axis.set_xlim(0, max(1.1 * max(row["rotation"] for row in rows), 0.01))
    return figure
