"""Data modules: what a run reads, and how it becomes batches on the device.

    sources/*        where images come from: map-style splits of (PIL image, label)
    augment.py       what training may change about an image (plain values from `conf/augment/*.yaml`)
    transforms.py    PIL image -> uint8 tensor, on the CPU, in the loader's workers
    order/*          which images make which batch: a pure function of the seed and the epoch
    token_labels.py  label maps beside the images, cropped with them and resampled to a model's tokens
    dataset.py       one draw of the sampler -> one sample, its augmentation seeded by the draw alone
    device.py        uint8 -> normalised float, mixup, cutmix and random erasing, where the images are
    view.py          what is made of a whole image last: a foveated view
    module.py        `ImageData`, the Lightning data module that puts these together

This file imports nothing heavy: a command line that only composes does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from conf import moved

if TYPE_CHECKING:
    from data.batch import Batch

__all__ = ["Batch"]

moved.install()


def __getattr__(name: str) -> Any:
    if name == "Batch":
        from data.batch import Batch

        return Batch
    raise AttributeError(f"module 'data' has no attribute {name!r}")
