"""Multi-head embeddings (MHE): all heads share one projection and differ by a learned vector, added or multiplied.

Source: Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention, Xue &
Aletras, Findings of EMNLP 2023, arXiv:2310.07911, section 3: q_h = W x + e_h, or q_h = (W x) ⊙ e_h, and so k and v; no
code was published. The second is here (W x) ⊙ (1 + e_h), so that embeddings start small in both.
For a mixer this is an ordinary `qkv` whose rows repeat: every layout, core and kernel works as it is.
Shapes: C = channels, M = heads, D = channels per head.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from conf.errors import UserError
from models.attention.projections import Projections, projections

MODES = ("mul", "add")
STD = 0.02  # of the embeddings at the start


def mhe(model: nn.Module, *, mode: str = "mul") -> None:
    """Shares the projections of queries, keys and values among the heads of every mixer of a built model.

    The shared projection starts as that of the first head; 3·C·D + 3·M·D numbers remain of 3·C·M·D.

    Args:
        model: with weights as they are to start.
        mode: "mul", or "add", where the bias of the projection is the embedding of the heads.

    Raises:
        ValueError: an unknown mode, a mixer without `qkv` and `proj`, or "add" without a bias.
    """
    if mode not in MODES:
        raise UserError(f"mhe: mode must be one of {', '.join(MODES)}, got {mode!r}; set reparam.mode")
    places = projections(model, "mhe", "reparam")
    for place in places:
        if mode == "add" and place.qkv.bias is None:
            raise UserError(
                f"mhe: embeddings that are added are the bias of the projection, got none in {place.name}; "
                "set attention.qkv_bias=true, or reparam.mode=mul"
            )
    for place in places:
        if mode == "add":
            nn.init.normal_(place.qkv.bias, std=STD)
        parametrize.register_parametrization(place.qkv, "weight", _shared(place, mode))


class SharedHeads(nn.Module):
    """(3·D, C) → (3·M·D, C): the rows of queries, of keys and of values, once for every head."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, shared: Tensor) -> Tensor:
        return self.repeated(shared).flatten(0, 2)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The rows of the first head."""
        return weight.unflatten(0, (3, self.num_heads, -1))[:, 0].flatten(0, 1).clone()

    def repeated(self, shared: Tensor) -> Tensor:
        """(3, M, D, C)."""
        return shared.unflatten(0, (3, 1, -1)).expand(-1, self.num_heads, -1, -1)


class ScaledHeads(SharedHeads):
    """As `SharedHeads`, each row times 1 + e of its head; `embedding` is a vector, so that it does not decay."""

    def __init__(self, num_heads: int, embedding: Tensor) -> None:
        super().__init__(num_heads)
        self.embedding = nn.Parameter(embedding)

    def forward(self, shared: Tensor) -> Tensor:
        return (self.repeated(shared) * (1 + self.embedding.view(3, self.num_heads, -1, 1))).flatten(0, 2)


def _shared(place: Projections, mode: str) -> SharedHeads:
    if mode == "add":
        return SharedHeads(place.num_heads)
    weight = place.qkv.weight
    return ScaledHeads(place.num_heads, STD * torch.randn(3 * place.inner, dtype=weight.dtype, device=weight.device))
