"""Efficient probing: each of several learned queries pools its own slice of the channels.

y_m = softmax(Q_m Xᵀ / √C) (X W_v)[slice m], all joined: the keys are the tokens themselves.

Source: Psomas et al., Attention, Please! Revisiting Attentive Probing for Masked Image Modeling, 2025,
arXiv:2506.10178. The authors' probe has a batch norm without weights behind it (`batch_norm`).
Where the authors' code differs: W_v is applied to every token, here to what each query pooled, which is the same.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, Q = queries, S = H·W, D = C / (d_out · Q).
"""

import torch
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.layers.grid import Grid
from models.layers.pooled import Pool, Pooled

WHO = "EfficientProbing"


class EfficientProbing(Pool):
    """(B, N, C) → (B, C / d_out); class tokens are left out.

    Args:
        dim: channels C.
        grid, num_classes: of the place; it depends on neither.
        num_queries: Q, which divides C / d_out.
        d_out: how many times fewer features than channels.
        qkv_bias: whether W_v has a bias.
        batch_norm: norm of the features over the batch, without weights.

    Raises:
        ValueError: an option out of range, or queries that do not divide the features.
    """

    undecayed = ("queries",)

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_classes: int,
        *,
        num_queries: int = 32,
        d_out: int = 1,
        qkv_bias: bool = False,
        batch_norm: bool = False,
    ) -> None:
        for name, value in (("num_queries", num_queries), ("d_out", d_out)):
            values.whole(WHO, name, value, fix=f"set pool.{name}")
        for name, value in (("qkv_bias", qkv_bias), ("batch_norm", batch_norm)):
            values.flag(WHO, name, value, fix=f"set pool.{name}=true or false")
        if dim % (d_out * num_queries):
            raise UserError(
                f"{WHO}: num_queries and d_out must divide the {dim} channels together, got {num_queries} and {d_out}; "
                "set pool.num_queries or pool.d_out"
            )
        super().__init__(dim // d_out)
        self.queries = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.v = nn.Linear(dim, dim // d_out, bias=qkv_bias)
        self.norm = nn.BatchNorm1d(dim // d_out, eps=1e-6, affine=False) if batch_norm else nn.Identity()
        nn.init.trunc_normal_(self.v.weight, std=0.02)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        x_BSC = x_BNC[:, grid.prefix :]
        weights_BQS = (self.queries @ x_BSC.mT * x_BSC.shape[-1] ** -0.5).softmax(-1)
        pooled_BQC, slices = weights_BQS @ x_BSC, (self.queries.shape[1], -1)
        y_BF = torch.einsum("bqc,qdc->bqd", pooled_BQC, self.v.weight.unflatten(0, slices)).flatten(1)
        return Pooled(self.norm(y_BF if self.v.bias is None else y_BF + self.v.bias), weights_BQS, {})
