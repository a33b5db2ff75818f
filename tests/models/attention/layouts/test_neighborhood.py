"""Neighbourhoods against the rule written as a loop, the authors' kernels, and what the papers say of them."""

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from kernels.neighborhood_attention import neighborhood_attention as operation
from models import create_model
from models.attention import Grid, Refused, Site, build
from models.attention.biases.relative import relative
from models.attention.biases.rpb import rpb
from models.attention.cosine import cosine_attention
from models.attention.layouts.neighborhood import Neighborhood, dilation_of, keys_along, neighborhood
from models.attention.mixers.neighborhood import neighborhood_attention
from models.attention.multihead import MultiHead
from models.attention.softmax import SoftmaxCore, softmax_attention
from models.attention.weights.sigmoid import SigmoidWeights

MAP = Grid(9, 7)
SITE = Site(dim=16, num_heads=2, grid=MAP, stage=0, block=0, depth=2, kind="hierarchical")


def pair(value: int | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def recorded(name: str) -> MultiHead:
    """The module of a case."""
    case = reference.info(name)
    given, state = case["hparams"], case["state"]
    dim = given.get("dim") or given["embed_dim"]
    grid, heads = Grid(*case["input_shape"][1:3]), given["num_heads"]
    sides = [pair(given.get(key, 1)) for key in ("kernel_size", "stride", "dilation")]
    layout = Neighborhood(*sides, pad=name.startswith("nat/"))
    site = SITE._replace(dim=dim, num_heads=heads, grid=grid)
    bias = rpb(site._replace(grid=Grid(*sides[0]))) if "rpb" in state else None
    core = SoftmaxCore(heads, dim // heads, bias=bias)
    return MultiHead(site, core, layout=layout, qkv_bias="qkv.bias" in state)


@pytest.mark.parametrize("name", [n for n in reference.cases("module") if n.startswith(("nat/na2d", "gna/"))])
def test_equals_the_authors_kernels(name: str) -> None:
    def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"core.bias.table" if key == "rpb" else key: value for key, value in theirs.items()}

    def call(mixer: nn.Module, x_BHWC: Tensor) -> Tensor:
        return mixer(x_BHWC.flatten(1, 2), Grid(*x_BHWC.shape[1:3])).x.view_as(x_BHWC)

    parity.check(name, recorded(name), ours, call)


class Alone(nn.Module):
    """The authors' module around the operation of kernels/, in PyTorch."""

    def __init__(self, dim: int, heads: int, sides: list[tuple[int, int]], names: set[str]) -> None:
        super().__init__()
        self.heads, self.sides = heads, sides
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, "qkv.bias" in names), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.zeros(heads, *(2 * k - 1 for k in sides[0]))) if "rpb" in names else None

    def forward(self, x_BHWC: Tensor) -> Tensor:
        kernel, stride, dilation = self.sides
        o_BNC = operation(
            self.qkv(x_BHWC).flatten(1, 2), x_BHWC.shape[1:3], self.heads, kernel,
            stride=stride, dilation=dilation, rpb=self.rpb, backend="torch",
        )  # fmt: skip
        return self.proj(o_BNC).view_as(x_BHWC)


@pytest.mark.parametrize(
    "name", [n for n in reference.cases("module") if n.startswith(("nat/na2d", "gna/")) and "_pad_" not in n]
)
def test_the_operation_alone_equals_the_authors_kernels(name: str) -> None:
    case = reference.info(name)
    given = case["hparams"]
    sides = [pair(given.get(key, 1)) for key in ("kernel_size", "stride", "dilation")]
    ours = Alone(given.get("dim") or given["embed_dim"], given["num_heads"], sides, set(case["state"]))
    parity.check(name, ours, lambda theirs: theirs, lambda module, x_BHWC: module(x_BHWC))


