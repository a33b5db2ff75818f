"""Agent attention: a few pooled agent tokens gather from all tokens, and all tokens read from the agents.

Source: Agent Attention: On the Integration of Softmax and Linear Attention, Han et al., ECCV 2024, arXiv:2312.08874:
    A = pool(Q),  V_A = softmax(A Kᵀ / √D + B1) V,  O = softmax(Q Aᵀ / √D + B2) V_A + DWC(V)
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head, A = agents, P = prefix tokens, H W = map.
Where the authors' code is followed beyond the paper: class tokens are no agents, take no part in the convolution and
have biases of their own; on another map or agent grid than trained (their detection code) the biases are interpolated
bilinearly over both; with fewer keys than queries the convolution sees V enlarged bilinearly.
"""

import math
from collections.abc import Sequence
from typing import Unpack

from torch import Tensor, nn

from conf.errors import UserError
from kernels.agent_attention import MOST_AGENTS, pooled
from kernels.agent_attention import agent_attention as fused_agent_attention
from kernels.agent_attention import definition as agent_heads
from kernels.depthwise_conv import LARGEST
from models.attention import Grid, Mixer, Refused, Runs, Site
from models.attention.agent_bias import AgentBias
from models.attention.assemble import Composition, assemble
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME, SHORTENED
from models.attention.contract.options import check_flags, check_odd, check_whole, for_stage
from models.attention.multihead import Core

SIDES = (3, 4, 7, 7)  # of the papers' grids of agents, stage by stage


def agent_attention(
    site: Site,
    *,
    agent_tokens: int | str | Sequence = "auto",
    trained_agent_tokens: int | Sequence | None = None,
    kernel_size: int = 3,
    bias: bool = True,
    bias_size: int = 7,
    **composition: Unpack[Composition],
) -> Mixer:
    """Attention through agents pooled from the queries: linear in tokens for a fixed number of agents.

    Args:
        site: the place in the backbone.
        agent_tokens: agents: a square number, (height, width) of their grid, or a list with one of these per stage (a
            plain ViT takes the third). "auto": the papers' 9, 16, 49, 49, no side longer than the map (or window) that
            the mixer is built for.
        trained_agent_tokens: the agent grid of the bias tables where it is another one, as in detection with more
            agents than in pre-training, for larger maps; None for `agent_tokens`.
        kernel_size: of the depth-wise convolution of V; odd.
        bias: learned agent biases B1 and B2, or none.
        bias_size: side of their coarse tables, interpolated to the map.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: a number of agents that is no square, an even kernel, or a size below 1.
        Refused: a side of the grid of agents is longer than the map.
    """
    check_odd("agent_attention", kernel_size=kernel_size)
    check_whole("agent_attention", bias_size=bias_size)
    check_flags("agent_attention", bias=bias)
    dim, asked = head_channels(site), _of_stage("agent_tokens", agent_tokens, site)
    if asked != "auto":
        agent_grid(asked)
    trained = None
    if trained_agent_tokens is not None:
        trained = agent_grid(_of_stage("trained_agent_tokens", trained_agent_tokens, site), "trained_agent_tokens")

    def core(num_heads: int, grid: Grid, kv_grid: Grid) -> AgentCore:
        free = trained is not None and asked != "auto"  # maps will be larger
        agents = agent_grid(asked) if free else _agents_on(grid, asked, site)
        tables = [None, None]
        if bias:
            tables = [AgentBias(num_heads, trained or agents, grid, bias_size) for grid in (kv_grid, grid)]
        return AgentCore(num_heads, dim, agents, kernel_size, *tables)

    return assemble(site, core, **composition)


def _of_stage(name: str, agents: int | str | Sequence, site: Site) -> int | str | Sequence:
    """The entry of the stage; two numbers are not a list for two stages but one grid."""
    pair = isinstance(agents, Sequence) and len(agents) == 2 and all(isinstance(side, int) for side in agents)
    return agents if pair else for_stage(name, agents, site)


def _agents_on(grid: Grid, agent_tokens: int | str | Sequence[int], site: Site) -> tuple[int, int]:
    """Height and width of the grid of agents on a map."""
    if agent_tokens == "auto":
        side = for_stage("agent_tokens", SIDES, site._replace(stage=min(site.stage, len(SIDES) - 1)))
        return min(side, grid.height), min(side, grid.width)
    height, width = agent_grid(agent_tokens)
    if height > grid.height or width > grid.width:
        raise Refused(
            f"agent_tokens={agent_tokens} is a grid of {height}x{width} agents on a {grid.height}x{grid.width} map",
            "set attention.agent_tokens=auto, or to a smaller grid, or one per stage",
        )
    return height, width


