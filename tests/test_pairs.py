"""Every attention in every kind of backbone, on square and wide images: it trains, or it is refused with the fix.

`make test` has every attention in a hierarchical backbone and in one of another kind, in turn, and four attentions that
differ in what a backbone notices in every backbone, on wide images; `make test-all` has these on square images too, and
a step of the other pairs on wide ones. `python tests/test_pairs.py` prints the matrix.
"""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conf import families
from conf.names import CONF
from models import create_model, list_attentions
from models.attention import KINDS, Grid, Site, build
from models.factory import compose_model, factory, instantiate

MODELS = families.small()
SHAPES = {"square": (32, 32), "wide": (32, 64)}
# the kinds that a mechanism can tell apart, the hierarchical one with pairs of blocks in four stages
BY_KIND = {"vit": "vit_32px", "hierarchical": "swin_32px", "convnet": "convnext_32px", "hybrid": "coatnet_32px"}
# what a backbone may handle wrongly: maps without class tokens, losses, windows with padding, and tokens in no order
REPRESENTATIVES = {"refuses class tokens": "biformer", "losses": "moh", "windows": "window", "linear": "inline"}


def chosen(model: str, attention: str) -> list:
    others = [name for kind, name in BY_KIND.items() if kind != "hierarchical"]
    turn = others[list_attentions().index(attention) % len(others)]
    quick = model in (BY_KIND["hierarchical"], turn) or attention in REPRESENTATIVES.values()
    return [] if quick else [pytest.mark.full]


PAIRS = [pytest.param(m, a, id=f"{m}-{a}", marks=chosen(m, a)) for m in MODELS for a in list_attentions()]
QUICK = [pair for pair in PAIRS if not pair.marks]
# a wide map finds what takes height for width; most tests use square ones, so of these there are few here
WIDE = [pytest.param((*pair.values, "wide"), id=f"{pair.id}-wide", marks=pair.marks) for pair in PAIRS]
SQUARE = [pytest.param((*pair.values, "square"), id=f"{pair.id}-square", marks=pytest.mark.full) for pair in QUICK]
every_pair = pytest.mark.parametrize("net", WIDE + SQUARE, indirect=True, scope="module")
# resolutions and batches are the business of mechanisms or of backbones, each of which is here
quick_pairs = pytest.mark.parametrize(
    "net", [pair for pair in WIDE if not pair.marks] + SQUARE, indirect=True, scope="module"
)
OTHERS = {(32, 64): (48, 40), (32, 32): (40, 96)}  # the resolution at run time of models for these


def make(model: str, attention: str, shape: str, **settings):
    torch.manual_seed(0)
    return create_model(model, attention, image_size=SHAPES[shape], num_classes=5, **settings)


@pytest.fixture(scope="module")
def net(request):
    model, attention, shape = request.param
    return make(model, attention, shape), SHAPES[shape]


@every_pair
def test_one_step_reaches_every_parameter(net):
    model, shape = net
    model.train()
    logits, losses = model(torch.randn(3, 3, *shape), return_losses=True)
    assert logits.shape == (3, 5)
    (logits.square().mean() + sum(loss.sum() for loss in losses.values())).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@quick_pairs
@torch.no_grad()
def test_another_resolution_at_run_time(net):
    model, shape = net
    assert model.eval()(torch.randn(2, 3, *OTHERS[shape])).isfinite().all()


@quick_pairs
@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(net):
    model, shape = net
    images = torch.randn(3, 3, *shape)
    torch.testing.assert_close(model.eval()(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "attention"), QUICK)
def test_the_chosen_attention_wins_over_the_own(model, attention):
    written = OmegaConf.to_container(OmegaConf.load(CONF / "attention" / f"{attention}.yaml"))
    composed = OmegaConf.to_container(compose_model(model, attention).attention)
    assert {key: composed[key] for key in written if key not in ("defaults", "core")} == {
        key: value for key, value in written.items() if key not in ("defaults", "core")
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_backbone_of_every_kind_meets_every_mechanism(kind):
    sites = []
    with torch.device("meta"):
        mixer = factory(compose_model("vit_32px"))
        instantiate(compose_model(BY_KIND[kind]).model, attention=lambda site: sites.append(site) or mixer(site))
    assert {site.kind for site in sites} == {kind}


def test_every_backbone_meets_mechanisms_that_differ():
    site = Site(dim=32, num_heads=4, grid=Grid(8, 8), stage=0, block=0, depth=2, kind="hierarchical")
    made = {what: build(factory(compose_model("vit_32px", name)), [site])[0] for what, name in REPRESENTATIVES.items()}
    assert made["refuses class tokens"].accepts.prefix == "refused" and made["linear"].accepts.prefix == "attended"
    assert made["losses"](torch.randn(1, 64, 32), site.grid).losses and made["windows"].window


@pytest.mark.parametrize("attention", list_attentions())
def test_class_tokens_are_attended_or_refused(attention):
    try:
        model = make("vit_32px", attention, "wide", class_token=True)
    except ValueError as error:
        assert "stage 0 blocks 0-" in str(error) and "set model.class_token=false" in str(error)
        return
    model(torch.randn(2, 3, 32, 64)).sum().backward()
    patches = model.stem.patch_embed.proj.weight.grad
    assert patches is not None and patches.abs().sum() > 0, "the class token does not see the patches"


if __name__ == "__main__":
    rows = [(model, {}) for model in MODELS] + [("vit_32px", {"class_token": True})]
    print("".join(f"{name:>16}" for name in ["", *list_attentions()]))
    for model, settings in rows:
        cells = []
        for attention in list_attentions():
            try:
                for shape in SHAPES:
                    make(model, attention, shape, **settings)(torch.randn(2, 3, *SHAPES[shape])).sum().backward()
                cells.append("trained")
            except ValueError:
                cells.append("refused")
        print("".join(f"{cell:>16}" for cell in [model + "+cls" * bool(settings), *cells]))
