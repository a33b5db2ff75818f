"""FIT: the recorded results with their weights, who sees whom, any image, and what its layers may be."""

import re

import parity
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.compose import compose_run
from models import create_model
from models.attention import Grid, mixers_of
from models.backbones.fit import FIT, LATENTS, AmongLatents, InGroups, layers_of
from models.cost import multiply_adds
from models.layers.cross_block import CrossBlock
from models.probes.attention_map import attention_map
from models.probes.rollout import rollout

CASES = [name for name in reference.cases("model") if name.startswith("fit/")]
TINY = {"layers": "(1)1(1)", "groups": 2, "latents": 2, "patch_size": 4, "dim": 16, "latent_dim": 24}
TINY |= {"num_heads": 2, "latent_heads": 3, "num_classes": 5}


def small(**options) -> FIT:
    torch.manual_seed(0)
    return create_model("fit", **{"image_size": 32} | TINY | options)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def linear(state: dict[str, Tensor], name: str, inner: bool = False) -> dict[str, Tensor]:
    """Weight and bias of a Keras layer; those of heads have two axes for them, in front where they are inputs."""
    kernel = state[f"{name}.kernel"]
    return {
        "weight": kernel.flatten(0, 1).mT if inner else kernel.flatten(1).mT,
        "bias": state[f"{name}.bias"].flatten(),
    }


