"""CSWin: the sizes of the paper, its convolutions, where its mixers go."""

import pytest
import torch
import torch.nn.functional as F

from conf import families
from models.attention import Grid
from models.backbones.cswin import CSWin
from models.layers.tokens import to_map, to_tokens

# parameters and billions of multiply-adds at 224 pixels; table 2 of the paper has 23, 35 and 78 M, 4.3, 6.9 and 15.0 G.
# With FLatten's attention in the first two stages the small one is what FLatten's code counts, 35_451_752 and 6.78 G,
# which its paper gives as 35 M and 6.9 G too.
SIZES = {
    "cswin_tiny": (22_320_552, 4.3),
    "cswin_small": (34_643_304, 6.8),
    "cswin_base": (77_382_184, 15.0),
}
SHAPE = {"dims": (8, 16), "depths": (1, 2), "num_heads": (2, 4)}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds(name):
    """As recorded, which tests/models/test_tables.py counts."""
    counted = families.models()[name]["counted"]
    assert (counted["parameters"], round(counted["multiply_adds"] / 1e9, 1)) == SIZES[name]


@pytest.mark.parametrize("size", [(32, 32), (48, 36), (35, 41)])
@torch.no_grad()
def test_convolutions_come_before_their_norms(recorder, size):
    """Section 3.1 step by step; odd images have zeros at the bottom and right up to whole cells."""
    torch.manual_seed(0)
    model, images = CSWin(recorder, 32, 5, **SHAPE).eval(), torch.randn(2, 3, *size)
    first, between, (height, width) = model.stem.patch_embed, model.stages[1].downsample, size
    x = F.pad(images, (0, -width % 4, 0, -height % 4))
    x = F.conv2d(x, first.proj.weight, first.proj.bias, stride=4, padding=2)
    grid = Grid(-(-height // 4), -(-width // 4))
    assert x.shape[2:] == grid[:2]
    tokens, _ = model.stages[0].blocks[0](first.norm(to_tokens(x)), grid)
    x = F.conv2d(to_map(tokens, grid), between.conv.weight, between.conv.bias, stride=2, padding=1)
    grid = Grid(*x.shape[2:])
    tokens = between.out_norm(to_tokens(x))
    for block in model.stages[1].blocks:
        tokens, _ = block(tokens, grid)
    torch.testing.assert_close(model(images), model.head(model.norm(tokens).mean(1)), rtol=1e-4, atol=1e-5)


def test_sites_tell_where_a_mixer_goes(recorder):
    CSWin(recorder, (64, 100), 5, **SHAPE)
    assert [(site.dim, site.num_heads, site.grid) for site in recorder.sites] == [
        (8, 2, Grid(16, 25)),
        (16, 4, Grid(8, 13)),
        (16, 4, Grid(8, 13)),
    ]
    assert {site.kind for site in recorder.sites} == {"hierarchical"}


def test_lists_of_unequal_length_are_refused(recorder):
    with pytest.raises(ValueError, match=r"CSWin: .*differ in length, got .*'depths': 3.*; give as many of each"):
        CSWin(recorder, 32, 5, dims=(8, 16), depths=(1, 1, 1), num_heads=(2, 2))
