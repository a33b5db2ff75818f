"""The contract between backbones and mechanisms: sites in, mixers or one error with every misfit out."""

from functools import partial

import pytest
import torch
from torch import nn

from models import list_attentions
from models.attention import Accepts, Grid, Mixed, Mixer, Refused, Site, build, check
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention
from models.factory import compose_model, instantiate

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 6), stage=0, block=0, depth=2, kind="hierarchical")


class Plain(Mixer):
    """Takes maps without class tokens, in two kinds of backbone."""

    accepts = Accepts(prefix="refused", kinds=frozenset({"hybrid", "hierarchical"}))

    def forward(self, x_BNC, grid, gates_BNM=None):
        return Mixed(x_BNC, {})


def test_grids_count_their_tokens():
    assert Grid(4, 6).tokens == Grid(4, 6).cells == 24
    assert Grid(4, 6, prefix=2).tokens == 26 and Grid(4, 6, prefix=2).cells == 24


def test_one_factory_serves_all_stages_and_a_list_one_each():
    sites = [SITE._replace(stage=stage, block=block) for stage in (0, 1) for block in (0, 1)]
    assert len(build(Plain, sites)) == 4
    windows = [mixer.window for mixer in build([partial(softmax_attention, window=2), softmax_attention], sites)]
    assert windows == [(2, 2), (2, 2), None, None]
    with pytest.raises(ValueError, match=r"the list has 1 entries, the backbone has 2 stages; give one per stage"):
        build([Plain], sites)


def test_every_misfit_is_listed_at_once():
    def fussy(site):
        if site.stage == 1:
            raise Refused("it needs 3 heads", "set model.num_heads=3")
        return Plain(site)

    tokens = Grid(4, 6, prefix=1)
    sites = [SITE._replace(block=block, grid=tokens) for block in (0, 1)] + [SITE._replace(stage=1, kind="vit")]
    with pytest.raises(ValueError) as error:
        build(fussy, sites)
    assert str(error.value).splitlines() == [
        "attention: 3 of 3 places cannot take the chosen mechanism:",
        "  stage 0 blocks 0-1 (dim 16, heads 2, grid 4x6+1, hierarchical): it works on the map alone and cannot take "
        "the 1 class token(s) in front of it; set model.class_token=false",
        "  stage 1 block 0 (dim 16, heads 2, grid 4x6, vit): it needs 3 heads; set model.num_heads=3",
    ]


def test_the_kind_of_backbone_is_checked():
    with pytest.raises(Refused, match=r"backbone of kind vit; choose a model of kind hierarchical or hybrid"):
        check(Plain(SITE), SITE._replace(kind="vit"))
    with pytest.raises(Refused, match=r"Linear is no `Mixer`, so it is not an attention mechanism"):
        check(nn.Linear(1, 1), SITE)


@pytest.mark.parametrize("name", list_attentions())
@pytest.mark.parametrize("grid", [Grid(8, 8), Grid(7, 10), Grid(1, 5)], ids=str)
def test_every_mechanism_keeps_the_contract(name, grid):
    """Same shape out as in, on the map it was built for and on another, in float32 and under bfloat16 autocast."""
    factory = instantiate(compose_model("vit_32px", name).attention)
    for block in (0, 1):
        site = Site(dim=32, num_heads=4, grid=Grid(8, 8), stage=0, block=block, depth=2, kind="hierarchical")
        (mixer,) = build(factory, [site])
        x = torch.randn(2, grid.tokens, 32)
        for mode in (mixer.train(), mixer.eval()):
            mixed = mode(x, grid)
            assert mixed.x.shape == x.shape and mixed.x.isfinite().all()
            assert all(loss.shape == () and loss.requires_grad for loss in mixed.losses.values())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mixer(x, grid).x.isfinite().all()


@pytest.mark.parametrize("name", list_attentions())
def test_gates_weight_whole_heads(name):
    """Gates of one change nothing; gates of zero leave only what the output projection adds by itself.

    What takes none says why, and is refused to what would gate it.
    """
    factory = instantiate(compose_model("vit_32px", name).attention)
    site = Site(dim=32, num_heads=4, grid=Grid(8, 8), stage=0, block=0, depth=2, kind="hierarchical")
    (mixer,) = build(factory, [site])
    mixer.eval()
    assert mixer.accepts.gates == (not mixer.accepts.without_gates)
    if not mixer.accepts.gates:
        with pytest.raises(Refused, match=f"moh cannot gate the heads of .*: {mixer.accepts.without_gates}; choose "):
            MoHAttention(site, core=factory)
        return
    x, ones = torch.randn(2, 64, 32), torch.ones(2, 64, 4)
    torch.testing.assert_close(mixer(x, site.grid, ones).x, mixer(x, site.grid).x)
    silent = mixer(x, site.grid, 0 * ones).x
    torch.testing.assert_close(silent, silent[:1, :1].expand_as(silent))
