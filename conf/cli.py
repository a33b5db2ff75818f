"""The command line of train.py and eval.py: Hydra, with errors that name the fix and exit with status 2.

Torch is imported only inside a job, so `--help`, `--cfg job` and a mistyped name answer at once.
"""

import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.metadata import version
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import recipes
from conf import extras, families, resolvers

CONF = Path(__file__).parent


class UserError(Exception):
    """Something that the user can mend: printed as it is, without a traceback; the process ends with `status`."""

    status = 2


class RunFailed(UserError):
    """A run that ended by itself and says why."""

    status = 1


def run(config_name: str, job: Callable[[DictConfig], object], before: Callable[[], None] | None = None) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, call `job(cfg)`, and end the process on an error.

    `before` is called first; what it raises is reported in the same way.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of being printed and swallowed
    resolvers.register()
    families.register()
    recipes.register(sys.argv[1:])
    failed: list[int] = []
    command = sys.argv[:]

    @wraps(job)
    def guarded(cfg: DictConfig) -> object:
        """A wrong configuration is reported; in a sweep a run that breaks is reported too, and the others go on."""
        sys.argv[:] = command  # `before` may have taken something off, which further processes of this run need
        try:
            if missing := extras.missing(cfg):
                raise UserError("\n".join(missing))
            return job(cfg)
        except UserError as error:
            failed.append(error.status)
            _print(str(error))
        except Exception:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            failed.append(1)
            traceback.print_exc()
        return None

    try:
        _refuse_lists_of_options()
        _refuse_unknown_recipes()
        if config_name == "train":
            _let_sweeps_set_everything(config_name)
        if before is not None:
            before()
        hydra.main(config_path=str(CONF), config_name=config_name, **_main_options())(guarded)()
    except UserError as error:
        _quit(str(error))
    except MissingConfigException as error:
        _quit(_missing(error))
    except OverrideParseException as error:
        _quit(f"{error}\nquote lists for your shell, e.g. 'model.depths=[2,2,6,2]'")
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        _quit(_composition(error, config_name))
    except HydraException as error:
        _quit(str(error))
    except KeyboardInterrupt:  # during training a checkpoint is saved first, and this is not reached
        _print("interrupted before training began")
        sys.exit(130)
    if failed:
        sys.exit(max(failed))


