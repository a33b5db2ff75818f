"""What a run leaves for people: metrics.json, curves.png and the table at the end."""

import json
import math
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table

from conf import families
from conf.names import PARTS, PLACES, short
from models.checkpoints.fitting import family_of
from models.loggers.metrics_csv import read_metrics

ABREAST = 5  # columns of a table that a terminal has room for
PERCENT = ("top1", "top5", "recognised", "routing/active")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Pretty JSON; numbers that are not finite become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    path.write_text(json.dumps(clean, indent=2) + "\n")


def shown(name: str, value: Any) -> str:
    """A figure as people read it: accuracies in percent, counts with thousands, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float) and any(part in name for part in PERCENT):
        return f"{value:.2%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(title: str, rows: dict[str, Any], console: Console | None = None) -> None:
    """Two columns: name and figure."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="left", overflow="fold")
    for name, value in rows.items():
        table.add_row(name, shown(name, value))
    console = console or Console()
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    # where there is no terminal to fit in, commands and paths stay in one piece
    console.print(table, width=None if console.is_terminal else 120, soft_wrap=False)


def next_steps(run_dir: Path, config: dict[str, Any]) -> list[str]:
    """What can be done with a finished run, as lines that can be pasted into a shell."""
    lines, folder, epochs = [], short(run_dir), config["trainer"].get("max_epochs")
    best = run_dir / "checkpoints" / "best"
    if best.exists():
        lines.append(f"evaluate: python eval.py ckpt={quote(short(best))}")
        if exportable(config):
            name = config["run"]["model"]
            lines.append(
                f"export:   python -m models.checkpoints export {quote(short(best))} --model {name} -o {name}.pth"
            )
    if (run_dir / "checkpoints" / "last").exists() and epochs and epochs > 0:
        lines.append(
            f"go on:    the same command with run.name={config['run']['name']} trainer.max_epochs={2 * epochs}"
        )
    if list(run_dir.glob("wandb/offline-run-*")):
        lines.append(f"upload:   wandb sync {quote(folder)}/wandb/offline-run-*")
    return lines


def exportable(config: dict[str, Any]) -> bool:
    """Whether the weights have other names than ours: the model as its authors publish it."""
    name, attention = config["run"]["model"], config["run"]["attention"]
    usual = families.models().get(name, {}).get("attention", "softmax")
    parts = [config["attention"].get(part) for part in PARTS] if isinstance(config["attention"], dict) else []
    composed = any(isinstance(chosen, dict) for chosen in [*parts, *map(config.get, PLACES)])
    return family_of(name) is not None and attention == usual and not composed


def print_columns(
    title: str, columns: list[dict[str, Any]], headings: list[str], console: Console | None = None
) -> None:
    """Several tables of two columns side by side, `ABREAST` at a time: the figures of each below its heading."""
    console = Console()
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    names = list(dict.fromkeys(name for column in columns for name in column))
    for first in range(0, len(columns), ABREAST):
        chosen = slice(first, first + ABREAST)
        table = Table("", *headings[chosen])
        for name in names:
            table.add_row(name, *(shown(name, column.get(name)) for column in columns[chosen]))
        console.print(table, width=None if console.is_terminal else 120, soft_wrap=False)


def draw_curves(run_dir: Path) -> Path | None:
    """Draws loss, accuracy, score and learning rate over steps from metrics.csv; the path, None without figures."""
    rows = read_metrics(run_dir / "metrics.csv")
    panels = [
        ("loss", {"train": "train/loss", "validation": "val/loss", "validation, EMA": "val/loss_ema"}),
        ("top-1 (%)", {"validation": "val/top1", "validation, EMA": "val/top1_ema"}),
        ("recognised (%)", {"raw": "val/recognised", "EMA": "val/recognised_ema"}),
        ("learning rate", {"": "lr"}),
    ]
    series = {key: _series(rows, key) for _, lines in panels for key in lines.values()}
    panels = [(label, lines) for label, lines in panels if any(series[key][0] for key in lines.values())]
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, key in lines.items():
            steps, values = series[key]
            if steps:
                scale = 100 if "%" in label else 1
                axis.plot(
                    steps,
                    [scale * v for v in values],
                    label=name,
                    linewidth=1.5,
                    marker="." if len(steps) < 40 else None,
                )
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
        if any(name and series[key][0] for name, key in lines.items()):
            axis.legend(frameon=False)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _series(rows: list[dict[str, str]], key: str) -> tuple[list[int], list[float]]:
    points = [(int(float(row["step"])), float(row[key])) for row in rows if row.get(key)]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]
