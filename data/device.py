"""The device stage: uint8 batches become normalised float32, mixed and erased where they already lie.

Bytes travel to the device, a quarter of what floats would take. Randomness is named by (seed, epoch, batch number,
rank), so a batch is the same whatever came before it.

Source: mixup, Zhang et al., ICLR 2018 (arXiv 1710.09412); CutMix, Yun et al., ICCV 2019 (arXiv 1905.04899); random
erasing, Zhong et al., AAAI 2020 (arXiv 1708.04896). Mixing and erasing are timm's; only the check for even batches
is gone, because one choice per batch pairs each image with its mirror position and the middle one with itself.
"""

from collections.abc import Sequence

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from conf.errors import UserError
from data.augment import Augment
from data.batch import Batch, TokenLabels
from data.order.randomness import MIX, preserved, seed_all
from data.sources.form import LARGEST
from data.token_labels import MixToken, token_targets
from data.view import LogPolar


class BatchMixup(Mixup):
    """timm's mixup and cutmix with one choice per batch, for batches of any size."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        share = self._mix_batch(x)
        if target.ndim == 2:  # several labels: each has its share
            return x, target * share + target.flip(0) * (1 - share)
        return x, mixup_target(target, self.num_classes, share, self.label_smoothing)


class DeviceStage:
    """Turns the loader's batches into what the model sees.

    Args:
        mean, std: per channel, of images scaled to 0 … 1; of float images as they are.
        augment: mixing and erasing of training batches.
        num_classes: length of soft targets.
        seed: names the randomness together with epoch, batch number and rank.
        depth: of the images that come.
        view: what is made of every image last; None for nothing.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment,
        num_classes: int,
        seed: int,
        depth: str = "uint8",
        view: LogPolar | None = None,
    ) -> None:
        self.view = view
        self.depth, self.dtype = depth, getattr(torch, depth)
        self.mean, self.std, self.augment, self.seed = tuple(mean), tuple(std), augment, seed
        self.num_classes = num_classes
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._mixup = self._mix_token = None
        if augment.mixes:
            self._mixup, self._mix_token = (
                kind(
                    mixup_alpha=augment.mixup,
                    cutmix_alpha=augment.cutmix,
                    prob=augment.mix_probability,
                    switch_prob=augment.switch_probability,
                    label_smoothing=0.0,
                    num_classes=num_classes,
                )
                for kind in (BatchMixup, MixToken)
            )

    def __call__(self, batch: Batch, training: bool, rank: int = 0, token_grid: tuple[int, int] | None = None) -> Batch:
        """Normalises; in training also makes token targets for `token_grid`, mixes and erases; then the view.

        Raises:
            ValueError: the images are not (B, channels, H, W) of the run's depth: normalised twice, nothing would
                fail but the result; or there are label maps and nobody has said for which tokens.
        """
        images = batch.images
        if images.dtype != self.dtype or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise UserError(
                f"DeviceStage: images must be {self.depth} (B, {len(self.mean)}, H, W), "
                f"got {images.dtype} {tuple(images.shape)}; leave scaling and normalisation to this stage"
            )
        batch = batch._replace(images=self._normalise(images))
        if batch.token_labels is not None:
            batch = batch._replace(token_labels=self._token_targets(batch.token_labels, token_grid))
        if training and (self._mixup or self.augment.erasing > 0):
            with preserved(images.device):
                seed_all(self.seed, MIX, batch.epoch, *(batch.named or (batch.number, rank)), device=images.device)
                batch = self._change(batch)
        return batch if self.view is None else batch._replace(images=self.view(batch.images))

    def _normalise(self, images: Tensor) -> Tensor:
        if images.device not in self._constants:
            largest = LARGEST[self.depth]
            scale = 1 / (largest * torch.tensor(self.std, dtype=torch.float64))
            offset = largest * torch.tensor(self.mean, dtype=torch.float64)
            shape = (1, -1, 1, 1)
            self._constants[images.device] = (
                offset.float().reshape(shape).to(images.device),
                scale.float().reshape(shape).to(images.device),
            )
        offset, scale = self._constants[images.device]
        return images.to(torch.float32, memory_format=torch.channels_last, copy=True).sub_(offset).mul_(scale)

    def _token_targets(self, labels: TokenLabels, grid: tuple[int, int] | None) -> Tensor:
        if grid is None:
            raise UserError(
                "DeviceStage: label maps need the grid of the model's tokens, got None; train with a task that sets "
                "the data's token_grid, as task.token_weight does, or set data.token_labels=null"
            )
        return token_targets(labels, grid, self.num_classes)

    def _change(self, batch: Batch) -> Batch:
        steps = [self._erase, self._mix]
        for step in reversed(steps) if self.augment.erase_mixed else steps:
            batch = step(batch)
        return batch

    def _erase(self, batch: Batch) -> Batch:
        if self.augment.erasing == 0:
            return batch
        erase = RandomErasing(self.augment.erasing, mode="pixel", device=batch.images.device)
        return batch._replace(images=erase(batch.images))

    def _mix(self, batch: Batch) -> Batch:
        if self._mixup is None:
            return batch
        if batch.token_labels is not None:
            return self._mix_token(batch)
        images, labels = self._mixup(batch.images, batch.labels)
        return batch._replace(images=images, labels=labels)
