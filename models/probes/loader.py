"""How many images per second a core makes ready for a model, beside what plain Pillow and torchvision do.

The same files, one after the other in this process; what counts is its CPU time, not that of the clock.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from conf import values
from data.augment import Augment
from data.dataset import Samples
from data.order.sampler import Draw
from data.sources.formats import image_of
from data.sources.imagefolder import FolderSplit, ImageFolder
from data.transforms import Evaluation, EvaluationTransform, TrainTransform
from models.probes import Report

WHO = "loader"
MEAN = (0.485, 0.456, 0.406)
WIDTH, HEIGHT, QUALITY = 500, 375, 90  # the usual photo of ImageNet
BATCH = 16
Way = Callable[[Sequence[int]], Any]  # makes the images of these places ready


def loader(
    sizes: int | Sequence[int] = (64, 112, 224),
    scale: Sequence[float] = (0.08, 1.0),
    images: int = 48,
    rounds: int = 5,
    root: str | None = None,
) -> Report:
    """A row for each size; ways take turns, image files are in the memory of the system after the first round.

    Args:
        sizes: pixels of the images that a model sees.
        scale: area of a random crop, of those for training.
        images: how many are read.
        rounds: over all of them.
        root: of class folders of images; generated JPEGs without it.
    """
    wanted = [sizes] if isinstance(sizes, int) else list(sizes)
    for size in wanted:
        values.whole(WHO, "sizes", size, fix="set probe.sizes=[64,224]")
    values.whole(WHO, "images", images, fix="set probe.images=48")
    values.whole(WHO, "rounds", rounds, fix="set probe.rounds=5")
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            generate(Path(folder) / "photo", images)
        split = FolderSplit(folder, ["photo"]) if root is None else ImageFolder(root).train
        count = min(images, len(split))
        rows = [{"size": size} | _measured(split, size, tuple(scale), count, rounds) for size in wanted]
    figures = {f"{row['size']}/{way}": row[way] for row in rows for way in row if way != "size"}
    shown = {
        f"{row['size']} px": ", ".join(f"{way} {row[way]:,.0f}" for way in row if way != "size") + " images/s"
        for row in rows
    }
    what = f"{WIDTH} x {HEIGHT} JPEGs, generated" if root is None else f"images of {root}"
    return Report(figures, shown, {"loader": rows}, lines=[f"per core, by CPU time; {count} {what}"])


def generate(folder: Path, count: int) -> None:
    """Writes JPEGs of smooth noise on four scales, about as many bytes as a photo has."""
    folder.mkdir(parents=True)
    for seed in range(count):
        random = np.random.default_rng(seed)
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for cell, share in ((128, 0.5), (32, 0.25), (8, 0.15), (2, 0.07)):
            coarse = random.random((HEIGHT // cell, WIDTH // cell, 3)) * 255
            coarse = Image.fromarray(coarse.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels += share * np.asarray(coarse)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{seed}.jpg", quality=QUALITY)


def _measured(split: FolderSplit, size: int, scale: tuple[float, float], count: int, rounds: int) -> dict[str, Any]:
    """Images per second of each way; the first round warms up."""
    ways = _ways(split, size, scale)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            for first in range(0, count, BATCH):
                way(range(first, min(first + BATCH, count)))
            times[name].append(time.process_time() - start)
    return {name: count / statistics.median(found[1:]) for name, found in times.items()}


def _ways(split: FolderSplit, size: int, scale: tuple[float, float]) -> dict[str, Way]:
    def ours(transform: TrainTransform | EvaluationTransform, seed: int | None) -> Way:
        samples = Samples(split, transform, seed)
        return lambda places: samples.__getitems__([Draw(0, place) for place in places])

    def training(**options: Any) -> TrainTransform:
        return TrainTransform(Augment.build({"scale": scale, "hflip": 0.5} | options), size, MEAN)

    cut = [v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    usual, of_tensors = v2.Compose([*cut, v2.PILToTensor()]), v2.Compose(cut)

    def pillow(place: int) -> Tensor:
        with image_of(split.path(place)) as image:
            return usual(image.convert("RGB"))

    def torchvision(place: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision 0.29: TorchCodec will decode
            return of_tensors(decode_image(split.path(place), ImageReadMode.RGB))

    return {
        "training": ours(training(), 0),
        "training with augment.draft": ours(training(draft=True), 0),
        "evaluation": ours(EvaluationTransform(Evaluation(), size), None),
        "Pillow": lambda places: list(map(pillow, places)),
        "torchvision": lambda places: list(map(torchvision, places)),
    }
