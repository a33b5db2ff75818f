"""Neural scores: a small network of query and key in place of their product.

Source: Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models, DiGiugno & Mahmood,
2025, arXiv:2502.17206, equation 4:
    s = W₃ relu(W₂ relu(W₁ [q′, k′] + b₁) + b₂) + b₃,   q′ = W_q q + b_q,  k′ = W_k k + b_k,  D → p, shared by heads.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head, p = width.
W₁ [q′, k′] is the sum of a part of the query and one of the key, so that N·S·p numbers are held instead of the 2p and
their copies of the authors' code. The authors use it in the first block of a model alone, with p = D / 32.
"""

from torch import Tensor, nn

from conf import values
from models.attention.contract import Refused, Site
from models.attention.contract.heads import head_channels

WHO = "neural"


def neural(site: Site, *, width: int = 8, max_tokens: int = 1024) -> "NeuralScore":
    """A network of three layers for every pair.

    Args:
        site: the place in the backbone, with the map that the core sees.
        width: p.
        max_tokens: most queries or keys of a group, whose pairs have p numbers per head each.

    Raises:
        ValueError: a number that is none.
        Refused: more tokens than that.
    """
    values.whole(WHO, "width", width, fix="set attention.score.width")
    values.whole(WHO, "max_tokens", max_tokens, fix="set attention.score.max_tokens")
    check_tokens(site.grid.tokens, max_tokens)
    return NeuralScore(head_channels(site), width, max_tokens)


class NeuralScore(nn.Module):
    """Logits (B, M, N, S)."""

    def __init__(self, head_dim: int, width: int, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        half = max(width // 2, 1)
        self.q, self.k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.q_hidden, self.k_hidden = nn.Linear(width, width), nn.Linear(width, width, bias=False)  # W₁
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(width, half), nn.ReLU(), nn.Linear(half, 1))

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor) -> Tensor:
        check_tokens(max(q_BMND.shape[2], k_BMSD.shape[2]), self.max_tokens)
        q_BMNP, k_BMSP = self.q_hidden(self.q(q_BMND)), self.k_hidden(self.k(k_BMSD))
        return self.out(q_BMNP.unsqueeze(3) + k_BMSP.unsqueeze(2)).squeeze(-1)


def check_tokens(tokens: int, most: int) -> None:
    """Refuses groups of more tokens than `most`."""
    if tokens > most:
        raise Refused(
            f"{WHO}: {tokens} tokens see each other, more than max_tokens={most} allows",
            "choose attention/layout=window, or raise attention.score.max_tokens",
        )
