"""DiT and MoH-DiT equal the authors' code: predictions, guidance, every gradient, the routing and its loss.

`make test` runs each comparison once, `make test-all` and ALL_REFERENCES=1 with every model.
"""

import os
import re

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import create_model
from models.attention.moh import MoHAttention
from models.checkpoints import convert

ALL = [
    name for name in reference.cases("model") if reference.info(name)["official_constructor"].startswith("DiT_models")
]
PLAIN, MIXED = "moh/dit_s_2", "moh/moh_dit_s_2_90"
ROUTED = [name for name in ALL if "aux_loss" in reference.arrays(name)]
GUIDANCE, GUIDED = 1.5, 3  # of the recorded guided predictions


def cases(names: list[str], quick: str) -> list:
    """The mixture of heads shows what the plain one would, and its own; guidance is the same code in both."""
    every = os.environ.get("ALL_REFERENCES")
    return [pytest.param(name, marks=[] if every or name == quick else pytest.mark.full) for name in names]


def made(name: str) -> nn.Module:
    return create_model(name.partition("/")[2].partition("__")[0]).eval()


def converted(theirs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return convert(theirs, name.partition("/")[2].partition("__")[0])


def filled(name: str) -> nn.Module:
    module = made(name)
    module.load_state_dict(converted(reference.weights(name), name))
    return module


def fixed(module: nn.Module) -> dict[str, Tensor]:
    """The position table, which the cases leave as it is made."""
    return {"pos_embed": module.stem.position.sinusoid.detach().clone()}


def given(name: str) -> tuple[Tensor, Tensor, Tensor]:
    case = reference.info(name)
    return reference.model_input(name), torch.tensor(case["t"]), torch.tensor(case["y"])


def mixers(module: nn.Module) -> dict[str, MoHAttention]:
    """By the authors' name of the layer."""
    blocks = module.stages[0].blocks
    return {f"blocks.{i}.attn": b.attn for i, b in enumerate(blocks) if isinstance(b.attn, MoHAttention)}


def test_the_cases_are_found():
    assert PLAIN in ALL and MIXED in ROUTED


@pytest.mark.parametrize("name", cases(ALL, MIXED))
def test_prediction_and_gradients(name):
    module = made(name)
    assert sum(p.numel() for p in module.parameters()) == reference.info(name)["num_params"]
    _, t, y = given(name)
    parity.check(name, module, lambda theirs: converted(theirs, name), lambda m, x: m(x, t, y), fixed(module))


@pytest.mark.parametrize("name", cases(ALL, PLAIN))
@torch.no_grad()
def test_guided_and_unconditional_predictions(name):
    module, (x, t, y) = filled(name), given(name)
    free = module(x, t, torch.full_like(y, module.num_classes))
    assert reference.compare(name, "null_output", free) <= parity.OUTPUT
    guided = module.forward_guided(x, t, y, GUIDANCE, GUIDED)
    theirs = torch.cat([guided, torch.cat([guided[:, :GUIDED], free[:, GUIDED:]], dim=1)])
    assert reference.compare(name, "cfg_output", theirs) <= parity.OUTPUT


@pytest.mark.parametrize("name", cases(ROUTED, MIXED))
@torch.no_grad()
def test_gates_and_routing(name):
    module, gates = filled(name), {}
    for layer, mixer in mixers(module).items():
        mixer.router.register_forward_hook(lambda *args, layer=layer: gates.update({layer: args[-1][0]}))
    module(*given(name))
    recorded = reference.arrays(name)
    masks = [key for key in recorded if re.fullmatch(r"routing_mask\.[\w.]*attn", key)]
    weighted = [key for key in recorded if re.fullmatch(r"gates\.[\w.]*attn", key)]
    assert masks and weighted
    for key in masks:
        np.testing.assert_array_equal((gates[key.partition(".")[2]] != 0).numpy(), recorded[key], err_msg=key)
    for key in weighted:
        assert reference.compare(name, key, gates[key.partition(".")[2]]) <= parity.OUTPUT


@pytest.mark.parametrize("name", cases(ROUTED, MIXED))
def test_load_balance_and_its_gradients(name):
    """As recorded: the mixers in training mode, so that no label is dropped."""
    module, recorded = made(name), reference.arrays(name)
    for mixer in mixers(module).values():
        mixer.train()
    theirs = {key: value.requires_grad_() for key, value in reference.weights(name).items()}
    _, losses = functional_call(module, converted(theirs, name), given(name), {"return_losses": True})
    assert list(losses) == ["load_balance"] and len(losses["load_balance"]) == len(reference.info(name)["aux_layers"])
    assert reference.compare(name, "aux_loss", losses["load_balance"]) <= parity.OUTPUT
    total = 0.01 * losses["load_balance"].mean()
    assert reference.compare(name, "aux_total", total) <= parity.OUTPUT
    grads = torch.autograd.grad(total, list(theirs.values()), allow_unused=True, materialize_grads=True)
    found = {key: float(grad.norm()) for key, grad in zip(theirs, grads, strict=True)}
    wanted = dict(zip(reference.info(name)["param_names"], recorded["aux_grad_norms"], strict=True))
    assert set(wanted) - set(found) <= {"pos_embed"}
    for key, norm in found.items():
        np.testing.assert_allclose(
            norm, wanted[key], rtol=parity.GRADIENT, atol=1e-7 * max(wanted.values()), err_msg=f"gradient of {key}"
        )
