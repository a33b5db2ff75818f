"""The reference in docs/ and the table of the README, from the fields of conf/: `python -m models.tables` writes them.

No model is made for them. `--count <name> …` counts models and prints the field `counted` of their rows.
"""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from conf import families
from conf.names import PARTS, PLACES, group_of
from conf.names import options as names_in
from models import list_attentions, recipe_tables, scaling_table, systems
from models.facts import comment, facts, small_figure

ROOT = families.CONF.parent
PER_LINE = 5  # families in the README
REFERENCE = ROOT / "docs" / "reference"


def pages() -> dict[Path, str]:
    """Every page of `TABLES` as it should be: what is between a pair of markers is written anew."""
    found = {}
    for path, tables in TABLES.items():
        found[path] = path.read_text()
        for name, table in tables.items():
            found[path] = recipe_tables.updated(found[path], table(), name)
    return found


def attention_table() -> str:
    """Markdown: name, mechanism, paper, cost, class token."""
    return _table(
        ("`attention=`", "mechanism", "paper", "cost in tokens", "class token"),
        (_attention_row(name) for name in list_attentions()),
    )


def option_sections() -> str:
    """Markdown: the options of every mechanism with their defaults and what the file says of them."""
    return "\n\n".join(_option_section(name) for name in list_attentions())


def part_sections() -> str:
    """Markdown: a section per part of a mechanism, one line per name, with paper and options."""
    return "\n\n".join(_group_section(part) for part in PARTS)


def place_sections() -> str:
    """Markdown: likewise, of the other places."""
    return "\n\n".join(_group_section(place) for place in PLACES)


def probe_sections() -> str:
    """Markdown: a section per probe: what it is, the command, and its options."""
    return "\n\n".join(_probe_section(name) for name in names_in("probe"))


def system_table() -> str:
    """Markdown: systems of the literature, what chooses them, and what vouches for them."""
    rows = ((row.name, _arxiv(row.paper), f"`{row.command}`", row.shown, _proof(row)) for row in systems.rows())
    return _table(("system", "paper", "command", "status", "where"), rows)


def family_list() -> str:
    """Markdown: every family with its paper, the number of its models, and the range of their parameters."""
    items = [_family(family, rows) for family, rows in _by_family().items()]
    lines = [" · ".join(items[start : start + PER_LINE]) for start in range(0, len(items), PER_LINE)]
    return "Families, models of each, and millions of parameters:\n" + " ·\n".join(lines) + "."


def model_sections() -> str:
    """Markdown: a section per family, one line per model, in the order of their cost."""
    return "\n\n".join(_model_section(family, rows) for family, rows in _by_family().items())


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


def _by_family() -> dict[str, dict[str, dict]]:
    """Rows by family and name; in a family in the order of their cost.

    Raises:
        ValueError: a row without `counted`.
    """
    if missing := " ".join(name for name, row in families.models().items() if not row["counted"]):
        raise ValueError(
            f"models.tables: there are no figures of {missing}; put what `python -m models.tables --count {missing}` "
            "prints into the row"
        )
    found: dict[str, dict[str, dict]] = {}
    for name, row in sorted(families.models().items(), key=lambda item: (item[1]["counted"]["multiply_adds"], item[0])):
        found.setdefault(row["family"], {})[name] = row
    return dict(sorted(found.items()))


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *map(" | ".join, rows)]
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)


def _attention_row(name: str) -> tuple[str, ...]:
    about = facts("attention", name)
    token = "no" if "no class token" in about.cost.lower() else "yes"
    return f"[`{name}`](#{name})", about.what, _arxiv(about.paper), re.split("[.;,] ?", about.cost)[0], token


def _option_section(name: str) -> str:
    """Heading, what the file says at its top, options."""
    settings, said = _settings(name), _said(name)
    options = {key: value for key, value in settings.items() if not key.startswith("_") and not isinstance(value, dict)}
    rows = [(f"`{key}`", f"`{plain(value)}`", said.get(key, "")) for key, value in options.items()]
    parts = {key: node for key, node in settings.items() if key in PARTS and isinstance(node, dict)}
    for key, node in parts.items():
        given = {option: value for option, value in node.items() if not option.startswith("_")}
        rows.append((f"`attention/{key}`", f"`{node['_target_'].split('.')[-1]}`", plain(given) if given else ""))
    if "core" in settings:
        rows.append(("`attention@attention.core`", "`softmax`", "the attention whose heads are weighted"))
    file = f"[conf/attention/{name}.yaml](../../conf/attention/{name}.yaml)"
    table = _table(("option", "default", ""), ((key, value, text.replace("|", "\\|")) for key, value, text in rows))
    return f"### {name}\n\n{comment(_file(name))} In {file}.\n\n{table}"


def _probe_section(name: str) -> str:
    """Heading, what the file says at its top, the command that it gives, options."""
    path = families.CONF / "probe" / f"{name}.yaml"
    about, _, command = comment(path).partition(" python ")
    said, options = _comments(path.read_text()), yaml.safe_load(path.read_text())
    rows = [(f"`{key}`", f"`{plain(value)}`", said.get(key, "")) for key, value in options.items() if key[0] != "_"]
    listed = f"\n\n{_table(('`probe.…`', 'default', ''), iter(rows))}" if rows else ""
    return f"### {name}\n\n{about}\n\n    python {command}{listed}"


def _group_section(part: str) -> str:
    """Heading, and one line per name of a group."""
    group = group_of(part)
    rows = (_part_row(group, name) for name in names_in(group))
    return f"### {part}\n\n{_table((f'`{group}=`', 'what it is', 'paper', 'options'), rows)}"


