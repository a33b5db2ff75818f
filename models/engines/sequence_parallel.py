"""One map over several processes: each has some of its rows; what attention has summed over them is added up.

Source: LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid, Sun et al., 2025, arXiv:2502.07563,
section 3 without masking: one all-reduce of the state, M·D·(D + 1) numbers per image and layer, and one of its
gradient, whatever the number of tokens. Every process reads the same images and computes the patches of all of them;
from there on a process has its rows alone. The mean over tokens is one more all-reduce.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head.
"""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Grid
from models.attention.contract.layout import Layout
from models.attention.cores.galerkin import GalerkinCore, HeadNorm
from models.attention.cores.hedgehog import Features, HedgehogCore
from models.attention.cores.linear import LinearCore
from models.attention.cores.stateful import State, StateCore
from models.attention.multihead import MultiHead
from models.backbones.vit import ViT
from models.engines.distributed import Distributed
from models.layers.block import Block, Stage
from models.layers.processes import all_reduce

# what computes every token by itself, or holds such modules; of a state core its own parts
PER_TOKEN = (
    *(
        Block,
        Stage,
        nn.ModuleList,
        nn.Linear,
        nn.LayerNorm,
        nn.GELU,
        nn.Identity,
        nn.Dropout,
        Mlp,
        DropPath,
        LayerScale,
    ),
    *(Features, HeadNorm),
)
STATEFUL = (LinearCore, HedgehogCore, GalerkinCore)
INSTEAD = "leave trainer=sequence_parallel out, or choose model=vit_... model.class_token=false attention=linear"


class SequenceParallel(Distributed):
    """DDP whose processes read the same images: what it averages are gradients of parts of a map, not of a batch."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}


def share_tokens(strategy: object, task: nn.Module, processes: int) -> list[str]:
    """Lets the model of `task` compute its rows of every map, where that is the strategy; a line on it.

    Raises:
        UserError: something in the model or the task needs all tokens in one place.
    """
    if not isinstance(strategy, SequenceParallel):
        return []
    if getattr(task, "token_head", None) is not None:
        raise _refusal("label maps (data.token_labels) are compared with all tokens", "leave them out")
    if getattr(task, "compiled", False):
        raise _refusal("a compiled model has no place for what processes tell each other", "leave task.compile out")
    model = task.model
    check(model, processes)
    model.stem.register_forward_hook(_own_rows)
    for module in model.modules():
        module.__class__ = SHARED.get(type(module), type(module))
    model.head.register_forward_pre_hook(_mean)
    return [f"the tokens of every map are spread over {processes} processes, which read the same images"]


def check(model: nn.Module, processes: int) -> None:
    """Refuses what is more than tokens by themselves and states.

    Raises:
        UserError: the first such module by its name.
    """
    if type(model) is not ViT:
        raise _refusal(f"the backbone must be a ViT, got {type(model).__name__}")
    if model.grids[0].prefix:
        raise _refusal("a class token is of no rows of the map, got model.class_token=true")
    if (rows := model.grids[0].height) % processes:
        raise _uneven(rows, processes)
    for name in ("pooling", "head_norm", "reducers", "wrapper"):
        if getattr(model, name) is not None:
            raise _refusal(f"{type(getattr(model, name)).__name__} ({name}) looks at all tokens")
    for part in ("stages", "norm"):
        for name, module in getattr(model, part).named_modules(prefix=part):
            _check_module(name, module)


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, MultiHead):
        parts = (module.pre, module.transform, module.value, module.shift_mask, module.reduce)
        if type(module.layout) is not Layout or any(part is not None for part in parts):
            raise _refusal(f"{name} must be attention on the whole map without other parts")
        if type(module.core) not in STATEFUL or not module.core.ignores_grid:
            raise _refusal(f"{name}.core must have a state, got {type(module.core).__name__}")
    elif not isinstance(module, StateCore) and type(module) not in PER_TOKEN:
        raise _refusal(f"{name} must compute every token by itself, got {type(module).__name__}")


def _uneven(rows: int, processes: int) -> UserError:
    what = f"{processes} processes cannot share the {rows} rows of the map evenly"
    return _refusal(what, "set trainer.devices to a divisor, or another image_size")


def _refusal(what: str, instead: str = INSTEAD) -> UserError:
    return UserError(f"trainer: sequence_parallel: {what}; {instead}")


def _spread() -> int:
    """Over how many processes maps are spread now: one before they have met, as while a model is looked at."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _own_rows(stem: nn.Module, given: tuple, tokens: tuple[Tensor, Grid]) -> tuple[Tensor, Grid]:
    """The rows of this process, in order of the ranks."""
    x_BNC, grid = tokens
    if (processes := _spread()) == 1:
        return tokens
    if grid.height % processes:
        raise _uneven(grid.height, processes)
    rows = grid.height // processes
    first = dist.get_rank() * rows * grid.width
    return x_BNC[:, first : first + rows * grid.width], grid._replace(height=rows)


def _mean(head: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """The mean over all tokens, from those over the equal parts."""
    processes = _spread()
    return given if processes == 1 else (all_reduce(given[0].contiguous()) / processes,)


class _Shared:
    """A core with a state that all processes add to."""

    asks_others = True  # see models.callbacks.bad_steps

    def summed(self, k_BMSD: Tensor, v_BMSD: Tensor, kv_grid: Grid) -> tuple[State, int]:
        state, keys = super().summed(k_BMSD, v_BMSD, kv_grid)
        if (processes := _spread()) == 1:
            return state, keys
        sizes, shapes = [part.numel() for part in state], [part.shape for part in state]
        together = all_reduce(torch.cat([part.flatten() for part in state]))
        parts = [flat.view(shape) for flat, shape in zip(together.split(sizes), shapes, strict=True)]
        return tuple(parts), keys * processes


# their class is all that changes, so that names of parameters stay
SHARED = {kind: type(f"Shared{kind.__name__}", (_Shared, kind), {}) for kind in STATEFUL}
