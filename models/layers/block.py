"""The residual block of every transformer here, and the stage that runs blocks in a row.

Shapes: B = batch, N = tokens, C = channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from conf.errors import UserError
from models.layers.downsample import reduced
from models.layers.gated import OPEN, Carry, carries, gated, given, handed
from models.layers.mlp import ConvMlp
from models.layers.position import ConvPosition


class Block(nn.Module):
    """x + mix(norm(x)), then x + mlp(norm(x)); with drop path and layer scale on both branches.

    With `post_norm` it is norm(x + mix(x)), then norm(x + mlp(x)); with `branch_norm` x + scale(norm(mix(x))), then
    x + scale(norm(mlp(x))), as in Swin V2 (arXiv:2111.09883). Where `wiring` is "parallel", it is x + f(x) with
    f(x) = mix(norm(x)) + mlp(norm(x)), where it is "rk4", a Runge–Kutta step along f: see
    `models.backbones.block_keys`. A `gate`, where one is put, weights what `gate_at` names: what comes out of the mixer
    or of the MLP, or the block's output.

    Args:
        dim: channels C.
        mixer: `(x, grid) -> Mixed`; an attention mechanism. One with `reads_stream` is also given the tokens before
            the norm, as `stream_BNC`.
        mlp_ratio: hidden channels of the MLP over C; 0 leaves the MLP out.
        drop_path: probability that a sample skips a branch in training.
        layer_scale: initial value of the learned scale of each branch; None for no scale.
        norm_eps: of both LayerNorms.
        position, mlp_position: modules `(x, grid) -> x` in front of the two branches, e.g. `ConvPosition`, or None.
        mlp_kernel: side of a depth-wise convolution inside the MLP, see `ConvMlp`; 0 for none.
        post_norm: norms after the residual sums.
        branch_norm: norms at the ends of the branches, before their scales.
        shared_norm: one norm, with the same weights, in front of both branches.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        position: nn.Module | None = None,
        mlp_position: nn.Module | None = None,
        mlp_kernel: int = 0,
        post_norm: bool = False,
        branch_norm: bool = False,
        shared_norm: bool = False,
    ) -> None:
        super().__init__()
        self.post_norm, self.branch_norm, self.mlp_kernel = post_norm, branch_norm, mlp_kernel
        self.position, self.mlp_position = position, mlp_position
        self.norm1, self.attn, self.scale1 = nn.LayerNorm(dim, eps=norm_eps), mixer, scale(dim, layer_scale)
        self.reads_stream = mixer.reads_stream
        self.mlp = None
        if mlp_ratio:
            self.norm2 = None if shared_norm else nn.LayerNorm(dim, eps=norm_eps)
            self.scale2 = scale(dim, layer_scale)
            hidden = int(dim * mlp_ratio)
            self.mlp = ConvMlp(dim, hidden, mlp_kernel) if mlp_kernel else Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)
        self.gate, self.gate_at, self.wiring = None, "mixer", "sequential"

    @property
    def carries(self) -> bool:
        """Whether it takes and returns what its parts carry from block to block."""
        return carries(self.attn, self.gate)

    def forward(self, x_BNC: Tensor, grid: tuple, carry: Carry | None = None) -> tuple:
        """Tokens and losses; given `carry`, also what is carried on."""
        if self.wiring == "rk4":
            return self._integrated(x_BNC, grid, carry)
        x, y = self._positioned(x_BNC, grid, self.position, self.norm1)
        start = x
        stream = {"stream_BNC": x} if self.reads_stream else {}
        mixed = self.attn(y, grid, **stream, **given(self.attn, carry))
        mixed, *kept = gated(self, "mixer", mixed.x, grid, mixed.losses, handed(self.attn, mixed, carry))
        x = x + self.drop_path(self.scale1(self.norm1(mixed) if self.branch_norm else mixed))
        if self.post_norm:
            x = self.norm1(x)
        if self.mlp is None:
            x = x if self.mlp_position is None else self.mlp_position(x, grid)
        else:
            parallel = self.wiring == "parallel"  # then there is neither a position nor a norm between the branches
            norm = self.norm1 if self.norm2 is None else self.norm2
            x, y = (x, norm(start)) if parallel else self._positioned(x, grid, self.mlp_position, norm)
            hidden, *kept = gated(self, "mlp", self.mlp(y, grid) if self.mlp_kernel else self.mlp(y), grid, *kept)
            x = x + self.drop_path(self.scale2(norm(hidden) if self.branch_norm else hidden))
            x = norm(x) if self.post_norm else x
        x, losses, on = gated(self, "block", x, grid, *kept)
        return (x, losses) if carry is None else (x, losses, on)

    def _integrated(self, x_BNC: Tensor, grid: tuple, carry: Carry | None) -> tuple:
        """The classical Runge–Kutta step; drop path skips all of it, and losses are weighted as slopes are."""
        x = x_BNC if self.position is None else self.position(x_BNC, grid)
        step, losses, slope = 0.0, {}, None
        for reach, weight in ((0.0, 1 / 6), (0.5, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 6)):
            slope, given_losses = self._slope(x if slope is None else x + reach * slope, grid, carry or {})
            step = step + weight * slope
            losses = {name: losses.get(name, 0.0) + weight * loss for name, loss in given_losses.items()}
        x, losses, on = gated(self, "block", x + self.drop_path(step), grid, losses, carry or {})
        return (x, losses) if carry is None else (x, losses, on)

    def _slope(self, x_BNC: Tensor, grid: tuple, carry: Carry) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both branches of the same tokens, and their losses."""
        stream = {"stream_BNC": x_BNC} if self.reads_stream else {}
        mixed = self.attn(self.norm1(x_BNC), grid, **stream, **given(self.attn, carry))
        mixed, losses, _ = gated(self, "mixer", mixed.x, grid, mixed.losses, carry)
        y = (self.norm1 if self.norm2 is None else self.norm2)(x_BNC)
        hidden = self.mlp(y, grid) if self.mlp_kernel else self.mlp(y)
        hidden, losses, _ = gated(self, "mlp", hidden, grid, losses, carry)
        return self.scale1(mixed) + self.scale2(hidden), losses

    def _positioned(self, x: Tensor, grid: tuple, position: nn.Module | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The tokens with their position, and what goes into a branch: these, or normalised first."""
        behind = self.post_norm or self.branch_norm
        if isinstance(position, ConvPosition) and type(norm) is nn.LayerNorm and not behind:
            return position.with_norm(x, grid, norm)
        x = x if position is None else position(x, grid)
        return x, (x if behind else norm(x))


