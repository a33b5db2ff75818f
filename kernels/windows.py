"""Windows of a token map: split, merge, and the mask of shifted windows.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, section 3.2.
Shapes: B = batch, N = H·W tokens, C = channels, R = windows per image, T = tokens in a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(size: int, window: int) -> int:
    """The smallest multiple of `window` that is at least `size`."""
    return -(-size // window) * window


def split(x_BNC: Tensor, height: int, width: int, window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """(B, H·W, C) → (B·R, T, C): the map is zero-padded at bottom and right to whole windows, then rolled by -shift."""
    B, _, C = x_BNC.shape
    (h, w), (H, W) = window, (padded(height, window[0]), padded(width, window[1]))
    x = x_BNC.unflatten(1, (height, width))
    if (height, width) != (H, W):
        x = F.pad(x, (0, 0, 0, W - width, 0, H - height))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    return x.view(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(B * (H // h) * (W // w), h * w, C)


def merge(x_WTC: Tensor, height: int, width: int, window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """(B·R, T, C) → (B, H·W, C): the inverse of `split`, padding dropped."""
    (h, w), (H, W) = window, (padded(height, window[0]), padded(width, window[1]))
    B, C = x_WTC.shape[0] // (H // h * (W // w)), x_WTC.shape[-1]
    x = x_WTC.reshape(B, H // h, W // w, h, w, C).transpose(2, 3).reshape(B, H, W, C)
    if any(shift):
        x = x.roll(shift, dims=(1, 2))
    return x[:, :height, :width].reshape(B, height * width, C)


def shift_mask(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Which pairs of a shifted window were neighbours before the roll: bool (R, T, T), or None without a shift.

    Made anew for every call: kept ones would be of the mode (export, inference) in which they were made.
    """
    if not any(shift):
        return None
    sizes = [padded(height, window[0]), padded(width, window[1])]
    rows, columns = (_bands(*along, device) for along in zip(sizes, window, shift, strict=True))
    region_RT = split((rows[:, None] * 3 + columns).view(1, -1, 1), *sizes, window).squeeze(-1)
    return region_RT[:, :, None] == region_RT[:, None, :]


def _bands(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(size,): 0, 1 or 2 for the cells before the last window, and within it for those before and behind the roll."""
    cells = torch.arange(size, device=device)
    return (cells >= size - window).int() + (cells >= size - shift).int()
