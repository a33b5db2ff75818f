"""Weights by name from Hugging Face's hub: `timm/<model>.<tag>` and `hf-hub:<owner>/<repository>[@revision]`.

Torch-free, but for a model of timm without a tag, whose usual one only timm knows. What lies in the hub's cache is
taken from there, and the network is not asked. Nothing but the weights and the `config.json` beside them is downloaded.
"""

import os
from pathlib import Path

from conf.errors import UserError

HUB, TIMM = ("hf-hub:", "hf_hub:"), "timm/"
CONFIG = "config.json"
_USUAL = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_SECONDS = 20


def is_name(path: str | os.PathLike) -> bool:
    """Whether it names weights of the hub: `hf-hub:…`, or `timm/…` where no such file lies here."""
    text = str(path)
    return text.startswith(HUB) or (text.startswith(TIMM) and not Path(text).exists())


def fetch(path: str | os.PathLike) -> Path:
    """The file of weights that a path or a name means, downloaded where it is not here yet.

    A folder as the hub has them, downloaded by other means, stands for the weights in it.

    Raises:
        ValueError: the hub has nothing under that name, or cannot be reached.
    """
    return _of_hub(str(path)) if is_name(path) else downloaded(path) or Path(path)


def downloaded(path: str | os.PathLike) -> Path | None:
    """The weights in a folder as the hub has them; None for anything else."""
    folder = Path(path)
    here = (folder / name for name in _USUAL if (folder / CONFIG).is_file() and not (folder / "manifest.json").exists())
    return next((file for file in here if file.is_file()), None)


def _of_hub(name: str) -> Path:
    from huggingface_hub import constants, errors

    repository, _, revision = _repository(name).partition("@")
    try:
        return _cached(repository, revision or None) or _downloaded(repository, revision or None, name)
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
    import timm

    from conf.names import nearest

    if not timm.is_model(model):
        raise UserError(f"load_weights: timm has no model of this name, got {name}{nearest(model, timm.list_models())}")
    tag = getattr(timm.get_pretrained_cfg(model), "tag", "")
    if not tag:
        raise UserError(f"load_weights: timm has no weights of this model, got {name}; choose another one")
    return f"{name}.{tag}"


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    found = (try_to_load_from_cache(repository, file, constants.HF_HUB_CACHE, revision) for file in _USUAL)
    return next((Path(file) for file in found if isinstance(file, str)), None)


def _downloaded(repository: str, revision: str | None, name: str) -> Path:
    """The usual file of weights, or the first with a suffix of weights, and the configuration beside it."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    where = {"revision": revision, "cache_dir": constants.HF_HUB_CACHE}
    files = [file.rfilename for file in HfApi().model_info(repository, revision=revision, timeout=_SECONDS).siblings]
    others = [file for suffix in _SUFFIXES for file in files if file.endswith(suffix)]
    weights = [file for file in _USUAL if file in files] + others
    if not weights:
        raise UserError(f"load_weights: this repository has no file of weights, got {name}; choose another one")
    if CONFIG in files:
        hf_hub_download(repository, CONFIG, **where)
    return Path(hf_hub_download(repository, weights[0], **where))
