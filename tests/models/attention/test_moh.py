"""Mixture of heads: the gates, what unselected heads contribute, the load balance loss and its configuration."""

from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.moh_attention import largest
from models import create_model
from models.attention import Accepts, Grid, Mixed, Mixer, Refused, Site
from models.attention.biformer import BiLevelRoutingAttention
from models.attention.cosine import cosine_attention
from models.attention.dual import dual_attention
from models.attention.head_router import HeadRouter
from models.attention.moh import MoHAttention, active_heads, resolve_heads
from models.attention.softmax import softmax_attention
from models.factory import instantiate

CONF = Path(__file__).parents[3] / "conf"
CORES = {
    "softmax": softmax_attention,
    "windows": partial(softmax_attention, window=3, shift=True, relative_position_bias=True),
    "biformer": partial(BiLevelRoutingAttention, num_regions=3),
    "dual": dual_attention,
    "cosine": cosine_attention,
}


GRID = Grid(6, 5)


def site(heads: int = 8, grid: Grid = GRID) -> Site:
    return Site(64, heads, grid, 0, 1, 2, "hierarchical")


def tokens(place: Site, batch: int = 2) -> Tensor:
    return torch.randn(batch, place.grid.tokens, place.dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("heads", [(8, 0), (0, 8), (3, 5), (1, 7)])
def test_an_undecided_router_with_all_heads_on_is_the_plain_attention(core: str, heads: tuple[int, int]) -> None:
    place = site()
    module, x = MoHAttention(place, core=CORES[core], shared_heads=heads[0], routed_heads=heads[1]), tokens(place)
    for parameter in module.router.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(module(x, place.grid).x, module.mixer(x, place.grid).x)


@pytest.mark.parametrize("core", CORES)
def test_unselected_heads_contribute_nothing(core: str) -> None:
    """The output's weights and everything before them see exactly nothing of a head that no token selects."""
    place = site()
    module, x = MoHAttention(place, core=CORES[core], shared_heads=2, routed_heads=3), tokens(place)
    nn.init.zeros_(module.router.wg.weight)  # a tie everywhere: the lowest routed heads 2, 3, 4 are selected
    mixed = module(x, place.grid)
    mixed.x.square().mean().backward()
    inner = getattr(module.mixer, "mixer", module.mixer)
    per_head = inner.proj.weight.grad.unflatten(1, (8, 8)).abs().amax((0, 2))
    assert (per_head[:5] > 0).all()
    assert (per_head[5:] == 0).all()


@pytest.mark.parametrize(("shared", "routed"), [(3, 3), (0, 2), (1, 4), (2, 1), (8, 0), (2, 6)])
def test_gates(shared: int, routed: int) -> None:
    router = HeadRouter(64, 8, shared, routed)
    gates, balance = router(tokens(site()))
    gates_S, gates_E = gates.split([shared, 8 - shared], dim=-1)
    assert ((gates_E != 0).sum(-1) == routed).all()
    assert (gates_S > 0).all()
    if routed and shared:
        alphas = 2 * router.wg_0(tokens(site())).softmax(-1)
        torch.testing.assert_close(gates_S.mean(-1), alphas[..., 0])
        torch.testing.assert_close(gates_E.sum(-1) / routed, alphas[..., 1])
    else:
        torch.testing.assert_close(gates.sum(-1), torch.full((2, 30), float(shared + routed)))
    assert (balance is None) == (routed == 0)


def test_selected_weights_are_the_softmax_of_the_selected_logits() -> None:
    router, x = HeadRouter(64, 8, 0, 3), tokens(site())
    gates, _ = router(x)
    values, index = router.wg(x).topk(3)
    torch.testing.assert_close(gates.gather(-1, index), 3 * values.softmax(-1))


def test_ties_go_to_the_lowest_heads() -> None:
    assert largest(torch.tensor([[[1.0, 2.0, 1.0, 1.0]]]), 2).tolist() == [[[1.0, 1.0, 0.0, 0.0]]]


def test_extreme_logits_give_finite_gates_and_gradients() -> None:
    router = HeadRouter(64, 8, 2, 3)
    nn.init.constant_(router.wg.weight, 1.0)
    with torch.no_grad():
        router.wg.weight[0] = 1e4
    gates, balance = router(tokens(site()) * 1e4)
    (gates.sum() + balance).backward()
    assert gates.isfinite().all()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_load_balance_lies_between_the_active_and_the_routed_heads() -> None:
    router = HeadRouter(64, 8, 2, 2)
    nn.init.zeros_(router.wg.weight)
    assert router(tokens(site()))[1].item() == pytest.approx(2.0)
    with torch.no_grad():
        router.wg.weight[0, 0] = 1e4
    assert router(torch.ones(2, 30, 64))[1].item() == pytest.approx(6.0)


def test_the_loss_is_returned_in_training_only() -> None:
    place = site()
    module, x = MoHAttention(place, core=softmax_attention), tokens(place)
    assert set(module.train()(x, place.grid).losses) == {"load_balance"}
    assert module.eval()(x, place.grid).losses == {}
    shared = MoHAttention(place, core=softmax_attention, shared_heads=8, routed_heads=0)
    assert shared.train()(x, place.grid).losses == {}


def test_losses_of_the_gated_attention_are_kept() -> None:
    place = site()
    inner = partial(MoHAttention, core=softmax_attention)
    module, x = MoHAttention(place, core=inner).train(), tokens(place)
    both = module.router(x)[1] + module.mixer.router(x)[1]
    torch.testing.assert_close(module(x, place.grid).losses["load_balance"], both)


def test_the_loss_keeps_its_gradient_under_checkpointing() -> None:
    place = site()
    module, x = MoHAttention(place, core=softmax_attention).train(), tokens(place)
    grads = []
    for run in (module, lambda x, grid: checkpoint(module, x, grid, use_reentrant=False)):
        module.zero_grad()
        run(x, place.grid).losses["load_balance"].backward()
        grads.append(module.router.wg.weight.grad.clone())
    assert grads[0].norm() > 0
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8])
def test_every_parameter_is_trained(heads: int) -> None:
    place = site(heads)._replace(dim=24 * heads)
    module = MoHAttention(place, core=softmax_attention).train()
    mixed = module(tokens(place), place.grid)
    (mixed.x.square().mean() + sum(mixed.losses.values())).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_half_precision_does_not_change_the_selection() -> None:
    router, x = HeadRouter(64, 8, 2, 3), tokens(site())
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = router(x)
    assert half.dtype == torch.float32
    assert torch.equal(half, router(x)[0])
    place = site()
    module = MoHAttention(place, core=softmax_attention).to(torch.bfloat16)
    assert module(x.bfloat16(), place.grid).x.dtype == torch.bfloat16


