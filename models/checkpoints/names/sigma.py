"""Names of weights in the files of apple/ml-sigma-reparam: those of timm's ViT, each layer with its spectral norm.

Source: Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv:2303.06296; the state dicts of
its code at commit fea4e35. A weight stands twice in a file, kernels are matrices (out, in·k·k), and beside them stand
two figures for logs: σ once more, and the norm that the last step found, which is written as that of one step from u.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.checkpoints.names import backbones
from models.checkpoints.names.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT = ".parametrizations.weight."
_OWN = (
    (r"\.parametrizations\.weight\.original$", ".weight"),
    (r"\.parametrizations\.weight\.0\.sigma$", ".sigma"),
    (r"\.parametrizations\.weight\.0\.u$", ".spectral_normed_weight.u"),
)


def _figures(ours: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """What a file of theirs holds besides: every weight again, its σ again, and its norm."""
    theirs, found = LAYOUTS[0].names(ours), {}
    for name in (name for name in ours if name.endswith(f"{_WEIGHT}original")):
        layer, weight = theirs[name][0].name.removesuffix(".weight"), ours[name].flatten(1)
        base = name.removesuffix("original")
        v = weight @ ours[f"{base}0.u"]
        found[f"{layer}.effective_spectral_norm"] = ours[f"{base}0.sigma"].clone()
        found[f"{layer}.spectral_normed_weight.weight"] = weight.clone()
        found[f"{layer}.spectral_normed_weight.spectral_norm"] = ((weight.mT @ v).norm() / v.norm()).reshape(1)
    return found


_VIT = backbones.deit("")
LAYOUTS = (
    Layout(
        "apple/ml-sigma-reparam",
        (*_VIT.rules, *_OWN),
        numbered=_VIT.numbered,
        flattened=r"^stem\.patch_embed\.proj\.parametrizations\.weight\.original$",
        constants=r"\.effective_spectral_norm$|\.spectral_normed_weight\.spectral_norm$",
        make_constants=_figures,
        copies=(r"\.spectral_normed_weight\.weight$", ".weight"),
    ),
)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
