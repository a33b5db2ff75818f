"""Weights by name from Hugging Face's hub: `timm/<model>.<tag>` and `hf-hub:<owner>/<repository>[@revision][:file]`.

Only safetensors are taken, of a folder downloaded from there too, unless the file is named:
`hf-hub:owner/name:pytorch_model.bin`.

Torch-free, but for a model of timm without a tag, whose usual one only timm knows. What lies in the hub's cache is
taken from there, and the network is not asked. Nothing but the weights and the `config.json` beside them is downloaded.
"""

import os
from contextlib import suppress
from pathlib import Path

from conf.errors import UserError
from conf.files import inside
from conf.folders import printable

HUB, TIMM = ("hf-hub:", "hf_hub:"), "timm/"
CONFIG = "config.json"
SAFE = "model.safetensors"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_SECONDS = 20


def is_name(path: str | os.PathLike) -> bool:
    """Whether it names weights of the hub: `hf-hub:…`, or `timm/…` where no such file lies here."""
    text = str(path)
    return text.startswith(HUB) or (text.startswith(TIMM) and not Path(text).exists())


def fetch(path: str | os.PathLike) -> Path:
    """The file of weights that a path or a name means, downloaded where it is not here yet.

    A folder as the hub has them, downloaded by other means, stands for the weights in it.

    Raises:
        ValueError: the hub has nothing under that name, or cannot be reached; there are pickles only.
    """
    return _of_hub(str(path)) if is_name(path) else downloaded(path) or Path(path)


def downloaded(path: str | os.PathLike) -> Path | None:
    """The weights in a folder as the hub has them; None for anything else.

    Raises:
        ValueError: it has pickles only.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() or (folder / "manifest.json").exists():
        return None
    with suppress(OSError):
        return inside(folder, SAFE)
    pickles = sorted(file.name for file in folder.iterdir() if file.name.startswith("pytorch_model."))
    if pickles:
        raise UserError(
            f"load_weights: this folder has no {SAFE}, only a pickle, got {printable(folder)}; if you trust its "
            f"authors name the file: {printable(folder / pickles[0])}"
        )
    return None


def _of_hub(name: str) -> Path:
    from huggingface_hub import constants, errors

    repository, _, file = _repository(name).partition(":")
    repository, _, revision = repository.partition("@")
    try:
        cached = _cached(repository, revision or None, [file] if file else [SAFE])
        return cached or _downloaded(repository, revision or None, name, file)
    except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"load_weights: Hugging Face has nothing (that you may read) under this name, got {name}; "
            f"look it up at https://huggingface.co/models?search={repository.rpartition('/')[2].partition('.')[0]}"
        ) from error
    except UserError:
        raise
    except Exception as error:  # no network, a proxy, a limit: each library under the hub's has its own kinds
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"load_weights: {name} is not in {constants.HF_HUB_CACHE}, and the hub cannot be reached ({reason}); "
            f"run `hf download {repository}` where there is a network, or give a file"
        ) from error


def _repository(name: str) -> str:
    """The repository of a name; of a model of timm without a tag, that of its usual weights."""
    if not name.startswith(TIMM):
        return name.partition(":")[2]
    model, dot, _ = name.removeprefix(TIMM).partition(".")
    if dot:
        return name
    model, colon, file = model.partition(":")
    import timm

    from conf.names import nearest

    if not timm.is_model(model):
        raise UserError(f"load_weights: timm has no model of this name, got {name}{nearest(model, timm.list_models())}")
    tag = getattr(timm.get_pretrained_cfg(model), "tag", "")
    if not tag:
        raise UserError(f"load_weights: timm has no weights of this model, got {name}; choose another one")
    return f"{TIMM}{model}.{tag}{colon}{file}"


def _cached(repository: str, revision: str | None, files: list[str]) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    found = (try_to_load_from_cache(repository, file, constants.HF_HUB_CACHE, revision) for file in files)
    return next((Path(file) for file in found if isinstance(file, str)), None)


def _downloaded(repository: str, revision: str | None, name: str, wanted: str) -> Path:
    """The file that the name says, else the usual or the first of safetensors, and the configuration beside it."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    where = {"revision": revision, "cache_dir": constants.HF_HUB_CACHE}
    files = [file.rfilename for file in HfApi().model_info(repository, revision=revision, timeout=_SECONDS).siblings]
    safe = sorted((file for file in files if file.endswith(".safetensors")), key=lambda file: file != SAFE)
    weights = [file for file in files if file == wanted] if wanted else safe
    if not weights:
        pickles = [file for file in files if file.endswith(_PICKLES)]
        if pickles and not wanted:
            raise UserError(
                f"load_weights: this repository has no safetensors, only pickles, got {name}; if you trust its authors "
                f"name the file: {name}:{pickles[0]}"
            )
        raise UserError(
            f"load_weights: this repository has no {wanted or 'file of weights'}, got {name}; choose another one"
        )
    if CONFIG in files:
        hf_hub_download(repository, CONFIG, **where)
    return Path(hf_hub_download(repository, weights[0], **where))