class Stage(nn.Module):
    """Blocks in a row, after an optional module `(x, grid) -> (x, grid)` that changes resolution and channels.

    A block may do that too: one with a `stride` above 1 leaves a map whose sides are divided by it, rounded up.
    `gradient_checkpointing` recomputes each part in the backward pass instead of keeping its activations. What is given
    besides tokens and map goes to every block, `carry` from one to the next of those that carry. Cells that are closed
    there are zeros in front of every block, so that others learn nothing of them, whatever mixes tokens.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.ModuleList(blocks)
        self.gradient_checkpointing = False

    def forward(self, x_BNC: Tensor, grid: tuple, *given: Tensor, carry: Carry | None = None) -> tuple:
        """Tokens, their map, and the losses of each block; given `carry`, also what is carried on."""
        x, losses, on = x_BNC, [], carry or {}
        recompute = self.gradient_checkpointing and self.training
        if self.downsample is not None:
            x, grid = recomputed(self.downsample, x, grid) if recompute else self.downsample(x, grid)
        for block in self.blocks:
            named = {"carry": on} if getattr(block, "carries", False) or OPEN in on else {}
            x = without_closed(x, grid, on)
            run = partial(recomputed, block) if recompute else block
            x, loss, *carried = run(x, grid, *given, **named)
            losses.append(loss)
            if (stride := getattr(block, "stride", 1)) > 1:
                grid = reduced(grid, stride)
            on = carried[0] if carried else on
        return (x, grid, losses) if carry is None else (x, grid, losses, on)


def without_closed(x_BNC: Tensor, grid: tuple, carry: Carry) -> Tensor:
    """Zeros in cells of the map that are closed to all others; shares of being open change nothing here."""
    open_BS = carry.get(OPEN)
    if open_BS is None or open_BS.dtype != torch.bool:
        return x_BNC
    return torch.cat([x_BNC[:, : grid.prefix], x_BNC[:, grid.prefix :].masked_fill(~open_BS.unsqueeze(-1), 0)], dim=1)


def recomputed(module: nn.Module, *inputs: object, **named: object) -> tuple:
    """`module(*inputs, **named)`, whose activations are computed again in the backward pass rather than kept."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) or getattr(m, "averages", False)]
    if norms:
        return _recomputed_with_norms(module, norms, *inputs, **named)
    return checkpoint(module, *inputs, use_reentrant=False, **named)


@torch.compiler.disable  # Dynamo does not know context_fn; such a module runs uncompiled
def _recomputed_with_norms(module: nn.Module, norms: list[nn.Module], *inputs: object, **named: object) -> tuple:
    def contexts() -> tuple:
        return nullcontext(), frozen_statistics(norms)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts, **named)


@contextmanager
def frozen_statistics(norms: list[nn.Module]) -> Iterator[None]:
    """Running averages of batch norms stand still inside: a second forward of the same batch must not count twice.

    So do those of other modules with `averages`, `momentum` and `num_batches_tracked`.
    """
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        for norm in norms:
            # not track_running_stats=False: autograd then saves other tensors than in the first forward
            norm.momentum = 0.0
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def scale(dim: int, initial: float | None) -> nn.Module:
    """A learned scale per channel that starts at `initial`, or nothing for None."""
    return nn.Identity() if initial is None else LayerScale(dim, init_values=initial)


def drop_path_rates(rate: float, depth: int, *, constant: bool = False) -> list[float]:
    """From 0 at the first block to `rate` at the last, linearly; or `constant`, the same for all."""
    if isinstance(rate, str) or not 0 <= rate < 1:
        raise UserError(f"drop_path: must be a probability in [0, 1), got {rate!r}; set model.drop_path")
    return [rate] * depth if constant else [rate * i / max(depth - 1, 1) for i in range(depth)]
