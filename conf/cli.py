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
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import recipes
from conf import resolvers

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
    recipes.register()
    failed: list[int] = []

    @wraps(job)
    def guarded(cfg: DictConfig) -> object:
        """A wrong configuration is reported; in a sweep a run that breaks is reported too, and the others go on."""
        try:
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


def take_config_from_checkpoint() -> None:
    """Offers what the checkpoint of `ckpt=` says of its model and data to Hydra, as the config `from_checkpoint`.

    `data` is left out when the command line chooses other data.
    """
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    node: dict = {"defaults": [{"data": arguments["data"]}, "_self_"]} if "data" in arguments else {}
    if "ckpt" in arguments:
        node |= _of_checkpoint(arguments)
    ConfigStore.instance().store("from_checkpoint", OmegaConf.create(node))


def _with_backend(node: Any, backend: str) -> Any:
    """The configuration with what computes the attention replaced: it is no property of the trained weights."""
    if isinstance(node, list):
        return [_with_backend(part, backend) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: backend if key == "backend" else _with_backend(value, backend) for key, value in node.items()}


def _of_checkpoint(arguments: dict[str, str]) -> dict:
    """What evaluation takes from a checkpoint: model and data as they were, at the image size of the command line."""
    from models.checkpoints import check_config, read_config

    try:
        saved = read_config(arguments["ckpt"])
        kept = {key: saved[key] for key in ("seed", "image_size", "attention", "model", "augment", "data")}
        check_config(kept)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    except KeyError as error:
        raise UserError(
            f"eval: the configuration in {arguments['ckpt']} has no {error}; is it a run of ours?"
        ) from error
    for group in {"model", "attention"} & set(arguments):
        run = saved.get("run", {})
        raise UserError(
            f"eval: the checkpoint holds {run.get('model')} with {run.get('attention')} attention, this command asks "
            f"for {group}={arguments[group]}; leave {group}= out"
        )
    kept = _with_backend(kept, "${backend}")
    if "data" in arguments:
        del kept["data"]
        return kept
    data, size = kept["data"], kept["image_size"]
    for part in (data, data.get("eval", {})):
        for key in ("image_size", "size"):
            if part.get(key) == size:
                part[key] = "${image_size}"
    source = data.get("source", {})
    if data.get("root") is not None and source.get("root") == data["root"]:
        source["root"] = "${data.root}"
    return kept


def _refuse_lists_of_options() -> None:
    """`attention=[window,softmax]` would be merged by Hydra into one mixture of both."""
    for argument in sys.argv[1:]:
        group, _, value = argument.partition("=")
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
    return sorted(
        path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).glob("**/*.yaml")
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
