"""Modules under the names that they had: imported from where they are now, with a warning that says so.

Code of users and notebooks that was written against an earlier release goes on working; CHANGELOG.md lists the moves.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _names(before: str, now: str, names: str = "") -> Iterator[tuple[str, str]]:
    """One module, or those of these names in a folder."""
    yield from ((f"{before}.{name}", f"{now}.{name}") for name in names.split()) if names else ((before, now),)


MOVED = dict(
    (
        *_names("models.tasks.running", "models.runs.training"),
        *_names("models.tasks.evaluating", "models.runs.evaluation"),
        *_names("models.tasks", "models.runs", "initial preflight report resume sweep verdict"),
        *_names("models.tasks", "models.callbacks", "after_step checkpoint ema guard progress routing"),
        *_names("models.tasks.loggers", "models.loggers"),
        *_names("models.tasks", "models.diffusion", "latents recogniser samples"),
        *_names("models.tasks.sample_files", "models.probes.reading.sample_files"),
        *_names("models.checkpoints", "models.checkpoints.format", "codec config directory"),
        *_names("models.attention", "models.surgery", "replacement dense_to_moh timm_models"),
        *_names("data.folders", "conf.folders"),
        *_names("data.decode", "data.sources.decode"),
        *_names("data", "data.order", "sampler randomness"),
    )
)


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED`, after everything that is there under its own name."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {now} now; import that", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(now)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # it was executed under its name, and keeps that


def install() -> None:
    """Lets Python find them; a second call changes nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
