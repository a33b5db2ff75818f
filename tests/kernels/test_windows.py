"""Windows: split and merge are inverse, padding is dropped, the shift mask keeps strangers apart."""

import pytest
import torch

from kernels.windows import merge, padded, shift_mask, split

CASES = [((4, 6), (2, 3), (0, 0)), ((5, 7), (2, 3), (0, 0)), ((5, 7), (2, 3), (1, 1)), ((6, 4), (3, 4), (1, 0))]


@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_merge_undoes_split(size, window, shift):
    x = torch.randn(2, size[0] * size[1], 3)
    parts = split(x, *size, window, shift)
    assert parts.shape == (
        2 * (padded(size[0], window[0]) // window[0]) * (padded(size[1], window[1]) // window[1]),
        window[0] * window[1],
        3,
    )
    assert torch.equal(merge(parts, *size, window, shift), x)


def test_a_window_holds_neighbours_in_row_major_order():
    x = torch.arange(24.0).view(1, 24, 1)  # a map of 4 × 6
    assert split(x, 4, 6, (2, 3))[1].flatten().tolist() == [3, 4, 5, 9, 10, 11]
    assert split(x, 4, 6, (2, 3), (1, 1))[0].flatten().tolist() == [7, 8, 9, 13, 14, 15]


def test_no_mask_without_a_shift():
    assert shift_mask(4, 6, (2, 3), (0, 0), torch.device("cpu")) is None


@pytest.mark.parametrize(("size", "window", "shift"), [((4, 6), (2, 3), (1, 1)), ((5, 7), (2, 3), (1, 1))])
def test_the_mask_closes_pairs_that_the_roll_brought_together(size, window, shift):
    """Tokens of one window may meet exactly when the roll wrapped both or neither, in rows and in columns."""
    height, width = padded(size[0], window[0]), padded(size[1], window[1])
    rows = torch.arange(height).repeat_interleave(width).view(1, -1, 1).float()
    columns = torch.arange(width).repeat(height).view(1, -1, 1).float()
    row, column = (split(v, height, width, window, shift).squeeze(-1) for v in (rows, columns))
    wrapped = (row < shift[0]) * 2 + (column < shift[1])
    same = wrapped[:, :, None] == wrapped[:, None, :]
    assert not same.all()
    assert torch.equal(shift_mask(*size, window, shift, torch.device("cpu")), same)
