"""HyperAttention: the recorded cases, softmax attention where it is exact, and draws that a run repeats."""

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from conf.errors import UserError
from models import create_model
from models.attention import Grid, Site
from models.attention.cores.hyper import HyperCore, hashed, hyper_attention
from models.attention.softmax import softmax_attention
from models.callbacks.routing import Routing
from models.surgery import replace

CASES = [name for name in reference.cases("module") if name.startswith("hyper/")]
GRID = Grid(5, 9, 1)
SITE = Site(32, 4, GRID, 2, 1, 4, "vit")
SMALL = {"block_size": 8, "sample_size": 6, "min_seq_len": 8}


def heads(tokens: int = 46) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 4, tokens, 8, dtype=torch.float64) for _ in range(3))


class Weighted(nn.Module):
    """The core on heads that are given, with values times a weight and the draws of the case."""

    def __init__(self, name: str) -> None:
        super().__init__()
        given, (_, batch, count, tokens, dim) = (reference.info(name)[key] for key in ("hparams", "input_shape"))
        options = {"sample_size": given["sample_size"], "projections": given["lsh_num_projs"]}
        site = Site(count * dim, count, Grid(1, tokens), 0, 0, 1, "vit")
        self.core = HyperCore(
            site, given["block_size"], **options, min_seq_len=given["min_seq_len"], exclude_block=False
        )
        directions = np.random.default_rng(77).standard_normal((dim, given["lsh_num_projs"]))
        self.directions = torch.from_numpy(directions.astype(np.float32))
        places = np.random.default_rng(78).integers(0, tokens, (batch, count, given["sample_size"]))
        self.sampled, self.w = torch.from_numpy(places), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unbind(0)
        return self.core.attend(q, k, v * self.w, self.directions, self.sampled)


def test_the_cases_are_found() -> None:
    assert len(CASES) >= 2


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_authors(name: str) -> None:
    module = Weighted(name)
    parity.check(name, module, lambda theirs: theirs | {"core.step": module.core.step}, lambda module, x: module(x))
    for x, key in zip(reference.model_input(name), ("hash_q", "hash_k"), strict=False):
        assert torch.equal(hashed(x, module.directions), torch.from_numpy(reference.arrays(name)[key]))


@pytest.mark.parametrize("options", [{"block_size": 46, "min_seq_len": 8}, {"min_seq_len": 47}], ids=str)
def test_one_block_or_few_tokens_are_softmax_attention(options: dict) -> None:
    ours, theirs = hyper_attention(SITE, **options), softmax_attention(SITE)
    ours.load_state_dict(theirs.state_dict())  # which names no step
    x = torch.randn(2, GRID.tokens, 32)
    torch.testing.assert_close(ours(x, GRID).x, theirs(x, GRID).x)


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("sample_size", [0, 6])
def test_what_is_computed_is_its_matrix(exclude: bool, sample_size: int) -> None:
    core = HyperCore(SITE, **SMALL | {"sample_size": sample_size}, exclude_block=exclude)
    q, k, v = heads()
    weights = core.matrix(q, k, GRID, GRID)
    torch.testing.assert_close(weights @ v, core(q, k, v, GRID, GRID))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 46, dtype=torch.float64))
    seen = (weights > 0).sum(-1)
    assert seen.min() >= 4 and seen.max() <= 8 + sample_size and (seen.max() > 8) == (sample_size > 0)


