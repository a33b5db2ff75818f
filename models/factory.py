"""Models from conf/model and conf/attention by name, outside of a run."""

from collections.abc import Mapping
from typing import Any

from hydra import utils as hydra_utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from conf import families, names
from conf.compose import compose_run
from conf.errors import UserError


def create(name: str, attention: str | None, settings: dict[str, Any], features_only: bool = False) -> nn.Module:
    """See `models.create_model`."""
    if isinstance(name, str) and name.startswith("timm/"):
        name, settings = "timm", {"name": name.removeprefix("timm/"), **settings}
    parts = {key: value for key, value in settings.items() if is_part(key, value)}
    cfg = compose_model(name, attention, parts)
    settings = {"num_classes": 1000, **{key: value for key, value in settings.items() if key not in parts}}
    if "image_size" in settings:
        cfg.image_size = settings.pop("image_size")
    for key, value in settings.items():
        part = next((part for part in (cfg.model, cfg.attention) if key in _settings(part)), None)
        if part is None and value is None and key in (*names.PARTS, *names.PLACES):
            continue
        if part is None:
            raise UserError(_unknown(name, key, value, cfg))
        old = None if OmegaConf.is_missing(part, key) else part[key]
        part[key] = merged(f"create_model: {name}", key, old, value)
    if features_only and name in families.files():
        raise UserError(f"create_model: {name} gives logits; call timm.create_model(..., features_only=True) for maps")
    model = build_model(cfg)
    if not features_only:
        return model
    from models.backbones.base import Pyramid

    return Pyramid(model)


def merged(who: str, key: str, old: Any, new: Any) -> Any:
    """The new value of a setting; a mapping changes single settings of a part, e.g. `first={"agent_tokens": 9}`.

    Raises:
        ValueError: something else than a mapping for a part, or a setting that it has not.
    """
    if not isinstance(old, DictConfig) or (new is None and key in names.OWN):
        return new
    known = sorted(_settings(old))
    if not isinstance(new, Mapping):
        raise UserError(f"{who}: {key} must be a dict with settings of {', '.join(known)}, got {new!r}")
    for name in new:
        if name not in old:
            raise UserError(
                f"{who}: {key} has no setting {name!r}{names.nearest(name, known)} It has {', '.join(known)}"
            )
    return OmegaConf.merge(old, dict(new))


def is_part(key: str, value: Any) -> bool:
    """Whether a setting chooses a part of the mechanism or of another place: by its name, or as a run stored it."""
    if key not in (*names.PARTS, *names.PLACES):
        return False
    return value in names.options(names.group_of(key)) if isinstance(value, str) else _is_node(value)


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _settings(part: Any) -> set[str]:
    """The keys of a model or an attention that may be set; a list of mechanisms has none."""
    return (
        {key for key in part if not key.startswith("_") and key not in names.PLACES}
        if isinstance(part, DictConfig)
        else set()
    )


def _unknown(name: str, key: str, value: Any, cfg: DictConfig) -> str:
    if key in (*names.PARTS, *names.PLACES):
        offered = names.options(names.group_of(key))
        near = names.nearest(str(value), offered)
        return f"create_model: there is no {key} {value!r}{near}; available: {', '.join(offered)}"
    known, options = _settings(cfg.model), _settings(cfg.attention)
    text = f"create_model: {name} has no setting {key!r}{names.nearest(key, known | options)} "
    if within := [part for part in sorted(options) if key in _settings(cfg.attention[part])]:
        text += f"Give it as {' or '.join(f'{part}={{{key!r}: ...}}' for part in within)}. "
    return f"{text}It has {', '.join(sorted(known))}" + (
        f"; its attention has {', '.join(sorted(options))}" if options else ""
    )


def compose_model(name: str, attention: str | None = None, parts: Mapping[str, Any] | None = None) -> DictConfig:
    """The part of the training configuration that makes a model: `model`, `attention`, `image_size`, other places.

    Args:
        name, attention: what `model=` and `attention=` take.
        parts: by the name of its group (`layout`, `gate`), the name of a part or the node that a run stored.
    """
    for kind, chosen in [("model", name), ("attention", attention)]:
        if not isinstance(chosen, str | None):
            listed = ", ".join(names.options(kind))
            raise UserError(f"create_model: {kind} must be a name, got {chosen!r}; choose from {listed}")
        if chosen is not None and chosen not in names.options(kind):
            raise UserError(
                f"create_model: there is no {kind} {chosen!r}{names.nearest(chosen, names.options(kind))} "
                f"available: {', '.join(names.options(kind))}"
            )
    named = {key: value for key, value in (parts or {}).items() if isinstance(value, str)}
    chosen = [f"model={name}", *([f"attention={attention}"] if attention else [])]
    cfg, _ = compose_run(chosen + [f"{names.group_of(key)}={value}" for key, value in named.items()])
    with open_dict(cfg):
        for key in set(cfg) - {"model", "attention", "image_size", "data", *names.PLACES}:
            del cfg[key]
        for key, value in (parts or {}).items():
            if key not in named:
                (cfg if key in names.PLACES else cfg.attention)[key] = value
    return cfg


def build_model(cfg: DictConfig) -> nn.Module:
    """The module of a composed configuration; a misfit is the plain `ValueError` of the part that found it."""
    try:
        return instantiate(cfg.model)
    except InstantiationException as error:
        cause = cause_of(error)
        if isinstance(cause, ValueError | TypeError):
            raise cause from None
        raise


def factory(cfg: DictConfig) -> Any:
    """The attention factory (or the list of factories, one per stage) of a composed configuration."""
    return instantiate(cfg.attention)


def instantiate(node: DictConfig, **extra: Any) -> Any:
    """Hydra's `instantiate`, for configurations of our own or checked ones (`models.checkpoints.check_config`).

    Hydra 1.4 wants to be told that any target may be built, as 1.3 does.
    """
    if hasattr(hydra_utils, "UNSAFE_DISABLE_EXECUTION_CHECKS"):
        extra["_execution_whitelist_"] = hydra_utils.UNSAFE_DISABLE_EXECUTION_CHECKS
    return hydra_utils.instantiate(node, **extra)


def cause_of(error: BaseException) -> BaseException:
    """What went wrong in a target, without Hydra's wrappers around it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error
