"""Clusters by content against the recorded cases, softmax attention, and what the papers say of them."""

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from models.attention import Grid, Refused, Site
from models.attention.biases.relative import relative
from models.attention.layouts.clusters.boat import Bisected, boat, clustered
from models.attention.layouts.clusters.centroids import Centroids
from models.attention.layouts.clusters.routing import Routed, routing
from models.attention.mixers.boat import boat_attention
from models.attention.mixers.routing import routing_attention
from models.attention.softmax import SoftmaxCore, softmax_attention
from models.attention.values.lepe import lepe
from models.layers.block import recomputed

MAP = Grid(6, 9)
SITE = Site(dim=32, num_heads=4, grid=MAP, stage=0, block=0, depth=2, kind="hierarchical")
BOAT = [name for name in reference.cases("module") if name.startswith("boat/")]
ROUTING = [name for name in reference.cases("module") if name.startswith("routing/")]


@pytest.mark.parametrize("name", BOAT)
def test_boat_equals_the_authors(name: str) -> None:
    """The case of CSWin has logits without D^-0.5, as if its queries were D^0.5 times longer."""
    grid, scale = Grid(14, 14), 4.0 if "scale1" in name else 1.0
    mixer = boat_attention(SITE._replace(num_heads=2, grid=grid))

    def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {key.replace("get_v", "value.conv"): value for key, value in theirs.items()}
        longer = torch.ones(96)
        longer[:32] = scale
        return named | {"qkv.weight": named["qkv.weight"] * longer[:, None], "qkv.bias": named["qkv.bias"] * longer}

    parity.check(name, mixer, ours, lambda mixer, x: mixer(x, grid).x)
    state = {name: value.detach() for name, value in ours(reference.weights(name)).items()}
    mixer.load_state_dict(state)
    order = clustered(mixer.queries(reference.model_input(name)), [49] * 4)
    assert torch.equal(order.flatten(2), torch.from_numpy(reference.arrays(name)["cluster_order"]).view(2, 2, 196))


class RoutedHeads(nn.Module):
    """Softmax attention of heads that are given, in clusters."""

    def __init__(self, theirs: dict[str, Tensor], count: int, shared: bool) -> None:
        super().__init__()
        heads, clusters, dim = theirs["kmeans.means"].shape
        memory = torch.stack([theirs["mem_key"], theirs["mem_value"]])
        self.content = Centroids(heads, clusters, dim, memory=tuple(memory.shape) if memory.numel() else None)
        self.content.means.copy_(theirs["kmeans.means"])
        if memory.numel():
            self.content.memory = nn.Parameter(memory)
        self.layout, self.core = Routed(self.content, 0, count, shared), SoftmaxCore(heads, dim)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        grid = Grid(1, qkv.shape[3])
        groups = self.layout.routed(*qkv, grid, self.content)
        mask = {"mask": self.layout.mask(grid, qkv.device)} if self.layout.masks else {}
        o = self.core(groups.q, groups.k, groups.v, groups.grid, groups.kv_grid, **mask)
        return groups.back(o), groups.losses["commitment"]


@pytest.mark.parametrize("name", ROUTING)
def test_routing_equals_the_code(name: str) -> None:
    given = reference.info(name)["hparams"]
    heads = RoutedHeads(reference.weights(name), given["window_size"], given.get("shared_qk", False)).eval()
    qkv = reference.model_input(name).requires_grad_()
    output, commitment = heads(qkv)
    assert reference.compare(name, "output", output) <= parity.OUTPUT
    assert reference.compare(name, "aux_loss", commitment) <= parity.OUTPUT
    learned = [p for p in heads.parameters() if p.requires_grad]
    grad, *grads = torch.autograd.grad(output.square().mean(), [qkv, *learned])
    assert reference.compare(name, "input_grad", grad) <= parity.GRADIENT
    norms = [float(of.norm()) for memory in grads for of in memory]
    assert norms == pytest.approx(reference.arrays(name)["grad_norms"][: len(norms)].tolist(), rel=parity.GRADIENT)


@pytest.mark.parametrize("tokens", [2, 5, 49, 50, 97, 196, 230])
def test_every_token_is_in_one_cluster_of_nearly_the_same_size(tokens: int) -> None:
    sizes = Bisected(49, 20).sizes(tokens)
    assert sum(sizes) == tokens and max(sizes) - min(sizes) <= 1 and len(sizes) >= 2 and max(sizes) <= 49
    order = clustered(torch.randn(2, 3, tokens, 8), sizes)
    for cluster in order.flatten(0, 1):
        assert sorted(i for row, size in zip(cluster.tolist(), sizes, strict=True) for i in row[:size]) == list(
            range(tokens)
        )


def test_two_clusters_that_see_all_of_each_other_are_softmax_attention() -> None:
    ours, theirs = boat_attention(SITE, cluster=27, overlap=27, lepe=False), softmax_attention(SITE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, MAP.tokens, 32)
    torch.testing.assert_close(ours(x, MAP).x, theirs(x, MAP).x)
    odd = Grid(5, 9)
    torch.testing.assert_close(ours(x[:, :45], odd).x, theirs(x[:, :45], odd).x)


