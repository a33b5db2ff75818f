"""Multi-resolution attention: the recorded cases, and what a budget of exact blocks gives."""

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Grid, Site
from models.attention.cells import cut, held, join
from models.attention.cores.mra import MRACore, mra_attention
from models.attention.softmax import SoftmaxCore, softmax_attention

CASES = [name for name in reference.cases("module") if name.startswith("mra/")]
MAP = Grid(6, 13, 1)
SITE = Site(32, 4, MAP, 0, 0, 1, "vit")


def heads(tokens: int, keys: int | None = None, times: float = 2) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (tokens, keys or tokens, keys or tokens)
    return tuple(times * torch.randn(2, 2, size, 8, dtype=torch.float64) for size in sizes)


class Weighted(nn.Module):
    """The core on heads that are given, with values times a weight, as the cases are called."""

    def __init__(self, core: MRACore) -> None:
        super().__init__()
        self.core, self.w = core, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (2 * x).unbind(0)
        grid = Grid(1, x.shape[3])
        return self.core(q, k, v * self.w, grid, grid)


def test_the_cases_are_found() -> None:
    assert len(CASES) >= 2


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_authors(name: str) -> None:
    """A sequence is a map of one row."""
    given = reference.info(name)["hparams"]
    core = MRACore((1, given["block_size"]), num_blocks=given["num_blocks"], mode=given["approx_mode"])
    parity.check(name, Weighted(core), dict, lambda module, x: module(x))
    q, k, _ = 2 * reference.model_input(name)
    grid = Grid(1, q.shape[2])
    refined = core.refined(q, k, grid, grid).sort(-1).values.flatten(0, 1)
    assert torch.equal(refined, torch.from_numpy(reference.arrays(name)["refined_blocks"]))


@pytest.mark.parametrize("grid", [MAP, Grid(8, 16), Grid(1, 1), Grid(3, 5, 40)], ids=str)
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_all_blocks_are_softmax_attention(grid: Grid, mode: str) -> None:
    """On maps that make no whole cells too: what fills them up is never seen."""
    ours, theirs = mra_attention(SITE, num_blocks=10_000, mode=mode), softmax_attention(SITE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, grid.tokens, 32)
    torch.testing.assert_close(ours(x, grid).x, theirs(x, grid).x, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_what_is_computed_is_its_matrix(mode: str) -> None:
    """On fewer keys than queries, in both modes; rows that see nothing are zero."""
    keys = Grid(3, 9, 1)
    q, k, v = heads(MAP.tokens, keys.tokens)
    core = MRACore((2, 4), per_row=1, num_blocks=4, mode=mode)
    weights = core.matrix(q, k, MAP, keys)
    torch.testing.assert_close(weights @ v, core(q, k, v, MAP, keys))
    sums = weights.sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)) == core.row_stochastic == (mode == "full")
    assert mode == "full" or set(sums.round(decimals=9).unique().tolist()) == {0, 1}


def test_unrefined_keys_of_a_block_have_one_weight() -> None:
    q, k, _ = heads(32)
    grid, core = Grid(4, 8), MRACore((2, 2), num_blocks=3)
    blocks = cut(core.matrix(q, k, grid, grid).mT, grid, (2, 2))  # (B, M, R, T, N): keys in blocks
    spread = cut(blocks.amax(3).sub(blocks.amin(3)).mT, grid, (2, 2)).amax(3)  # (B, M, R, R)
    exact = (spread > 1e-12).flatten(2).sum(-1)
    assert exact.unique().tolist() == [3]


def test_the_error_falls_with_the_budget() -> None:
    q, k, v = heads(128, times=1)
    grid, errors = Grid(8, 16), []
    wanted = SoftmaxCore(2, 8)(q, k, v, grid, grid)
    for budget in (2, 4, 8, 12, 16):
        found = MRACore(num_blocks=budget)(q, k, v, grid, grid)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[-1] < 1e-6


@pytest.mark.parametrize("grid", [MAP, Grid(4, 8), Grid(5, 3, 9)], ids=str)
def test_cells_are_put_back(grid: Grid) -> None:
    x = torch.randn(2, 3, grid.tokens, 5)
    cells = cut(x, grid, (4, 2))
    assert torch.equal(join(cells, grid, (4, 2)), x)
    assert held(grid, (4, 2), x.device).sum() == grid.tokens and cells.shape[2:4] == held(grid, (4, 2), x.device).shape
    first = cells[:, :, -(-grid.prefix // 8), :2].mean(2)
    torch.testing.assert_close(first, x[:, :, grid.prefix : grid.prefix + 2].mean(2))


def test_closed_keys_do_not_move_it() -> None:
    """Loud tokens leave no trace beyond the map: the gradient of what is not there is not there."""
    grid = Grid(3, 5)
    q, k, v = heads(grid.tokens)
    core = MRACore((2, 4), num_blocks=2)
    loud = core(q, k, v + 1000, grid, grid) - 1000
    torch.testing.assert_close(loud, core(q, k, v, grid, grid))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cell": 0},
            r"mra: cell must be a whole number of at least 1, or two, got 0; set attention.cell, e.g. \[4, 8\]",
        ),
        ({"per_row": 0}, "mra: per_row must be a whole number of at least 1, got 0; set attention.per_row"),
        ({"num_blocks": -1}, "mra: num_blocks must be a whole number of at least 1, got -1; set attention.num_blocks"),
        ({"mode": "half"}, "mra: mode must be full or sparse, got 'half'; set attention.mode"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mra_attention(SITE, **options)
