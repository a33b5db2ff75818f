"""Models for Hydra: `conf/model/<family>.yaml` is one table per family, and every row of it an option `model=<name>`.

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
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

CONF = Path(__file__).parent
MODEL, PLAN = "model/", "attention/plan/"
GIVEN = {
    "_convert_": "all",
    "attention": "${attention}",
    "image_size": "${image_size}",
    "num_classes": "${data.num_classes}",
}
Settings = dict[str, Any]


@cache
def tables() -> dict[str, Settings]:
    """Every table, by its family."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = (yaml.load(path.read_text(), loader) for path in sorted((CONF / "model").glob("*.yaml")))
    return {table["family"]: table for table in found}


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


def register() -> None:
    """Let Hydra read conf/ with its tables; call before composing."""
    Plugins.instance().register(_Conf)
    Plugins.instance().register(_ConfPath)


class _Conf(FileConfigSource):
    """The folder conf/, where tables of models stand for one file per model, and rows for files of plans."""

    @staticmethod
    def scheme() -> str:
        return "conf"

    def load_config(self, config_path: str) -> ConfigResult:
        kind, options, name = _found(config_path)
        if name not in options:
            return super().load_config(config_path)
        node = _model(options[name]) if kind == MODEL else options[name]
        package = "_global_" if kind == MODEL else None
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(node), header={"package": package})

    def is_config(self, config_path: str) -> bool:
        kind, options, name = _found(config_path)
        return name in options or (kind != MODEL and super().is_config(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        _, options, _ = _found(f"{config_path}/")
        rows = [] if results_filter == ObjectType.GROUP else list(options)
        return sorted({*super().list(config_path, results_filter), *rows})


class _ConfPath(SearchPathPlugin):
    """Puts the above in the place of the folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in search_path.get_path():
            if element.path.removeprefix("file://") == str(CONF):
                element.path = f"{_Conf.scheme()}://{CONF}"


def _found(config_path: str) -> tuple[str, Settings, str]:
    """The group that has rows, these rows, and the name in it; empty where there are none."""
    for kind, rows in ((MODEL, models), (PLAN, plans)):
        if config_path.startswith(kind):
            return kind, rows(), config_path.removeprefix(kind).removesuffix(".yaml")
    return "", {}, config_path


def _whole(name: str, homes: dict[str, Settings]) -> Settings:
    table, base = homes[name], homes[name]["models"][name].get("base")
    row = {"family": table["family"], "paper": table["paper"], "source": table.get("source")} | table["models"][name]
    if "plan" in row:
        row.setdefault("attention", f"plan/{name}")
    given = row if base in table["models"] else _merged(table["common"], row)
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


def _model(row: Settings) -> Settings:
    """What a file of conf/model would hold."""
    attention = [{"override /attention": row["attention"]}] if "attention" in row else []
    target = {"_target_": row["model"]["_target_"]}
    return {
        "defaults": [*row.get("defaults", []), *attention, "_self_"],
        "image_size": row["image_size"],
        "model": target | GIVEN | row["model"],
    }
