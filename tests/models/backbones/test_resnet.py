"""ResNets: equal to timm's with the same weights, gates and all; which blocks mix tokens; what is refused."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from timm.layers import EcaModule
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.multihead import MultiHead
from models.backbones.resnet import places
from models.checkpoints import convert, export
from models.checkpoints.conversion import source_of
from tests.models.backbones import oracle

# parameters and multiply-adds (G) of timm's ResNet with EcaModule, and of its ByobNet, counted by PyTorch's counter
PUBLISHED = {
    "resnet_50": (25_557_032, 4.089),
    "botnet_50": (20_852_008, 4.025),
    "botnet_26t": (12_488_672, 3.297),
    "halonet_h0": (5_500_952, 2.353),
    "halonet_h1": (8_100_056, 2.988),
    "halonet_h2": (9_404_312, None),
    "halonet_h4": (19_101_976, None),
    "halonet_26t": (12_480_288, 3.173),
    "halonet_50ts": (22_733_280, 5.270),
    "lambdaresnet_50": (14_995_848, 6.576),
    "lambdaresnet_26t": (10_958_272, 3.003),
    "lambdaresnet_50ts": (21_536_832, 5.037),
    "ecanet_18": (11_689_556, 1.814),
    "ecanet_34": (21_797_744, 3.664),
    "ecanet_50": (25_557_112, 4.089),
    "ecanet_101": (44_549_317, 7.802),
    "ecanet_152": (60_193_042, 11.514),
}
CHANNELS = (16, 32, 48, 64)
KERNELS = (3, 5, 3, 7)
TIMMS = {
    "botnet_26t": "botnet26t_256",
    "halonet_h1": "halonet_h1",
    "halonet_26t": "halonet26t",
    "halonet_50ts": "halonet50ts",
    "lambdaresnet_26t": "lambda_resnet26t",
    "lambdaresnet_50ts": "lambda_resnet50ts",
}


def gate_of(dims: list[int], kernels: list[int]) -> Callable[..., EcaModule]:
    """What timm calls for the gate at the end of a branch, by the channels of its stage."""
    of_dim = dict(zip(dims, kernels, strict=True))

    def gate(channels: int, **_) -> EcaModule:
        return EcaModule(kernel_size=of_dim[channels])

    return gate


def theirs(block: type, depths: list[int]) -> ResNet:
    """timm's, with the kernels of ECA by stage and few channels."""
    gates = {"attn_layer": gate_of([channels * block.expansion for channels in CHANNELS], KERNELS)}
    return ResNet(block, depths, channels=CHANNELS, block_args=gates)


def settings(basic: bool, depths: list[int]) -> dict:
    expansion = 1 if basic else 4
    dims = [channels * expansion for channels in CHANNELS]
    return {"basic": basic, "dims": dims, "depths": depths, "branch_gate": {"kernel_size": KERNELS}}


def branch_ends(key: str, parameter: Tensor) -> bool:
    """The last norm of a branch is small beside its residual, as in trained networks."""
    if not key.endswith(("bn3.weight", "conv3_1x1.bn.weight")):
        return False
    parameter.normal_(0.35, 0.05, generator=torch.Generator().manual_seed(len(key)))
    return True


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds(name):
    parameters, multiply_adds = PUBLISHED[name]
    counted = families.models()[name]["counted"]
    assert counted["parameters"] == parameters
    if multiply_adds is not None:
        unread = unread_rows(name) if name.startswith("halonet") else 0
        assert (counted["multiply_adds"] + unread) / 1e9 == pytest.approx(multiply_adds, rel=0.01)


