"""Where the time of a training step goes: operators by their time, and a trace of a few steps."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from conf.names import short
from conf.values import whole
from models.side_outputs import attempt, put

FIX = "give whole numbers of steps"


class Profile(Callback):
    """Records some training steps after others, then writes `profile.txt` and `profile-trace.json` beside train.log.

    Args:
        after: steps before the first that counts, in which kernels are compiled and workers start.
        steps: how many are recorded; those after them are not slowed down.
        rows: operators in the table.
    """

    def __init__(self, after: int = 5, steps: int = 5, rows: int = 30) -> None:
        self.after = whole("Profile", "after", after, 1, fix=FIX)
        self.steps, self.rows = (
            whole("Profile", name, value, fix=FIX) for name, value in (("steps", steps), ("rows", rows))
        )
        self._profile: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        activities = [ProfilerActivity.CPU]
        if pl_module.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=self.after - 1, warmup=1, active=self.steps, repeat=1)
        self._folder, self._cuda = Path(trainer.default_root_dir), pl_module.device.type == "cuda"
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._record)
        self._profile.start()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        if self._profile is not None:
            self._profile.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        attempt("profile.txt", self._stop)  # what saves the last step comes after it

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _record(self, found: profile) -> None:
        attempt("profile.txt", self._write, found)

    def _write(self, found: profile) -> None:
        by = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=self.rows, max_name_column_width=60)
        put(self._folder / "profile.txt", f"{self.steps} training steps\n{table}\n")
        found.export_chrome_trace(str(self._folder / "profile-trace.json"))
        total = table.strip().splitlines()[-1]
        where = short(self._folder / "profile.txt")
        print(f"profile: {where} ({total}); profile-trace.json beside it opens in ui.perfetto.dev", flush=True)
