"""FlexAttention, on the CPU uncompiled and without gradients, against dense masks and gathered keys."""

from contextlib import suppress

import pytest
import torch

from models import create_model
from models.attention import Grid, Refused, Site, check, flex
from models.attention.backend import describe_backend
from models.attention.biases.relative import relative
from models.attention.biases.rpb import rpb
from models.attention.layouts.neighborhood import Neighborhood
from models.attention.mixers.neighborhood import neighborhood_attention
from models.attention.softmax import softmax_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
MAP = Grid(9, 7)
SITE = Site(dim=32, num_heads=2, grid=MAP, stage=0, block=0, depth=2, kind="vit")


def randomised(mixer: torch.nn.Module) -> torch.nn.Module:
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("sides", "bias"),
    [
        (((3, 3), (1, 1), (1, 1)), None),
        (((3, 3), (1, 1), (2, 2)), rpb),
        (((4, 5), (2, 3), (2, 1)), rpb),
        (((7, 7), (1, 1), (2, 2)), relative),  # the map is padded to 14 x 14
    ],
)
def test_neighborhoods_as_a_mask_are_those_of_gathered_keys(sides: tuple, bias: object) -> None:
    mixer = randomised(softmax_attention(SITE, layout=lambda site: Neighborhood(*sides), bias=bias))
    x, gates = torch.randn(2, MAP.tokens, 32), torch.rand(2, MAP.tokens, 2)
    torch.testing.assert_close(mixer._forward_flex(x, MAP, gates), mixer(x, MAP, gates).x, rtol=1e-4, atol=1e-5)
    grid = Grid(12, 8)
    x = torch.randn(1, grid.tokens, 32)
    torch.testing.assert_close(mixer._forward_flex(x, grid, None), mixer(x, grid).x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [relative, rpb])
@pytest.mark.parametrize("grid", [MAP, Grid(9, 7, 2), Grid(5, 11, 1)], ids=str)
def test_a_table_of_offsets_is_the_dense_bias(bias: object, grid: Grid) -> None:
    """Class tokens in front of the map have none; another map than the one it was made for reads the same table."""
    mixer = randomised(softmax_attention(SITE._replace(grid=MAP._replace(prefix=grid.prefix)), bias=bias, qk_norm=True))
    x = torch.randn(2, grid.tokens, 32)
    torch.testing.assert_close(mixer._forward_flex(x, grid, None), mixer(x, grid).x, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_table_flows_through_what_is_added() -> None:
    """Of the function that the kernel differentiates; FlexAttention itself has no backward pass on the CPU."""
    bias = rpb(SITE)
    add = flex.score_mod(bias, MAP, None, torch.device("cpu"))
    m, i, j = (t.flatten() for t in torch.meshgrid(torch.arange(2), torch.arange(63), torch.arange(63), indexing="ij"))
    weight = torch.randn(2, 63, 63)
    (ours,) = torch.autograd.grad((add(torch.zeros(len(m)), 0 * m, m, i, j) * weight.flatten()).sum(), bias.table)
    (dense,) = torch.autograd.grad((bias(MAP, MAP) * weight).sum(), bias.table)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)


def near(site: Site = SITE, **parts: object) -> torch.nn.Module:
    """Neighbourhoods with a bias that the kernel of neighbourhoods does not know."""
    return neighborhood_attention(site, relative_position_bias=False, bias=relative, **parts)


def test_what_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.attention.backend.INTERPRETED", False)
    cuda = torch.device("cuda")
    line = describe_backend(create_model("vit_32px", "neighborhood"), cuda)
    assert line == "attention: neighborhood_attention in Triton"
    line = describe_backend(create_model("vit_32px", layout="neighborhood", bias="relative"), cuda)
    assert line == "attention: flex_attention in PyTorch (neighbourhoods are a mask of blocks)"
    line = describe_backend(create_model("vit_32px", bias="relative"), cuda)
    assert line == "attention: flex_attention in PyTorch (RelativePositionBias is a table of offsets)"
    written = near(backend="torch").runs()
    assert written.operation == "scaled_dot_product_attention" and "gathered" in written.reason
    narrow = near(SITE._replace(num_heads=4)).runs()  # 8 channels per head
    assert narrow.operation == "scaled_dot_product_attention"
    assert softmax_attention(SITE).runs().operation == "scaled_dot_product_attention"
    check(neighborhood_attention(SITE, backend="triton"), SITE)
    with pytest.raises(Refused, match=r"flex_attention has no Triton kernel: neighbourhoods are a mask of blocks"):
        check(near(backend="triton"), SITE)


def test_what_must_be_the_same_every_time_has_no_table() -> None:
    biased, plain = near(), neighborhood_attention(SITE, relative_position_bias=False, qk_norm=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert biased.runs().operation == "scaled_dot_product_attention" and plain.runs().operation == flex.WHO
    finally:
        torch.use_deterministic_algorithms(False)
    assert biased.runs().operation == flex.WHO


def test_a_gpu_takes_it_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("models.attention.multihead.is_fused", lambda who, *_: taken.append(who))
    near(kernel=3)(torch.randn(1, MAP.tokens, 32), MAP)
    assert not taken


def test_blocks_are_found_once_per_map_and_code_is_compiled_once_per_layout() -> None:
    around = Neighborhood((3, 3)).around
    device = torch.device("cpu")
    assert flex.block_mask(MAP, around, device) is flex.block_mask(MAP, Neighborhood((3, 3)).around, device)
    assert flex.block_mask(MAP, around, device) is not flex.block_mask(Grid(9, 8), around, device)
    assert flex.compiled(MAP, around) is flex.compiled(MAP, Neighborhood((3, 3)).around)
    assert flex.compiled(MAP, around) is not flex.compiled(MAP, None)


def test_wrong_dtypes_are_refused() -> None:
    heads = torch.randn(1, 2, MAP.tokens, 16, dtype=torch.double)
    with pytest.raises(ValueError, match=r"flex_attention: the kernels take float32, float16 and bfloat16, got q"):
        flex.attend(heads, heads, heads, MAP, scale=1.0)


def test_what_is_made_inside_of_torch_func_is_not_kept() -> None:
    """It would be of a level that is over. Whether FlexAttention itself works there is up to PyTorch's release."""
    around, q = Neighborhood((3, 3)).around, torch.randn(1, 2, MAP.tokens, 16)
    flex.block_mask.cache_clear()
    with suppress(NotImplementedError):
        torch.func.grad(lambda q: flex.attend(q, q, q, MAP, scale=0.25, around=around).sum())(q)
    assert not flex.block_mask.cache_info().currsize
    assert flex.attend(q, q, q, MAP, scale=0.25, around=around).isfinite().all()
    assert flex.block_mask.cache_info().currsize == 1
