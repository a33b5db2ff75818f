"""What can be chosen, by name: the groups of conf/ and their options; and how names are shown."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from conf import families

CONF = Path(__file__).parent
# a mechanism is composed of these, each a group `attention/<part>`
PARTS = ("layout", "pre", "transform", "score", "bias", "weights", "factor", "value")
# other places where a paper changes a model, each a group of its own
PLACES = ("gate", "pool", "head", "reducer", "wrapper", "reparam", "initializer", "adapter")
OWN = ("own_reparam",)  # what a row of conf/model has there, until something else is chosen


def groups() -> list[str]:
    """The groups of conf/; what is local to a machine is none."""
    folders = (path for path in CONF.iterdir() if path.is_dir() and path.name != "local")
    return sorted(path.name for path in folders if any(path.glob("*.yaml")))


def options(group: str) -> list[str]:
    """The names that a group offers, sorted."""
    if group == "model":
        return sorted([*families.models(), *families.files()])
    plans = [f"plan/{name}" for name in families.plans()] if group == "attention" else []
    folder = CONF / group
    found = folder.glob("*.yaml") if group == "attention" else folder.glob("**/*.yaml")
    shared = (folder / "plan").glob("*.yaml") if group == "attention" else ()
    return sorted(plans + [path.relative_to(folder).with_suffix("").as_posix() for path in (*found, *shared)])


def group_of(part: str) -> str:
    """The group of conf/ that offers a part of a mechanism, or what goes in another place, by the name of it."""
    return f"attention/{part}" if part in PARTS else part


def choosable() -> list[str]:
    """Every group that an argument may choose from, those of parts of a mechanism included."""
    return [*groups(), *(f"attention/{part}" for part in PARTS)]


def nearest(name: str, names: Iterable[str]) -> str:
    """ ", did you mean 'agent'?" or "" when nothing is close; what is much further than the nearest is left out."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.51)  # more than half
    alike = [difflib.SequenceMatcher(None, match, name).ratio() for match in matches]
    said = [repr(match) for match, share in zip(matches, alike, strict=True) if share > 0.75 * alike[0]]
    return f"; did you mean {' or '.join(said)}?" if said else ""


def short(path: Path) -> str:
    """A path relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
