"""What a YAML of a mechanism should state: its own options all, shared ones if it likes."""

import inspect
from collections.abc import Callable
from typing import Any

from models.attention.assemble import assemble


def defaults_of(mechanism: Callable, stated: dict[str, Any]) -> dict[str, Any]:
    """Of the mechanism's own options, and of those shared ones that are stated."""
    own, shared = (inspect.signature(function).parameters for function in (mechanism, assemble))
    found = {name: p.default for name, p in own.items() if p.kind is p.KEYWORD_ONLY}
    return found | {name: shared[name].default for name in stated.keys() & shared.keys()}
