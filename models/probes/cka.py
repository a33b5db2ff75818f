"""How alike the layers of one model, or of two, represent the same images: centred kernel alignment.

Source: Similarity of Neural Network Representations Revisited, Kornblith et al., ICML 2019, arXiv:1905.00414; over
batches: Do Wide and Deep Networks Learn the Same Things?, Nguyen et al., ICLR 2021, arXiv:2010.15327, equations 2 and
3, with the unbiased HSIC of Song et al., JMLR 2012.
Shapes: B = batch, F = numbers that a layer gives of an image, L = layers.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf.errors import UserError
from data.batch import Batch
from data.sources.form import per_channel
from models.probes import Report, Subject
from models.probes.drawing.charts import canvas
from models.probes.reading.blocks import blocks_of, outputs, short
from models.probes.reading.passes import check_images, over_validation
from models.probes.reading.stored import stored

LEAST = 4  # images of a batch that the unbiased estimate takes
NAMED = 40  # layers up to which the chart names each
SAME = ("image_size", "mean", "std", "channels", "depth")  # settings of data that both models must have been given


def cka(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    subject: Subject,
    other: str | None = None,
    images: int | None = 512,
) -> Report:
    """Linear CKA of every two blocks: 1 for the same up to rotation and scale, 0 for independent ones.

    A layer is all that it gives of an image, its tokens one after the other. Batches with fewer than four images are
    left out, as the estimate has no value there.

    Args:
        model, data, trainer, subject: see `models.probes`.
        other: a run or checkpoint, whose layers are the columns; None: the layers of the model itself.
        images: of the validation data, spread over it; None for all.

    Raises:
        UserError: an option, a checkpoint that cannot be read or was shown other images, or too few images.
    """
    check_images("cka", images)
    rows = blocks_of("cka", model)
    beside = model if other is None else _other(other, subject, data, trainer.strategy.root_device)
    columns = rows if other is None else blocks_of("cka", beside)
    sums = Alignment()

    def look(batch: Batch) -> None:
        with outputs(rows) as left, outputs({} if other is None else columns) as right:
            model.forward(batch.images)
            if other is not None:
                beside.forward(batch.images)
        if len(batch.images) >= LEAST:
            found = grams([left[name] for name in rows])
            sums.add(found, found if other is None else grams([right[name] for name in columns]))

    count = over_validation("cka", model, data, trainer, look, images)
    if not sums.batches:
        raise UserError(f"cka: {LEAST} images at once are needed, got {count}; set data.batch_size=64")
    return _report(sums.alignment().tolist(), list(rows), list(columns), count, other)


class Alignment:
    """Sums over batches of the three kinds of HSIC that CKA is made of."""

    def __init__(self) -> None:
        self.batches, self.across, self.left, self.right = 0, 0.0, 0.0, 0.0

    def add(self, left_LBB: Tensor, right_LBB: Tensor) -> None:
        """Counts the Gram matrices of a batch, of both models."""
        self.batches += 1
        self.across = self.across + hsic(left_LBB, right_LBB)
        self.left = self.left + hsic(left_LBB, left_LBB).diagonal()
        self.right = self.right + hsic(right_LBB, right_LBB).diagonal()

    def alignment(self) -> Tensor:
        """(L, L'), from 0 to 1 up to chance; NaN where a layer gives the same for all images."""
        return self.across / (self.left[:, None] * self.right).sqrt()


def grams(layers: list[Tensor]) -> Tensor:
    """Linear Gram matrices (L, B, B) of what layers give, (B, …) each, in double precision."""
    found = []
    for layer in layers:
        x_BF = layer.flatten(1).double()
        x_BF = x_BF - x_BF.mean(0)  # changes nothing but the rounding
        found.append(x_BF @ x_BF.mT)
    return torch.stack(found)


def hsic(left_LBB: Tensor, right_LBB: Tensor) -> Tensor:
    """The unbiased Hilbert-Schmidt independence criterion (L, L') of every two Gram matrices."""
    n = left_LBB.shape[-1]
    hollow = 1 - torch.eye(n, dtype=left_LBB.dtype, device=left_LBB.device)
    left, right = left_LBB * hollow, right_LBB * hollow
    trace = left.flatten(1) @ right.flatten(1).T
    sums = left.sum((1, 2))[:, None] * right.sum((1, 2)) / ((n - 1) * (n - 2))
    rows = left.sum(1) @ right.sum(1).T
    return (trace + sums - 2 / (n - 2) * rows) / (n * (n - 3))


def _other(path: str, subject: Subject, data: pl.LightningDataModule, device: torch.device) -> nn.Module:
    """The second model, which must have been trained on images prepared alike."""
    found = stored(path, subject.weights == "ema")
    if getattr(found.model, "generates", False):
        raise UserError(f"cka: {type(found.model).__name__} generates images, got it in {path}; give a classifier's")
    theirs, ours = found.config["data"], {key: getattr(data, key) for key in SAME}
    pairs = {key: (_plain(key, ours[key], data), _plain(key, theirs[key], data)) for key in SAME if key in theirs}
    if wrong := [f"{key} {mine} and {given}" for key, (mine, given) in pairs.items() if mine != given]:
        raise UserError(
            f"cka: both models are shown the same images, got {', '.join(wrong)} in {path}; give a run of the same data"
        )
    return found.model.to(device)


def _plain(key: str, value: Any, data: pl.LightningDataModule) -> Any:
    """As plain data; of an image size always two numbers, of mean and std one for each channel."""
    if key in ("mean", "std"):
        return list(per_channel(value, data.form))
    if key == "image_size":
        return [value, value] if isinstance(value, int) else list(value)
    return value


def _report(values: list[list[float]], rows: list[str], columns: list[str], count: int, other: str | None) -> Report:
    table = [{"layer": name} | dict(zip(columns, row, strict=True)) for name, row in zip(rows, values, strict=True)]
    if other is None:
        figures = {f"next/{name}": values[i][i + 1] for i, name in enumerate(rows[:-1])}
        lines = [f"of {count} images; a row is a block and its likeness to the next"]
    else:
        figures = {f"same/{name}": values[i][columns.index(name)] for i, name in enumerate(rows) if name in columns}
        nearest = [max(range(len(columns)), key=lambda j, row=row: row[j]) for row in values]
        figures |= {f"nearest/{name}": values[i][nearest[i]] for i, name in enumerate(rows)}
        lines = [f"of {count} images; columns are the layers of {other}"]
        lines += [f"{name} is nearest to {columns[nearest[i]]}" for i, name in enumerate(rows)]
    shown = {name: f"{value:.3f}" for name, value in figures.items()}
    return Report(
        figures,
        shown,
        tables={"cka": table},
        pictures={"cka": chart(values, rows, columns)},
        captions={"cka": f"linear CKA of every block with every block of {other or 'the same model'}"},
        lines=lines,
    )


def chart(values: list[list[float]], rows: list[str], columns: list[str]) -> Any:
    """A heat map, the first layer at the lower left."""
    side = [1.8 + min(7.0, max(2.5, 0.28 * len(names))) for names in (columns, rows)]
    figure = canvas(side[0] + 0.8, side[1])
    axis = figure.subplots()
    image = axis.imshow(values, cmap="magma", vmin=0, vmax=1, origin="lower", aspect="auto")
    axis.set(title="CKA")
    for names, put in ((columns, axis.set_xticks), (rows, axis.set_yticks)):
        if len(names) <= NAMED:
            turned = {"rotation": 90} if names is columns and put == axis.set_xticks else {}
            put(range(len(names)), [short(name) for name in names], fontsize=7, **turned)
    figure.colorbar(image, ax=axis, fraction=0.046)
    return figure