def test_similar_queries_meet() -> None:
    """Tokens of two kinds that lie anywhere: the clusters are the kinds."""
    kind = torch.randperm(54) % 2
    q = torch.randn(2, 16)[kind] + 0.1 * torch.randn(54, 16)
    order = clustered(q.expand(1, 1, -1, -1), [27, 27])[0, 0]
    assert {int(kind[row].float().mean() * 27) for row in order} == {0, 27}


def test_one_cluster_of_all_tokens_is_softmax_attention() -> None:
    ours, theirs = routing_attention(SITE, clusters=1, cover="none"), softmax_attention(SITE)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, MAP.tokens, 32)
    torch.testing.assert_close(ours.eval()(x, MAP).x, theirs(x, MAP).x)


def test_local_heads_leave_no_token_out() -> None:
    layouts = {cover: routing(SITE, clusters=4, members=5, cover=cover) for cover in ("none",)}
    layouts["local"] = routing(SITE, clusters=4)
    q, k, v = torch.randn(3, 2, 4, MAP.tokens, 8).unbind(0)
    for cover, layout in layouts.items():
        groups = layout.gather(q, k, torch.ones_like(v), MAP, MAP, layout.content)
        served = groups.back(groups.v[:, :, : layout.count(MAP)])[..., 0]
        assert set(served.unique().tolist()) <= {0.0, 1.0}
        assert served[:, :2].all() == (cover == "local") and not served[:, 2:].all()


@pytest.mark.parametrize(
    "make", [boat_attention, routing_attention, lambda s: routing_attention(s, shared_qk=True, memory=2)]
)
def test_weights_times_values_are_the_output(make: object) -> None:
    mixer = make(SITE).eval()
    x = torch.randn(3, MAP.tokens, 32)
    output = mixer(x, MAP).x
    torch.testing.assert_close(mixer.attend(mixer.attention_matrix(x, MAP), x, MAP), output)
    torch.testing.assert_close(mixer(x[1:2], MAP).x, output[1:2])
    assert mixer(x[:, :35], Grid(5, 7)).x.shape == (3, 35, 32)


def moved(steps: int, through: object) -> tuple[Tensor, Tensor]:
    """Centroids and input gradient after some training steps."""
    torch.manual_seed(0)
    mixer = routing_attention(SITE, decay=0.9)
    for _ in range(steps):
        x = torch.randn(2, MAP.tokens, 32, requires_grad=True)
        mixed = through(mixer, x)
        (mixed.x.square().mean() + mixed.losses["commitment"]).backward()
    return mixer.content.means, x.grad


def test_centroids_move_once_per_step_also_where_it_is_recomputed() -> None:
    plain, grad = moved(3, lambda mixer, x: mixer(x, MAP))
    means, again = moved(3, lambda mixer, x: recomputed(mixer, x, MAP))
    assert torch.equal(means, plain) and torch.equal(again, grad)
    assert not torch.equal(plain, moved(1, lambda mixer, x: mixer(x, MAP))[0])
    torch.testing.assert_close(plain.norm(dim=-1), torch.ones(2, 8))


def test_centroids_stay_in_evaluation() -> None:
    mixer = routing_attention(SITE)
    mixer(torch.randn(2, MAP.tokens, 32), MAP)
    before = {name: value.clone() for name, value in mixer.content.state_dict().items()}
    mixer.eval()(torch.randn(2, MAP.tokens, 32), MAP)
    assert all(torch.equal(before[name], value) for name, value in mixer.content.state_dict().items())
    assert before["num_batches_tracked"] == 1 and before["pending"].any()


def test_every_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What centroids move by is summed over processes, here two of the same tokens."""
    x = torch.randn(2, MAP.tokens, 32)
    mixer = routing_attention(SITE)
    mixer(x, MAP)
    alone = mixer.content.pending.clone()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(2))
    with torch.no_grad():
        mixer.content.pending.zero_()
        mixer(x, MAP)
    torch.testing.assert_close(mixer.content.pending, 2 * alone)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(Refused, match=r"two values, lepe and attention/value; set attention.lepe=false"):
        boat_attention(SITE, value=lepe)
    with pytest.raises(Refused, match=r"one token makes one cluster; choose attention=softmax"):
        boat(SITE._replace(grid=Grid(1, 1)))
    with pytest.raises(Refused, match=r"SoftmaxCore cannot work on tokens without a map, as in Bisected"):
        softmax_attention(SITE, layout=boat, bias=relative)
    with pytest.raises(ValueError, match=r"routing: cover must be local or none, got 'all'; set cover"):
        routing(SITE, cover="all")
    for make in (boat_attention, routing_attention):
        with pytest.raises(Refused, match=r"is a layout by itself"):
            make(SITE, layout=boat)
