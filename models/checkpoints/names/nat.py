"""Names of weights in the files of NAT, DiNAT, DiNAT_s, their isotropic forms and ViT-rpb.

Source: Neighborhood Attention Transformer, arXiv:2204.07143, and its dilated form, arXiv:2209.15001; the state dicts of
SHI-Labs/Neighborhood-Attention-Transformer at commit d334f5b. What makes the map smaller ends the stage before. Files
of ViT-rpb hold besides the weights which entry of the table each pair of tokens has.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from conf.errors import UserError
from models.checkpoints.names.layout import Layout, Rules

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "SHI-Labs/Neighborhood-Attention-Transformer"
_MIXER: Rules = ((r"\.attn\.core\.bias\.table$", ".attn.rpb"), (r"\.scale([12])\.gamma$", r".gamma\1"))
_LEVELS = (
    (r"^stem\.conv\.", "patch_embed.proj."),
    (r"^stem\.", "patch_embed."),
    (r"^norms\.(\d+)\.", r"norm\1."),
    (r"^stages\.(\d+)\.downsample\.conv\.", lambda match: f"levels.{int(match[1]) - 1}.downsample.reduction."),
    (r"^stages\.(\d+)\.downsample\.out_norm\.", lambda match: f"levels.{int(match[1]) - 1}.downsample.norm."),
    (r"^stages\.", "levels."),
    *_MIXER,
)
_LAYERS = (
    (r"^stem\.patch_embed\.", "patch_embed."),
    (r"^norms\.(\d+)\.", r"norm\1."),
    (r"^stages\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
    (r"^stages\.", "layers."),
    *_MIXER,
)
_PLAIN = ((r"^stem\.patch_embed\.", "patch_embed."), (r"^stages\.0\.blocks\.", "layers."), *_MIXER)


def _pairs(ours: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Which entry of the table, row after row, each pair of tokens has, (N, N), by key minus query."""
    import torch

    constants = {}
    for name, table in ours.items():
        if match := re.fullmatch(r"stages\.0\.blocks\.(\d+)\.attn\.core\.bias\.table", name):
            if table.shape[1] != table.shape[2]:
                raise UserError(
                    f"export: maps must be squares in the files of ViT-rpb, got a table {tuple(table.shape)} in "
                    f"{name}; choose a square image size"
                )
            side = (table.shape[1] + 1) // 2
            tokens = torch.arange(side * side)
            y, x = tokens // side, tokens % side
            index = (y - y[:, None] + side - 1) * (2 * side - 1) + x - x[:, None] + side - 1
            constants[f"layers.{match[1]}.attn.relative_position_index"] = index
    return constants


_OF_FORMS = {
    "levels": Layout(SOURCE, _LEVELS),
    "layers": Layout(SOURCE, _LAYERS),
    "plain": Layout(SOURCE, _PLAIN),
    "whole": Layout(SOURCE, _PLAIN, constants=r"\.relative_position_index$", make_constants=_pairs),
}
LAYOUTS = tuple(_OF_FORMS[form] for form in ("levels", "layers", "whole"))  # the last reads those without pairs too


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    forms = {"vitrpb": "whole", "nat_isotropic": "plain", "dinat_isotropic": "plain", "dinat_s_": "layers"}
    return _OF_FORMS[next((form for start, form in forms.items() if name.startswith(start)), "levels")]
