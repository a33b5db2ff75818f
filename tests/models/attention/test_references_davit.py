"""The two attentions of DaViT, its position encoding and its blocks equal the authors' modules."""

import parity
import pytest
import reference
from torch import Tensor, nn

from models.attention import Grid, Site
from models.attention.dual import dual_attention
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.patch_embed import PatchEmbed
from models.layers.position import ConvPosition

PLACE = "timm.models.davit."
ATTENTIONS = {PLACE + "WindowAttention": 0, PLACE + "ChannelAttention": 1}
BLOCKS = {PLACE + "SpatialBlock": 0, PLACE + "ChannelBlock": 1}
POSITION = {PLACE + "ConvPosEnc"}
EMBEDDINGS = {PLACE + "PatchEmbed"}
NAMES = {"cpe.0": "position", "cpe.1": "mlp_position"}


def cases(constructors) -> list[str]:
    return [n for n in reference.cases("module") if reference.info(n).get("official_constructor") in constructors]


def mixer(hparams: dict, grid: Grid, block: int) -> nn.Module:
    site = Site(hparams["dim"], hparams["num_heads"], grid, 0, block, 2, "hierarchical")
    return dual_attention(site, window=hparams.get("window_size", 7), cpe_kernel=0, qkv_bias=hparams["qkv_bias"])


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names → ours: `cpe.0.proj.weight` → `position.proj.weight`."""
    ours = {}
    for key, value in theirs.items():
        prefix = ".".join(key.split(".")[:2])
        ours[key.replace(prefix, NAMES.get(prefix, prefix), 1)] = value
    return ours


def test_the_cases_are_found() -> None:
    assert len(cases(ATTENTIONS)) >= 6
    assert len(cases(BLOCKS)) >= 12
    assert len(cases(POSITION)) >= 1
    assert len(cases(EMBEDDINGS)) >= 3


@pytest.mark.parametrize("name", cases(ATTENTIONS))
def test_attention(name: str) -> None:
    case = reference.info(name)
    tokens = case["input_shape"][1]
    side = case["hparams"].get("window_size", (1, tokens))
    grid = Grid(side[0], tokens // side[0])
    module = mixer(case["hparams"], grid, ATTENTIONS[case["official_constructor"]])
    parity.check(name, module, dict, lambda m, x: m(x, grid).x)


@pytest.mark.parametrize("name", cases(BLOCKS))
def test_block(name: str) -> None:
    case = reference.info(name)
    hparams, (_, height, width, dim) = case["hparams"], case["input_shape"]
    grid = Grid(height, width)
    ratio = hparams["mlp_ratio"] if hparams.get("ffn", True) else 0
    module = Block(
        dim,
        mixer(hparams, grid, BLOCKS[case["official_constructor"]]),
        mlp_ratio=ratio,
        norm_eps=1e-5,
        position=ConvPosition(dim),
        mlp_position=ConvPosition(dim),
    )
    parity.check(name, module, renamed, lambda m, x: m(x.flatten(1, 2), grid)[0])


@pytest.mark.parametrize("name", cases(POSITION))
def test_position_encoding(name: str) -> None:
    case = reference.info(name)
    grid = Grid(*case["input_shape"][1:3])
    module = ConvPosition(case["hparams"]["dim"], case["hparams"]["k"])
    parity.check(name, module, dict, lambda m, x: m(x.flatten(1, 2), grid))


@pytest.mark.parametrize("name", cases(EMBEDDINGS))
def test_patch_embedding(name: str) -> None:
    case = reference.info(name)
    hparams, shape = case["hparams"], case["input_shape"]
    dims = hparams["in_chans"], hparams["embed_dim"]
    if hparams["patch_size"] == 4:
        stem = PatchEmbed(*dims, 4, kernel_size=7, padding=3, norm=nn.LayerNorm(dims[1]))
        return parity.check(name, stem, dict, lambda m, x: m(x)[0])
    between = ConvDownsample(*dims, kernel_size=3 if hparams.get("overlapped") else 2, norm=nn.LayerNorm(dims[0]))
    grid = Grid(*shape[1:3])
    parity.check(
        name,
        between,
        lambda theirs: {key.replace("proj", "conv"): value for key, value in theirs.items()},
        lambda m, x: m(x.flatten(1, 2), grid)[0],
    )
