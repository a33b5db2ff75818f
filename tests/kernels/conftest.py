"""Buffers full of NaN, so that what a kernel leaves unwritten, or reads before it is written, shows."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Inside the test, new buffers hold NaN, or a number that is no index."""
    empty = torch.empty

    def poison(*size, **options):
        buffer = empty(*size, **options)
        return buffer.fill_(float("nan") if buffer.is_floating_point() else 97)

    def like(tensor, size=None, **options):
        return poison(
            tensor.shape if size is None else size, **{"dtype": tensor.dtype, "device": tensor.device, **options}
        )

    monkeypatch.setattr(torch, "empty", poison)
    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(torch.Tensor, "new_empty", like)
