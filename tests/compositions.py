"""What tests compose again and again, composed once: a fifth of a second, asked for hundreds of times."""

import hashlib
import os
import pickle
from pathlib import Path

from omegaconf import DictConfig

from conf import families
from conf.compose import compose_run

TABLES = families.tables
_folder: list[Path] = []  # shared by the processes of a run
_known: dict[str, bytes] = {}


def share(folder: Path) -> None:
    """Keep compositions in a folder from now on, where other processes find them."""
    folder.mkdir(exist_ok=True)
    _folder[:] = [folder]


def compose_once(overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """As `compose_run`, a copy of its own for every caller; tables that a test has put in place are not remembered."""
    if families.tables is not TABLES or not _folder:
        return compose_run(overrides)
    key = hashlib.sha256("\n".join(overrides).encode()).hexdigest()
    file = _folder[0] / key
    if key not in _known:
        if not file.exists():
            own = file.with_suffix(f".{os.getpid()}")
            own.write_bytes(pickle.dumps(compose_run(overrides)))
            own.replace(file)
        _known[key] = file.read_bytes()
    return pickle.loads(_known[key])