@pytest.mark.parametrize("length", [5, 7, 12, 13])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (4, 1, 1), (4, 4, 1), (5, 2, 1), (2, 1, 2)])
def test_the_rule_is_that_of_a_loop(length: int, kernel: int, stride: int, dilation: int) -> None:
    for i, keys in enumerate(keys_along(length, kernel, stride, dilation).tolist()):
        of_class = list(range(i % dilation, length, dilation))
        leader = min(i // dilation // stride * stride + stride // 2, len(of_class) - 1)
        first = min(max(leader - kernel // 2, 0), len(of_class) - kernel)
        assert keys == of_class[first : first + kernel]


@pytest.mark.parametrize(
    ("options", "like"),
    [
        ({"kernel": (9, 7)}, {}),  # a kernel as large as the map: all see all
        ({"kernel": 3, "stride": 3, "block": 6}, {"window": 3}),  # a stride as large as the kernel: windows
    ],
    ids=["whole", "windows"],
)
def test_is_softmax_attention_where_neighborhoods_are(options: dict, like: dict) -> None:
    options = dict(options)
    grid = Grid(6, 9) if options.pop("block", None) else MAP
    site = SITE._replace(grid=grid)
    ours = neighborhood_attention(site, relative_position_bias=False, **options)
    theirs = softmax_attention(site, **like)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, grid.tokens, 16)
    torch.testing.assert_close(ours(x, grid).x, theirs(x, grid).x)


def test_a_token_sees_the_kernel_around_it_in_its_class() -> None:
    mixer = neighborhood_attention(SITE, kernel=3, dilation=2)
    x = torch.randn(1, MAP.tokens, 16, requires_grad=True)
    mixer(x, MAP).x[0, 4 * 7 + 3].sum().backward()
    seen = x.grad.abs().sum(-1).view(9, 7).nonzero().tolist()
    assert seen == [[y, x] for y in (2, 4, 6) for x in (1, 3, 5)]


@pytest.mark.parametrize("bias", ["relative", "rpb"])
def test_the_bias_is_of_the_kernel_and_of_offsets(bias: str) -> None:
    """A table one entry of which is large: the query sees the key there alone."""
    mixer = softmax_attention(
        SITE, bias={"relative": relative, "rpb": rpb}[bias], layout=lambda s: Neighborhood((3, 3))
    )
    table = mixer.core.bias.table
    assert table.numel() == 2 * 25
    with torch.no_grad():
        table.zero_()
        maps = table.unflatten(0, (5, 5)).permute(2, 0, 1) if bias == "relative" else table
        maps[:, 1, 3] = 50.0  # offset (-1, 1)
    (seen,) = mixer.attention_matrix(torch.randn(1, MAP.tokens, 16), MAP)[4 * 7 + 3, 0].argmax(-1).unique().tolist()
    assert divmod(seen, 3) == ((0, 2) if bias == "rpb" else (2, 0))


def test_weights_times_values_are_the_output() -> None:
    mixer = neighborhood_attention(SITE, kernel=3)
    x = torch.randn(2, MAP.tokens, 16)
    weights = mixer.attention_matrix(x, MAP)
    assert weights.shape == (2 * MAP.tokens, 2, 1, 9)
    torch.testing.assert_close(mixer.attend(weights, x, MAP), mixer(x, MAP).x)


def test_small_maps_are_padded_or_refused() -> None:
    mixer = neighborhood_attention(SITE, kernel=5, dilation=2)
    x = torch.randn(2, 35, 16)
    assert mixer(x, Grid(5, 7)).x.shape == x.shape
    strict = neighborhood_attention(SITE, kernel=3, dilation=2, pad=False)
    assert mixer.layout.between(Grid(5, 7)) == Grid(10, 10)
    with pytest.raises(Refused, match=r"6x6 tokens, kernel·dilation, is larger than the map of 5x7; set pad=true"):
        strict(x, Grid(5, 7))
    with pytest.raises(
        ValueError, match=r"(?s)hierarchical\): the neighborhood of 10x10 .* larger than the map of 9x7"
    ):
        build(lambda site: neighborhood_attention(site, kernel=5, dilation=2, pad=False), [SITE])


@pytest.mark.parametrize(
    ("dilation", "expected"),
    [(3, [3, 3, 3]), ([1, 8], [1, 8, 1]), ([[5], [1, 4], [2], [1]], [1, 4, 1])],
)
def test_dilations_by_block_and_stage(dilation: object, expected: list[int]) -> None:
    assert [dilation_of(dilation, SITE._replace(stage=1, block=block)) for block in range(3)] == expected


@pytest.mark.parametrize("attention", ["neighborhood", "boat", "routing"])
def test_parts_are_taken(attention: str) -> None:
    options = {"neighborhood": {"bias": "kerple", "relative_position_bias": False}}.get(attention, {})
    model = create_model("vit_32px", attention, weights="sigmoid", transform="qk_norm", num_classes=5, **options)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    core = next(module for module in model.modules() if isinstance(module, SoftmaxCore))
    assert isinstance(core.weights, SigmoidWeights) and (core.bias is not None) == bool(options)
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(Refused, match=r"two biases, .*; set relative_position_bias=false"):
        neighborhood_attention(SITE, bias=rpb)
    with pytest.raises(ValueError, match=r"neighborhood: stride must be at most the kernel \(3, 3\), got \(4, 4\)"):
        neighborhood(SITE, kernel=3, stride=4)
    with pytest.raises(ValueError, match=r"neighborhood: dilation must be a whole number of at least 1, got 0"):
        neighborhood(SITE, dilation=[1, 0])
    with pytest.raises(Refused, match=r"neighborhood attention is a layout by itself"):
        neighborhood_attention(SITE, layout=neighborhood)
    with pytest.raises(Refused, match=r"two layouts"):
        neighborhood_attention(SITE, window=3)
    with pytest.raises(Refused, match=r"CosineCore cannot work on keys that are not its queries \(surrounding\)"):
        cosine_attention(SITE, layout=neighborhood)
