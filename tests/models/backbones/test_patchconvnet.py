"""PatchConvNet: its block and stem as the authors', files in their names, its pool and others, its sites."""

import copy

import parity
import pytest
import reference
import torch

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.patch_conv import PatchConv
from models.backbones.patchconvnet import PatchConvNet, stem_of
from models.checkpoints import convert, export, fitting, settings_of
from models.checkpoints.names.patchconvnet import LAYOUTS
from models.factory import compose_model
from models.layers.stem import widths_of
from models.pools.attention_aggregation import AttentionAggregation

TABLE = {name: row for name, row in families.models().items() if row["family"] == "patchconvnet"}
ROWS = {name: row for name, row in TABLE.items() if row["size"] != "32px"}
MILLIONS = {"s60": 25.231096, "s120": 47.723896, "b60": 99.388936, "s60_multi": 25.614712}  # of the authors' code
GIGA = {"s60": 3.980, "s120": 7.493, "b60": 15.8, "b120": 29.8, "s60_multi": 5.308}
SHORT = {"dim": 32, "depth": 4, "num_heads": 2}
BLOCK, THEIRS = "stages.0.blocks.0.", "blocks.0."


def cases(constructor: str) -> list[str]:
    name = f"patchconvnet_models.{constructor}"
    return [n for n in reference.cases("module") if reference.info(n).get("official_constructor") == name]


def small(attention=PatchConv, **options) -> PatchConvNet:
    given = {"dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8, "aggregation": AttentionAggregation} | options
    return PatchConvNet(attention, (32, 40), 5, **given)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def test_the_cases_are_found():
    assert cases("Layer_scale_init_Block") and cases("ConvStem")


@pytest.mark.parametrize("name", cases("Layer_scale_init_Block"))
def test_the_block_equals_the_authors(name):
    _, tokens, dim = reference.info(name)["input_shape"]
    side = round(tokens**0.5)
    block = small(dim=dim, num_heads=1).stages[0].blocks[0]
    convert = parity.through(LAYOUTS[0], block, BLOCK, THEIRS)
    parity.check(name, block, convert, lambda block, x: block(x, Grid(side, side))[0])


@pytest.mark.parametrize("name", cases("ConvStem"))
def test_the_stem_equals_the_authors(name):
    hparams = reference.info(name)["hparams"]
    stem = stem_of([3, *widths_of("", hparams.get("patch_size", 16), hparams["embed_dim"])])
    convert = parity.through(LAYOUTS[0], stem, "stem.", "patch_embed.")
    parity.check(name, stem, convert, lambda stem, x: stem(x)[0])


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_multiply_adds(name):
    size, counted = ROWS[name]["size"], ROWS[name]["counted"]
    if size in MILLIONS:
        assert counted["parameters"] == round(MILLIONS[size] * 1e6)
    if size in GIGA:
        assert counted["multiply_adds"] / 1e9 == pytest.approx(GIGA[size], rel=2e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "patchconvnet_s60" else pytest.mark.full) for n in ROWS]
)
def test_every_size_has_the_authors_names(name):
    """Both ways; S60 has exactly those of the authors' code, with a query for each class there are 1000 heads."""
    with torch.device("meta"):
        ours = create_model(name).state_dict()
    file = export(ours, name)
    shapes = {key: [*value.shape] for key, value in file.items()}
    if name == "patchconvnet_s60":
        assert shapes == {key: shape for key, (shape, _) in reference.info(f"patchconvnet/{name}")["state"].items()}
    if name.endswith("_multi"):
        assert shapes["cls_token"] == [1, 1000, 384] and shapes["head.999.weight"] == [1, 384]
    back = convert({"model": file}, name, num_classes=1000)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in ours.items()}


@pytest.mark.parametrize("name", ["patchconvnet_s60", "patchconvnet_s60_multi"])
def test_a_round_trip_gives_the_same_bits(name):
    torch.manual_seed(0)
    state = create_model(name, **SHORT).state_dict()
    file = export(state, name, **SHORT)
    back = convert(file, name, num_classes=1000, **SHORT)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    assert fitting.best(list(fitting.tables(name, SHORT)), file).layout is LAYOUTS[int(name.endswith("multi"))]


def test_heads_of_other_classes():
    """Ours may have any number, and so may one head for all of theirs; of their classifiers for each there are 1000."""
    state = create_model("patchconvnet_s60_multi", num_classes=7, **SHORT).state_dict()
    back = convert(state, "patchconvnet_s60_multi", num_classes=7, **SHORT)
    assert back["pooling.class_queries"].shape == (7, 32)
    with pytest.raises(ValueError, match=r"convert: the file must have 9 classes, got 7; fine-tune it, or evaluate"):
        convert(state, "patchconvnet_s60_multi", num_classes=9, **SHORT)
    text = r"export: head.0.weight and 999 more of theirs are one weight .* of 1000 rows, got 7; export a model with"
    with pytest.raises(ValueError, match=text):
        export(state, "patchconvnet_s60_multi", **SHORT)


