"""Where the results of an evaluation go: files of their own beside what was evaluated, and nothing is overwritten."""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.names import short
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
    path, said = _reserved(folder, stem)
    write_json(path, report.figures | known)
    files = list(_beside(report, path.with_suffix("")))
    return (
        said
        + [f"results: {short(path)}"]
        + ([f"  and in {short(path.with_suffix(''))}: {', '.join(files)}"] * bool(files))
    )


def _reserved(folder: Path, stem: str) -> tuple[Path, list[str]]:
    """An empty file of a new name where it can be written, and what to say where that is not `folder`."""
    reason = ""
    for place in (folder, Path.cwd() / FOLDER, Path(tempfile.gettempdir()) / FOLDER):
        try:
            place.mkdir(parents=True, exist_ok=True)
            path = _new(place, stem)
        except OSError as error:
            reason = reason or f"{short(folder)} cannot be written ({error.strerror})"
        else:
            return path, [f"{reason}: results go to {short(place)}"] if reason else []
    raise UserError(f"eval: {reason}, nor the working directory, nor {tempfile.gettempdir()}; give output=<folder>")


def _new(place: Path, stem: str) -> Path:
    """`<stem>.json`, `<stem>-2.json` …: the first that nobody has, of two processes too."""
    for path in numbered(place / f"{stem}.json"):
        if not path.with_suffix("").exists():
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return path
    raise AssertionError("numbers do not end")


def numbered(path: Path) -> Iterator[Path]:
    """The path itself, then with 2, 3 … behind its stem."""
    yield path
    number = 2
    while True:
        yield path.with_stem(f"{path.stem}-{number}")
        number += 1


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
