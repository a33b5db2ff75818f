"""Tables of models as Hydra sees them: every row is an option, and a row is all that a model needs."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import hydra
import pytest
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from conf import families, source
from conf.compose import compose_run, version_base
from conf.names import options
from models import backbones, create_model, list_models, tables
from models.backbones.base import Backbone

ROOT = Path(__file__).parents[2]
FIELDS = {"family", "paper", "source", "size", "base", "attention", "plan", "defaults", "image_size", "model"}
FIELDS |= {"published", "counted"}
ROWS = families.models()

# plans that were files before their models became rows, and still are what command lines, goldens and runs name
PLANS = """agent_cswin agent_cswin_384 agent_deit_base agent_swin_base agent_swin_base_384 agent_swin_small
agent_swin_small_288 agent_swin_tiny aggregated_all flatten_cswin flatten_cswin_384 flatten_swin flatten_swin_384
inline_cswin inline_cswin_384 inline_swin_base inline_swin_base_384 inline_swin_small inline_swin_tiny moh_aggregated
moh_dit_b_2_75 moh_dit_b_2_90 moh_dit_l_2_75 moh_dit_l_2_90 moh_dit_s_2_75 moh_dit_s_2_90 moh_dit_xl_2_75
moh_dit_xl_2_90 moh_transnext_base_50 moh_transnext_base_75 moh_transnext_small_75 moh_transnext_small_80"""


@pytest.fixture
def tables_of_ours(monkeypatch):
    """`tables_of_ours(table)` adds one."""
    before = families.tables()

    def add(table: dict) -> None:
        monkeypatch.setattr(families, "tables", lambda: before | {table["family"]: table})
        families.models.cache_clear()
        families.plans.cache_clear()

    yield add
    monkeypatch.undo()
    families.models.cache_clear()
    families.plans.cache_clear()


def volo(**row: object) -> dict:
    common = OmegaConf.to_container(OmegaConf.create(families.tables()["vit"]["common"]))
    counted = {"parameters": 26_630_000, "multiply_adds": 6_940_000_000}
    row = {"size": "d1", "model": {"dim": 96, "depth": 2}, "counted": counted} | row
    return {"family": "volo", "paper": "arXiv:2106.13112", "common": common, "models": {"volo_d1": row}}


def test_rows_are_the_models_and_tables_are_none():
    assert list_models() == sorted(ROWS) and options("model") == sorted([*ROWS, "timm"]) and len(ROWS) >= 118
    assert {table["family"] for table in families.tables().values()} & set(ROWS) == set()
    assert sum(len(table["models"]) for table in families.tables().values()) == len(ROWS), "a name stands in two tables"
    files = {path.stem for path in (families.CONF / "model").glob("*.yaml")}
    assert files == {*families.tables(), "timm"} and families.files() == ["timm"]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_its_fields(name):
    row = ROWS[name]
    assert set(row) <= FIELDS, "conf/families.py says which fields a row may have"
    assert row["paper"].startswith("arXiv:") and str(row["size"]) and row["image_size"] > 0
    assert set(row["counted"]) == {"parameters", "multiply_adds"}, f"run: python -m models.tables --count {name}"
    assert set(row["published"]) <= {"parameters", "multiply_adds", "top1", "fid"}
    assert not row["published"] or row["source"], "say in `source` where the published figures stand"


def test_one_row_adds_a_model(tables_of_ours):
    """Whatever it is called: nothing is read out of a name."""
    table = volo()
    table["models"]["efficientvit_m0"] = {"size": "m0", "base": "volo_d1", "image_size": 32, "model": {"depth": 1}}
    table["models"]["efficientvit_m0"]["counted"] = {"parameters": 1, "multiply_adds": 1}
    tables_of_ours(table)
    assert {"volo_d1", "efficientvit_m0"} <= set(list_models())
    cfg, choices = compose_run(["model=efficientvit_m0", "model.num_heads=2"])
    assert (choices["model"], cfg.image_size, cfg.model.dim, cfg.model.depth) == ("efficientvit_m0", 32, 96, 1)
    assert sum(len(stage.blocks) for stage in create_model("efficientvit_m0", num_heads=2).stages) == 1
    assert "[volo](https://arxiv.org/abs/2106.13112) 2 (0.00 to 26.6)" in tables.family_list()
    with pytest.raises(ValueError, match=r"there is no model 'volo_d2'; did you mean 'volo_d1'"):
        create_model("volo_d2")


def test_a_base_that_is_none(tables_of_ours):
    text = r"conf/model/volo.yaml: base of volo_d1 must be another model, got 'vit_tny'; `train.py --help` lists them"
    tables_of_ours(volo(base="vit_tny"))
    with pytest.raises(ValueError, match=text):
        families.models()


def test_a_plan_of_a_row_is_the_attention_of_its_model(tables_of_ours):
    """It is offered to other models under the name of its own."""
    tables_of_ours(volo(plan={"defaults": ["/attention/agent@_here_", "_self_"], "agent_tokens": 4}))
    for arguments in (["model=volo_d1"], ["model=vit_32px", "attention=plan/volo_d1"]):
        cfg, choices = compose_run(arguments)
        assert choices["attention"] == "plan/volo_d1" and cfg.attention.agent_tokens == 4
    cfg, choices = compose_run(["model=volo_d1", "attention=softmax"])
    assert choices["attention"] == "softmax" and "agent_tokens" not in cfg.attention


def test_what_a_base_hands_on():
    small, named = ROWS["agent_swin_small_288"], ROWS["agent_cswin_base_384"]
    assert small["plan"]["blocks"] == ["all", "all", 0, 0] and small["plan"]["rest"]["window"] == 9
    assert small["attention"] == "plan/agent_swin_small_288" and named["attention"] == "plan/agent_cswin_384"
    assert ROWS["agent_pvt_medium_256"]["model"]["class_token"] is False  # `common` is above a base of another family
    assert ROWS["transnext_micro_aaaa"]["model"]["dims"] == [48, 96, 192, 384]  # and below one of this
    alias = ROWS["moh_dit_s_2"]
    assert alias["attention"] == "plan/moh_dit_s_2_90" and alias["plan"] == ROWS["moh_dit_s_2_90"]["plan"]


def without_a_small_row(rows: dict[str, dict]) -> list[str]:
    """What CONTRIBUTING.md says of a backbone, of every one that classifies and has no row for 32 pixels."""
    found = {row["model"]["_target_"] for row in rows.values() if row["size"] == "32px" and row["image_size"] == 32}
    classes = [
        (module.name, value)
        for module in pkgutil.iter_modules(backbones.__path__)
        for value in vars(importlib.import_module(f"models.backbones.{module.name}")).values()
        if isinstance(value, type)
        and issubclass(value, Backbone)
        and value.__module__.endswith(f".{module.name}")
        and value is not Backbone
        and not inspect.isabstract(value)
    ]
    return [
        f"{kind.__name__}: no model for 32 pixels; give conf/model/{module}.yaml a row with size: 32px and "
        "image_size: 32, which the tests train with every mechanism"
        for module, kind in classes
        if not getattr(kind, "generates", False) and f"models.backbones.{module}.{kind.__name__}" not in found
    ]


def test_every_backbone_has_a_model_for_32_pixels():
    """DiT has none: it generates, and conf/fit reduces it for the digits."""
    assert without_a_small_row(ROWS) == []
    fewer = {name: row for name, row in ROWS.items() if name not in ("biformer_32px", "davit_32px")}
    assert [line.partition(":")[0] for line in without_a_small_row(fewer)] == ["BiFormer", "DaViT"]
    assert set(families.small()) == {name for name, row in ROWS.items() if row["image_size"] == 32}


def test_plans_keep_their_names():
    assert {f"plan/{name}" for name in PLANS.split()} <= set(options("attention"))
    cfg, _ = compose_run(["model=transnext_micro", "attention=plan/aggregated_all", "attention.hidden=64"])
    assert cfg.attention.sr_ratio == [16, 8, 4, 2] and cfg.attention.hidden == 64


@pytest.mark.parametrize(
    ("typed", "offered", "hidden"),
    [
        ("model=swin_", {"model=swin_tiny", "model=swin_base"}, {"model=swin"}),
        ("recipe=", {"recipe=biformer/tiny_in1k"}, {"recipe=_bases/swin"}),
        ("attention=", {"attention=agent", "attention=plan/agent_swin_tiny"}, set()),
        ("attention/layout=h", {"attention/layout=halo"}, set()),
        ("reci", {"recipe="}, set()),
    ],
)
def test_completion_offers_rows_and_no_tables(typed, offered, hidden):
    source.register()
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), **version_base()):
        plugin = BashCompletion(GlobalHydra.instance().config_loader())
        found = set(plugin._query("train", typed))
    assert offered <= found and not hidden & found
