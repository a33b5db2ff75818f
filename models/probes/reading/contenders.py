"""Mechanisms that are compared: named with their settings in one line of words, and built for one place."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig

from conf import names, values
from conf.errors import UserError
from models import list_attentions
from models.attention import AttentionFactory, Grid, Mixer, Site, check, make
from models.factory import compose_model, factory, is_part

WHO = "benchmark"
STAGE = 2  # the third of four, the place of a plain ViT, where a setting has one number per stage
OF = "vit_32px"  # the model that a mechanism is composed with, of which nothing is used


class Contender(NamedTuple):
    """A mechanism as it was named, and its factory, or one factory per stage."""

    name: str
    factory: AttentionFactory | list[AttentionFactory]

    def mixer(self, dim: int, heads: int, side: int) -> Mixer:
        """For a square map of so many tokens per side.

        Raises:
            ValueError: the mechanism cannot work there.
        """
        site = Site(dim, heads, Grid(side, side), STAGE, 0, 1, "hierarchical")
        staged = isinstance(self.factory, Sequence)
        mixer = make(self.factory[min(STAGE, len(self.factory) - 1)] if staged else self.factory, site)
        check(mixer, site)
        return mixer


def contenders(given: Any) -> list[Contender]:
    """What `probe.attentions=` names: all, or a list of `name [setting=value ...] [part=name ...]`.

    Raises:
        UserError: something that there is not.
    """
    wanted = list_attentions() if given == "all" else [given] if isinstance(given, str) else given
    if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(words, str) and words for words in wanted):
        values.refuse(WHO, "attentions", "all, or names of mechanisms", given, "set probe.attentions=[softmax,agent]")
    if twice := sorted({words for words in wanted if list(wanted).count(words) > 1}):
        values.refuse(WHO, "attentions", "different mechanisms", twice[0], "name it once in probe.attentions")
    return [Contender(words, _factory(words)) for words in wanted]


def _factory(words: str) -> Any:
    name, *settings = words.split()
    pairs = dict(setting.partition("=")[::2] for setting in settings)
    if name not in list_attentions():
        near = names.nearest(name, list_attentions())
        raise UserError(f"{WHO}: there is no attention {name!r}{near}; choose from {', '.join(list_attentions())}")
    parts = {key: value for key, value in pairs.items() if key in names.PARTS and is_part(key, value)}
    cfg = compose_model(OF, name, parts)
    for key, value in pairs.items():
        if key not in parts:
            _set(cfg.attention, name, key, value)
    return factory(cfg)


def _set(attention: Any, name: str, key: str, value: str) -> None:
    known = [str(k) for k in attention if not str(k).startswith("_")] if isinstance(attention, DictConfig) else []
    if key in names.PARTS:
        offered = ", ".join(names.options(names.group_of(key)))
        raise UserError(f"{WHO}: there is no {key} {value!r} for {name}; choose from {offered}")
    if key not in known:
        has = f"it has {', '.join(known)}, and the parts {', '.join(names.PARTS)}"
        raise UserError(f"{WHO}: {name} has no setting {key!r}{names.nearest(key, known)}; {has}")
    attention[key] = yaml.safe_load(value)
