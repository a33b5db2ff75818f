"""Evaluations from their composed configurations: build what the probe asks for, print what it finds, and write it."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from conf import cases, probes, recipes, text
from conf.compose import compose
from conf.errors import StorageFailed, UserError
from conf.folders import escaped
from conf.names import short
from conf.settings import resolved
from models.attention.backend import describe_backend
from models.engines.together import together
from models.probes import Report
from models.runs import evaluated
from models.runs.finished import Parts, Weights
from models.runs.memory import explained
from models.runs.preflight import part_of, quiet
from models.runs.report import print_columns, print_table, write_json
from models.runs.results import keep, keep_table
from models.runs.verdict import deviations, judge
from models.side_outputs import reason

DEFAULT = "accuracy"  # results of which are named by data, size and weights alone


def evaluate(cfg: DictConfig) -> float | None:
    """What `cfg.probe` finds is printed as a table and written beside the checkpoint; returns its score.

    Of several evaluations (`conf.cases`) each is written, and they are printed in one table. With a recipe the last
    line says whether the published result is reproduced.

    Raises:
        UserError: the checkpoint or the data cannot be used; of several the others are done first.
    """
    quiet()
    others = list(cfg.get("others") or [])
    if not others:
        return _evaluate(cfg).report.score
    configs = [cfg, *(compose("eval", evaluated.offer(list(arguments))) for arguments in others)]
    return _evaluate_all(configs)


class Outcome(NamedTuple):
    """What a probe found; whether this process is the one that says so."""

    report: Report
    speaks: bool
    folder: Path


def _evaluate(cfg: DictConfig, alone: bool = True) -> Outcome:
    given = resolved(cfg)
    with explained(given, training=False):
        return _found(cfg, given, alone)


def _found(cfg: DictConfig, given: dict[str, Any], alone: bool) -> Outcome:
    wanted = probes.wants(given["probe"]["_target_"])
    parts = Parts(cfg, given)
    made = parts.made(wanted)
    trainer = made.get("trainer")
    speaks = trainer is None or trainer.is_global_zero
    if speaks and alone and (model := made.get("model")) is not None:
        print(describe_backend(model, trainer.strategy.root_device))
    with together(trainer, None) if trainer is not None else nullcontext():
        report = part_of(cfg, "probe")(**{name: made[name] for name in wanted})
    folder = made["subject"].folder
    if speaks:
        _tell(report, given, parts.weights, folder, made["subject"].title, alone)
    return Outcome(report, speaks, folder)


def _evaluate_all(configs: list[DictConfig]) -> float | None:
    """One after the other; what fails is said and the next goes on."""
    settings = [list(cfg.arguments) for cfg in configs]
    keys = cases.differing(settings)
    found, failures = [], []
    for cfg, arguments in zip(configs, settings, strict=True):
        given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        case = {key: text.plain(given[key]) for key in keys}
        told = " ".join(f"{key}={value}" for key, value in case.items())
        if rank_zero_only.rank == 0:
            print(f"\n{told}", flush=True)
        try:
            found.append((case, _evaluate(cfg, alone=False)))
        except UserError as error:
            print(f"{told}: {error}")
            failures.append(told)
    if found and found[0][1].speaks:
        _tell_all(found, len(configs))
    if failures:
        raise UserError(f"{len(failures)} of {len(configs)} evaluations failed: {'; '.join(failures)}")
    return found[0][1].report.score


def _tell_all(found: list[tuple[dict[str, str], Outcome]], count: int) -> None:
    """The table of several evaluations, on the terminal and as CSV."""
    rows = [outcome.report.figures if outcome.report.rows is None else outcome.report.rows for _, outcome in found]
    print_columns(f"{len(found)} of {count} evaluations", rows, [_heading(case) for case, _ in found])
    for line in keep_table([case | row for (case, _), row in zip(found, rows, strict=True)], found[0][1].folder):
        print(line)


def _heading(case: dict[str, str]) -> str:
    """What is different, one below the other; of a path what says which it is."""
    values = [value.removeprefix("outputs/").replace("/checkpoints/", "/") for value in case.values()]
    return "\n".join(value if len(value) < 25 else f"…{value[-24:]}" for value in values)


def _tell(
    report: Report, given: dict[str, Any], weights: Weights | None, folder: Path, title: str, alone: bool
) -> None:
    rows = report.figures if report.rows is None else report.rows
    if rows and alone:
        print_table(title, rows)
    for line in report.lines:
        print(escaped(line, keep="\n\t"))
    recipe, verdict = (given.get("run") or {}).get("recipe"), None
    if recipe in recipes.names() and report.measured is not None:
        measured, images = report.measured
        verdict = judge(recipe, report.figures, deviations(recipe, given, images, measured))
    known = (weights.known if weights is not None else {}) | (
        {"recipe": recipe, "reproduced": verdict.reproduced} if verdict else {}
    )
    failure = None
    if report.figures or report.tables or report.pictures or report.pages:
        try:
            _write(report, given, weights, folder, known, title)
        except OSError as error:
            failure = error
    if verdict:
        print(verdict.text)
    if failure is not None:
        raise StorageFailed(
            f"eval: the results cannot be written in {short(folder)}, got {reason(failure)}; make room and measure "
            "again: what was found is printed above"
        )


def _write(
    report: Report, given: dict[str, Any], weights: Weights | None, folder: Path, known: dict[str, Any], title: str
) -> None:
    """A file of its own for every result; that of the last one beside the weights too, where it always was."""
    if weights is not None and report.measured is not None:
        try:
            if weights.latest.parent.is_symlink() and weights.latest.parent.name == "checkpoints":
                raise OSError(f"{weights.latest.parent} is a link")
            write_json(weights.latest, report.figures | known)
            print(f"metrics: {weights.latest}")
        except OSError:
            pass  # `keep` says so
    settings = {"arguments": " ".join(given.get("arguments") or [])}
    name = given["probe"]["_target_"].rpartition(".")[2]
    for line in keep(report, folder, stem(given, weights), known | settings, f"{name}: {title}" if title else name):
        print(escaped(line))


def stem(given: dict[str, Any], weights: Weights | None) -> str:
    """`<data>-<size>-<weights>[-<probe>]`, of those that there are; images of the user stand for the data."""
    name = given["probe"]["_target_"].rpartition(".")[2]
    size, images = given.get("image_size"), given.get("input")
    parts = [
        (given.get("run") or {}).get("data") if images is None else Path(str(images)).stem,
        "x".join(map(str, size)) if isinstance(size, list) else size,
        None if weights is None else weights.name,
        None if name == DEFAULT else name,
    ]
    # a word of a stored configuration makes no path
    return "-".join(re.sub(r"[/\\\x00-\x1f\x7f]", "_", str(part)) for part in parts if part is not None)
