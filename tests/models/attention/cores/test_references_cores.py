"""The further linear cores equal what the authors' modules returned, driven by the recorded cases alone."""

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from models.attention import Grid, Mixer, Site
from models.attention.contract.heads import merge_heads, split_heads
from models.attention.cores.efficient import EfficientCore, efficient_attention
from models.attention.cores.flow import FlowCore, flow_attention
from models.attention.cores.galerkin import fourier_attention, galerkin_attention
from models.attention.cores.hedgehog import Features, HedgehogCore
from models.attention.cores.linear import linear_attention

State = dict[str, Tensor]


def cases(family: str) -> list[str]:
    return [name for name in reference.cases("module") if name.startswith(f"{family}/")]


def place(dim: int, heads: int, tokens: int) -> Site:
    return Site(dim, heads, Grid(1, tokens), 0, 0, 1, "hierarchical")


def joined(theirs: State, *names: str) -> State:
    """Projections of their own → rows of one."""
    parts = {"weight": [theirs[f"{name}.weight"].flatten(1) for name in names]}
    parts["bias"] = [theirs[f"{name}.bias"] for name in names]
    return {f"qkv.{kind}": torch.cat(rows) for kind, rows in parts.items()}


def renamed(theirs: State, name: str) -> State:
    """Another name of the output projection."""
    return {f"proj.{kind}": flat(theirs[f"{name}.{kind}"]) for kind in ("weight", "bias")}


def flat(value: Tensor) -> Tensor:
    """Pointwise convolutions are linear layers."""
    return value.flatten(1) if value.dim() > 1 else value


def test_the_cases_are_found() -> None:
    found = {family: len(cases(family)) for family in ("efficient", "hedgehog", "flowformer", "l2vit", "galerkin")}
    assert all(found[family] >= most for family, most in zip(found, (4, 5, 4, 4, 3), strict=True)), found


class Widths(nn.Module):
    """Efficient attention with keys and values of two widths, around our core."""

    def __init__(self, in_channels: int, key_channels: int, head_count: int, value_channels: int) -> None:
        super().__init__()
        self.heads, self.core = head_count, EfficientCore()
        self.queries, self.keys = nn.Linear(in_channels, key_channels), nn.Linear(in_channels, key_channels)
        self.values, self.reprojection = nn.Linear(in_channels, value_channels), nn.Linear(value_channels, in_channels)

    def forward(self, x_BNC: Tensor) -> Tensor:
        parts = (self.queries(x_BNC), self.keys(x_BNC), self.values(x_BNC))
        grid = Grid(1, x_BNC.shape[1])
        heads = (split_heads(part, 1, self.heads)[0] for part in parts)
        return self.reprojection(merge_heads(self.core(*heads, grid, grid)))


