"""MedViT: the authors' modules with their weights, sizes, files in their names, its sites and its gates."""

import re

import parity
import pytest
import reference
import torch
import torch.nn.functional as F

from conf import families
from models import create_model
from models.attention import Grid, Refused, Site
from models.attention.biases.rpb import rpb
from models.attention.layouts.runs import runs
from models.attention.softmax import softmax_attention
from models.backbones.medvit import MedViT
from models.checkpoints import convert, export
from models.checkpoints.names.medvit import LAYOUTS
from models.layers.hybrid_block import ConvAttention, Entry
from models.layers.local_mlp import LocalMlp
from models.layers.reduction import RunReduction

PARAMETERS = {"small": 32_161_440, "base": 45_430_972, "large": 58_700_504}  # of the authors' code
TINY = {"stem_dims": [16, 8, 16], "dims": [16, 32], "mixed_dims": [32, 64], "depths": [2, 2], "every": [2, 2]}
TINY |= {"head_dim": 8}


def cases(constructor: str) -> list[str]:
    return [n for n in reference.cases("module") if n.startswith("medvit/") and _made(n) == constructor]


def _made(name: str) -> str:
    return reference.info(name)["official_constructor"].rpartition(".")[2]


def checked(name: str, module: torch.nn.Module, ours: str, theirs: str, call) -> None:
    """`parity.check`; the cases leave the counters of batch norms as they were made."""
    counters = {key: torch.tensor(0) for key in reference.info(name)["state"] if key.endswith("num_batches_tracked")}
    take = parity.through(LAYOUTS[0], module, ours, theirs)
    parity.check(name, module, lambda state: take(state | counters), call)


def on_map(module, x):
    grid = Grid(*x.shape[2:])
    return module(x.flatten(2).mT, grid).mT.unflatten(2, grid[:2])


def test_the_cases_are_found():
    assert cases("E_MHSA") and cases("MHCA") and cases("LocalityFeedForward")


