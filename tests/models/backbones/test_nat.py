"""NAT and its forms: parts equal what the authors' returned; files, sizes, dilations, sites, and what is refused."""

import re

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from conf import families
from models import create_model
from models.attention import Grid, Site
from models.attention.mixers.neighborhood import neighborhood_attention
from models.backbones.nat import NAT, Tokenizer
from models.checkpoints import convert, export
from models.checkpoints.names import nat as names
from models.layers.block import Block, Stage
from models.layers.downsample import ConvDownsample

FAMILIES = ("nat", "dinat", "dinat_s", "isotropic")
ROWS = {n: row for n, row in families.models().items() if row["family"] in FAMILIES and row["size"] != "32px"}
MEASURED = {  # parameters, and 1e9 multiply-adds at 224 pixels, of the authors' code
    "nat_mini": (19_984_174, 2.695), "nat_tiny": (27_901_582, 4.295), "nat_small": (50_743_297, 7.772),
    "dinat_mini": (19_984_174, 2.695), "dinat_tiny": (27_901_582, 4.295), "dinat_small": (50_719_681, 7.772),
    "dinat_base": (89_769_652, None), "nat_base": (89_769_652, None), "dinat_s_tiny": (28_288_354, 4.491),
    "nat_isotropic_small": (21_999_736, 4.309), "dinat_isotropic_small": (21_999_736, 4.309),
    "vitrpb_small": (22_080_376, 4.574),
}  # fmt: skip
SHORT = {"dims": [16, 32, 64, 128], "depths": [1, 2, 1, 1], "num_heads": [2, 2, 4, 8], "num_classes": 5}
PLAIN = {"dims": [32], "depths": [2], "num_heads": [2], "num_classes": 5}
FEW = "layers.0.downsample.reduction.weight"
SMALL = {  # a file of each form, and names that it has
    "nat_small": (SHORT, {"patch_embed.proj.1.bias", "levels.1.blocks.1.gamma2", "levels.2.downsample.norm.weight"}),
    "dinat_mini": (SHORT, {"patch_embed.norm.bias", "levels.3.blocks.0.attn.rpb", FEW.replace("layers", "levels")}),
    "dinat_s_tiny": (SHORT, {"patch_embed.proj.weight", FEW, "layers.1.blocks.1.attn.rpb"}),
    "nat_isotropic_small": (PLAIN, {"patch_embed.norm.weight", "layers.1.attn.rpb", "layers.0.mlp.fc1.weight"}),
    "vitrpb_small": (PLAIN, {"patch_embed.norm.weight", "layers.1.attn.rpb", "layers.1.attn.relative_position_index"}),
}  # fmt: skip


def layer(given: dict, dilation: int, grid: Grid) -> Block:
    site = Site(given["dim"], given["num_heads"], grid, 0, 0, 1, "hierarchical")
    mixer = neighborhood_attention(site, kernel=given["kernel_size"], dilation=dilation)
    ratio, scale = given["mlp_ratio"], given.get("layer_scale")
    return Block(given["dim"], mixer, mlp_ratio=ratio, layer_scale=scale, norm_eps=1e-5)


class Level(nn.Module):
    """A stage, and what follows it there."""

    def __init__(self, given: dict, grid: Grid) -> None:
        super().__init__()
        self.stage = Stage([layer(given, dilation, grid) for dilation in given["dilations"] or [1] * given["depth"]])
        dim, norm = given["dim"], nn.LayerNorm(2 * given["dim"])
        self.merge = (
            ConvDownsample(dim, 2 * dim, kernel_size=3, bias=False, out_norm=norm) if given["downsample"] else None
        )

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x, grid, _ = self.stage(x_BHWC.flatten(1, 2), Grid(*x_BHWC.shape[1:3]))
        x, grid = (x, grid) if self.merge is None else self.merge(x, grid)
        return x.unflatten(1, tuple(grid[:2]))


def cases(builder: str) -> list[str]:
    return [n for n in reference.cases("module") if n.startswith("nat/") and reference.info(n)["builder"] == builder]


