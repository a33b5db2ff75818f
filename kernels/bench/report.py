"""Rows as Markdown tables, and as files that are written anew after every row, so that nothing measured is lost."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kernels.bench.calls import PARTS
from kernels.bench.counting import Counted
from kernels.bench.rows import Row
from kernels.bench.timing import Ceilings


class Report:
    """Collects rows under a description of the machine.

    Args:
        environment: what it ran on; `date` and `device` make the names of the files.
        ceilings: of the device; None where nothing is timed.
        folder: for `<date>-<device>.md` and `.json`, numbered when they exist already; None to write none.
    """

    def __init__(self, environment: dict[str, str], ceilings: Ceilings | None, folder: Path | None) -> None:
        self.environment, self.ceilings = environment, ceilings
        self.rows: list[Row] = []
        self.models: list[dict] = []
        self.remarks: list[str] = []
        self.path = folder and _free_path(folder, f"{environment['date']}-{_slug(environment['device'])}")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.markdown() + "\n")

    def as_dict(self) -> dict:
        """Plain data: everything that was measured, in milliseconds and bytes."""
        return {
            "environment": self.environment,
            "ceilings": self.ceilings and dataclasses.asdict(self.ceilings),
            "rows": [{**dataclasses.asdict(r), "cost": r.cost._asdict()} for r in self.rows],
            "models": self.models,
            "remarks": self.remarks,
        }

    def markdown(self) -> str:
        lines = ["# Benchmark of the kernels", "", *(f"- {k}: {v}" for k, v in self.environment.items())]
        if self.ceilings:
            bandwidth, rate = self.ceilings.bandwidth / 1e12, self.ceilings.matrix_rate / 1e12
            lines.append(f"- measured ceilings: copy {bandwidth:.2f} TB/s, bfloat16 product {rate:.0f} TFLOP/s")
        lines += [f"- {remark}" for remark in self.remarks]
        for operation in dict.fromkeys(r.operation for r in self.rows):
            rows = [r for r in self.rows if r.operation == operation]
            lines += ["", f"## {operation} ({rows[0].dtype})", ""]
            lines += counted_table(rows) if rows[0].counted else timed_table(rows, self.ceilings)
        for title, column in (("counted from the graph", "kernels"), ("timed", "ms")):
            models = [{k: _plain(v) for k, v in m.items()} for m in self.models if column in m]
            lines += ["", f"## Models, {title}", "", *table(models)] if models else []
        return "\n".join(lines)


TIMED = (
    "stage", "ms", "CUDA graph ms", "launch tax ms", "peak MiB", "of copy bandwidth", "of matrix rate",
    "official/fused", "compiled/fused", "pytorch/fused", "dense sdpa/fused", "official/fused memory",
    "wanted", "missed",
)  # fmt: skip


def timed_table(rows: list[Row], ceilings: Ceilings) -> list[str]:
    """Cells are forward / forward and backward; the memory is of both, and so is what is wanted of it."""
    cells = []
    for r in rows:
        if r.wrong:
            cells.append({"stage": r.stage, "ms": "not timed: " + "; ".join(r.wrong)})
            continue
        fused, sdpa = r.timed["fused"], r.fastest("sdpa", "training").removeprefix("sdpa").strip()
        ms = [r.milliseconds("fused", p) for p in PARTS]
        graph = [g and g.median for g in (fused.forward_graph, fused.training_graph)]
        launch = [a - b if a and b else None for a, b in zip(ms, graph, strict=True)]
        cells.append(
            {
                "stage": r.stage,
                "ms": pair(ms, "{:.3f}") + (f" ({fused.note})" if fused.note else ""),
                "CUDA graph ms": pair(graph, "{:.3f}"),
                "launch tax ms": pair(launch, "{:.3f}"),
                "peak MiB": pair([fused.forward_peak, fused.training_peak], mebibytes),
                "of copy bandwidth": pair([r.bandwidth_share(p, ceilings) for p in PARTS], "{:.0%}"),
                "of matrix rate": pair([r.matrix_share(p, ceilings) for p in PARTS], "{:.0%}"),
                "official/fused": _ratios(r, "official"),
                "compiled/fused": _ratios(r, "official compiled"),
                "pytorch/fused": _ratios(r, "pytorch"),
                "dense sdpa/fused": _ratios(r, "sdpa") + (f" ({sdpa})" if r.times_faster("sdpa", "forward") else ""),
                "official/fused memory": "-" if r.memory_share() is None else f"{1 / r.memory_share():.1f}",
                "wanted": str(r.target or "-"),
                "missed": "; ".join(r.missed(ceilings)) or "-",
            }
        )
    return table(cells, TIMED)


def counted_table(rows: list[Row]) -> list[str]:
    """Cells are forward / forward and backward; what launches touch counts as moved."""
    cells = []
    for r in rows:
        of = {n: [c.get(p) for p in PARTS] for n, c in r.counted.items()}
        line = {
            "stage": r.stage,
            "least MiB": pair([r.least_bytes(p) for p in PARTS], mebibytes),
            "GFLOP": pair([r.least_flops(p) / 1e9 for p in PARTS], "{:.3g}"),
            "launched MiB": pair([c and c.bytes for c in of["fused"]], mebibytes),
            "peak MiB": pair([c and c.peak for c in of["fused"]], mebibytes),
            "kernels": pair([c and c.kernels for c in of["fused"]], "{}"),
        }
        for name in [n for n in of if n != "fused"]:
            line[f"{name} kernels"] = pair([c and c.kernels for c in of[name]], "{}")
            for what in ("bytes", "peak", "flops"):
                line[f"{name}/fused {what}"] = _quotients(of[name], of["fused"], what)
        cells.append(line)
    return table(cells)


def table(cells: list[dict[str, str]], columns: Sequence[str] = ()) -> list[str]:
    """A Markdown table: header, rule, and a line for each row. Without `columns`, those of all rows as they appear."""
    columns = columns or list(dict.fromkeys(name for line in cells for name in line))
    rows = [[line.get(name, "").replace("|", "/") for name in columns] for line in cells]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def pair(values: list, form: str | Callable) -> str:
    """Forward / forward and backward."""
    write = form.format if isinstance(form, str) else form
    texts = ["-" if v is None else write(v) for v in values]
    return texts[0] if set(texts) == {"-"} else " / ".join(texts)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.3g}" if count < 10 * 2**20 else f"{count / 2**20:.0f}"


def _ratios(row: Row, baseline: str) -> str:
    note = row.timed[baseline].note if baseline in row.timed and row.milliseconds(baseline, "training") is None else ""
    return note or pair([row.times_faster(baseline, p) for p in PARTS], "{:.2f}")


def _quotients(theirs: list[Counted | None], ours: list[Counted | None], what: str) -> str:
    counts = [(getattr(a, what), getattr(b, what)) if a and b else (0, 0) for a, b in zip(theirs, ours, strict=True)]
    return pair([a / b if b else None for a, b in counts], "{:.1f}")


def _plain(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _free_path(folder: Path, name: str) -> Path:
    numbered = (folder / (f"{name}-{i}" if i > 1 else name) for i in range(1, 10**6))
    return next(p for p in numbered if not Path(f"{p}.json").exists())
