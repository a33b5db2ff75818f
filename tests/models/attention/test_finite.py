"""Linear, agent, relational and sparse attention keep numbers finite: large powers, extreme tokens, half precision."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.attention import Grid, Site
from models.attention.agent import agent_attention
from models.attention.cores.combiner import combiner_attention
from models.attention.cores.efficient import efficient_attention
from models.attention.cores.flow import flow_attention
from models.attention.cores.galerkin import fourier_attention, galerkin_attention
from models.attention.cores.hedgehog import hedgehog_attention
from models.attention.cores.hierarchical import hierarchical_attention
from models.attention.cores.hyper import hyper_attention
from models.attention.cores.linear import linear_attention
from models.attention.cores.mra import mra_attention
from models.attention.cores.nprf import nprf_attention
from models.attention.cores.xca import xca_attention
from models.attention.focused_linear import focused_linear_attention
from models.attention.inline import inline_attention
from models.attention.relational import RelationalAttention
from models.layers.block import Block

GRID = Grid(7, 9)
SITE = Site(64, 2, GRID, 2, 0, 1, "hierarchical")
POWERS = (2, 3, 4, 5, 8)
MECHANISMS = {
    "agent": agent_attention,
    "inline": inline_attention,
    "inline exp": partial(inline_attention, feature="exp", lepe=True),
    "efficient": efficient_attention,
    "hedgehog": hedgehog_attention,
    "hedgehog, exp": partial(hedgehog_attention, feature="exp"),
    "flow": flow_attention,
    "linear": linear_attention,
    "galerkin": galerkin_attention,
    "fourier": fourier_attention,
    "xca": xca_attention,
    "relational": RelationalAttention,
    **{f"focused, power {power}": partial(focused_linear_attention, power=power) for power in POWERS},
}
SPARSE = {
    "mra": mra_attention,
    "mra, sparse": partial(mra_attention, mode="sparse", num_blocks=1),
    "hyper": partial(hyper_attention, block_size=8, sample_size=8, min_seq_len=8),
    "nprf": nprf_attention,
    "combiner": combiner_attention,
    "hierarchical": partial(hierarchical_attention, leaf=2),
}
GROWING = ("inline", "relational")
RARE = [pytest.param(name, marks=pytest.mark.full) for name in SPARSE]
TOKENS = {
    "usual": lambda x: x,
    "negative": lambda x: -x.abs() - 1,  # no channel of the features is positive
    "zero": lambda x: 0 * x,
    "tiny": lambda x: 1e-6 * x,
    "ten thousand times": lambda x: 1e4 * x,
    "one loud token": lambda x: torch.cat([1e4 * x[:, :1], x[:, 1:]], dim=1),
}
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def finite_step(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> None:
    """Output and gradients of one training step; the loss is scaled as a mean is, not summed."""
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        out = module(x, GRID)
    out = out[0] if isinstance(out, tuple) else out.x
    assert out.isfinite().all()
    (out.float() / out.detach().float().abs().max().clamp(min=1)).square().mean().backward()
    grads = {"x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, GRID.tokens, SITE.dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("name", [*MECHANISMS, *RARE])
def test_a_block_trains_on_any_tokens(name: str, kind: str, precision: str, x: Tensor) -> None:
    """With the norm in front of it, as in every model."""
    torch.manual_seed(0)
    block = Block(SITE.dim, (MECHANISMS | SPARSE)[name](SITE))
    finite_step(block, TOKENS[kind](x).clone(), AUTOCAST[precision])


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("name", [*(name for name in MECHANISMS if not name.startswith(GROWING)), *RARE])
def test_a_mechanism_alone_trains_on_any_tokens(name: str, kind: str, precision: str, x: Tensor) -> None:
    """Without a norm. Outputs that grow with the second or third power of the input leave what float16 can hold."""
    torch.manual_seed(0)
    module = (MECHANISMS | SPARSE)[name](SITE)
    for projection in module.modules():
        if isinstance(projection, nn.Linear):
            nn.init.trunc_normal_(projection.weight, std=0.02)
    finite_step(module, TOKENS[kind](x).clone(), AUTOCAST[precision])


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_queries_and_keys_of_every_size(power: float, sign: int) -> None:
    """Heads given directly, also where every channel of a token is negative, in the dtypes of autocast."""
    core = focused_linear_attention(SITE, power=power).core
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1e-6, 1.0, 1e4):
            heads = [sign * size * torch.rand(1, 2, GRID.tokens, 32).to(dtype) for _ in range(2)]
            out = core.to(dtype)(*heads, torch.rand(1, 2, GRID.tokens, 32).to(dtype), GRID, GRID)
            assert out.isfinite().all() and out.abs().max() > 0
