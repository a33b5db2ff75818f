"""Heads apart and axial attention equal what the authors' modules returned, driven by the recorded cases alone."""

import parity
import pytest
import reference
import torch
from torch import Tensor

from models.attention import Grid, Site
from models.attention.axial import AxialAttention
from models.attention.multi_window import multi_window_attention
from models.attention.relational import RelationalAttention

State = dict[str, Tensor]


def cases(family: str) -> list[str]:
    return [name for name in reference.cases("module") if name.startswith(f"{family}/")]


def test_the_cases_are_found() -> None:
    assert (len(cases("mw_mha")), len(cases("dual_attention")), len(cases("axial"))) >= (2, 2, 3)


@pytest.mark.parametrize("name", cases("mw_mha"))
def test_multi_window(name: str) -> None:
    """A sequence is a map of one row; their kernels are (in, out), and a table is of one head."""
    h, tokens = reference.info(name)["hparams"], reference.info(name)["input_shape"][1]
    grid, sides = Grid(1, tokens), h["window_sizes"]
    site = Site(h["dim"], h["num_heads"], grid, 0, 1, 2, "hierarchical")
    module = multi_window_attention(site, windows=sides, shift=h["shift_windows"], qkv_bias=h["qkv_bias"])

    def state(theirs: State) -> State:
        ours = {}
        for key, value in theirs.items():
            if "attn_heads" in key:
                ours[f"parts.{key.split('.')[0].removeprefix('attn_heads_')}.core.bias.table"] = value
            else:
                ours[key.replace("kernel", "weight")] = value.mT if value.dim() > 1 else value
        return ours

    parity.check(name, module, state, lambda m, x: m(x, grid).x)


@pytest.mark.parametrize("name", cases("dual_attention"))
def test_relational(name: str) -> None:
    """Their table has offsets beyond the longest; a tied projection was filled by its second name."""
    h, tokens = reference.info(name)["hparams"], reference.info(name)["input_shape"][1]
    grid, relative = Grid(1, tokens), h["retriever"] == "position_relative"
    module = RelationalAttention(
        Site(h["d_model"], h["n_heads_sa"] + h["n_heads_ra"], grid, 0, 0, 1, "vit"),
        relational_heads=h["n_heads_ra"],
        symbols="relative" if relative else "symbolic",
        symmetric=h["ra_kwargs"].get("symmetric_rels", False),
        num_symbols=h["n_symbols"],
    )

    def state(theirs: State) -> State:
        own, others = "attn.self_attention.", "attn.relational_attention."
        ours = {"sensory.qkv.weight": torch.cat([theirs[f"{own}{name}.weight"] for name in ("wq", "wk", "wv")])}
        ours["sensory.proj.weight"] = theirs[f"{own}wo.weight"]
        for key, value in theirs.items():
            if key.startswith(others):
                ours[f"relational.{key.removeprefix(others).replace('_attn', '')}"] = value
            elif key == "symbols.rel_pos_enc.rel_pos_embeddings":
                ours["relational.symbols.table"] = value[h["max"] - tokens + 1 : h["max"] + tokens]
            elif key.startswith("symbols."):
                ours[f"relational.{key}"] = value
        return {key: value for key, value in ours.items() if key in module.state_dict()}

    tied, kept = "attn.relational_attention.w{}_rel.weight", None
    if module.relational.wk_rel is None:
        kept = {tied.format("q"): reference.weights(name)[tied.format("k")]}
    parity.check(name, module, state, lambda m, x: m(x, grid).x, kept)


@pytest.mark.parametrize("name", cases("axial"))
def test_axial(name: str) -> None:
    case = reference.info(name)
    h, shape = case["hparams"], case["input_shape"]
    first = h["dim_index"] == 1
    grid = Grid(*(shape[2:] if first else shape[1:3]))
    site = Site(h["dim"], h["heads"], grid, 0, 0, 1, "hierarchical")
    module = AxialAttention(site, summed=h["sum_axial_out"], head_dim=h.get("dim_heads"))

    def state(theirs: State) -> State:
        ours = {}
        for number, axis in enumerate(("columns", "rows")):
            own = f"axial_attentions.{number}.fn."
            ours[f"{axis}.qkv.weight"] = torch.cat([theirs[f"{own}to_q.weight"], theirs[f"{own}to_kv.weight"]])
            for kind in ("weight", "bias"):
                ours[f"{axis}.proj.{kind}"] = theirs[f"{own}to_out.{kind}"]
        return ours

    def call(module: AxialAttention, x: Tensor) -> Tensor:
        if first:
            return module(x.flatten(2).mT, grid).x.mT.unflatten(2, grid[:2])
        return module(x.flatten(1, 2), grid).x.unflatten(1, grid[:2])

    parity.check(name, module, state, call)
