"""The table of recipes: `python -m recipes` prints it, `python -m recipes --write` puts it into recipes/README.md, and
a short one, by paper, into README.md.

Parameters and multiply-adds are counted from the model; the top-1, or the FID, is the paper's, and the status says
whether we have seen it: `unverified`, `forward` (the authors' weights give it here) or `trained` (a run of ours gives
it). Counting all takes a minute, so what is printed is taken from recipes/README.md, which a test compares; what is not
there is counted.
"""

import re
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import recipes

FILE, SHORT_FILE = recipes.ROOT / "README.md", recipes.ROOT.parent / "README.md"
HEAD = ("`recipe=`", "model", "parameters", "FLOPs", "paper top-1 or FID", "status")
NUMBERS = (2, 3, 4)  # columns that are set to the right
SIZES = ("tiny", "small", "medium", "base", "large", "stl", r"b\d", "s", "b", "l", "xl")


def table(anew: bool = False) -> str:
    """Markdown, one line per recipe; `anew` counts all of them again."""
    known = {} if anew else written()
    rows = [HEAD, *(known.get(name) or next(rows_of_recipes([name])) for name in recipes.names())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = tuple("-" * (width - 1) + (":" if i in NUMBERS else "-") for i, width in enumerate(widths))
    return "\n".join(_line(row, widths) for row in [HEAD, rule, *rows[1:]])


def written() -> dict[str, tuple[str, ...]]:
    """The rows of recipes/README.md, by recipe."""
    lines = FILE.read_text().partition("<!-- recipes -->\n")[2].partition("<!-- /recipes -->")[0].splitlines()
    rows = [tuple(cell.strip() for cell in line.strip("| ").split("|")) for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows if row != HEAD}


def short_table() -> str:
    """Markdown, one line per paper."""
    rows = [("paper", "`recipe=`", "number", "unverified"), ("---", "---", "--:", "--:"), *rows_of_papers()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def rows_of_recipes(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Name, model, parameters, multiply-adds, the paper's top-1 and the status of each."""
    import torch

    from conf.cli import compose_run
    from models.backbones.base import pair
    from models.cost import multiply_adds, parameters
    from models.factory import build

    for name in names:
        cfg, choices = compose_run([f"recipe={name}"])
        with torch.device("meta"):
            model = build(cfg)
        flops = multiply_adds(model, pair(cfg.image_size))
        target = _link(figure(cfg.target), cfg.target)
        cost = f"{parameters(model) / 1e6:.2f} M", f"{flops / 1e9:.2f} G"
        yield f"`{name}`", f"`{choices['model']}`", *cost, target, cfg.target.status


def rows_of_papers() -> Iterator[tuple[str, ...]]:
    """Link, names, number, and how many of them nobody has tried, of every paper."""
    for paper, names in groupby(recipes.names(), lambda name: name.partition("/")[0]):
        names = list(names)
        targets = [recipes.load(name).target for name in names]
        unverified = sum(target.status == "unverified" for target in targets)
        yield _link(paper, targets[0]), " ".join(_in_short(names)), str(len(names)), str(unverified)


def _in_short(names: list[str]) -> Iterator[str]:
    """As shells write several names: `agent/deit_{tiny,small}_in1k`."""
    parts: dict[tuple[str, str], list[tuple[list[int], str]]] = {}
    for name in names:
        match = re.fullmatch(rf"(.*?)(?<![a-z])({'|'.join(SIZES)})(?![a-z])(.*)(_[^_]+)", name)
        start, size, rest, end = match.groups() if match else (name, "", "", "")
        order = [i for i, pattern in enumerate(SIZES) if re.fullmatch(pattern, size)]
        parts.setdefault((start, end), []).append((order, size + rest))
    for (start, end), sizes in parts.items():
        several = ",".join(size for _, size in sorted(sizes))
        yield f"`{start}{{{several}}}{end}`" if len(sizes) > 1 else f"`{start}{several}{end}`"


def figure(target: Any) -> str:
    """The published figure as the table shows it: percent, or FID by its name."""
    if target.value is None:
        return "–"
    return f"FID {target.value}" if target.metric == "fid" else str(target.value)


def _link(text: str, target: Any) -> str:
    return f"[{text}](https://arxiv.org/abs/{target.paper.removeprefix('arXiv:')})"


def updated(text: str, current: str) -> str:
    """A file with the current table between its markers."""
    return re.sub(
        r"(<!-- recipes -->\n).*?(\n<!-- /recipes -->)", lambda m: m[1] + current + m[2], text, flags=re.DOTALL
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.rjust(width) if i in NUMBERS else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--write"]):
        sys.exit(f"recipes: no such option, got {' '.join(arguments)}; use python -m recipes [--write]")
    if arguments:
        for file, current in ((FILE, table(anew=True)), (SHORT_FILE, short_table())):
            file.write_text(updated(file.read_text(), current))
    else:
        print(table())


if __name__ == "__main__":
    main(sys.argv[1:])
