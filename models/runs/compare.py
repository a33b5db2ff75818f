"""What a sweep (`-m`) ends with: one row per setting, seeds averaged; the same as CSV files, pictures and a page."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from conf import sweeps
from conf.errors import Failure
from conf.leftovers import first_process
from conf.names import short
from models.side_outputs import attempt


class CompareRuns(Callback):
    """Announces the runs of a sweep and, at its end, puts what they left side by side."""

    def __init__(self) -> None:
        self.jobs: list[tuple[list[str], int, Path, str]] = []
        self.sweeps, self.total, self.started = False, None, 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.sweeps = True
        params = OmegaConf.select(config, "hydra.sweeper.params")
        self.total = sweeps.begin(config.hydra.overrides.task, params)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.sweeps and first_process():
            settings = " ".join(f"{key}={value}" for key, value in _differing(config).items())
            of = f" of {self.total}" if self.total else ""
            self.started += 1
            print(f"\nrun {self.started}{of}: {settings or 'defaults'}", flush=True)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        result = job_return.return_value
        said = str(result) if isinstance(result, Failure) else ""
        self.jobs.append((_differing(config), config.seed, Path(config.hydra.runtime.output_dir), said))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from models.runs.sweep import columns_of, read_run, rows_of, table_of

        sweeps.end()
        if not first_process():
            return
        runs = [read_run(*job) for job in self.jobs]
        monitor, mode = str(config.checkpoint.monitor), str(config.checkpoint.mode)
        rows = rows_of(runs, monitor, mode)
        print()
        _print_table(
            f"{sum(run.figures is not None for run in runs)} of {len(runs)} runs",
            table_of(rows, columns_of(rows, monitor)),
        )
        for run in runs:
            if run.figures is None:
                print(f"no result: {run.title}: {run.said.splitlines()[0]}")
        if not rows and not any((run.folder / "train.log").exists() for run in runs):
            return  # no run has begun: nothing is left
        written = write_all(Path(config.hydra.sweep.dir).absolute(), rows, runs, monitor, mode)
        print(f"written: {', '.join(map(short, written))}")


def write_all(folder: Path, rows: list[Any], runs: list[Any], monitor: str, mode: str) -> list[Path]:
    """Tables, pictures and the page of a sweep, in its folder."""
    from models.runs.sweep import columns_of, write_comparison, write_runs
    from models.runs.sweep_pictures import draw_active_heads, draw_comparison, draw_pareto
    from models.runs.sweep_report import write_report

    columns = columns_of(rows, monitor)
    tables, pictures, pages = list[Path](), list[Path | None](), list[Path]()
    _add(tables, write_runs, folder / "runs.csv", runs, list(columns))
    if rows:
        _add(tables, write_comparison, folder / "comparison.csv", rows, list(columns))
    _add(pictures, draw_comparison, folder / "curves.png", rows, monitor)
    _add(pictures, draw_pareto, folder / "pareto.png", rows, monitor, mode)
    _add(pictures, draw_active_heads, folder / "active_heads.png", rows)
    drawn = [picture for picture in pictures if picture is not None]
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    _add(pages, write_report, folder / "report.html", folder.name, command, rows, runs, columns, drawn)
    return [*tables, *drawn, *pages]


def _add(written: list[Any], write: Callable[..., Path | None], path: Path, *args: Any) -> None:
    """Lets a file be written and adds it; one that cannot be written is said and left out."""
    attempt(short(path), lambda: written.append(write(path, *args)))


def _differing(config: DictConfig) -> dict[str, str]:
    settings = sweeps.differing(config.hydra.overrides.task)
    settings.pop("run.name", None)
    return settings


def _print_table(title: str, table: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if len(table) < 2:
        print(title)
        return
    shown = Table(title=title, title_justify="left")
    for number, label in enumerate(table[0]):
        shown.add_column(label, no_wrap=number == 0, justify="right" if number else "left")
    for row in table[1:]:
        shown.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(shown)
