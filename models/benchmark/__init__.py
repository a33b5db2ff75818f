"""What `python -m kernels.bench --model ...` times: whole steps of a model on inputs that are made on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models import create_model
from models.cost import example_inputs
from models.factory import compose_model

AUXILIARY_WEIGHT = 0.01


class Steps:
    """A model with random weights, its optimizer, and one batch of random images and labels, or of noisy latents.

    Args:
        name, attention: as in `models.create_model`.
        batch: images per step.
        image_size: pixels; None for the model's own.
        device: "cuda" or "cpu". Both compute in bfloat16 by autocast.

    `network` is what the steps call: the model, or what `torch.compile` made of it.
    """

    def __init__(self, name: str, attention: str | None, batch: int, image_size: int | None, device: str) -> None:
        size = image_size or compose_model(name, attention).image_size
        with torch.device(device):
            self.model = create_model(name, attention, image_size=size)
        self.network, self.device, self.batch, self.image_size = self.model, device, batch, size
        self.inputs = example_inputs(self.model, (size, size), batch)
        generates = getattr(self.model, "generates", False)
        self.error = F.mse_loss if generates else F.cross_entropy
        self.wanted = torch.randn_like(self.inputs[0]) if generates else torch.randint(1000, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def training(self) -> None:
        """Forward, cross entropy (or the error of predicted noise) and auxiliary losses, backward, AdamW."""
        self.model.train()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def inference(self) -> Tensor:
        self.model.eval()
        with torch.autocast(self.device, torch.bfloat16):
            return self.network(*self.inputs)

    def loss(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            output, losses = self.network(*self.inputs, return_losses=True)
        if output.dim() == 4:  # the channels of a variance come after those of the noise
            output = output[:, : self.wanted.shape[1]]
        loss = self.error(output.float(), self.wanted)
        return loss + AUXILIARY_WEIGHT * sum(layers_L.mean() for layers_L in losses.values())
