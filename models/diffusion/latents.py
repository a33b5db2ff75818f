"""What a diffusion model sees of an image, and back: its pixels, means of them, or the latents of an autoencoder.

Source: latent diffusion, Rombach et al., CVPR 2022, arXiv:2112.10752; the autoencoders of Stable Diffusion, which DiT
uses, have a stride of 8, 4 channels and a scaling factor of 0.18215 (in their config.json).

Shapes: B = batch, Z = channels that the model sees, h w = its map, H W = the image. Images are in -1 … 1.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError

LOADING = {"use_safetensors": True, "low_cpu_mem_usage": False}  # no pickle; the other way needs one more package


class Pixels:
    """The image itself, or where the model has a stride the means of its blocks; as one grey channel if it has one.

    Args:
        channels: of the model: 3, or 1 for the mean of the three.
        stride: side of the blocks in pixels, 1 for every pixel.
    """

    clip = True  # of what a chain predicts: pixels are in -1 … 1

    def __init__(self, channels: int, stride: int = 1) -> None:
        self.channels, self.stride = channels, stride

    def to(self, device: torch.device) -> "Pixels":
        return self

    def encode(self, images: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Images (B, 3, H, W) → (B, Z, h, w); `noise` is not used."""
        x = images.mean(1, keepdim=True) if self.channels == 1 else images.contiguous()
        return x if self.stride == 1 else F.avg_pool2d(x, self.stride)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, Z, h, w) → images (B, 3, H, W), enlarged by bicubic interpolation."""
        x = latents.expand(-1, 3, -1, -1) if self.channels == 1 else latents
        return x if self.stride == 1 else F.interpolate(x, scale_factor=self.stride, mode="bicubic")


class Autoencoder:
    """The variational autoencoder of a folder in diffusers' format; it is never trained, and in no checkpoint.

    Raises:
        ValueError: the folder holds none, or one with other latents than the model works on.
    """

    clip = False

    def __init__(self, folder: str, model: nn.Module) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise UserError(
                f"task: autoencoder must be a folder in diffusers' format, with a config.json, got {folder}; "
                "set task.autoencoder"
            )
        from diffusers import AutoencoderKL  # seconds, which a run on pixels need not wait for

        try:
            self.network = AutoencoderKL.from_pretrained(folder, local_files_only=True, **LOADING)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"task: the autoencoder cannot be read, got {folder}: {text}; give another") from error
        self.network.eval().requires_grad_(False)
        self.scale, self.shift = self.network.config.scaling_factor, self.network.config.shift_factor or 0.0
        stride, channels = 2 ** (len(self.network.config.block_out_channels) - 1), self.network.config.latent_channels
        if (stride, channels) != (model.latent_stride, model.in_channels):
            raise UserError(
                f"task: the autoencoder has latents of stride {stride} with {channels} channels, the model works on "
                f"latent_stride={model.latent_stride}, in_channels={model.in_channels}; "
                f"set model.latent_stride={stride} model.in_channels={channels}, or another task.autoencoder"
            )

    def to(self, device: torch.device) -> "Autoencoder":
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Images (B, 3, H, W) → latents (B, Z, h, w), drawn from the posterior with `noise(mean)`."""
        posterior = self.network.encode(images.contiguous()).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        return (mean + deviation * noise(mean) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, Z, h, w) → images (B, 3, H, W), not clamped."""
        return self.network.decode(latents / self.scale + self.shift).sample.float()


def latents_of(folder: str | None, model: nn.Module) -> Pixels | Autoencoder:
    """What `model` (its `latent_stride` and `in_channels`) works on.

    Raises:
        ValueError: a model of latents without an autoencoder, or one of pixels with one.
    """
    works = f"(latent_stride={model.latent_stride}, in_channels={model.in_channels})"
    if folder is None and model.in_channels not in (1, 3):
        raise UserError(
            f"task: the model works on the latents of an autoencoder {works}, got task.autoencoder=null; give a folder "
            "of one in diffusers' format, or for pixels model.latent_stride=1 model.in_channels=3"
        )
    if folder is not None and model.latent_stride == 1:
        raise UserError(
            f"task: the model works on pixels {works}, got task.autoencoder={folder}; "
            "set task.autoencoder=null, or for latents model.latent_stride=8 model.in_channels=4"
        )
    return Pixels(model.in_channels, model.latent_stride) if folder is None else Autoencoder(folder, model)