def unread_rows(name: str) -> int:
    """Products of timm that are not made here: of each query with rows of its tables that are of no key around it."""
    with torch.device("meta"):
        mixers = [module for module in create_model(name).modules() if isinstance(module, MultiHead)]
    return sum(
        mixer.layout.asking(torch.empty(1, mixer.grid.tokens, 1), mixer.grid).shape[1]
        * mixer.site.dim
        * sum(len(table) // 2 for table in (mixer.core.position.height, mixer.core.position.width))
        for mixer in mixers
    )


@pytest.mark.parametrize(
    ("basic", "timms", "depths", "at"),
    [(True, BasicBlock, [1, 2, 1, 1], None), (False, Bottleneck, [2, 1, 1, 1], (70, 51))],
)
def test_ecanet_equals_timm(basic, timms, depths, at):
    oracle.equal("ecanet_50", theirs(timms, depths), 64, at=at, own=branch_ends, **settings(basic, depths))


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("ecanet")])
def test_whole_ecanets_equal_timm(name):
    row = families.models()[name]["model"]
    gates = {"attn_layer": gate_of(row["dims"], row["branch_gate"]["kernel_size"])}
    block = BasicBlock if row["basic"] else Bottleneck
    oracle.equal(name, ResNet(block, row["depths"], block_args=gates), 64, own=branch_ends)


def byobnet(places: list, size: int | tuple[int, int], heads: list[int] | None = None, **model) -> ByobNet:
    """timm's, with few channels and a mixer in these blocks; `heads` of each stage."""
    stages = []
    for s, (channels, numbers) in enumerate(zip(CHANNELS, places, strict=True)):
        kinds = ["self_attn" if b in numbers else "bottle" for b in range(2 if s == 3 else 1)]
        shape = {"d": 1, "c": 4 * channels, "gs": 0, "br": 0.25}
        if heads is not None:
            shape |= {"self_attn_layer": model["self_attn_layer"]}
            shape |= {"self_attn_kwargs": model["self_attn_kwargs"] | {"num_heads": heads[s]}}
        stages.append(tuple(ByoBlockCfg(type=kind, s=2 if s and not b else 1, **shape) for b, kind in enumerate(kinds)))
    cfg = ByoModelCfg(blocks=tuple(stages), stem_chs=64, stem_pool="maxpool", **model)
    return ByobNet(cfg, img_size=size if isinstance(size, tuple) else (size, size))


def shape_of(places: list[list[int]], **settings) -> dict:
    return {"dims": [4 * c for c in CHANNELS], "depths": [1, 1, 1, 2], "attention_blocks": places, **settings}


LATE = [[], [], [0], [0, 1]]


@pytest.mark.parametrize(("size", "scaled"), [(128, True), ((64, 96), False)])
def test_botnet_equals_timm(size, scaled):
    """Its stem and activation both ways; in one of them the relative logits are not scaled."""
    stem, act = ("7x7", "relu") if scaled else ("tiered", "silu")
    options = {"self_attn_layer": "bottleneck", "self_attn_kwargs": {"num_heads": 4, "scale_pos_embed": scaled}}
    theirs = byobnet(LATE, size, stem_type=stem, act_layer=act, **options)
    shape = shape_of(LATE, stem=stem, act=act, scale_position=scaled)
    oracle.equal("botnet_50", theirs, size, own=branch_ends, **shape)


@pytest.mark.parametrize(
    ("size", "at", "block", "heads"), [(128, (128, 256), 4, [8, 8, 4, 8]), (160, None, 5, [8, 8, 8, 8])]
)
def test_halonet_equals_timm(size, at, block, heads):
    """Where the map is halved, blocks of even sides have a quarter of the queries; those of odd ones are pooled."""
    options = {"self_attn_layer": "halo", "stem_type": "7x7", "act_layer": "silu", "num_features": 24}
    theirs = byobnet(LATE, size, self_attn_kwargs={"block_size": block, "halo_size": 2}, heads=heads, **options)
    shape = shape_of(LATE, act="silu", last_dim=24, num_heads=heads, block=block, halo=2)
    oracle.equal("halonet_50ts", theirs, size, at=at, own=branch_ends, **shape | {"stem": "7x7"})


@pytest.mark.parametrize(("size", "at", "stem"), [(64, (96, 64), "tiered"), (64, None, "7x7")])
def test_lambdaresnet_equals_timm(size, at, stem):
    options = {"self_attn_layer": "lambda", "self_attn_kwargs": {"r": 5}, "stem_type": stem}
    shape = shape_of(LATE, stem=stem, kernel_size=5)
    oracle.equal("lambdaresnet_50", byobnet(LATE, size, **options), size, at=at, own=branch_ends, **shape)


