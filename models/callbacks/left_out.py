"""A step that is left out: what a pass and an optimizer change besides weights that have a gradient is put back."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Kept:
    """The buffers of a module (running statistics, counters of routers) and the numbers of an optimizer's groups.

    Copies only what was changed since the last time, by torch's own count of changes; running statistics always, whose
    changes torch does not count.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers: list[Tensor] = [buffer for buffer in module.buffers() if not buffer.is_inference()]
        self._copies = [buffer.detach().clone() for buffer in self._buffers]
        self._versions = [buffer._version for buffer in self._buffers]
        norms = [norm for norm in module.modules() if isinstance(norm, _NormBase)]
        running = {id(buffer) for norm in norms for buffer in norm.buffers()}
        self._uncounted = [id(buffer) in running for buffer in self._buffers]
        self._groups: list[dict] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Before the first pass of a step."""
        changed = self._changed()
        if changed:
            torch._foreach_copy_([self._copies[i] for i in changed], [self._buffers[i] for i in changed])
            self._note(changed)

    @torch.no_grad()
    def put_back(self) -> None:
        """The buffers, as they were before the step."""
        changed = self._changed()
        if changed:
            torch._foreach_copy_([self._buffers[i] for i in changed], [self._copies[i] for i in changed])
            self._note(changed)

    def leave_out(self, optimizer: torch.optim.Optimizer) -> None:
        """Without gradients an optimizer changes nothing but counters of its groups, which are noted."""
        self.put_back()
        self._groups = [_numbers(group) for group in optimizer.param_groups]
        optimizer.zero_grad(set_to_none=True)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts these counters back where the last step was left out; the rate is the schedule's."""
        for group, numbers in zip(optimizer.param_groups, self._groups, strict=False):
            group.update(numbers)
        self._groups = []

    def _changed(self) -> list[int]:
        known = zip(self._buffers, self._versions, self._uncounted, strict=True)
        return [place for place, (buffer, version, always) in enumerate(known) if always or buffer._version != version]

    def _note(self, places: list[int]) -> None:
        for place in places:
            self._versions[place] = self._buffers[place]._version


def _numbers(group: dict) -> dict:
    """What a group of an optimizer holds besides its weights and the rate."""
    kept = {key: value for key, value in group.items() if key not in ("params", "lr")}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in kept.items()}


def local(tensor: Tensor) -> Tensor:
    """Of a tensor that is spread over processes the part of this one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