def renamed(*rules: tuple[str, str]):
    """By `re.sub`, after what blocks have in whole models."""

    def convert(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = {}
        for name, value in theirs.items():
            for pattern, text in (("attn.rpb$", "attn.core.bias.table"), (r"gamma([12])$", r"scale\1.gamma"), *rules):
                name = re.sub(pattern, text, name)
            ours[name] = value
        return ours

    return convert


def test_the_cases_are_found() -> None:
    assert all(cases(f"nat.{builder}") for builder in ("ConvTokenizer", "NATLayer", "NATBlock"))


@pytest.mark.parametrize("name", cases("nat.ConvTokenizer"))
def test_the_stem(name: str) -> None:
    def call(stem: Tokenizer, images: Tensor) -> Tensor:
        x_BNC, grid = stem(images)
        return x_BNC.unflatten(1, tuple(grid[:2]))

    stem = Tokenizer(3, reference.info(name)["hparams"]["embed_dim"], 1e-5)
    parity.check(name, stem, renamed((r"^proj\.", "conv.")), call)


@pytest.mark.parametrize("name", cases("nat.NATLayer"))
def test_a_block(name: str) -> None:
    case = reference.info(name)
    grid = Grid(*case["input_shape"][1:3])
    block = layer(case["hparams"], case["hparams"].get("dilation") or 1, grid)
    parity.check(name, block, renamed(), lambda m, x: m(x.flatten(1, 2), grid)[0].view_as(x))


@pytest.mark.parametrize("name", cases("nat.NATBlock"))
def test_a_stage(name: str) -> None:
    case = reference.info(name)
    level = Level(
        {"dilations": None, "downsample": True, "mlp_ratio": 4.0} | case["hparams"], Grid(*case["input_shape"][1:3])
    )
    rules = (
        ("^blocks", "stage.blocks"),
        (r"^downsample\.reduction", "merge.conv"),
        (r"^downsample\.norm", "merge.out_norm"),
    )
    parity.check(name, level, renamed(*rules), lambda m, x: m(x))


@pytest.mark.parametrize("name", ROWS)
def test_sizes(name: str) -> None:
    counted, published = ROWS[name]["counted"], ROWS[name]["published"]
    parameters, giga = MEASURED.get(name, (None, None))
    assert parameters in (None, counted["parameters"])
    assert round(counted["parameters"] / 1e6) == pytest.approx(published["parameters"], abs=1)
    assert counted["multiply_adds"] / 1e9 == pytest.approx(giga or published["multiply_adds"], rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_files_of_the_authors(name: str) -> None:
    """Both ways, bit for bit."""
    settings, some = SMALL[name]
    state = create_model(name, image_size=64, **settings).state_dict()
    file = export(state, name, image_size=64, **settings)
    assert some <= set(file) and not any("core" in key or "stage" in key for key in file)
    back = convert(file, name, image_size=64, **settings)
    assert set(back) == set(state) and all(torch.equal(back[key], value) for key, value in state.items())


def test_pairs_of_vitrpb_are_key_minus_query() -> None:
    """The authors' index, which is Swin's upside down: the entry that a pair has is that of our bias."""
    model = create_model("vitrpb_small", image_size=48, **PLAIN)
    core = model.stages[0].blocks[1].attn.core
    index = export(model.state_dict(), "vitrpb_small", image_size=48, **PLAIN)["layers.1.attn.relative_position_index"]
    assert index.shape == (9, 9) and index[0].tolist() == [12, 13, 14, 17, 18, 19, 22, 23, 24]
    torch.testing.assert_close(core.bias.table.flatten(1)[:, index], core.bias(Grid(3, 3), Grid(3, 3)))


def test_a_file_of_oblong_maps_is_refused() -> None:
    state = create_model("vitrpb_small", image_size=(32, 64), **PLAIN).state_dict()
    with pytest.raises(
        ValueError, match=r"export: maps must be squares .*, got a table \(2, 3, 7\) in stages\.0.*; choose a sq"
    ):
        export(state, "vitrpb_small", image_size=(32, 64), **PLAIN)


def test_tables_are_resized_to_a_larger_kernel() -> None:
    """As the authors made the weights of 11 x 11 from those of 7 x 7, bicubically."""
    settings = SHORT | {"image_size": 64}
    state = create_model("dinat_large", **settings).state_dict()
    with pytest.warns(UserWarning, match="window or number of agents were resized"):
        ours = convert(state, "dinat_large_384_11x11", **settings)
    table = state["stages.1.blocks.0.attn.core.bias.table"]
    wanted = torch.nn.functional.interpolate(table[None], size=(21, 21), mode="bicubic")[0]
    torch.testing.assert_close(ours["stages.1.blocks.0.attn.core.bias.table"], wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("nat_mini", [[1] * 3, [1] * 4, [1] * 6, [1] * 5]),
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_384_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_tiny", [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]),
        ("dinat_isotropic_small", [[1, 2] * 6]),
    ],
)
def test_dilations(name: str, wanted: list[list[int]]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    layouts = [[block.attn.layout for block in stage.blocks] for stage in model.stages]
    assert [[layout.dilation[0] for layout in stage] for stage in layouts] == wanted
    assert {layout.kernel for stage in layouts for layout in stage} == {(11, 11) if "11x11" in name else (7, 7)}
    for grid, stage in zip(model.grids, layouts, strict=True):  # no map is completed
        assert all(layout.between(grid) == grid for layout in stage)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({}, "hierarchical"), ({"overlap": False}, "hierarchical"), (PLAIN | {"overlap": False}, "vit")],
)
def test_its_sites_and_pyramid(recorder, settings: dict, kind: str) -> None:
    given = {"dims": [16, 32], "depths": [1, 1], "num_heads": [2, 4], "num_classes": 5} | settings
    model = NAT(recorder, (36, 28), **given)
    sites = [(site.dim, site.grid[:2], site.kind) for site in recorder.sites]
    assert sites == [
        (dim, tuple(grid[:2]), kind)
        for dim, grid, depth in zip(model.channels, model.grids, given["depths"], strict=True)
        for _ in range(depth)
    ]
    assert [tuple(grid[:2]) for grid in model.grids] == [(9, 7), (5, 4)][: len(given["dims"])]
    maps = model.forward_pyramid(torch.randn(2, 3, 36, 28))
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(grid[:2]) for grid in model.grids]


def test_pyramids_have_norms_as_in_the_authors_detectors() -> None:
    state = create_model("nat_small", features_only=True, **SHORT | {"num_classes": 0}).state_dict()
    theirs = export(state, "nat_small", **SHORT | {"num_classes": 0})
    assert {"norm0.weight", "norm3.bias", "levels.0.downsample.norm.weight"} <= set(
        theirs
    ) and "norm.weight" not in theirs


def test_tables_of_biases_decay() -> None:
    assert create_model("nat_32px").no_weight_decay() == set()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"patch_size": 8}, r"NAT: patch_size must be 4, got 8; leave it out"),
        ({"overlap": "yes"}, r"NAT: overlap must be true or false, got 'yes'; set model.overlap=true or false"),
    ],
)
def test_what_is_refused(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_model("nat_32px", **settings)


def test_every_form_has_a_layout() -> None:
    assert {names.authors(name).source for name in ROWS} == {names.SOURCE}
    assert (
        len({id(names.authors(name)) for name in ROWS}) == len(names.LAYOUTS) + 1 == 4
    )  # plain files, with and without pairs