def test_halonets_take_any_image():
    shape = shape_of(["all"] * 4, num_heads=[8, 8, 8, 8])
    model = create_model("halonet_h1", image_size=96, num_classes=5, widths=list(CHANNELS), **shape).eval()
    assert [block.attn.strided for stage in model.stages for block in stage.blocks] == [False, True, True, True, False]
    assert model(torch.randn(1, 3, 75, 130)).isfinite().all()


@pytest.mark.full
def test_whole_botnets_equal_timm():
    blocks = [
        ByoBlockCfg(type="bottle", d=d, c=c, s=s, gs=0, br=0.25) for d, c, s in ((3, 256, 1), (4, 512, 2), (6, 1024, 2))
    ]
    blocks.append(ByoBlockCfg(type="self_attn", d=3, c=2048, s=2, gs=0, br=0.25))
    options = {"self_attn_layer": "bottleneck", "self_attn_kwargs": {"num_heads": 4, "scale_pos_embed": True}}
    cfg = ByoModelCfg(blocks=tuple(blocks), stem_chs=64, stem_type="7x7", stem_pool="maxpool", **options)
    oracle.equal("botnet_50", ByobNet(cfg, img_size=(96, 96)), 96, own=branch_ends)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in TIMMS if name != "halonet_h1"])
def test_whole_models_equal_timm(name):
    """Of halonet_h1 a rounding error of one weight moves gradients by a quarter: it is compared shortened, above.

    Two images: of a single one PyTorch 2.14 gives timm's `norm_v` a gradient that finite differences do not confirm.
    """
    sizes = {"img_size": (256, 256)} if name == "botnet_26t" else {}
    oracle.equal(name, timm.create_model(TIMMS[name], **sizes), 256, own=branch_ends)


@pytest.mark.parametrize("name", TIMMS)
def test_names_of_timm(name):
    """Shapes at the models' own sizes; converted and exported, weights are the same."""
    with torch.device("meta"):
        ours, theirs = create_model(name).state_dict(), timm.create_model(TIMMS[name]).state_dict()
    ours = {key: torch.randn(value.shape) for key, value in ours.items()}
    exported = export(ours, name)
    assert {key: value.shape for key, value in exported.items()} == {key: value.shape for key, value in theirs.items()}
    back = convert(exported, name)
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_the_eighty_parameters_of_eca():
    with torch.device("meta"):
        gates = [p for name, p in create_model("ecanet_50").named_parameters() if ".gate." in name]
        bare = create_model("resnet_50")
    assert (len(gates), sum(p.numel() for p in gates)) == (16, 80)
    assert not [name for name, _ in bare.named_parameters() if ".gate." in name]


@pytest.mark.parametrize("basic", [True, False])
def test_names_of_the_authors_and_of_timm(basic):
    shape = settings(basic, [1, 1, 1, 1])
    with torch.device("meta"):
        ours = create_model("ecanet_50", num_classes=5, **shape).state_dict()
        timms = theirs(BasicBlock if basic else Bottleneck, [1, 1, 1, 1]).state_dict()
    ours = {name: torch.randn(value.shape) for name, value in ours.items()}
    authors = export(ours, "ecanet_50", num_classes=5, **shape)
    assert authors.keys() == {name.replace(".se.", ".eca.") for name in timms}
    renamed = {name.replace(".eca.", ".se."): value for name, value in authors.items()}
    for state, source in ((authors, "BangguWu/ECANet"), (renamed, "timm")):
        assert source_of(state, "ecanet_50", num_classes=5, **shape) == source
        back = convert(state, "ecanet_50", num_classes=5, **shape)
        assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_a_gate_that_is_chosen_stands_in_the_place_of_eca():
    model = create_model("ecanet_50", gate="se", **settings(False, [1, 1, 1, 1]))
    gates = [block.gate for stage in model.stages for block in stage.blocks]
    assert [type(gate).__name__ for gate in gates] == ["SqueezeExcitation"] * 4
    assert [(gate.site.dim, gate.site.grid[:2]) for gate in gates] == [
        (64, (56, 56)),
        (128, (28, 28)),
        (192, (14, 14)),
        (256, (7, 7)),
    ]
    x = create_model("ecanet_50", gate="se", gate_at="block", **settings(True, [1, 1, 1, 1]))
    assert x.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_sites_of_mixers(recorder):
    """A bottleneck that halves the map mixes the larger one, a basic block the smaller one."""
    shape = {"dims": [32, 64, 96], "depths": [1, 2, 1], "num_heads": [1, 2, 3], "attention_blocks": [[], "all", [0]]}
    create = partial(create_model_with, recorder, **shape)
    create(basic=False)
    assert [(s.stage, s.block, s.dim, s.num_heads, s.grid, s.stride) for s in recorder.sites] == [
        (1, 0, 16, 2, Grid(16, 24), 2),
        (1, 1, 16, 2, Grid(8, 12), 1),
        (2, 0, 24, 3, Grid(8, 12), 2),
    ]
    recorder.sites.clear()
    model = create(basic=True)
    assert [(s.dim, s.grid, s.stride) for s in recorder.sites] == [
        (64, Grid(8, 12), 1),
        (64, Grid(8, 12), 1),
        (96, Grid(4, 6), 1),
    ]
    assert [x.shape[1:] for x in model.forward_pyramid(torch.randn(1, 3, 50, 97))] == [
        torch.Size((32, 13, 25)),
        torch.Size((64, 7, 13)),
        torch.Size((96, 4, 7)),
    ]


