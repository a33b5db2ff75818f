"""`python train.py list …`: what can be chosen, with what it costs and where it comes from, as tables.

Read from the fields and comments of conf/ and recipes/, so it answers without torch.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from conf import families, recipes
from conf.errors import UserError
from conf.names import PARTS, PLACES, choosable, group_of, nearest, options
from models import list_attentions, systems
from models.facts import facts, small_figure, summary
from models.recipe_tables import figure, read

USAGE = """python train.py list                    the kinds of things that can be chosen
python train.py list models             models: attention, pixels, parameters, FLOPs, paper, published figure, status
python train.py list models=swin,vit    those with a word that begins so; patterns such as '*_tiny' work too
python train.py list systems            systems of the literature: what chooses each, and what vouches for it
python train.py list attentions parts recipes data ...

Status, of published results: unverified, forward (the authors' weights give it here) or trained (a run of ours does).
"""
WIDTH = 140  # where there is no terminal


class Listed(NamedTuple):
    """One table: its heads, those set to the right, and its rows, which begin with a name."""

    heads: tuple[str, ...]
    right: tuple[str, ...]
    rows: Callable[[], Iterable[tuple[str, ...]]]


def show(arguments: list[str], console: Console | None = None) -> None:
    """Prints what is asked for: nothing for the kinds of things there are, else names such as `models=swin`.

    Args:
        arguments: kinds, each alone or with a filter: part of a name, or a pattern with `*`; several by commas.
        console: of another output than the standard one.

    Raises:
        UserError: there is no such kind, or nothing of it is called so.
    """
    console = console or Console()
    if {"--help", "-h"} & set(arguments):
        console.print(USAGE, highlight=False)
        return
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    for table in map(_table, arguments) if arguments else [_overview()]:
        console.print(table)


def _overview() -> Table:
    rows = ((kind, str(len(list(listed.rows()))), "", f"python train.py list {kind}") for kind, listed in KINDS.items())
    groups = ((group, str(len(names)), ", ".join(names), f"python train.py list {group}") for group, names in _plain())
    return _made(("what", "number", "which", ""), ("number",), (*rows, *groups))


def _table(argument: str) -> Table:
    kind, _, wanted = argument.partition("=")
    known = {kind: listed for name, listed in KINDS.items() for kind in (name, name.removesuffix("s"))}
    known |= {group: _of_group(group) for group, _ in _plain()}
    if kind not in known:
        names = (*KINDS, *(group for group, _ in _plain()))
        raise UserError(f"list: there is no {kind!r}{nearest(kind, names)}\navailable: {', '.join(names)}")
    rows = list(known[kind].rows())
    found = [row for row in rows if _is_called(row[0], wanted)] if wanted else rows
    if not found:
        names = [row[0] for row in rows]
        raise UserError(f"list: no word of a name begins so, got {argument}{nearest(wanted, names)}; try {kind} alone")
    return _made(known[kind].heads, known[kind].right, found)


def _is_called(name: str, wanted: str) -> bool:
    """Whether a word of the name begins with one of these, or the name is of a pattern among them."""
    name = name.lower()
    return any(
        fnmatchcase(name, w) if "*" in w else re.search(rf"(^|[ _/=]){re.escape(w)}", name)
        for w in _words(wanted.lower())
    )


def _words(wanted: str) -> list[str]:
    return [word for word in wanted.split(",") if word]


def _made(heads: tuple[str, ...], right: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(pad_edge=False, box=None, header_style="bold")
    for head in heads:
        whole = head in (heads[0], *right, "paper", "status")
        table.add_column(head, justify="right" if head in right else "left", no_wrap=whole, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _models() -> Iterator[tuple[str, ...]]:
    status = _status_of_models()
    rows = families.models().items()
    for name, row in sorted(rows, key=lambda item: (item[1]["family"], item[1]["counted"].get("multiply_adds", 0))):
        counted, published = row["counted"], row["published"]
        cost = (_share(counted, "parameters", 1e6), _share(counted, "multiply_adds", 1e9))
        score = f"FID {published['fid']}" if "fid" in published else str(published.get("top1", ""))
        paper = row["paper"].removeprefix("arXiv:")
        mixing = row.get("attention", "softmax")
        yield name, mixing, _pixels(row["image_size"]), *cost, paper, score, status.get(name, "")


def _share(counted: dict, key: str, unit: float) -> str:
    return small_figure(counted[key] / unit) if key in counted else ""


def _pixels(size: int | list[int]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _status_of_models() -> dict[str, str]:
    """Of the published results that a model has as recipes: the best that we have seen of them."""
    found: dict[str, set[str]] = {}
    for name in recipes.names():
        recipe = read(name)
        found.setdefault(recipe["model_name"], set()).add(recipe["target"]["status"])
    order = ("trained", "forward", "unverified")
    return {name: next((word for word in order if word in words), "") for name, words in found.items()}


def _attentions() -> Iterator[tuple[str, ...]]:
    for name in list_attentions():
        about = facts("attention", name)
        yield name, about.what, about.paper, about.cost.partition(". ")[0].rstrip(".")


def _plans() -> Iterator[tuple[str, ...]]:
    users: dict[str, list[str]] = {}
    for name, row in families.models().items():
        users.setdefault(str(row.get("attention", "")).removeprefix("plan/"), []).append(name)
    for name in options("attention"):
        if name.startswith("plan/"):
            yield name, ", ".join(users.get(name.removeprefix("plan/"), []))


def _parts() -> Iterator[tuple[str, ...]]:
    for part in (*PARTS, *PLACES):
        for name in options(group := group_of(part)):
            about = facts(group, name)
            yield f"{group}={name}", about.what, about.paper, about.cost.rstrip(".")


def _recipes() -> Iterator[tuple[str, ...]]:
    for name in recipes.names():
        recipe = read(name)
        target = recipe["target"]
        paper = str(target.get("paper") or "").removeprefix("arXiv:")
        yield name, recipe["model_name"], recipe.get("data_name", ""), paper, figure(target), target["status"]


def _systems() -> Iterator[tuple[str, ...]]:
    for system in systems.rows():
        yield system.name, system.command, system.paper, system.shown


def _of_group(group: str) -> Listed:
    return Listed((f"{group}=", "what it is"), (), lambda: [(name, summary(group, name)) for name in options(group)])


def _plain() -> list[tuple[str, list[str]]]:
    """The groups that no other table shows."""
    shown = {*map(group_of, (*PARTS, *PLACES)), "model", "attention", "recipe", "fit", "hydra"}
    return [(group, options(group)) for group in choosable() if group not in shown]


KINDS = {
    "models": Listed(
        ("model=", "attention", "pixels", "params (M)", "FLOPs (G)", "paper", "published", "status"),
        ("pixels", "params (M)", "FLOPs (G)", "published"),
        _models,
    ),
    "attentions": Listed(("attention=", "mechanism", "paper", "cost"), (), _attentions),
    "plans": Listed(("attention=", "of the models"), (), _plans),
    "parts": Listed(("part or place", "what it is", "paper", "cost"), (), _parts),
    "systems": Listed(("system", "command", "paper", "status"), (), _systems),
    "recipes": Listed(("recipe=", "model", "data", "paper", "published", "status"), ("published",), _recipes),
}