def agent_grid(agent_tokens: int | Sequence[int], name: str = "agent_tokens") -> tuple[int, int]:
    """Height and width of the grid of agents, from a square number or from both sides."""
    sides = tuple(agent_tokens) if isinstance(agent_tokens, Sequence) else (agent_tokens,)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if whole and not isinstance(agent_tokens, str):
        if len(sides) == 2:
            return sides
        if len(sides) == 1 and math.isqrt(sides[0]) ** 2 == sides[0]:
            return (math.isqrt(sides[0]),) * 2
    raise UserError(
        f"agent_attention: {name} must be a square number, [height, width] or auto, got {agent_tokens!r}; "
        "use e.g. 9, 16, 49 or [3, 5]"
    )


class AgentCore(Core):
    """Pools the agents from the queries, attends through them, and adds a depth-wise convolution of the values.

    Args:
        num_heads, head_dim: M and D.
        agents: height and width of the grid of agents.
        kernel_size: of the convolution.
        gather_bias, scatter_bias: `AgentBias` of the keys (B1) and of the queries (B2), or None.
    """

    row_stochastic = True
    adds = True
    keys = frozenset({SAME, SHORTENED})  # its convolution needs one map

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        agents: tuple[int, int],
        kernel_size: int = 3,
        gather_bias: nn.Module | None = None,
        scatter_bias: nn.Module | None = None,
    ) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads, self.agents, self.scale = num_heads, agents, head_dim**-0.5
        self.gather_bias, self.scatter_bias = gather_bias, scatter_bias
        self.dwc = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `models.attention.multihead.Core`."""
        if self.dwc.kernel_size[0] > LARGEST:
            return Runs("agent attention", False, f"the kernel goes up to {LARGEST}x{LARGEST} convolutions")
        if math.prod(self.agents) > MOST_AGENTS:
            return Runs("agent attention", False, f"the kernel takes at most {MOST_AGENTS} agents")
        return Runs("agent_attention", True)

    def fused(self, qkv_BNC: Tensor, grid: Grid, num_heads: int) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D); see `models.attention.multihead.Core`."""
        gather_MAN = scatter_MNA = None
        if self.gather_bias is not None:
            gather_MAN, scatter_MNA = self.gather_bias(grid, self.agents), self.scatter_bias(grid, self.agents).mT
        return fused_agent_attention(
            qkv_BNC, grid, num_heads, self.agents, gather_bias_MAN=gather_MAN, scatter_bias_MNA=scatter_MNA,
            weight=self.dwc.weight, bias=self.dwc.bias, scale=self.scale,
        )  # fmt: skip

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        gather, scatter = self.biases(grid, kv_grid)
        return agent_heads(
            q_BMND, k_BMSD, v_BMSD, grid, kv_grid, self.agents, gather_bias=gather, scatter_bias=scatter,
            weight=self.dwc.weight, bias=self.dwc.bias,
        )  # fmt: skip

    def biases(self, grid: Grid, kv_grid: Grid) -> tuple[Tensor | None, Tensor | None]:
        """B1 (1, M, A, S) and B2 (1, M, N, A), or None twice."""
        if self.gather_bias is None:
            return None, None
        return self.gather_bias(kv_grid, self.agents)[None], self.scatter_bias(grid, self.agents).mT[None]

    def paths(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> tuple[Tensor, Tensor]:
        """What every agent gathers of the keys, (B, M, A, S), and every query reads of the agents, (B, M, N, A)."""
        agents = pooled(q_BMND, grid, self.agents)
        gather, scatter = (0 if b is None else b.to(q_BMND.dtype) for b in self.biases(grid, kv_grid))
        gathered = (agents @ k_BMSD.mT * self.scale + gather).softmax(-1)
        return gathered, (q_BMND @ agents.mT * self.scale + scatter).softmax(-1)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S) on the values, without the convolution; every row sums to one."""
        gathered, read = self.paths(q_BMND, k_BMSD, grid, kv_grid)
        return read @ gathered
