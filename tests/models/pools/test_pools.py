"""What each pool's paper says of it."""

import pytest
import torch

from models.layers.grid import Grid
from models.pools.acmil import ACMIL
from models.pools.attention_aggregation import AttentionAggregation, PerClass
from models.pools.class_token import ClassToken
from models.pools.efficient_probing import EfficientProbing
from models.pools.mean import Mean
from models.pools.simpool import EPS, SimPool
from models.pools.slot import SlotPool

GRID, DIM = Grid(3, 4, prefix=1), 8


def tokens(batch: int = 2, grid: Grid = GRID) -> torch.Tensor:
    return torch.randn(batch, grid.tokens, DIM)


def test_the_mean_leaves_the_class_token_out_and_the_class_token_all_else():
    x = tokens()
    assert torch.equal(Mean(DIM, GRID, 3)(x, GRID).x, x[:, 1:].mean(1))
    assert torch.equal(ClassToken(DIM, GRID, 3)(x, GRID).x, x[:, 0])
    with pytest.raises(
        ValueError, match=r"pool: class_token needs .*, got none; set model.class_token=true .* pool=mean"
    ):
        ClassToken(DIM, Grid(3, 4), 3)


@pytest.mark.parametrize("make", [SimPool, EfficientProbing, SlotPool, ACMIL])
def test_the_order_of_tokens_is_free_and_the_class_token_is_no_key(make):
    options = {"num_queries": 4} if make is EfficientProbing else {}
    pool, x = make(DIM, GRID, 3, **options).eval(), tokens()
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(12)])
    torch.testing.assert_close(pool(x[:, order], GRID).x, pool(x, GRID).x)
    other = x.clone()
    other[:, 0] += 5
    assert torch.equal(pool(other, GRID).x, pool(x, GRID).x)


@pytest.mark.parametrize("gamma", [None, 2.0])
def test_simpool_with_folded_keys_is_the_plain_formula(gamma):
    pool, x = SimPool(DIM, GRID, 3, num_heads=2, gamma=gamma, qkv_bias=True), tokens()
    torch.nn.init.normal_(pool.k.bias)
    torch.nn.init.normal_(pool.k.weight)
    y = pool.norm(x[:, 1:])
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (pool.q(x[:, 1:].mean(1, True)), pool.k(y), y))
    weights = (q @ k.mT / 2).softmax(-1)
    if gamma:
        v = v - v.amin((1, 2, 3), keepdim=True) + EPS
        expected = (weights @ v**2).sqrt()
    else:
        expected = weights @ v
    found = pool(x, GRID)
    torch.testing.assert_close(found.x, expected.transpose(1, 2).flatten(1))
    torch.testing.assert_close(found.weights, weights.squeeze(2))


def test_simpool_lies_between_the_tokens_and_a_large_gamma_takes_the_largest():
    x = tokens()
    pool = SimPool(DIM, GRID, 3)
    v = pool.norm(x[:, 1:])
    assert (pool(x, GRID).x <= v.amax(1) + 1e-6).all() and (pool(x, GRID).x >= v.amin(1) - 1e-6).all()
    large = SimPool(DIM, GRID, 3, gamma=60.0).double()(x.double(), GRID).x  # 12 tokens: (1/12)^(1/60) is 0.96
    torch.testing.assert_close(large, (v - v.amin((1, 2), keepdim=True)).amax(1).double(), rtol=0.1, atol=0)


def test_the_minimum_of_the_batch_couples_images_and_that_of_the_image_does_not():
    x = tokens()
    alone = {m: SimPool(DIM, GRID, 3, gamma=2.0, minimum=m) for m in ("image", "batch")}
    differs = {m: (pool(x, GRID).x[:1] - pool(x[:1], GRID).x).abs().max().item() for m, pool in alone.items()}
    differs |= {
        m: max(differs[m], (pool(x, GRID).x[1:] - pool(x[1:], GRID).x).abs().max().item()) for m, pool in alone.items()
    }
    assert differs["image"] < 1e-6 < 1e-3 < differs["batch"]


