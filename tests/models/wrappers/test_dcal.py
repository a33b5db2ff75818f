"""DCAL: which cells ask, what images see of their partners, what is left in evaluation, how the losses are weighted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model
from models.layers.grid import Grid

SMALL = {"class_token": True, "depth": 4, "dim": 32, "num_heads": 4, "num_classes": 5}
GRID = Grid(8, 8, 1)


def dcal(attention: str | None = None, model: str = "vit_32px", wrapper: dict | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    node = {"_target_": "models.wrappers.dcal.DCAL", "_partial_": True, **(wrapper or {})}
    made = create_model(model, attention, wrapper=node, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def blocks(model: nn.Module) -> list[nn.Module]:
    return [block for stage in model.stages for block in stage.blocks]


@torch.no_grad()
def test_the_cells_that_ask_have_the_largest_rollout():
    model = dcal().eval()
    x, grid = model.stem(images(2))
    seen = model.wrapper._followed(model, x, grid)[2]
    product = torch.eye(65).expand(2, -1, -1)
    for block in blocks(model):
        S = block.attn.attention_matrix(block.norm1(x), grid).mean(1)
        product = (S + torch.eye(65)) / 2 @ product
        x = block(x, grid)[0]
    torch.testing.assert_close(seen, product[:, 0])
    torch.testing.assert_close(seen.sum(1), torch.ones(2))
    cells = model.wrapper.chosen(seen, grid)
    assert cells.shape == (2, 7), "a tenth of 64 cells, rounded up"
    assert all(set(cells[i].tolist()) == set((product[i, 0, 1:].argsort()[-7:] + 1).tolist()) for i in range(2))


@torch.no_grad()
def test_chosen_cells_ask_all_tokens():
    wrapper, x = dcal().wrapper, torch.randn(2, 65, 32)
    index = torch.tensor([[3, 9], [60, 1]])
    every = x + wrapper.attn(y := wrapper.norm1(x), y)
    every = every + wrapper.mlp(wrapper.norm2(every))
    expected = torch.stack([every[0, [3, 9]], every[1, [60, 1]]])
    torch.testing.assert_close(wrapper.local(x, index), expected)


@torch.no_grad()
def test_keys_and_values_are_those_of_both_images_of_a_pair(monkeypatch):
    """Of a block: queries of the one alone, keys and values of both."""
    model = dcal(depth=4)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor([2, 0, 3, 1]))
    tokens = torch.randn(4, 65, 32)
    partners, x = [3, 2, 1, 0], tokens
    partners = [{2: 0, 0: 2, 3: 1, 1: 3}[i] for i in range(4)]
    for block in blocks(model):
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        both_k, both_v = (torch.cat([t, t[partners]], dim=2) for t in (k, v))
        o = F.scaled_dot_product_attention(q, both_k, both_v).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(o)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model.wrapper.beside(model, tokens, GRID), x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_image_beside_itself_is_as_alone():
    model, x = dcal(), torch.randn(1, 65, 32)
    alone = x
    for block in blocks(model):
        alone = block(alone, GRID)[0]
    torch.testing.assert_close(model.wrapper.beside(model, x, GRID), alone, rtol=1e-4, atol=1e-5)
    assert model.wrapper.beside(model, torch.randn(3, 65, 32), GRID).shape == (3, 65, 32)


@torch.no_grad()
def test_evaluation_has_two_branches_and_no_partners():
    model, plain = dcal().eval(), create_model("vit_32px", **SMALL).eval()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("wrapper.")}
    plain.load_state_dict(state)
    x, logits = images(3), model(images(3))
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(3))
    local = 2 * logits.exp() - plain(x).softmax(1)
    assert (local > 0).all() and (local - plain(x).softmax(1)).abs().max() > 1e-3
    without = dcal(wrapper={"pairs": False}).eval()
    without.load_state_dict({k: v[:2] if "uncertainty" in k else v for k, v in model.state_dict().items()})
    assert torch.equal(without(x), logits)
    tokens = model.forward_features(x)
    torch.testing.assert_close(tokens, plain.forward_features(x))


@pytest.mark.parametrize("pairs", [True, False])
def test_losses_are_weighted_by_learned_uncertainty(pairs):
    model, labels = dcal(wrapper={"pairs": pairs}).train(), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(5)
    logits, losses = model(images(4), return_losses=True, labels=labels)
    assert losses.keys() == {"dcal"} and losses["dcal"].shape == (1,)
    total = F.cross_entropy(logits, labels) + losses["dcal"].sum()
    torch.manual_seed(5)
    maps = model.wrapper(model, images(4), labels)[0]
    branches = [logits, model.wrapper.head(model.wrapper.norm(maps[int(pairs)][0]).mean(1))]
    branches += [model.head(model.norm(maps[0][0])[:, 0])] if pairs else []
    w = model.wrapper.uncertainty
    assert len(w) == len(branches) == 2 + pairs
    expected = sum((F.cross_entropy(z, labels) / w[i].exp() + w[i]) / 2 for i, z in enumerate(branches))
    torch.testing.assert_close(total, expected)
    total.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_recomputation_gives_the_same_gradients():
    plain = dcal()
    recomputed = copy.deepcopy(plain)
    recomputed.set_gradient_checkpointing(True)
    for model in (plain, recomputed):
        torch.manual_seed(3)
        logits, losses = model.train()(images(3), return_losses=True, labels=torch.tensor([0, 1, 2]))
        (logits.square().mean() + losses["dcal"].sum()).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_losses_of_blocks_come_back():
    _, losses = dcal("moh").train()(images(2), return_losses=True)
    assert losses["load_balance"].shape == (4,)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"wrapper": {"share": 0}}, r"dcal: share must be above 0 and at most 1, got 0; set wrapper.share"),
        ({"wrapper": {"pairs": 1}}, r"dcal: pairs must be true or false, got 1; set wrapper.pairs=true or false"),
        ({"class_token": False}, r"cells by what the class token depends on, got a ViT that classifies by the map"),
        ({"gate": "eca"}, r"follows the blocks of a plain ViT without gates, .*, got ViT; choose a vit model and le"),
        ({"reducer": "top"}, r"follows the blocks of a plain ViT without gates, .*, got ViT; choose a vit model and"),
        ({"attention": "agent"}, r"needs the shares of all pairs of tokens, .*, got .*; set attention=softmax with"),
        ({"weights": "sigmoid"}, r"needs the shares of all pairs of tokens, .*, got MultiHead; set attention=softm"),
        ({"features_only": True}, r"features_only: maps are those of a model alone, got the wrapper DCAL; leave wr"),
    ],
)
def test_misfits_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        dcal(**options)


@pytest.mark.parametrize("name", ["swin_32px", "convit_32px", "xcit_32px", "perceiver_32px"])
def test_other_models_are_refused(name):
    with pytest.raises(ValueError, match=r"dcal: .*; (choose a vit model|set model.class_token=true)"):
        create_model(name, wrapper="dcal")
