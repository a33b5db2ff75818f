"""Positive random features whose products are, on average, the exponentials that softmax attention is made of.

Source: Rethinking Attention with Performers, Choromanski et al., ICLR 2021, arXiv:2009.14794, equation 5 and section
2.4: φ(x) = F^-1/2 exp(w_f · x - |x|² / 2), so that E[φ(q) · φ(k)] = exp(q · k), with w_f normal, every D orthogonal.
Shapes: B = batch, M = heads, N = tokens, S = keys, D = channels per head, F = features.
They are drawn once and kept with the weights. A common factor of all features of a query, or of all keys of a head,
cancels in attention: it keeps the exponentials below one.
"""

import torch
from torch import Tensor, nn

from kernels.precision import full_precision, wide

EPS = 1e-4  # added to every feature, as in the authors' code


class RandomFeatures(nn.Module):
    """`(q_BMND, k_BMSD, v_BMSE) -> o_BMNE`: attention with D^-1/2 as scale, estimated; in float32 at least.

    Args:
        head_dim: D.
        features: F.
    """

    def __init__(self, head_dim: int, features: int) -> None:
        super().__init__()
        self.register_buffer("projection", orthogonal(features, head_dim))

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSE: Tensor) -> Tensor:
        with full_precision(q_BMND.device):
            q_BMNF, k_BMSF = self._features(q_BMND, (-1,)), self._features(k_BMSD, (-2, -1))
            sums_BM1F = k_BMSF.sum(2, keepdim=True)
            return q_BMNF @ (k_BMSF.mT @ wide(v_BMSE)) / (q_BMNF @ sums_BM1F.mT)

    def _features(self, x_BMND: Tensor, together: tuple[int, ...]) -> Tensor:
        x_BMND = wide(x_BMND) * x_BMND.shape[-1] ** -0.25
        logits_BMNF = x_BMND @ wide(self.projection).mT - x_BMND.square().sum(-1, keepdim=True) / 2
        most = logits_BMNF.detach()
        return (logits_BMNF - most.amax(together, keepdim=True)).exp() + EPS


def orthogonal(rows: int, columns: int) -> Tensor:
    """(rows, columns): rows as long as normal ones, at right angles to the others of the same `columns`.

    Signs as of R make all rotations as likely; without them, as in most code, products do not tend to exponentials.
    """
    blocks = []
    for _ in range(-(-rows // columns)):
        q, r = torch.linalg.qr(torch.randn(columns, columns))
        blocks.append((q * r.diagonal().sign()).mT)
    return torch.cat(blocks)[:rows] * torch.randn(rows, columns).norm(dim=1, keepdim=True)
