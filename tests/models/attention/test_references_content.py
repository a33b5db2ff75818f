"""Mechanisms in which content decides equal what the authors' modules returned, driven by the recorded cases alone."""

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor

from models.attention import Grid, Site
from models.attention.dynamic_conv import DynamicKernel, LightKernel
from models.attention.reversed import ReversedAttention

State = dict[str, Tensor]


def cases(family: str) -> list[str]:
    return [name for name in reference.cases("module") if name.startswith(f"{family}/")]


def test_the_cases_are_found() -> None:
    assert (len(cases("reversed")), len(cases("lightconv"))) >= (1, 2)


@pytest.mark.parametrize("name", cases("reversed"))
def test_reversed(name: str) -> None:
    """With messages that blocks before it left."""
    case = reference.info(name)
    h, (B, N, _) = case["hparams"], case["input_shape"]
    site = Site(h["dim"], h["num_heads"], Grid(1, N), 0, 1, 2, "vit")
    module = ReversedAttention(site, temperature=h["head_selector_temperature"], qkv_bias=h["qkv_bias"])
    carry = torch.from_numpy(np.random.default_rng(94).random((B, 1, 1, N)).astype(np.float32)).reshape(B, N, 1)
    parity.check(name, module, lambda state: state, lambda m, x: m(x, site.grid, carry=carry).x)
    module.load_state_dict(reference.weights(name))
    x = reference.model_input(name)
    mixed = module(x, site.grid, carry=carry)
    assert reference.compare(name, "m_out", mixed.carry.reshape(B, 1, 1, N)) <= parity.OUTPUT
    sent_BNN = module.attention_matrix(x, site.grid, carry).sum(1)
    assert reference.compare(name, "dependency", sent_BNN) <= parity.OUTPUT


@pytest.mark.parametrize("name", cases("lightconv"))
def test_light_and_dynamic_convolutions(name: str) -> None:
    """A sequence is a map of one row."""
    case = reference.info(name)
    h, grid = case["hparams"], Grid(1, case["input_shape"][1])
    theirs = case["state"]
    kind = DynamicKernel if "weight_linear.weight" in theirs else LightKernel
    renorm, bias = h.get("renorm_padding", False), next((key for key in theirs if key in ("conv_bias", "bias")), None)
    module = kind(h["input_size"], h["num_heads"], (1, h["kernel_size"]), renorm, bias=bias is not None)

    def state(theirs: State) -> State:
        ours = {"bias" if key == bias else key: value for key, value in theirs.items()}
        return ours if kind is DynamicKernel else ours | {"weight": ours["weight"].flatten(1)}

    parity.check(name, module, state, lambda m, x: m(x, grid))
