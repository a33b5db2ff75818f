"""Whether a generated image shows the class that was asked for: a small classifier of real images says.

It is trained here on the training images, judged on the validation images, and never sees a generated one before it
is asked. It tells whether samples look like their class, not how varied or sharp they are.

Shapes: n = images, K = classes, S = side of what it looks at.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as image

SIDE = 32  # pixels, to which every image is resized
IMAGES = 50_000  # of the training images at most, evenly spread
STEPS, BATCH, RATE = 250, 64, 3e-3


class Recogniser:
    """Three convolutions, trained when it is made; seconds for small images.

    Args:
        source: of real images: `train` and `val` give pairs of a PIL image and a label.
        num_classes: K.
        size: side of the images that will be judged; the real ones are resized to it first.

    Attributes:
        top1: its share of right answers on the validation images.
    """

    def __init__(self, source: Any, num_classes: int, size: int) -> None:
        # a validation, where samples may be made, computes no gradients otherwise
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            images, labels = _real(source.train, size)
            self.network = _train(images, labels, num_classes)
        images, labels = _real(source.val, size)
        self.top1 = self.share(images, labels.tolist())

    @torch.no_grad()
    def share(self, images: Tensor, labels: Sequence[int]) -> float:
        """The share of images uint8 (n, 3, H, W) that it takes for their labels."""
        found = torch.cat([self.network(_seen(part)).argmax(1) for part in images.split(500)])
        return float((found == torch.tensor(labels)).double().mean())


def _seen(images: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) → -1 … 1 (n, 3, S, S)."""
    x = images.float() / 127.5 - 1
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True) if x.shape[-2:] != (SIDE, SIDE) else x


def _real(split: Any, size: int) -> tuple[Tensor, Tensor]:
    """Real images uint8 (n, 3, S, S), prepared as generated ones, and their labels (n,)."""
    numbers = np.linspace(0, len(split) - 1, min(len(split), IMAGES)).round().astype(int)
    images, labels = [], []
    for number in numbers.tolist():
        picture, label = split[number]
        picture = image.center_crop(image.resize(picture.convert("RGB"), [size]), [size, size])
        seen = _seen(image.pil_to_tensor(picture)[None])[0]
        images.append(((seen + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def _train(images: Tensor, labels: Tensor, num_classes: int) -> nn.Module:
    network = nn.Sequential(*_layer(3, 24), *_layer(24, 48), *_layer(48, 96), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    network.append(nn.Linear(4 * 96, num_classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(network(_seen(images[chosen])), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def _layer(dim_in: int, dim: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(dim_in, dim, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
