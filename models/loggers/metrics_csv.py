"""metrics.csv: every figure of a run, one row per logged step."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class MetricsCSV(Logger):
    """One row per logged step, a column per metric; columns that appear later are added to the file."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self.columns = path, ["step", "epoch"]
        self.rows = [row for row in read_metrics(path) if float(row["step"]) < resume_step]
        for row in self.rows:
            self._add_columns(row)
        self._pending = len(self.rows) > 0 or path.exists()

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
        self._pending = self._add_columns(row) or self._pending
        self.rows.append(row)
        if not self._pending and self.path.exists():
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def save(self) -> None:
        """Rewrites the file when its header is out of date."""
        if not self._pending or not self.rows:
            return
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        self._pending = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _add_columns(self, row: Mapping[str, Any]) -> bool:
        new = [key for key in row if key not in self.columns]
        self.columns += new
        return bool(new)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without their empty cells; [] when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
