"""Checkpoints on disk: the directory format, weights out of any supported file, and checks on what a file brings.

`python -m models.checkpoints convert FILE --model biformer_tiny -o out.safetensors` renames an authors' file.
"""

from models.checkpoints.again import create_from
from models.checkpoints.conversion import convert, export, settings_of
from models.checkpoints.format.config import check_config, check_stored
from models.checkpoints.format.directory import latest, read_config, read_manifest, resolve, verify
from models.checkpoints.weights import load_weights
from models.checkpoints.within import built_within

__all__ = [
    "built_within",
    "check_config",
    "check_stored",
    "convert",
    "create_from",
    "export",
    "latest",
    "load_weights",
    "read_config",
    "read_manifest",
    "resolve",
    "settings_of",
    "verify",
]
