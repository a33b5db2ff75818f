"""Agent attention against what the authors' modules returned, driven by the recorded cases alone."""

import re
from collections.abc import Callable

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from kernels import windows
from kernels.agent_attention import attend_through
from models.attention import Grid, Site
from models.attention.agent import AgentBias, AgentCore, agent_attention, agent_grid
from models.attention.contract.heads import split_heads
from models.attention.multihead import MultiHead
from models.checkpoints.names.agent import authors
from models.layers.block import Block

State = dict[str, Tensor]


def cases(*constructors: str) -> list[str]:
    modules = [name for name in reference.cases("module") if name.startswith("agent/")]
    return [name for name in modules if reference.info(name).get("official_constructor") in constructors]


def bias_tables(theirs: State) -> State:
    """The authors' tables of one module under our names, both biases as (M, A, …)."""
    tables = {"gather_bias.block": theirs["an_bias"], "scatter_bias.block": theirs["na_bias"]}
    for ours, names in (("row", ("ah", "ha")), ("column", ("aw", "wa")), ("prefix", ("ac", "ca"))):
        gather, scatter = (f"{name}_bias" for name in names)
        if gather in theirs:
            tables[f"gather_bias.{ours}"] = theirs[gather].squeeze(0).flatten(2)
            tables[f"scatter_bias.{ours}"] = theirs[scatter].squeeze(0).movedim(-1, 1).flatten(2)
    return tables


def module_state(theirs: State) -> State:
    """A whole attention module: projections, spatial reduction, biases and convolution."""
    ours = {f"core.{name}": table for name, table in bias_tables(theirs).items()}
    for kind in ("weight", "bias"):
        ours[f"core.dwc.{kind}"], ours[f"proj.{kind}"] = theirs[f"dwc.{kind}"], theirs[f"proj.{kind}"]
        if f"qkv.{kind}" in theirs:
            ours[f"qkv.{kind}"] = theirs[f"qkv.{kind}"]
        elif f"q.{kind}" in theirs:
            ours[f"qkv.{kind}"] = torch.cat([theirs[f"q.{kind}"], theirs[f"kv.{kind}"]])
        if f"sr.{kind}" in theirs:
            ours[f"reduce.conv.{kind}"], ours[f"reduce.norm.{kind}"] = theirs[f"sr.{kind}"], theirs[f"norm.{kind}"]
    return ours


def mixer(hparams: dict, grid: Grid, **options: object) -> MultiHead:
    site = Site(hparams["dim"], hparams["num_heads"], grid, 0, 0, 1, "vit" if grid.prefix else "hierarchical")
    options = {"qkv_bias": hparams.get("qkv_bias", True), "sr_ratio": hparams.get("sr_ratio", 1)} | options
    return agent_attention(site, **options)


def call_on(grid: Grid) -> Callable[[MultiHead, Tensor], Tensor]:
    return lambda module, x: module(x, grid).x


def square(tokens: int) -> int:
    side = round(tokens**0.5)
    assert side * side == tokens, f"{tokens} tokens are no square"
    return side


@pytest.mark.parametrize("name", cases("models.agent_deit.AgentAttention"))
def test_deit(name: str) -> None:
    case = reference.info(name)
    hparams, side = case["hparams"], case["hparams"]["window"]
    grid = Grid(side, side, case["input_shape"][1] - side * side)
    parity.check(name, mixer(hparams, grid, agent_tokens=hparams["agent_num"]), module_state, call_on(grid))


@pytest.mark.parametrize("name", cases("models.agent_pvt.AgentAttention"))
def test_pvt(name: str) -> None:
    case = reference.info(name)
    hparams, side = case["hparams"], square(case["hparams"]["num_patches"])
    grid = Grid(*map(int, re.search(r"H=(\d+), W=(\d+)", case["forward"]).groups()))
    module = mixer(hparams, Grid(side, side), agent_tokens=hparams["agent_num"])
    parity.check(name, module, module_state, call_on(grid))


@pytest.mark.parametrize("name", cases("models.agent_swin.AgentAttention"))
def test_swin(name: str) -> None:
    hparams = reference.info(name)["hparams"]
    grid = Grid(*hparams["window_size"])  # the case's batch is one of windows
    parity.check(name, mixer(hparams, grid, agent_tokens=hparams["agent_num"]), module_state, call_on(grid))


@pytest.mark.parametrize("name", cases(*(f"mmdet.models.backbones.agent_{b}.AgentAttention" for b in ("swin", "pvt"))))
def test_downstream(name: str) -> None:
    """Another map and another agent grid than trained: the biases are interpolated over both."""
    case = reference.info(name)
    hparams = case["hparams"]
    trained = hparams.get("input_resolution") or [square(hparams["num_patches"])] * 2
    grid = Grid(*map(int, re.findall(r"\d+", case["forward"])))
    module = mixer(
        hparams,
        Grid(*trained),
        agent_tokens=hparams["downstream_agent_shape"],
        trained_agent_tokens=hparams["agent_num"],
    )
    parity.check(name, module, module_state, call_on(grid))


