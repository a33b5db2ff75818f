"""One draw of the sampler becomes one sample: read, transformed, its randomness named by the draw alone.

What a user can mend leaves a loader's worker as a value, `Failed`, and is raised where the batch is asked for: an
exception that torch carries over has become a traceback in text.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from conf.errors import DataFailed, UserError
from data.batch import Batch, Sample, collate
from data.order.randomness import AUGMENT, preserved, seed_all
from data.order.sampler import Draw
from data.sources import Split
from data.sources.decode import MEND, UnreadableImage, before_decoding
from data.sources.form import RGB, Form, as_image, fitted
from data.token_labels import LabelMaps
from data.transforms import TrainTransform

log = logging.getLogger(__name__)
MEND_EVALUATED = "mend or remove the file: an evaluation without it would be of another data set"


class Skips:
    """Images that were left out, shared by all workers: each is reported once, with its path, up to a budget.

    Args:
        labels: of all images, (len,), or (len, classes) where there may be several.
        share: of the images that may be left out; a few always may (`FEW`).
        classes: their names.
    """

    FEW = 10

    def __init__(self, labels: np.ndarray, share: float, classes: Sequence[str] = ()) -> None:
        self._labels, self._classes = labels, classes
        self.budget = max(self.FEW, int(share * len(labels)))
        self._seen = torch.zeros(len(labels), dtype=torch.uint8).share_memory_()

    def report(self, index: int, error: UnreadableImage) -> None:
        """Notes an image that cannot be read.

        Raises:
            DataFailed: there are too many of them, or no image of its class can be read.
        """
        if self._seen[index]:
            return
        self._seen[index] = 1
        log.warning("left out, on_error=skip: %s", error)
        if self.count > self.budget:
            raise DataFailed(
                f"data: more images cannot be read than data.max_skipped allows, got {self.count} of "
                f"{len(self._labels)}, the last {error}; mend the data, or raise data.max_skipped"
            ) from error
        if self._labels.ndim == 1 and self._seen.numpy()[self._labels == self._labels[index]].all():
            label = int(self._labels[index])
            name = self._classes[label] if label < len(self._classes) else label
            raise DataFailed(
                f"data: no image of class {name} can be read, the last {error}; mend or remove the class"
            ) from error

    @property
    def count(self) -> int:
        """Different images left out so far."""
        return int(self._seen.sum())

    @property
    def indices(self) -> list[int]:
        """Which they are."""
        return self._seen.nonzero().flatten().tolist()


class Samples(Dataset[Sample | None]):
    """A split seen through a transform.

    Args:
        split: map-style source of (PIL image, label).
        transform: PIL image to uint8 (3, H, W), or an array of another form to (channels, H, W).
        seed: names the augmentation together with the draw; `None` for a transform without randomness.
        skips: where unreadable images are reported; `None` raises instead.
        form: of the images.
        label_maps: of the split; they take a `TrainTransform`, which says what an image shows.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Image.Image], Tensor] | TrainTransform,
        seed: int | None,
        skips: Skips | None = None,
        label_maps: LabelMaps | None = None,
        form: Form = RGB,
    ) -> None:
        self.form = form
        self.split, self.transform, self.seed, self.skips = split, transform, seed, skips
        self.label_maps, self._look = label_maps, getattr(transform, "look", None)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, draw: Draw) -> Sample | None:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample | None]:
        """All samples of a batch; the loader prefers this, and the global random state is put aside only once."""
        if self.seed is None:
            return [self._read(draw) for draw in draws]
        with preserved():
            return [self._read_seeded(draw) for draw in draws]

    def _image(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        """In the form of the run: an image for 8-bit RGB, else an array."""
        if self.form.plain:
            with before_decoding(self._look):
                image, label = self.split[index]
            return as_image(image), label
        read = getattr(self.split, "read", None)
        if read is not None:
            return read(index, self.form), self.split.labels[index]
        image, label = self.split[index]
        try:
            return fitted(image, self.form), label
        except UserError as error:
            raise UserError(
                f"ImageData: image {index} of {type(self.split).__name__} does not fit the form of the run, got "
                f"{error}; see data.channels and data.depth"
            ) from error

    def _read_seeded(self, draw: Draw) -> Sample | None:
        seed_all(self.seed, AUGMENT, draw.epoch, draw.index, draw.repeat)
        return self._read(draw)

    def _read(self, draw: Draw) -> Sample | None:
        try:
            image, label = self._image(draw.index)
        except UnreadableImage as error:
            if self.seed is None:
                raise type(error)(str(error).replace(MEND, MEND_EVALUATED)) from error
            if self.skips is None:
                raise
            self.skips.report(draw.index, error)
            return None
        if self.label_maps is None:
            return Sample(self.transform(image), label, draw)
        pixels, view = self.transform.with_view(image)
        return Sample(pixels, label, draw, self.label_maps.crop(draw.index, view))


class Failed:
    """An error on its way out of a worker, in the place of the samples or the batch that it prevented."""

    def __init__(self, error: UserError) -> None:
        self.error = error


class Carried(Dataset[Sample | None]):
    """Samples whose errors are carried."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample | None] | Failed:
        try:
            return self.samples.__getitems__(draws)
        except UserError as error:
            return Failed(error)


def collate_carried(samples: Sequence[Sample | None] | Failed) -> Batch | Failed:
    """`collate`, whose errors are carried too."""
    if isinstance(samples, Failed):
        return samples
    try:
        return collate(samples)
    except UserError as error:
        return Failed(error)


def delivered(batch: Batch | Failed) -> Batch:
    """The batch; raises the error that came in its place."""
    if isinstance(batch, Failed):
        raise batch.error
    return batch