def norm(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {"weight": state[f"{name}.gamma_weight"], "bias": state[f"{name}.beta"]}


def block_of(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    qkv = [linear(state, f"{theirs}.mha.{part}") for part in ("query", "key", "value")]
    found = {"attn.qkv": {key: torch.cat([part[key] for part in qkv]) for key in ("weight", "bias")}}
    found["attn.proj"] = linear(state, f"{theirs}.mha.attention_output", inner=True)
    found |= {
        "mlp.fc1": linear(state, f"{theirs}.mlp.ffn.dense1"),
        "mlp.fc2": linear(state, f"{theirs}.mlp.ffn.dense2"),
    }
    found |= {"norm1": norm(state, f"{theirs}.mha_ln"), "norm2": norm(state, f"{theirs}.mlp.ffn_ln")}
    return named(ours, found)


def cross_of(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    keys, values = (linear(state, f"{theirs}.cross_mha.{part}") for part in ("key", "value"))
    found = {"attn.q": linear(state, f"{theirs}.cross_mha.query")}
    found["attn.kv"] = {key: torch.cat([keys[key], values[key]]) for key in keys}
    found["attn.proj"] = linear(state, f"{theirs}.cross_mha.attention_output", inner=True)
    found |= {"norm1": norm(state, f"{theirs}.cross_mha_ln"), "norm_source": norm(state, f"{theirs}.cross_mha_enc_ln")}
    return named(ours, found)


def named(ours: str, found: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{ours}.{layer}.{key}": value for layer, both in found.items() for key, value in both.items()}


def numbered(name: str, number: int) -> str:
    return name + (f"_{number}" if number else "")


def ours_of(state: dict[str, Tensor], model: FIT, layers: str) -> dict[str, Tensor]:
    """The authors' weights as ours; latents are kept group by group there."""
    group = model.stem.group
    table = state["fit.fit_latent_pos_emb_vis_pos_embedding"].unflatten(0, (-1, group.latents.cells))
    found = {"stem.latent_position.table": group.merge_latents(table, model.grids[0])}
    found["stem.position.table"] = state["fit.fit_x_pos_emb_vis_pos_embedding"][None]
    stem = linear(state, "fit.stem")
    found["stem.patch_embed.proj.weight"] = stem["weight"].unflatten(1, (3, 2, 2))
    found["stem.patch_embed.proj.bias"] = stem["bias"]
    found |= named("stem.patch_embed", {"norm": norm(state, "fit.stem_ln")})
    for s, (within, among) in enumerate(layers_of(layers)):
        names = [(numbered("fit.x_network", s), b) for b in range(within)]
        for b, (network, layer) in enumerate(names):
            found |= block_of(state, f"stages.{s}.blocks.{b}", f"{network}.{numbered('transformer_encoder', layer)}")
        if among:
            found |= cross_of(state, f"stages.{s}.blocks.{within}", numbered("fit.l2x_cross_attn", s))
            for b in range(among):
                theirs = f"{numbered('fit.l_network', s)}.{numbered('transformer_encoder', b)}"
                found |= block_of(state, f"stages.{s}.blocks.{within + 1 + b}", theirs)
            last = within + 1 + among
            found |= cross_of(state, f"stages.{s}.blocks.{last}", numbered("fit.x2l_cross_attn", s))
    return found | {f"norm.{key}": value for key, value in norm(state, "fit.x_output_ln").items()}


def of_case(name: str) -> tuple[FIT, dict]:
    hparams = reference.info(name)["hparams"]
    groups, side = round(hparams["num_groups"] ** 0.5), round(hparams["x_size"] ** 0.5)
    names = {"latents_per_group": "latents", "x_dim": "dim", "x_num_heads": "num_heads"}
    names |= {"latent_num_heads": "latent_heads", "latent_dim": "latent_dim", "layers": "layers"}
    given = {ours: hparams[theirs] for theirs, ours in names.items()}
    return create_model("fit", image_size=2 * side, patch_size=2, groups=groups, num_classes=0, **given), hparams


def image_of(model: FIT, x_BRTC: Tensor) -> Tensor:
    """The image whose patches are these tokens of the groups."""
    grid = model.grids[0]
    patches = model.stem.group.merge(x_BRTC.flatten(0, 1), grid)
    patches_BHWCPQ = patches.unflatten(2, (3, 2, 2)).unflatten(1, grid[:2])
    return patches_BHWCPQ.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def run(model: FIT, x_BRTC: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised tokens, and latents as they are, both by group."""
    x, grid, start = model.stem(image_of(model, x_BRTC))
    carry = {}
    for stage in model.stages:
        x, grid, _, carry = stage(x, grid, start, carry=carry)
    group, images = model.stem.group, len(x_BRTC)
    both = group.split(model.norm(x), grid), group.split_latents(carry[LATENTS], grid)
    return tuple(y.unflatten(0, (images, -1)) for y in both)


def test_the_cases_are_found():
    assert CASES


@pytest.mark.parametrize("name", CASES)
def test_model(name):
    """Tokens, and the latents that the code also returns, behind a norm of their own, which no token depends on."""
    model, hparams = of_case(name)
    state = reference.weights(name)
    unused = [key for key in state if ".l_output_ln." in key]
    assert sum(p.numel() for p in model.parameters()) == reference.info(name)["num_params"] - 2 * hparams["latent_dim"]
    assert all(
        reference.arrays(name)["grad_norms"][reference.info(name)["param_names"].index(key)] == 0 for key in unused
    )
    parity.check(name, model, lambda state: ours_of(state, model, hparams["layers"]), lambda model, x: run(model, x)[0])
    model.load_state_dict(ours_of(state, model, hparams["layers"]))
    weight, bias = (state[f"fit.l_output_ln.{key}"] for key in ("gamma_weight", "beta"))
    latents = F.layer_norm(run(model, reference.model_input(name))[1], weight.shape, weight, bias, 1e-6)
    assert reference.compare(name, "latents", latents) <= parity.OUTPUT


def test_tokens_see_their_group_and_others_by_latents():
    model, grid = small().eval(), Grid(8, 8)
    x, _, start = model.stem(images(32, 32))
    changed = x.clone()
    changed[:, 9] = x[:, 9].flip(-1)  # row 1, column 1: of the first of four groups
    for blocks, others in ((1, False), (4, True)):
        found = []
        for tokens in (x, changed):
            carry = {}
            for block in model.stages[0].blocks[:blocks]:
                tokens, _, *carried = block(tokens, grid, start, **({"carry": carry} if block.carries else {}))
                carry = carried[0] if carried else carry
            found.append(tokens.unflatten(1, grid[:2]))
        same = (found[0] == found[1]).all(-1)
        assert not same[:, :4, :4].any() and same[:, 4:].all() == same[:, :, 4:].all() == (not others)


def test_tokens_of_all_groups_have_the_same_positions():
    model = small()
    with torch.no_grad():
        model.stem.patch_embed.norm.weight.zero_()
    x, grid, start = model.stem(images(32, 64))
    table = model.stem.position.table[0]
    assert grid == Grid(8, 16) and all(torch.equal(group, table) for group in model.stem.group.split(x, grid))
    assert start.shape == (2, 2 * 8, 24), "2 x 4 groups of 1 x 2 latents"


def test_the_cost_is_linear_but_for_the_latents():
    """Beside a number per group, only weights of latents on latents, and their product with values."""
    model = small()
    costs = [multiply_adds(model, (32, 32 * wider)) for wider in (1, 2, 3)]
    one = 4 * 2  # latents of four groups
    assert costs[2] - 2 * costs[1] + costs[0] == 2 * 2 * one**2 * 24


def test_stages_are_what_the_layers_say():
    assert layers_of("(2)4(3)1(0)") == [(2, 4), (3, 1)] and layers_of("(0)12(1)") == [(0, 12), (1, 0)]
    model = small(layers="(2)3(1)")
    kinds = [type(block).__name__ for stage in model.stages for block in stage.blocks]
    assert kinds == ["InGroups", "InGroups", "Read", *["AmongLatents"] * 3, "Write", "InGroups"]
    assert small(layers="(0)1(0)")(images(32, 32)).shape == (2, 5)
    cfg, _ = compose_run(["model=fit_32px", "model.layers='(1)2(1)'"])
    assert cfg.model.layers == "(1)2(1)"


def test_its_sites(recorder):
    options = {key: value for key, value in TINY.items() if key != "num_classes"} | {"groups": [2, 1]}
    model = FIT(recorder, (32, 24), 5, **options)
    found = [(s.dim, s.num_heads, s.grid, s.stage, s.block, s.depth, s.kind) for s in recorder.sites]
    local, latents = (16, 2, Grid(4, 6)), (24, 3, Grid(2, 2))
    assert found == [(*local, 0, 0, 2, "vit"), (*latents, 0, 1, 2, "vit"), (*local, 1, 0, 1, "vit")]
    assert [m.shape for m in model.forward_pyramid(images(30, 50))] == [(2, 16, 8, 13)] * 2


def test_heads_of_reading_and_writing_are_the_fewer_and_the_narrower():
    cross = [block.attn for block in small().modules() if isinstance(block, CrossBlock)]
    assert [(attn.num_heads, attn.q.out_features) for attn in cross] == [(2, 16), (2, 16)]


def test_drop_path_is_not_in_reading_and_writing():
    model = small(layers="(2)1(1)", drop_path=0.3)
    rates = [block.drop_path.drop_prob for block in model.modules() if isinstance(block, InGroups | AmongLatents)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(isinstance(m.drop_path, torch.nn.Identity) for m in model.modules() if isinstance(m, CrossBlock))


def test_messages_of_tokens_and_of_latents_are_apart():
    """Those of a group and those of all latents have other shapes; each begins anew in a stage."""
    model, given = small(layers="(2)2(2)", attention="reversed").eval(), []
    for _, mixer in mixers_of(model):
        mixer.register_forward_pre_hook(lambda _, __, named: given.append(named["carry"] is None), with_kwargs=True)
    assert model(images(32, 32)).isfinite().all()
    assert given == [True, False, True, False, True, False]


def test_latents_of_another_number_of_groups():
    """Their table is resized on their map, so that a finer one holds the same picture."""
    model = small(latents=4)
    with torch.no_grad():
        model.stem.latent_position.table.copy_(torch.ones(24).expand(1, 16, 24))
    start = model.stem(images(64, 64))[2]
    torch.testing.assert_close(start, torch.ones(2, 64, 24))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"layers": "(2)x(2)"},
            "FIT: layers must be numbers of layers within groups, in brackets, and of latents in t",
        ),
        ({"layers": "(1)2"}, "from brackets to brackets, got '(1)2'; set model.layers, e.g. '(2)4(2)'"),
        ({"layers": "(1)0(1)"}, "from brackets to brackets, got '(1)0(1)'; set model.layers"),
        ({"layers": 4}, "from brackets to brackets, got 4; set model.layers"),
        ({"groups": 3}, "FIT: groups must divide the map of 8 x 8 tokens along each side, got 3 x 3; set model.groups"),
        ({"groups": 0}, "FIT: groups must be"),
        ({"latents": 0}, "FIT: latents must be a whole number of at least 1, got 0; set model.latents"),
        ({"dim": 15, "num_heads": 5, "latent_heads": 4}, "FIT: reading and writing have 15 channels and 4 heads"),
        (
            {"reducer": "top"},
            "reducer: it stands between blocks of a plain ViT, got FIT, where some tokens are latents",
        ),
        ({"wiring": "parallel"}, "FIT: Read is no block of two branches with a norm of their own, got wiring=parallel"),
    ],
)
def test_what_is_refused(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        small(**options)


@pytest.mark.parametrize("probe", [attention_map, rollout])
def test_what_mixers_see_is_not_drawn_over_the_image(probe):
    text = f"{probe.__name__}: tokens in their places on the image are needed, got FIT, which mixes latents; choose"
    with pytest.raises(ValueError, match=text):
        probe(small(), None, None)