@pytest.mark.parametrize("name", cases("E_MHSA"))
def test_attention_equals_the_authors(name):
    hparams, (_, tokens, _) = (reference.info(name)[key] for key in ("hparams", "input_shape"))
    dim, grid = hparams["dim"], Grid(1, tokens)
    site = Site(dim, dim // hparams.get("head_dim", 32), grid, 0, 0, 1, "hybrid")
    mixer = softmax_attention(site, layout=lambda site: runs(site, ratio=hparams.get("sr_ratio", 1)))
    names = ("stages.0.blocks.0.attn.", "features.0.e_mhsa.")
    checked(name, mixer, *names, lambda mixer, x: mixer(x, grid).x)


@pytest.mark.parametrize("name", cases("MHCA"))
def test_convolutions_as_heads_equal_the_authors(name):
    hparams = reference.info(name)["hparams"]
    module = ConvAttention(hparams["out_channels"], hparams["head_dim"])
    checked(name, module, "stages.0.blocks.0.conv.", "features.0.mhca.", on_map)


@pytest.mark.parametrize("name", cases("LocalityFeedForward"))
def test_the_mlp_equals_the_authors(name):
    hparams = reference.info(name)["hparams"]
    hidden = int(hparams["in_dim"] * hparams["expand_ratio"])
    module = LocalMlp(hparams["in_dim"], hidden, hidden // hparams["reduction"])
    checked(name, module, "stages.0.blocks.0.mlp.", "features.0.conv.", on_map)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters(size):
    assert families.models()[f"medvit_{size}"]["counted"]["parameters"] == PARAMETERS[size]


def test_files_are_in_the_authors_names_and_come_back():
    torch.manual_seed(0)
    state = create_model("medvit_small", num_classes=5, **TINY).state_dict()
    file = export(state, "medvit_small", **TINY)
    parts = {
        "": ("stem.3.conv.weight", "norm.running_mean", "proj_head.0.bias"),
        "features.0.": ("mhca.group_conv3x3.weight", "conv.conv.0.weight", "norm.weight"),
        "features.3.": ("e_mhsa.q.bias", "projection.conv.weight", "norm2.bias"),
    }
    wanted = {prefix + name for prefix, names in parts.items() for name in names}
    assert wanted <= file.keys()
    assert file["features.1.patch_embed.conv.weight"].dim() == 4 and file["features.1.e_mhsa.q.weight"].dim() == 2
    assert file["features.3.conv.conv.6.fc.0.weight"].shape == (2, 128)
    back = convert({"model": file}, "medvit_small", num_classes=5, **TINY)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_its_sites_are_shares_of_the_last_blocks(recorder):
    model = MedViT(recorder, (64, 48), 5, **TINY)
    found = [(site.dim, site.num_heads, site.grid, site.stage, site.block, site.kind) for site in recorder.sites]
    assert found == [(24, 3, Grid(16, 12), 0, 1, "hybrid"), (48, 6, Grid(8, 6), 1, 1, "hybrid")]
    maps = model.eval().forward_pyramid(torch.randn(1, 3, 60, 44))
    assert [m.shape[1:] for m in maps] == [(32, 15, 11), (64, 8, 6)]


def test_branches_share_the_rate_of_their_block():
    model = create_model("medvit_small", num_classes=5, image_size=64, **TINY, drop_path=0.3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    wanted = [0.0, 0.75 * 0.1, 0.25 * 0.1, 0.2, 0.75 * 0.3, 0.25 * 0.3]  # convolution, and mixer beside it, in turn
    assert rates == pytest.approx(wanted)


def test_keys_are_means_of_tokens_in_a_row():
    module, x = RunReduction(4, 2).eval(), torch.randn(2, 15, 4)
    found, grid = module(x, Grid(3, 5))
    assert grid == Grid(1, 3)
    torch.testing.assert_close(found, module.norm(x[:, :12].unflatten(1, (3, 4)).mean(2)))
    rows, columns = module.cells(Grid(3, 5))
    torch.testing.assert_close(module.norm(rows[0, 0] * columns @ x), found)
    few, grid = module(x[:, :3], Grid(1, 3))
    assert grid == Grid(1, 1) and few.shape == (2, 1, 4)


def test_a_bias_of_places_is_refused_on_runs():
    site = Site(16, 2, Grid(4, 4), 0, 0, 1, "hybrid")
    with pytest.raises(Refused, match=re.escape("SoftmaxCore cannot work on keys that are not its queries (runs), as")):
        softmax_attention(site, layout=runs, bias=rpb)


def test_odd_maps_are_rounded_up_and_cells_outside_do_not_count():
    entry, x = Entry(4, 4, stride=2).eval(), torch.randn(1, 15, 4)
    with torch.no_grad():
        entry.conv.weight.copy_(torch.eye(4))
    found, grid = entry(x, Grid(3, 5))
    assert grid == Grid(2, 3)
    corner = F.batch_norm(x[:, 14], torch.zeros(4), torch.ones(4))
    torch.testing.assert_close(found[:, 5], corner)


@pytest.mark.parametrize("at", ["mixer", "mlp", "block"])
def test_a_gate_weights_all_channels_of_a_block_with_a_mixer(at):
    model = create_model("medvit_32px", gate="se", gate_at=at, num_classes=5)
    block = model.stages[1].blocks[1]
    assert block.gate.site.dim == 64 and block.gate_at == at
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert block.gate.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"every": [0, 0]}, "MedViT: a block must have a mixer, got every=0 in all stages; set model.every"),
        ({"dims": [20, 32]}, "MedViT: 20 channels are not a multiple of head_dim, got 8; change model.dims"),
        (
            {"mixed_dims": [8, 64]},
            "MedViT: mixed_dims must leave a quarter of the channels, in heads of 8, besides, got 8",
        ),
        ({"depths": [2]}, "MedViT: options with one entry per stage differ in length, got"),
        ({"head_dim": 0}, "MedViT: head_dim must be a whole number of at least 1, got 0; set model.head_dim"),
    ],
)
def test_wrong_options_are_refused(recorder, own, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        MedViT(recorder, 32, 5, **(TINY | own))
