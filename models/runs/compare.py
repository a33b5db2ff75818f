"""The table that ends a sweep (`-m`): one line per run, best first; also as runs.csv in the folder of the sweep."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

COLUMNS = {
    "val/top1": "top-1",
    "val/top1_ema": "EMA",
    "val/loss": "loss",
    "val/recognised_ema": "recognised, EMA",
    "routing/active": "active heads",
    "parameters": "parameters",
    "images_per_second": "images/s",
    "seconds": "seconds",
}


class CompareRuns(Callback):
    """Collects the metrics.json of every job and prints them side by side, named by what differs between them."""

    def __init__(self) -> None:
        self.jobs: list[tuple[list[str], Path]] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        hydra = job_return.hydra_cfg.hydra
        overrides = [override.lstrip("+") for override in hydra.overrides.task]
        self.jobs.append((overrides, Path(hydra.runtime.output_dir)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        from models.runs.report import shown
        from models.runs.sweep import draw_active_heads, write_table

        common = set.intersection(*(set(overrides) for overrides, _ in self.jobs)) if len(self.jobs) > 1 else set()
        names = [" ".join(o for o in overrides if o not in common) or "defaults" for overrides, _ in self.jobs]
        files = [path / "metrics.json" for _, path in self.jobs]
        runs = [(name, json.loads(file.read_text())) for name, file in zip(names, files, strict=True) if file.exists()]
        present = [key for key in COLUMNS if any(key in figures for _, figures in runs)]
        table = Table(title=f"{len(runs)} of {len(names)} runs", title_justify="left")
        table.add_column("run", no_wrap=True)
        for key in present:
            table.add_column(COLUMNS[key], justify="right")
        for name, figures in sorted(
            runs, key=lambda run: -(run[1].get("val/top1") or run[1].get("val/recognised_ema") or 0)
        ):
            table.add_row(name, *(shown(key, figures.get(key)) for key in present))
        console = Console() if Console().is_terminal else Console(width=120)
        console.print(table)
        for name, file in zip(names, files, strict=True):
            if not file.exists():
                console.print(f"no result: {name}")
        if not runs:
            return
        folder = Path(config.hydra.sweep.dir)
        written = write_table(folder / "runs.csv", runs, present), draw_active_heads(folder / "active_heads.png", runs)
        console.print(f"written: {', '.join(str(path) for path in written if path)}")
