"""What can be chosen, by name: the groups of conf/ and their options; and how names are shown."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from conf import families

CONF = Path(__file__).parent


def groups() -> list[str]:
    """The groups of conf/."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def options(group: str) -> list[str]:
    """The names that a group offers, sorted."""
    if group == "model":
        return list(families.models())
    plans = [f"plan/{name}" for name in families.plans()] if group == "attention" else []
    return sorted(
        plans + [path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).glob("**/*.yaml")]
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """ ", did you mean 'agent'?" or "" when nothing is close."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def short(path: Path) -> str:
    """A path relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
