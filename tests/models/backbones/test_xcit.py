"""XCiT: equal to timm's with the same weights; the sizes of the paper; stem, class attention, and what goes without."""

from functools import partial

import pytest
import timm
import torch
from timm.models.xcit import Xcit

from conf import families
from models import create_model
from models.attention import Grid, Site
from models.attention.cores.xca import xca_attention
from models.backbones.xcit import XCiT
from models.checkpoints import convert, export, fitting
from models.probes.reading.paths import followed
from tests.models.backbones import oracle

ROWS = {name: row for name, row in families.models().items() if row["family"] == "xcit" and row["size"] != "32px"}
GIGA = {  # multiply-adds of timm's models at 224 pixels, products and convolutions
    "nano_12_p16": 0.551, "nano_12_p8": 2.134, "tiny_12_p16": 1.230, "tiny_12_p8": 4.771, "tiny_24_p16": 2.322,
    "tiny_24_p8": 9.139, "small_12_p16": 4.796, "small_12_p8": 18.619, "small_24_p16": 9.061, "small_24_p8": 35.678,
    "medium_24_p16": 16.084, "medium_24_p8": 63.346, "large_24_p16": 35.787, "large_24_p8": 140.957,
}  # fmt: skip
SHORT = {"depth": 2, "dim": 32, "num_heads": 4}
small = partial(XCiT, xca_attention, 32, 5, patch_size=8, dim=32, depth=4, num_heads=4)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def short(patch_size: int, tokens_norm: bool = True) -> Xcit:
    return Xcit(patch_size=patch_size, embed_dim=32, depth=2, num_heads=4, tokens_norm=tokens_norm)


@pytest.mark.parametrize(
    ("name", "size", "at"),
    [
        ("xcit_tiny_12_p16", 96, None),
        ("xcit_nano_12_p16", 64, (100, 72)),
        pytest.param("xcit_small_12_p8", 224, None, marks=pytest.mark.full),
        pytest.param("xcit_nano_12_p8", 64, (72, 40), marks=pytest.mark.full),
    ],
)
def test_equals_timm(name, size, at):
    """Sizes that patches do not divide are rounded up."""
    model = families.models()[name]["model"]
    theirs = short(model["patch_size"], model.get("tokens_norm", True))
    oracle.equal(name, theirs, size, at=at, **SHORT)


@pytest.mark.parametrize("name", ROWS)
def test_multiply_adds(name):
    assert ROWS[name]["counted"]["multiply_adds"] / 1e9 == pytest.approx(GIGA[ROWS[name]["size"]], rel=0.01)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "xcit_nano_12_p8" else pytest.mark.full) for n in ROWS]
)
def test_the_whole_size_has_timms_names_and_parameters(name):
    """Names and shapes both ways, and the settings that have neither."""
    with torch.device("meta"):
        theirs = timm.create_model(f"{name}_224")
        ours = create_model(name)
    learned = sum(parameter.numel() for parameter in theirs.parameters())
    assert ROWS[name]["counted"]["parameters"] == learned
    converted = convert(theirs.state_dict(), name, num_classes=1000)
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert _starts(name) == {families.models()[name]["model"]["layer_scale"]}
    assert theirs.cls_attn_blocks[0].tokens_norm == ours.class_stage.blocks[0].tokens_norm


def _starts(name: str) -> set[float]:
    """What timm's layer scales begin with."""
    model = timm.create_model(f"{name}_224", embed_dim=8, num_heads=1, depth=1)
    return {float(f"{p.detach().flatten()[0]:.1g}") for key, p in model.named_parameters() if "gamma" in key}


def test_the_authors_names():
    """Theirs have the queries, keys and values of class attention in one, and another name for the position."""
    ours = create_model("xcit_nano_12_p16", num_classes=5, **SHORT).state_dict()
    theirs = export(ours, "xcit_nano_12_p16", **SHORT)
    assert theirs["cls_attn_blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert theirs["pos_embeder.token_projection.weight"].shape == (32, 64, 1, 1)
    wanted = {"cls_token", "blocks.1.gamma3", "blocks.0.local_mp.bn.running_var", "blocks.1.attn.temperature"}
    assert wanted <= set(theirs)
    back = convert(theirs, "xcit_nano_12_p16", **SHORT)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], value) for key, value in ours.items())
    tables = list(fitting.tables("xcit_nano_12_p16", SHORT))
    assert fitting.best(tables, theirs).layout.source == "facebookresearch/xcit"