def _part_row(group: str, name: str) -> tuple[str, ...]:
    path = families.CONF / group / f"{name}.yaml"
    about = comment(path)
    paper = facts(group, name).paper
    what = re.sub(r"\s*\([^()]*arXiv:[^()]*\)", "", about).strip().rstrip(".")
    written = yaml.safe_load(path.read_text())
    own = written.get(group, written)  # a file may bring settings of other groups
    options = {key: value for key, value in own.items() if not key.startswith("_")}
    listed = ", ".join(f"`{key}={plain(value)}`" for key, value in options.items())
    return f"`{name}`", what.replace("|", "\\|"), _arxiv(paper), listed.replace("|", "\\|")


def _said(name: str) -> dict[str, str]:
    """The comments behind the options of a mechanism, those of the mechanism that it starts from included."""
    text = _file(name).read_text()
    found: dict[str, str] = {}
    for default in yaml.safe_load(text).get("defaults", []):
        if isinstance(default, str) and default != "_self_":
            found |= _said(_base(default))
    return found | _comments(text)


def _comments(text: str) -> dict[str, str]:
    """What stands behind the options of a file."""
    return {m[1]: m[2] for m in re.finditer(r"^(\w+):[^#\n]*# *(.+)$", text, re.MULTILINE)}


def _base(default: str) -> str:
    return default.removeprefix("/attention/").removesuffix("@_here_")


def _settings(name: str) -> dict[str, Any]:
    """The options of a mechanism with their defaults, those of the mechanism that it starts from included."""
    node = yaml.safe_load(_file(name).read_text())
    settings: dict[str, Any] = {}
    for default in node.pop("defaults", []):
        if isinstance(default, str) and default != "_self_":
            settings |= _settings(_base(default))
    return settings | node


def _family(family: str, rows: dict[str, dict]) -> str:
    counted = sorted(row["counted"]["parameters"] for row in rows.values())
    least, most = (small_figure(count / 1e6) for count in (counted[0], counted[-1]))
    number = next(iter(rows.values()))["paper"].removeprefix("arXiv:")
    return (
        f"[{family}](https://arxiv.org/abs/{number}) {len(rows)} ({least if least == most else f'{least} to {most}'})"
    )


def _model_section(family: str, rows: dict[str, dict]) -> str:
    """Heading, what the table of the family says at its top, one line per model."""
    head = ("`model=`", "attention", "pixels", "parameters (M)", "FLOPs (G)", "published: M, G, top-1 (%) or FID")
    file = f"[conf/model/{family}.yaml](../../conf/model/{family}.yaml)"
    source = next(iter(rows.values()))["source"]
    said = f"{comment(families.CONF / 'model' / f'{family}.yaml')} {_paper(next(iter(rows.values())))}, {file}."
    said += f" Published figures: {source}." if source else ""
    return f"### {family}\n\n{said}\n\n{_table(head, (_model_row(name, row) for name, row in rows.items()))}"


def _model_row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    published, counted = row["published"], row["counted"]
    figures = [str(published.get(key, "–")) for key in ("parameters", "multiply_adds")]
    score = f"FID {published['fid']}" if "fid" in published else str(published.get("top1", "–"))
    costs = (small_figure(counted["parameters"] / 1e6), small_figure(counted["multiply_adds"] / 1e9))
    said = ", ".join([*figures, score]) if published else ""
    return f"`{name}`", f"`{row.get('attention', 'softmax')}`", str(row["image_size"]), *costs, said


def _proof(row: systems.System) -> str:
    folder = "tests/references/" if row.status.startswith("cases") else ""
    return ", ".join(f"[{path.rpartition('/')[2]}](../{folder}{path})" for path in row.proof)


def _paper(row: dict[str, Any]) -> str:
    return _arxiv(row["paper"].removeprefix("arXiv:"))


def _arxiv(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def _file(attention: str) -> Path:
    return families.CONF / "attention" / f"{attention}.yaml"


def plain(value: object) -> str:
    """A value as it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


TABLES = {
    ROOT / "README.md": {"families": family_list},
    ROOT / "docs" / "systems.md": {"systems": system_table},
    ROOT / "docs" / "scale.md": {"scale": scaling_table.table},
    REFERENCE / "attentions.md": {"attentions": attention_table, "options": option_sections},
    REFERENCE / "models.md": {"models": model_sections},
    REFERENCE / "parts.md": {"parts": part_sections, "places": place_sections},
    REFERENCE / "probes.md": {"probes": probe_sections},
    REFERENCE / "recipes.md": {"papers": recipe_tables.short_table, "recipes": recipe_tables.table},
}


HELP = """python -m models.tables                    writes the tables of README.md and docs/reference anew, from conf/
python -m models.tables --count <model> ... counts models and prints the field `counted` of their rows

To look something up without writing: python train.py list"""


def main(arguments: list[str]) -> None:
    """Write the tables, or count what is named."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
    elif arguments[:1] == ["--count"] and len(arguments) > 1:
        for name in arguments[1:]:
            cost = cost_of(name)
            print(f"{name}: counted: {{parameters: {cost.parameters}, multiply_adds: {cost.multiply_adds}}}")
    elif arguments:
        given = " ".join(arguments)
        sys.exit(f"models.tables: no such option, got {given}; use python -m models.tables [--count <model> ...]")
    else:
        start = time.perf_counter()
        try:
            written = pages()
        except ValueError as error:
            sys.exit(str(error))
        for path, text in written.items():
            path.write_text(text)
        names = ", ".join(path.name for path in written)
        print(f"written: {names}, in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
