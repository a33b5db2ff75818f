"""Rollout, and how shares of tokens are followed through layers and stages."""

import pytest
import reference
import torch

from conf.errors import UserError
from models import create_model
from models.attention import Grid, mixers_of
from models.attention.recording import recorded
from models.checkpoints import convert
from models.probes.deletion import deletion_curve
from models.probes.reading.paths import as_map, followed, followed_back, onto, readers
from models.probes.reading.propagation import propagate
from models.probes.rollout import called, check_heads, fused, rollout_maps

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "patch_size": 8}


def maps_of(model, heads="mean", discard=0.0, stages="last"):
    return rollout_maps(model, IMAGES, followed("rollout", model, stages, stochastic=True), heads, discard)


@pytest.mark.parametrize("name", [name for name in reference.cases() if name.startswith("attribution/")])
def test_the_recorded_map_is_the_product_of_the_relevance_of_matrices(name):
    """What the authors call rollout follows (cam)⁺ + I, not scaled, where cam is the relevance of a layer's matrix."""
    h = reference.info(name)["hparams"]
    shape = {"image_size": h["img_size"], "patch_size": h["patch_size"], "num_classes": h["num_classes"]}
    shape |= {"dim": h["embed_dim"], "depth": h["depth"], "num_heads": h["num_heads"], "mlp_ratio": h["mlp_ratio"]}
    model = create_model("vit_tiny", **shape).eval()
    model.load_state_dict(convert(reference.weights(name), "vit_tiny", **shape))
    image = reference.model_input(name)
    calls = called(model, image, followed("rollout", model, "last"))
    cams = propagate(model, image, torch.tensor([h["class_index"]])).matrices
    mean = {layer: cam.clamp_min(0).mean(1) for layer, cam in zip(calls, cams, strict=True)}
    *_, (layer, reads, grid) = followed_back(
        readers(model, image, Grid(4, 4, 1)), calls, lambda layer, reads: reads + reads @ mean[layer]
    )
    assert layer == "stages.0.blocks.0.attn"
    assert reference.compare(name, "map_rollout", as_map(reads, grid)[:, 0].flatten(1)) < 1e-4


def test_the_map_is_the_row_of_the_product_that_the_classifier_reads():
    model = create_model("vit_32px", **SMALL | {"depth": 3}, class_token=True).eval()
    torch.nn.init.normal_(model.stem.class_token)
    with torch.no_grad(), recorded(model) as calls:
        model(IMAGES)
    product = torch.eye(17)[None]
    for name, mixer in mixers_of(model):
        product = (mixer.attention_matrix(*calls[name]).mean(1) + torch.eye(17)) / 2 @ product
    torch.testing.assert_close(product.sum(-1), torch.ones(2, 17))
    found = maps_of(model)
    torch.testing.assert_close(found.map_BYX.flatten(1), product[:, 0, 1:])
    assert list(found.before) == [name for name, _ in mixers_of(model)][:0:-1]


@pytest.mark.parametrize(
    ("name", "chosen", "stages"),
    [
        ("vit_32px", SMALL, "last"),
        ("vit_32px", SMALL | {"layout": "grid"}, "last"),
        ("swin_32px", {}, "all"),
        ("pvt_32px", {}, "last"),
    ],
    ids=str,
)
def test_shares_sum_to_one_whatever_the_layout(name, chosen, stages):
    model = create_model(name, **chosen).eval()
    found = maps_of(model, "max", stages=stages)
    torch.testing.assert_close(found.map_BYX.sum((1, 2)), torch.ones(2))
    assert (found.map_BYX >= 0).all() and found.map_BYX.shape[1:] == model.grids[0 if stages == "all" else -1][:2]
    assert all(torch.allclose(maps.sum((1, 2)), torch.ones(2)) for maps in found.before.values())


def test_a_class_token_of_the_last_stage_keeps_what_it_has_of_itself():
    model = create_model("pvt_32px", class_token=True).eval()
    found = maps_of(model, stages="all").map_BYX
    assert found.shape[1:] == model.grids[0][:2] and (found.sum((1, 2)) < 0.9).all() and (found > 0).all()


def test_attention_to_oneself_alone_moves_nothing():
    model = create_model("vit_32px", **SMALL).eval()
    for mixer in followed("rollout", model, "last").values():
        mixer.core.bias = Itself()
    torch.testing.assert_close(maps_of(model).map_BYX, torch.full((2, 4, 4), 1 / 16))


class Itself(torch.nn.Module):
    def forward(self, grid, kv_grid):
        return 1e4 * torch.eye(grid.tokens)[None]


def test_between_stages_shares_are_divided_evenly():
    coarse = torch.tensor([[[0.25, 0.75]]])
    fine = onto(coarse, Grid(1, 2), Grid(2, 3))  # the third column stands alone on the padded map
    torch.testing.assert_close(fine, torch.tensor([[[1 / 16, 1 / 16, 3 / 8, 1 / 16, 1 / 16, 3 / 8]]]))
    kept = onto(torch.tensor([[[0.5, 0.5]]]), Grid(1, 1, 1), Grid(1, 2))
    torch.testing.assert_close(kept, torch.tensor([[[0.25, 0.25]]]))  # the token's share is of no cell


