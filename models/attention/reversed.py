"""Reversed attention: a token sends its message to the tokens that it depends on, instead of gathering theirs.

Source: Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention, Ding et al., CVPR 2023,
arXiv:2304.03282, section 3. With A = softmax(q kᵀ / √D) over the keys, as usual,
    y = W_o Aᵀ (p ∘ m ∘ v),   p = softmax over heads of W_p x,   m ← m · sigmoid(MLP(x)),
so that p says which kind of dependency a token has, and m how much it still has to say: 1 in the first block, and
handed on from block to block. There is no released code; temperature and hidden width are those of timm's draft.
Shapes: B = batch, N = H·W tokens, C = channels, M = heads, D = channels per head.
"""

from torch import Tensor, nn

from conf import values
from models.attention.contract import Accepts, Grid, Mixed, Mixer, Site
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags


class ReversedAttention(Mixer):
    """(B, N, C) → (B, N, C), for any map; `carry` is m, (B, N, 1).

    Args:
        site: the place in the backbone.
        temperature: of the softmax over heads; small: one head for each token.
        qkv_bias: bias of the projection.
        backend: "auto" or "torch"; there is no kernel.
    """

    accepts = Accepts(prefix="refused")
    carries = True
    has_matrix = True
    ignores_grid = True

    def __init__(self, site: Site, *, temperature: float = 1.0, qkv_bias: bool = False, backend: str = "auto") -> None:
        check_flags("reversed", qkv_bias=qkv_bias)
        if not values.is_number(temperature) or temperature <= 0:
            fix = "set attention.temperature, e.g. to 1.0"
            values.refuse("reversed", "temperature", "a positive number", temperature, fix)
        super().__init__(site, backend)
        inner = site.num_heads * head_channels(site)
        self.num_heads, self.temperature = site.num_heads, temperature
        self.qkv = nn.Linear(site.dim, 3 * inner, bias=qkv_bias)
        self.head_selector = nn.Linear(site.dim, site.num_heads, bias=False)
        self.message_controller = MessageController(site.dim)
        self.proj = nn.Linear(inner, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None, carry: Tensor | None = None) -> Mixed:
        m_BN1 = self.messages(x_BNC, carry)
        q, k, v = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        weights_BMNN = self._weights(q, k, x_BNC, m_BN1)
        if is_explaining():
            note(self, weights_BMNN)
        return Mixed(self._finished(weights_BMNN, v, gates_BNM), {}, m_BN1)

    def messages(self, x_BNC: Tensor, carry: Tensor | None = None) -> Tensor:
        """m behind this block, (B, N, 1), of that behind the one before it."""
        own_BN1 = self.message_controller(x_BNC).sigmoid()
        return own_BN1 if carry is None else carry * own_BN1

    def attention_matrix(self, x_BNC: Tensor, grid: Grid, carry: Tensor | None = None) -> Tensor:
        """Of every token that receives on every one that sends: Aᵀ p m, (B, M, N, N).

        Without `carry`, m is that of this block alone, as a call from outside does not know what came before.
        """
        q, k, _ = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        return self._weights(q, k, x_BNC, self.messages(x_BNC, carry))

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self._finished(weights, split_heads(self.qkv(x_BNC), 3, self.num_heads)[2])

    def _weights(self, q: Tensor, k: Tensor, x_BNC: Tensor, m_BN1: Tensor) -> Tensor:
        A_BMNN = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        p_BNM = (self.head_selector(x_BNC) / self.temperature).softmax(-1)
        return A_BMNN.mT * (p_BNM * m_BN1).mT.unsqueeze(2)

    def _finished(self, weights_BMNN: Tensor, v_BMND: Tensor, gates_BNM: Tensor | None = None) -> Tensor:
        return self.proj(gated_heads(merge_heads(weights_BMNN.to(v_BMND.dtype) @ v_BMND), gates_BNM))


class MessageController(nn.Module):
    """C → C/2 → 1 without biases: the logit of how much of its message a token keeps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, dim // 2, bias=False), nn.GELU()
        self.fc2 = nn.Linear(dim // 2, 1, bias=False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BNC)))
