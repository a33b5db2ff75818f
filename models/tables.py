"""The tables of the README, from the configurations and the code: `python -m models.tables` writes them anew."""

import re
from pathlib import Path

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


def attention_table() -> str:
    """Markdown: name, mechanism, paper, cost, class token, options with their defaults."""
    head = "| `attention=` | mechanism | paper | cost in tokens | class token | options |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_attention_row(name) for name in list_attentions())])


def model_table() -> str:
    """Markdown: name, what it is, image size, parameters with 1000 classes, multiply-adds of an image."""
    head = "| `model=` | | pixels | parameters | FLOPs |\n|---|---|---:|---:|---:|"
    return "\n".join([head, *(_model_row(name) for name in list_models())])


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


def _model_row(name: str) -> str:
    about = _comment(CONF / "model" / f"{name}.yaml").split(": ")[0].split(". ")[0]
    with torch.device("meta"):
        model = create_model(name)
    size = compose_model(name).image_size
    flops = multiply_adds(model, pair(size)) / 1e9
    return f"| `{name}` | {about} | {size} | {parameters(model) / 1e6:.2f} M | {flops:.2f} G |"


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
