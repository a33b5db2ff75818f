"""The router without parameters chooses the heads of the authors' MoH-LLaMA3, and the gated layer equals theirs.

What is no vision attention (rotary positions, shared keys, the causal mask) is written here.
"""

import numpy as np
import parity
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.head_router import QueryRouter

CASES = [
    name
    for name in reference.cases("module")
    if reference.info(name).get("official_constructor", "").startswith("LlamaSdpaAttention")
]


class LlamaAttention(nn.Module):
    """Queries, keys, values, rotation by position, causal attention, 0/1 gates, projection."""

    def __init__(self, hparams: dict) -> None:
        super().__init__()
        dim, self.heads, self.kv_heads = (
            hparams[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        self.theta, self.head_dim = hparams["rope_theta"], dim // self.heads
        self.q_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(dim, self.kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.router = QueryRouter(dim, self.heads, hparams["shared_head"], hparams["routed_head"])

    def queries(self, x: Tensor) -> Tensor:
        return self.q_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries(x)
        gates, _ = self.router(x, q)
        k, v = (p(x).unflatten(2, (self.kv_heads, -1)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (self.rotated(k), v))
        o = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        return self.o_proj((o * gates.transpose(1, 2).unsqueeze(-1)).transpose(1, 2).flatten(2))

    def rotated(self, x: Tensor) -> Tensor:
        """Channels i and i + D/2 turned by the angle position · theta^(-2i / D)."""
        rates = self.theta ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(x.shape[2]), rates)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def test_the_cases_are_found() -> None:
    assert len(CASES) >= 3


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    parity.check(name, LlamaAttention(reference.info(name)["hparams"]), dict, lambda m, x: m(x))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_routing(name: str) -> None:
    module = LlamaAttention(reference.info(name)["hparams"]).eval()
    module.load_state_dict(reference.weights(name))
    x = reference.model_input(name)
    gates, _ = module.router(x, module.queries(x))
    np.testing.assert_array_equal(gates, reference.arrays(name)["gates"])
