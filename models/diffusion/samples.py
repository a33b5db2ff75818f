"""Samples of a diffusion model: how they are made, shown and judged.

Shapes: n = samples, K = classes, H W = image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from models.diffusion import Diffusion, Noise, chain, check_chain, spaced
from models.diffusion.latents import Autoencoder, Pixels
from models.diffusion.recogniser import Recogniser
from models.loggers.weights_and_biases import log_picture
from models.side_outputs import attempt, put_figure

ROWS, COLUMNS = 10, 10  # of the picture: classes, samples of each
PICTURE = "samples.png"


@dataclass(frozen=True)
class Sampling:
    """How samples are made; `conf/task/generation.yaml` has the defaults.

    Args:
        steps: of the chain, see `models.diffusion.spaced`.
        method, eta: see `models.diffusion.chain`.
        guidance: scale of classifier-free guidance, 1 for none.
        guided_channels: how many channels of the noise are guided, None for all. The authors of DiT guide 3 of 4.
        clip: keep the predicted image in -1 … 1; None: where the model works on pixels.
        seed: names the noise, together with the number of the sample.
        batch_size: samples at once; they do not depend on it.
    """

    steps: int | str = 250
    method: str = "ddpm"
    eta: float = 0.0
    guidance: float = 1.0
    guided_channels: int | None = None
    clip: bool | None = None
    seed: int = 0
    batch_size: int = 64

    @classmethod
    def build(cls, values: dict[str, Any] | None, diffusion: Diffusion, model: nn.Module) -> "Sampling":
        """From plain values.

        Raises:
            ValueError: an unknown key, a value out of range, or one that the diffusion or the model cannot take.
        """
        sampling = _of(cls, "sampling", values)
        spaced(sampling.steps, len(diffusion))
        check_chain(sampling.method, sampling.eta)
        for name, least in [("seed", 0), ("batch_size", 1), ("guided_channels", 1)]:
            value = getattr(sampling, name)
            if name == "guided_channels" and value is None:
                continue
            if type(value) is not int or value < least:
                raise UserError(
                    f"sampling: {name} must be a whole number of at least {least}, got {value!r}; "
                    f"set task.sampling.{name}"
                )
        scale = sampling.guidance
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale >= 0:
            raise UserError(
                f"sampling: guidance must be a number of at least 0 (1: none), got {scale!r}; "
                "set task.sampling.guidance"
            )
        if scale != 1 and model.class_dropout == 0:
            raise UserError(
                f"sampling: guidance needs a model that was trained without a class too, got guidance={scale} with "
                "class_dropout=0; set task.sampling.guidance=1, or model.class_dropout=0.1 before training"
            )
        return sampling

    def __str__(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.method.upper()}, {self.steps or 'all'} steps{guided}"


@dataclass(frozen=True)
class Score:
    """How samples are judged.

    Args:
        samples: made for it, from all classes in turn; None: they are not judged.
    """

    samples: int | None = None

    @classmethod
    def build(cls, values: dict[str, Any] | None) -> "Score":
        """From plain values.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        score = _of(cls, "score", values)
        if score.samples is not None and (type(score.samples) is not int or score.samples < 1):
            raise UserError(
                f"score: samples must be a whole number of at least 1, or null for no score, got {score.samples!r}; "
                "set task.score.samples"
            )
        return score


