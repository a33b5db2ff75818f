"""Every gate of conf/gate in a backbone of each kind: it trains, recomputes, keeps samples apart; or it is refused."""

import copy
from functools import cache, partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from conf import names
from models import create_model
from models.attention import Site
from models.backbones.base import Pyramid
from models.backbones.furnish import furnish
from models.gates.eca import ECA
from models.gates.se import SqueezeExcitation
from models.layers.gated import Gate

GATES = names.options("gate")
VIT, TWO = {"dim": 32, "depth": 2, "num_heads": 4}, {"dims": [32, 64], "depths": [1, 2]}
MODELS = {
    "class_token": ("vit_32px", {**VIT, "class_token": True}),
    "vit": ("vit_32px", VIT),
    "hierarchical": ("swin_32px", {**TWO, "num_heads": [2, 4]}),
    "convnet": ("convnext_32px", {**TWO, "attention_stages": [1]}),
    "hybrid": ("coatnet_32px", {"depths": [1, 1, 2]}),
    "moh": ("vit_32px", {**VIT, "class_token": True, "attention": "moh"}),
    "generates": ("dit_s_2", {**VIT, "image_size": 64}),
}
OTHERS = ["vit", "hierarchical", "convnet", "hybrid"]
# every gate with a class token and in one other model; `make test-all` has the rest
PAIRS = [
    pytest.param(
        (kind, gate),
        id=f"{kind}-{gate}",
        marks=[] if kind in ("class_token", OTHERS[i % len(OTHERS)]) else [pytest.mark.full],
    )
    for kind in ("class_token", *OTHERS)
    for i, gate in enumerate(GATES)
]


@cache
def plain(kind: str) -> nn.Module:
    name, own = MODELS[kind]
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **own)


def make(kind: str, gate: str, at: str | None = None) -> nn.Module:
    torch.manual_seed(1)
    model = copy.deepcopy(plain(kind))
    furnish(model, gate=instantiate(OmegaConf.load(names.CONF / "gate" / f"{gate}.yaml")), gate_at=at)
    for key, parameter in model.named_parameters():
        if ".gate." in key and parameter.ndim > 1:  # weights that show
            parameter.data.mul_(4)
    return model


def gates(model: nn.Module) -> list[Gate]:
    return [module for module in model.modules() if isinstance(module, Gate)]


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, recompute: bool) -> dict[str, torch.Tensor]:
    """Of all tokens: those of the map do not reach the class token any more behind the last mixer."""
    model.set_gradient_checkpointing(recompute)
    tokens, _, losses = model.train().forward_tokens(images(3, 3, 32, 32))
    (tokens.square().sum(-1).sqrt().mean() + sum(loss.sum() for loss in losses.values())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=PAIRS)
def net(request):
    return make(*request.param), request.param


def test_one_step_reaches_every_parameter_of_a_gate_recomputed_or_not(net):
    model, other = copy.deepcopy(net[0]), copy.deepcopy(net[0])
    kept = gradients(model, recompute=False)
    found = {name: grad for name, grad in kept.items() if ".gate." in name}
    assert len(gates(model)) == sum(hasattr(block, "attn") for stage in model.stages for block in stage.blocks) > 1
    assert not [name for name, grad in found.items() if grad is None or not grad.isfinite().all()]
    # in some block: elsewhere the few hidden channels of a rectifier may all be shut
    reached = {name.partition(".gate.")[2] for name, grad in found.items() if grad.any()}
    assert reached == {name.partition(".gate.")[2] for name in found}
    recomputed = gradients(other, recompute=True)
    assert all(g is None or torch.equal(g, recomputed[name]) for name, g in kept.items())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(net):
    model, batch = net[0].eval(), images(3, 3, 32, 32)
    torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_another_resolution_at_run_time(net):
    assert net[0].eval()(images(2, 3, 48, 40)).isfinite().all()


@torch.no_grad()
def test_a_gate_changes_what_a_model_computes_and_nothing_else_of_it(net):
    model, without = net[0], plain(net[1][0]).eval()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in without.state_dict().items())
    assert all(".gate." in name for name in state.keys() - without.state_dict().keys())
    before, after = (each.eval().forward_features(images(2, 3, 32, 32)) for each in (without, model))
    assert (after - before).norm() > 1e-5 * before.norm()


@pytest.mark.parametrize("at", ["mixer", "mlp", "block"])
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_stands_where_it_is_told_under_moh(gate, at):
    model = make("moh", gate, at)
    logits, losses = model.train()(images(2, 3, 32, 32), return_losses=True)
    assert logits.isfinite().all() and list(losses) == ["load_balance"]
    assert {block.gate_at for stage in model.stages for block in stage.blocks} == {at}


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_in_a_model_that_generates(gate):
    model = make("generates", gate)
    for block in model.stages[0].blocks:  # which start by changing nothing
        nn.init.normal_(block.modulation.weight, std=0.1)
    x = model.eval()(images(2, 4, 8, 8), torch.tensor([1, 9]), torch.tensor([0, 2]))
    assert x.isfinite().all() and len(gates(model)) == 2


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_chosen_by_name_and_knows_its_site(gate):
    name, own = MODELS["hierarchical"]
    model = create_model(name, gate=gate, **own)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.gate.site for block in blocks] == [block.attn.site for block in blocks]
    assert {block.gate_at for block in blocks} == {gates(model)[0].at}
    assert len(gates(Pyramid(model))) == len(blocks)


def test_what_a_gate_keeps_from_weight_decay():
    model = make("vit", "gaussian")
    kept = {name for name, _ in model.named_parameters() if ".gate." in name}
    assert len(kept) == 4 and kept <= model.no_weight_decay()
    assert not any(".gate." in name for name in make("vit", "se").no_weight_decay())


class Wide(nn.Module):
    def __init__(self, site: Site) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            {"gate": ECA, "gate_at": "head"},
            r"gate: gate_at must be one of mixer, mlp, block, got 'head'; set model.gate",
        ),
        (
            {"gate_at": "mlp"},
            r"gate: gate_at needs a gate to be put there, got gate_at=mlp alone; choose one with gate=",
        ),
        (
            {"gate": partial(ECA, kernel_size=[3])},
            r"(?s)gate: 2 of 3 places cannot take the chosen gate:\n  stage 1 blocks 0-1 .*=\[3\] has no entry",
        ),
        (
            {"gate": Wide},
            r"gate: 3 of 3 places .*\n  stage 0 block 0 \(dim 32, .*: Wide is no `Gate`; see models/layers",
        ),
        (
            {"gate": partial(SqueezeExcitation, ratio=-1)},
            r"se: ratio must be a whole number of at least 1, got -1; set",
        ),
    ],
)
def test_what_does_not_fit_is_refused(places, message):
    model = copy.deepcopy(plain("hierarchical"))
    with pytest.raises(ValueError, match=message):
        furnish(model, **places)
    assert not gates(model)


def test_a_model_without_a_place_for_it_is_refused():
    model = copy.deepcopy(plain("hybrid"))
    del model.stages[1:]
    with pytest.raises(
        ValueError, match=r"gate: no block of CoAtNet has a mixer, which gates need, got gate_at=None; c"
    ):
        furnish(model, gate=ECA)


def test_unknown_gates_and_options_are_refused():
    with pytest.raises(ValueError, match=r"there is no gate 'ecca'; did you mean 'eca'.*available: .*, ela, "):
        create_model("vit_32px", gate="ecca")
