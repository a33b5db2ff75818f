"""What the terminal shows while a run goes on: one live line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Throughput(Callback):
    """Logs training images per second over all processes, validation excluded, and the learning rate.

    Both only as often as the trainer logs: a number that is logged is copied to the device, which is waited for.
    """

    def __init__(self) -> None:
        self.seconds, self.images, self._start, self._window = 0.0, 0, 0.0, (0.0, 0)
        self._rate, self._warm = 0.0, False

    @property
    def images_per_second(self) -> float:
        """Mean since the first batch after the first (which warms up kernels and workers)."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._start = time.perf_counter()  # a run resumed within an epoch starts none

    def on_train_epoch_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._rate = trainer.optimizers[0].param_groups[-1]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._warm:
            self.seconds += now - self._start
            self.images += len(batch.images) * trainer.world_size
        self._start, self._warm = now, True
        if trainer.global_step % trainer.log_every_n_steps:
            return
        task.log("lr", self._rate)
        if self.seconds > self._window[0]:
            seconds, images = self._window
            rate = (self.images - images) / (self.seconds - seconds)
            self._window = (self.seconds, self.images)
            task.log("images_per_second", rate, rank_zero_only=True)

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._start = time.perf_counter()


class RunProgress(Callback):
    """Epoch, step, loss, accuracy, images per second and time left.

    Args:
        throughput: where images per second come from.
        every_seconds: pause between plain lines when the output is not a terminal.
    """

    def __init__(self, throughput: Throughput, every_seconds: float = 10.0) -> None:
        self.throughput, self.every_seconds = throughput, every_seconds
        self.console = Console(stderr=False, soft_wrap=True)
        self.live: Progress | None = None
        self._started, self._first, self._printed = 0.0, 0, 0.0
        self.seconds = 0.0
        self._note = ""

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._started = self._printed = time.perf_counter()
        self._first = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        if trainer.is_global_zero and self.console.is_terminal:
            bar = BarColumn(bar_width=24 if self._wide else 10)
            columns = [TextColumn("{task.description}"), bar, TextColumn("{task.fields[text]}")]
            self.live = Progress(*columns, console=self.console, refresh_per_second=4)
            self.live.start()
            self._bar = self.live.add_task("", total=self._total, completed=trainer.global_step, text="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.live is not None:
            # reading the loss waits for the device: only as often as it is logged
            if trainer.global_step % trainer.log_every_n_steps == 0:
                self.live.update(self._bar, text=self._describe(trainer))
            self.live.update(self._bar, description=self._epoch(trainer), completed=trainer.global_step)
        elif trainer.is_global_zero and time.perf_counter() - self._printed >= self.every_seconds:
            self._print(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.live is not None:
            self.live.update(self._bar, text=f"validating {batch_idx + 1}/{trainer.num_val_batches[0]}")

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        key, label, form = ("val/top1", "top-1", ".2%") if "val/top1" in metrics else ("val/loss", "loss", ".4f")
        parts = [f"val {label} {float(metrics[key]):{form}}"] if key in metrics else []
        if f"{key}_ema" in metrics and self._wide:
            parts.append(f"EMA {float(metrics[f'{key}_ema']):{form}}")
        self._note = "  ".join(parts)
        if self.live is not None:
            self.live.update(self._bar, text=self._describe(trainer))

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if self.live is not None:
            self.live.update(self._bar, text=self._describe(trainer), completed=trainer.global_step)
        elif trainer.is_global_zero:
            self._print(trainer)
        self.seconds = time.perf_counter() - self._started
        self._stop()

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _print(self, trainer: pl.Trainer) -> None:
        self._printed = time.perf_counter()
        print(f"{self._epoch(trainer)}  {self._describe(trainer)}", flush=True)

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        sys.stdout.flush()

    @property
    def _wide(self) -> bool:
        """Whether there is room for everything; 80 columns hold the essentials."""
        return self.live is None or self.console.width >= 110

    def _epoch(self, trainer: pl.Trainer) -> str:
        last = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        epoch = trainer.current_epoch + 1
        of = f"{min(epoch, last)}/{last}" if last else str(epoch)
        return f"epoch {of} {'' if self.live else ' '}step {trainer.global_step}/{self._total}"

    def _describe(self, trainer: pl.Trainer) -> str:
        done = trainer.global_step - self._first
        elapsed = time.perf_counter() - self._started
        steps = self._total - trainer.global_step
        left = f"ETA {duration(elapsed / done * steps)}" if done else ""  # not known before the first step is taken
        loss = trainer.callback_metrics.get("train/loss")
        shown = [f"loss {float(loss):.{4 if self._wide else 2}f}"] if loss is not None else []
        note = self._note if self._wide else self._note.removeprefix("val ")
        rate = self.throughput.images_per_second
        shown += [f"{rate:.{0 if rate >= 10 else 1}f} images/s" if rate else "", left, note]
        return ("  " if self._wide else " ").join(filter(None, shown))


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