def test_class_tokens_and_other_maps_are_those_of_the_gated_attention() -> None:
    place = site(grid=Grid(4, 4, 1))
    module = MoHAttention(place, core=softmax_attention)
    assert module.accepts == module.mixer.accepts
    larger = site(grid=Grid(7, 3, 1))
    assert module(tokens(larger), larger.grid).x.shape == (2, 22, 64)
    matrix = module.attention_matrix(tokens(larger), larger.grid)
    torch.testing.assert_close(matrix, module.mixer.attention_matrix(tokens(larger), larger.grid))
    windowed = MoHAttention(site(), core=CORES["windows"])
    assert windowed.accepts.prefix == "refused"


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, (1, 0)),
        (2, (2, 0)),
        (3, (1, 1)),
        (4, (2, 1)),
        (6, (2, 2)),
        (8, (3, 3)),
        (12, (5, 4)),
        (24, (9, 9)),
        (32, (12, 12)),
    ],
)
def test_default_heads(heads: int, expected: tuple[int, int]) -> None:
    assert resolve_heads(heads, 0.375, 0.375) == expected
    shared, routed = expected
    assert shared / (shared + routed) > 0.4


@pytest.mark.parametrize(
    ("shared", "routed", "expected"), [(3, 0.25, (3, 2)), (0.0, 0.5, (0, 4)), (1.0, 0.0, (8, 0)), (1, 7, (1, 7))]
)
def test_numbers_and_fractions(shared: float, routed: float, expected: tuple[int, int]) -> None:
    assert resolve_heads(8, shared, routed) == expected


