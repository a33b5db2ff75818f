"""The learned biases of agent attention, for any map and any grid of agents.

Source: Agent Attention, Han et al., ECCV 2024, arXiv:2312.08874, section 3.3; on another map or agent grid than trained
they are interpolated as in its authors' code for detection.
Shapes: M = heads, A = agents, N = prefix + H·W tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Grid
from models.layers.resizable import Resizable
from models.layers.tokens import square_side


class AgentBias(Resizable, nn.Module):
    """A learned number per head, agent and token: coarse table + row + column; a number of its own per prefix token.

    The tables are kept for the map and the agents of training and interpolated to those of the forward pass. In the
    authors' code: `an_bias`, `ah_bias`, `aw_bias`, `ac_bias` for B1, `na_bias`, `ha_bias`, `wa_bias`, `ca_bias` for B2.

    Args:
        num_heads: M.
        agents: height and width of the agent grid in training.
        grid: the map in training.
        size: side of the coarse table.
    """

    def __init__(self, num_heads: int, agents: tuple[int, int], grid: Grid, size: int = 7) -> None:
        super().__init__()
        self.agents = agents
        shape = num_heads, agents[0] * agents[1]
        self.block = nn.Parameter(torch.empty(*shape, size, size))
        self.row = nn.Parameter(torch.empty(*shape, grid.height))
        self.column = nn.Parameter(torch.empty(*shape, grid.width))
        self.prefix = nn.Parameter(torch.empty(*shape, grid.prefix)) if grid.prefix else None
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, grid: Grid, agents: tuple[int, int]) -> Tensor:
        """(M, A, N) for this map and these agents, prefix tokens first."""
        block_MAHW = F.interpolate(self._to_agents(self.block, agents), size=grid[:2], mode="bilinear")
        row_MAH = _stretched(self._to_agents(self.row, agents), grid.height)
        column_MAW = _stretched(self._to_agents(self.column, agents), grid.width)
        bias_MAN = (block_MAHW + row_MAH[..., None] + column_MAW[..., None, :]).flatten(2)
        if self.prefix is None:
            return bias_MAN
        return torch.cat([self._to_agents(self.prefix, agents), bias_MAN], dim=2)

    def _to_agents(self, table: Tensor, agents: tuple[int, int]) -> Tensor:
        """(M, agents of training, …) → (M, A, …)."""
        return _resampled(table, self.agents, agents)

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A table (M, A', …) trained for another map or another square grid of agents as the one of this module.

        Raises:
            ValueError: the table has another number of agents, and they are no square.
        """
        if value.shape[1] != math.prod(self.agents):
            side = square_side(value.shape[1], "agents")
            value = _resampled(value, (side, side), self.agents)
        return _stretched(value, getattr(self, name).shape[-1]) if name in ("row", "column") else value


def _resampled(table: Tensor, agents: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(M, A, …) → (M, A', …), bilinearly over the grid of agents."""
    if agents == new:
        return table
    flat = table.flatten(2).transpose(1, 2).unflatten(2, agents)
    return F.interpolate(flat, size=new, mode="bilinear").flatten(2).transpose(1, 2).unflatten(2, table.shape[2:])


def _stretched(table_MAL: Tensor, length: int) -> Tensor:
    return table_MAL if table_MAL.shape[-1] == length else F.interpolate(table_MAL, size=length, mode="linear")
