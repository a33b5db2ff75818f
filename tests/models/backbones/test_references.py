"""Whole models equal the authors' code: outputs, every gradient and the routing, on every recorded case.

`ALL_REFERENCES=1 pytest tests/models/backbones/test_references.py` runs the large models too.
"""

import os

import numpy as np
import parity
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from models.attention.biformer import Router
from models.backbones.base import Pyramid
from models.checkpoints import convert

ALL = reference.cases("model")
# The papers with one mechanism in five backbones: the smallest of each pair, unless every case is asked for; the others
# differ from these in depth, width and image size alone, and take five minutes.
ONE_MECHANISM = ("agent/", "flatten/", "inline/")
CASES = [
    name
    for name in ALL
    if not name.startswith(ONE_MECHANISM) or name.endswith(("_tiny", "_b0")) or os.environ.get("ALL_REFERENCES")
]
# where regions of nothing but padding tie exactly, the authors' order among them is that of torch.topk, which has none
ROUTED = [
    name
    for name in CASES
    if any(key.startswith("routing_") for key in reference.arrays(name))
    and not reference.info(name).get("routing_exact_ties")
]


def ours(name: str) -> tuple[str, nn.Module]:
    """Our name of the model of a case, e.g. `davit_mm_tiny__200x264` → davit_tiny, and the model."""
    model = name.partition("/")[2].partition("__")[0]
    settings = {"num_regions": n} if (n := reference.info(name)["hparams"].get("n_win", 7)) != 7 else {}
    plain = model.replace("_mm_", "_")
    return plain, create_model(plain, features_only=model != plain, **settings)


def call(model: nn.Module, images: Tensor) -> Tensor:
    """As the cases record it: logits, or every map of a pyramid pooled to 4×4."""
    if not isinstance(model, Pyramid):
        return model(images)
    return torch.cat([F.adaptive_avg_pool2d(x, 4).flatten(1) for x in model(images)], dim=1)


def test_the_cases_are_found():
    assert {"biformer", "davit", "agent", "flatten", "inline"} <= {name.partition("/")[0] for name in CASES}
    assert len(ALL) >= 30 and len(CASES) >= 19 and len(ROUTED) >= 5


@pytest.mark.parametrize("name", CASES)
def test_model(name):
    model, module = ours(name)
    assert sum(p.numel() for p in module.parameters()) == reference.info(name)["num_params"]
    parity.check(name, module, lambda theirs: convert(theirs, model), call)


@pytest.mark.parametrize("name", ROUTED)
@torch.no_grad()
def test_routes_are_the_authors(name):
    model, module = ours(name)
    module.load_state_dict(convert(reference.weights(name), model))
    routes = []
    for router in (m for m in module.modules() if isinstance(m, Router)):
        router.register_forward_hook(lambda *args: routes.append(args[-1][0].sort(dim=-1).values.numpy()))
    module.eval()(reference.model_input(name))
    recorded = {key: value for key, value in reference.arrays(name).items() if key.startswith("routing_")}
    wanted = [value for key, value in sorted(recorded.items()) if key.removeprefix("routing_").isdigit()]
    assert len(routes) == len(wanted) > 0
    for index, (got, want) in enumerate(zip(routes, wanted, strict=True)):
        np.testing.assert_array_equal(got, want, err_msg=f"routing of block {index}")