@pytest.mark.parametrize(
    ("shared", "routed", "message"),
    [
        (6, 3, "moh: 6 shared and 3 routed heads are more than the 8 heads; lower attention.shared_heads or"),
        (6, 0, "moh: 6 shared and 0 routed heads leave 2 of 8 heads unused; raise attention.routed_heads"),
        (0, 0, "moh: 0 shared and 0 routed heads leave 8 of 8 heads unused"),
    ],
)
def test_heads_that_do_not_fit(shared: int, routed: int, message: str) -> None:
    with pytest.raises(Refused, match=message):
        resolve_heads(8, shared, routed)


@pytest.mark.parametrize(("shared", "routed", "name"), [(-1, 2, "shared_heads"), (2, 1.5, "routed_heads")])
def test_meaningless_numbers(shared: float, routed: float, name: str) -> None:
    with pytest.raises(
        ValueError, match=f"moh: {name} must be a number of heads or a fraction between 0.0 and 1.0, got"
    ):
        resolve_heads(8, shared, routed)


class Convolution(Mixer):
    """A mixer without heads."""

    accepts = Accepts(gates=False)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        return Mixed(x_BNC, {})


class Counting(Mixer):
    """Adds one in every block, to what it hands on and to the tokens."""

    carries = True

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None, carry: Tensor | None = None) -> Mixed:
        count = torch.ones(()) if carry is None else carry + 1
        return Mixed(x_BNC + count, {}, count)


def test_what_the_attention_carries_goes_through() -> None:
    module, x = MoHAttention(site(), core=Counting).train(), tokens(site())
    first = module(x, GRID)
    second = module(x, GRID, carry=first.carry)
    assert module.carries and list(first.losses) == ["load_balance"]
    assert torch.equal(second.x, x + 2) and second.carry == 2


def test_attention_without_gates_is_refused() -> None:
    with pytest.raises(Refused, match=r"moh cannot gate the heads of Convolution; choose another attention.core"):
        MoHAttention(site(), core=Convolution)


MAIN = """
defaults:
  - attention: softmax
  - _self_
hydra:
  searchpath: [file://{conf}]
"""


@pytest.mark.parametrize(
    ("overrides", "core"),
    [
        (["attention=moh"], "models.attention.softmax.softmax_attention"),
        (["attention=moh", "attention@attention.core=dual"], "models.attention.dual.dual_attention"),
        (["attention=moh", "attention@attention.core=biformer", "attention.core.topk=2"], "biformer_attention"),
    ],
)
def test_the_command_line_chooses_the_gated_attention(tmp_path: Path, overrides: list[str], core: str) -> None:
    (tmp_path / "main.yaml").write_text(MAIN.format(conf=CONF))
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("main", [*overrides, "attention.shared_heads=2"]).attention
    assert config.core._target_.endswith(core)
    place = site()
    module = instantiate(config)(place)
    assert (module.router.shared, module.router.routed) == (2, 3)
    assert module(tokens(place), place.grid).x.shape == (2, 30, 64)


@pytest.mark.parametrize("core", CORES)
def test_shapes_on_the_meta_device(core: str) -> None:
    place = site()
    with torch.device("meta"):
        module = MoHAttention(place, core=CORES[core])
        assert module(torch.empty(2, 30, 64), place.grid).x.shape == (2, 30, 64)


# the share of active heads that the paper states; its "90" of DiT-S is 88.9 (64 of 72 heads), of B and L 89.6
ACTIVE = {
    "moh_transnext_small_75": 75.3,
    "moh_transnext_small_80": 79.95,
    "moh_transnext_base_50": 50.0,
    "moh_transnext_base_75": 75.0,
    "moh_dit_s_2_90": 88.9,
    "moh_dit_s_2_75": 75.0,
    "moh_dit_b_2_90": 89.6,
    "moh_dit_b_2_75": 75.0,
    "moh_dit_l_2_90": 89.6,
    "moh_dit_l_2_75": 75.0,
    "moh_dit_xl_2_90": 89.96,
    "moh_dit_xl_2_75": 75.0,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_active_heads_are_those_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert 100 * active_heads(model) == pytest.approx(ACTIVE[name], abs=0.05)


def test_models_without_gates_have_no_active_heads() -> None:
    assert active_heads(nn.Linear(2, 2)) is None
