"""Routers beside the published one, balancing without a loss, statistics, and balancing over processes."""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.attention import Grid, Refused, Site
from models.attention.conv import DepthwiseConv
from models.attention.head_router import BIAS_RATE, HeadRouter, QueryRouter, ReLURouter
from models.attention.inline import inline_attention
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention

GRID = Grid(6, 5)
SITE = Site(64, 8, GRID, 0, 1, 12, "vit")


def tokens(seed: int = 0, dim: int = 64) -> Tensor:
    return torch.randn(2, 30, dim, generator=torch.Generator().manual_seed(seed))


# relu


def relu_router(shared: int, routed: int) -> ReLURouter:
    torch.manual_seed(0)
    return ReLURouter(64, 8, shared, routed, balance="bias")


@pytest.mark.parametrize(("shared", "routed"), [(0, 3), (1, 3), (2, 3), (2, 6), (8, 0)])
def test_relu_uses_the_heads_above_zero(shared: int, routed: int) -> None:
    router, x = relu_router(shared, routed), tokens()
    gates, balance = router(x)
    assert gates.shape == (2, 30, 8) and gates.isfinite().all() and balance is None
    if routed:
        logits = router.wg(x)
        assert torch.equal(gates[..., shared:] != 0, logits > 0)
        active = (logits > 0).any(-1)
        alpha = 2 * router.wg_0(x).softmax(-1)[..., 1] if shared else torch.ones(2, 30)
        torch.testing.assert_close(gates[..., shared:].sum(-1)[active], (routed * alpha)[active])
    if shared:
        share = 2 * router.wg_0(x).softmax(-1)[..., 0] if routed else torch.ones(2, 30)
        torch.testing.assert_close(gates[..., :shared].mean(-1), share)


def test_relu_leaves_out_every_head_of_a_token_that_has_none_above_zero() -> None:
    router = relu_router(2, 3)
    nn.init.constant_(router.wg.weight, -1.0)
    gates, _ = router(torch.ones(1, 3, 64))
    assert (gates[..., 2:] == 0).all()
    gates.sum().backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_relu_holds_the_asked_number_of_heads() -> None:
    router, counts = relu_router(2, 2), []
    for step in range(800):
        gates, _ = router(tokens(step % 4))
        router.after_step()
        counts.append((gates[..., 2:] != 0).float().sum(-1).mean().item())
    assert counts[0] > 2.5
    assert sum(counts[-50:]) / 50 == pytest.approx(2.0, abs=0.1)


# l2


def test_l2_chooses_the_longest_queries() -> None:
    torch.manual_seed(0)
    module, x = MoHAttention(SITE, core=softmax_attention, shared_heads=2, routed_heads=3, router="l2").eval(), tokens()
    assert not list(module.router.parameters())
    norms = module.mixer.queries(x).norm(dim=-1).transpose(1, 2)[..., 2:]
    gates, _ = module.router(x, module.mixer.queries(x))
    assert torch.equal(gates.unique(), torch.tensor([0.0, 1.0])) and (gates[..., :2] == 1).all()
    assert torch.equal(gates[..., 2:].sort(dim=-1).indices[..., -3:].sort().values, norms.topk(3).indices.sort().values)


def test_l2_has_a_gradient_in_training_and_a_loss() -> None:
    module, x = MoHAttention(SITE, core=softmax_attention, shared_heads=2, routed_heads=3, router="l2"), tokens()
    q = module.mixer.queries(x).detach().requires_grad_()
    gates, balance = module.router.train()(x, q)
    assert 3 - 1e-5 <= balance.item() <= 6
    (gates * torch.randn(8)).sum().backward()
    assert q.grad[:, 2:].abs().sum() > 0 and (q.grad[:, :2] == 0).all()


