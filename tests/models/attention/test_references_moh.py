"""Mixture of heads over cosine and over softmax attention, and cosine attention alone, equal the authors' modules."""

from functools import partial

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor

from models.attention import Grid, Site
from models.attention.cosine import cosine_attention
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention

COSINE, SOFTMAX = "Attention(dim, input_resolution, ...)", "MoHAttention(dim, ...)"
CORE = ("temperature", "query_embedding", "q_norm", "k_norm")


def cases(*constructors: str, routed: bool) -> list[str]:
    infos = {name: reference.info(name) for name in reference.cases("module")}
    return [
        name
        for name, case in infos.items()
        if case["official_constructor"].startswith(constructors) and ("shared_head" in case["hparams"]) == routed
    ]


def grid_of(case: dict) -> Grid:
    return Grid(case["H"], case["W"]) if "H" in case else Grid(1, case["input_shape"][1])


def site_of(case: dict) -> Site:
    return Site(case["hparams"]["dim"], case["hparams"]["num_heads"], grid_of(case), 0, 0, 1, "vit")


def core(case: dict) -> partial:
    hparams = case["hparams"]
    if case["official_constructor"].startswith(COSINE):
        return partial(cosine_attention, pretrain_size=hparams["pretrain_size"], qkv_bias=hparams["qkv_bias"])
    return partial(
        softmax_attention,
        qkv_bias=hparams["qkv_bias"],
        qk_norm=hparams.get("qk_norm", False),
        head_dim=hparams.get("head_dim"),
    )


def moh(case: dict) -> MoHAttention:
    hparams = case["hparams"]
    return MoHAttention(
        site_of(case), core=core(case), shared_heads=hparams["shared_head"], routed_heads=hparams["routed_head"]
    )


def core_name(key: str) -> str:
    if key.startswith("cpb_fc"):
        return f"core.bias.{key}"
    return f"core.{key}" if key.startswith(CORE) else key


def convert(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {core_name(key): value for key, value in theirs.items()}


def convert_moh(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"router.{k}" if k.startswith("wg") else f"mixer.{core_name(k)}": v for k, v in theirs.items()}


def filled(name: str) -> MoHAttention:
    module = moh(reference.info(name))
    module.load_state_dict(convert_moh(reference.weights(name)))
    return module


ROUTED = cases(COSINE, SOFTMAX, routed=True)
BALANCED = [name for name in ROUTED if "aux_loss" in reference.arrays(name)]


def test_the_cases_are_found() -> None:
    assert len(ROUTED) >= 17
    assert len(BALANCED) >= 15
    assert len(cases(COSINE, routed=False)) >= 2


@pytest.mark.parametrize("name", cases(COSINE, routed=False))
def test_cosine_attention(name: str) -> None:
    case = reference.info(name)
    grid = grid_of(case)
    parity.check(name, core(case)(site_of(case)), convert, lambda m, x: m(x, grid).x)


@pytest.mark.parametrize("name", cases(COSINE, routed=False) + cases(COSINE, routed=True))
def test_coordinates_of_the_position_bias(name: str) -> None:
    case, recorded = reference.info(name), reference.arrays(name)
    bias, grid = core(case)(site_of(case)).core.bias, grid_of(case)
    table = bias.coordinates(grid.height, grid.width, torch.device("cpu")).flatten(0, 1).numpy()
    np.testing.assert_allclose(table, recorded["relative_coords_table"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ROUTED)
def test_mixture_of_heads(name: str) -> None:
    case = reference.info(name)
    grid = grid_of(case)
    parity.check(name, moh(case), convert_moh, lambda m, x: m(x, grid).x)


@pytest.mark.parametrize("name", ROUTED)
def test_gates_and_routing(name: str) -> None:
    with torch.no_grad():
        gates, _ = filled(name).router(reference.model_input(name))
    np.testing.assert_array_equal((gates != 0).numpy(), reference.arrays(name)["routing_mask"])
    assert reference.compare(name, "gates", gates) <= parity.OUTPUT


@pytest.mark.parametrize("name", BALANCED)
def test_load_balance_and_its_gradients(name: str) -> None:
    module, x = filled(name).train(), reference.model_input(name).requires_grad_()
    loss = module(x, grid_of(reference.info(name))).losses["load_balance"]
    assert reference.compare(name, "aux_loss", loss) <= parity.OUTPUT
    loss.backward()
    recorded = reference.arrays(name)
    wg = module.router.wg.weight.grad
    if module.router.routed == module.router.num_heads - module.router.shared:
        # every routed head is chosen by every token, so the loss is constant: what is recorded is the rounding of zero
        assert loss.item() == pytest.approx(module.router.routed) and np.abs(recorded["aux_grad_wg"]).max() < 1e-6
        assert wg.abs().max() < 1e-6 and x.grad.abs().max() < 1e-6
        return
    assert reference.compare(name, "aux_grad_wg", wg) <= parity.GRADIENT
    assert_first_values(name, "aux_grad_input", x.grad)
    theirs = dict(zip(reference.info(name)["param_names"], recorded["aux_grad_norms"], strict=True))
    ours = {key: p.grad for key, p in module.named_parameters()}
    for key, (ours_key,) in ((k, convert_moh({k: None})) for k in theirs):
        norm = 0.0 if ours[ours_key] is None else float(ours[ours_key].norm())
        np.testing.assert_allclose(norm, theirs[key], rtol=parity.GRADIENT, atol=1e-7 * max(theirs.values()))


def assert_first_values(name: str, key: str, value: Tensor) -> None:
    """`key` records the first values of a flattened tensor, or an even sample of them when they are many."""
    recorded = reference.arrays(name)
    count = int(recorded.get(f"{key}__shape", recorded[key].shape)[0])
    assert reference.compare(name, key, value.flatten()[:count]) <= parity.GRADIENT
