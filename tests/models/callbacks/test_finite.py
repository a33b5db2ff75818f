"""Every tensor of a checkpoint is looked at, whatever its kind."""

import torch

from models.callbacks.finite import check_finite


def test_nan_and_infinity_are_named_in_their_order():
    nan, inf = torch.tensor([1.0, float("nan")]), torch.tensor(float("-inf")).bfloat16()
    tensors = {
        **{"z": nan, "good": torch.ones(3), "whole": torch.arange(3), "truth": torch.tensor(True)},
        **{"empty": torch.zeros(0), "a": inf, "imaginary": torch.tensor(complex(0, float("inf")))},
        "elsewhere": torch.empty(2, device="meta"),
    }
    assert check_finite(tensors) == ["z", "a", "imaginary"]
    assert check_finite({"w": torch.nn.Parameter(nan)}) == ["w"]
    assert check_finite({}) == []
