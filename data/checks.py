"""The pre-flight: what can be wrong with settings and data, found before training and without decoding images."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.values import is_number
from data.limits import limit_problems
from data.sources.form import LARGEST, MAX_CHANNELS
from data.sources.imagefolder import ImageFolder
from data.sources.part import subset_problems
from data.token_labels import LabelMaps
from data.transforms import is_size, sides

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from data.module import ImageData
    from data.sources import Split

LARGEST_SEED = 2**32 - 1  # that NumPy and Lightning take
NUMBERS = {1: "one number", 3: "three numbers"}
SHOWN = 5  # names listed in a message before it says how many more there are


def setting_problems(data: "ImageData") -> list[str]:
    """Wrong types and ranges of the module's own arguments."""
    found = []
    for name in ("num_classes", "batch_size"):
        if not _whole(getattr(data, name), 1):
            found.append(f"data.{name}: got {getattr(data, name)!r}; give a whole number from 1")
    if not is_size(data.crop_size):
        found.append(f"data.image_size: got {data.crop_size!r}; give a whole number from 1, or [height, width]")
    if not _whole(data.seed, 0) or data.seed > LARGEST_SEED:
        found.append(f"seed: got {data.seed!r}; give a whole number from 0 to {LARGEST_SEED}")
    if data.workers != "auto" and not _whole(data.workers, 0):
        found.append(f"data.workers: got {data.workers!r}; give a whole number from 0, or auto")
    found += subset_problems(data.subset)
    if data.on_error not in ("raise", "skip"):
        found.append(f"data.on_error: got {data.on_error!r}; give raise or skip")
    if not is_number(data.max_skipped, 0, 1):
        found.append(f"data.max_skipped: got {data.max_skipped!r}; give a share from 0 to 1")
    if data.token_labels is not None and not isinstance(data.token_labels, str | os.PathLike):
        found.append(f"data.token_labels: got {data.token_labels!r}; give the folder of the label maps, or null")
    if data.view is not None and data.token_labels is not None:
        found.append("data.view: got logpolar, but label maps (data.token_labels) do not follow it; set data.view=null")
    if not isinstance(data.balanced, bool):
        found.append(f"data.balanced: got {data.balanced!r}; give true or false")
    if not isinstance(data.drop_last, bool):
        found.append(f"data.drop_last: got {data.drop_last!r}; give true or false")
    if not isinstance(data.timeout, int | float) or data.timeout < 0:
        found.append(f"data.timeout: got {data.timeout!r}; give seconds, 0 to wait for ever")
    found += _form_problems(data) or _normalisation_problems(data)
    return found if found else _crop_problems(data)


def _form_problems(data: "ImageData") -> list[str]:
    """Channels and depth, and the augmentations that are made for 8-bit RGB alone."""
    form, augment, found = data.form, data.augment, []
    if not _whole(form.channels, 1) or form.channels > MAX_CHANNELS:
        found.append(f"data.channels: got {form.channels!r}; give a whole number from 1 to {MAX_CHANNELS}")
    if form.depth not in LARGEST:
        found.append(f"data.depth: got {form.depth!r}; give {', '.join(LARGEST)}")
    if found or form.plain:
        return found
    for key, value, neutral in (
        ("augment.rand_augment", augment.rand_augment, "null"),
        ("augment.color_jitter", augment.color_jitter or None, "0"),
        ("augment.draft", augment.draft or None, "false"),
        ("data.token_labels", data.token_labels, "null"),
    ):
        if value is not None:
            found.append(f"{key}: it takes 8-bit RGB images, got {form}; set {key}={neutral}")
    for key, value in (("augment", augment.interpolation), ("data.eval", data.evaluation.interpolation)):
        if value == "lanczos":
            found.append(f"{key}.interpolation: lanczos takes 8-bit RGB images, got {form}; set bicubic")
    return found


def _normalisation_problems(data: "ImageData") -> list[str]:
    """mean and std: their number, and the range of values that images have."""
    found, channels = [], data.form.channels
    wanted = NUMBERS.get(channels, f"{channels} numbers")
    for name, positive in (("mean", False), ("std", True)):
        values = getattr(data, name)
        numbers = isinstance(values, tuple) and len(values) == channels and all(map(is_number, values))
        if not numbers or (positive and min(values) <= 0):
            said = wanted.replace(" ", " positive ") if positive else wanted
            found.append(f"data.{name}: got {values!r}; give {said}, one per channel of {_scaled(data)}")
        elif data.form.depth != "float32" and (min(values) < 0 or max(values) > 1):
            largest = LARGEST[data.form.depth]
            divided = ",".join(f"{value / largest:.6g}" for value in values)
            remedy = f"divide by {largest}: data.{name}=[{divided}]" if min(values) >= 0 else "see conf/data"
            found.append(f"data.{name}: got {list(values)}, but images are scaled to 0 … 1; {remedy}")
    return found


def _scaled(data: "ImageData") -> str:
    return "images as they are" if data.form.depth == "float32" else "images scaled to 0 … 1"


