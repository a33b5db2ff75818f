"""Which path an operation takes, and the checks that all of them share.

The fused path takes CUDA tensors, and any tensor when the process was started with TRITON_INTERPRET=1. Everything else
is computed by the reference. Nothing falls back: an input that the fused path cannot take is refused with its limit.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 128  # channels per head that fit the registers of a program
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_forced = False


@contextmanager
def reference() -> Iterator[None]:
    """Every operation called inside computes its reference, whatever backend it is asked for."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def is_fused(who: str, backend: str, tensor: Tensor) -> bool:
    """Whether an operation on this tensor takes the fused path.

    Raises:
        ValueError: an unknown backend, backend "triton" where no kernel can run, or torch.func where one would.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{who}: backend must be {', '.join(BACKENDS)}, got {backend}; choose one of them")
    if _forced or backend == "torch":
        return False
    if tensor.device.type == "cuda" or INTERPRETED:
        if is_transformed(tensor):
            raise ValueError(
                f"{who}: the kernels take plain tensors, got one inside of torch.func (vmap, grad, jvp); "
                "use backend=torch"
            )
        return True
    if backend == "triton":
        raise ValueError(
            f"{who}: backend=triton needs CUDA tensors, got {tensor.device.type}; use backend=auto, which computes the "
            "same in PyTorch there, or start with TRITON_INTERPRET=1 to interpret the kernels"
        )
    return False


def is_transformed(tensor: Tensor) -> bool:
    """Whether it is what torch.func makes of a tensor; what is compiled sees through that."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_tensors(who: str, activations: dict[str, Tensor], others: dict[str, Tensor | None] | None = None) -> None:
    """Refuses what no kernel takes: dtypes other than float32, float16, bfloat16, mixed dtypes or devices, 2³¹ rows.

    Args:
        who: name of the operation.
        activations: tensors that must agree in dtype and device, by the name the caller knows.
        others: parameters and tables; any floating dtype, the same device. None entries are skipped.
    """
    named = {**activations, **{name: t for name, t in (others or {}).items() if t is not None}}
    devices = {name: t.device for name, t in named.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{who}: all tensors must be on one device, got {where}; move them to one")
    dtypes = {name: t.dtype for name, t in activations.items()}
    if len(set(dtypes.values())) > 1:
        what = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{who}: activations must have one dtype, got {what}; cast them to one")
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ValueError(
                f"{who}: the kernels take float32, float16 and bfloat16, "
                f"got {name} in {str(dtype).removeprefix('torch.')}; cast it, or use backend=torch"
            )
    for name, t in named.items():
        # a program finds its image with 64-bit arithmetic, and its place in the image with 32-bit arithmetic
        if t.dim() and t.shape[0] and t.numel() // t.shape[0] >= 2**31:
            raise ValueError(
                f"{who}: one image of {name} must have fewer than 2^31 elements, got {t.numel() // t.shape[0]}; "
                "use backend=torch"
            )


def check_head_dim(who: str, head_dim: int) -> None:
    """Refuses heads that are wider than the registers of a program allow."""
    if head_dim > WIDEST_HEAD:
        raise ValueError(
            f"{who}: the kernels take at most {WIDEST_HEAD} channels per head, got {head_dim}; "
            "use more heads, or backend=torch"
        )


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The float32 tensors among them in autocast's dtype where autocast is on: kernels are opaque to it."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in tensors)


def check_neighbors(who: str, qkv: Tensor, grid: tuple[int, ...], heads: int) -> None:
    """That a packed projection (B, N, 3C) is that of a map whose tokens see their neighbours.

    Raises:
        ValueError: prefix tokens, another map, or another width than that of the heads.
    """
    if len(grid) > 2 and grid[2]:
        raise ValueError(
            f"{who}: a neighbourhood has no prefix tokens, got {grid[2]}; pass the tokens of the map alone"
        )
    if qkv.dim() != 3 or qkv.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{who}: qkv must be (B, {grid[0]}*{grid[1]}, 3C), got {tuple(qkv.shape)}; pass the grid of this map"
        )
    if heads < 1 or not qkv.shape[2] or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"{who}: qkv must be 3 x heads x head width wide, got {qkv.shape[2]} for {heads} heads; project to 3C"
        )
