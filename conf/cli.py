"""The command line of train.py and eval.py: Hydra, with errors that name the fix and exit with status 2.

Torch is imported only inside a job, so `--help`, `--cfg job` and a mistyped name answer at once.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf import extras, help, layout, leftovers, mistakes, output, resolvers, settings, source, stops, text
from conf.compose import compose, version_base
from conf.errors import Failure, UserError
from conf.folders import escaped
from conf.names import CONF, choosable, options


def run(
    config_name: str,
    job: Callable[[], Callable[[DictConfig], object]],
    before: Callable[[list[str]], list[str]] | None = None,
    words: dict[str, Callable[[list[str]], None]] | None = None,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, call `job()(cfg)`, and end the process on an error.

    `job` imports what it gives, so that nothing heavy is loaded for a wrong name. `before` is called first with the
    arguments, and gives those that Hydra shall see; what it raises is reported in the same way. `words` are other
    things to do, by the word that stands first in place of settings; of eval.py the name of a probe is such a word.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of being printed and swallowed
    for module in (resolvers, source, text):
        module.register()
    arguments, failed = sys.argv[1:], []
    with output.kept(), _reported(config_name, arguments):
        if arguments and arguments[0] in (words or {}):
            return words[arguments[0]](arguments[1:])
        if config_name == "train":
            stops.answer()
        arguments[:] = _read(config_name, arguments, before)
        with _hydra_of_this_version():  # as hydra.main, whose decorator reads sys.argv: further processes start from it
            parsed = mistakes.Parser(parser := get_args_parser(), config_name).parsed(arguments)
            if parsed.help:
                return print(help.text(config_name))
            if parsed.cfg and parsed.multirun:
                raise UserError("--cfg shows one configuration, got -m; leave -m and all values but one out")
            _run_hydra(
                args=parsed,
                args_parser=parser,
                task_function=_guarded(job, failed),
                config_path=str(CONF),
                config_name=config_name,
            )
        if failed:
            sys.exit(max(failed))


def _read(config_name: str, arguments: list[str], before: Callable[[list[str]], list[str]] | None) -> list[str]:
    """The arguments that Hydra shall see; what is wrong with them and can be known without it is said."""
    if config_name == "eval" and arguments[:1] and arguments[0] in options("probe"):
        arguments = [f"probe={arguments[0]}", *arguments[1:]]
    arguments = text.literal(arguments)
    mistakes.refuse_choices(arguments)
    mistakes.refuse_recipes(arguments)
    mistakes.Parser(get_args_parser(), config_name).parsed(arguments)
    if config_name == "eval":
        mistakes.refuse_foreign(arguments)
        mistakes.refuse_launchers(arguments)
    else:
        arguments = _let_sweeps_set_everything(arguments)
    return arguments if before is None else before(arguments)


def _guarded(job: Callable[[], Callable[[DictConfig], object]], failed: list[int]) -> Callable[[DictConfig], object]:
    """A wrong configuration is reported; in a sweep a run that breaks is reported too, and the others go on.

    The status of each that failed is added to `failed`.
    """

    @wraps(job)
    def guarded(cfg: DictConfig) -> object:
        try:
            if missing := extras.missing(cfg):
                raise UserError("\n".join(missing))
            settings.check(cfg)
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

    guarded.statuses = failed  # a launcher whose runs are other processes adds theirs
    return guarded


@contextmanager
def _reported(config_name: str, arguments: list[str]) -> Iterator[None]:
    """What is wrong with a command ends the process with one message, and leaves no folder."""
    try:
        yield
    except UserError as error:
        _quit(str(error))
    except MissingConfigException as error:
        _quit(mistakes.no_such_option(error))
    except OverrideParseException as error:
        _quit(f"{error}\nquote lists for your shell, e.g. 'model.depths=[2,2,6,2]'")
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        _quit(mistakes.wrong_key(error, config_name, arguments))
    except HydraException as error:
        _quit(str(error))
    except OSError as error:
        if any(frame.name == "guarded" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # of the job; before it only the folder of the run is made
        _quit(
            f"run: {error.filename or 'the folder of the run'} cannot be written: {error.strerror or error}; "
            "run from a folder that can be written, or give hydra.run.dir=<folder> "
            "(of a sweep hydra.sweep.dir=<folder>)"
        )
    except KeyboardInterrupt:  # during training a checkpoint is saved first, and this is not reached
        _print("interrupted before training began")
        sys.exit(130)
    finally:
        leftovers.remove()


def _hydra_of_this_version() -> AbstractContextManager:
    """Hydra 1.3 is told which version we mean; 1.4 asks which targets its own parts, may be built: ours."""
    version.setbase(*version_base().values() or (version._UNSPECIFIED_,))
    if version_base():
        return nullcontext()
    from hydra._internal.execution_policy import execution_whitelist

    return execution_whitelist(["models.runs.*", "conf.leftovers.*"])


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
    given = [key for key, value in pairs if value and re.fullmatch(r"[a-z_][\w.]*", key)]
    free = [key for key in given if key not in (*choosable(), "recipe") and not key.startswith(("hydra.", "run."))]
    return [f"++{argument}" if argument.partition("=")[0] in free else argument for argument in arguments]


def _quit(message: str) -> None:
    _print(message)
    sys.exit(2)


def _print(message: str) -> None:
    message = escaped(f"{Path(sys.argv[0]).name}: {message}", keep="\n\t")
    width = layout.width_of_errors()
    print(layout.fitted(message, width) if width else message, file=sys.stderr)
