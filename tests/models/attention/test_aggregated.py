"""Aggregated attention: its equations token by token, pooled features and their positions, any map, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.aggregated_attention.cases import OPERATION
from models.attention import Grid, Refused, Site, aggregated, build, check
from models.attention.aggregated import AggregatedAttention, PooledFeatures, aggregated_attention
from models.attention.cosine import ContinuousPositionBias, CosineCore
from models.attention.moh import MoHAttention


def site(height: int, width: int, stage: int = 0, kind: str = "hierarchical", **options) -> Site:
    return Site(32, 2, Grid(height, width), stage, 0, 1, kind, **options)


def randomised(module: nn.Module) -> nn.Module:
    """No parameter stays at an initial zero or near it, which would hide what it does."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def tokens(place: Site, batch: int = 2) -> Tensor:
    return torch.randn(batch, place.grid.tokens, place.dim, generator=torch.Generator().manual_seed(0))


def one_token(module: AggregatedAttention, x_NC: Tensor, grid: Grid, token: int, head: int) -> Tensor:
    """One head of one token (D,), neighbour by neighbour."""
    core, D = module.core, module.head_dim
    pooled_PC, kv_grid = module.reduce(x_NC[None], grid)
    inner, window = module.inner, core.window
    q_ND, k_ND, v_ND = ((module.qkv(x_NC))[:, part * inner + head * D :][:, :D] for part in range(3))
    k_PD, v_PD = ((module.qkv(pooled_PC[0]))[:, part * inner + head * D :][:, :D] for part in (1, 2))
    y, x = divmod(token, grid.width)
    cells = [(y + dy - window // 2, x + dx - window // 2) for dy in range(window) for dx in range(window)]
    inside = [t for t, (a, b) in enumerate(cells) if 0 <= a < grid.height and 0 <= b < grid.width]
    places = [cells[t][0] * grid.width + cells[t][1] for t in inside]
    q = F.normalize(q_ND[token], dim=0)
    scale = F.softplus(core.temperature[head, 0, 0]) * math.log(len(places) + len(k_PD))
    s = (q + core.query_embedding[head, 0]) * scale
    near = F.normalize(k_ND[places], dim=-1) @ s + core.relative_pos_bias_local[head, inside]
    far = F.normalize(k_PD, dim=-1) @ s + core.bias(grid, kv_grid)[head, token]
    near, far = torch.cat([near, far]).softmax(0).split([len(places), len(k_PD)])
    learned = q @ core.learnable_tokens[head][:, inside] + core.learnable_bias[head, 0, inside]
    return (near + learned) @ v_ND[places] + far @ v_PD


@pytest.mark.parametrize(
    ("place", "options"),
    [
        (site(4, 6, stage=2), {}),
        (site(5, 7, stage=2), {}),
        (site(5, 4, stage=2), {"window": 5}),
        (site(1, 5, stage=1), {}),
        (site(3, 5), {"fixed_pool_size": 4, "qkv_bias": False}),
        (site(4, 4, stage=2, head_dim=8), {}),
    ],
    ids=str,
)
def test_every_head_of_every_token_is_the_equation(place: Site, options: dict) -> None:
    module, x = randomised(aggregated_attention(place, **options)), tokens(place, 1)
    seen = []
    module.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(x, place.grid)
    wanted = [torch.cat([one_token(module, x[0], place.grid, n, m) for m in range(2)]) for n in range(place.grid.cells)]
    torch.testing.assert_close(seen[0][0], torch.stack(wanted))


def test_queries_alone_are_those_of_the_projection() -> None:
    """What a router reads that goes by their length."""
    place = site(3, 4)
    module, x = randomised(aggregated_attention(place)), tokens(place)
    torch.testing.assert_close(module.queries(x), module.qkv(x)[..., :32].unflatten(-1, (2, 16)).transpose(1, 2))
    mixed = MoHAttention(place, core=aggregated_attention, shared_heads=1, routed_heads=1, router="l2")
    assert mixed(x, place.grid).x.shape == x.shape


def test_gates_weight_the_heads() -> None:
    place = site(4, 5)
    module, x = randomised(aggregated_attention(place)), tokens(place)
    gates = torch.rand(2, 20, 2)
    seen = []
    module.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].unflatten(-1, (2, 16))))
    module(x, place.grid), module(x, place.grid, gates)
    torch.testing.assert_close(seen[1], seen[0] * gates[..., None])


@pytest.mark.parametrize(
    ("map_", "pooled"), [((8, 8), (2, 2)), ((6, 9), (3, 3)), ((7, 10), (3, 4)), ((8, 5), (4, 3)), ((3, 1), (3, 1))]
)
def test_pooled_keys_stand_at_the_mean_of_their_cells(map_: tuple, pooled: tuple) -> None:
    bias = ContinuousPositionBias(3, (7, 9), 16)
    values = bias(Grid(*map_), Grid(*pooled))
    axes = [torch.arange(side, dtype=torch.float32) for side in map_]
    means = [F.adaptive_avg_pool1d(axis[None], cells)[0] for axis, cells in zip(axes, pooled, strict=True)]
    queries, keys = (torch.cartesian_prod(*coordinates) for coordinates in (axes, means))
    offsets = (queries[:, None] - keys) * 8 / torch.tensor([6.0, 8.0])
    logarithms = offsets.sign() * (offsets.abs() + 1).log2() / 3
    torch.testing.assert_close(values, bias.cpb_fc2(bias.cpb_fc1(logarithms).relu()).permute(2, 0, 1))


