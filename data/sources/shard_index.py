"""What a tar shard of WebDataset holds, and where: made once per shard and kept in `~/.cache/vision-zoo/shards`."""

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from conf.files import opened, put
from conf.folders import EXTENSIONS, printable
from conf.lists import CLASS

MAX_LABEL = 2**20  # bytes of a label
CACHE = "~/.cache/vision-zoo/shards"


class Index(NamedTuple):
    """What a shard holds: of every sample its key, the place of its image, and its label as text."""

    keys: list[str]
    places: np.ndarray  # int64 (samples, 2): offset and bytes
    labels: list[str]
    left_out: list[str]  # keys with an image or a label alone


def index_of(shard: str) -> Index:
    """What a shard holds, from its index where the shard has not changed since it was made.

    Raises:
        ValueError: it is no tar file, is compressed, or ends in the middle of a member.
    """
    status = os.stat(shard)
    name = f"{os.path.abspath(shard)} {status.st_size} {status.st_mtime_ns}"
    cache = Path(CACHE).expanduser() / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"
    try:
        kept = json.loads(cache.read_text())
        return Index(kept["keys"], np.array(kept["places"], np.int64).reshape(-1, 2), kept["labels"], kept["left_out"])
    except (OSError, ValueError, KeyError):
        index = _read(shard)
    try:  # the index is a convenience: a place that cannot be written is no error
        cache.parent.mkdir(parents=True, exist_ok=True)
        put(cache, json.dumps(index._replace(places=index.places.tolist())._asdict()))
    except OSError:
        pass
    return index


def _read(shard: str) -> Index:
    """Walks through a shard once; members of a sample stand side by side and have the same key."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    last = "its beginning"
    try:
        with opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # or the file would remember all of them
                last = member.name
                folder, name = os.path.split(member.name)
                stem, dot, suffix = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                key, suffix = os.path.join(folder, stem), (dot + suffix).lower()
                if suffix.endswith(EXTENSIONS):
                    images.setdefault(key, (member.offset_data, member.size))
                elif suffix in (".cls", ".json") and key not in labels and member.size <= MAX_LABEL:
                    label = _label(tar.extractfile(member).read(), suffix)
                    labels |= {} if label is None else {key: label}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"webdataset: a shard must be a whole, uncompressed tar file, got {printable(shard)}, broken after "
            f"{printable(last)} ({error}); fetch it again, decompress it, or leave it out"
        ) from error
    keys = [key for key in images if key in labels]
    places = np.array([images[key] for key in keys], np.int64).reshape(-1, 2)
    return Index(keys, places, [labels[key] for key in keys], sorted(images.keys() ^ labels.keys()))


def _label(content: bytes, suffix: str) -> str | None:
    """The label in a member, as text; `None` where there is none."""
    try:
        text = content.decode().strip()
        if suffix == ".json":
            found = json.loads(text)
            found = (
                {str(key).lower(): value for key, value in found.items()}
                if isinstance(found, dict)
                else {"label": found}
            )
            value = next((found[name] for name in CLASS if name in found), None)
            text = "" if value is None or isinstance(value, list | dict) else str(value)
    except (ValueError, RecursionError):
        return None
    return text or None
