"""Focused linear attention against what the authors' modules returned, driven by the recorded cases alone."""

import re

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from kernels import windows
from models.attention import Grid, Site
from models.attention.contract.heads import split_heads
from models.attention.focused_linear import FocusedLinearCore, focused_linear_attention
from models.attention.multihead import MultiHead

State = dict[str, Tensor]
PVT = ("models.flatten_pvt.FocusedLinearAttention", "models.flatten_pvt_v2.FocusedLinearAttention")
SWIN, CSWIN = "models.flatten_swin.FocusedLinearAttention", "models.flatten_cswin.FocusedLinearAttention"


def cases(*constructors: str) -> list[str]:
    modules = [name for name in reference.cases("module") if name.startswith("flatten/")]
    return [name for name in modules if reference.info(name).get("official_constructor") in constructors]


def core_state(theirs: State) -> State:
    ours = {"scale": theirs["scale"].flatten(), "positional_encoding": theirs["positional_encoding"]}
    for kind in ("weight", "bias"):
        ours[f"dwc.{kind}"] = theirs[f"dwc.{kind}"]
        if f"get_v.{kind}" in theirs:
            ours[f"lepe.{kind}"] = theirs[f"get_v.{kind}"]
    return {f"core.{name}": value for name, value in ours.items()}


def module_state(theirs: State) -> State:
    """A whole attention module: projections, shortening of the keys, and the core."""
    ours = core_state(theirs)
    for kind in ("weight", "bias"):
        ours[f"proj.{kind}"] = theirs[f"proj.{kind}"]
        if f"qkv.{kind}" in theirs:
            ours[f"qkv.{kind}"] = theirs[f"qkv.{kind}"]
        elif f"q.{kind}" in theirs:
            ours[f"qkv.{kind}"] = torch.cat([theirs[f"q.{kind}"], theirs[f"kv.{kind}"]])
        if f"sr.{kind}" in theirs:
            ours[f"reduce.conv.{kind}"], ours[f"reduce.norm.{kind}"] = theirs[f"sr.{kind}"], theirs[f"norm.{kind}"]
    return ours


def mixer(h: dict, grid: Grid) -> MultiHead:
    pooled = h.get("linear", False)
    return focused_linear_attention(
        Site(h["dim"], h["num_heads"], grid, 0, 0, 1, "hierarchical"),
        power=h["focusing_factor"],
        kernel_size=h["kernel_size"],
        sr_ratio=1 if pooled else h.get("sr_ratio", 1),
        kv_pool=7 if pooled else None,
        qkv_bias=h.get("qkv_bias", True),
    )


@pytest.mark.parametrize("name", cases(*PVT))
def test_pvt(name: str) -> None:
    case = reference.info(name)
    grid = Grid(*map(int, re.search(r"H=(\d+), W=(\d+)", case["forward"]).groups()))
    parity.check(name, mixer(case["hparams"], grid), module_state, lambda module, x: module(x, grid).x)


@pytest.mark.parametrize("name", cases(SWIN))
def test_swin(name: str) -> None:
    hparams = reference.info(name)["hparams"]
    grid = Grid(*hparams["window_size"])  # the case's batch is one of windows
    parity.check(name, mixer(hparams, grid), module_state, lambda module, x: module(x, grid).x)


class Stripe(nn.Module):
    """CSWin's branch: attention of given queries, keys and values inside stripes of the map."""

    def __init__(self, h: dict) -> None:
        super().__init__()
        self.heads, side, split = h["num_heads"], h["resolution"], h["split_size"]
        self.resolution = side, side
        self.stripe = {-1: (side, side), 0: (side, split), 1: (split, side)}[h["idx"]]
        self.core = FocusedLinearCore(
            self.heads,
            h["dim"] // self.heads,
            Grid(*self.stripe),
            power=h["focusing_factor"],
            kernel_size=h["kernel_size"],
            lepe=True,
        )

    def forward(self, qkv_3BNC: Tensor) -> Tensor:
        q, k, v = (split_heads(windows.split(x, *self.resolution, self.stripe), 1, self.heads)[0] for x in qkv_3BNC)
        o_BMND = self.core(q, k, v, Grid(*self.stripe), Grid(*self.stripe))
        return windows.merge(o_BMND.transpose(1, 2).flatten(2), *self.resolution, self.stripe)


@pytest.mark.parametrize("name", cases(CSWIN))
def test_cswin(name: str) -> None:
    parity.check(name, Stripe(reference.info(name)["hparams"]), core_state, lambda module, x: module(x))


def test_every_case_belongs_to_a_test() -> None:
    modules = [name for name in reference.cases("module") if name.startswith("flatten/")]
    found = {reference.info(name)["official_constructor"] for name in modules}
    assert found <= {*PVT, SWIN, CSWIN} and found
