"""Settings whose values are text by their meaning, taken as they are typed: `data.root=birds (1)`, `run.name=1e3`.

Hydra's grammar would refuse a path with `=`, `(` or `é` and read 2026_11_28 as a number; a quoted value is text to it.
What is quoted already, `null`, an interpolation `${…}`, a list, and after -m several values keep their meaning.
"""

import os
import re
from collections.abc import Iterator

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from conf.errors import UserError

# by the last word of the key
NAMES = (
    *(
        "autoencoder",
        "ckpt",
        "class_names",
        "classes",
        "separator",
        "val_labels",
        "data_dir",
        "data_files",
        "default_root_dir",
        "dir",
        "entity",
    ),
    *("file", "files", "folder", "group", "image", "init", "input", "job_type", "label", "lists", "name", "notes"),
    *("output", "path", "paths", "project", "resume", "revision", "root", "save_dir", "shards", "split", "subdir"),
    *("tags", "token_labels", "url", "urls"),
)
# by the end of the key: names of splits, such as train[:80%]
ENDS = ("source.train", "source.val", "source.test")
SWEEP = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|str|extend_list)\(.*\)")
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def register() -> None:
    """In what `--cfg job` prints and config.yaml holds, a text with a quote in it stands in quotes."""
    dumper = get_omega_conf_dumper()
    usual = dumper.str_representer

    def representer(dumper: yaml.Dumper, data: str) -> yaml.ScalarNode:
        node = usual(dumper, data)
        node.style = "'" if "'" in data and "\n" not in data else node.style
        return node

    dumper.add_representer(str, representer)


def is_text(key: str) -> bool:
    """Whether the value of a key is text: a path, a name, a word of somebody else's."""
    key = key.lstrip("+")
    return key.rpartition(".")[2] in NAMES or key.endswith(ENDS)


def literal(arguments: list[str]) -> list[str]:
    """The arguments, with values that are text quoted where Hydra would read another thing; `~/` becomes the home.

    Raises:
        UserError: a value with `${` that is no interpolation.
    """
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    return [_literal(argument, sweeps) for argument in arguments]


def plain(value: str) -> str:
    """What a value says, without its quotes."""
    if not QUOTED.fullmatch(value):
        return value
    said = OverridesParser.create().parse_override(f"key={value}").value()
    return said.text if isinstance(said, QuotedString) else said  # a str where it is an interpolation


def listed(value: str) -> list[str]:
    """What a value says, one by one where it is a list `[a,b]`."""
    if value.startswith("[") and value.endswith("]"):
        return [plain(part) for part in parts(value[1:-1])]
    return [plain(value)]


def parts(value: str) -> Iterator[str]:
    """Cut at commas, but not at those inside brackets, braces and quotes."""
    depth, start, position = 0, 0, 0
    while position < len(value):
        letter = value[position]
        if letter in "'\"" and position == start and (quoted := QUOTED.match(value, position)):
            position = quoted.end()
            continue
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            yield value[start:position].strip()
            start = position + 1
        position += 1
    yield value[start:].strip()


def _literal(argument: str, sweeps: bool) -> str:
    key, given, value = argument.partition("=")
    if not given or not value or key.startswith(("-", "~")) or not is_text(key):
        return argument
    if "${" not in value and os.path.exists(value):
        return f"{key}={_quoted(value)}"
    if "${" in value and not _is_interpolation(value):
        raise UserError(f"{key}: after ${{ must come a key and }}, got {value!r}; rename what is called so")
    if sweeps and not SWEEP.fullmatch(value):
        return f"{key}={','.join(_one(part) for part in parts(value))}"
    return argument if sweeps else f"{key}={_one(value)}"


def _one(value: str) -> str:
    """One value, which may be a list of texts."""
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_quoted(part) for part in parts(value[1:-1]))}]"
    return value if value.startswith("{") and value.endswith("}") else _quoted(value)


def _quoted(value: str) -> str:
    value = os.path.expanduser(value)
    if QUOTED.fullmatch(value) or value.lower() == "null" or _is_read_as_typed(value):
        return value
    return QuotedString(value, Quote.double).with_quotes()


def _is_read_as_typed(value: str) -> bool:
    try:
        return OverridesParser.create().parse_override(f"key={value}").value() == value
    except HydraException:
        return False


def _is_interpolation(value: str) -> bool:
    try:
        return parse(value) is not None
    except GrammarParseError:
        return False