def test_checkpoints_that_name_queries_of_classes_otherwise_load():
    pool = AttentionAggregation(DIM, GRID, 3, queries="classes")
    state = pool.state_dict()
    earlier = {("queries" if name == "class_queries" else name): value for name, value in state.items()}
    earlier["queries"] = earlier["queries"][None]
    fresh = AttentionAggregation(DIM, GRID, 3, queries="classes")
    fresh.load_state_dict(earlier)
    assert torch.equal(fresh.class_queries, pool.class_queries)


def test_the_class_token_is_a_key_of_the_aggregation_and_queries_of_classes_are_none():
    one, each = AttentionAggregation(DIM, GRID, 3), AttentionAggregation(DIM, GRID, 3, queries="classes")
    x = tokens()
    found, of_classes = one(x, GRID), each(x, GRID)
    assert found.x.shape == (2, DIM) and found.weights.shape == (2, 1, 13) and (found.weights.sum(-1) < 1).all()
    assert of_classes.x.shape == (2, 3, DIM)
    torch.testing.assert_close(of_classes.weights.sum(-1), torch.ones(2, 3))
    head = each.own_head(3)
    assert isinstance(head, PerClass) and one.own_head(3) is None
    changed = of_classes.x.clone()
    changed[:, 1] += 1
    assert ((head(changed) != head(of_classes.x)).all(0)).tolist() == [False, True, False]


def test_a_query_of_efficient_probing_moves_its_own_slice():
    pool, x = EfficientProbing(DIM, GRID, 3, num_queries=4), tokens()
    before = pool(x, GRID).x
    with torch.no_grad():
        pool.queries[:, 2] += 1
    assert (pool(x, GRID).x != before).any(0).nonzero().flatten().tolist() == [4, 5]


def test_values_behind_the_pooling_of_efficient_probing_are_values_before_it():
    pool, x = EfficientProbing(DIM, GRID, 3, num_queries=2, d_out=2, qkv_bias=True), tokens()
    torch.nn.init.normal_(pool.v.bias)
    found = pool(x, GRID)
    v = pool.v(x[:, 1:]).unflatten(-1, (2, -1))
    torch.testing.assert_close(found.x, torch.einsum("bqs,bsqd->bqd", found.weights, v).flatten(1))


def test_slots_share_every_token_and_are_drawn_in_training_only():
    pool, x = SlotPool(DIM, GRID, 3, rounds=1, join="concatenate"), tokens()
    assert torch.equal(pool.eval()(x, GRID).x, pool(x, GRID).x)
    assert not torch.equal(pool.train()(x, GRID).x, pool(x, GRID).x)
    logits = pool.q(pool.norm_slots(pool.mu)) @ pool.k(pool.norm_tokens(x[:, 1:])).mT / DIM**0.5
    shares = logits.softmax(1)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 12))
    expected = (shares + 1e-8) / (shares + 1e-8).sum(-1, keepdim=True)
    torch.testing.assert_close(pool.eval()(x, GRID).weights, expected)


def test_slots_change_places_with_where_they_begin():
    pool, x = SlotPool(DIM, GRID, 3, join="concatenate").eval(), tokens()
    before = pool(x, GRID).x.unflatten(1, (4, DIM))
    with torch.no_grad():
        pool.mu.copy_(pool.mu[:, [2, 0, 3, 1]])
    torch.testing.assert_close(pool(x, GRID).x.unflatten(1, (4, DIM)), before[:, [2, 0, 3, 1]])


def test_shared_slots_differ_in_evaluation():
    pool, x = SlotPool(DIM, GRID, 3, start="shared", join="concatenate").eval(), tokens()
    slots = pool(x, GRID).x.unflatten(1, (4, DIM))
    assert pool.mu.shape == (1, 1, DIM) and (slots[:, 0] - slots[:, 1]).abs().min() > 0
    torch.testing.assert_close(pool(x[1:], GRID).x, pool(x, GRID).x[1:])