def compose_run(overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """What train.py would run with these arguments, outside of a run, and the option chosen in every group."""
    resolvers.register()
    families.register()
    recipes.register(overrides)
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()  # Hydra refuses to compose while it runs a job
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF), **version_base()):
            cfg = hydra.compose("train", overrides, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = running
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _refuse_lists_of_options() -> None:
    """`attention=[window,softmax]` would be merged by Hydra into one mixture of both."""
    for argument in sys.argv[1:]:
        group, given, value = argument.partition("=")
        if not given:  # an option of Hydra, or its value, as in --cfg job -p model
            continue
        if group == "run.name" and not re.fullmatch(r"[\w.+@-]*[\w+@-]", value):
            raise UserError(f"run.name: must be one folder name of letters, digits and ._+@-, got {value!r}; rename it")
        if group in groups() and value in ("null", ""):
            raise UserError(
                f"{group}: must name one of {', '.join(options(group))}, got {value!r}; or leave {group}= out"
            )
        if group in groups() and value.startswith("["):
            raise UserError(
                f"{group}: one option can be chosen, got {value}; for one per stage write a YAML file with a list "
                f"into conf/{group}, to compare them give {group}={value.strip('[]')} after -m"
            )


def _refuse_unknown_recipes() -> None:
    """Hydra only says that there is no such file."""
    names = recipes.names()
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        for name in value.split(",") if key == "recipe" and re.fullmatch(r"[\w/.,-]+", value) else []:
            if name not in (*names, "null"):
                raise UserError(f"recipe: there is no {name!r}{nearest(name, names)}\navailable: {', '.join(names)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """ ", did you mean 'agent'?" or "" when nothing is close."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def reason(error: Exception) -> str:
    """The first line of an error, without what OmegaConf puts in front of the message of a resolver of ours."""
    line = str(error).splitlines()[0]
    return line.rpartition("raised while resolving interpolation: ")[2]


def options(group: str) -> list[str]:
    """The names that a group offers, sorted."""
    if group == "model":
        return list(families.models())
    plans = [f"plan/{name}" for name in families.plans()] if group == "attention" else []
    return sorted(
        plans + [path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).glob("**/*.yaml")]
    )


def groups() -> list[str]:
    """The groups of conf/."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def _main_options() -> dict[str, object]:
    """What `hydra.main` has to be told; Hydra 1.4 asks which targets its own parts, our sweep table, may build."""
    options: dict[str, object] = dict(version_base())
    if "execution_whitelist" in inspect.signature(hydra.main).parameters:
        options["execution_whitelist"] = ["conf.*"]
    return options


def version_base() -> dict[str, str]:
    """What Hydra has to be told: Hydra 1.4 deprecates the argument that 1.3 asks for."""
    return {} if tuple(map(int, version("hydra-core").split(".")[:2])) >= (1, 4) else {"version_base": "1.3"}


def _missing(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    choices = sorted(error.options or [])
    if not group or not choices:
        return str(error).splitlines()[0]
    group, _, folder = group.partition("/")
    if folder:  # such as attention/plan
        name, choices = f"{folder}/{name}", options(group)
    return f"{group}: there is no {name!r}{nearest(name, choices)}\navailable: {', '.join(choices)}"


def _composition(error: Exception, config_name: str) -> str:
    """One message from the chain of causes, with the nearest keys or groups for a name that does not exist."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = reason(error)
    if match := re.search(r"Could not override '([^']+)'", str(error)):
        key = match.group(1).lstrip("+~")
        if "No match in the defaults list" in str(error):
            return f"there is no group {key!r}{nearest(key, groups())}\ngroups: {', '.join(groups())}"
        return f"there is no setting {key!r}{_near_keys(key, config_name)}"
    cause = chain[-1]
    if cause is not error and str(cause) not in text:
        text = f"{text}\n{str(cause).splitlines()[0]}"
    return text


def _let_sweeps_set_everything(config_name: str) -> None:
    """In a sweep over options Hydra looks at the other settings before it chooses any: `++` keeps it from judging them.

    They are judged here, with the first option of each, so that a mistyped setting is found as everywhere else.
    """
    arguments = sys.argv[1:]
    pairs = [argument.partition("=")[::2] for argument in arguments]
    swept = [key for key, value in pairs if key in (*groups(), "recipe") and "," in value]
    if not swept or not {"-m", "--multirun"} & set(arguments) or any("(" in value for _, value in pairs):
        return
    first = [f"{key}={_first(value)}" for key, value in pairs if value and not key.startswith(("-", "hydra."))]
    with hydra.initialize_config_dir(config_dir=str(CONF), **version_base()):
        hydra.compose(config_name, overrides=first)
    settings = [key for key, value in pairs if value and re.fullmatch(r"[a-z_][\w.]*", key)]
    free = [key for key in settings if key not in (*groups(), "recipe") and not key.startswith(("hydra.", "run."))]
    sys.argv[1:] = [f"++{argument}" if argument.partition("=")[0] in free else argument for argument in arguments]


def _first(value: str) -> str:
    """The first of several values; commas inside brackets, braces and quotes are part of one."""
    depth = 0
    for position, letter in enumerate(value):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0 and value[:position].count("'") % 2 == 0:
            return value[:position]
    return value


def _near_keys(key: str, config_name: str) -> str:
    """Suggestions and the valid neighbours of a key that does not exist, from the composed configuration."""
    known = [
        argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith(("-", key, f"+{key}"))
    ]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF), **version_base()):
            cfg = hydra.compose(config_name, overrides=[a for a in known if "," not in a])
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
