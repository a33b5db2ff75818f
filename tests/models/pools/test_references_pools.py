"""Pools against what the authors' modules returned, driven by the recorded cases alone."""

from collections.abc import Callable

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from models.layers.grid import Grid
from models.layers.pooled import Pool
from models.pools import acmil
from models.pools.acmil import ACMIL
from models.pools.attention_aggregation import AttentionAggregation
from models.pools.efficient_probing import EfficientProbing
from models.pools.simpool import SimPool
from models.pools.slot import SlotPool

State = dict[str, Tensor]


def cases(family: str, *constructors: str) -> list[str]:
    modules = [name for name in reference.cases("module") if name.startswith(f"{family}/")]
    return [name for name in modules if reference.info(name)["official_constructor"] in constructors]


def renamed(**names: str) -> Callable[[State], State]:
    """Ours by theirs, where they begin with a name; the rest is called the same."""

    def convert(theirs: State) -> State:
        ours = {}
        for key, value in theirs.items():
            start = next((start for start in sorted(names, key=len, reverse=True) if key.startswith(start)), "")
            ours[names.get(start, "") + key.removeprefix(start)] = value
        return ours

    return convert


def pooled(module: Pool, x: Tensor) -> Tensor:
    """What a pool makes of tokens, or of a map (B, C, H, W)."""
    if x.dim() == 4:
        return module(x.flatten(2).mT, Grid(*x.shape[2:])).x
    return module(x, Grid(1, x.shape[1])).x


@pytest.mark.parametrize("name", cases("simpool", "sp.SimPool"))
def test_simpool(name):
    hparams = dict(reference.info(name)["hparams"])
    options = {key: hparams[key] for key in ("num_heads", "gamma", "qkv_bias") if key in hparams}
    module = SimPool(hparams["dim"], Grid(7, 7), 0, beta=hparams.get("use_beta", False), minimum="batch", **options)
    parity.check(name, module, renamed(norm_patches="norm", wq="q", wk="k"), pooled)


@pytest.mark.parametrize("name", cases("simpool", "efficient-probing: poolings.simpool.SimPool_nolinears"))
def test_simpool_without_linears(name):
    hparams = reference.info(name)["hparams"]
    module = SimPool(hparams["dim"], Grid(7, 7), 0, num_heads=hparams["num_heads"], linears=False)
    parity.check(name, module, renamed(norm_patches="norm"), pooled)


def aggregation(hparams: dict, **options: object) -> AttentionAggregation:
    given = {key: hparams[key] for key in ("num_heads", "qkv_bias") if key in hparams}
    queries = "classes" if "num_classes" in hparams else 1
    return AttentionAggregation(
        hparams["dim"], Grid(7, 7), hparams.get("num_classes", 0), queries=queries, **given, **options
    )


@pytest.mark.parametrize("name", cases("patchconvnet", "patchconvnet_models.Learned_Aggregation_Layer"))
def test_aggregation(name):
    module = aggregation(reference.info(name)["hparams"]).attn
    parity.check(name, module, dict, lambda attn, x: attn(x[:, :1], x)[0])


@pytest.mark.parametrize("name", cases("patchconvnet", "patchconvnet_models.Learned_Aggregation_Layer_multi"))
def test_aggregation_by_class(name):
    hparams = reference.info(name)["hparams"]
    first = hparams["num_classes"]
    parity.check(name, aggregation(hparams).attn, dict, lambda attn, x: attn(x[:, :first], x[:, first:])[0])


class Block(nn.Module):
    """The block of a pool alone, on a class token that stands in front of the tokens."""

    def __init__(self, pool: AttentionAggregation) -> None:
        super().__init__()
        del pool.queries, pool.norm
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool.attended(x[:, :1], x[:, 1:])[0]


@pytest.mark.parametrize("name", cases("patchconvnet", "patchconvnet_models.Layer_scale_init_Block_only_token"))
def test_token_block(name):
    hparams = reference.info(name)["hparams"]
    module = Block(aggregation(hparams, mlp_ratio=hparams["mlp_ratio"]))
    names = {key: f"pool.{key}" for key in ("norm1", "norm2", "attn", "mlp")}
    convert = renamed(**names, gamma_1="pool.scale1.gamma", gamma_2="pool.scale2.gamma")
    parity.check(name, module, convert, lambda block, x: block(x))


