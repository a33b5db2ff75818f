"""HyperAttention: blocks of queries and keys that hash alike, and a sample of the other keys, in one softmax.

Source: HyperAttention: Long-context Attention in Near-Linear Time, Han et al., ICLR 2024, arXiv:2310.05869, algorithms
1 and 3. The hash of a vector is the number, in Gray's code, of the signs of P random projections. With queries and keys
sorted by it and cut into blocks, A the keys of the own block and Z sampled ones of all S:
    o_i = (Σ_A e_ij v_j + S/Z Σ_Z e_ij v_j) / (Σ_A e_ij + S/Z Σ_Z e_ij),    e_ij = exp(q_i · k_j / √D)
Shapes: B = batch, N = S = tokens, M = heads, D = channels per head; R = blocks of T queries and T keys.
Samples of the own block count once, as in the paper; in float32 and on a GPU the authors' code counts them twice
(`exclude_block=false`). It draws projections and samples anew for each call and image; here they follow from the seed
and the layer, and the samples from the step too, for all images. A last block may be shorter. What goes where has no
gradient, as there.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from conf import values
from kernels.order import sorted_stably
from kernels.precision import full_precision, wide
from kernels.window_attention import definition as softmax_heads
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.layout import SAME
from models.attention.contract.options import check_flags, check_whole
from models.attention.drawn import Drawn
from models.attention.multihead import Core


def hyper_attention(
    site: Site,
    *,
    block_size: int = 256,
    sample_size: int = 256,
    projections: int = 7,
    min_seq_len: int = 4096,
    exclude_block: bool = True,
    seed: int = 0,
    **composition: Unpack[Composition],
) -> Mixer:
    """Near-linear attention with the weights of softmax attention, which it is for few tokens.

    Args:
        site: the place in the backbone.
        block_size: most queries of a block, T.
        sample_size: sampled keys Z; 0 for none.
        projections: P, bits of the hash.
        min_seq_len: fewer tokens than this have softmax attention, of PyTorch.
        exclude_block: sampled keys of the own block count once.
        seed: names projections and samples.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: a number that is none, or more bits than 62.
    """
    check_whole("hyper", block_size=block_size, min_seq_len=min_seq_len)
    fix = "set attention.sample_size, or 0 for none"
    values.whole("hyper", "sample_size", sample_size, 0, fix=fix)
    if not values.is_whole(projections) or projections > 62:
        values.refuse("hyper", "projections", "from 1 to 62", projections, "set attention.projections, e.g. 7")
    check_flags("hyper", exclude_block=exclude_block)
    values.whole("hyper", "seed", seed, 0, fix="set attention.seed")
    options = {"sample_size": sample_size, "projections": projections, "min_seq_len": min_seq_len}
    return assemble(
        site, lambda *_: HyperCore(site, block_size, **options, exclude_block=exclude_block, seed=seed), **composition
    )


class HyperCore(Drawn, Core):
    """No parameters; in float32 at least. Options as of `hyper_attention`."""

    keys = frozenset({SAME})
    row_stochastic = True
    ignores_grid = True

    def __init__(
        self,
        site: Site,
        block_size: int = 256,
        *,
        sample_size: int = 256,
        projections: int = 7,
        min_seq_len: int = 4096,
        exclude_block: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(seed, site)
        self.block_size, self.sample_size, self.exclude_block = block_size, sample_size, exclude_block
        self.bits, self.min_seq_len = projections, min_seq_len

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        if self._is_exact(q_BMND.shape[2]):
            return softmax_heads(q_BMND, k_BMSD, v_BMSD, scale=q_BMND.shape[-1] ** -0.5)
        sampled_MZ = self.sampled(q_BMND.shape[1], k_BMSD.shape[2])
        return self.attend(q_BMND, k_BMSD, v_BMSD, self.directions(q_BMND.shape[-1]), sampled_MZ)

    def directions(self, dim: int) -> Tensor:
        """(D, P): what vectors are projected on."""
        return self.normal(dim * self.bits).view(dim, self.bits)

    def sampled(self, heads: int, keys: int) -> Tensor:
        """(M, Z): places of the sampled keys, in the order of the sorted ones."""
        return (self.drawn(heads * self.sample_size) % keys).view(heads, self.sample_size)

    def attend(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, directions_DP: Tensor, sampled_MZ: Tensor
    ) -> Tensor:
        """The heads with these projections and these places of samples, of all images (M, Z) or of each (B, M, Z)."""
        with full_precision(q_BMND.device):
            q, k, v = (wide(t) for t in (q_BMND, k_BMSD, v_BMSD))
            order_BMN, keys_BMS = in_order(q, directions_DP), in_order(k, directions_DP)
            q, k, v = _taken(q, order_BMN), _taken(k, keys_BMS), _taken(v, keys_BMS)
            sampled_BMZ = sampled_MZ.expand(len(q), -1, -1)
            own_BMRTT, others_BMRTZ = self._weights(q, k, sampled_BMZ)
            o_BMRTD = own_BMRTT @ self._blocks(v) + others_BMRTZ @ _taken(v, sampled_BMZ)[:, :, None]
            return _taken(o_BMRTD.flatten(2, 3), order_BMN.argsort(-1)).to(q_BMND.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S): quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            q, k, tokens = wide(q_BMND), wide(k_BMSD), q_BMND.shape[2]
            if self._is_exact(tokens):
                return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            order_BMN, keys_BMS = (in_order(t, self.directions(t.shape[-1])) for t in (q, k))
            q, k = _taken(q, order_BMN), _taken(k, keys_BMS)
            sampled_BMZ = self.sampled(q.shape[1], tokens).expand(len(q), -1, -1)
            weights_BMRTK = torch.cat(self._weights(q, k, sampled_BMZ), dim=-1)
            B, M, R, T, _ = weights_BMRTK.shape
            block_RTT = torch.arange(R * T, device=q.device).view(R, 1, T).expand(-1, T, -1)
            others_BMRTZ = sampled_BMZ[:, :, None, None].expand(-1, -1, R, T, -1)
            places = torch.cat([block_RTT.expand(B, M, -1, -1, -1), others_BMRTZ], dim=-1)
            found = weights_BMRTK.new_zeros(B, M, R, T, R * T).scatter_add(-1, places, weights_BMRTK)
            rows = _taken(found.flatten(2, 3)[..., :tokens], order_BMN.argsort(-1))
            return _taken(rows.mT, keys_BMS.argsort(-1)).mT

    def _is_exact(self, tokens: int) -> bool:
        return tokens < self.min_seq_len or tokens <= self.block_size

    def _weights(self, q_BMND: Tensor, k_BMSD: Tensor, sampled_BMZ: Tensor) -> tuple[Tensor, Tensor]:
        """Of sorted queries the weights of the keys of their block, (B, M, R, T, T), and of the sampled ones."""
        N, Z = k_BMSD.shape[2], sampled_BMZ.shape[2]
        q_BMRTD, k_BMRTD = self._blocks(q_BMND * q_BMND.shape[-1] ** -0.5), self._blocks(k_BMSD)
        R, T = q_BMRTD.shape[2:4]
        place_RT = torch.arange(R * T, device=q_BMND.device).view(R, T)
        own = (q_BMRTD @ k_BMRTD.mT).masked_fill((place_RT >= N)[:, None], -math.inf)
        others = q_BMRTD @ _taken(k_BMSD, sampled_BMZ)[:, :, None].mT
        if Z:
            others = others + math.log(N / Z)
        if self.exclude_block:
            block = sampled_BMZ[:, :, None, None] // T
            others = others.masked_fill(block == place_RT[:, :1, None] // T, -math.inf)
        return torch.cat([own, others], dim=-1).softmax(-1).split([T, Z], dim=-1)

    def _blocks(self, x_BMND: Tensor) -> Tensor:
        """(B, M, R, T, D): consecutive tokens, the last of zeros where there are no more."""
        blocks = -(-x_BMND.shape[2] // self.block_size)
        size = -(-x_BMND.shape[2] // blocks)
        return F.pad(x_BMND, (0, 0, 0, blocks * size - x_BMND.shape[2])).unflatten(2, (blocks, size))


def hashed(x_BMND: Tensor, directions_DP: Tensor) -> Tensor:
    """(B, M, N): the signs of the projections as one number, in Gray's code: neighbours differ in one sign."""
    bits = (x_BMND.detach() @ directions_DP.to(x_BMND.dtype) > 0).long()
    number = (bits * 2 ** torch.arange(bits.shape[-1], device=bits.device)).sum(-1)
    return number ^ (number >> 1)


def in_order(x_BMND: Tensor, directions_DP: Tensor) -> Tensor:
    """(B, M, N): tokens by their hash; of equal ones in their order."""
    return sorted_stably(hashed(x_BMND, directions_DP)).indices


def _taken(x_BMND: Tensor, index_BMK: Tensor) -> Tensor:
    """(B, M, K, D): these tokens."""
    return x_BMND.gather(2, index_BMK[..., None].expand(-1, -1, -1, x_BMND.shape[3]))
