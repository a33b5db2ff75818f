"""Where the results of an evaluation go: files of their own beside what was evaluated, and nothing is overwritten."""

import csv
import io
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from conf.names import short
from conf.places import numbered, writable
from models.probes import Report
from models.runs.pages import page, picture, table
from models.runs.report import shown, write_json
from models.side_outputs import put

FOLDER = "evaluation"
PAGE = "report.html"
MOST = 50  # rows of a table on the page
NAMED = 8  # files that are named on the terminal


def keep(report: Report, folder: Path, stem: str, known: dict[str, Any], title: str = "") -> list[str]:
    """Writes `<folder>/<stem>.json`, and what else there is into a folder `<stem>` beside it; what to say about it.

    A report with pictures is a page there too, `report.html`, which needs no other file. Where the stem is taken a
    number follows it. Where nothing can be written another place is found.

    Args:
        report: what was found.
        folder: where results belong.
        stem: names this one, such as `digits-32-best`.
        known: goes into the JSON file too.
        title: of the page.
    """
    path, said = _reserved(folder, f"{stem}.json")
    try:
        write_json(path, report.figures | known)
    except OSError:
        path.unlink(missing_ok=True)  # nothing stands where there is no result
        raise
    files = list(_beside(report, path.with_suffix("")))
    if report.pictures:
        _write_page(path.with_suffix("") / PAGE, _page(report, path.with_suffix(""), title or stem, known))
        files.insert(0, PAGE)
    told = ", ".join(files[:NAMED]) + (f" and {len(files) - NAMED} more" if len(files) > NAMED else "")
    beside = [f"  and in {short(path.with_suffix(''))}: {told}"] if files else []
    return [*said, f"results: {short(path)}", *beside]


def keep_table(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """Writes `<folder>/table.csv`, or under the next number; what to say about it."""
    path, said = _reserved(folder, "table.csv")
    _write_table(path, rows)
    return [*said, f"table: {short(path)}"]


def _reserved(folder: Path, name: str) -> tuple[Path, list[str]]:
    """An empty file of a new name where it can be written, and what to say where that is not `folder`.

    It is new to two processes that ask at once too.
    """
    place, said = writable(folder)
    for path in numbered(place / name):
        if not os.path.lexists(path.with_suffix("")):
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return path, said
    raise AssertionError("numbers do not end")


def _beside(report: Report, folder: Path) -> Iterator[str]:
    """Writes tables, pictures and pages; their names."""
    contents = (
        ("csv", report.tables, _write_table),
        ("png", report.pictures, _write_picture),
        ("html", report.pages, _write_page),
        ("safetensors", report.tensors, _write_tensors),
    )
    for suffix, parts, write in contents:
        for name, content in parts.items():
            folder.mkdir(exist_ok=True)
            write(folder / f"{name}.{suffix}", content)
            yield f"{name}.{suffix}"


def _page(report: Report, folder: Path, title: str, known: dict[str, Any]) -> str:
    """All of a report: what is said, figures, pictures and the beginnings of tables."""
    rows = report.figures if report.rows is None else report.rows
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<pre>python eval.py {escape(known['arguments'])}</pre>" if known.get("arguments") else "",
        *(f"<p>{escape(line)}</p>" for line in report.lines),
        table([["", ""], *([name, shown(name, value)] for name, value in rows.items())], "runs") if rows else "",
        *(picture((folder / f"{name}.png").read_bytes(), report.captions.get(name, name)) for name in report.pictures),
    ]
    for name, content in report.tables.items():
        if content:
            more = f"; the first {MOST} of {len(content)} rows" if len(content) > MOST else ""
            head = list(content[0])
            below = [[shown(key, row.get(key, "")) for key in head] for row in content[:MOST]]
            body += [f"<h2>{escape(name)}</h2><p>{escape(name)}.csv{more}</p>", table([head, *below], "runs")]
    return page(title, body)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    put(path, text.getvalue())


def _write_picture(path: Path, picture: Any) -> None:
    """Of matplotlib or of Pillow."""
    if hasattr(picture, "savefig"):
        picture.savefig(path, dpi=120, bbox_inches="tight")
    else:
        picture.save(path)


def _write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    from models.checkpoints.write import write_weights

    write_weights(path, tensors)


def _write_page(path: Path, text: str) -> None:
    put(path, text)
