"""MBConv: the inverted bottleneck with squeeze-and-excitation, pre-normalised as in CoAtNet and MaxViT.

Source: MobileNetV2, Sandler et al., CVPR 2018, arXiv:1801.04381; the pre-activation form: CoAtNet, Dai et al.,
NeurIPS 2021, arXiv:2106.04803, appendix A.1; what `Form` changes: the code of MaxViT, Tu et al., ECCV 2022,
arXiv:2204.01697.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from models.layers.downsample import reduced
from models.layers.tokens import to_map, to_tokens


class Form(NamedTuple):
    """In what the MBConv of a family may differ; the defaults are CoAtNet's.

    average: pool by the mean where the map is halved, of what lies inside the map; else by the maximum.
    act, squeeze_act: make the activation behind the two inner norms, and that inside the squeeze.
    norm_eps, norm_momentum: of the batch norms.
    same: pad as TensorFlow does, see `SameConv2d`.
    """

    average: bool = False
    act: Callable[[], nn.Module] = nn.GELU
    squeeze_act: Callable[..., nn.Module] = nn.GELU
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    same: bool = False

    def norm(self, dim: int) -> nn.BatchNorm2d:
        """A batch norm of it."""
        return nn.BatchNorm2d(dim, eps=self.norm_eps, momentum=self.norm_momentum)


COATNET = Form()


class SameConv2d(nn.Conv2d):
    """A 3×3 convolution with stride 2 and the zeros of TensorFlow's `SAME`: at even sizes at the end alone."""

    def __init__(self, dim: int, out_dim: int, **options: int | bool) -> None:
        super().__init__(dim, out_dim, 3, stride=2, **options)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        return super().forward(F.pad(x_BCHW, (width % 2, 1, height % 2, 1)))


class MBConv(nn.Module):
    """shortcut(x) + project(SE(depth-wise(expand(BN(x))))), on maps (B, C, H, W); GELU after both inner norms.

    The bottleneck has four times the output channels, the squeeze a quarter of the output channels. With
    `stride` 2 the depth-wise convolution halves the map and the shortcut is pooling, then a 1×1 convolution.
    CoAtNet's paper puts the stride on the first 1×1 convolution, which would drop three pixels of four unseen.
    """

    def __init__(
        self, dim: int, out_dim: int, *, stride: int = 1, drop_path: float = 0.0, form: Form = COATNET
    ) -> None:
        super().__init__()
        hidden = 4 * out_dim
        self.stride, self.average = stride, form.average
        depthwise = {"groups": hidden, "bias": False}
        spatial = (
            SameConv2d(hidden, hidden, **depthwise)
            if form.same and stride == 2
            else nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, **depthwise)
        )
        self.body = nn.Sequential(
            form.norm(dim),
            nn.Conv2d(dim, hidden, 1, bias=False),
            form.norm(hidden),
            form.act(),
            spatial,
            form.norm(hidden),
            form.act(),
            SqueezeExcite(hidden, rd_channels=max(out_dim // 4, 1), act_layer=form.squeeze_act),
            nn.Conv2d(hidden, out_dim, 1),
        )
        self.shortcut = nn.Identity() if dim == out_dim else nn.Conv2d(dim, out_dim, 1)
        self.drop_path = DropPath(drop_path)
        init_convolutions(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pool = partial(F.avg_pool2d, count_include_pad=False) if self.average else F.max_pool2d
        kept = pool(x_BCHW, self.stride, ceil_mode=True) if self.stride > 1 else x_BCHW
        return self.shortcut(kept) + self.drop_path(self.body(x_BCHW))


class MBConvBlock(nn.Module):
    """An `MBConv` as a block of a stage: `(x_BNC, grid) -> (x_BNC, {})`."""

    def __init__(self, dim: int, drop_path: float = 0.0, form: Form = COATNET) -> None:
        super().__init__()
        self.conv = MBConv(dim, dim, drop_path=drop_path, form=form)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        return to_tokens(self.conv(to_map(x_BNC, grid))), {}


class MBConvDownsample(nn.Module):
    """The first `MBConv` of a stage: `(x_BNC, grid) -> (x_BNC, grid)` with other channels and a smaller map."""

    def __init__(
        self, dim: int, out_dim: int, *, stride: int = 2, drop_path: float = 0.0, form: Form = COATNET
    ) -> None:
        super().__init__()
        self.conv = MBConv(dim, out_dim, stride=stride, drop_path=drop_path, form=form)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x = to_tokens(self.conv(to_map(x_BNC, grid)))
        return x, reduced(grid, self.conv.stride)


def init_convolutions(module: nn.Module) -> None:
    """Normal weights with variance 2 / (fan out / groups), as in EfficientNet, and zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=(2.0 / fan_out) ** 0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def init_pointwise(linear: nn.Linear) -> None:
    """The same for a Linear, which is a 1×1 convolution of tokens."""
    nn.init.normal_(linear.weight, std=(2.0 / linear.out_features) ** 0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
