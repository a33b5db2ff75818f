"""An evaluation from its composed configuration: build what the probe asks for, print what it finds, and write it."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from conf import probes
from models.attention.backend import describe_backend
from models.probes import Report
from models.runs.finished import FOLDER, Parts, Weights
from models.runs.preflight import part_of, quiet, resolved
from models.runs.report import print_table, write_json
from models.runs.results import keep
from models.runs.verdict import deviations, judge

DEFAULT = "accuracy"  # results of which are named by data, size and weights alone


def evaluate(cfg: DictConfig) -> float | None:
    """What `cfg.probe` finds is printed as a table and written beside the checkpoint; returns its score.

    With a recipe the last line says whether the published result is reproduced.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    quiet()
    given = resolved(cfg)
    wanted = probes.wants(given["probe"]["_target_"])
    parts = Parts(cfg, given)
    made = parts.made(wanted)
    trainer = made.get("trainer")
    first = trainer is None or trainer.is_global_zero
    if first and (model := made.get("model")) is not None:
        print(describe_backend(model, trainer.strategy.root_device))
    report = part_of(cfg, "probe")(**{name: made[name] for name in wanted})
    if first:
        _tell(report, given, parts.weights, made["subject"].title)
    return report.score


def _tell(report: Report, given: dict[str, Any], weights: Weights | None, title: str) -> None:
    rows = report.figures if report.rows is None else report.rows
    if rows:
        print_table(title, rows)
    for line in report.lines:
        print(line)
    recipe, verdict = (given.get("run") or {}).get("recipe"), None
    if recipe and report.measured is not None:
        measured, images = report.measured
        verdict = judge(recipe, report.figures, deviations(recipe, given, images, measured))
    known = (weights.known if weights is not None else {}) | (
        {"recipe": recipe, "reproduced": verdict.reproduced} if verdict else {}
    )
    if report.figures or report.tables or report.pictures or report.pages:
        _write(report, given, weights, known)
    if verdict:
        print(verdict.text)


def _write(report: Report, given: dict[str, Any], weights: Weights | None, known: dict[str, Any]) -> None:
    """A file of its own for every result; that of the last one beside the weights too, where it always was."""
    if weights is not None and report.measured is not None:
        try:
            write_json(weights.latest, report.figures | known)
            print(f"metrics: {weights.latest}")
        except OSError:
            pass  # `keep` says so
    for line in keep(report, weights.folder if weights else Path.cwd() / FOLDER, stem(given, weights), known):
        print(line)


def stem(given: dict[str, Any], weights: Weights | None) -> str:
    """`<data>-<size>-<weights>[-<probe>]`, of those that there are."""
    name = given["probe"]["_target_"].rpartition(".")[2]
    size = given.get("image_size")
    parts = [
        (given.get("run") or {}).get("data"),
        "x".join(map(str, size)) if isinstance(size, list) else size,
        None if weights is None else weights.name,
        None if name == DEFAULT else name,
    ]
    return "-".join(str(part) for part in parts if part is not None)
