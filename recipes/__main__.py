"""The table of recipes: `python -m recipes` prints it, `python -m recipes --write` puts it into README.md and here.

Parameters and multiply-adds are counted from the model; the top-1 is the paper's, and the status says whether we have
seen it: `unverified`, `forward` (the authors' weights give it here) or `trained` (a run of ours gives it).
"""

import re
import sys
from collections.abc import Iterator

import recipes

FILES = (recipes.ROOT.parent / "README.md", recipes.ROOT / "README.md")
HEAD = ("`recipe=`", "model", "parameters", "FLOPs", "paper top-1", "status")
NUMBERS = (2, 3, 4)  # columns that are set to the right


def table() -> str:
    """Markdown, one line per recipe."""
    rows = [HEAD, *rows_of_recipes()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = tuple("-" * (width - 1) + (":" if i in NUMBERS else "-") for i, width in enumerate(widths))
    return "\n".join(_line(row, widths) for row in [HEAD, rule, *rows[1:]])


def rows_of_recipes() -> Iterator[tuple[str, ...]]:
    """Name, model, parameters, multiply-adds, the paper's top-1 and the status of every recipe."""
    import torch

    from conf.cli import compose_run
    from models.backbones.base import pair
    from models.cost import multiply_adds, parameters
    from models.factory import build

    for name in recipes.names():
        cfg, choices = compose_run([f"recipe={name}"])
        with torch.device("meta"):
            model = build(cfg)
        flops = multiply_adds(model, pair(cfg.image_size))
        target = f"[{cfg.target.value}](https://arxiv.org/abs/{cfg.target.paper.removeprefix('arXiv:')})"
        cost = f"{parameters(model) / 1e6:.2f} M", f"{flops / 1e9:.2f} G"
        yield f"`{name}`", f"`{choices['model']}`", *cost, target, cfg.target.status


def updated(text: str) -> str:
    """A file with the current table between its markers."""
    return re.sub(
        r"(<!-- recipes -->\n).*?(\n<!-- /recipes -->)", lambda m: m[1] + table() + m[2], text, flags=re.DOTALL
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
        for file in FILES:
            file.write_text(updated(file.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main(sys.argv[1:])
