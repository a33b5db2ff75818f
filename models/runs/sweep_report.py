"""report.html of a sweep: its table, its pictures and every run on one page that needs no other file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from models.runs.pages import page, picture, table
from models.runs.sweep import Row, SweptRun, table_of
from models.side_outputs import put

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
        table(table_of(rows, columns)) if rows else "",
        *(picture(path.read_bytes(), CAPTIONS.get(path.stem, path.stem)) for path in pictures),
        "<h2>Every run</h2>",
        _runs(path.parent, runs, columns),
    ]
    put(path, page(title, body))
    return path


def counted(rows: Sequence[Row], runs: Sequence[SweptRun]) -> str:
    """How many runs and seeds the figures rest on, and how they are put together."""
    failed = sum(run.figures is None for run in runs)
    several = any(len(row.runs) > 1 for row in rows)
    text = f"{len(runs) - failed} of {len(runs)} runs have a result."
    if several:
        return f"{text} Figures are means ± standard deviations over seeds; costs are means."
    return f"{text} One seed each: differences may be chance; add seed=0,1,2."


def _runs(folder: Path, runs: Sequence[SweptRun], columns: dict[str, str]) -> str:
    """A table of single runs with their folders, and what those said that have no result."""
    alone = [Row(run.title, [run]) for run in runs if run.figures is not None]
    found = table_of(alone, columns) if alone else [["run"]]
    places = {run.title: _place(run.folder, folder) for run in runs}
    text = table([[*found[0], "folder"], *([*row, places[row[0]]] for row in found[1:])], "runs")
    failed = (
        f"<li class='failed'><b>{escape(run.title)}</b>: {escape(run.said)} (<code>{escape(places[run.title])}</code>)"
        for run in runs
        if run.figures is None
    )
    return text + "".join(["<h2>Without a result</h2><ul>", *failed, "</ul>"] if len(alone) < len(runs) else [])


def _place(path: Path, folder: Path) -> str:
    folder = folder.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
