"""The command line of train.py and eval.py: Hydra, with errors that name the fix and exit with status 2.

Torch is imported only inside a job, so `--help`, `--cfg job` and a mistyped name answer at once.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from string import Template

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import extras, leftovers, recipes, resolvers, source, text
from conf.compose import compose, version_base
from conf.errors import Failure, UserError, reason
from conf.names import CONF, PARTS, PLACES, choosable, groups, nearest, options


def run(
    config_name: str,
    job: Callable[[], Callable[[DictConfig], object]],
    before: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, call `job()(cfg)`, and end the process on an error.

    `job` imports what it gives, so that nothing heavy is loaded for a wrong name. `before` is called first with the
    arguments, and gives those that Hydra shall see; what it raises is reported in the same way.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of being printed and swallowed
    arguments = sys.argv[1:]
    for module in (resolvers, source, text):
        module.register()
    failed: list[int] = []

    @wraps(job)
    def guarded(cfg: DictConfig) -> object:
        """A wrong configuration is reported; in a sweep a run that breaks is reported too, and the others go on."""
        try:
            if missing := extras.missing(cfg):
                raise UserError("\n".join(missing))
            return job()(cfg)
        except UserError as error:
            failed.append(error.status)
            _print(str(error))
            return Failure(error)
        except Exception as error:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            failed.append(1)
            traceback.print_exc()
            return Failure(f"{type(error).__name__}: {error}")

    try:
        arguments = text.literal(arguments)
        _refuse_lists_of_options(arguments)
        _refuse_unknown_recipes(arguments)
        if config_name == "train":
            arguments = _let_sweeps_set_everything(arguments)
        if before is not None:
            arguments = before(arguments)
        with _hydra_of_this_version():  # as hydra.main, whose decorator reads sys.argv: further processes start from it
            parser = get_args_parser()
            parsed = parser.parse_intermixed_args(arguments)  # options may stand between settings
            if parsed.help:
                print(_help(config_name))
                return
            if parsed.cfg and parsed.multirun:
                raise UserError("--cfg shows one configuration, got -m; leave -m and all values but one out")
            _run_hydra(
                args=parsed,
                args_parser=parser,
                task_function=guarded,
                config_path=str(CONF),
                config_name=config_name,
            )
    except UserError as error:
        _quit(str(error))
    except MissingConfigException as error:
        _quit(_missing(error))
    except OverrideParseException as error:
        _quit(f"{error}\nquote lists for your shell, e.g. 'model.depths=[2,2,6,2]'")
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        _quit(_composition(error, config_name, arguments))
    except HydraException as error:
        _quit(str(error))
    except KeyboardInterrupt:  # during training a checkpoint is saved first, and this is not reached
        _print("interrupted before training began")
        sys.exit(130)
    finally:
        leftovers.remove()
    if failed:
        sys.exit(max(failed))


def _hydra_of_this_version() -> AbstractContextManager:
    """Hydra 1.3 is told which version we mean; 1.4 asks which targets its own parts, may be built: ours."""
    version.setbase(*version_base().values() or (version._UNSPECIFIED_,))
    if version_base():
        return nullcontext()
    from hydra._internal.execution_policy import execution_whitelist

    return execution_whitelist(["models.runs.*", "conf.leftovers.*"])


def _help(config_name: str) -> str:
    """What `--help` prints. Hydra, which copies all it knows for every group that it lists, would take seconds."""
    template = OmegaConf.load(CONF / f"{config_name}.yaml").hydra.help.template
    lines = [f"{group}: {', '.join(names)}\n" for group, names in source.offered().items()]
    return Template(template).safe_substitute(APP_CONFIG_GROUPS="".join(lines))


def _refuse_lists_of_options(arguments: list[str]) -> None:
    """`attention=[window,softmax]` would be merged by Hydra into one mixture of both."""
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
        if group in groups() and group not in PLACES and value in ("null", ""):
            raise UserError(
                f"{group}: must name one of {', '.join(options(group))}, got {value!r}; or leave {group}= out"
            )
        if group in groups() and value.startswith("["):
            raise UserError(
                f"{group}: one option can be chosen, got {value}; for one per stage write a YAML file with a list "
                f"into conf/{group}, to compare them give {group}={value.strip('[]')} after -m"
            )


def _refuse_unknown_recipes(arguments: list[str]) -> None:
    """Hydra only says that there is no such file."""
    names = recipes.names()
    for argument in arguments:
        key, _, value = argument.partition("=")
        for name in value.split(",") if key == "recipe" and re.fullmatch(r"[\w/.,-]+", value) else []:
            if name not in (*names, "null"):
                raise UserError(f"recipe: there is no {name!r}{nearest(name, names)}\navailable: {', '.join(names)}")


def _missing(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    choices = sorted(error.options or [])
    if not group or not choices:
        return str(error).splitlines()[0]
    if group.endswith("/plan"):
        group, name, choices = "attention", f"plan/{name}", options("attention")
    return f"{group}: there is no {name!r}{nearest(name, choices)}\navailable: {', '.join(choices)}"


def _composition(error: Exception, config_name: str, arguments: list[str]) -> str:
    """One message from the chain of causes, with the nearest keys or groups for a name that does not exist."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    said = reason(error)
    if match := re.search(r"Could not override '([^']+)'", str(error)):
        key = match.group(1).lstrip("+~")
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


def _let_sweeps_set_everything(arguments: list[str]) -> list[str]:
    """In a sweep over options Hydra looks at the other settings before it chooses any: `++` keeps it from judging them.

    They are judged here, with the first option of each, so that a mistyped setting is found as everywhere else.
    """
    pairs = [argument.partition("=")[::2] for argument in arguments]
    swept = [key for key, value in pairs if key in (*choosable(), "recipe") and "," in value]
    if not swept or not {"-m", "--multirun"} & set(arguments) or any(text.SWEEP.fullmatch(value) for _, value in pairs):
        return arguments
    compose(
        "train",
        [f"{key}={next(text.parts(value))}" for key, value in pairs if value and not key.startswith(("-", "hydra."))],
    )
    settings = [key for key, value in pairs if value and re.fullmatch(r"[a-z_][\w.]*", key)]
    free = [key for key in settings if key not in (*choosable(), "recipe") and not key.startswith(("hydra.", "run."))]
    return [f"++{argument}" if argument.partition("=")[0] in free else argument for argument in arguments]


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


def _quit(message: str) -> None:
    _print(message)
    sys.exit(2)


def _print(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
