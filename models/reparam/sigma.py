"""σReparam: every weight divided by its spectral norm and multiplied by one learned number.

Source: Stabilizing Transformer Training by Preventing Attention Entropy Collapse, Zhai et al., ICML 2023,
arXiv:2303.06296, equation 4: Ŵ = σ / ‖W‖₂ · W, the norm by power iteration with one step per forward pass, the gradient
through W alone. As in the authors' code the norm is that of one step from the stored vector u, σ starts at ‖W‖₂, so
that the model is at first the function that it was, and convolutions are flattened to (out, in·k·k). Their code steps
wherever a weight is read; here once per forward pass of the model in training, before its stem, so that neither a
weight that is read twice nor a block that is recomputed moves u again.
Shapes: O I = rows and columns of a flattened weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from conf import values
from conf.errors import UserError
from models.layers.norm import TokenBatchNorm

WEIGHTED = (nn.Linear, nn.Conv2d)
NORMALISING = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, TokenBatchNorm)
NORMS = ("kept", "removed")
STD = 0.02
ZERO = ("offset", "modulation", "final.linear")  # what starts at zero in models of ours has no spectral norm


def sigma(
    model: nn.Module,
    *,
    only: Sequence[str] | None = None,
    skip: Sequence[str] = ZERO,
    norms: str = "kept",
    conv_gain: float | None = None,
) -> None:
    """Reparametrises the linear layers and convolutions of a built model.

    Args:
        model: with weights as they are to start.
        only: ends of the names of modules, e.g. [qkv, proj]; None for all, the head and the patches too, as the paper.
        skip: ends of the names of modules that stay plain, such as those that start at zero.
        norms: "kept", or "removed": Identity in place of every norm, as in the authors' vision transformers.
        conv_gain: kernels of convolutions start as numbers of deviation 0.02 times this, cut off as in `trunc_normal_`,
            as the authors' do; None: as the model has them.

    Raises:
        ValueError: no module has such a name, one starts at zero, or an option is none.
    """
    if norms not in NORMS:
        raise UserError(f"sigma: norms must be one of {', '.join(NORMS)}, got {norms!r}; set reparam.norms")
    if conv_gain is not None:
        values.number("sigma", "conv_gain", conv_gain, 1e-6, fix="set reparam.conv_gain=1.0, or null")
    places = _places(model, _ends("only", only), _ends("skip", skip))
    for _, module in places if conv_gain is not None else ():
        if isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=STD * conv_gain)
    for _, module in places:
        parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))
    if norms == "removed":
        _remove_norms(model)
    getattr(model, "stem", model).register_forward_pre_hook(PowerIteration([module for _, module in places]))


class SpectralNorm(nn.Module):
    """W → σ / ‖W‖₂ · W; in training by the vectors of the last step, otherwise by one step from the stored u."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        flat_OI = weight.detach().flatten(1)
        self.sigma = nn.Parameter(flat_OI.new_ones(1))
        self.register_buffer("u", flat_OI.new_zeros(flat_OI.shape[1]))
        self.register_buffer("v", flat_OI.new_zeros(flat_OI.shape[0]), persistent=False)

    def _load_from_state_dict(self, *args: Any) -> None:
        """`v` is in no file: training makes it by the next step, where `u` is."""
        super()._load_from_state_dict(*args)
        if self.v.is_meta:
            self.v = torch.zeros_like(self.v, device=self.u.device)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Starts from a weight: σ is its norm, and u and v are its first singular vectors."""
        v_OK, values_K, u_KI = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.sigma.copy_(values_K[:1])
        self.u.copy_(u_KI[0])
        self.v.copy_(v_OK[:, 0])
        return weight

    def forward(self, weight: Tensor) -> Tensor:
        flat_OI = weight.flatten(1)
        # copies: a second forward pass may step before the backward pass of the first
        u, v = (self.u.clone(), self.v.clone()) if self.training else stepped(flat_OI, self.u)
        return weight * (self.sigma / (flat_OI * torch.outer(v, u)).sum())

    @torch.no_grad()
    def step(self, weight: Tensor) -> None:
        """One step of the power iteration, kept."""
        u, v = stepped(weight.flatten(1), self.u)
        self.u.copy_(u)
        self.v.copy_(v)


@torch.no_grad()
def stepped(weight_OI: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """v = W u and u' = Wᵀ v, both of length 1; as sums, which autocast leaves in 32 bits."""
    v = F.normalize((weight_OI * u).sum(1), dim=0)
    return F.normalize((weight_OI * v[:, None]).sum(0), dim=0), v


class PowerIteration:
    """A hook in front of a forward pass: it steps every weight in training that is still parametrised."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        for owner in self.modules:
            if owner.training and parametrize.is_parametrized(owner, "weight"):
                weights = owner.parametrizations["weight"]
                weights[0].step(weights.original)


def _places(model: nn.Module, only: tuple[str, ...] | None, skip: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """The modules that are reparametrised, by name."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, WEIGHTED)
        and (only is None or f".{name}".endswith(only))
        and not f".{name}".endswith(skip)
    ]
    if not found:
        raise UserError(f"sigma: no linear layer or convolution has such a name, got only={only}; set reparam.only")
    for name, module in found:
        if not module.weight.is_meta and not module.weight.any():
            raise UserError(
                f"sigma: a weight that starts at zero has no spectral norm, got {name}; add it to reparam.skip"
            )
    return found


def _remove_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in NORMALISING:
                setattr(parent, name, nn.Identity())


def _ends(key: str, names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names as the ends of longer ones."""
    if names is None and key == "only":
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"sigma: {key} must be a list of names of modules, got {names!r}; set reparam.{key}=[qkv]")
    return tuple(f".{name}" for name in names)
