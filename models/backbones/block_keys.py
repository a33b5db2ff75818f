"""The keys of `model` that say what blocks are made of, whatever the family: activation, norm, wiring, downsample.

They are carried out on a built model, before its weights are initialised otherwise or reparametrised.
"""

from collections.abc import Iterator
from typing import Any

from timm.layers import Mlp, SwiGLU
from torch import nn

from conf.errors import UserError
from models.layers.activation import GATED, made, named, swiglu
from models.layers.adaptive_block import AdaptiveBlock
from models.layers.batch_normed import LocalBlock
from models.layers.block import Block
from models.layers.class_attention import ClassBlock
from models.layers.conv_encoder import ConvEncoder
from models.layers.convnext_block import ConvNeXtBlock
from models.layers.cross_block import CrossBlock
from models.layers.deformable import DeformableDownsample
from models.layers.downsample import ConvDownsample, PatchMerging, PoolDownsample
from models.layers.mlp_block import MlpBlock
from models.layers.norm import NORMS, TokenBatchNorm, as_norm
from models.layers.overlock_block import ContextBlock, ReparamBlock
from models.layers.plain_block import PlainBlock

BLOCKS = (Block, ConvNeXtBlock, AdaptiveBlock, ClassBlock, LocalBlock, ConvEncoder, MlpBlock, CrossBlock)
BLOCKS += (ReparamBlock, ContextBlock, PlainBlock)
WIRINGS = ("sequential", "parallel", "rk4")
DOWNSAMPLES = ("deformable",)
OF_BLOCKS = ("norm1", "norm2", "norm")  # the names of norms in blocks and stages


def change_blocks(
    model: nn.Module, *, activation: Any, norm: str | None, wiring: str | None, downsample: str | None
) -> None:
    """What the keys of `model` ask for; None leaves it as it is."""
    if downsample is not None:
        set_downsample(model, downsample)
    if norm is not None:
        set_norm(model, norm)
    if activation is not None:
        set_activation(model, activation)
    if wiring is not None:
        set_wiring(model, wiring)


def set_activation(model: nn.Module, setting: Any) -> None:
    """`setting` in the MLP of every block; `swiglu` is an MLP of its own.

    Raises:
        ValueError: an unknown activation, blocks without MLP, or MLPs that cannot be a SwiGLU.
    """
    who = type(model).__name__
    name, _ = named(who, setting)
    blocks = [block for block in _blocks(model) if block.mlp is not None]
    if not blocks:
        raise UserError(f"{who}: no block has an MLP, got activation={name}; set model.activation=null")
    for block in blocks:
        mlp = block.mlp
        if name != GATED:
            mlp.act = made(who, setting, mlp.fc2.in_features)
        elif type(mlp) is Mlp:
            block.mlp = swiglu(mlp.fc1.in_features, mlp.fc1.out_features)
        elif type(mlp) is not SwiGLU:
            raise UserError(
                f"{who}: its MLPs have a convolution or norms inside, or a gate, which a SwiGLU has not, got "
                f"activation={name}; set model.activation to gelu, relu, relu2, silu or topk"
            )


def set_norm(model: nn.Module, kind: str) -> None:
    """`kind` for the norms of blocks, that behind a stage, and that before the head; others stay.

    Raises:
        ValueError: an unknown kind, or a model without such norms.
    """
    who = type(model).__name__
    _check(who, "norm", kind, tuple(NORMS))
    found = 0
    between = (getattr(block, "mlp_position", None) for block in _blocks(model))
    for module in (*_blocks(model), *between, *model.stages, model, getattr(model, "head_norm", None)):
        for name in (*OF_BLOCKS, "head_norm"):
            norm = getattr(module, name, None)
            if type(norm) in (*NORMS.values(), TokenBatchNorm):
                setattr(module, name, as_norm(norm, kind))
                found += 1
    if not found:
        conditioned = "its norms take scale and shift from the condition and are no modules"
        why = conditioned if any(_blocks(model)) else "its norms are batch norms of maps, which belong to convolutions"
        raise UserError(f"{who}: {why}, got norm={kind}; set model.norm=null")


def set_wiring(model: nn.Module, wiring: str) -> None:
    """How the two branches of every block combine.

    Source: `parallel`: Three things everyone should know about Vision Transformers, Touvron et al., ECCV 2022,
    arXiv:2203.09795, section 3, with one branch of each kind: x + f(x), f(x) = attention(norm₁(x)) + mlp(norm₂(x)),
    which is an Euler step along dx/dt = f(x). `rk4`: the step of fourth order of the same equation, after A Neural ODE
    Interpretation of Transformer Layers, Zhong et al., 2022, arXiv:2212.06011, for which no code was published:
    x + (k₁ + 2 k₂ + 2 k₃ + k₄) / 6, k₁ = f(x), k₂ = f(x + k₁/2), k₃ = f(x + k₂/2), k₄ = f(x + k₃), with the weights of
    the block in all four. What looks into attention sees the last of them.

    Raises:
        ValueError: an unknown wiring, or blocks that have no two branches of one input, or no order for what they
            carry.
    """
    who = type(model).__name__
    _check(who, "wiring", wiring, WIRINGS)
    if wiring == "sequential":
        return
    blocks = list(_blocks(model))
    why = next(filter(None, map(_not_parallel, blocks)), "" if blocks else "it has no blocks with two branches")
    if not why and wiring == "rk4" and any(block.attn.carries for block in blocks):
        why = "its attention hands on what it carries, which four evaluations have no order for"
    if why:
        raise UserError(f"{who}: {why}, got wiring={wiring}; set model.wiring=sequential")
    for block in blocks:
        block.wiring = wiring


def set_downsample(model: nn.Module, kind: str) -> None:
    """`kind` in place of what halves the map between two stages and does nothing else.

    A convolutional stage of a CoAtNet halves it inside its first block, which stays.

    Raises:
        ValueError: an unknown kind, or a model without such modules.
    """
    who = type(model).__name__
    _check(who, "downsample", kind, DOWNSAMPLES)
    sizes = [(stage, _halves(stage.downsample)) for stage in model.stages]
    if not any(size for _, size in sizes):
        raise UserError(
            f"{who}: nothing between its stages only halves the map, got downsample={kind}; set model.downsample=null"
        )
    for stage, size in sizes:
        if size is not None:
            stage.downsample = DeformableDownsample(*size)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for stage in (*model.stages, *filter(None, [getattr(model, "class_stage", None)])):
        yield from (module for module in stage.modules() if isinstance(module, BLOCKS))


def _not_parallel(block: nn.Module) -> str:
    """Why a block cannot be wired in parallel; "" where it can."""
    if not isinstance(block, Block):
        return f"{type(block).__name__} is no block of two branches with a norm of their own"
    if block.post_norm or block.branch_norm:
        return "the norms of its blocks stand behind the branches"
    if block.mlp is None or block.mlp_position is not None:
        return "its blocks have no MLP, or a position encoding between attention and MLP"
    return ""


def _halves(module: nn.Module | None) -> tuple[int, int] | None:
    """Channels before and after a module that only halves the map; None for others."""
    if type(module) is PatchMerging:
        return module.reduction.in_features // 4, module.reduction.out_features
    if type(module) in (ConvDownsample, DeformableDownsample):
        return module.conv.in_channels, module.conv.out_channels
    if type(module) is PoolDownsample and module.stride == 2:
        return module.proj.in_features, module.proj.out_features
    return None


def _check(who: str, key: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{who}: {key} must be one of {', '.join(known)}, got {value!r}; set model.{key}")