def test_heads_become_one_and_the_weakest_weights_are_left_out():
    weights = torch.tensor([[[[0.1, 0.9], [0.6, 0.4]], [[0.3, 0.7], [0.2, 0.8]]]])
    assert fused(weights, "max").tolist() == [[[pytest.approx(0.3), pytest.approx(0.9)], pytest.approx([0.6, 0.8])]]
    assert fused(weights, "min").flatten().tolist() == pytest.approx([0.1, 0.7, 0.2, 0.4])
    torch.testing.assert_close(fused(weights, "mean", 0.5), torch.tensor([[[0.0, 0.8], [0.0, 0.6]]]))
    model = create_model("vit_32px", **SMALL).eval()
    without = maps_of(model, discard=0.9).map_BYX
    torch.testing.assert_close(without.sum((1, 2)), torch.ones(2))
    assert (without - maps_of(model).map_BYX).abs().max() > 1e-3


def test_what_the_classifier_reads():
    grid = Grid(4, 4, 1)
    token = create_model("vit_32px", **SMALL, class_token=True).eval()
    assert readers(token, IMAGES, grid)[:, 0].tolist() == [[1.0] + [0.0] * 16] * 2
    mean = create_model("vit_32px", **SMALL, class_token=True, pool="mean").eval()
    assert readers(mean, IMAGES, grid)[:, 0].tolist() == [[0.0] + [1 / 16] * 16] * 2
    pooled = create_model("vit_32px", **SMALL, pool="simpool").eval()
    reads = readers(pooled, IMAGES, grid._replace(prefix=0))
    torch.testing.assert_close(reads, pooled.forward_pooled(IMAGES).weights.mean(1, keepdim=True))
    assert readers(token, IMAGES, grid, (0.3, 0.6)).argmax(-1).tolist() == [[1 + 4 * 2 + 1]] * 2


@pytest.mark.parametrize(
    ("name", "chosen", "stages", "text"),
    [
        (
            "vit_32px",
            {"attention": "conv"},
            "last",
            r"0.attn \(DepthwiseConv\) has no attention matrix, since .*; choose e.g. probe=normgrad",
        ),
        (
            "vit_32px",
            {"weights": "sigmoid"},
            "last",
            r"has no attention matrix whose rows sum to one; choose e.g. probe=rel",
        ),
        (
            "davit_32px",
            {},
            "all",
            r"blocks.1.attn \(ChannelCore\) has no attention matrix, since the channels of",
        ),
        (
            "vit_32px",
            {"reducer": "top"},
            "last",
            "the tokens that are left make up no map, got a reducer; choose a",
        ),
        ("vit_32px", {}, "first", "probe: stages must be last or all, got 'first'; set probe.stages=last"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(name, chosen, stages, text):
    with pytest.raises(UserError, match=text):
        followed("rollout", create_model(name, **chosen), stages, stochastic=True)


def test_large_maps_and_wrong_options_are_refused():
    model = create_model("vit_32px")
    with pytest.raises(UserError, match=r"flow: a map of at most 9 cells is followed, got 64 in stages.0.bl"):
        followed("flow", model, "last", most=9)
    with pytest.raises(UserError, match=r"probe: heads must be one of mean, max, min, got 'all'; set probe.heads"):
        check_heads("all")
    with pytest.raises(UserError, match=r"probe: discard must be a share from 0 to below 1, got 1; set probe.disc"):
        check_heads("mean", 1)


def test_weights_below_zero_are_no_shares():
    model = create_model("vit_32px", "inline", **SMALL).eval()
    with torch.no_grad():
        dict(mixers_of(model))["stages.2.blocks.0.attn"].qkv.weight.mul_(30)
    text = r"rollout: the weights of stages.2.blocks.0.attn \(InLine\w*\) must be shares, got -\S+ as the smallest and"
    with pytest.raises(UserError, match=text):
        maps_of(model)


def test_a_first_stage_alone_without_a_matrix_can_be_left_out():
    model = create_model("swin_32px").eval()
    dict(mixers_of(model))["stages.1.blocks.0.attn"].has_matrix = False
    with pytest.raises(UserError, match=r"relevance: stages.1.blocks.0.attn \(SoftmaxCore\) .*; set probe.stages=last"):
        followed("relevance", model, "all")
    assert list(followed("relevance", model, "last")) == [f"stages.3.blocks.{i}.attn" for i in range(2)]


@pytest.mark.full
def test_the_digit_is_where_the_map_says(digits_vit):
    model, images, _ = digits_vit
    images = images[:64]
    with torch.no_grad():
        said = model(images).argmax(1)
    found = rollout_maps(model, images, followed("rollout", model, "last"))
    curves = deletion_curve(model, images, said, found.map_BYX)
    assert curves["most"][2] < curves["random"][2] - 0.1 < curves["least"][2] - 0.1
