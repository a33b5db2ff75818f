"""Figures of mixers: known matrices and routes give known numbers; every mechanism is looked at without a change."""

import math

import pytest
import torch
from torch import Tensor, nn

from models import create_model, list_attentions
from models.attention import Grid, Mixed, Mixer, Site, make
from models.attention.agent import agent_attention
from models.attention.figures import changed, figures_of
from models.factory import compose_model, factory

SITE = Site(dim=16, num_heads=4, grid=Grid(8, 8), stage=0, block=0, depth=2, kind="hierarchical")


class One(nn.Module):
    """A model of one mixer."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.mixer(x_BNC, Grid(8, 8)).x


class Known(Mixer):
    """Has these weights, and these routes."""

    has_matrix = True

    def __init__(self, weights: Tensor, routes: Tensor) -> None:
        super().__init__(SITE)
        self.weights, self.regions = weights, routes

    def forward(self, x_BNC, grid, gates_BNM=None):
        return Mixed(x_BNC, {})

    def attention_matrix(self, x_BNC, grid):
        return self.weights

    def routes(self, x_BNC, grid):
        return self.regions


@pytest.mark.parametrize(
    ("weights", "entropy"),
    [
        (torch.eye(8), 0.0),
        (torch.full((4, 8), 0.125), 1.0),
        (torch.full((4, 8), 3.0), 1.0),
        (torch.tensor([[0.5, 0.5, 0, 0], [0, -1.0, 1.0, 0]]), 0.5),
        (torch.zeros(2, 8), 0.0),
        (torch.ones(3, 1), 0.0),
    ],
)
def test_entropies_of_known_weights(weights, entropy):
    routes = torch.tensor([[[0, 1], [1, 0], [0, 1], [1, 0]], [[0, 1], [1, 2], [2, 3], [3, 0]]])
    found, seen = figures_of(One(Known(weights, routes)), torch.zeros(2, 64, 16))
    assert found["mixer"] == {"entropy": pytest.approx(entropy, abs=1e-6), "routes_used": 0.75}
    assert seen["mixer"] is routes


def test_routes_that_were_none_before_have_changed():
    before = torch.tensor([[[0, 1], [2, 3]]])
    assert changed(before, before.flip(-1)) == 0 and changed(before, torch.tensor([[[0, 2], [1, 0]]])) == 0.75


def test_agents_without_logits_gather_and_are_read_evenly():
    mixer = agent_attention(SITE, agent_tokens=9, bias=False, window=4).eval()
    x = torch.randn(2, 64, 16)
    drawn = figures_of(One(mixer), x)[0]["mixer"]
    assert 0 < drawn["agents_gathered"] < 1 and 0 < drawn["agents_read"] < 1
    nn.init.zeros_(mixer.qkv.weight)
    nn.init.zeros_(mixer.qkv.bias)
    assert figures_of(One(mixer), x)[0]["mixer"] == pytest.approx(dict.fromkeys(drawn, 1.0))


def test_loads_are_those_of_the_last_pass_and_nobody_watches_on():
    model = create_model("vit_32px", "moh", dim=32, depth=1, num_classes=4, shared_heads=1, routed_heads=2).eval()
    (figures,) = figures_of(model, torch.randn(2, 3, 32, 32))[0].values()
    assert 0 <= figures["load_min"] <= 2 / 3 <= figures["load_max"] <= 1
    assert 0 < figures["router_entropy"] <= 1 and 0 < figures["entropy"] <= 1
    assert not any(getattr(part, "watched", False) for part in model.modules())


@pytest.mark.parametrize(
    "name",
    [n if n in ("agent", "fourier", "window") else pytest.param(n, marks=pytest.mark.full) for n in list_attentions()],
)
def test_every_mechanism_is_looked_at_and_stays_as_it_was(name):
    made = factory(compose_model("vit_32px", name))
    mixer = make(made[0] if isinstance(made, list) else made, SITE).eval()
    x, before = torch.randn(2, 64, 16), {key: value.clone() for key, value in mixer.state_dict().items()}
    out = One(mixer)(x)
    figures = figures_of(One(mixer), x)[0].get("mixer", {})
    assert "entropy" in figures or not mixer.has_matrix
    assert all(math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6 for value in figures.values())
    assert torch.equal(One(mixer)(x), out)
    assert all(torch.equal(value, before[key]) for key, value in mixer.state_dict().items())
