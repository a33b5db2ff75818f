"""The gate of NiNformer: the authors' results, what gates and mixes, other maps, and tables of files."""

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from models.attention import Grid, Site
from models.attention.nin_gate import NiNGate, TokenLinear

GRID = Grid(3, 5)
SITE = Site(16, 4, GRID, 0, 0, 1, "vit")
CASES = [name for name in reference.cases("module") if name.startswith("ninformer/mgu")]
NAMES = {
    "token_norm": "Mixer.token_mix.0",
    "token_mlp.fc1": "Mixer.token_mix.2.net.0",
    "token_mlp.fc2": "Mixer.token_mix.2.net.3",
    "channel_norm": "Mixer.channel_mix.0",
    "channel_mlp.fc1": "Mixer.channel_mix.1.net.0",
    "channel_mlp.fc2": "Mixer.channel_mix.1.net.3",
    "linear": "proj",
}


def make(site: Site = SITE, **options) -> NiNGate:
    torch.manual_seed(0)
    return NiNGate(site, **options).double()


def tokens(grid: Grid = GRID) -> Tensor:
    return torch.randn(2, grid.tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_cases_are_found():
    assert CASES


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_authors(name):
    h = reference.info(name)["hparams"]
    site = Site(h["dim"], 1, Grid(1, h["seq_len"]), 0, 0, 1, "vit")
    mixer = NiNGate(site, token_hidden=h["token_dim"], channel_hidden=h["channel_dim"])

    def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{mine}.{kind}": theirs[f"{name}.{kind}"] for mine, name in NAMES.items() for kind in ("weight", "bias")
        }

    parity.check(name, mixer, ours, lambda mixer, x: mixer(x, site.grid).x)


def test_without_the_mlp_over_tokens_no_token_sees_another():
    mixer, x = make(), tokens()
    changed = x.clone()
    changed[:, 3, 0] += 1
    assert (mixer(changed, GRID).x - mixer(x, GRID).x).abs().amax((0, 2)).gt(1e-6).all()
    nn.init.zeros_(mixer.token_mlp.fc2.weight)
    moved = (mixer(changed, GRID).x - mixer(x, GRID).x).abs().amax((0, 2))
    assert moved.nonzero().flatten().tolist() == [3]


def test_the_linear_layer_gates_channel_by_channel():
    mixer, x = make(), tokens()
    with torch.no_grad():
        mixer.linear.weight.zero_()
        mixer.linear.bias.copy_(torch.arange(16.0))
    mixed = mixer(x, GRID).x
    assert not mixed[..., 0].any()
    u = x + mixer.token_mlp(mixer.token_norm(x), GRID)
    torch.testing.assert_close(mixed, mixer.linear.bias * (u + mixer.channel_mlp(mixer.channel_norm(u))))


@pytest.mark.parametrize("new", [Grid(6, 10, 1), Grid(2, 4, 1), Grid(9, 5, 1)], ids=str)
def test_on_another_map_tokens_of_one_kind_get_the_same(new):
    """Where all cells are alike, and what reads and writes them is alike too; the class token keeps its weights."""
    grid = GRID._replace(prefix=1)
    mixer = make(SITE._replace(grid=grid))
    with torch.no_grad():
        for table in (mixer.token_mlp.fc1.weight, mixer.token_mlp.fc2.weight.mT):
            table[:, 1:] = table[:, 1:2]
        mixer.token_mlp.fc2.bias[1:] = mixer.token_mlp.fc2.bias[1]
    x = tokens(grid)[:, :2]
    alike = {g: torch.cat([x[:, :1], x[:, 1:].expand(-1, g.cells, -1)], 1) for g in (grid, new)}
    expected = mixer(alike[grid], grid).x[:, :2]
    found = mixer(alike[new], new).x
    torch.testing.assert_close(found[:, :2], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[:, 1:], found[:, 1:2].expand(-1, new.cells, -1))


def test_weights_read_as_much_of_a_map_twice_as_large():
    layer, ones = TokenLinear(Grid(4, 4), 6, reads=True).double(), torch.ones(1, 6, 64, dtype=torch.float64)
    torch.testing.assert_close(layer(ones, Grid(8, 8)), layer(ones[..., :16], Grid(4, 4)))


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_table_of_a_file_is_the_function_that_it_is_at_run_time(prefix):
    small, large = (SITE._replace(grid=Grid(side, side, prefix)) for side in (4, 6))
    mixer, other = make(small), make(large)
    state = {}
    for name, value in mixer.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = other.get_submodule(owner)
        state[name] = module.resized(leaf, value) if isinstance(module, TokenLinear) else value
    other.load_state_dict(state)
    x = tokens(large.grid)
    torch.testing.assert_close(other(x, large.grid).x, mixer(x, large.grid).x)


def test_a_table_of_no_square_is_refused():
    layer = TokenLinear(Grid(4, 4), 6, reads=True)
    with pytest.raises(ValueError, match="a table for 15 tokens is resized only from a square"):
        layer.resized("weight", torch.zeros(6, 15))


@pytest.mark.parametrize("name", ["token_hidden", "channel_hidden"])
def test_hidden_numbers_that_are_none_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"nin_gate: {name} must be a whole number of at least 1, got 0; set attention"
    ):
        NiNGate(SITE, **{name: 0})
