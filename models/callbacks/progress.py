"""What the terminal shows while a run goes on: a line per epoch that stays, and on a terminal a live one below."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from models.callbacks.throughput import MIB, Throughput, peak_memory
from models.side_outputs import attempt

LIVE = "the live line of the terminal"
WAITING = 0.2  # share of waiting for data above which the remedy is said
ENOUGH = 5.0  # seconds of training before that: the first batches wait for workers to start


class RunProgress(Callback):
    """Epoch, step, loss, accuracy, images per second and time left; after each epoch also what it cost.

    Args:
        throughput: where images per second come from.
        cores: how many this process may use, for the remedy against waiting for data.
        every_seconds: pause between plain lines when the output is not a terminal.
    """

    def __init__(self, throughput: Throughput, cores: int = 1, every_seconds: float = 10.0) -> None:
        self.throughput, self.cores, self.every_seconds = throughput, cores, every_seconds
        self.console = Console(stderr=False, soft_wrap=True)
        self.live: Progress | None = None
        self._started, self._first, self._printed = 0.0, 0, 0.0
        self.seconds = 0.0
        self._note, self._lined = "", -1  # the last validation in words; the step of the last line of an epoch
        self._epoch_start, self._mark, self._advised = 0.0, (0.0, 0, 0.0), False

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._started = self._printed = time.perf_counter()
        self._first = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        self._begin_epoch()
        if trainer.is_global_zero and self.console.is_terminal:
            bar = BarColumn(bar_width=24 if self._wide else 10)
            columns = [TextColumn("{task.description}"), bar, TextColumn("{task.fields[text]}")]
            live = Progress(*columns, console=self.console, refresh_per_second=4)
            self._bar = live.add_task("", total=self._total, completed=trainer.global_step, text="")
            if attempt(LIVE, live.start):
                self.live = live

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.live is not None:
            # reading the loss waits for the device: only as often as it is logged
            if trainer.global_step % trainer.log_every_n_steps == 0:
                self._show(text=self._describe(trainer))
            self._show(description=self._epoch(trainer), completed=trainer.global_step)
        elif trainer.is_global_zero and time.perf_counter() - self._printed >= self.every_seconds:
            self._print(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.live is not None:
            self._show(text=f"validating {batch_idx + 1}/{trainer.num_val_batches[0]}")

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        key, label, form = ("val/top1", "top-1", ".2%") if "val/top1" in metrics else ("val/loss", "loss", ".4f")
        parts = [f"val {label} {float(metrics[key]):{form}}"] if key in metrics else []
        if f"{key}_ema" in metrics and self._wide:
            parts.append(f"EMA {float(metrics[f'{key}_ema']):{form}}")
        self._note = "  ".join(parts)
        if self.live is not None:
            self._show(text=self._describe(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._line(trainer, task)

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.is_global_zero and self._lined != trainer.global_step:
            self._line(trainer, task)
        if self.live is not None:
            self._show(text=self._describe(trainer), completed=trainer.global_step)
        self.seconds = time.perf_counter() - self._started
        self._stop()

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _line(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        """What this epoch reached and what it cost, in one line that stays."""
        seconds, images, waited = self.throughput.total
        taken, wait = seconds - self._mark[0], waited - self._mark[2]
        shown = [self._epoch(trainer), *self._figures(trainer)]
        if taken > 0:
            shown.append(f"{_rate((images - self._mark[1]) / taken)} images/s")
            shown += [f"data wait {wait / taken:.0%}"] if self.throughput.measured else []
        if self.throughput.grad_norm is not None:
            shown.append(f"grad norm {float(self.throughput.grad_norm):.3g}")
        shown += [
            f"memory {peak_memory(task.device) / MIB:,.0f} MiB",
            duration(time.perf_counter() - self._epoch_start),
        ]
        print("  ".join(filter(None, shown)), flush=True)
        if not self._advised and taken > ENOUGH and wait / taken > WAITING:
            self._advised = True
            print(remedy(wait / taken, trainer.train_dataloader.num_workers, self.cores), flush=True)
        self._lined = trainer.global_step
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._printed = self._epoch_start = time.perf_counter()
        self._mark = self.throughput.total

    def _print(self, trainer: pl.Trainer) -> None:
        self._printed = time.perf_counter()
        print(f"{self._epoch(trainer)}  {self._describe(trainer)}", flush=True)

    def _show(self, **fields: Any) -> None:
        """Changes the live line; where that fails, plain lines take its place."""
        if self.live is not None and not attempt(LIVE, self.live.update, self._bar, **fields):
            attempt(LIVE, self.live.stop)
            self.live = None

    def _stop(self) -> None:
        if self.live is not None:
            self._show(visible=False)  # the lines of the epochs stay
        if self.live is not None:
            attempt(LIVE, self.live.stop)
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
        rate = self.throughput.images_per_second
        loss, note = self._figures(trainer)
        shown = [loss, f"{_rate(rate)} images/s" if rate else "", left, note]
        return ("  " if self._wide else " ").join(filter(None, shown))

    def _figures(self, trainer: pl.Trainer) -> tuple[str, str]:
        """Loss and last validation in words."""
        loss = trainer.callback_metrics.get("train/loss")
        note = self._note if self._wide else self._note.removeprefix("val ")
        return f"loss {float(loss):.{4 if self._wide else 2}f}" if loss is not None else "", note


def remedy(share: float, workers: int, cores: int) -> str:
    """What to do about waiting for data."""
    text = f"training waits for data {share:.0%} of the time with data.workers={workers}"
    if workers < cores:
        return (
            f"{text}; set data.workers={min(cores, 8 if workers < 8 else cores)}, or use smaller files, a faster disk"
        )
    return f"{text}, and there are {cores} cores; use smaller image files, a faster disk, or a cheaper augment="


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:.{0 if images_per_second >= 10 else 1}f}"


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