class Stripe(nn.Module):
    """CSWin's branch: attention of given queries, keys and values inside stripes of the map."""

    def __init__(self, dim: int, heads: int, resolution: int, index: int, split: int, agents: int) -> None:
        super().__init__()
        self.heads, self.resolution = heads, resolution
        full = [resolution, resolution]
        self.stripe = tuple({-1: full, 0: [resolution, split], 1: [split, resolution]}[index])
        grid, shape = Grid(*self.stripe), agent_grid(agents)
        tables = AgentBias(heads, shape, grid), AgentBias(heads, shape, grid)
        self.core = AgentCore(heads, dim // heads, shape, gather_bias=tables[0], scatter_bias=tables[1])

    def forward(self, qkv_3BNC: Tensor) -> Tensor:
        size = self.resolution, self.resolution
        q, k, v = (split_heads(windows.split(x, *size, self.stripe), 1, self.heads)[0] for x in qkv_3BNC)
        o_BMND = self.core(q, k, v, Grid(*self.stripe), Grid(*self.stripe))
        return windows.merge(o_BMND.transpose(1, 2).flatten(2), *size, self.stripe)


def stripe_state(theirs: State) -> State:
    ours = {f"core.{name}": table for name, table in bias_tables(theirs).items()}
    return ours | {f"core.dwc.{kind}": theirs[f"get_v.{kind}"] for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", cases("models.agent_cswin.AgentAttention"))
def test_cswin(name: str) -> None:
    h = reference.info(name)["hparams"]
    module = Stripe(h["dim"], h["num_heads"], h["resolution"], h["idx"], h["split_size"], h["agent_num"])
    parity.check(name, module, stripe_state, lambda module, x: module(x))


@pytest.mark.parametrize("name", cases("models.agent_cswin.CSWinBlock"))
def test_cswin_block(name: str) -> None:
    h = reference.info(name)["hparams"]
    site = Site(h["dim"], h["num_heads"], Grid(h["reso"], h["reso"]), 0, 0, 1, "hierarchical")
    options = {"agent_tokens": h["agent_num"], "stripe": None if h["split_size"] == h["reso"] else h["split_size"]}
    mixer = agent_attention(site, qkv_bias=h["qkv_bias"], **options)
    block = Block(h["dim"], mixer, norm_eps=1e-5, mlp_ratio=h.get("mlp_ratio", 4.0))
    convert = parity.through(authors("agent_cswin_tiny"), block, "stages.0.blocks.0.", "stage1.0.")
    parity.check(name, block, convert, lambda module, x: module(x, site.grid)[0])


class AgentSD(nn.Module):
    """The Stable Diffusion plug-in: given agent tokens, a softer second softmax, and a shortcut of the values."""

    def __init__(self, h: dict, tokens: int) -> None:
        super().__init__()
        self.heads, self.tokens, inner = h["heads"], tokens, h["heads"] * h["dim_head"]
        self.scatter_scale, self.shortcut = (h["dim_head"] ** -0.5) ** h["k_scale2"], h["k_shortcut"]
        self.to_q, self.to_k, self.to_v = (nn.Linear(h["query_dim"], inner, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, h["query_dim"])])

    def forward(self, x_BNC: Tensor) -> Tensor:
        x, agents = x_BNC[:, : self.tokens], x_BNC[:, self.tokens :]
        projected = [self.to_q(x), self.to_k(x), self.to_v(x), self.to_q(agents)]
        q, k, v, a = (split_heads(y, 1, self.heads)[0] for y in projected)
        o_BMND = attend_through(q, k, v, a, scatter_scale=self.scatter_scale) + self.shortcut * v
        return self.to_out[0](o_BMND.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", cases("agentsd.patch.make_agent_attn(ldm CrossAttention)"))
def test_stable_diffusion(name: str) -> None:
    case = reference.info(name)
    tokens = int(re.search(r"x\[:, :(\d+)\]", case["forward"]).group(1))
    parity.check(name, AgentSD(case["hparams"], tokens), lambda theirs: theirs, lambda module, x: module(x))


def test_every_case_belongs_to_a_test() -> None:
    tested = {
        "agentsd.patch.make_agent_attn(ldm CrossAttention)",
        *(f"models.agent_{b}.AgentAttention" for b in ("deit", "pvt", "swin", "cswin")),
        *(f"mmdet.models.backbones.agent_{b}.AgentAttention" for b in ("swin", "pvt")),
        "models.agent_cswin.CSWinBlock",
    }
    found = {reference.info(n)["official_constructor"] for n in reference.cases("module") if n.startswith("agent/")}
    assert found <= tested and found
