"""Image generation: a class-conditional diffusion model that learns what noise was added to an image.

Source: DDPM, Ho et al., arXiv:2006.11239; DiT, Peebles & Xie, ICCV 2023, arXiv:2212.09748, whose losses, schedule and
sampling these are; see `models.diffusion`.

Shapes: B = batch, Z = channels that the model sees, h w = its map, T = timesteps.
"""

from operator import methodcaller
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from conf.errors import UserError
from models.diffusion import Noise, linear_diffusion, training_losses
from models.diffusion.latents import latents_of
from models.diffusion.samples import PICTURE, Sampling, Score, Studio
from models.tasks.base import Task

MIDDLE = 0.6180339887498949  # multiples of it, without their whole part, fill 0 … 1 evenly however many there are


class Generation(Task):
    """The error of the predicted noise, and the variational bound of the predicted variances, at uniform timesteps.

    Args:
        model: `model(latents (B, Z, h, w), timesteps (B,), labels (B,), return_losses=True) -> (prediction, losses)`;
            its attributes `latent_stride`, `in_channels`, `num_classes`, `class_dropout` say what it works on.
        optimizer, schedule, auxiliary, gradient_checkpointing, compile: see `models.tasks.base.Task`.
        num_classes: of the data.
        autoencoder: None for pixels, or a folder in diffusers' format whose latents are learned.
        diffusion_steps: T.
        sampling: how samples are made, see `models.diffusion.samples.Sampling`.
        score: how samples are judged, see `models.diffusion.samples.Score`.
        sample_every_n_epochs: make samples during training too, after the validation of such an epoch; None for the
            end only.
        seed: names the noise of validation.
        match: what the layers of another model did is to be matched (`models.tasks.matching`); None for none.

    Validation measures the loss with noise and timesteps that belong to the images, so that epochs, raw and averaged
    weights, and numbers of processes are compared on the same ones.

    Raises:
        ValueError: a setting out of range, or a model that does not generate.
    """

    pictures = (PICTURE,)

    def __init__(
        self,
        model: nn.Module,
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        num_classes: int,
        *,
        sampling: dict[str, Any],
        score: dict[str, Any] | None = None,
        autoencoder: str | None = None,
        diffusion_steps: int = 1000,
        sample_every_n_epochs: int | None = None,
        seed: int = 0,
        auxiliary: dict[str, dict[str, Any]] | None = None,
        match: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        check_generates(model, num_classes)
        shared = {"auxiliary": auxiliary, "match": match, "compile": compile}
        shared["gradient_checkpointing"] = gradient_checkpointing
        diffusion = linear_diffusion(diffusion_steps)
        latents = latents_of(autoencoder, model)
        settings = Sampling.build(sampling, diffusion, model)
        score = Score.build(score)
        if sample_every_n_epochs is not None and (type(sample_every_n_epochs) is not int or sample_every_n_epochs < 1):
            raise UserError(
                "task: sample_every_n_epochs must be a whole number of at least 1, or null for the end only, "
                f"got {sample_every_n_epochs!r}; set task.sample_every_n_epochs"
            )
        super().__init__(model, optimizer, schedule, metrics=_metrics, **shared)
        self.diffusion, self.latents, self.seed = diffusion, latents, seed
        self.sample_every_n_epochs = sample_every_n_epochs
        self.studio = Studio(diffusion, latents, settings, score)
        self._sampled = -1  # the step of the last samples

    def prepare(self, data: pl.LightningDataModule) -> None:
        check_images(data)
        if self.matching is not None and self.model.training:
            self.matching.prepare(self.model, data, self.model.num_classes)

    def on_fit_start(self) -> None:
        self.latents.to(self.device)

    on_validation_start = on_fit_start

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        size = len(batch.images)
        x0 = self.latents.encode(batch.images, torch.randn_like)
        step_B = torch.randint(len(self.diffusion), (size,), device=x0.device)
        noise, apart = torch.randn_like(x0), None
        if self.matching is None:
            prediction, losses, noise, x = self._predict(self.model, x0, step_B, batch.labels, noise)
        else:
            x, labels = self.diffusion.noised(x0, step_B, noise), self.model.dropped(batch.labels)  # alike for both
            given = x, self.diffusion.timesteps[step_B], labels
            predict = methodcaller("__call__", *given, return_losses=True, drop=False)
            prediction, losses, apart = self.matched(predict, size)
            if prediction is None:
                return apart
        parts = training_losses(self.diffusion, prediction, x0, x, step_B, noise)
        means = {name: part.mean() for name, part in parts.items()}
        loss = sum(means.values())
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        for name, value in means.items():
            self.log(f"train/{name}", value.detach(), batch_size=size)
        loss = loss if apart is None else self.matching.own * loss + apart
        return loss + self.auxiliary_loss(losses, size)

    def measure(self, weights: str, model: nn.Module, batch: Any) -> None:
        x0, step_B, noise = self._draws(batch)
        prediction, _, noise_B, x = self._predict(model, x0, step_B, batch.labels, noise)
        parts = training_losses(self.diffusion, prediction, x0, x, step_B, noise_B)
        self.metrics[weights]["loss"].update(sum(parts.values()))

    @torch.no_grad()
    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Latents with the noise of validation on them, timesteps and labels."""
        x0, step_B, noise = self._draws(batch)
        return self.diffusion.noised(x0, step_B, noise), self.diffusion.timesteps[step_B], batch.labels

    def _draws(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, timesteps and noise that belong to the images."""
        noise = Noise(self.seed, batch.indices.tolist(), (self.model.in_channels, *self._map(batch.images)))
        device = batch.images.device
        x0 = self.latents.encode(batch.images, lambda mean: noise().to(device))
        step_B = ((batch.indices + 1).double() * MIDDLE % 1 * len(self.diffusion)).long()
        return x0, step_B, noise().to(device)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        every = self.sample_every_n_epochs
        if every and self.trainer.state.fn == "fit" and (self.trainer.current_epoch + 1) % every == 0:
            self._sampled = self.trainer.global_step
            self.final_figures = self._samples()
            for name, value in self.final_figures.items():
                self.log(name, value, rank_zero_only=True)

    def on_train_end(self) -> None:
        if self._sampled == self.trainer.global_step:
            return
        self.final_figures = self._samples()
        for logger in self.loggers if self.final_figures else ():
            logger.log_metrics(self.final_figures, step=self.trainer.global_step)

    def _samples(self) -> dict[str, float]:
        """Draws and scores samples on the first process, and writes the picture into the folder of the run."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return {}
        print(f"making samples: {self.studio.sampling}", flush=True)
        models = {"": self.model} | ({"_ema": self.ema_model} if self.ema_model is not None else {})
        with self.trainer.precision_plugin.forward_context():
            return self.studio.show(models, self.trainer.datamodule, self.trainer.default_root_dir, self.loggers)

    def _map(self, images: Tensor) -> tuple[int, int]:
        return tuple(side // self.model.latent_stride for side in images.shape[2:])

    def _predict(
        self, model: nn.Module, x0: Tensor, step_B: Tensor, labels_B: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """The prediction for x0 with noise on it, (B, Z, h, w), its auxiliary losses, that noise, and what was seen."""
        x = self.diffusion.noised(x0, step_B, noise)
        prediction, losses = model(x, self.diffusion.timesteps[step_B], labels_B, return_losses=True)
        return prediction, losses, noise, x


def check_generates(model: nn.Module, num_classes: int) -> None:
    """Refuses a model of another task, or for other classes.

    Raises:
        ValueError: it is one.
    """
    if not getattr(model, "generates", False):
        raise UserError(
            f"task: generation needs a model that predicts noise, got {type(model).__name__}; "
            "choose model=dit_s_2 or moh_dit_s_2, or task=classification"
        )
    if model.num_classes != num_classes:
        raise UserError(
            f"task: the model must know the classes of the data, got {model.num_classes} for {num_classes}; "
            f"set model.num_classes={num_classes}"
        )


def check_images(data: Any) -> None:
    """Refuses data whose images are not in -1 … 1, or have no single class.

    Raises:
        ValueError: naming the settings.
    """
    if set(data.mean) != {0.5} or set(data.std) != {0.5}:
        raise UserError(
            f"task: generation works on images in -1 … 1, got data.mean={list(data.mean)} data.std={list(data.std)}; "
            "set data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]"
        )
    if (getattr(data, "channels", 3), getattr(data, "depth", "uint8")) != (3, "uint8"):
        raise UserError(
            f"task: generation works on 8-bit RGB images, got data.channels={data.channels} data.depth={data.depth}; "
            "set data.channels=3 data.depth=uint8"
        )
    if data.augment.mixes:
        raise UserError(
            f"task: generation needs one class per image, got augment.mixup={data.augment.mixup} "
            f"augment.cutmix={data.augment.cutmix}; set both to 0"
        )


def _metrics() -> nn.ModuleDict:
    return nn.ModuleDict({"loss": MeanMetric(nan_strategy="disable")})
