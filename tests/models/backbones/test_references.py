"""Whole models equal the authors' code: outputs, every gradient and the routing, on every recorded case.

`make test` runs the smallest of every backbone and paper, `make test-all` and ALL_REFERENCES=1 every one.
"""

import ast
import os
import re

import numpy as np
import parity
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from models.attention.biformer import RegionRouter
from models.attention.moh import MoHAttention
from models.backbones.base import Pyramid
from models.checkpoints import convert, export

ALL = [  # DiT is no classifier: test_references_dit.py; models that only show a part are rebuilt where it is tested
    name
    for name in reference.cases("model")
    if not name.startswith(("attribution/", "fit/", "illama/", "lit/", "perceiver/", "sigma_reparam/"))
    and (not name.startswith("moh/") or reference.info(name)["official_constructor"].startswith("transnext."))
]
# Every paper and every backbone. The others differ from these in depth, width, image size and filling, or join a
# mechanism and a backbone that are both here.
QUICK = {
    "agent/agent_pvt_tiny",
    "biformer/biformer_mm_tiny__nwin8_autopad_200x264",
    "biformer/biformer_stl_nchw",
    "davit/davit_mm_tiny__200x264",
    "flatten/flatten_cswin_tiny",
    "flatten/flatten_pvt_v2_b0",
    "flowformer/flowformer_cv",
    "inline/inline_deit_tiny",
    "inline/inline_swin_tiny",
    "l2vit/l2vit_tiny",
    "moh/transnext_micro",
    "nat/dinat_mini",
    "overlock/overlock_xt",
    "van/van_b0",
}
# where regions of nothing but padding tie exactly, the authors' order among them is that of torch.topk, which has none
ROUTED = [
    name
    for name in ALL
    if any(key.startswith("routing_") and key.removeprefix("routing_").isdigit() for key in reference.arrays(name))
    and not reference.info(name).get("routing_exact_ties")
]
MIXED = [name for name in ALL if "aux_layers" in reference.info(name)]


def cases(names: list[str]) -> list:
    wanted = set(names) if os.environ.get("ALL_REFERENCES") else QUICK
    return [pytest.param(name, marks=[] if name in wanted else pytest.mark.full) for name in names]


def ours(name: str) -> tuple[str, nn.Module]:
    """Our name of the model of a case, e.g. `davit_mm_tiny__200x264` → davit_tiny, and the model."""
    plain, settings = settings_of(name)
    return plain, create_model(plain, features_only="_mm_" in name, **settings)


def settings_of(name: str) -> tuple[str, dict]:
    """Our name of the model, and how it differs from what conf/model says."""
    case = reference.info(name)
    hparams = case["hparams"]
    if name.startswith("moh/"):  # transnext.transnext_micro_AAAA(**{'img_size': 256})
        model, given = re.fullmatch(r"transnext\.(\w+)\((?:\*\*(.*))?\)", case["official_constructor"]).groups()
        hparams = hparams | ast.literal_eval(given or "{}")
        settings = {"image_size": hparams["img_size"], "pretrain_size": hparams.get("pretrain_size")}
        return model.lower(), settings | ({"fixed_pool_size": n} if (n := hparams.get("fixed_pool_size")) else {})
    settings = {"num_regions": n} if (n := hparams.get("n_win", 7)) != 7 else {}
    return name.partition("/")[2].partition("__")[0].replace("_mm_", "_"), settings


def call(model: nn.Module, images: Tensor) -> Tensor:
    """As the cases record it: logits, or every map of a pyramid pooled to 4×4."""
    if not isinstance(model, Pyramid):
        return model(images)
    return torch.cat([F.adaptive_avg_pool2d(x, 4).flatten(1) for x in model(images)], dim=1)


def test_the_cases_are_found():
    families = {"biformer", "davit", "agent", "flatten", "flowformer", "inline", "l2vit", "moh", "nat", "van"}
    families |= {"overlock"}
    assert families == {name.partition("/")[0] for name in QUICK}
    assert len(ALL) >= 34 and set(ALL) >= QUICK and len(ROUTED) >= 5 and len(MIXED) >= 1


