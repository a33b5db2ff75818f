"""Models: `conf/model/<family>.yaml` is one table per family, and every row of it is an option `model=<name>`.

A table has `family`, `paper` and `source` (of what is published), `common` (what its models share) and `models`, by
name what each has otherwise:
    size: of the family, as tables write it; `32px` is the small one that the tests train.
    base: a model to start from; below `common` where it is of another family, in place of it where it is of this one.
    attention, plan: its token mixing; a `plan` is offered as `attention=plan/<name>`, or under the name in `attention`.
    image_size, model: settings; `defaults` what Hydra composes besides.
    published: parameters (millions), multiply_adds (billions), and top1 (percent) or fid, as the paper says.
    counted: parameters and multiply_adds of ours, with 1000 classes: `python -m models.tables --count <name>`.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).parent
Settings = dict[str, Any]


@cache
def tables() -> dict[str, Settings]:
    """Every table, by its family."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = (yaml.load(path.read_text(), loader) for path in sorted((CONF / "model").glob("*.yaml")))
    return {table["family"]: table for table in found if "models" in table}


def files() -> list[str]:
    """What stands in conf/model as a file of its own: models that are none of ours."""
    return sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - tables().keys())


@cache
def models() -> dict[str, Settings]:
    """Every row, by its name, with what it has from its base and its table."""
    homes = {name: table for table in tables().values() for name in table["models"]}
    return {name: _whole(name, homes) for name in sorted(homes)}


@cache
def plans() -> dict[str, Settings]:
    """The plans of rows, by the name that `attention=plan/<name>` gives."""
    return {row["attention"].partition("/")[2]: row["plan"] for row in models().values() if "plan" in row}


def small() -> list[str]:
    """The models for 32 pixels, one or more of every backbone that classifies, which the tests train."""
    return [name for name, row in models().items() if row["size"] == "32px"]


def _whole(name: str, homes: dict[str, Settings]) -> Settings:
    table, base = homes[name], homes[name]["models"][name].get("base")
    row = {"family": table["family"], "paper": table["paper"], "source": table.get("source")} | table["models"][name]
    if "plan" in row:
        row.setdefault("attention", f"plan/{name}")
    if base is not None and base not in homes:
        file = f"conf/model/{table['family']}.yaml"
        raise ValueError(f"{file}: base of {name} must be another model, got {base!r}; `train.py --help` lists them")
    given = row if base in table["models"] else _merged(table.get("common", {}), row)
    whole = _merged(_whole(base, homes), given) if base else given
    own = {key: row.get(key, {}) for key in ("published", "counted")}
    kept = "plan" in given or "attention" not in given
    return {key: value for key, value in (whole | own).items() if key != "plan" or kept}


def _merged(first: Settings, second: Settings) -> Settings:
    """A new dict in which the second wins, dicts of both merged."""
    both = {key: _merged(first[key], second[key]) for key in first.keys() & second.keys() if _dicts(first, second, key)}
    return first | second | both


def _dicts(first: Settings, second: Settings, key: str) -> bool:
    return isinstance(first[key], dict) and isinstance(second[key], dict)
