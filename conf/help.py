"""What `--help` prints: how the commands look, and what can be chosen, by family and with counts."""

import textwrap
from collections import Counter
from string import Template

from omegaconf import OmegaConf

from conf import families, recipes
from conf.names import CONF, PARTS, PLACES, groups, options

NAME, WIDTH = 12, 118  # columns of the names of groups, and in all


def text(config_name: str) -> str:
    """The help of `conf/<config_name>.yaml`. Hydra, which copies all it knows of each group, would take seconds."""
    template = OmegaConf.load(CONF / f"{config_name}.yaml").hydra.help.template
    groups_of = {"train": _of_training, "eval": _of_evaluation}[config_name]
    return Template(template).safe_substitute(APP_CONFIG_GROUPS="\n".join(groups_of()))


def _of_training() -> list[str]:
    per_family = _of_one_word(Counter(row["family"] for row in families.models().values()))
    per_paper: dict[str, int] = {}
    for name in recipes.names():
        per_paper[name.partition("/")[0]] = per_paper.get(name.partition("/")[0], 0) + 1
    general = sorted(set(recipes.offered()) - set(recipes.names()))
    mixing = [name for name in options("attention") if "/" not in name]
    shown = {"model", "attention", *PLACES}
    return [
        *_entry("model", f"{sum(per_family.values())}: {_counts(per_family)}"),
        *_entry("attention", f"{', '.join(mixing)}; {len(options('attention')) - len(mixing)} plans of models"),
        *_entry("  /part", f"attention/<part>= {_counts({part: len(options(f'attention/{part}')) for part in PARTS})}"),
        *_entry("places", _counts({place: len(options(place)) for place in PLACES})),
        *_entry("recipe", f"{', '.join(general)}; {sum(per_paper.values())} published: {_counts(per_paper, '/')}"),
        *_entry("data", ", ".join(options("data"))),
        *_entries({group: options(group) for group in groups() if group not in shown | {"data", "probe", "fit"}}),
    ]


def _of_evaluation() -> list[str]:
    return [*_entry("probe", ", ".join(options("probe")))]


def _of_one_word(numbers: dict[str, int]) -> dict[str, int]:
    """Families of the same first word, such as `agent_*`, as one, where there are three or more."""
    words = Counter(name.partition("_")[0] for name in numbers)
    found: Counter[str] = Counter()
    for name, number in numbers.items():
        word = name.partition("_")[0]
        found[f"{word}_*" if words[word] > 2 else name] += number
    return dict(sorted(found.items()))


def _counts(numbers: dict[str, int], end: str = "") -> str:
    return ", ".join(f"{name}{end} {count}" for name, count in numbers.items())


def _entry(name: str, what: str) -> list[str]:
    return textwrap.fill(
        what,
        WIDTH,
        initial_indent=f"  {name}: ".ljust(NAME + 2),
        subsequent_indent=" " * (NAME + 2),
        break_long_words=False,
        break_on_hyphens=False,
    ).splitlines()


def _entries(names: dict[str, list[str]]) -> list[str]:
    """Small groups, several to a line."""
    return _entry("others", "; ".join(f"{group} ({', '.join(options)})" for group, options in names.items()))
