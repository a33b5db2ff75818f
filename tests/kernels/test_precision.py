"""The context without autocast."""

import torch

from kernels.precision import full_precision


def test_autocast_is_off_inside_and_on_again_after() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_devices_without_autocast_need_nothing() -> None:
    x = torch.ones(2, 2, device="meta")
    with full_precision(x.device):
        assert (x @ x).shape == (2, 2)