def test_sites_and_pyramid(recorder):
    model = XCiT(recorder, (32, 40), 5, patch_size=8, dim=16, depth=6, num_heads=2)
    assert {site._replace(block=0) for site in recorder.sites} == {
        Site(16, 2, Grid(4, 5), 0, 0, 6, "vit", positioned=True, image_size=(32, 40))
    }
    assert [m.shape for m in model.forward_pyramid(images(32, 40))] == [(2, 16, 4, 5)] * 4
    assert model.forward_features(images(32, 40)).shape == (2, 1 + 20, 16)


def test_the_class_token_decides_or_the_mean():
    model = small().eval()
    tokens, grid, _ = model.forward_tokens(images(32, 32))
    assert grid == Grid(4, 4, prefix=1) == model.pooled_grid
    torch.testing.assert_close(model(images(32, 32)), model.head(tokens[:, 0]))
    model = small(class_token=False).eval()
    tokens, grid, _ = model.forward_tokens(images(32, 32))
    assert grid == Grid(4, 4) == model.pooled_grid and not any("class" in name for name in model.state_dict())
    torch.testing.assert_close(model(images(32, 32)), model.head(tokens.mean(1)))


def test_drop_path_is_the_same_in_all_blocks():
    model = small(drop_path=0.1)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates == [0.1] * 8  # of attention and MLP, and of the patches between them
    assert not any("drop_path" in name for name, _ in model.class_stage.named_modules())


def test_what_does_not_decay():
    """As in the authors' training, which asks the model alone: their XCA's own list is not read."""
    assert small().no_weight_decay() == {"class_stage.downsample.class_token"}


def test_the_class_attention_is_recomputed_too():
    model, calls = small().train(), []
    model.class_stage.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model.set_gradient_checkpointing(True)
    model(images(32, 32)).sum().backward()
    assert len(calls) == 2


def test_norms_and_activations_of_all_blocks():
    settings = {"depth": 4, "dim": 32, "num_classes": 5}
    model = create_model("xcit_32px", norm="rmsnorm", activation="relu", **settings)
    of_blocks = [*model.stages.modules(), *model.class_stage.modules(), model.norm]
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in of_blocks)
    assert not any(isinstance(module.act, torch.nn.GELU) for module in of_blocks if hasattr(module, "act"))
    model(images(32, 32)).sum().backward()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"patch_size": 12}, r"XCiT: patch_size must be a power of two from 2, got 12; set model.patch_size=16"),
        ({"patch_size": 1}, r"XCiT: patch_size must be a power of two from 2, got 1; set"),
        (
            {"dim": 36, "patch_size": 16},
            r"XCiT: 4 convolutions double the channels up to a multiple of 8, got dim=36; change model.dim or",
        ),
        ({"class_depth": 0}, r"XCiT: class_depth must be a whole number of at least 1, got 0; set model.class_depth"),
        ({"tokens_norm": "all"}, r"XCiT: tokens_norm must be true or false, got 'all'; set model.tokens_norm=true or"),
        ({"drop_path": 1.5}, r"drop_path: must be a probability in \[0, 1\), got 1.5; set model.drop_path"),
        ({"wiring": "parallel"}, r"XCiT: its blocks have .* a position encoding between .*, got wiring=parallel; set"),
    ],
)
def test_what_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        small(**settings)


def test_a_pool_of_the_map_goes_without_class_attention():
    with pytest.raises(
        ValueError, match=r"pool: the class attention of XCiT ends in a class token, got SimPool, which"
    ):
        create_model("xcit_32px", pool="simpool")
    assert create_model("xcit_32px", pool="class_token")(images(32, 32)).isfinite().all()
    create_model("xcit_32px", pool="simpool", class_token=False)(images(32, 32)).sum().backward()


def test_what_class_attention_reads_is_not_followed():
    softmax = create_model("xcit_32px", attention="softmax")
    with pytest.raises(ValueError, match=r"rollout: behind the last layer class attention reads .*, got XCiT; choose"):
        followed("rollout", softmax, "last", stochastic=True)
    assert len(followed("rollout", create_model("xcit_32px", "softmax", class_token=False), "last")) == 4


def test_tokens_cannot_be_dropped_where_patches_meet():
    text = r"reducer: behind it tokens make up no map, which the position needs, got it in block 0 of quarter"
    with pytest.raises(ValueError, match=text):
        create_model("xcit_32px", reducer="top")
