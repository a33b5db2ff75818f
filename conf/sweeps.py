"""What differs between the runs of a sweep (`-m`), and what their folders are called by it. Torch-free."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from conf.names import choosable

SWEPT = "VISION_ZOO_SWEPT"  # an environment variable, so that runs started elsewhere know it too
PLAIN = ("recipe", "model", "attention", "data")  # their values say enough
LONGEST = 60  # letters of one value in the name of a folder


def begin(overrides: Sequence[str], params: Mapping[str, object]) -> int | None:
    """Remembers for the folders of a sweep which keys have several values; the number of its runs where it is known.

    Args:
        overrides: of the command line, as typed: `attention=softmax,agent`.
        params: what the configuration sweeps besides, `hydra.sweeper.params`.
    """
    given = [*(f"{key}={value}" for key, value in (params or {}).items()), *overrides]
    parsed = {override.get_key_element(): override for override in OverridesParser.create().parse_overrides(given)}
    swept = {key.lstrip("+~"): override for key, override in parsed.items() if override.is_sweep_override()}
    os.environ[SWEPT] = json.dumps(list(swept))
    numbers = [_count(override) for override in swept.values()]
    return None if None in numbers else math.prod(numbers)


def end() -> None:
    """Forgets it: what this process does next is another sweep."""
    os.environ.pop(SWEPT, None)


def differing(overrides: Sequence[str]) -> dict[str, str]:
    """The settings of one run that differ between runs, by key; all of them where no sweep has begun here."""
    settings = {key: value.strip("'\"") for key, _, value in (text.lstrip("+~").partition("=") for text in overrides)}
    keys = json.loads(os.environ[SWEPT]) if SWEPT in os.environ else list(settings)
    return {key: settings[key] for key in keys if key in settings}


def folder(overrides: Sequence[str], seed: object) -> str:
    """Below the folder of the sweep: one level for each thing that differs, and the seed: `agent/lr-0.001/seed-0`.

    It is made of what is given alone, so that the same command finds its runs again, and more values or seeds add to
    them. It can be pasted after `ckpt=`.
    """
    settings = {key: value for key, value in differing(overrides).items() if key not in ("seed", "run.name")}
    last = [_last(key) for key in settings]
    short = {key: _last(key) if last.count(_last(key)) == 1 else key for key in settings}
    parts = [("" if key in PLAIN else f"{short[key]}-") + _legible(value) for key, value in settings.items()]
    return "/".join([*parts, f"seed-{_legible(str(seed))}"])


def _last(key: str) -> str:
    return key.split("/")[-1] if key in choosable() else key.split(".")[-1]


def _legible(text: str) -> str:
    """A name for a folder; what is lost in it, or cut off, is told apart by a few letters of a checksum."""
    name = re.sub(r"[^\w.+-]+", "-", re.sub(r"^[^\w.+-]+|[^\w.+-]+$", "", text))
    if name.strip(".") and len(name) <= LONGEST and re.fullmatch(r"[\w.+,/\[\]-]+", text):
        return name
    return f"{name[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _count(override: Override) -> int | None:
    """How many values it has; None for a pattern of names."""
    return sum(1 for _ in override.sweep_string_iterator()) if not _is_pattern(override) else None


def _is_pattern(override: Override) -> bool:
    return "glob(" in str(override.input_line)