@pytest.mark.parametrize("name", cases("efficient_probing", "poolings.ep.EfficientProbing"))
def test_efficient_probing(name):
    hparams = dict(reference.info(name)["hparams"])
    module = EfficientProbing(hparams.pop("dim"), Grid(7, 7), 0, **hparams)
    parity.check(name, module, renamed(cls_token="queries"), pooled)


@pytest.mark.parametrize("name", cases("efficient_probing", "probe_heads.build_probe_head (ep)"))
def test_probe(name):
    hparams = reference.info(name)["hparams"]
    options = {"num_queries": hparams["ep_queries"], "d_out": hparams["d_out"], "batch_norm": True}
    pool = EfficientProbing(hparams["dim"], Grid(7, 7), 0, **options)
    module = nn.ModuleDict({"pool": pool, "head": nn.Linear(pool.out_dim, hparams["nb_classes"])})
    counter = {"1.num_batches_tracked": torch.tensor(0)}  # the case leaves it as it was made
    names = renamed(**{"0.cls_token": "pool.queries", "0.": "pool.", "1.": "pool.norm.", "2.": "head."})

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module["head"](pooled(module["pool"], x))

    parity.check(name, module, lambda theirs: names(theirs | counter), call)


@pytest.mark.parametrize("name", cases("slot", "slot_attention.SlotAttention"))
def test_slot(name):
    """Its slots themselves; joined they are the features."""
    hparams, (batch, _, dim) = reference.info(name)["hparams"], reference.info(name)["input_shape"]
    options = {"num_slots": hparams["num_slots"], "rounds": hparams["iters"], "hidden": hparams["hidden_dim"]}
    settings = {"start": "shared", "join": "concatenate", "qkv_bias": True, "norm_eps": 1e-5}
    module = SlotPool(dim, Grid(5, 6), 0, **options, **settings)
    noise = np.random.default_rng(91).standard_normal((batch, hparams["num_slots"], dim)).astype(np.float32)
    names = {"to_": "", "slots_mu": "mu", "slots_logsigma": "log_sigma", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    convert = renamed(**names, norm_input="norm_tokens", norm_pre_ff="norm_mlp")

    def call(module: SlotPool, x: Tensor) -> Tensor:
        return pooled(module, x).unflatten(1, (-1, dim))

    parity.check(name, module, lambda theirs: convert(theirs) | {"noise": torch.from_numpy(noise)}, call)


@pytest.mark.parametrize("name", cases("acmil", "architecture.transformer.ACMIL_GA"))
def test_acmil(name, monkeypatch):
    """Logits of the bag, and the loss between the branches; with the masks of training where the case has them."""
    info, recorded = reference.info(name), reference.arrays(name)
    hparams, seen = info["hparams"], {}
    options = {"branches": hparams["n_token"], "hidden": hparams["D"], "inner": hparams["D_inner"]}
    masks = {"masked": hparams.get("n_masked_patch", 0), "mask_share": hparams.get("mask_drop", 0.6)}
    pool = ACMIL(hparams["D_feat"], Grid(5, 8), hparams["n_class"], **options, **masks)
    module = nn.ModuleDict({"pool": pool, "head": nn.Linear(pool.out_dim, hparams["n_class"])})
    names = {"dimreduction.fc1": "pool.reduce", "attention.attention_V.0": "pool.content"}
    names |= {"attention.attention_U.0": "pool.gate", "attention.attention_weights": "pool.score"}
    names |= {f"classifier.{i}.fc": f"pool.branches.{i}" for i in range(hparams["n_token"])}
    draws = np.random.default_rng(92).random((1, hparams["n_token"], masks["masked"])).astype(np.float32)
    monkeypatch.setattr(acmil.torch, "rand", lambda shape, device=None: torch.from_numpy(draws))

    def call(module: nn.Module, x: Tensor) -> Tensor:
        module.train(info["mode"] == "train")
        seen["pooled"] = module["pool"](x, Grid(5, 8))
        return module["head"](seen["pooled"].x)

    parity.check(name, module, renamed(**names, **{"Slide_classifier.fc": "head"}), call)
    assert reference.compare(name, "branch_logits", seen["pooled"].logits.transpose(0, 1)) <= parity.OUTPUT
    assert abs(float(seen["pooled"].losses["diversity"].detach()) / float(recorded["diversity_loss"]) - 1) < 1e-5