def test_l2_has_a_moderate_gradient_where_norms_nearly_agree() -> None:
    router = QueryRouter(64, 4, 1, 2).train()
    q = torch.ones(1, 4, 3, 8) + 1e-6 * torch.randn(1, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    q = torch.cat([q, 8 * torch.ones(1, 4, 1, 8)], dim=2).requires_grad_()
    gates, balance = router(torch.zeros(1, 4, 64), q)
    ((gates * torch.arange(4.0)).sum() + balance).backward()
    assert gates.isfinite().all() and 0 < q.grad.abs().max() < 1e3


def test_queries_are_those_of_the_attention() -> None:
    module, x = softmax_attention(SITE), tokens()
    q = module.qkv(x).unflatten(2, (3, 8, 8))[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(module.queries(x), q)


# balancing


@pytest.mark.parametrize("kind", [HeadRouter, QueryRouter])
def test_the_bias_moves_the_choice_and_not_the_weights(kind: type[HeadRouter]) -> None:
    torch.manual_seed(0)
    router, x = kind(64, 8, 2, 3, balance="bias").eval(), tokens()
    q = torch.randn(2, 8, 30, 8, generator=torch.Generator().manual_seed(1))
    plain, loss = router(x, q)
    assert loss is None
    router.bias[4] = 10.0
    gates, _ = router(x, q)
    assert (gates[..., 6] != 0).all() and ((gates != 0).sum(-1) == 5).all()
    if kind is HeadRouter:
        chosen = router.wg(x).masked_fill(gates[..., 2:] == 0, -torch.inf).softmax(-1)
        torch.testing.assert_close(gates[..., 2:], 6 * router.wg_0(x).softmax(-1)[..., 1:] * chosen)
    torch.testing.assert_close(gates[..., :2], plain[..., :2])


def test_the_bias_follows_the_load() -> None:
    torch.manual_seed(0)
    router = HeadRouter(64, 8, 2, 3, balance="bias")
    loads = []
    for step in range(400):
        gates, _ = router(tokens(step % 4) + 2)  # what all tokens have in common prefers some heads
        loads.append((gates[..., 2:] != 0).float().mean((0, 1)))
        router.after_step()
        assert (router.load == 0).all()
    assert set(router.state_dict()) == {"bias", "wg.weight", "wg_0.weight", "wg_1.weight"}
    assert router.bias.abs().max() <= 400 * BIAS_RATE + 1e-6
    first, last = torch.stack(loads[:4]).mean(0), torch.stack(loads[-4:]).mean(0)
    assert last.std() < 0.2 * first.std()


def test_nothing_is_counted_in_evaluation() -> None:
    router = HeadRouter(64, 8, 2, 3, balance="bias").eval()
    router(tokens())
    assert (router.load == 0).all()
    HeadRouter(64, 8, 2, 3).after_step()  # nothing to do


def _worker(rank: int, meeting: Path) -> tuple[float, list, list]:
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=2)
    torch.manual_seed(0)
    router, biased = HeadRouter(16, 6, 2, 2, all_reduce=True), HeadRouter(16, 6, 2, 2, balance="bias")
    x = tokens(rank, 16)
    loss = router(x)[1]
    loss.backward()
    biased(x)
    biased.after_step()
    if rank == 0:
        router.eval()(x)  # alone, as where one process makes samples: nothing waits for the others
    dist.destroy_process_group()
    return loss.item(), router.wg.weight.grad.tolist(), biased.bias.tolist()


@pytest.mark.full  # new processes, since one that has threads of a backward pass cannot be forked
def test_two_processes_balance_as_one_with_all_tokens(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        of_ranks = list(pool.map(_worker, range(2), [tmp_path / "meeting"] * 2))
    torch.manual_seed(0)
    router, biased = HeadRouter(16, 6, 2, 2), HeadRouter(16, 6, 2, 2, balance="bias")
    x = torch.cat([tokens(0, 16), tokens(1, 16)])
    loss = router(x)[1]
    loss.backward()
    biased(x)
    biased.after_step()
    for value, _, bias in of_ranks:
        assert value == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(torch.tensor(bias), biased.bias)
    mean = torch.tensor([grad for _, grad, _ in of_ranks]).mean(0)  # as data parallel training averages
    torch.testing.assert_close(mean, router.wg.weight.grad, rtol=1e-4, atol=1e-7)


# statistics


def test_statistics_while_watched() -> None:
    router, x = HeadRouter(64, 8, 2, 3).eval(), tokens()
    router(x)
    assert router.seen() is None
    router.watch()
    for _ in range(2):
        gates, _ = router(x)
    seen = router.seen()
    assert router.seen() is None and not router.watched
    assert seen.load == pytest.approx((gates[..., 2:] != 0).double().mean((0, 1)).tolist())
    logits = router.wg(x).detach()
    best = logits.sort(dim=-1, descending=True).values
    assert seen.margin == pytest.approx((best[..., 2] - best[..., 3]).mean().item(), rel=1e-5)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert seen.entropy == pytest.approx(entropy / math.log(6), rel=1e-5)


def test_an_undecided_router_has_entropy_1_and_no_margin() -> None:
    router = HeadRouter(64, 8, 2, 3)
    nn.init.zeros_(router.wg.weight)
    router.watch()
    router(tokens())
    seen = router.seen()
    assert seen.entropy == pytest.approx(1.0) and seen.margin == 0 and seen.load == [1, 1, 1, 0, 0, 0]


# options of the attention


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"router": "top1"}, "moh: router must be one of softmax, relu, l2, got 'top1'; set attention.router"),
        ({"balance": "no"}, "moh: balance must be loss or bias, got 'no'; set attention.balance"),
        ({"router": "relu"}, "router=relu is balanced by a bias, got balance=loss; set attention.balance=bias"),
        ({"router": "l2", "backend": "triton"}, "router=l2 has no Triton kernel, got backend=triton"),
        (
            {"shared_heads": [1] * 11},
            "shared_heads has 11 entries for 12 blocks; give attention.shared_heads one entry",
        ),
        ({"shared_heads": None}, "shared_heads must be a number of heads .*got None; set attention.shared_heads"),
        ({"routed_heads": True}, "routed_heads must be a number of heads .*got True; set attention.routed_heads"),
        ({"shared_heads": "3"}, "shared_heads must be a number of heads .*got '3'; set attention.shared_heads"),
        ({"routed_heads": math.nan}, "routed_heads must be a number of heads .*got nan; set attention.routed_heads"),
        ({"shared_heads": 6, "routed_heads": 3}, "6 shared and 3 routed heads are more than the 8 heads"),
    ],
)
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("[", r"\[")):
        MoHAttention(SITE, core=softmax_attention, **options)