@pytest.mark.parametrize("name", cases("efficient"))
def test_efficient(name: str) -> None:
    case = reference.info(name)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        mixed = module(tokens, Grid(*x.shape[2:])).x if isinstance(module, Mixer) else module(tokens)
        return x + mixed.mT.unflatten(2, x.shape[2:])

    def state(theirs: State) -> State:
        return {key: flat(value) for key, value in theirs.items()}

    parity.check(name, Widths(**case["hparams"]), state, call)
    h = case["hparams"]
    if h["key_channels"] == h["value_channels"]:
        site = place(h["in_channels"], h["head_count"], 4)
        module = efficient_attention(site, head_dim=h["key_channels"] // h["head_count"])
        names = ("queries", "keys", "values")
        parity.check(name, module, lambda theirs: joined(theirs, *names) | renamed(theirs, "reprojection"), call)


@pytest.mark.parametrize("name", [n for n in cases("hedgehog") if "fla" not in n])
def test_hedgehog(name: str) -> None:
    h = reference.info(name)["hparams"]
    options = {
        "feature": h.get("feature_map", "softmax_dim").partition("_")[0],
        "skip": h.get("skip_connection", False),
    }
    options |= {"both_signs": h.get("fullspace", True), "tied": h.get("tie_qk", False)}
    core = HedgehogCore(h["num_heads"], h["head_dim"], h["feature_dim"], **options)
    tokens = Grid(1, reference.info(name)["input_shape"][3])

    def state(theirs: State) -> State:
        given = {key: value for key, value in theirs.items() if not (h.get("tie_qk") and "_k." in key)}
        return {key.replace("feature_map", "feature").replace("mlp.layer", "weight"): v for key, v in given.items()}

    parity.check(name, core, state, lambda m, x: m(*x, tokens, tokens))
    core.load_state_dict(state(reference.weights(name)))
    q, k, _ = reference.model_input(name)
    matrix = core.matrix(q, k, tokens, tokens)
    assert reference.compare(name, "attention", matrix) <= parity.OUTPUT
    softmax = (q @ k.mT * h["head_dim"] ** -0.5).softmax(-1)
    distillation = -(softmax * matrix.log()).sum(-1).mean()
    torch.testing.assert_close(distillation.item(), float(reference.arrays(name)["distillation_xent"]))


@pytest.mark.parametrize("name", [n for n in cases("hedgehog") if "fla" in n])
def test_the_features_of_flash_linear_attention(name: str) -> None:
    dim = reference.info(name)["hparams"]["head_dim"]
    features = Features(1, dim, dim, feature="joint")
    parity.check(name, features, lambda t: {"weight": t["layer.weight"].T, "bias": t["layer.bias"]}, lambda m, x: m(x))


def num_heads(hparams: dict) -> int:
    return hparams.get("num_heads", hparams.get("n_heads", 12))


@pytest.mark.parametrize(
    "name", [n for n in cases("flowformer") if n.startswith("flowformer/flow_") and "cross" not in n]
)
def test_flow(name: str) -> None:
    case = reference.info(name)
    _, tokens, dim = case["input_shape"]
    images = "qkv.weight" in case["state"]
    module = flow_attention(place(dim, num_heads(case["hparams"]), tokens), outer_eps=images)
    own = ("query_projection", "key_projection", "value_projection")
    state = dict if images else lambda theirs: joined(theirs, *own) | renamed(theirs, "out_projection")
    parity.check(name, module, state, lambda m, x: m(x, Grid(1, tokens)).x)


class Cross(nn.Module):
    """Flow attention of the first tokens on the last ones, around our core."""

    def __init__(self, keys: int, d_input: int, d_model: int, d_output: int, n_heads: int, **_: float) -> None:
        super().__init__()
        self.keys, self.heads, self.core = keys, n_heads, FlowCore(outer_eps=False)
        self.query_projection, self.key_projection = nn.Linear(d_input, d_model), nn.Linear(d_input, d_model)
        self.value_projection, self.out_projection = nn.Linear(d_input, d_model), nn.Linear(d_model, d_output)

    def forward(self, x: Tensor) -> Tensor:
        own, others = x[:, : -self.keys], x[:, -self.keys :]
        parts = (self.query_projection(own), self.key_projection(others), self.value_projection(others))
        heads = (split_heads(part, 1, self.heads)[0] for part in parts)
        grids = Grid(1, own.shape[1]), Grid(1, self.keys)
        return self.out_projection(merge_heads(self.core(*heads, *grids)))


@pytest.mark.parametrize("name", [n for n in cases("flowformer") if "cross" in n])
def test_flow_between_two_sequences(name: str) -> None:
    parity.check(name, Cross(**reference.info(name)["hparams"]), dict, lambda m, x: m(x))


@pytest.mark.parametrize("name", [n for n in cases("l2vit") if "linear_attention" in n])
def test_linear(name: str) -> None:
    h, (_, tokens, dim) = reference.info(name)["hparams"], reference.info(name)["input_shape"]
    module = linear_attention(place(dim, h["num_heads"], tokens), qkv_bias=h["qkv_bias"])

    def ours(theirs: dict) -> dict:
        return {key.replace("temp", "core.temp"): value for key, value in theirs.items()}

    parity.check(name, module, ours, lambda m, x: m(x, Grid(1, tokens)).x)


@pytest.mark.parametrize("name", cases("galerkin"))
def test_galerkin_and_fourier(name: str) -> None:
    """Without positions there is no output projection: the identity stands for it."""
    case = reference.info(name)
    h, placed = case["hparams"], case["hparams"]["pos_dim"] > 0
    grid = Grid(5, 6) if placed else Grid(1, case["input_shape"][1])
    make = galerkin_attention if h["attention_type"] == "galerkin" else fourier_attention
    module = make(place(h["d_model"], h["n_head"], grid.tokens)._replace(grid=grid), positions=placed)
    if not placed:
        module.proj = nn.Identity()

    def state(theirs: State) -> State:
        theirs = {key.removeprefix("attn."): value for key, value in theirs.items()}
        ours = joined(theirs, "linears.0", "linears.1", "linears.2")
        for norm in {key.partition(".")[0] for key in theirs if key.startswith("norm_")}:
            for kind in ("weight", "bias"):
                rows = torch.stack([theirs[f"{norm}.{head}.{kind}"] for head in range(h["n_head"])])
                ours[f"core.{norm.lower()}.{kind}"] = rows.unsqueeze(1)
        return ours | (renamed(theirs, "fc") if placed else {})

    parity.check(name, module, state, lambda m, x: m(x, grid).x)