def _crop_problems(data: "ImageData") -> list[str]:
    """An evaluation that sees more than there is would measure a frame of black pixels."""
    size, whole = data.evaluation.sides(data.crop_size)
    if whole[0] >= size[0] and whole[1] >= size[1]:
        return []
    return [
        f"data.eval.resize: got {data.evaluation.resize}, but the model sees {shown(size)} pixels of it; "
        f"set data.eval.resize={min(size)} or more, or null"
    ]


def trainer_problems(trainer: "pl.Trainer | None") -> list[str]:
    """Lightning would replace our samplers by padded ones, and fail at it without saying why."""
    if trainer is None or trainer.world_size == 1 or not trainer._accelerator_connector.use_distributed_sampler:
        return []
    return ["trainer.use_distributed_sampler: got true on several processes; set it to false: batches are split here"]


def data_problems(data: "ImageData", world: int, training: bool = True) -> list[str]:
    """What the source lacks for these settings, with `world` processes; evaluation needs no training images."""
    names = ("train", "val") if training else ("val",)
    try:
        splits, classes = {name: getattr(data.source, name) for name in names}, list(data.source.classes)
    except (ValueError, OSError) as error:
        return [str(error)]
    found = limit_problems(data, data.reading_processes, max(1, world // _nodes(data.trainer)))
    if len(classes) > data.num_classes:
        found.append(
            f"data.num_classes: got {data.num_classes}, but the source has {len(classes)} classes "
            f"({some(classes)}); set data.num_classes={len(classes)}"
        )
    for name, split in splits.items():
        found += _label_problems(name, split, classes)
    if 0 < len(splits["val"]) < world:
        found.append(
            f"the val split has {len(splits['val'])} image(s) for {world} processes, some of which would have none; "
            f"set trainer.devices={len(splits['val'])} or less"
        )
    return found + _training_problems(data, world) if training else found


def _nodes(trainer: "pl.Trainer | None") -> int:
    return 1 if trainer is None else trainer.num_nodes


def _training_problems(data: "ImageData", world: int) -> list[str]:
    found, images = [], len(data.source.train)
    if images > 0 and data.steps_per_epoch(world) == 0:
        found.append(
            f"data.batch_size: got {data.batch_size} on {world} process(es), {data.batch_size * world} images in all, "
            f"but the train split has {images}; set data.batch_size={max(1, images // world)} or less"
        )
    if data.balanced and np.ndim(data.source.train.labels) == 2:
        found.append("data.balanced: images have several labels, which cannot be drawn evenly; set data.balanced=false")
    return found if data.token_labels is None else found + token_label_problems(data)


def token_label_problems(data: "ImageData") -> list[str]:
    """What keeps this source and this augmentation from being trained with the label maps."""
    source = getattr(data.source, "whole", data.source)
    if not isinstance(source, ImageFolder):
        kind = type(source).__name__
        return [
            f"data.token_labels: label maps belong to image files, got {kind} as source; set data.token_labels=null"
        ]
    found = []
    for name, why in (
        ("mixup", "token labels are mixed in boxes of whole tokens (augment.cutmix)"),
        ("shift", "label maps do not follow it"),
        ("draft", "label maps are cut from the box of the whole image"),
    ):
        if value := getattr(data.augment, name):
            off = "false" if value is True else "0"
            found.append(f"augment.{name}: got {str(value).lower()}, but {why}; set augment.{name}={off}")
    return found + LabelMaps(data.token_labels, data.source.train, data.num_classes).problems()


def _label_problems(name: str, split: "Split", classes: list[str]) -> list[str]:
    if len(split) == 0:
        return [f"the {name} split has no images"]
    labels = np.asarray(split.labels)
    if labels.ndim == 2:
        return _several_label_problems(name, labels, classes)
    found = []
    if labels.min() < 0 or labels.max() >= len(classes):
        found.append(
            f"the {name} split has labels from {labels.min()} to {labels.max()}, but the {len(classes)} classes "
            f"allow 0 to {len(classes) - 1}; mend the labels, or choose a split that has them"
        )
    elif name == "train":
        empty = [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
        if empty:
            found.append(
                f"the train split has no image of {len(empty)} class(es): {some(empty)}; add images or remove them"
            )
    return found


def _several_label_problems(name: str, labels: np.ndarray, classes: list[str]) -> list[str]:
    """Of images with several labels, (images, classes)."""
    if labels.shape[1] != len(classes):
        return [f"the {name} split has labels for {labels.shape[1]} classes, but there are {len(classes)}; mend them"]
    empty = [classes[i] for i in np.flatnonzero(~labels.any(0))] if name == "train" else []
    return [f"the train split has no image of {len(empty)} class(es): {some(empty)}; add images"] if empty else []


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def shown(size: int | Sequence[int]) -> str:
    """ "32 x 48", "224"."""
    return " x ".join(map(str, dict.fromkeys(sides(size))))


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