def test_one_entry_per_block_or_per_stage() -> None:
    per_block = {"shared_heads": [8] + [2] * 11, "routed_heads": [0] + [4] * 11}
    for block, heads in ((0, (8, 0)), (1, (2, 4)), (11, (2, 4))):
        router = MoHAttention(SITE._replace(block=block), core=softmax_attention, **per_block).router
        assert (router.shared, router.routed) == heads
    per_stage = {"shared_heads": [3, 6, 3, 4], "routed_heads": [0, 0, 5, 12]}
    assert MoHAttention(SITE, core=softmax_attention, **per_stage).router.routed == 5
    deep = Site(72, 3, GRID, 0, 1, 5, "hierarchical")
    assert MoHAttention(deep, core=softmax_attention, **per_stage).router.shared == 3


def test_an_attention_that_reads_the_stream_is_gated() -> None:
    core = partial(inline_attention, residual_input="stream")
    module, x = MoHAttention(SITE, core=core, shared_heads=2, routed_heads=3).eval(), tokens()
    assert module.reads_stream
    out = module(x, GRID, stream_BNC=2 * x).x
    gates = module.router(x)[0]
    torch.testing.assert_close(out, module.mixer(x, GRID, gates, stream_BNC=2 * x).x)


def test_l2_needs_queries() -> None:
    with pytest.raises(Refused, match="router=l2 needs the queries of each token, which DepthwiseConv has not"):
        MoHAttention(SITE, core=lambda site: DepthwiseConv(site, 3), router="l2")
