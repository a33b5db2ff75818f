"""Mixture of heads over aggregated, cosine and softmax attention, and the first two alone, equal the authors' code."""

from functools import partial

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor

from models.attention import Grid, Site
from models.attention.aggregated import aggregated_attention
from models.attention.cosine import cosine_attention
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention

AGGREGATED, COSINE, SOFTMAX = (
    "AggregatedAttention(dim, input_resolution, ...)",
    "Attention(dim, input_resolution, ...)",
    "MoHAttention(dim, ...)",
)
POSITIONED = (AGGREGATED, COSINE)
CORE = ("temperature", "query_embedding", "relative_pos_bias_local", "learnable_", "q_norm", "k_norm")


def cases(*constructors: str, routed: bool) -> list[str]:
    infos = {name: reference.info(name) for name in reference.cases("module")}
    return [
        name
        for name, case in infos.items()
        if case.get("official_constructor", "").startswith(constructors)
        and ("shared_head" in case["hparams"]) == routed
    ]


def grid_of(case: dict) -> Grid:
    return Grid(case["H"], case["W"]) if "H" in case else Grid(1, case["input_shape"][1])


def site_of(case: dict) -> Site:
    return Site(case["hparams"]["dim"], case["hparams"]["num_heads"], grid_of(case), 0, 0, 1, "vit")


def core(case: dict) -> partial:
    hparams = case["hparams"]
    if case["official_constructor"].startswith(AGGREGATED):
        options = {key: hparams[key] for key in ("sr_ratio", "fixed_pool_size", "pretrain_size", "qkv_bias")}
        return partial(aggregated_attention, window=hparams["window_size"], **options)
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
    if key.startswith(("sr.", "norm.")):
        return f"reduce.{key.replace('sr.', 'conv.')}"
    return f"core.{key}" if key.startswith(CORE) else key


def joined(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values below each other, where the authors have queries apart."""
    pairs = {key: (key, key.replace("q.", "kv.")) for key in theirs if key.startswith("q.")}
    packed = {key.replace("q.", "qkv."): torch.cat([theirs[k] for k in pair]) for key, pair in pairs.items()}
    return packed | {key: value for key, value in theirs.items() if not key.startswith(("q.", "kv."))}


def convert(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {core_name(key): value for key, value in joined(theirs).items()}


def convert_moh(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"router.{k}" if k.startswith("wg") else f"mixer.{core_name(k)}": v for k, v in joined(theirs).items()}


def filled(name: str) -> MoHAttention:
    module = moh(reference.info(name))
    module.load_state_dict(convert_moh(reference.weights(name)))
    return module


ROUTED = cases(*POSITIONED, SOFTMAX, routed=True)
BALANCED = [name for name in ROUTED if "aux_loss" in reference.arrays(name)]


def test_the_cases_are_found() -> None:
    assert len(ROUTED) >= 25
    assert len(BALANCED) >= 22
    assert len(cases(COSINE, routed=False)) >= 2 and len(cases(AGGREGATED, routed=False)) >= 4


@pytest.mark.parametrize("name", cases(*POSITIONED, routed=False))
def test_attention_alone(name: str) -> None:
    case = reference.info(name)
    grid = grid_of(case)
    parity.check(name, core(case)(site_of(case)), convert, lambda m, x: m(x, grid).x)


@pytest.mark.parametrize("name", cases(*POSITIONED, routed=False) + cases(*POSITIONED, routed=True))
def test_coordinates_of_the_position_bias(name: str) -> None:
    case, recorded = reference.info(name), reference.arrays(name)
    module, grid = core(case)(site_of(case)), grid_of(case)
    keys = module.reduce.reduced(grid) if module.reduce is not None else grid
    sides = list(zip(grid[:2], keys[:2], strict=True))
    table = module.core.bias.coordinates(*sides, torch.device("cpu")).flatten(0, 1)
    if all(side % cells == 0 for side, cells in sides):
        assert reference.compare(name, "relative_coords_table", table) <= 1e-6
    else:  # uneven pooling: ours has every half cell, theirs those that occur
        distance = np.abs(recorded["relative_coords_table"].reshape(-1, 1) - table.unique().numpy())
        assert distance.min(axis=1).max() <= 1e-6


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
    grads = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    assert all(key.startswith("router.") for key in grads)
    for key, wanted in theirs.items():
        norm = float(grads[f"router.{key}"].norm()) if f"router.{key}" in grads else 0.0
        np.testing.assert_allclose(norm, wanted, rtol=parity.GRADIENT, atol=1e-7 * max(theirs.values()))


def assert_first_values(name: str, key: str, value: Tensor) -> None:
    """`key` records the first values of a flattened tensor, or an even sample of them when they are many."""
    recorded = reference.arrays(name)
    count = int(recorded.get(f"{key}__shape", recorded[key].shape)[0])
    assert reference.compare(name, key, value.flatten()[:count]) <= parity.GRADIENT