def create_model_with(factory, **shape):
    from models.backbones.resnet import ResNet as Ours

    return Ours(factory, (64, 96), 3, **shape)


def test_what_is_chosen_for_an_ecanet_goes_into_its_last_stage():
    model = create_model("ecanet_50", "agent", **settings(False, [1, 1, 1, 2]), num_heads=[1, 1, 1, 4])
    assert [hasattr(block, "attn") for stage in model.stages for block in stage.blocks] == [False] * 3 + [True] * 2
    logits, losses = model.eval()(torch.randn(1, 3, 64, 64), return_losses=True)
    assert logits.shape == (1, 1000) and losses == {}


def test_blocks_start_as_their_shortcuts():
    model = create_model("resnet_32px")
    for stage in model.stages:
        for block in stage.blocks:
            assert not block.conv3.bn.weight.any()
    assert create_model("resnet_32px", basic=True).stages[1].blocks[1].attn_norm.weight.eq(0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"basic": "yes"}, r"ResNet: basic must be true or false, got 'yes'; set model.basic=true or false"),
        ({"norm": "rmsnorm"}, r"ResNet: its norms are batch norms of maps, .* got norm=rmsnorm; set model.norm=null"),
        ({"last_dim": 0}, r"ResNet: last_dim must be a whole number of at least 1, got 0; set model.last_dim"),
        ({"stem": "deep"}, r"ResNet: stem must be 7x7 or tiered, got 'deep'; set model.stem"),
        ({"act": "gelu"}, r"ResNet: act must be relu or silu, got 'gelu'; set model.act"),
        ({"stem_dim": 0}, r"ResNet: stem_dim must be a whole number of at least 1, got 0; set model.stem_dim"),
        ({"widths": [32]}, r"ResNet: options with one entry per stage differ in length, got .*'widths': 1\}; give as"),
        ({"basic": True, "widths": [8, 8]}, r"ResNet: basic blocks have no widths .* got \[8, 8\]; set model.w"),
        ({"attention_blocks": "all"}, r"attention_blocks must have one entry for each of the 2 stages, got 'all'; set"),
        ({"attention_blocks": [[], [2]]}, r"of stage 1 must be all, or some of its blocks 0 to 1, got \[2\]; set mode"),
        ({"attention_blocks": [[], "last"]}, r"of stage 1 must be all, or some of its blocks 0 to 1, got 'last'; set"),
        ({"attention_blocks": [[], []]}, r"ResNet: a mechanism was chosen and no block has a place .* attention=none"),
    ],
)
def test_what_is_wrong_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        create_model("resnet_32px", **wrong)


def test_places():
    assert places([[], "all", [0, 2]], [1, 2, 3]) == [set(), {0, 1}, {0, 2}]
