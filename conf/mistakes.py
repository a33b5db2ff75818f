"""What is wrong with a command line, in one message that names the fix; before anything is imported for it."""

import argparse
import re
from pathlib import Path

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from conf import foreign, recipes, text
from conf.compose import compose
from conf.errors import UserError, reason
from conf.names import CONF, PARTS, PLACES, choosable, groups, nearest, options

LONG = 40  # names that a message does not list


class Parser:
    """Hydra's options, without its way of ending a process."""

    def __init__(self, parser: argparse.ArgumentParser, config_name: str) -> None:
        self.parser, self.program = parser, config_name
        parser.error = self._wrong

    def parsed(self, arguments: list[str]) -> argparse.Namespace:
        """What is given; options may stand between settings.

        Raises:
            UserError: something is neither an option nor a setting.
        """
        parsed, unknown = self.parser.parse_known_intermixed_args(arguments)
        for argument in arguments:
            if argument in unknown:
                raise UserError(self._option(argument, arguments))
        for argument in parsed.overrides or ():
            if "=" not in argument and not argument.startswith("~"):
                raise UserError(_bare(argument, self.program, arguments))
        return parsed

    def _option(self, argument: str, arguments: list[str]) -> str:
        name, _, value = argument.partition("=")
        following = arguments[arguments.index(argument) + 1 :][:1]
        given = value or next((word for word in following if not re.match(r"-\D|[^=]+=", word)), "")
        whole = f"{argument} {given}" if given and not value else argument
        word = name.lstrip("-").replace("-", "_")
        written = foreign.advice(self.program, word, given) or f"; write {word}={given or '...'}"
        return f"settings are written key=value, got {whole!r}{written}"

    def _wrong(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def _bare(argument: str, program: str, arguments: list[str]) -> str:
    """Something without an equals sign."""
    start = f"settings are written key=value, got {argument!r}"
    at = arguments.index(argument)
    if arguments[at + 1 : at + 2] and arguments[at + 1].startswith("="):
        value = "".join(arguments[at + 1 : at + 3])
        return f"settings are written key=value without spaces, got '{argument} {value}'; write {argument}{value}"
    known = "ckpt" if program == "eval" else ""
    if Path(argument).exists():
        known = known or ("init" if Path(argument).is_file() else "data=imagefolder data.root")
    else:
        kinds = [("recipe", recipes.offered()), *((group, options(group)) for group in ("model", "attention", "data"))]
        known = next((group for group, names in kinds if argument in names), "")
    if known:
        return f"{start}; write {known}={argument}"
    if (key := argument.lstrip("+")) in (*groups(), "recipe") or foreign.ours(program, key):
        return f"{start}{foreign.advice(program, key, '') or f'; write {key}=...'}"
    return f"{start}; see --help"


def refuse_choices(arguments: list[str]) -> None:
    """What Hydra would merge, or not understand, in the choice of an option.

    `attention=[window,softmax]` would become one mixture of both.
    """
    known = {*groups()}
    for argument in arguments:
        group, given, value = argument.partition("=")
        if not given:  # an option of Hydra, or its value, as in --cfg job -p model
            continue
        if group == "run.name" and (value == "null" or not re.fullmatch(r"[\w.+@-]*[\w+@-]", text.plain(value))):
            raise UserError(
                f"run.name: must be one folder name of letters, digits and ._+@-, got {text.plain(value)!r}; rename "
                "it, or leave it out for the date and time"
            )
        if "null" in value.split(",") and (group in PLACES or group.removeprefix("attention/") in PARTS):
            raise UserError(f"{group}: must be a name, got {value}; give {group}=none for nothing, or leave it out")
        if group in known and group not in PLACES and value in ("null", ""):
            raise UserError(
                f"{group}: must name one of {', '.join(options(group))}, got {value!r}; or leave {group}= out"
            )
        if group in known and value.startswith("["):
            raise UserError(
                f"{group}: one option can be chosen, got {value}; for one per stage write a YAML file with a list "
                f"into conf/{group}, to compare them give {group}={value.strip('[]')} after -m"
            )
        if group in ("data", "model") and ("/" in value or value.startswith("~")):
            raise UserError(f"{group}: there is no {value!r}{_of_yours(group, value)}")


def refuse_foreign(arguments: list[str]) -> None:
    """What `ckpt=` of eval.py is called elsewhere, before it is missed."""
    for argument in arguments:
        key, given, value = argument.partition("=")
        if given and key in foreign.EVAL["ckpt"].split():
            raise UserError(f"there is no setting {key!r}{foreign.advice('eval', key, value)}")


def refuse_launchers(arguments: list[str]) -> None:
    """An evaluation is not sent elsewhere."""
    for argument in arguments:
        key, given, value = argument.partition("=")
        if given and key == "hydra/launcher" and value != "basic":
            raise UserError(
                f"hydra/launcher: eval.py measures in its own process, got {value}; "
                "run it in a job: srun python eval.py ckpt=..."
            )


def refuse_recipes(arguments: list[str]) -> None:
    """Hydra only says that there is no such file."""
    names, known = recipes.names(), recipes.offered()
    for argument in arguments:
        key, _, value = argument.partition("=")
        for name in value.split(",") if key == "recipe" and re.fullmatch(r"[\w/.,-]+", value) else []:
            if name not in (*known, "null"):
                raise UserError(f"recipe: there is no {name!r}{nearest(name, known)}\n{_offer('recipe', name, names)}")


def no_such_option(error: MissingConfigException) -> str:
    """A name that its group does not offer."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    choices = sorted(error.options or [])
    if not group or not choices:
        return str(error).splitlines()[0]
    if group.endswith("/plan"):
        group, name, choices = "attention", f"plan/{name}", options("attention")
    close = nearest(name, choices)
    known = _of_yours(group, name) if not close or Path(name).exists() else close
    return f"{group}: there is no {name!r}{known}\n{_offer(group, name, choices)}"


def _of_yours(group: str, name: str) -> str:
    """What was probably meant by a name of a data set or a model that is not offered."""
    if group == "data":
        return f"; a folder of images is data=imagefolder data.root={name if Path(name).exists() else '...'}"
    if group == "model" and "timm" in options("model"):
        return f"; a model of timm is model=timm model.name={name}"
    return f"; a file of weights is init={name}" if group == "model" and Path(name).is_file() else ""


def _offer(group: str, name: str, names: list[str]) -> str:
    """The names that there are, or where to find them; those that begin as this one does in any case."""
    if len(names) <= LONG:
        return f"available: {', '.join(names)}"
    start = re.split(r"[_/]", name)[0]
    alike = [known for known in names if re.search(rf"(^|[_/]){re.escape(start)}", known)] if start else []
    shown = f"available: {', '.join(alike)}\n" if 0 < len(alike) <= LONG else ""
    return f"{shown}all {len(names)}: python train.py list {group}s"


def wrong_key(error: Exception, config_name: str, arguments: list[str]) -> str:
    """One message from the chain of causes, with the nearest keys or groups for a name that does not exist."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    said = reason(error)
    if match := re.search(r"Could not override '([^']+)'", str(error)):
        key = match.group(1).lstrip("+~")
        value = next((a.partition("=")[2] for a in arguments if a.lstrip("+~").partition("=")[0] == key), "")
        if (written := foreign.advice(config_name, key, value)) and key not in foreign.ours(config_name, key):
            return f"there is no setting {key!r}{written}"
        if key.startswith("hydra.launcher."):
            return _no_key_of_launcher(key, arguments)
        if "No match in the defaults list" in str(error):
            return f"there is no group {key!r}{nearest(key, groups())}\ngroups: {', '.join(groups())}"
        if f"attention/{key}" in choosable():
            return f"there is no setting {key!r}; a part of the mechanism is chosen by attention/{key}=..."
        if "/" in key:
            return f"there is no group {key!r}{nearest(key, choosable())}\ngroups: {', '.join(choosable())}"
        if (match := re.match(r"attention\.(\w+)\.", key)) and match.group(1) in PARTS:
            chosen = f"attention/{match.group(1)}"
            return f"there is no setting {key!r}{_near_keys(key, config_name, arguments)}\nis {chosen}=... given?"
        return f"there is no setting {key!r}{_near_keys(key, config_name, arguments)}"
    cause = chain[-1]
    if cause is not error and str(cause) not in said:
        said = f"{said}\n{str(cause).splitlines()[0]}"
    return said


def _no_key_of_launcher(key: str, arguments: list[str]) -> str:
    """A setting that the chosen launcher does not have."""
    chosen = next((a.partition("=")[2] for a in arguments if a.startswith("hydra/launcher=")), "basic")
    path, leaf = CONF / "hydra" / "launcher" / f"{chosen}.yaml", key.rpartition(".")[2]
    if not path.is_file():
        return f"there is no setting {key!r} without hydra/launcher=local or hydra/launcher=slurm"
    keys = sorted(str(name) for name in OmegaConf.load(path) if name not in ("defaults", "_target_"))
    return f"there is no setting {key!r}{nearest(leaf, keys)}\nvalid keys of hydra.launcher: {', '.join(keys)}"


def _near_keys(key: str, config_name: str, arguments: list[str]) -> str:
    """Suggestions and the valid neighbours of a key that does not exist, from the composed configuration."""
    known = [a for a in arguments if "=" in a and "," not in a and not a.startswith(("-", key, f"+{key}"))]
    try:
        cfg = compose(config_name, known)
    except Exception:  # a second wrong override: its own message comes when this one is mended
        return ""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig):
        return nearest(key, _leaves(cfg))
    close = nearest(leaf, list(node)) or nearest(key, _leaves(cfg))
    return f"{close}\nvalid keys{f' of {parent}' if parent else ''}: {', '.join(sorted(map(str, node)))}"


def _leaves(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in node:
        value = node._get_node(key)
        keys += (
            _leaves(value, f"{prefix}{key}.")
            if isinstance(value, DictConfig) and not value._is_none()
            else [f"{prefix}{key}"]
        )
    return keys
