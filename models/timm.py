"""Our models in timm's registry, and so in every program that calls `timm.create_model`: `import models.timm` is all.

Each goes by its own name where timm has none of that name, and otherwise with `zoo_` in front; `names` maps ours to
those. Weights come as `checkpoint_path=`, in timm's way; there are none to download.
"""

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model, register_model
from torch import nn

from conf import families
from conf.errors import UserError
from models import create_model

PREFIX = "zoo_"
# keywords of timm.create_model by ours
RENAMED = {"img_size": "image_size", "in_chans": "in_channels", "drop_path_rate": "drop_path"}
# what timm hands to every model; of no use here
UNUSED = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


default_cfgs: dict[str, dict[str, Any]] = {}  # by timm's name, where timm looks for them
_registered: dict[str, str] = {}


def names() -> dict[str, str]:
    """The name in timm of every model of ours, by our name."""
    return dict(_registered)


def _register(name: str, row: dict[str, Any]) -> None:
    """Registers a model under a name that is free."""
    free = _registered[name] = f"{PREFIX}{name}" if is_model(name) else name

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise UserError(f"{free}: there are no weights to download, got pretrained=True; give checkpoint_path=")
        return _made(name, free, row, options)

    entry.__name__ = entry.__qualname__ = free
    entry.__doc__ = f"{name}, {row['paper']}; keywords are those of `models.create_model`, or timm's for the same."
    default_cfgs[free] = _config(row, {})
    register_model(entry)


def _made(name: str, free: str, row: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    given = {RENAMED.get(key, key): value for key, value in options.items() if key not in UNUSED and value is not None}
    model = create_model(name, **given)
    model.pretrained_cfg = model.default_cfg = _config(row, given) | {"architecture": free}
    model.num_classes = given.get("num_classes", 1000)
    return model


def _config(row: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What timm's `resolve_data_config` and its transforms read of a model."""
    size = given.get("image_size", row["image_size"])
    sides = (size, size) if isinstance(size, int) else tuple(size)
    channels = given.get("in_channels", 3)
    return {
        "input_size": (channels, *sides),
        "num_classes": given.get("num_classes", 1000),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "pool_size": None,
        "fixed_input_size": False,
        "first_conv": None,
        "classifier": "head",
    }


for _name, _row in families.models().items():
    _register(_name, _row)
