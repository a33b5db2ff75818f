"""InLine attention against what the authors' modules returned, driven by the recorded cases alone."""

import re

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from models.attention import Grid, Site
from models.attention.contract.heads import merge_heads, split_heads
from models.attention.inline import InLineCore, inline_attention
from models.checkpoints.names.inline import authors
from models.layers.block import Block

FEATURES = {"leakyrelu": "leaky_relu"}  # ours by theirs, where they differ
CLASSES = {backbone: f"models.inline_{backbone}.InLineAttention" for backbone in ("deit", "pvt", "swin", "cswin")}
BLOCK = "models.inline_cswin.CSWinBlock"
PREFIXES = {"deit": "blocks.0.attn.", "pvt": "block1.0.attn.", "swin": "layers.0.blocks.0.attn."}


def cases(*constructors: str) -> list[str]:
    modules = [name for name in reference.cases("module") if name.startswith("inline/")]
    return [name for name in modules if reference.info(name).get("official_constructor") in constructors]


def grid_of(case: dict) -> Grid:
    """The map of a case; a batch of windows has that of a window."""
    h = case["hparams"]
    if "window_size" in h:
        return Grid(*h["window_size"])
    if "window" in h:
        return Grid(h["window"], h["window"], case["input_shape"][1] - h["window"] ** 2)
    return Grid(*map(int, re.search(r"H=(\d+), W=(\d+)", case["forward"]).groups()))


@pytest.mark.parametrize("name", cases(*(CLASSES[backbone] for backbone in PREFIXES)))
def test_attention(name: str) -> None:
    case = reference.info(name)
    h, grid, backbone = case["hparams"], grid_of(case), name.split("/")[1].split("_")[0]
    site = Site(h["dim"], h["num_heads"], grid, 0, 0, 1, "vit" if grid.prefix else "hierarchical")
    phi = h.get("kernel_func", "identity")
    module = inline_attention(site, feature=FEATURES.get(phi, phi), qkv_bias=h["qkv_bias"])
    layout = authors(f"inline_{backbone}_tiny")
    convert = parity.through(layout, module, "stages.0.blocks.0.attn.", PREFIXES[backbone])
    parity.check(name, module, convert, lambda module, x: module(x, grid).x)


class Branch(nn.Module):
    """CSWin's one branch over the whole map: given queries, keys and values, and the mean of the block's input."""

    def __init__(self, h: dict, mean_BC: Tensor) -> None:
        super().__init__()
        self.mean_BC = mean_BC
        self.heads, self.grid = h["num_heads"], Grid(h["resolution"], h["resolution"])
        self.core = InLineCore(h["num_heads"], h["dim"] // h["num_heads"], reads_stream=True, lepe=True)

    def forward(self, qkv_3BNC: Tensor) -> Tensor:
        q, k, v = (split_heads(x, 1, self.heads)[0] for x in qkv_3BNC)
        context = self.core.context(self.mean_BC.unsqueeze(1))
        return merge_heads(self.core(q, k, v, self.grid, self.grid, **context))


@pytest.mark.parametrize("name", cases(CLASSES["cswin"]))
def test_cswin(name: str) -> None:
    case = reference.info(name)
    batch, dim, seed = map(int, re.search(r"x_mean = make_input\(\((\d+), (\d+)\), (\d+)\)", case["forward"]).groups())
    assert case["hparams"]["idx"] == -1, "the authors' code has no more than one stripe"
    mean = np.random.default_rng(seed).standard_normal((batch, dim)).astype(np.float32)
    module = Branch(case["hparams"], torch.from_numpy(mean))
    convert = parity.through(authors("inline_cswin_tiny"), module, "stages.0.blocks.0.attn.", "stage1.0.attns.0.")
    parity.check(name, module, convert, lambda module, x: module(x))


@pytest.mark.parametrize("name", cases(BLOCK))
def test_cswin_block(name: str) -> None:
    h = reference.info(name)["hparams"]
    assert h["split_size"] == h["reso"], "the authors' code has no more than one stripe"
    site = Site(h["dim"], h["num_heads"], Grid(h["reso"], h["reso"]), 0, 0, 1, "hierarchical")
    mixer = inline_attention(site, residual_input="stream", lepe=True, qkv_bias=h["qkv_bias"])
    block = Block(h["dim"], mixer, norm_eps=1e-5)
    convert = parity.through(authors("inline_cswin_tiny"), block, "stages.0.blocks.0.", "stage1.0.")
    parity.check(name, block, convert, lambda module, x: module(x, site.grid)[0])


def test_every_case_belongs_to_a_test() -> None:
    modules = [name for name in reference.cases("module") if name.startswith("inline/")]
    found = {reference.info(name)["official_constructor"] for name in modules}
    assert found <= {*CLASSES.values(), BLOCK} and found
