"""What is added to the heads: the recorded case of local concentration, and where each convolution reaches."""

import re

import parity
import pytest
import reference
import torch

from models.attention import Grid, Site
from models.attention.values.depthwise import depthwise
from models.attention.values.dynamic import dynamic
from models.attention.values.lepe import lepe
from models.attention.values.local_concentration import local_concentration

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
PARTS = {"lepe": lepe, "depthwise": depthwise, "dynamic": dynamic, "local_concentration": local_concentration}


@pytest.mark.parametrize("name", [name for name in reference.cases("module") if name.startswith("l2vit/lcm")])
def test_local_concentration(name):
    _, height, width, dim = reference.info(name)["input_shape"]
    grid = Grid(height, width)
    module = local_concentration(Site(dim, 1, grid, 0, 0, 1, "hierarchical"))
    known = set(module.state_dict())

    def state(theirs):
        ours = {key: value for key, value in theirs.items() if key in known}
        return {"bn.num_batches_tracked": torch.tensor(0)} | ours

    parity.check(name, module, state, lambda module, x: module(x.flatten(1, 2)[:, None], grid, grid)[:, 0])


@pytest.mark.parametrize("name", PARTS)
def test_prefix_tokens_take_no_part_and_smaller_maps_are_enlarged(name):
    part = PARTS[name](SITE).eval()
    grid = SITE.grid._replace(prefix=1)
    v = torch.randn(2, 2, 21, 8)
    o = part(v, grid, grid)
    assert o.shape == v.shape and not o[:, :, 0].any() and o[:, :, 1:].any()
    assert part(torch.randn(2, 2, 4, 8), Grid(2, 2), grid).shape == v.shape


@pytest.mark.parametrize(("name", "reach"), [("lepe", 1), ("depthwise", 2), ("local_concentration", 6)])
def test_convolutions_reach_as_far_as_their_kernel(name, reach):
    grid = Grid(1, 15)
    part = PARTS[name](SITE._replace(grid=grid)).eval()
    v = torch.randn(1, 2, 15, 8, requires_grad=True)
    part(v, grid, grid)[0, 0, 7].sum().backward()
    seen = v.grad.abs().sum((0, 1, 3)) > 0
    assert seen.nonzero().flatten().tolist() == list(range(7 - reach, 8 + reach))
    assert not v.grad[0, 1].any()  # nor into another head


def test_all_heads_share_a_depthwise_convolution():
    part = depthwise(SITE)
    v = torch.randn(2, 2, 20, 8)
    torch.testing.assert_close(part(v.flip(1), SITE.grid, SITE.grid), part(v, SITE.grid, SITE.grid).flip(1))


def test_every_image_makes_its_own_dynamic_weights():
    part = dynamic(SITE)
    v = torch.randn(2, 2, 20, 8)
    o = part(v, SITE.grid, SITE.grid)
    torch.testing.assert_close(part(v[:1], SITE.grid, SITE.grid), o[:1])
    assert not torch.allclose(part(2 * v, SITE.grid, SITE.grid), 2 * o)  # of degree above 1 in the values


@pytest.mark.parametrize("part", [lepe, depthwise, local_concentration])
def test_wrong_options_are_named(part):
    text = f"{part.__name__}: kernel_size must be odd and positive, got 4; set attention.value.kernel_size"
    with pytest.raises(ValueError, match=re.escape(text)):
        part(SITE, kernel_size=4)
