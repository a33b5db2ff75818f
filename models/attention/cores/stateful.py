"""Cores that see keys and values only through sums over them: one state per head, whatever the number of tokens.

Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head.
"""

from abc import abstractmethod

from torch import Tensor

from kernels.precision import full_precision
from models.attention.contract import Grid
from models.attention.multihead import Core

State = tuple[Tensor, ...]


class StateCore(Core):
    """A core whose `state` is a sum over keys, so that parts of a map can be summed where they are.

    `models.engines.sequence_parallel` spreads a map over processes, which then add up their states. It is computed in
    float32 at least.
    """

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            q = self.queried(q_BMND, grid)
            state, keys = self.summed(k_BMSD, v_BMSD, kv_grid)
            o_BMND = self.read(q, state, keys)
        return o_BMND.to(v_BMSD.dtype)

    def summed(self, k_BMSD: Tensor, v_BMSD: Tensor, kv_grid: Grid) -> tuple[State, int]:
        """The state of all keys, and their number."""
        return self.state(k_BMSD, v_BMSD, kv_grid), k_BMSD.shape[2]

    @abstractmethod
    def queried(self, q_BMND: Tensor, grid: Grid) -> Tensor:
        """What reads the state."""

    @abstractmethod
    def state(self, k_BMSD: Tensor, v_BMSD: Tensor, kv_grid: Grid) -> State:
        """Sums over keys: of keys times values, and of what the weights are divided by."""

    @abstractmethod
    def read(self, q_BMND: Tensor, state: State, keys: int) -> Tensor:
        """The heads, from what `queried` and `summed` give."""