def test_a_recorded_choice_is_no_matter_of_rounding():
    """Why routes and gates may be compared exactly: the last chosen is ahead of the first left out by more.

    Rounding in float32 reaches 2.4e-5, in the router of moh_transnext_small_75, whose closest choice is 1.0e-4 apart.
    """
    compared = [name for name in reference.cases() if name.startswith(("biformer/", "moh/"))]
    margins = [
        case.get(key) for case in map(reference.info, compared) for key in ("routing_margin_min", "min_topk_gap_logit")
    ]
    assert min(margin for margin in margins if margin is not None) > 5e-5


@pytest.mark.parametrize("name", cases(ALL))
def test_model(name):
    model, module = ours(name)
    settings = settings_of(name)[1]
    assert sum(p.numel() for p in module.parameters()) == reference.info(name)["num_params"]
    parity.check(name, module, lambda theirs: convert(theirs, model, **settings), call)


@pytest.mark.parametrize("name", cases(ROUTED))
@torch.no_grad()
def test_routes_are_the_authors(name):
    model, module = ours(name)
    module.load_state_dict(convert(reference.weights(name), model))
    routes = []
    for router in (m for m in module.modules() if isinstance(m, RegionRouter)):
        router.register_forward_hook(lambda *args: routes.append(args[-1][0].sort(dim=-1).values.numpy()))
    module.eval()(reference.model_input(name))
    recorded = {key: value for key, value in reference.arrays(name).items() if key.startswith("routing_")}
    wanted = [value for key, value in sorted(recorded.items()) if key.removeprefix("routing_").isdigit()]
    assert len(routes) == len(wanted) > 0
    for index, (got, want) in enumerate(zip(routes, wanted, strict=True)):
        np.testing.assert_array_equal(got, want, err_msg=f"routing of block {index}")


@pytest.mark.parametrize("name", cases(MIXED))
def test_heads_are_chosen_and_balanced_as_by_the_authors(name):
    """Logits, gates, the loss of every routed layer, and gradient norms of 0.01 times their mean."""
    module, recorded, gates = filled(name).train(), reference.arrays(name), {}
    for layer, router in routers(module).items():
        router.register_forward_hook(lambda *args, layer=layer: gates.update({layer: args[-1][0].detach()}))
    logits, given = module(reference.model_input(name), return_losses=True)
    losses = given["load_balance"]
    assert_gates(name, gates)
    assert reference.compare(name, "output", logits) <= parity.OUTPUT
    assert reference.compare(name, "aux_loss", losses) <= parity.OUTPUT
    total = 0.01 * losses.mean()
    assert reference.compare(name, "aux_total", total) <= parity.OUTPUT
    total.backward()
    plain, settings = settings_of(name)
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in module.named_parameters()}
    theirs = export(grads, plain, **settings)
    wanted = dict(zip(reference.info(name)["param_names"], recorded["aux_grad_norms"], strict=True))
    assert set(theirs) == set(wanted)
    for key, norm in wanted.items():
        np.testing.assert_allclose(
            float(theirs[key].norm()), norm, rtol=parity.GRADIENT, atol=1e-7 * max(wanted.values()), err_msg=key
        )


def assert_gates(name: str, gates: dict[str, Tensor]) -> None:
    """By layer: zeros exactly where the authors' are, and the same weights where those are recorded."""
    recorded = reference.arrays(name)
    masks = {key.removeprefix("routing_mask."): mask for key, mask in recorded.items() if key.startswith("routing_m")}
    assert set(masks) == set(reference.info(name)["aux_layers"]) <= set(gates)
    for layer, mask in masks.items():
        np.testing.assert_array_equal((gates[layer] != 0).numpy(), mask, err_msg=f"heads of {layer}")
    weighted = [key for key in recorded if key.startswith("gates.") and "__" not in key]
    assert weighted
    for key in weighted:
        assert reference.compare(name, key, gates[key.removeprefix("gates.")]) <= parity.OUTPUT


def filled(name: str) -> nn.Module:
    model, module = ours(name)
    module.load_state_dict(convert(reference.weights(name), model, **settings_of(name)[1]))
    return module


def routers(module: nn.Module) -> dict[str, nn.Module]:
    """By the authors' name of the layer, e.g. block3.0.attn."""
    mixers = {key: m.router for key, m in module.named_modules() if isinstance(m, MoHAttention)}
    return {re.sub(r"stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", key): m for key, m in mixers.items()}
