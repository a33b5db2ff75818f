"""How far the token of a map reaches into the image: its effective receptive field, stage by stage.

Source: Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, Luo et al., NeurIPS 2016,
arXiv:1701.04128, section 2: the gradient of one place of a map by the image. Theirs is that of the sum over channels;
behind a LayerNorm this sum is the same for all images, so here the channels have signs ±1, drawn once per image.
Shapes: B = images, C = channels, H W = image or map.
"""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf import looking
from conf.looking import Point
from models.probes import Report
from models.probes.drawing.charts import canvas
from models.probes.reading.images import first_images
from models.probes.reading.stage_maps import check_stage_maps, stage_maps

SHARES = (0.5, 0.95)  # of the gradient, whose radii are told


class Field(NamedTuple):
    """Of one stage: the size of the gradient at every pixel (H, W), and the place that it belongs to, in pixels."""

    gradient_HW: Tensor
    centre: tuple[float, float]  # row, column


def receptive_field(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    input: Any = None,
    images: int = 16,
    point: Any = None,
) -> Report:
    """For each stage the radius, in pixels, that holds half of the gradient and 95 % of it; and how many pixels have
    any.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: that the gradient is averaged over.
        point: whose token is looked at, fractions from the left and from the top; None for the centre.

    Raises:
        UserError: an option that cannot be, or a model without maps.
    """
    at = looking.point(point) or (0.5, 0.5)
    check_stage_maps("receptive_field", model)
    seen = first_images(data, images, trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        fields = fields_of(model, seen.batch, at)
    rows = [{"stage": name, **figures_of(field)} for name, field in fields.items()]
    curves = {name: curve(field) for name, field in fields.items()}
    return Report(
        {f"{row['stage']}/{key}": value for row in rows for key, value in row.items() if key != "stage"},
        _shown(rows),
        tables={"stages": rows, "shares": _table(curves)},
        pictures={"fields": chart(fields, rows), "shares": chart_of_shares(curves)},
        captions={
            "fields": "size of the gradient by each pixel (its square root, brightest: the largest); circles hold 50 % "
            "and 95 % of it",
            "shares": "share of the gradient within a distance of the token",
        },
        lines=[f"mean of {len(seen.batch)} images; the token at {at[0]:.2f} from the left, {at[1]:.2f} from the top"],
    )


def fields_of(model: nn.Module, images: Tensor, at: Point = (0.5, 0.5)) -> dict[str, Field]:
    """The field of every stage, a mean over images."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        maps = stage_maps(model, images)
        return {name: field_of(stage, images, at) for name, stage in maps.items()}


def field_of(map_BCHW: Tensor, images: Tensor, at: Point = (0.5, 0.5)) -> Field:
    """The gradient of one place of a map that was computed of images which require gradients."""
    (batch, channels, *sides), pixels = map_BCHW.shape, images.shape[-2:]
    row, column = (min(int(part * side), side - 1) for part, side in zip(reversed(at), sides, strict=True))
    signs = torch.randint(2, (batch, channels), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    seen = (map_BCHW[:, :, row, column].float() * signs.to(map_BCHW.device)).sum()
    (gradient,) = torch.autograd.grad(seen, images, retain_graph=True)
    strides = [pixel / side for pixel, side in zip(pixels, sides, strict=True)]
    centre = ((row + 0.5) * strides[0] - 0.5, (column + 0.5) * strides[1] - 0.5)
    return Field(gradient.abs().sum(1).mean(0).double().cpu(), centre)


def figures_of(field: Field) -> dict[str, float]:
    """Radii in pixels; the share of pixels with any gradient, and the sides of the box around these."""
    distances, shares = curve(field)
    radii = {f"radius_{share * 100:.0f}": float(distances[int((shares < share).sum())]) for share in SHARES}
    reached = field.gradient_HW > 0
    height, width = (int(reached.any(axis).sum()) for axis in (1, 0))
    return radii | {"reached": float(reached.double().mean()), "height": height, "width": width}


def curve(field: Field) -> tuple[Tensor, Tensor]:
    """Distances of pixels in rising order, each once, and the share of the gradient up to there."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in field.gradient_HW.shape)
    squares = (rows[:, None] - field.centre[0]).square() + (columns - field.centre[1]).square()
    distances, place = squares.sqrt().round(decimals=6).flatten().unique(return_inverse=True)
    held = torch.zeros_like(distances).index_add_(0, place, field.gradient_HW.flatten())
    return distances, held.cumsum(0) / held.sum().clamp_min(1e-300)


def _table(curves: dict[str, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """The shares at whole pixels."""
    most = max(float(distances[-1]) for distances, _ in curves.values())
    rows = []
    for radius in range(int(most) + 2):
        inside = {name: int((distances <= radius).sum()) for name, (distances, _) in curves.items()}
        shares = {name: float(curves[name][1][count - 1]) if count else 0.0 for name, count in inside.items()}
        rows.append({"radius": radius, **shares})
    return rows


def chart(fields: dict[str, Field], rows: list[dict[str, Any]]) -> Any:
    """The fields side by side."""
    from matplotlib.patches import Circle

    figure = canvas(2.6 * len(fields), 2.9)
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for axis, (name, field), row in zip(axes, fields.items(), rows, strict=True):
        axis.imshow(field.gradient_HW.sqrt().numpy(), cmap="magma")
        for share, style in zip(SHARES, ("-", "--"), strict=True):
            radius = row[f"radius_{share * 100:.0f}"]
            axis.add_patch(Circle(field.centre[::-1], radius, fill=False, color="white", linestyle=style, linewidth=1))
        axis.set_title(f"{name}: {row['radius_50']:.1f} px, {row['radius_95']:.1f} px", fontsize=8)
        axis.set_axis_off()
        axis.set(xlim=(-0.5, field.gradient_HW.shape[1] - 0.5), ylim=(field.gradient_HW.shape[0] - 0.5, -0.5))
    return figure


def chart_of_shares(curves: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """A line for each stage."""
    figure = canvas(6.0, 3.6)
    axis = figure.subplots()
    for name, (distances, shares) in curves.items():
        axis.plot(distances.numpy(), shares.numpy(), label=name)
    for share in SHARES:
        axis.axhline(share, color="0.8", linewidth=1, zorder=0)
    axis.set(xlabel="distance from the token, pixels", ylabel="share of the gradient", ylim=(0, 1.02))
    axis.legend(loc="lower right", fontsize=8)
    return figure


def _shown(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {
        row["stage"]: f"50 % within {row['radius_50']:.1f} px, 95 % within {row['radius_95']:.1f} px; "
        f"{row['reached']:.1%} of the pixels, {row['height']} x {row['width']}"
        for row in rows
    }
