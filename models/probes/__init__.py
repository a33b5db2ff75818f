"""What eval.py measures or draws: a file and a YAML file in conf/probe for each, `probe=<name>` chooses one.

A probe is a function that gives a `Report`. What it needs it asks for by the names of its parameters, and only that is
built, so that one about data needs no checkpoint; its other parameters are options, with their values in the YAML file.

| parameter | what is given |
|---|---|
| `model` | the model with the weights of `ckpt=` that `weights=` chooses, in evaluation mode, on its device |
| `ema` | the same with the averaged weights, None where the checkpoint has none; `model` has the raw ones then |
| `network` | the model as `model`, but where no `ckpt=` is given with the weights that it begins training with |
| `data` | the `ImageData`, with a checkpoint labelled as in training; what it reads has been checked for evaluation |
| `trainer` | a Lightning trainer of the command's precision and device, without loggers |
| `input` | of the command line: images of the user, then the `data`; None, where that is its default, without them |
| `subject` | a `Subject`: what else is known |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # pictures are drawn by those who draw
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor


class Subject(NamedTuple):
    """What is known of that which is looked at; without a checkpoint less.

    title: for people. path: of the checkpoint. classes: their names in training. weights: the chosen ones, "raw" or
    "ema". config: the resolved configuration of the command. folder: where results go, which may not be there yet.
    """

    title: str
    path: Path | None
    classes: list[str] | None
    weights: str
    config: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Report:
    """What a probe found; eval.py prints and writes it.

    figures: plain values by name, accuracies as fractions, for the JSON file. rows: what people are shown of them, by
    their words for it; None for all figures. tables: a CSV file for each. pictures: a PNG file for each; where there
    are some, all of this is a page too. captions: a sentence for some pictures. pages: further HTML files. tensors: a
    safetensors file for each. lines: sentences, printed below the table. score: what a sweep would choose by. measured:
    images that were measured and how many there are, where a published result can be compared.
    """

    figures: dict[str, Any]
    rows: dict[str, Any] | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: dict[str, Figure | Image] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    score: float | None = None
    measured: tuple[int, int] | None = None
