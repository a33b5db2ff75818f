"""Bi-level routing attention and the attention of BiFormer's last stage equal the authors' modules."""

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from models.attention import Grid, Site
from models.attention.biformer import BiLevelRoutingAttention, biformer_attention
from models.attention.lepe import LePEAttention
from models.attention.softmax import softmax_attention
from models.layers.block import Block
from models.layers.position import ConvPosition
from models.layers.tokens import to_map, to_tokens

ROUTED = {"ops.bra_legacy.BiLevelRoutingAttention": "input", "ops.bra_nchw.nchwBRA": "qkv"}
DENSE = {
    "models._common.Attention": None,
    "models._common.AttentionLePE": "x",
    "models._common.nchwAttentionLePE": "v",
}
BLOCKS = {"models.biformer.Block"}
NAMES = {
    "qkv.qkv": "qkv",
    "qkv_linear": "qkv",
    "wo": "proj",
    "output_linear": "proj",
    "router.emb": "router.embed",
    # of a block
    "pos_embed": "position.proj",
    "attn.qkv.qkv": "attn.qkv",
    "attn.wo": "attn.proj",
    "attn.1": "attn.value",
    "attn.2": "attn.conv",
    "attn.3": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.1.dwconv": "mlp.conv",
    "mlp.3": "mlp.fc2",
    "gamma1": "scale1.gamma",
    "gamma2": "scale2.gamma",
}
LAYERS = {"ada_avgpool": nn.AdaptiveAvgPool2d, "ada_maxpool": nn.AdaptiveMaxPool2d}
STRIDED = {"avgpool": nn.AvgPool2d, "maxpool": nn.MaxPool2d}


def cases(constructors: dict) -> list[str]:
    return [n for n in reference.cases("module") if reference.info(n).get("official_constructor") in constructors]


def site_of(case: dict) -> Site:
    shape, nhwc = case["input_shape"], case["layout"] == "NHWC"
    height, width = shape[1:3] if nhwc else shape[2:]
    return Site(case["hparams"]["dim"], case["hparams"].get("num_heads", 8), Grid(height, width), 0, 0, 1, "vit")


def in_layout(case: dict, x: Tensor, grid: Grid, module) -> Tensor:
    """Calls a function of (x, grid) on an input in the authors' layout and returns its output in the same."""
    if case["layout"] == "NHWC":
        return module(x.flatten(1, 2), grid).unflatten(1, grid[:2])
    return to_map(module(to_tokens(x), grid), grid)


def kv_pool(hparams: dict) -> nn.Module | None:
    mode = hparams.get("kv_downsample_mode") or "identity"
    if mode in LAYERS:
        return LAYERS[mode](hparams["kv_per_win"])
    ratio = hparams.get("kv_downsample_ratio") or 1
    return STRIDED[mode](ratio) if mode in STRIDED and ratio > 1 else None


def routing(hparams: dict) -> str:
    if not hparams.get("soft_routing"):
        return "hard"
    if not hparams.get("diff_routing"):
        return "soft_detached"
    return "soft_learned" if hparams.get("param_routing") else "soft"


def routed_module(case: dict) -> BiLevelRoutingAttention:
    hparams = case["hparams"]
    return BiLevelRoutingAttention(
        site_of(case),
        num_regions=hparams["n_win"],
        topk=hparams["topk"],
        lepe_kernel=hparams.get("side_dwconv", 3),
        qk_dim=hparams.get("qk_dim"),
        padding=ROUTED[case["official_constructor"]],
        routing=routing(hparams),
        kv_pool=kv_pool(hparams),
        output_projection=hparams.get("param_attention", "qkvo") == "qkvo",
    )


def dense_module(case: dict) -> nn.Module:
    hparams, site = case["hparams"], site_of(case)
    bias, source = hparams.get("qkv_bias", False), DENSE[case["official_constructor"]]
    if source is None:
        return softmax_attention(site, qkv_bias=bias)
    return LePEAttention(site, lepe_kernel=hparams["side_dwconv"], lepe_input=source, qkv_bias=bias)


def convert(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names → ours; 1×1 convolutions become linear layers."""
    ours = {}
    for key, value in theirs.items():
        stem, dot, last = key.rpartition(".")
        name = f"{NAMES.get(stem, stem)}.{last}" if dot else NAMES[key]
        ours[name] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    return ours


def block(case: dict) -> Block:
    hparams, (_, dim, height, width) = case["hparams"], case["input_shape"]
    site = Site(dim, hparams.get("num_heads", 8), Grid(height, width), 0, 0, 1, "hierarchical")
    topk = {-2: "all"}.get(hparams["topk"], hparams["topk"])
    return Block(
        dim,
        biformer_attention(site, topk=topk, num_regions=hparams.get("n_win", 7)),
        mlp_ratio=hparams["mlp_ratio"],
        layer_scale=hparams.get("layer_scale_init_value"),
        position=ConvPosition(dim),
        mlp_kernel=3 if hparams.get("mlp_dwconv") else 0,
        post_norm=not hparams.get("pre_norm", True),
    )


def test_the_cases_are_found() -> None:
    assert len(cases(ROUTED)) >= 21
    assert len(cases(DENSE)) >= 3
    assert len(cases(BLOCKS)) >= 5


@pytest.mark.parametrize("name", cases(BLOCKS))
def test_block(name: str) -> None:
    case = reference.info(name)
    grid = Grid(*case["input_shape"][2:])
    parity.check(name, block(case), convert, lambda m, x: to_map(m(to_tokens(x), grid)[0], grid))


@pytest.mark.parametrize("name", cases(ROUTED))
def test_bi_level_routing_attention(name: str) -> None:
    case = reference.info(name)
    grid = site_of(case).grid
    parity.check(
        name, routed_module(case), convert, lambda m, x: in_layout(case, x, grid, lambda x, grid: m(x, grid).x)
    )


@pytest.mark.parametrize("name", cases(ROUTED))
def test_the_routes_are_the_authors(name: str) -> None:
    case = reference.info(name)
    module, grid = routed_module(case), site_of(case).grid
    module.load_state_dict(convert(reference.weights(name)))
    x = reference.model_input(name)
    tokens = x.flatten(1, 2) if case["layout"] == "NHWC" else to_tokens(x)
    routes = module.routes(tokens, grid).sort(dim=-1).values
    np.testing.assert_array_equal(routes.numpy(), reference.arrays(name)["routing_00"])


@pytest.mark.parametrize("name", cases(DENSE))
def test_attention_of_the_last_stage(name: str) -> None:
    case = reference.info(name)
    grid = site_of(case).grid
    parity.check(name, dense_module(case), convert, lambda m, x: in_layout(case, x, grid, lambda x, grid: m(x, grid).x))


def test_the_two_paddings_are_different_functions() -> None:
    """Why both exist: on a map of 13×18 tokens the authors' two codes disagree by far more than rounding."""
    name = next(n for n in cases(ROUTED) if reference.info(n)["layout"] == "NCHW" and "pad" in n)
    case = reference.info(name)
    module, x = routed_module(case), reference.model_input(name)
    module.load_state_dict(convert(reference.weights(name)))
    other = BiLevelRoutingAttention(site_of(case), num_regions=module.num_regions, topk=module.topk)
    other.load_state_dict(module.state_dict())
    grid = site_of(case).grid
    with torch.no_grad():
        assert (module(to_tokens(x), grid).x - other(to_tokens(x), grid).x).abs().max() > 0.1
