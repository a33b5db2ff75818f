"""NiNformer: one norm for both branches, the authors' parameters and names, its sites."""

import copy

import pytest
import torch

from models import create_model
from models.attention import Grid, mixers_of
from models.checkpoints import convert, export

SHORT = {"dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
BLOCK = [
    "norm",
    *(f"mgu.Mixer.{name}" for name in ("token_mix.0", "token_mix.2.net.0", "token_mix.2.net.3")),
    *(f"mgu.Mixer.{name}" for name in ("channel_mix.0", "channel_mix.1.net.0", "channel_mix.1.net.3")),
    *("mgu.proj", "ffn.net.0", "ffn.net.3"),
]


def small(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("ninformer_32px", **SHORT | options)


@torch.no_grad()
def test_both_branches_of_a_block_have_the_norm():
    model = small().double().eval()
    block, grid = model.stages[1].blocks[0], model.grids[0]
    block.norm1.weight.normal_()
    x = torch.randn(2, grid.tokens, 32, dtype=torch.float64)
    between = x + block.attn(block.norm1(x), grid).x
    torch.testing.assert_close(block(x, grid)[0], between + block.mlp(block.norm1(between)))
    assert block.norm2 is None and not [name for name, _ in block.named_parameters() if "norm2" in name]


def test_its_gradient_is_the_sum_of_those_of_two_norms_alike():
    block, x, grid = small().stages[1].blocks[0].double(), torch.randn(2, 64, 32, dtype=torch.float64), Grid(8, 8)
    block(x, grid)[0].square().sum().backward()
    other = copy.deepcopy(block)
    other.norm2 = copy.deepcopy(block.norm1)
    other.zero_grad()
    other(x, grid)[0].square().sum().backward()
    both = other.norm1.weight.grad, other.norm2.weight.grad
    torch.testing.assert_close(block.norm1.weight.grad, sum(both))
    assert all(grad.abs().sum() > 0 for grad in both)


def test_the_network_for_cifar_has_the_parameters_of_the_authors_code():
    with torch.device("meta"):
        model = create_model("ninformer_32px", dim=256, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 2_652_170


def test_it_has_the_authors_names_both_ways():
    state = small().state_dict()
    file = export(state, "ninformer_32px", **SHORT)
    modules = ["patcher", "classifier", *(f"model.{block}.{name}" for block in range(4) for name in BLOCK)]
    assert set(file) == {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    back = convert(file, "ninformer_32px", **SHORT)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_a_file_for_other_images_has_its_mlps_over_tokens_resized():
    file = export(small(image_size=16).state_dict(), "ninformer_32px", **SHORT, image_size=16)
    model = small()
    with pytest.warns(UserWarning, match="token_mlp"):
        model.load_state_dict(convert(file, "ninformer_32px", **SHORT))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), small(image_size=16)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_another_norm_is_shared_too(norm):
    model = small(norm=norm)
    assert all(block.norm2 is None for stage in model.stages for block in stage.blocks)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_its_mixers_know_where_they_are():
    sites = [mixer.site for _, mixer in mixers_of(small())]
    assert [(site.block, site.depth, site.kind, site.grid[:2]) for site in sites] == [
        (b, 4, "vit", (8, 8)) for b in range(4)
    ]


@pytest.mark.parametrize("key", ["patch_size", "dim", "depth", "num_heads"])
def test_counts_that_are_none_are_refused(key):
    with pytest.raises(
        ValueError, match=rf"NiNformer: {key} must be a whole number of at least 1, got 0; set model.{key}"
    ):
        small(**{key: 0})
