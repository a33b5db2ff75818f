"""Gates against what the authors' modules returned, driven by the recorded cases alone."""

import re

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from models.attention import Grid, Site
from models.gates.gaussian import GaussianAdaptive
from models.gates.pkcam import PKCAM
from models.gates.psa import PolarizedParallel, PolarizedSequential
from models.gates.ulsam import ULSAM
from models.layers.gated import Gate
from models.layers.tokens import to_map, to_tokens

PSA = {"network.PSA.PSA_p": PolarizedParallel, "network.PSA.PSA_s": PolarizedSequential}


def cases(*constructors: str) -> list[str]:
    modules = reference.cases("module")
    return [name for name in modules if reference.info(name).get("official_constructor") in constructors]


def site(name: str, dim: int, **changed: int) -> Site:
    grid = (
        Grid(*reference.info(name)["input_shape"][2:4]) if len(reference.info(name)["input_shape"]) == 4 else Grid(4, 5)
    )
    return Site(dim, 1, grid, 0, 0, 1, "convnet")._replace(**changed)


def on_maps(module: Gate, x_BCHW: Tensor) -> Tensor:
    grid = Grid(*x_BCHW.shape[2:])
    return to_map(module(to_tokens(x_BCHW), grid).x, grid)


def linear(weight: Tensor) -> Tensor:
    """Of a 1×1 convolution."""
    return weight.flatten(1)


@pytest.mark.parametrize("name", cases(*PSA))
def test_psa(name: str) -> None:
    info = reference.info(name)
    module = PSA[info["official_constructor"]](site(name, info["hparams"]["inplanes"]), spatial="released")
    names = {
        "channel_query": "conv_q_right", "channel_value": "conv_v_right", "channel_up": "conv_up",
        "place_query": "conv_q_left", "place_value": "conv_v_left",
    }  # fmt: skip

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, value in module.state_dict().items():
            part, _, rest = key.partition(".")
            found[key] = state[f"{names[part]}.{rest}"].reshape(value.shape)
        return found

    parity.check(name, module, convert, on_maps)


@pytest.mark.parametrize("name", cases("ULSAM"))
def test_ulsam(name: str) -> None:
    hparams = reference.info(name)["hparams"]
    groups = hparams["num_splits"]
    module = ULSAM(site(name, hparams["nin"]), groups=groups)
    names = {"depthwise": "conv_dws", "norm1": "bn_dws", "pointwise": "conv_point", "norm2": "bn_point"}

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key in module.state_dict():
            part, _, rest = key.partition(".")
            entries = [f"subspaces.{i}.{names[part]}.{rest}" for i in range(groups)]
            found[key] = (
                torch.tensor(0) if rest == "num_batches_tracked" else torch.cat([state[entry] for entry in entries])
            )
        return found

    parity.check(name, module, convert, on_maps)


class Residual(nn.Module):
    """The authors' residual block, of which the gate is a part, and what it is called with."""

    def __init__(self, name: str) -> None:
        super().__init__()
        hparams = reference.info(name)["hparams"]
        dim, self.stage = hparams["in_channels"], hparams["stage_id"]
        convolutions = [nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2)]
        self.residual = nn.Sequential(
            convolutions[0], nn.BatchNorm2d(dim), nn.ReLU(), convolutions[1], nn.BatchNorm2d(dim)
        )
        self.gate = PKCAM(site(name, dim, stage=self.stage, block=hparams["block_num"] - 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mean_BC = x_BCHW.mean((2, 3))
        earlier = {stage: mean_BC * (0.5 + 0.25 * stage) for stage in range(self.stage)}
        grid = Grid(*x_BCHW.shape[2:])
        gated = self.gate(to_tokens(self.residual(x_BCHW)), grid, earlier)
        return (to_map(gated.x, grid) + x_BCHW).relu()


@pytest.mark.parametrize("name", cases("BasicResidualECABlock(block_num=2)"))
def test_pkcam(name: str) -> None:
    assert re.search(r"prev = \[gap\(x\) \* \(0.5 \+ 0.25 i\)", reference.info(name)["forward"])
    module = Residual(name)
    names = {
        "gate.local.weight": "ECA_excitation_local.0.weight",
        "gate.across.weight": "ECA_excitation_global_stage.0.weight",
        "gate.sources": "stage_in_fusion.0.weight",
        "gate.fusion": "out_fusion.0.weight",
    }

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        fixed = {key: torch.tensor(0) for key in module.state_dict() if key.endswith("num_batches_tracked")}
        return fixed | {
            key: state[f"block.{names.get(key, key)}"].reshape(value.shape)
            for key, value in module.state_dict().items()
            if key not in fixed
        }

    parity.check(name, module, convert, lambda module, x: module(x))


@pytest.mark.parametrize("name", cases("MultiHeadGaussianAdaptiveAttention"))
def test_gaussian(name: str) -> None:
    info = reference.info(name)
    heads, gaussians = info["hparams"]["num_heads"], info["hparams"]["num_gaussians"]
    module = GaussianAdaptive(site(name, info["input_shape"][2]), heads, gaussians, scale="released")

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        def of_heads(name: str) -> Tensor:
            return torch.stack([state[f"attention_heads.{head}.{name}"] for head in range(heads)])

        return {"offset": of_heads("mean_offsets"), "width": of_heads("c")}

    parity.check(name, module, convert, lambda module, x: module(x, Grid(1, x.shape[1])).x)


def test_every_family_of_gates_has_a_case() -> None:
    found = {name.split("/")[0] for name in reference.cases("module")}
    assert found >= {"psa", "ulsam", "pkcam", "gaam"}
