"""Multi-head embeddings: shared projections, what is left to train, any layout, and folding."""

from functools import partial

import pytest
import torch

from models.attention import Grid, Site
from models.attention.moh import MoHAttention
from models.attention.softmax import softmax_attention
from models.backbones.vit import ViT
from models.reparam import adopt, fold
from models.reparam.mhe import mhe


def vit(attention=softmax_attention, **options):
    return ViT(attention, 16, 5, patch_size=4, dim=32, depth=1, num_heads=4, **options)


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_heads_are_one_projection_and_an_embedding(mode):
    model = vit(reparam=partial(mhe, mode=mode))
    qkv, x = model.stages[2].blocks[0].attn.qkv, torch.randn(3, 32)
    shared = qkv.parametrizations.weight.original
    projected = (x @ shared.T).unflatten(-1, (3, 1, 8))
    e = (qkv.bias if mode == "add" else qkv.parametrizations.weight[0].embedding).view(3, 4, 8)
    expected = projected + e if mode == "add" else projected * (1 + e)
    torch.testing.assert_close(qkv(x), expected.flatten(1))
    numbers = sum(p.numel() for p in qkv.parametrizations.parameters())
    assert numbers == 3 * 32 * 8 + (3 * 32 if mode == "mul" else 0)


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_folding_is_exact(mode):
    model, images = vit(reparam=partial(mhe, mode=mode)), torch.randn(2, 3, 16, 16)
    logits = model(images)
    fold(model)
    assert torch.equal(model(images), logits)
    assert model.state_dict().keys() == vit().state_dict().keys()


def test_windows_reduced_keys_and_gated_heads():
    site = Site(32, 4, Grid(4, 4), 0, 1, 2, "hierarchical")
    for attention in (
        softmax_attention(site, window=2, shift=True, relative_position_bias=True),
        softmax_attention(site, sr_ratio=2),
        MoHAttention(site, core=softmax_attention, shared_heads=1, routed_heads=1),
    ):
        net = torch.nn.Module()
        net.attn, x = attention, torch.randn(2, 16, 32)
        mhe(net)
        assert [name for name in net.state_dict() if name.endswith("embedding")]
        mixed = net.attn(x, Grid(4, 4)).x
        mixed.square().mean().backward()
        fold(net)
        torch.testing.assert_close(net.attn(x, Grid(4, 4)).x, mixed)


def test_a_plain_models_first_heads_are_adopted():
    plain, model = vit(), vit(reparam=mhe)
    adopt(model, plain.state_dict())
    weight = plain.stages[2].blocks[0].attn.qkv.weight.unflatten(0, (3, 4, 8))[:, 0]
    assert torch.equal(model.stages[2].blocks[0].attn.qkv.parametrizations.weight.original.view(3, 8, 32), weight)
    with pytest.raises(ValueError, match="adopt: the weights must be those of the plain model, got others: extra"):
        adopt(model, plain.state_dict() | {"extra": torch.zeros(1)})


def test_embeddings_do_not_decay():
    from timm.optim import create_optimizer_v2

    model = vit(reparam=mhe)
    groups = create_optimizer_v2(model, opt="adamw", weight_decay=0.1).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    rates = {name.rpartition(".")[2]: decay[id(p)] for name, p in model.named_parameters() if "parametriz" in name}
    assert rates == {"original": 0.1, "embedding": 0}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"mhe: mode must be one of mul, add, got 'max'; set reparam.mode"):
        vit(reparam=partial(mhe, mode="max"))
    with pytest.raises(ValueError, match=r"mhe: embeddings that are added are the bias .*, got none in stages.*bias=t"):
        vit(partial(softmax_attention, qkv_bias=False), reparam=partial(mhe, mode="add"))
