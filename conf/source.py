"""What Hydra reads: conf/, where a row of a table stands for the file of a model or a plan, and recipes/ beside it."""

from os.path import relpath
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from conf import families, recipes
from conf.names import PARTS, PLACES, options

MODEL, PLAN, RECIPE = "model/", "attention/plan/", "recipe/"
GIVEN = {
    "_convert_": "all",
    "attention": "${attention}",
    "image_size": "${image_size}",
    "num_classes": "${data.num_classes}",
    "in_channels": "${oc.select:data.channels,3}",
    **{place: f"${{{place}}}" for place in PLACES},
    "gate_at": None,
    "activation": None,
    "norm": None,
    "wiring": None,
    "downsample": None,
}


# names with a folder in them, which completion and messages show whole
NESTED = {"recipe": recipes.names, "attention": lambda: options("attention")}


def register() -> None:
    """Let Hydra read all of it, from any directory; call before composing."""
    Plugins.instance().register(_Conf)
    Plugins.instance().register(_ConfPath)


class _Conf(FileConfigSource):
    """The folder conf/ with what is in no file of it: the group `recipe`, and rows for models and plans."""

    @staticmethod
    def scheme() -> str:
        return "conf"

    def load_config(self, config_path: str) -> ConfigResult:
        if _is_none(config_path):
            nothing = OmegaConf.create({"attention": None} if config_path.startswith("attention/none") else {})
            return ConfigResult(self.provider, self.full_path(), nothing, header={"package": "_global_"})
        rows, name = _rows(config_path)
        if name not in rows:
            result = super().load_config(_place(config_path))
        else:
            node = _model(rows[name]) if config_path.startswith(MODEL) else rows[name]
            result = ConfigResult(self.provider, self.full_path(), OmegaConf.create(node), header={"package": None})
        if config_path.startswith((MODEL, RECIPE)):
            result.header["package"] = "_global_"
        return result

    def is_config(self, config_path: str) -> bool:
        rows, name = _rows(config_path)
        return (
            _is_none(config_path)
            or name in rows
            or (not _is_table(config_path) and super().is_config(_place(config_path)))
        )

    def is_group(self, config_path: str) -> bool:
        return super().is_group(_place(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found = set(super().list(_place(config_path), results_filter))
        if results_filter != ObjectType.GROUP:
            found |= _rows(f"{config_path}/")[0].keys()
        if config_path == "" and results_filter != ObjectType.CONFIG:
            found.add("recipe")
        if results_filter == ObjectType.CONFIG and config_path in NESTED:
            found = set(NESTED[config_path]())
        if results_filter == ObjectType.GROUP and config_path == "recipe":
            found = set()
        return sorted(found)


class _ConfPath(SearchPathPlugin):
    """Puts the above in the place of the folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in search_path.get_path():
            if element.path.removeprefix("file://") == str(families.CONF):
                element.path = f"{_Conf.scheme()}://{families.CONF}"


def _place(config_path: str) -> str:
    """Where below conf/ it stands; recipes/ is beside."""
    if not f"{config_path}/".startswith(RECIPE):
        return config_path
    return f"{relpath(recipes.ROOT, families.CONF)}/{config_path.removeprefix('recipe')}"


def _is_none(config_path: str) -> bool:
    """Whether it is the choice of nothing, as in `-m gate=none,eca`, where nothing is chosen by default."""
    group, _, name = config_path.removesuffix(".yaml").rpartition("/")
    return name == "none" and group in ("attention", *PLACES, *(f"attention/{part}" for part in PARTS))


def _is_table(config_path: str) -> bool:
    """Whether it is a file with rows, which are the options in its place."""
    name = config_path.removeprefix(MODEL).removesuffix(".yaml")
    return config_path.startswith(MODEL) and name not in families.files()


def _rows(config_path: str) -> tuple[dict[str, Any], str]:
    """The rows of its group, none for most, and its name in it."""
    for group, rows in ((MODEL, families.models), (PLAN, families.plans)):
        if config_path.startswith(group):
            return rows(), config_path.removeprefix(group).removesuffix(".yaml")
    return {}, config_path


def _model(row: dict[str, Any]) -> dict[str, Any]:
    """What a file of conf/model would hold."""
    attention = [{"override /attention": row["attention"]}] if "attention" in row else []
    target = {"_target_": row["model"]["_target_"]}
    return {
        "defaults": [*row.get("defaults", []), *attention, "_self_"],
        "image_size": row["image_size"],
        "model": target | GIVEN | row["model"],
    }
