"""The tables of recipes: `python -m recipes` prints the long one, `python -m recipes --write` puts it into
docs/reference/recipes.md, and a short one, by paper.

Parameters and multiply-adds are those that the row of the model records; of a recipe that changes the model itself they
are counted, once, and then taken from that page. The top-1, or the FID, is the paper's, and the status says
whether we have seen it: `unverified`, `forward` (the authors' weights give it here) or `trained` (a run of ours gives
it).
"""

import re
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import yaml

from conf import families, recipes

FILE = recipes.ROOT.parent / "docs" / "reference" / "recipes.md"
HEAD = ("`recipe=`", "model", "parameters", "FLOPs", "paper top-1 or FID", "status")
NUMBERS = (2, 3, 4)  # columns that are set to the right
TRAINED = {"drop_path"}  # settings of a model that change how it is trained, not what it costs


def table(anew: bool = False) -> str:
    """Markdown, one line per recipe; `anew` counts again what is not a field of conf/model."""
    known = {} if anew else written()
    rows = [HEAD, *(row_of(name, known) for name in recipes.names())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = tuple("-" * (width - 1) + (":" if i in NUMBERS else "-") for i, width in enumerate(widths))
    return "\n".join(_line(row, widths) for row in [HEAD, rule, *rows[1:]])


def written() -> dict[str, tuple[str, ...]]:
    """The rows of the page, by recipe."""
    lines = FILE.read_text().partition("<!-- recipes -->\n")[2].partition("<!-- /recipes -->")[0].splitlines()
    rows = [tuple(cell.strip() for cell in line.strip("| ").split("|")) for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows if row != HEAD}


def short_table() -> str:
    """Markdown, one line per paper."""
    rows = [("paper", "`recipe=`", "number", "unverified"), ("---", "---", "--:", "--:"), *rows_of_papers()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def row_of(name: str, known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Name, model, parameters, multiply-adds, the paper's figure and the status of a recipe."""
    recipe = read(name)
    row = families.models()[recipe["model_name"]]
    if _as_recorded(recipe, row):
        cost = _cost(row["counted"]["parameters"], row["counted"]["multiply_adds"])
    else:
        cost = known[name][2:4] if name in known else counted(name)
    target = recipe["target"]
    return f"`{name}`", f"`{recipe['model_name']}`", *cost, _link(figure(target), target), target["status"]


def counted(name: str) -> tuple[str, str]:
    """Parameters and multiply-adds of the model of a recipe, as the table has them."""
    import torch

    from conf.compose import compose_run
    from models.backbones.base import pair
    from models.cost import multiply_adds, parameters
    from models.factory import build_model

    cfg, _ = compose_run([f"recipe={name}"])
    with torch.device("meta"):
        model = build_model(cfg)
    return _cost(parameters(model), multiply_adds(model, pair(cfg.image_size)))


def rows_of_papers() -> Iterator[tuple[str, ...]]:
    """Link, names, number, and how many of them nobody has tried, of every paper."""
    for paper, group in groupby(recipes.names(), lambda name: name.partition("/")[0]):
        each = {name: read(name) for name in group}
        targets = [recipe["target"] for recipe in each.values()]
        unverified = sum(target["status"] == "unverified" for target in targets)
        yield _link(paper, targets[0]), " ".join(_in_short(each)), str(len(each)), str(unverified)


def figure(target: dict[str, Any]) -> str:
    """The published figure as the table shows it: percent, or FID by its name."""
    if target["value"] is None:
        return "–"
    return f"FID {target['value']}" if target["metric"] == "fid" else str(target["value"])


def updated(text: str, current: str, name: str) -> str:
    """A page with the current table between the markers of this name."""
    between = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    return re.sub(between, lambda match: match[1] + current + match[2], text, flags=re.DOTALL)


def _in_short(each: dict[str, dict[str, Any]]) -> Iterator[str]:
    """As shells write several names, in the order of the table of models: `agent/deit_{tiny,small}_in1k`."""
    parts: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name, recipe in each.items():
        row = families.models()[recipe["model_name"]]
        order = list(families.tables()[row["family"]]["models"]).index(recipe["model_name"])
        start, size, end = _around(name, str(row["size"]))
        parts.setdefault((start, end), []).append((order, size))
    for (start, end), sizes in parts.items():
        several = ",".join(size for _, size in sorted(sizes))
        yield f"`{start}{{{several}}}{end}`" if len(sizes) > 1 else f"`{start}{several}{end}`"


def _around(name: str, size: str) -> tuple[str, str, str]:
    """What stands before the size of the model in the name of a recipe, the size and what follows, and the data set."""
    paper, _, words = name.partition("/")
    before, found, after = f"_{words}_".partition(f"_{size}_")
    rest, _, data = after.strip("_").rpartition("_")
    if not found or not data:
        return name, "", ""
    start = f"{paper}/{before[1:]}{'_' if before else ''}"
    return start, f"{size}_{rest}" if rest else size, f"_{data}"


def read(name: str) -> dict[str, Any]:
    """A recipe with what its bases say of the model, not composed; `model_name` is the model that it chooses."""
    found: dict[str, Any] = {}
    node = yaml.load((recipes.ROOT / f"{name}.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for default in node.pop("defaults", []):
        if isinstance(default, str) and default != "_self_":
            base = read(default.removeprefix("/recipe/"))
            found |= base | {"model": found.get("model", {}) | base.get("model", {})}
        elif isinstance(default, dict):
            chosen = {"override /model": "model_name", "override /data": "data_name", "override /attention": "mixing"}
            found |= {chosen[key]: value for key, value in default.items() if key in chosen}
    return found | node | {"model": found.get("model", {}) | node.get("model", {})}


def _as_recorded(recipe: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the recipe trains the model as its row counts it: its own attention, 1000 classes, its image size."""
    own = not {"mixing", "attention"} & recipe.keys() and recipe["data_name"] == "imagenet1k"
    changed = {key for key, value in recipe["model"].items() if row["model"].get(key) != value}
    return own and changed <= TRAINED and recipe.get("image_size", row["image_size"]) == row["image_size"]


def _cost(parameters: int, multiply_adds: int) -> tuple[str, str]:
    return f"{parameters / 1e6:.2f} M", f"{multiply_adds / 1e9:.2f} G"


def _link(text: str, target: dict[str, Any]) -> str:
    return f"[{text}](https://arxiv.org/abs/{target['paper'].removeprefix('arXiv:')})"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.rjust(width) if i in NUMBERS else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


HELP = """python -m recipes            prints the table of recipes: model, cost, published figure, status
python -m recipes --write    writes it into docs/reference/recipes.md instead

Status: unverified, forward (the authors' weights give it here) or trained (a run of ours does)."""


def main(arguments: list[str]) -> None:
    """Print the table, or write both."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    if arguments not in ([], ["--write"]):
        sys.exit(f"recipes: no such option, got {' '.join(arguments)}; use python -m recipes [--write]")
    if arguments:
        text = updated(FILE.read_text(), short_table(), "papers")
        FILE.write_text(updated(text, table(anew=True), "recipes"))
    else:
        print(table())
