"""What the files of conf/ say about what they offer, as plain text; nothing is imported or made for it."""

import re
from pathlib import Path
from typing import NamedTuple

from conf.names import CONF


class Facts(NamedTuple):
    """What it is, in a sentence; the paper's number at arXiv, and the cost in tokens, where the file says them."""

    what: str
    paper: str
    cost: str


def facts(group: str, name: str) -> Facts:
    """Of one option, from the comment at the top of its file."""
    about, _, cost = comment(CONF / group / f"{name}.yaml").partition("Cost: ")
    paper = re.search(r"arXiv:([\d.]+\d)", about)
    return Facts(re.sub(r"\s*\([^()]*arXiv:[^()]*\)", "", about).strip().rstrip("."), paper[1] if paper else "", cost)


def comment(path: Path) -> str:
    """The comment at the top of a YAML file as one line, Hydra's own header left out."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def summary(group: str, name: str) -> str:
    """Its first sentence."""
    first = (CONF / group / f"{name}.yaml").read_text().removeprefix("# @package _global_\n").splitlines()[0]
    return re.split(r"(?<=[a-z\d)])\. ", first.removeprefix("#").strip())[0].rstrip(".")


def small_figure(value: float) -> str:
    """Two digits behind the point below 10, one below 100, none above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