def test_a_stored_run_knows_its_aggregation():
    cfg = compose_model("patchconvnet_32px")
    cfg.model.aggregation.queries = "classes"
    config = {"run": {"model": "patchconvnet_32px", "attention": "patch_conv"}}
    config |= {"model": {"aggregation": dict(cfg.model.aggregation)}, "attention": dict(cfg.attention)}
    settings = settings_of(config)
    assert settings["aggregation"]["queries"] == "classes"
    model = create_model("patchconvnet_32px", num_classes=5, **settings)
    assert model.pooling.per_class and model(images(32, 32)).shape == (2, 5)


def test_its_own_pool_and_others():
    """Another pool gets normalised tokens; the same one is the same model."""
    own = create_model("patchconvnet_32px", num_classes=5)
    assert own.pooling.scale1.gamma.eq(1).all(), "of the row, not of the group"
    named = create_model("patchconvnet_32px", num_classes=5, pool="attention_aggregation")
    assert own.state_dict().keys() == named.state_dict().keys() and type(own.norm) is torch.nn.Identity
    assert own.forward_pooled(images(32, 40)).weights.shape == (2, 1, 80)
    mean = create_model("patchconvnet_32px", num_classes=5, pool="mean").eval()
    gone = {key for key in own.state_dict() if key.startswith("pooling.")}
    assert mean.state_dict().keys() ^ own.state_dict().keys() == gone | {"norm.weight", "norm.bias"}
    tokens = mean.forward_features(images(32, 32))
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 64), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mean(images(32, 32)), mean.head(tokens.mean(1)))


def test_the_order_of_patches_does_not_matter_to_the_aggregation():
    model = create_model("patchconvnet_32px", num_classes=5).eval()
    tokens, grid, _ = model.forward_tokens(images(32, 32))
    shuffled = tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(model.classify(shuffled, grid), model.classify(tokens, grid))


def test_drop_path_is_the_same_in_all_blocks():
    rates = [m.drop_prob for m in small(drop_path=0.1).modules() if type(m).__name__ == "DropPath"]
    assert rates == [0.1] * 4


def test_its_sites_and_pyramid(recorder):
    model = small(recorder)
    assert {(site.dim, site.num_heads, site.grid, site.kind, site.depth) for site in recorder.sites} == {
        (32, 2, Grid(4, 5), "vit", 4)
    }
    assert [m.shape for m in model.forward_pyramid(images(32, 40))] == [(2, 32, 4, 5)] * 4


def test_what_does_not_decay():
    assert small().no_weight_decay() == {"pooling.queries"}
    assert create_model("patchconvnet_s60_multi", **SHORT).no_weight_decay() == {"pooling.class_queries"}


def test_products_start_as_the_1x1_convolutions_of_the_authors():
    """Uniformly below 1 / √C, biases too; those of a mechanism that does not say so start as everywhere."""
    torch.manual_seed(0)
    attn = create_model("patchconvnet_s60", depth=4).stages[0].blocks[0].attn
    for linear in (attn.proj_in, attn.proj):
        assert 0.98 * 384**-0.5 < linear.weight.abs().max() <= 384**-0.5 and linear.bias.any()
    softmax = create_model("patchconvnet_s60", "softmax", depth=4).stages[0].blocks[0].attn
    assert softmax.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_it_is_recomputed_to_the_same_gradients():
    torch.manual_seed(0)
    model = create_model("patchconvnet_32px", num_classes=5).train()
    other = copy.deepcopy(model)
    other.set_gradient_checkpointing(True)
    for one in (model, other):
        one(images(32, 32)).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"patch_size": 12},
            r"PatchConvNet: patch_size must be a power of two from 2, got 12; set model.patch_s",
        ),
        (
            {"dim": 30},
            r"PatchConvNet: 3 convolutions double the channels up to a multiple of 4, got dim=30; cha",
        ),
        ({"depth": 0}, r"PatchConvNet: depth must be a whole number of at least 1, got 0; set model.depth"),
        ({"drop_path": 1.0}, r"drop_path: must be a probability in \[0, 1\), got 1.0; set model.drop_path"),
    ],
)
def test_what_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        small(**options)


def test_blocks_without_an_mlp_have_no_activation_to_set():
    with pytest.raises(ValueError, match=r"PatchConvNet: no block has an MLP, got activation=relu; set model.activ"):
        create_model("patchconvnet_32px", activation="relu")