class Studio:
    """Makes samples of one process and one kind of latents, shows and judges them."""

    def __init__(self, diffusion: Diffusion, latents: Pixels | Autoencoder, sampling: Sampling, score: Score) -> None:
        self.diffusion = diffusion.respaced(spaced(sampling.steps, len(diffusion)))
        self.latents, self.sampling, self.score = latents, sampling, score
        self.recogniser: Recogniser | None = None

    def draw(self, model: nn.Module, labels: Sequence[int], first: int = 0) -> Iterator[Tensor]:
        """Images uint8 (n, 3, H, W) on the CPU, a batch at a time.

        Args:
            model: see `models.tasks.generation`; it is used in evaluation mode and left as it was.
            labels: one for each sample.
            first: the number of the first sample, which names its noise.
        """
        device = next(model.parameters()).device
        self.diffusion.to(device)
        self.latents.to(device)
        training = model.training
        model.eval()
        for start in range(0, len(labels), self.sampling.batch_size):
            part = labels[start : start + self.sampling.batch_size]
            numbers = range(first + start, first + start + len(part))
            yield self._batch(model, torch.tensor(part, device=device), numbers)
        model.train(training)

    def show(
        self, models: dict[str, nn.Module], data: Any, folder: str, loggers: Sequence[Any] = ()
    ) -> dict[str, float]:
        """Writes the picture into a folder and shows it to W&B; what the score says, by name.

        Args:
            models: by the suffix of their figures; the picture shows samples of the last.
            data: its classes, and where they are scored its images.
        """
        figures, last = {}, list(models)[-1]
        classes = shown_classes(data.num_classes)
        grid = [classes[i % len(classes)] for i in range(len(classes) * COLUMNS)]
        for suffix, model in models.items():
            images = torch.cat(list(self.draw(model, self._labels(data)))) if self.score.samples else None
            if images is not None:
                figures[f"val/recognised{suffix}"] = self._recogniser(data, images).share(images, self._labels(data))
            if suffix == last:
                same = images is not None and self._labels(data)[: len(grid)] == grid
                picture = images[: len(grid)] if same else torch.cat(list(self.draw(model, grid)))
                names = [data.class_names[c] for c in classes]
                attempt(PICTURE, self._picture, picture, names, Path(folder) / PICTURE, loggers)
        if self.recogniser is not None:
            figures["val/recogniser_top1"] = self.recogniser.top1
        return figures

    def _picture(self, images: Tensor, names: Sequence[str], path: Path, loggers: Sequence[Any]) -> None:
        log_picture(loggers, "samples", draw_grid(images, names, path, str(self.sampling)))

    def _labels(self, data: Any) -> list[int]:
        return [i % data.num_classes for i in range(self.score.samples)]

    def _recogniser(self, data: Any, images: Tensor) -> Recogniser:
        if self.recogniser is None:
            self.recogniser = Recogniser(data.source, data.num_classes, images.shape[-1])
        return self.recogniser

    @torch.no_grad()
    def _batch(self, model: nn.Module, labels_n: Tensor, numbers: range) -> Tensor:
        settings = self.sampling

        def predict(x: Tensor, timesteps_n: Tensor) -> Tensor:
            if settings.guidance == 1:
                return model(x, timesteps_n, labels_n)
            return model.forward_guided(x, timesteps_n, labels_n, settings.guidance, settings.guided_channels)

        noise = Noise(settings.seed, numbers, (model.in_channels, *model.latent_size))
        clip = self.latents.clip if settings.clip is None else settings.clip
        for x in chain(predict, self.diffusion, noise, method=settings.method, eta=settings.eta, clip=clip):
            result = x
        images = self.latents.decode(result)
        return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).cpu()  # rounded, as sample_ddp.py of DiT does


def shown_classes(num_classes: int) -> list[int]:
    """At most `ROWS` of them, evenly spread."""
    rows = min(num_classes, ROWS)
    return [row * num_classes // rows for row in range(rows)]


def draw_grid(images: Tensor, names: Sequence[str], path: Path, title: str) -> Path:
    """A PNG with one row per class and its name before it, from images (columns · rows, 3, H, W), class after class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(names), len(images) // len(names)
    height, width = images.shape[2:]
    gap = max(height // 8, 1)
    framed = F.pad(images, (0, gap, 0, gap), value=255)
    height, width = height + gap, width + gap
    tiles = framed.unflatten(0, (columns, rows)).permute(1, 3, 0, 4, 2).reshape(rows * height, columns * width, 3)
    figure = Figure(figsize=(0.5 * columns + 1, 0.5 * rows * height / width + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(tiles.numpy(), interpolation="nearest")
    axis.set_yticks([(row + 0.5) * height for row in range(rows)], [name[:24] for name in names])
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=9)
    axis.set_frame_on(False)
    put_figure(path, figure)
    return path


def _of(cls: type, group: str, values: dict[str, Any] | None) -> Any:
    """An instance of plain values; an unknown key is named."""
    known = [field.name for field in fields(cls)]
    for key in values or {}:
        if key not in known:
            raise UserError(f"{group}: there is no setting {key!r}; it has {', '.join(known)}")
    return cls(**(values or {}))
