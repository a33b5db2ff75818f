"""The tables of the README, from the fields of conf/: `python -m models.tables` writes them anew, without a model.

`--count <name> …` counts models and prints the field `counted` of their rows.
"""

import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from conf import families
from models import list_attentions

README = families.CONF.parent / "README.md"


def attention_table() -> str:
    """Markdown: name, mechanism, paper, cost, class token, options with their defaults."""
    head = "| `attention=` | mechanism | paper | cost in tokens | class token | options |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_attention_row(name) for name in list_attentions())])


def model_table() -> str:
    """Markdown, one line per family: names, paper, image size, parameters with 1000 classes, multiply-adds, score.

    Raises:
        ValueError: a row without `counted`.
    """
    columns = ["`model=`", "paper", "pixels", "parameters (M)", "FLOPs (G)", "published top-1 (%) or FID"]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    if missing := " ".join(name for name, row in families.models().items() if not row["counted"]):
        raise ValueError(
            f"models.tables: there are no figures of {missing}; put what `python -m models.tables --count {missing}` "
            "prints into the row"
        )
    by_family: dict[str, dict[str, dict]] = {}
    for name, row in families.models().items():
        by_family.setdefault(row["family"], {})[name] = row
    return "\n".join([head, *(_family_row(family, rows) for family, rows in by_family.items())])


def update(text: str) -> str:
    """The README with current tables between their markers."""
    for name, table in [("attentions", attention_table()), ("models", model_table())]:
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)
    return text


class Cost(NamedTuple):
    """What a model costs at its own image size, with 1000 classes."""

    parameters: int
    multiply_adds: int


def cost_of(name: str) -> Cost:
    """Counted from the model, which is made without memory."""
    import torch

    from models import create_model
    from models.backbones.base import pair
    from models.cost import multiply_adds, parameters

    with torch.device("meta"):
        model = create_model(name)
    return Cost(parameters(model), multiply_adds(model, pair(families.models()[name]["image_size"])))


def _attention_row(name: str) -> str:
    about, _, cost = _comment(_file(name)).partition("Cost: ")
    paper = re.search(r"arXiv:([\d.]+\d)", about)
    mechanism = re.sub(r"\s*\([^()]*arXiv:[^()]*\)", "", about).strip().rstrip(".")
    settings = _settings(name)
    options = [f"`{k}={plain(v)}`" for k, v in settings.items() if not k.startswith("_") and not isinstance(v, dict)]
    options += ["`attention@attention.core=softmax`"] if "core" in settings else []
    token = "no" if "no class token" in cost.lower() else "yes"
    link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
    return f"| `{name}` | {mechanism} | {link} | {re.split('[.;,] ?', cost)[0]} | {token} | {' '.join(options)} |"


def _settings(name: str) -> dict[str, Any]:
    """The options of a mechanism with their defaults, those of the mechanism that it starts from included."""
    node = yaml.safe_load(_file(name).read_text())
    settings: dict[str, Any] = {}
    for default in node.pop("defaults", []):
        if isinstance(default, str) and default != "_self_":
            settings |= _settings(default.removeprefix("/attention/").removesuffix("@_here_"))
    return settings | node


def _family_row(family: str, rows: dict[str, dict]) -> str:
    """Sizes in the order of their cost, e.g. `swin_{32px,tiny,small,base}`, and their figures in the same order."""
    ordered = sorted(rows, key=lambda name: (rows[name]["counted"]["multiply_adds"], name))
    sizes = [str(rows[name]["size"]) for name in ordered]
    if len(rows) > 1 and ordered == [f"{family}_{size}" for size in sizes]:
        listed = f"`{family}_{{{','.join(sizes)}}}`"
    else:
        listed = " ".join(f"`{name}`" for name in ordered)
    paper = rows[ordered[0]]["paper"].removeprefix("arXiv:")
    pixels = [str(rows[name]["image_size"]) for name in ordered]
    counted = [rows[name]["counted"] for name in ordered]
    columns = [
        pixels[:1] if len(set(pixels)) == 1 else pixels,
        [_figure(cost["parameters"] / 1e6) for cost in counted],
        [_figure(cost["multiply_adds"] / 1e9) for cost in counted],
    ]
    cells = [*map(", ".join, columns), _scores([rows[name]["published"] for name in ordered])]
    return f"| {listed} | [{paper}](https://arxiv.org/abs/{paper}) | {' | '.join(cells)} |"


def _figure(value: float) -> str:
    """Two digits behind the point below 10, one below 100, none above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _scores(published: list[dict[str, float]]) -> str:
    """What is published of a family, e.g. `83.1, –, 84.7`, or nothing."""
    scores = [str(figures.get("top1", figures.get("fid", "–"))) for figures in published]
    metric = "FID " if any("fid" in figures for figures in published) else ""
    return metric + ", ".join(scores) if set(scores) != {"–"} else ""


def _file(attention: str) -> Path:
    return families.CONF / "attention" / f"{attention}.yaml"


def _comment(path: Path) -> str:
    """The comment at the top of a YAML file as one line, Hydra's own header left out."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def plain(value: object) -> str:
    """A value as it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def main(arguments: list[str]) -> None:
    """Write the tables, or count what is named."""
    if arguments[:1] == ["--count"] and len(arguments) > 1:
        for name in arguments[1:]:
            cost = cost_of(name)
            print(f"{name}: counted: {{parameters: {cost.parameters}, multiply_adds: {cost.multiply_adds}}}")
    elif arguments:
        given = " ".join(arguments)
        sys.exit(f"models.tables: no such option, got {given}; use python -m models.tables [--count <model> ...]")
    else:
        start = time.perf_counter()
        try:
            text = update(README.read_text())
        except ValueError as error:
            sys.exit(str(error))
        README.write_text(text)
        print(f"written: {README.name}, in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
