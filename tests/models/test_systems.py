"""conf/systems.yaml: every command makes a model, and what is said to vouch for it is there."""

import pytest
import torch

from conf import families
from models import systems
from models.factory import build_model
from tests.compositions import compose_once

ROOT = families.CONF.parent
ROWS = systems.rows()
SOURCES = [path for folder in ("conf", "data", "kernels", "models") for path in (ROOT / folder).rglob("*.*")]
SOURCES = [path for path in SOURCES if path.suffix in {".py", ".yaml"} and path.name != "systems.yaml"]


def test_all_are_there_once():
    assert len({row.paper for row in ROWS}) == len({row.name for row in ROWS}) == len(ROWS) == 77
    assert f"{len(ROWS)}\nsystems of the literature" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_vouches_for_it_exists(row):
    assert row.status in {"cases", "cases of others", "timm", "property", "reading"}
    for path in row.proof:
        if row.status.startswith("cases"):
            assert list((systems.CASES / path).glob("*.npz")), path
        else:
            assert "def test_" in (ROOT / path).read_text(), path


def test_papers_are_named_where_they_are_built():
    text = "".join(path.read_text() for path in SOURCES)
    assert not [row.name for row in ROWS if row.paper not in text]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=pytest.mark.full) for row in ROWS])
def test_its_command_makes_a_model(row):
    cfg, _ = compose_once([*row.choose])
    with torch.device("meta"):
        assert sum(weight.numel() for weight in build_model(cfg).parameters())