def test_acmil_closes_tokens_in_training_only():
    pool, x = ACMIL(DIM, GRID, 3, branches=2, masked=5), tokens()
    assert (pool.eval()(x, GRID).weights > 0).all()
    weights = pool.train()(x, GRID).weights
    assert ((weights == 0).sum(-1) == 3).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2))


def test_acmil_learns_by_labels_and_by_difference():
    pool, x = ACMIL(DIM, GRID, 3, branches=2).eval(), tokens()
    found = pool(x, GRID)
    labels = torch.tensor([2, 0])
    expected = torch.stack([torch.nn.functional.cross_entropy(found.logits[:, q], labels) for q in range(2)]).mean()
    losses = found.losses_with(labels)
    torch.testing.assert_close(losses["branches"], expected)
    soft = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(found.losses_with(soft)["branches"], expected)
    assert found.losses_with(None).keys() == {"diversity"}
    a, b = found.weights.unbind(1)
    torch.testing.assert_close(losses["diversity"], torch.cosine_similarity(a, b).mean())
    assert ACMIL(DIM, GRID, 3, branches=1)(x, GRID).losses == {} and ACMIL(DIM, GRID, 0)(x, GRID).logits is None


@pytest.mark.parametrize(
    ("make", "option", "text"),
    [
        (SimPool, {"gamma": 0}, r"SimPool: gamma must be a number above 0, or null, got 0; set pool.gamma"),
        (SimPool, {"num_heads": 3}, r"SimPool: 8 channels must divide into heads, got 3; set pool.num_heads"),
        (SimPool, {"minimum": "all"}, r"SimPool: minimum must be image or batch, got 'all'; set pool.minimum"),
        (SimPool, {"beta": 1}, r"SimPool: beta must be true or false, got 1; set pool.beta"),
        (AttentionAggregation, {"queries": 2}, r"queries must be 1 or classes, got 2; set pool.queries"),
        (AttentionAggregation, {"queries": True}, r"queries must be 1 or classes, got True; set pool.queries"),
        (AttentionAggregation, {"num_heads": 3}, r"8 channels must divide into heads, got 3; set pool.num_heads"),
        (AttentionAggregation, {"mlp_ratio": 0}, r"mlp_ratio must be a number above 0, got 0; set pool.mlp_ratio"),
        (AttentionAggregation, {"layer_scale": -1}, r"layer_scale must be a number of at least 0, got -1"),
        (EfficientProbing, {"num_queries": 3}, r"must divide the 8 channels together, got 3 and 1; set pool.num_q"),
        (EfficientProbing, {"d_out": 0}, r"d_out must be a whole number of at least 1, got 0; set pool.d_out"),
        (SlotPool, {"start": "mu"}, r"SlotPool: start must be own or shared, got 'mu'; set pool.start"),
        (SlotPool, {"rounds": 0}, r"SlotPool: rounds must be a whole number of at least 1, got 0; set pool.rounds"),
        (SlotPool, {"join": "sum"}, r"SlotPool: join must be mean or concatenate, got 'sum'; set pool.join"),
        (ACMIL, {"mask_share": 1}, r"ACMIL: mask_share must be at least 0 and below 1, got 1; set pool.mask_share"),
        (ACMIL, {"branches": 0}, r"ACMIL: branches must be a whole number of at least 1, got 0; set pool.branches"),
        (ACMIL, {"inner": 0}, r"ACMIL: inner must be a whole number of at least 1, got 0; set pool.inner"),
    ],
)
def test_wrong_options(make, option, text):
    with pytest.raises(ValueError, match=text):
        make(DIM, GRID, 3, **option)


def test_queries_of_no_classes_are_refused():
    with pytest.raises(ValueError, match=r"a query per class needs classes, got num_classes=0; set pool.queries=1"):
        AttentionAggregation(DIM, GRID, 0, queries="classes")
