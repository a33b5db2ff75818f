"""Perceiver: the recorded results with their weights, files in their names, tied rounds, what latents are not."""

import copy
import math
from functools import partial

import parity
import pytest
import reference
import torch

from models import create_model
from models.attention import Grid, mixers_of
from models.backbones.perceiver import Perceiver, rows_of
from models.checkpoints import convert, export
from models.layers.cross_block import CrossBlock
from models.layers.fourier_position import FourierPixels
from models.probes.agents import agents
from models.probes.attention_map import attention_map
from models.probes.clusters import clusters
from models.probes.features import features
from models.probes.gradcam import gradcam
from models.probes.pool_map import pool_map
from models.probes.receptive_field import receptive_field
from models.probes.relevance import relevance
from models.probes.rollout import rollout
from models.probes.routing_map import routing_map
from models.probes.slots import slots

CASES = [name for name in reference.cases("model") if name.startswith("perceiver/")]
TINY = {"latents": 12, "dim": 16, "rounds": 3, "blocks": 2, "num_heads": 2, "head_dim": 8, "read_head_dim": 8}
TINY |= {"num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    return create_model("perceiver", image_size=16, **TINY | options)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def settings(hparams: dict) -> dict:
    """Of a case, as our model takes them."""
    names = {"num_latents": "latents", "latent_dim": "dim", "depth": "rounds", "self_per_cross_attn": "blocks"}
    names |= {"latent_heads": "num_heads", "latent_dim_head": "head_dim", "cross_heads": "read_heads"}
    names |= {"cross_dim_head": "read_head_dim", "num_freq_bands": "bands", "max_freq": "max_frequency"}
    names |= {"weight_tie_layers": "tied"}
    given = {"tied": False} | {names.get(key, key): value for key, value in hparams.items()}
    return {key: given[key] for key in (*names.values(), "num_classes") if key in given}


def last_filled(name: str) -> dict[str, torch.Tensor]:
    """Weights of tied rounds are filled once for each, the last one for good."""
    theirs, hparams = reference.weights(name), reference.info(name)["hparams"]
    last = f"layers.{hparams['depth'] - 1}."
    tied = [key for key in theirs if key.startswith("layers.1.")] if hparams.get("weight_tie_layers") else []
    return {key: theirs[key.replace("layers.1.", last, 1)].clone() for key in tied}


def test_the_cases_are_found():
    assert CASES


@pytest.mark.parametrize("name", CASES)
def test_model(name):
    hparams, size = reference.info(name)["hparams"], reference.info(name)["input_shape"][1:3]
    given = settings(hparams)
    model = create_model("perceiver", image_size=size, **given)
    assert sum(p.numel() for p in model.parameters()) == reference.info(name)["num_params"]
    copies = [f"layers.{r}." for r in range(2, hparams["depth"])] if given["tied"] else []

    def ours(theirs):
        return convert({k: v for k, v in theirs.items() if not k.startswith(tuple(copies))}, "perceiver", **given)

    parity.check(name, model, ours, lambda model, x: model(x.permute(0, 3, 1, 2)), last_filled(name))


def test_a_file_holds_every_round_and_comes_back():
    state = small().state_dict()
    file = export(state, "perceiver", **TINY)
    assert {"latents", "layers.0.0.norm_context.weight", "layers.1.2.1.0.fn.to_kv.weight"} <= file.keys()
    repeated = {key.replace("layers.1.", "layers.2."): value for key, value in file.items() if "layers.1." in key}
    back = convert(file | repeated, "perceiver", **TINY)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    repeated["layers.2.0.norm.weight"] = repeated["layers.2.0.norm.weight"] + 1
    with pytest.raises(ValueError, match=r"layers\.2\.0\.norm\.weight"):
        convert(file | repeated, "perceiver", **TINY)


def test_places_of_pixels():
    """Rows before columns; of each sines, cosines and the place itself."""
    pixels = FourierPixels(3, 3, 10.0)
    x = images(4, 5)
    found = pixels(x).unflatten(1, (4, 5))
    assert found.shape == (2, 4, 5, 3 + 14) and pixels.dim == 17
    assert torch.equal(found[..., :3], x.permute(0, 2, 3, 1))
    row, column = -1 + 2 * 1 / 3, -1 + 2 * 3 / 4
    wanted = [f(math.pi * w * p) if f else p for p in (row, column) for f in (math.sin, math.cos, None)
              for w in ((1, 3, 5) if f else (1,))]  # fmt: skip
    torch.testing.assert_close(found[1, 1, 3, 3:], torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_tied_rounds_are_one_set_of_weights():
    tied, apart = small(rounds=4), small(rounds=4, tied=False)
    assert [len(model.stages) for model in (tied, apart)] == [2, 4]
    assert {key: p.shape for key, p in tied.named_parameters()} == {
        key: p.shape for key, p in small(rounds=9).named_parameters()
    }
    state = tied.state_dict()
    for key in apart.state_dict():
        if key.startswith(("stages.2.", "stages.3.")):
            state[key] = state["stages.1." + key[len("stages.1.") :]]
    apart.load_state_dict(state)
    torch.testing.assert_close(apart(images(16, 16)), tied(images(16, 16)), rtol=0, atol=0)


def test_one_round_reads_once():
    calls = []
    for rounds, wanted in ((1, 1), (2, 2), (5, 5)):
        model = small(rounds=rounds)
        for module in model.modules():
            if isinstance(module, CrossBlock):
                module.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        model(images(16, 16))
        assert len(calls) == wanted


def test_any_image_and_the_order_of_latents_does_not_matter():
    model = small().eval()
    assert model(images(9, 21)).isfinite().all()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.stem.latents.copy_(model.stem.latents.flip(0))
    torch.testing.assert_close(other(images(16, 16)), model(images(16, 16)))


def test_rows_of_latents():
    grids = [rows_of(n)[:2] for n in (1, 7, 12, 64, 512)]
    assert grids == [(1, 1), (1, 7), (3, 4), (8, 8), (16, 32)]


def test_its_sites(recorder):
    Perceiver(recorder, (16, 24), 5, latents=12, dim=16, rounds=3, blocks=2, num_heads=2, head_dim=4)
    found = [(s.dim, s.num_heads, s.head_dim, s.grid, s.stage, s.block, s.depth, s.kind) for s in recorder.sites]
    assert found == [(16, 2, 4, Grid(3, 4), s, b, 3, "vit") for s in (0, 1) for b in (1, 2)]


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_of_tied_rounds_are_those_of_their_sum(enabled):
    tied, apart = small(rounds=3), small(rounds=3, tied=False)
    state = tied.state_dict()
    state |= {key.replace("stages.1.", "stages.2.", 1): v for key, v in state.items() if key.startswith("stages.1.")}
    apart.load_state_dict(state)
    tied.set_gradient_checkpointing(enabled)
    for model in (tied, apart):
        model.train()(images(16, 16)).square().sum().backward()
    grads = {key: p.grad for key, p in apart.named_parameters()}
    for key, p in tied.named_parameters():
        both = grads.get(key.replace("stages.1.", "stages.2.", 1)) if key.startswith("stages.1.") else None
        torch.testing.assert_close(p.grad, grads[key] if both is None else grads[key] + both)


def test_messages_go_on_through_the_rounds_of_a_stage():
    """As from block to block of any stage: only its first block is given none."""
    model, given = small(attention="reversed").eval(), []
    for _, mixer in mixers_of(model):
        mixer.register_forward_pre_hook(lambda _, __, named: given.append(named["carry"] is None), with_kwargs=True)
    model(images(16, 16))
    assert given == [True, False, True, False, False, False]


def test_the_mlps_of_the_paper():
    model = small(gated=False)
    assert (
        model.stages[0].blocks[0].mlp.fc1.out_features == 64 and small().stages[0].blocks[1].mlp.fc2.in_features == 64
    )
    assert small().no_weight_decay() == {"stem.latents"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"latents": 0}, "Perceiver: latents must be a whole number of at least 1, got 0; set model.latents"),
        ({"rounds": 0}, "Perceiver: rounds must be a whole number of at least 1, got 0; set model.rounds"),
        ({"blocks": 1.5}, "Perceiver: blocks must be a whole number of at least 1, got 1.5; set model.blocks"),
        ({"max_frequency": 1}, "Perceiver: max_frequency must be a number of at least 2, got 1; set model.max_freq"),
        ({"tied": "no"}, "Perceiver: tied must be true or false, got 'no'; set model.tied=true or false"),
        (
            {"gate": "eca", "reducer": "top"},
            "reducer: it stands between blocks of a plain ViT, got Perceiver, where",
        ),
        (
            {"wiring": "parallel"},
            "Perceiver: Read is no block of two branches with a norm of their own, got wir",
        ),
        ({"activation": "swiglu"}, "Perceiver: its MLPs have a convolution or norms inside, or a gate, which a Sw"),
    ],
)
def test_what_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        small(**options)


def test_latents_have_no_places():
    text = "tokens in their places on the image are needed, got Perceiver, which mixes latents; choose another"
    with pytest.raises(ValueError, match=f"forward_pyramid: {text}"):
        small().forward_pyramid(images(16, 16))
    with pytest.raises(ValueError, match=f"features_only: {text}"):
        create_model("perceiver", features_only=True, image_size=16, **TINY)


DRAWN = (agents, attention_map, clusters, features, gradcam, pool_map, receptive_field, relevance, rollout, slots)


@pytest.mark.parametrize("probe", [*DRAWN, partial(routing_map, subject=None)])
def test_what_is_drawn_over_the_image_is_refused(probe):
    text = r"\w+: tokens in their places on the image are needed, got Perceiver"
    with pytest.raises(ValueError, match=text):
        probe(small(pool="simpool"), None, None)
