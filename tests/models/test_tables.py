"""What every model costs: conf/model records what is counted, what the authors count, and what the pages say."""

import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from conf import families
from models import create_model, list_attentions, tables
from models.attention import Grid, Site
from models.attention.focused_linear import FocusedLinearCore
from models.factory import compose_model, factory

# Parameters and multiply-adds (G, one image) of the authors' code, counted by its own modules and PyTorch's counter of
# products and convolutions, and pixels of the image: LeapLabTHU/Agent-Attention at 207ce3e, FLatten-Transformer at
# abdb115, InLine at e463a6f; TransNeXt at c8a9974 and SkyworkAI/MoH at 2cefd57 without their CUDA extension, but
# transnext_micro_aaaa's multiply-adds are the paper's. Theirs have the products with neighbours in them, which are no
# matrix products here: 0.7 % of transnext_micro.
PUBLISHED = {
    "agent_cswin_base": (73_249_696, 14.8699, 224),
    "agent_cswin_base_384": (73_328_416, 46.1774, 384),
    "agent_cswin_small": (32_814_100, 6.7438, 224),
    "agent_cswin_tiny": (20_458_672, 4.2921, 224),
    "agent_deit_base": (87_204_904, 17.5269, 224),
    "agent_deit_small": (22_647_112, 4.4273, 224),
    "agent_deit_small_448": (23_070_472, 17.6415, 448),
    "agent_deit_tiny": (6_015_640, 1.1679, 224),
    "agent_pvt_large": (48_738_180, 10.3395, 224),
    "agent_pvt_medium": (35_921_746, 6.9993, 224),
    "agent_pvt_medium_256": (36_083_682, 9.1417, 256),
    "agent_pvt_small": (20_635_066, 3.9548, 224),
    "agent_pvt_tiny": (11_570_352, 1.9864, 224),
    "agent_swin_base": (88_095_096, 15.3998, 224),
    "agent_swin_base_384": (88_305_016, 46.2072, 384),
    "agent_swin_small": (49_666_684, 8.7014, 224),
    "agent_swin_small_288": (49_707_964, 14.5348, 288),
    "agent_swin_tiny": (28_902_964, 4.4994, 224),
    "flatten_cswin_base": (74_867_032, 14.9133, 224),
    "flatten_cswin_base_384": (78_369_112, 46.3048, 384),
    "flatten_cswin_small": (35_451_752, 6.7831, 224),
    "flatten_cswin_tiny": (21_201_768, 4.3243, 224),
    "flatten_pvt_large": (50_649_192, 10.3799, 224),
    "flatten_pvt_medium": (37_242_216, 7.036, 224),
    "flatten_pvt_small": (21_670_248, 4.0299, 224),
    "flatten_pvt_tiny": (12_150_504, 2.0374, 224),
    "flatten_pvt_v2_b0": (3_594_824, 0.5798, 224),
    "flatten_pvt_v2_b1": (12_931_240, 2.2193, 224),
    "flatten_pvt_v2_b2": (22_548_264, 4.2507, 224),
    "flatten_pvt_v2_b3": (38_273_832, 7.2839, 224),
    "flatten_pvt_v2_b4": (51_836_968, 10.677, 224),
    "flatten_swin_base": (88_972_488, 15.4213, 224),
    "flatten_swin_base_384": (91_433_928, 46.3824, 384),
    "flatten_swin_small": (50_510_288, 8.7336, 224),
    "flatten_swin_tiny": (29_192_384, 4.4833, 224),
    "inline_cswin_base": (73_413_640, 14.8847, 224),
    "inline_cswin_base_384": (73_413_640, 46.2202, 384),
    "inline_cswin_small": (33_032_872, 6.773, 224),
    "inline_cswin_tiny": (20_604_520, 4.3116, 224),
    "inline_deit_base": (23_797_096, 17.1691, 448),
    "inline_deit_small": (16_734_760, 4.9658, 288),
    "inline_deit_tiny": (6_477_736, 1.1092, 224),
    "inline_pvt_large": (51_154_280, 10.1297, 224),
    "inline_pvt_medium": (37_618_856, 6.8619, 224),
    "inline_pvt_small": (21_556_136, 3.9149, 224),
    "inline_pvt_tiny": (12_032_232, 1.9758, 224),
    "inline_swin_base": (88_350_120, 15.3978, 224),
    "inline_swin_base_384": (88_465_320, 46.2002, 384),
    "inline_swin_small": (49_793_296, 8.7194, 224),
    "inline_swin_tiny": (29_223_544, 4.459, 224),
    "moh_transnext_base_50": (90_023_512, 18.354, 224),
    "moh_transnext_base_75": (90_020_632, 18.349, 224),
    "moh_transnext_small_75": (49_910_548, 10.318, 224),
    "moh_transnext_small_80": (49_910_548, 10.318, 224),
    "transnext_base": (89_721_496, 18.300, 224),
    "transnext_micro": (12_809_304, 2.649, 224),
    "transnext_micro_aaaa": (13_114_008, 3.3, 256),
    "transnext_small": (49_741_564, 10.291, 224),
    "transnext_tiny": (28_258_960, 5.711, 224),
}


