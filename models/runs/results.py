"""Where the results of an evaluation go: files of their own beside what was evaluated, and nothing is overwritten."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.names import short
from conf.places import numbered, writable
from models.probes import Report
from models.runs.report import write_json

FOLDER = "evaluation"


def keep(report: Report, folder: Path, stem: str, known: dict[str, Any]) -> list[str]:
    """Writes `<folder>/<stem>.json`, and what else there is into a folder `<stem>` beside it; what to say about it.

    Where the stem is taken a number follows it. Where nothing can be written another place is found.

    Args:
        report: what was found.
        folder: where results belong.
        stem: names this one, such as `digits-32-best`.
        known: goes into the JSON file too.
    """
    path, said = _reserved(folder, f"{stem}.json")
    write_json(path, report.figures | known)
    files = list(_beside(report, path.with_suffix("")))
    return (
        said
        + [f"results: {short(path)}"]
        + ([f"  and in {short(path.with_suffix(''))}: {', '.join(files)}"] * bool(files))
    )


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
        if not path.with_suffix("").exists():
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return path, said
    raise AssertionError("numbers do not end")


def _beside(report: Report, folder: Path) -> Iterator[str]:
    """Writes tables, pictures and pages; their names."""
    contents = (("csv", report.tables, _write_table), ("png", report.pictures, _write_picture))
    for suffix, parts, write in (*contents, ("html", report.pages, _write_page)):
        for name, content in parts.items():
            folder.mkdir(exist_ok=True)
            write(folder / f"{name}.{suffix}", content)
            yield f"{name}.{suffix}"


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _write_picture(path: Path, picture: Any) -> None:
    """Of matplotlib or of Pillow."""
    if hasattr(picture, "savefig"):
        picture.savefig(path, dpi=120, bbox_inches="tight")
    else:
        picture.save(path)


def _write_page(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
