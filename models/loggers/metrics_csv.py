"""metrics.csv: every figure of a run, one row per logged step."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from models.side_outputs import append, attempt, put


class MetricsCSV(Logger):
    """One row per logged step, a column per metric; columns that appear later are added to the file.

    Rows that cannot be written wait in memory until they can. What is logged of a step for the second time is left out:
    a run that was stopped repeats its validation.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self.columns = path, ["step", "epoch"]
        self._until: float = resume_step  # rows of the file from this step on are dropped when it is written
        self._waiting: list[dict[str, Any]] = []
        self._stale = True  # whether the file has to be written anew: its columns or its rows are out of date
        self._step, self._seen = -1, set[frozenset[str]]()  # the last step, and what its rows have
        attempt(f"{self.path.name}, as it was before,", self._take_up)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, "epoch": int(metrics.get("epoch", 0))} | {
            k: v for k, v in metrics.items() if k != "epoch"
        }
        if self._is_new(row):
            self._stale = self._add_columns(row) or self._stale
            self._waiting.append(row)
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that wait."""
        if self._waiting:
            attempt(f"{self.path.name}, whose rows wait in memory until there is room,", self._write)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _take_up(self) -> None:
        """Columns of the rows that stay, and what the last step has."""
        for row in self._written():
            self._add_columns(row)
            self._is_new(row)

    def _write(self) -> None:
        if self._stale or not self.path.exists():
            put(self.path, self._text([*self._written(), *self._waiting], head=True))
        else:
            append(self.path, self._text(self._waiting))
        self._waiting, self._stale, self._until = [], False, math.inf

    def _written(self) -> list[dict[str, str]]:
        """The rows of the file that count."""
        return [row for row in read_metrics(self.path) if float(row["step"]) < self._until]

    def _text(self, rows: list[dict[str, Any]], head: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        if head:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _is_new(self, row: Mapping[str, Any]) -> bool:
        """Whether no row of the same step has the same figures."""
        step, kind = int(float(row["step"])), frozenset(row)
        if step != self._step:
            self._step, self._seen = step, set()
        new = kind not in self._seen
        self._seen.add(kind)
        return new

    def _add_columns(self, row: Mapping[str, Any]) -> bool:
        new = [key for key in row if key not in self.columns]
        self.columns += new
        return bool(new)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv without their empty cells; [] when there is no file.

    A last line without its end was being written when a process was killed, and counts for nothing.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    rows = [{key: value for key, value in row.items() if key and value} for row in lines]
    return [row for row in rows if _is_number(row.get("step"))]


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False
