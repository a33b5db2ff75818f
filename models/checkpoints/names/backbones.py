"""Names of the backbones that several papers share: DeiT, PVT, PVT v2, Swin and CSWin, as their authors name them.

Papers that put a mechanism of their own into these backbones (Agent Attention, FLatten, InLine) keep the names and add
those of the mechanism, as the rules below do for all three at once.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from conf.errors import UserError
from models.checkpoints.names.layout import Axes, Joined, Layout

if TYPE_CHECKING:
    from torch import Tensor

_MECHANISMS = (  # after the names of a backbone have lost `core`
    (r"\.gather_bias\.block$", ".an_bias"),
    (r"\.gather_bias\.row$", ".ah_bias"),
    (r"\.gather_bias\.column$", ".aw_bias"),
    (r"\.gather_bias\.prefix$", ".ac_bias"),
    (r"\.scatter_bias\.block$", ".na_bias"),
    (r"\.scatter_bias\.row$", ".ha_bias"),
    (r"\.scatter_bias\.column$", ".wa_bias"),
    (r"\.scatter_bias\.prefix$", ".ca_bias"),
    (r"\.reduce\.conv\.", ".sr."),
    (r"\.reduce\.norm\.", ".norm."),
    (r"\.bias\.table$", ".relative_position_bias_table"),
)
_AXES = (  # heads m, agents a, rows h, columns w, class tokens p
    Axes(r"\.ah_bias$", "1mah1", "mah"),
    Axes(r"\.aw_bias$", "1ma1w", "maw"),
    Axes(r"\.ac_bias$", "1map", "map"),
    Axes(r"\.ha_bias$", "1mh1a", "mah"),
    Axes(r"\.wa_bias$", "1m1wa", "maw"),
    Axes(r"\.ca_bias$", "1mpa", "map"),
)
_KEYS_APART = (Joined(r"\.qkv\.", ((".q.", 1), (".kv.", 2))),)


def _next(template: str) -> object:
    """Replacement with the number of a stage counted from 1."""
    return lambda match: template.format(int(match[1]) + 1, *match.groups()[1:])


def deit(source: str) -> Layout:
    """DeiT and timm's ViT."""
    rules = (
        (r"^stem\.class_token$", "cls_token"),
        (r"^stem\.position\.table$", "pos_embed"),
        (r"^stem\.patch_embed\.", "patch_embed."),
        (r"\.attn\.core\.", ".attn."),
        (r"\.scale([12])\.gamma$", r".ls\1.gamma"),
        *_MECHANISMS,
    )
    return Layout(source, rules, axes=_AXES, numbered=True)


def pvt(source: str) -> Layout:
    """PVT and PVT v2."""
    rules = (
        (r"^stem\.patch_embed\.", "patch_embed1."),
        (r"^stem\.start\.position\.table$", "pos_embed1"),
        (r"^stages\.(\d+)\.downsample\.conv\.", _next("patch_embed{}.proj.")),
        (r"^stages\.(\d+)\.downsample\.out_norm\.", _next("patch_embed{}.norm.")),
        (r"^stages\.(\d+)\.downsample\.start\.position\.table$", _next("pos_embed{}")),
        (r"^stages\.(\d+)\.downsample\.start\.class_token$", "cls_token"),
        (r"^stages\.(\d+)\.norm\.", _next("norm{}.")),
        (r"^stages\.(\d+)\.blocks\.", _next("block{}.")),
        (r"\.attn\.core\.", ".attn."),
        (r"\.mlp\.conv\.", ".mlp.dwconv.dwconv."),
        *_MECHANISMS,
    )
    return Layout(source, rules, axes=_AXES, joined=_KEYS_APART)


def swin(source: str) -> Layout:
    """Swin, in whose files there are constants of its windows besides the weights."""
    constants = r"\.relative_position_index$"
    rules = (
        (r"^stem\.patch_embed\.", "patch_embed."),
        (r"^stages\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
        (r"^stages\.(\d+)\.blocks\.", r"layers.\1.blocks."),
        (r"\.attn\.shift_mask$", ".attn_mask"),
        (r"\.attn\.core\.", ".attn."),
        *_MECHANISMS,
    )
    given = {"constants": constants, "masks": r"\.attn_mask$", "make_constants": _relative_positions}
    return Layout(source, rules, axes=_AXES, **given)


def cswin(source: str, dwc: str = "dwc") -> Layout:
    """CSWin; `dwc` is the name there of the convolution of the mechanism."""
    rules = (
        (r"^stem\.patch_embed\.proj\.", "stage1_conv_embed.0."),
        (r"^stem\.patch_embed\.norm\.", "stage1_conv_embed.2."),
        (r"^stages\.(\d+)\.downsample\.conv\.", r"merge\1.conv."),
        (r"^stages\.(\d+)\.downsample\.out_norm\.", r"merge\1.norm."),
        (r"^stages\.(\d+)\.blocks\.", _next("stage{}.")),
        (r"\.attn\.(qkv|proj)\.", r".\1."),
        (r"\.attn\.cores\.(\d)\.", r".attns.\1."),
        (r"\.attn\.core\.", ".attns.0."),
        (r"\.dwc\.", f".{dwc}."),
        (r"\.lepe\.", ".get_v."),
        *_MECHANISMS,
    )
    return Layout(source, rules, axes=_AXES)


def _relative_positions(ours: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The rows of the bias tables for all pairs of tokens in a window, (T, T), that Swin keeps in its files."""
    import torch

    constants = {}
    for name, table in ours.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.attn\.core\.bias\.table", name):
            side = (math.isqrt(len(table)) + 1) // 2
            if (2 * side - 1) ** 2 != len(table):
                raise UserError(
                    f"export: windows must be squares in the files of Swin, got {len(table)} offsets in {name}; "
                    "choose an image size that whole windows fill"
                )
            tokens = torch.arange(side * side)
            y, x = tokens // side, tokens % side
            index = (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1
            constants[f"layers.{match[1]}.blocks.{match[2]}.attn.relative_position_index"] = index
    return constants


def by_name(source: str, dwc: str = "dwc") -> dict[str, Layout]:
    """The layouts of a repository that has all of them, by the second word of the names of its models."""
    return {"deit": deit(source), "pvt": pvt(source), "swin": swin(source), "cswin": cswin(source, dwc)}