def test_sampled_keys_of_the_own_block_count_once() -> None:
    """With every key sampled once, the rows are those of softmax attention."""
    q, k, _ = heads()
    core = HyperCore(SITE, block_size=8, sample_size=46, min_seq_len=8)
    core.sampled = lambda heads, keys: torch.arange(keys).expand(heads, -1)
    exact = (q @ k.mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(core.matrix(q, k, GRID, GRID), exact)
    core.exclude_block = False
    assert (core.matrix(q, k, GRID, GRID) - exact).norm() > 0.1 * exact.norm()


def test_sampling_is_right_on_average() -> None:
    """The mean of numerators over the steps comes near to softmax attention: nearer than the blocks alone."""
    q, k, v = heads()
    exact, blocks = (q @ k.mT * 8**-0.5).softmax(-1) @ v, HyperCore(SITE, **SMALL | {"sample_size": 0})
    core, found = HyperCore(SITE, **SMALL), []
    for _ in range(200):
        found.append(core(q, k, v, GRID, GRID))
        core.after_step()
    far = (blocks(q, k, v, GRID, GRID) - exact).norm()
    assert (torch.stack(found).mean(0) - exact).norm() < 0.3 * far


def test_alike_vectors_meet() -> None:
    """Tokens of few kinds, anywhere: a quarter of the keys has more than half of the weight of softmax attention."""
    kind = torch.randperm(256) % 8
    x, grid = torch.randn(8, 16)[kind] + 0.1 * torch.randn(256, 16), Grid(16, 16)
    core = HyperCore(Site(16, 1, grid, 0, 0, 1, "vit"), block_size=64, sample_size=0, min_seq_len=8)
    seen = core.matrix(x[None, None], x[None, None], grid, grid)[0, 0] > 0
    assert torch.equal(seen.sum(-1), torch.full((256,), 64))
    assert float(((x @ x.mT / 4).softmax(-1) * seen).sum(-1).mean()) > 0.5


def test_draws_follow_from_seed_layer_and_step_and_resume() -> None:
    core, same = HyperCore(SITE, **SMALL), HyperCore(SITE, **SMALL)
    others = [HyperCore(SITE, **SMALL, seed=1), HyperCore(SITE._replace(block=2), **SMALL)]
    assert torch.equal(core.directions(8), same.directions(8)) and torch.equal(core.sampled(4, 46), same.sampled(4, 46))
    for other in others:
        assert not torch.equal(core.directions(8), other.directions(8))
        assert not torch.equal(core.sampled(4, 46), other.sampled(4, 46))
    before = core.directions(8), core.sampled(4, 46)
    core.after_step()
    assert torch.equal(core.directions(8), before[0]) and not torch.equal(core.sampled(4, 46), before[1])
    same.load_state_dict(core.state_dict())
    assert torch.equal(same.sampled(4, 46), core.sampled(4, 46))
    spread = HyperCore(SITE, projections=50).directions(400)
    assert abs(float(spread.mean())) < 0.03 and float(spread.std()) == pytest.approx(1, abs=0.02)


def test_a_run_draws_anew_after_every_step() -> None:
    model = create_model("vit_32px", attention="hyper", depth=2, num_classes=5)
    Routing().update(model)
    steps = [int(buffer) for name, buffer in model.named_buffers() if name.endswith("attn.core.step")]
    assert steps == [1, 1]


def test_a_trained_model_is_swapped_for_inference() -> None:
    """On the same weights: exactly the same for few tokens, near for many."""
    torch.manual_seed(0)
    settings = {"depth": 1, "num_classes": 5, "image_size": 64}
    trained = create_model("vit_32px", attention="softmax", **settings).eval()
    images = torch.randn(2, 3, 64, 64)
    for options, near in (({}, 1e-6), ({"min_seq_len": 16, "block_size": 64, "sample_size": 64}, 0.2)):
        swapped = create_model("vit_32px", attention="hyper", **settings, **options)
        swapped.load_state_dict(trained.state_dict())
        difference = (swapped.eval()(images) - trained(images)).norm() / trained(images).norm()
        assert difference <= near and bool(options) == (difference > 1e-6)


def test_it_takes_the_place_of_the_attention_of_a_timm_model() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    assert replace(model, "hyper").unchanged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "hyper: block_size must be a whole number of at least 1, got 0; set attention.block_size"),
        (
            {"sample_size": -1},
            "hyper: sample_size must be a whole number of at least 0, got -1; set attention.sample_size",
        ),
        ({"projections": 63}, "hyper: projections must be from 1 to 62, got 63; set attention.projections, e.g. 7"),
        (
            {"min_seq_len": 0},
            "hyper: min_seq_len must be a whole number of at least 1, got 0; set attention.min_seq_len",
        ),
        ({"exclude_block": 1}, "hyper: exclude_block must be true or false, got 1; set attention.exclude_block=true"),
        ({"seed": -1}, "hyper: seed must be a whole number of at least 0, got -1; set attention.seed"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hyper_attention(SITE, **options)


def test_images_of_a_batch_do_not_mix_and_there_may_be_none() -> None:
    mixer = hyper_attention(SITE, **SMALL)
    x = torch.randn(3, GRID.tokens, 32)
    torch.testing.assert_close(mixer(x, GRID).x[1:2], mixer(x[1:2], GRID).x)
    assert mixer(x[:0], GRID).x.shape == (0, GRID.tokens, 32)
    half = mixer.half()(x.half(), GRID).x
    assert half.dtype == torch.half and half.isfinite().all()
