"""report.html of a sweep: its table, its pictures and every run on one page that needs no other file."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from models.runs.sweep import Row, SweptRun, table_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } td:not(:first-child), th:not(:first-child) { text-align: right; white-space: nowrap }
.wide { overflow-x: auto } tbody tr:first-child { font-weight: 600 } table.runs tbody tr { font-weight: 400 }
img { max-width: 100% } code, pre { background: #f4f4f4; padding: .1rem .3rem; white-space: pre-wrap }
.failed { color: #a00 }
"""
CAPTIONS = {
    "curves": "Validation and training over epochs: lines are means over seeds, bands reach from the lowest to the "
    "highest seed.",
    "pareto": "What is reached against what it costs: bars are standard deviations over seeds; the dashed line joins "
    "those that no other beats in both.",
    "active_heads": "Accuracy against the share of heads that a token uses.",
}


def write_report(
    path: Path,
    title: str,
    command: str,
    rows: Sequence[Row],
    runs: Sequence[SweptRun],
    columns: dict[str, str],
    pictures: Sequence[Path],
) -> Path:
    """The page.

    Args:
        path: of the file; runs are linked relative to its folder.
        title, command: what was compared, and what was typed.
        rows, columns: of the table, the best row first.
        runs: all of them, those that failed included.
        pictures: PNG files, whose content becomes part of the page.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<pre>{escape(command)}</pre>",
        f"<p>{escape(counted(rows, runs))}</p>",
        _table(table_of(rows, columns)) if rows else "",
        *(_picture(picture) for picture in pictures),
        "<h2>Every run</h2>",
        _runs(path.parent, runs, columns),
    ]
    head = f"<!doctype html><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    path.write_text("\n".join([head, *filter(None, body)]) + "\n")
    return path


def counted(rows: Sequence[Row], runs: Sequence[SweptRun]) -> str:
    """How many runs and seeds the figures rest on, and how they are put together."""
    failed = sum(run.figures is None for run in runs)
    several = any(len(row.runs) > 1 for row in rows)
    text = f"{len(runs) - failed} of {len(runs)} runs have a result."
    if several:
        return f"{text} Figures are means ± standard deviations over seeds; costs are means."
    return f"{text} One seed each: differences may be chance; add seed=0,1,2."


def _table(table: Sequence[Sequence[str]], kind: str = "rows") -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in table[0])
    rows = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in table[1:])
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class='wide'><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _picture(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    said = CAPTIONS.get(path.stem, path.stem)
    image = f"<img alt='{escape(said)}' src='data:image/png;base64,{content}'>"
    return f"<figure>{image}<figcaption>{escape(said)}</figcaption></figure>"


def _runs(folder: Path, runs: Sequence[SweptRun], columns: dict[str, str]) -> str:
    """A table of single runs with their folders, and what those said that have no result."""
    alone = [Row(run.title, [run]) for run in runs if run.figures is not None]
    table = table_of(alone, columns) if alone else [["run"]]
    places = {run.title: _place(run.folder, folder) for run in runs}
    text = _table([[*table[0], "folder"], *([*row, places[row[0]]] for row in table[1:])], "runs")
    failed = (
        f"<li class='failed'><b>{escape(run.title)}</b>: {escape(run.said)} (<code>{escape(places[run.title])}</code>)"
        for run in runs
        if run.figures is None
    )
    return text + "".join(["<h2>Without a result</h2><ul>", *failed, "</ul>"] if len(alone) < len(runs) else [])


def _place(path: Path, folder: Path) -> str:
    folder = folder.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