ROWS = families.models()
# one of every kind of mixing and backbone is counted; the others are with the full matrix
COUNTED = [
    *families.small(),
    *("pvt_tiny", "pvt_v2_b0", "cswin_tiny", "biformer_tiny"),
    "agent_pvt_tiny",
    "flatten_deit_tiny",
    "inline_pvt_tiny",
    "dit_s_2",
    "moh_dit_s_2",
]


def test_tables_are_current() -> None:
    for path, text in tables.pages().items():
        assert path.read_text() == text, f"{path.name}: run python -m models.tables"
        assert text.count("<!-- /") == len(tables.TABLES[path]) > 0


def test_tables_are_made_without_a_model() -> None:
    """From fields alone: torch is not even imported."""
    code = "import sys; from models import tables; tables.pages(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tables.ROOT).returncode == 0


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in COUNTED else pytest.mark.full) for n in ROWS])
def test_what_a_row_records_is_what_is_counted(name: str) -> None:
    assert tables.cost_of(name)._asdict() == ROWS[name]["counted"], f"run: python -m models.tables --count {name}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_records_what_the_authors_count(name: str) -> None:
    count, flops, pixels = PUBLISHED[name]
    row = ROWS[name]
    assert (row["counted"]["parameters"], row["image_size"]) == (count, pixels)
    assert row["counted"]["multiply_adds"] / 1e9 == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["published"]])
def test_what_papers_print_is_near(name: str) -> None:
    """They round, and some count norms: within 5 %, or half of their last digit."""
    published, counted = ROWS[name]["published"], ROWS[name]["counted"]
    for key, unit in (("parameters", 1e6), ("multiply_adds", 1e9)):
        if key in published:
            assert counted[key] / unit == pytest.approx(published[key], rel=0.05, abs=0.06)
    assert 60 < published.get("top1", 80) < 95 and 1 < published.get("fid", 10) < 100


def test_every_model_of_these_papers_is_listed() -> None:
    papers = {"arXiv:2312.08874", "arXiv:2308.00442", "arXiv:2412.06590", "arXiv:2311.17132"}
    named = {name for name, row in ROWS.items() if row["paper"] in papers or row["family"] == "moh_transnext"}
    assert named == {*PUBLISHED, "flatten_deit_tiny", "transnext_32px"}


def test_flatten_deit_is_composed() -> None:
    """Its authors released no code; the paper gives 6.1 M parameters and 1.1 G."""
    counted = ROWS["flatten_deit_tiny"]["counted"]
    assert counted["parameters"] / 1e6 == pytest.approx(6.1, rel=0.03)
    assert counted["multiply_adds"] / 1e9 == pytest.approx(1.1, rel=0.05)
    with torch.device("meta"):
        model = create_model("flatten_deit_tiny")
    assert sum(isinstance(m, FocusedLinearCore) for m in model.modules()) == 12


@pytest.mark.parametrize("name", list_attentions())
def test_the_table_of_mechanisms_says_what_they_are(name: str) -> None:
    """Options and defaults are the composed ones; a class token is attended where the comment does not refuse it."""
    cfg = compose_model("vit_32px", name)
    settings = OmegaConf.to_container(cfg.attention)
    options = [key for key, value in settings.items() if not key.startswith("_") and not isinstance(value, dict)]
    section = tables.option_sections().partition(f"### {name}\n")[2].partition("### ")[0]
    rows = [line.split(" | ")[:2] for line in section.splitlines() if line.startswith("| `")]
    rows = [row for row in rows if not set("@/") & set(row[0])]  # parts are named by their group
    assert rows == [[f"| `{key}`", f"`{tables.plain(settings[key])}`"] for key in options]
    row = next(line for line in tables.attention_table().splitlines() if line.startswith(f"| [`{name}`](#{name}) |"))
    prefix = factory(cfg)(Site(64, 4, Grid(8, 8), 0, 0, 2, "vit")).accepts.prefix
    comment = f"say `No class token.` behind `Cost:` in conf/attention/{name}.yaml, or take it out"
    assert (row.endswith("| yes |")) == (prefix == "attended"), comment


def test_the_command(capsys, monkeypatch, tmp_path) -> None:
    page = tmp_path / "models.md"
    page.write_text("before\n<!-- families -->\nold\n<!-- /families -->\nafter\n")
    monkeypatch.setattr(tables, "TABLES", {page: {"families": tables.family_list}})
    tables.main([])
    assert capsys.readouterr().out.startswith("written: models.md, in ")
    assert page.read_text() == f"before\n<!-- families -->\n{tables.family_list()}\n<!-- /families -->\nafter\n"
    tables.main(["--count", "cswin_32px"])
    assert capsys.readouterr().out == "cswin_32px: counted: {parameters: 662696, multiply_adds: 11551744}\n"
    row = families.models()["cswin_32px"] | {"counted": {}}
    monkeypatch.setattr(families, "models", lambda: {"cswin_32px": row})
    with pytest.raises(SystemExit, match=r"no figures of cswin_32px; put what `python -m models.tables --count cswin"):
        tables.main([])
    with pytest.raises(SystemExit, match=r"models.tables: no such option, got --coutn; use python -m models.tables"):
        tables.main(["--coutn"])
