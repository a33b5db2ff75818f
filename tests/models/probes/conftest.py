"""A small ViT that knows the digits, for what is decided on real images."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sources.digits import Digits
from models import create_model

STEPS, BATCH = 400, 64


@pytest.fixture(scope="session")
def digits_vit() -> tuple[nn.Module, Tensor, Tensor]:
    """The model, in evaluation mode, and images (B, 3, 16, 16) and labels (B,) that it has not seen."""
    source, generator = Digits(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = create_model("vit_32px", image_size=16, patch_size=4, dim=48, depth=3, num_heads=4, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    images, labels = _tensors(source.train)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), *_tensors(source.val)


def _tensors(split) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(split.pixels).float()[:, None] / 127.5 - 1
    images = F.interpolate(pixels, scale_factor=2, mode="bilinear").expand(-1, 3, -1, -1)
    return images, torch.from_numpy(split.labels)
