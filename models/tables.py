"""The tables of the README, from the configurations and the code: `python -m models.tables` writes them anew."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from omegaconf import OmegaConf

from conf.cli import CONF
from models import create_model, list_attentions, list_models
from models.attention import Grid, Site
from models.backbones.base import pair
from models.cost import multiply_adds, parameters
from models.factory import compose_model, factory

README = CONF.parent / "README.md"
SIZES = r"micro|tiny|small|medium|base|large|huge|giant|stl|b?\d+|32px|s|b|l|xl"
SIZE = re.compile(rf"_({SIZES})(_.*)?$")  # what follows a family's name


def attention_table() -> str:
    """Markdown: name, mechanism, paper, cost, class token, options with their defaults."""
    head = "| `attention=` | mechanism | paper | cost in tokens | class token | options |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_attention_row(name) for name in list_attentions())])


def model_table() -> str:
    """Markdown, one line per family: names, paper, image size, parameters with 1000 classes, multiply-adds."""
    head = "| `model=` | paper | pixels | parameters (M) | FLOPs (G) |\n|---|---|---|---|---|"
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(name[: SIZE.search(name).start()], []).append(name)
    return "\n".join([head, *(_family_row(family, names) for family, names in families.items())])


def update(text: str) -> str:
    """The README with current tables between their markers."""
    for name, table in [("attentions", attention_table()), ("models", model_table())]:
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)
    return text


def _attention_row(name: str) -> str:
    path = CONF / "attention" / f"{name}.yaml"
    about, _, cost = _comment(path).partition("Cost: ")
    paper = re.search(r"arXiv:([\d.]+\d)", about)
    mechanism = re.sub(r"\s*\([^()]*arXiv:[^()]*\)", "", about).strip().rstrip(".")
    cfg = compose_model("vit_32px", name)
    settings = OmegaConf.to_container(cfg.attention)
    options = [f"`{k}={_plain(v)}`" for k, v in settings.items() if not k.startswith("_") and not isinstance(v, dict)]
    options += ["`attention@attention.core=softmax`"] if "core" in settings else []
    mixer = factory(cfg)(Site(64, 4, Grid(8, 8), 0, 0, 2, "vit"))
    token = "yes" if mixer.accepts.prefix == "attended" else "no"
    link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
    return f"| `{name}` | {mechanism} | {link} | {re.split('[.;,] ?', cost)[0]} | {token} | {' '.join(options)} |"


class Cost(NamedTuple):
    """What a model costs at its own image size."""

    parameters: int
    multiply_adds: int
    image_size: int


@functools.cache
def cost_of(name: str) -> Cost:
    """Counted from the model, which is made without memory."""
    with torch.device("meta"):
        model = create_model(name)
    size = compose_model(name).image_size
    return Cost(parameters(model), multiply_adds(model, pair(size)), size)


def _family_row(family: str, names: list[str]) -> str:
    """Sizes in the order of their cost, e.g. `swin_{32px,tiny,small,base}`, and their figures in the same order."""
    names = sorted(names, key=lambda name: (cost_of(name).multiply_adds, name))
    sizes = [name.removeprefix(f"{family}_") for name in names]
    listed = f"`{family}_{{{','.join(sizes)}}}`" if len(sizes) > 1 else f"`{names[0]}`"
    papers = [re.search(r"arXiv:([\d.]+\d)", _comment(CONF / "model" / f"{name}.yaml")) for name in names]
    paper = next((found[1] for found in reversed(papers) if found), None)
    pixels = [str(cost_of(name).image_size) for name in names]
    pixels = pixels[:1] if len(set(pixels)) == 1 else pixels
    counts = [_figure(cost_of(name).parameters / 1e6) for name in names]
    flops = [_figure(cost_of(name).multiply_adds / 1e9) for name in names]
    columns = [", ".join(values) for values in (pixels, counts, flops)]
    return f"| {listed} | {f'[{paper}](https://arxiv.org/abs/{paper})' if paper else ''} | {' | '.join(columns)} |"


def _figure(value: float) -> str:
    """Two digits behind the point below 10, one below 100, none above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _comment(path: Path) -> str:
    """The comment at the top of a YAML file as one line, Hydra's own header left out."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _plain(value: object) -> str:
    """A value as it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


if __name__ == "__main__":
    README.write_text(update(README.read_text()))
