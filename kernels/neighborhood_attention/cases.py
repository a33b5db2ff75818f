"""Inputs, shapes, least work and baselines of neighbourhood attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.neighborhood_attention import WHO, neighborhood_attention
from kernels.operation import Cost, Operation, in_pytorch


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    kernel: tuple[int, int] = (7, 7),
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    head_dim: int = 32,
    rpb: bool = True,
    strided: bool = False,
) -> dict:
    """Keyword arguments of `neighborhood_attention`; `strided` takes qkv out of a wider tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    width = 3 * heads * head_dim

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    qkv = random(batch, grid[0] * grid[1], width + 16 * strided, dtype=dtype)[..., 16 * strided :]
    table = random(heads, *(2 * side - 1 for side in kernel)).requires_grad_() if rpb else None
    return {
        "qkv_BNC": qkv.detach().requires_grad_(),
        "grid": grid,
        "num_heads": heads,
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "rpb": table,
    }


def cost(
    itemsize: int,
    *,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    kernel: tuple[int, int] = (7, 7),
    head_dim: int = 32,
    **_,
) -> Cost:
    """Forward reads q, k, v and writes o; backward reads q, k, v and the gradient and writes three."""
    numbers = batch * grid[0] * grid[1] * heads * head_dim
    pairs = numbers * kernel[0] * kernel[1]
    return Cost(4 * numbers * itemsize, 7 * numbers * itemsize, 4 * pairs, 10 * pairs)


CHECKS = {
    "2x3 on 3x24": {"batch": 1, "grid": (3, 24), "heads": 1, "kernel": (2, 3), "head_dim": 16},
    "3x2 on 7x5, dilated": {
        **{"batch": 1, "grid": (7, 5), "heads": 2, "kernel": (3, 2), "head_dim": 24},
        **{"dilation": (2, 1), "strided": True},
    },
    "3x4 on 4x40, strided": {
        **{"batch": 1, "grid": (4, 40), "heads": 1, "kernel": (3, 4), "head_dim": 16, "stride": (1, 2), "rpb": False},
    },
    "one token": {"batch": 1, "grid": (1, 1), "heads": 1, "kernel": (1, 1), "head_dim": 48},
    "4x4 windows of 8x12": {
        **{"batch": 1, "grid": (8, 12), "heads": 2, "kernel": (4, 4), "stride": (4, 4), "head_dim": 16, "rpb": False},
    },
    "4x5 on 21x11, strided and dilated": {
        **{"batch": 1, "grid": (21, 11), "heads": 1, "kernel": (4, 5), "head_dim": 16},
        **{"stride": (2, 3), "dilation": (2, 1)},
    },
    "3x3 on 7x10, by 3": {
        **{"batch": 2, "grid": (7, 10), "heads": 1, "kernel": (3, 3), "head_dim": 40},
        **{"dilation": (2, 3), "stride": (3, 1)},
    },
    "6x6 on 13x10, ragged": {
        **{"batch": 1, "grid": (13, 10), "heads": 1, "kernel": (6, 6), "stride": (3, 3), "head_dim": 32},
    },
    "1x9 on 3x30": {"batch": 1, "grid": (3, 30), "heads": 1, "kernel": (1, 9), "head_dim": 16},
    "7x7 on 9x13": {"batch": 1, "grid": (9, 13), "heads": 1},
    "5x5 on 9x9": {"batch": 1, "grid": (9, 9), "heads": 1, "kernel": (5, 5), "head_dim": 72},
}


def _stages(batch: int, side: int, heads: int, dilations: tuple[int, ...], **options) -> dict:
    """The four stages of a pyramid: half the side, twice the heads."""
    return {
        stage: {
            **{"batch": batch, "grid": (side >> stage - 1,) * 2, "heads": heads << stage - 1},
            **{"dilation": (step, step), **options},
        }
        for stage, step in enumerate(dilations, 1)
    }


NAT, DINAT = _stages(128, 56, 2, (1, 1, 1, 1)), _stages(128, 56, 2, (8, 4, 2, 1))
NAT_512 = _stages(16, 128, 2, (1, 1, 1, 1))
STAGES = {
    **{f"7x7 224 px stage {stage} (NAT-Mini)": shape for stage, shape in NAT.items()},
    **{f"7x7 dilated 224 px stage {stage} (DiNAT-Mini)": DINAT[stage] for stage in (1, 2, 3)},
    **{f"7x7 512 px stage {stage}": NAT_512[stage] for stage in (1, 3)},
    "7x7 dilated 4, 224 px stage 1": {**NAT[1], "dilation": (4, 4)},
    "7x7 without bias, 224 px stage 1": {**NAT[1], "rpb": False},
    "8x8 stride 4, 512 px stage 1": {**NAT_512[1], "kernel": (8, 8), "stride": (4, 4), "rpb": False},
    "7x7 224 px stage 3, one image": {**NAT[3], "batch": 1},
}


def _dense(qkv_BNC: Tensor, grid: tuple[int, int], num_heads: int, *_, **__) -> Tensor:
    """Attention over the whole map."""
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPERATION = Operation(
    name=WHO,
    run=neighborhood_attention,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    # the authors' kernels are not PyTorch's, and have no eager form
    baselines={"pytorch": in_pytorch(neighborhood_attention), "sdpa": _dense},
)
