"""What a run leaves for people: metrics.json, the table at the end, and what can be done next."""

import json
import math
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf import families
from conf.folders import escaped
from conf.names import PARTS, PLACES, short
from models.checkpoints.fitting import family_of
from models.side_outputs import put

ABREAST = 5  # columns of a table that a terminal has room for
PERCENT = ("top1", "top5", "recognised", "routing/active")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Pretty JSON, whole or not at all; numbers that are not finite become null. No link of its name is followed."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    put(path, json.dumps(clean, indent=2) + "\n")


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
        table.add_row(_text(name), _text(shown(name, value)))
    console = console or Console()
    console.print(_text(title), style="bold", highlight=False, soft_wrap=True)
    # where there is no terminal to fit in, commands and paths stay in one piece
    console.print(table, width=None if console.is_terminal else 120, soft_wrap=False)


def _text(given: str) -> Text:
    """As it is: what looks like markup in the name of a class is none, and nothing in it steers the terminal."""
    return Text(escaped(given, keep="\n"))


def next_steps(run_dir: Path, config: dict[str, Any]) -> list[str]:
    """What can be done with a finished run, as lines that can be pasted into a shell."""
    lines, folder = [], short(run_dir)
    best = run_dir / "checkpoints" / "best"
    if best.exists():
        lines.append(f"evaluate: python eval.py ckpt={quote(short(best))}")
        if str(config["task"].get("_target_")).endswith((".Classification", ".MultiLabel")):
            lines.append(f"predict:  python eval.py ckpt={quote(folder)} input=path/to/images")
        if exportable(config):
            name = config["run"]["model"]
            lines.append(
                f"export:   python -m models.checkpoints export {quote(short(best))} --model {name} -o {name}.pth"
            )
    limits = [(name, config["trainer"].get(name)) for name in ("max_steps", "max_epochs")]
    limit = next(
        (f"trainer.{name}={2 * value}" for name, value in limits if isinstance(value, int) and value > 0), None
    )
    if (run_dir / "checkpoints" / "last").exists() and limit:
        lines.append(f"go on:    the same command with run.name={config['run']['name']} {limit}")
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
    console.print(_text(title), style="bold", highlight=False, soft_wrap=True)
    names = list(dict.fromkeys(name for column in columns for name in column))
    for first in range(0, len(columns), ABREAST):
        chosen = slice(first, first + ABREAST)
        table = Table("")
        for heading in headings[chosen]:
            table.add_column(_text(heading))
        for name in names:
            table.add_row(_text(name), *(_text(shown(name, column.get(name))) for column in columns[chosen]))
        console.print(table, width=None if console.is_terminal else 120, soft_wrap=False)
