"""Token labels: soft classes for every token of an image, from the maps that an annotator network left on disk.

Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021
(arXiv 2104.10858). Their annotator is NFNet-F6: the 5 highest logits of each of 18 × 18 cells of the whole image.

A file per training image, `<token_labels>/<class>/<image stem>.npz`, the folders and stems those of the images:

    scores   float16 or float32 (K, h, w): logits of the K best classes of each cell, not probabilities
    classes  integers (K, h, w): which classes these are, each once in a cell

K, h and w are those of the first file throughout. A class that is not named has logit 0, as in the authors' code,
which applies the softmax after the map is resampled. One of their files becomes one of ours by
`scores, classes = torch.load(file).numpy()` and `numpy.savez(out, scores=scores, classes=classes.astype("int16"))`.

Maps follow the crop and the mirror of the image. They do not follow the rotations, shears and translations of
RandAugment; the authors' maps do, and they augment before they crop. The authors hand (row, column) to RoIAlign, which
reads (x, y); here it gets the box that the image shows.
"""

import os

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from torch import Tensor
from torchvision.ops import roi_align

from conf.errors import UserError
from conf.files import opened
from data.batch import Batch, TokenLabels
from data.sources.imagefolder import FolderSplit
from data.transforms import View

MAX_BYTES = 64 * 2**20  # of a map, unpacked
CHECKED = 3  # files that are read before training


class UnreadableTokenLabels(UserError):
    """A label map that is missing or not what the module describes; the message names its file."""


class LabelMaps:
    """The label maps of a split.

    Args:
        folder: holds the class folders.
        split: the images.
        num_classes: above all class ids in the maps.
    """

    def __init__(self, folder: str | os.PathLike, split: FolderSplit, num_classes: int) -> None:
        self.folder, self.split, self.num_classes = folder, split, num_classes
        self._shape: tuple[int, ...] | None = None  # of the first file, read when first needed

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.path.splitext(self.split.relative_path(index))[0] + ".npz")

    def problems(self) -> list[str]:
        """What is wrong with the folder, or with the first of the first few maps that cannot be used."""
        if not os.path.isdir(self.folder):
            return [f"data.token_labels: no folder, got {self.folder}; set it to that of the label maps, or to null"]
        try:
            for index in range(min(CHECKED, len(self.split))):
                self.read(index)
        except UnreadableTokenLabels as error:
            return [str(error)]
        return []

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and classes (K, h, w) of an image.

        Raises:
            UnreadableTokenLabels: the file is missing, damaged, of another shape than the first one, or holds something
                else than finite scores of different classes below `num_classes`.
        """
        path = self.path(index)
        try:
            with opened(path) as stream, np.load(stream, allow_pickle=False) as file:
                if (size := sum(member.file_size for member in file.zip.infolist())) > MAX_BYTES:
                    raise ValueError(f"{size} bytes unpacked, a map has a few thousand")
                scores, classes = file["scores"], file["classes"]
        except Exception as error:  # NumPy raises whatever a broken file makes it stumble on
            why = getattr(error, "strerror", None) or str(error).partition(". ")[0]  # not the path again
            raise _unreadable("no readable label map", f"{path} ({type(error).__name__}: {why})") from error
        if problem := self._problem(scores, classes):
            raise _unreadable(problem, path)
        if self._shape is None:
            self._shape = scores.shape if index == 0 else self.read(0)[0].shape
        if scores.shape != self._shape:
            raise _unreadable(f"maps must be as the first one, {self._shape}, not {scores.shape}", path)
        return scores, classes

    def _problem(self, scores: np.ndarray, classes: np.ndarray) -> str | None:
        if scores.ndim != 3 or scores.shape != classes.shape or 0 in scores.shape:
            return f"scores and classes must be (K, h, w), not {scores.shape} and {classes.shape}"
        if scores.dtype not in (np.float16, np.float32) or classes.dtype.kind not in "iu":
            return f"scores must be float16 or float32 and classes integers, not {scores.dtype} and {classes.dtype}"
        if not np.isfinite(scores).all():
            return "scores must be finite"
        if classes.min() < 0 or classes.max() >= self.num_classes:
            return f"class ids must be from 0 to {self.num_classes - 1}, not {classes.min()} to {classes.max()}"
        ordered = np.sort(classes, axis=0)
        if (ordered[1:] == ordered[:-1]).any():
            return "a cell must name each class once"
        return None

    def crop(self, index: int, view: View) -> TokenLabels:
        """The map of an image with the part of it that a view shows. Raises as `read` does."""
        scores, classes = self.read(index)
        left, top, right, bottom = view.box
        if view.mirrored:
            scores, classes, left, right = scores[..., ::-1], classes[..., ::-1], 1 - right, 1 - left
        return TokenLabels(
            torch.from_numpy(scores.astype(np.float32)),
            torch.from_numpy(classes.astype(np.int32)),
            torch.tensor([left, top, right, bottom], dtype=torch.float32),
        )


def _unreadable(problem: str, got: str) -> UnreadableTokenLabels:
    return UnreadableTokenLabels(
        f"token labels: {problem}, got {got}; mend the file, or set data.token_labels=null to train without them"
    )


def token_targets(labels: TokenLabels, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Distributions (B, rows, columns, num_classes) for the tokens of `grid`: RoIAlign of logits, then softmax."""
    scores_BKhw, classes_BKhw, boxes_B4 = labels
    batch, _, height, width = scores_BKhw.shape
    maps = scores_BKhw.new_zeros(batch, num_classes, height, width).scatter_(1, classes_BKhw.long(), scores_BKhw)
    corners = boxes_B4 * boxes_B4.new_tensor([width, height, width, height])
    numbers = torch.arange(batch, device=corners.device, dtype=corners.dtype)[:, None]
    logits = roi_align(maps, torch.cat([numbers, corners], 1), grid, aligned=True)
    return logits.permute(0, 2, 3, 1).softmax(-1)


class MixToken(Mixup):
    """CutMix whose box consists of whole tokens: each token has the target of one image.

    The box is timm's, drawn on the grid of tokens; LV-ViT draws it there too and mixes patch embeddings, not pixels.
    """

    def __call__(self, batch: Batch) -> Batch:
        """Mixes images, labels (which become soft) and token targets, in place, with the batch in reverse order."""
        images, targets = batch.images, batch.token_labels
        grid = targets.shape[1:3]
        share, _ = self._params_per_batch()
        if share < 1:
            (top, bottom, left, right), share = cutmix_bbox_and_lam(grid, share)
            rows, columns = (pixels // cells for pixels, cells in zip(images.shape[-2:], grid, strict=True))
            box = (..., slice(top * rows, bottom * rows), slice(left * columns, right * columns))
            images[box] = images.flip(0)[box]
            targets[:, top:bottom, left:right] = targets.flip(0)[:, top:bottom, left:right]
        return batch._replace(labels=mixup_target(batch.labels, self.num_classes, share))
