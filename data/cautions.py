"""What is allowed but seldom meant, said before the first step: small inputs for large photos, images left out.

Only the headers of a few image files are read.
"""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.sources.formats import image_of
from data.transforms import sides

if TYPE_CHECKING:
    from data.module import ImageData
    from data.sources import Split

HEADERS = 20  # image files whose sizes are looked at
MUCH, SMALL = 3, 112  # times the model's input, where that is at most so many pixels


def cautions(data: "ImageData", world: int = 1) -> list[str]:
    """One sentence for each; `world` is the number of processes."""
    found = [_of_size(data), _of_left_out(data, world), _of_one_class(data)]
    return [f"warning: {sentence}" for sentence in found if sentence]


def sizes_of(split: "Split", count: int = HEADERS) -> np.ndarray:
    """Width and height (n, 2) of images spread over the split, as their headers say; none where there are no files."""
    path = getattr(split, "path", None)
    if path is None or len(split) == 0:
        return np.zeros((0, 2), int)
    found = []
    for index in np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)):
        try:
            with image_of(path(int(index))) as image:
                found.append(image.size)
        except (OSError, ValueError, Image.DecompressionBombError):  # reading it in earnest says what is wrong
            continue
    return np.array(found, int).reshape(-1, 2)


def _of_size(data: "ImageData") -> str | None:
    size, found = sides(data.crop_size), sizes_of(data.source.train)
    if max(size) > SMALL or len(found) == 0:
        return None
    width, height = np.median(found, axis=0).astype(int)
    if min(width, height) < MUCH * max(size):
        return None
    seen = " x ".join(map(str, dict.fromkeys(size)))
    return (
        f"the images are about {width} x {height} pixels, the model sees {seen}; choose a model for photos, such as "
        "model=pvt_v2_b0, vit_tiny or swin_tiny (224 pixels), or set image_size"
    )


def _of_left_out(data: "ImageData", world: int) -> str | None:
    """Images of an epoch that make no full batch; repeated augmentation leaves out most of them anyway."""
    if data.augment.repeated > 1:
        return None
    images, batch = len(data.source.train), data.batch_size * world
    rest = images % batch
    if rest == 0 or not (data.drop_last or rest < world):
        return None
    return (
        f"{rest} of {images} training images are left out of every epoch, others each time, because they fill no batch "
        f"of {batch}; data.drop_last=false takes them in"
    )


def _of_one_class(data: "ImageData") -> str | None:
    labels, classes = np.asarray(data.source.val.labels), list(data.source.classes)
    if labels.ndim != 1 or len(classes) < 2 or len(np.unique(labels)) > 1:
        return None
    return (
        f"all images for validation are of one class, {classes[labels[0]]}: a model that always says so would be "
        "perfect; hold out some of every class"
    )