@pytest.mark.parametrize("height", [4, 5])
def test_pooled_features(height: int) -> None:
    reduce = randomised(PooledFeatures(8, ratio=2))
    x_BCHW = torch.randn(2, 8, height, 6)
    pooled, grid = reduce(x_BCHW.flatten(2).mT, Grid(height, 6))
    assert grid == (2, 3, 0)
    means = F.adaptive_avg_pool2d(F.gelu(reduce.conv(x_BCHW)), (2, 3)).flatten(2).mT
    torch.testing.assert_close(pooled, F.layer_norm(means, (8,), reduce.norm.weight, reduce.norm.bias))
    assert reduce.reduced(Grid(1, 3)) == (1, 1, 0)
    assert PooledFeatures(8, ratio=2, size=4).reduced(Grid(9, 3)) == (4, 3, 0)


def test_each_stage_has_its_ratio_and_1_is_cosine_attention() -> None:
    mixers = [aggregated_attention(site(16, 16, stage)) for stage in range(4)]
    assert [getattr(m.reduce, "ratio", None) for m in mixers] == [8, 4, 2, None]
    assert isinstance(mixers[3].core, CosineCore)
    assert aggregated_attention(site(8, 8, kind="vit")).reduce.ratio == 2
    assert aggregated_attention(site(8, 8), window=[5, 3]).core.window == 5
    assert aggregated_attention(site(8, 8), pretrain_size=7).core.bias.pretrain_size == (7, 7)
    assert aggregated_attention(site(8, 8, stage=3), pretrain_size=(7, 5)).core.bias.pretrain_size == (7, 5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_gradients_are_finite_and_reach_every_parameter(scale: float) -> None:
    place = site(5, 6)
    module, x = aggregated_attention(place), (tokens(place) * scale).requires_grad_()
    nn.init.zeros_(module.qkv.bias)
    module(x, place.grid).x.sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert scale == 0 or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    place = site(6, 5, stage=2)
    module, x = aggregated_attention(place), tokens(place)
    expected = module(x, place.grid).x
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(module(x, place.grid).x.float(), expected, rtol=0, atol=0.02)
    assert module.to(dtype)(x.to(dtype), place.grid).x.dtype == dtype


def test_logits_and_softmax_are_float32_under_autocast(monkeypatch) -> None:
    """What the heads are given: the scale and the bias of positions are not rounded."""
    place, given = site(6, 5, stage=2), []
    real = aggregated.aggregated_heads
    monkeypatch.setattr(aggregated, "aggregated_heads", lambda *args, **kw: given.append(args) or real(*args, **kw))
    module = aggregated_attention(place)
    with torch.autocast("cpu", torch.bfloat16):
        module(tokens(place), place.grid)
    assert given[0][0].dtype == given[0][1].dtype == torch.bfloat16
    assert {t.dtype for t in given[0][2:8]} == {torch.float32}
    torch.testing.assert_close(given[0][5], module.core.bias(place.grid, Grid(3, 2)), rtol=0, atol=0)


def kept_bytes(module: nn.Module, place: Site) -> int:
    """Memory that autograd keeps from the forward for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(tokens(place, 1), place.grid).x
    assert out.requires_grad
    return sum(storages.values())


def test_neighbours_are_not_copied(monkeypatch) -> None:
    """The first stage of TransNeXt-B at 224 pixels, against the authors' way, by unfold."""
    place = Site(96, 4, Grid(56, 56), 0, 0, 5, "hierarchical")
    module = aggregated_attention(place, hidden=8)  # the MLP of the bias keeps the same in both
    ours = kept_bytes(module, place)
    monkeypatch.setattr(
        aggregated, "aggregated_heads", lambda *args, backend, **kw: OPERATION.baselines["official"](*args, **kw)
    )
    copies = 2 * 9 * place.grid.cells * place.dim * 4
    assert kept_bytes(module, place) - ours > 0.8 * copies
    assert ours < 0.5 * kept_bytes(module, place)


def test_what_runs_is_said() -> None:
    assert aggregated_attention(site(8, 8)).runs() == ("aggregated_attention", True, "")
    wide = aggregated_attention(site(8, 8, head_dim=136), backend="triton")
    assert "heads wider than 128 channels" in wide.runs().reason
    with pytest.raises(Refused, match=r"heads wider than 128 channels have no kernel; set attention.backend=auto"):
        check(wide, site(8, 8))


def test_class_tokens_are_refused() -> None:
    place = site(8, 8)._replace(grid=Grid(8, 8, prefix=1))
    with pytest.raises(ValueError, match=r"class token\(s\) in front of it; set model.class_token=false"):
        build(aggregated_attention, [place])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "aggregated: window must be odd and positive, got 4; set attention.window"),
        ({"window": 0}, "aggregated: window must be odd and positive, got 0; set attention.window"),
        ({"sr_ratio": 0}, "aggregated: sr_ratio must be a whole number of at least 1, got 0; set attention.sr_ratio"),
        ({"fixed_pool_size": 0}, "aggregated: fixed_pool_size must be a whole number of at least 1, got 0; set att"),
        ({"hidden": 0}, "aggregated: hidden must be a whole number of at least 1, got 0; set attention.hidden"),
        (
            {"pretrain_size": 0},
            "pretrain_size must be a whole number of at least 1, or two, got 0; give the h",
        ),
    ],
)
def test_meaningless_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregated_attention(site(4, 4), **options)


def test_a_list_without_an_entry_for_the_stage_is_refused() -> None:
    with pytest.raises(Refused, match=r"sr_ratio=\[8, 4\] has no entry for stage 2; set attention.sr_ratio to one"):
        aggregated_attention(site(4, 4, stage=2), sr_ratio=[8, 4])
