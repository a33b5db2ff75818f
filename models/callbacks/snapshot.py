"""Copies of the tensors of a checkpoint in the memory of the host: training goes on while they are written."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """Holds the copies; the next ones take their place, so that nothing is allocated from one to the next.

    Copies of tensors on a GPU are in pinned memory, where all of them travel at once.
    """

    def __init__(self) -> None:
        self.content: dict[str, dict[str, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """The size of all copies."""
        return sum(copy.numel() * copy.element_size() for file in self.content.values() for copy in file.values())

    def take(self, tensors: Mapping[str, Mapping[str, Tensor]], compare: bool = False) -> bool:
        """Copies tensors, named twice: by the file that they are for, and in it.

        Args:
            tensors: dense, on any device.
            compare: leave everything as it is where every bit is that of the copies of before.

        Returns:
            Whether anything was copied.
        """
        if compare and self._same(tensors):
            return False
        before = self.content
        self.content = {
            file: {name: _copied(value, before.get(file, {}).get(name)) for name, value in content.items()}
            for file, content in tensors.items()
        }
        for device in {value.device for content in tensors.values() for value in content.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return True

    def _same(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
        names = {file: list(content) for file, content in tensors.items()}
        return names == {file: list(content) for file, content in self.content.items()} and all(
            _equal(value, self.content[file][name])
            for file, content in tensors.items()
            for name, value in content.items()
        )


def _copied(value: Tensor, old: Tensor | None) -> Tensor:
    if old is None or old.shape != value.shape or old.dtype != value.dtype:
        old = _room_for(value)
    return old.copy_(value, non_blocking=True)


def _room_for(value: Tensor) -> Tensor:
    if value.is_cuda:
        try:
            return torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        except RuntimeError:  # there is a limit to how much may be pinned
            pass
    return torch.empty(value.shape, dtype=value.dtype)


def _equal(value: Tensor, copy: Tensor) -> bool:
    """Bit for bit: zeros of both signs differ, a NaN equals itself."""
    if value.shape != copy.shape or value.dtype != copy.dtype:
        return False
    value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    copy = copy.reshape(-1).view(torch.uint8)
    if value.numel() % 8 == 0 and value.storage_offset() % 8 == 0:
        value, copy = value.view(torch.int64), copy.view(torch.int64)  # which is compared eight times as fast
    return not bool((value != copy).any())
