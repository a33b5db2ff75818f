"""The tables of recipes: they are current, printed as written, and say of every model what its row records."""

import re

import pytest

from conf import families, recipes
from models import recipe_tables as tables

NAMES = recipes.names()
# these are counted, one of every kind of recipe, and one more of every folder with the full matrix: what the others say
# is what their models' rows say, which are all counted (test_tables.py), and what changes that is told below
COUNTED = (
    "agent/deit_tiny_in1k",
    "davit/tiny_in1k",
    "flatten/pvt_v2_b0_in1k",
    "moh/dense_digits",
    "moh/dit_s_2_90_in1k",
)
COUNTED += ("moh/dense_to_moh_digits", "maxvit/tiny_384_in1k")
MORE = {name.partition("/")[0]: name for name in NAMES if name not in COUNTED}.values()


def test_both_tables_are_current():
    text = tables.FILE.read_text()
    for name, table in (("recipes", tables.table()), ("papers", tables.short_table())):
        assert tables.updated(text, table, name) == text, "run: python -m recipes --write"
    assert list(tables.written()) == NAMES


@pytest.mark.parametrize("name", [*COUNTED, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_what_the_table_says_is_what_is_counted(name):
    """Of the composed recipe: whatever it changes of its model is in the figures."""
    assert tables.written()[name][2:4] == tables.counted(name), "run: python -m recipes --write"


def test_a_recipe_that_changes_its_model_is_counted(monkeypatch):
    """Anything that costs; what only training needs does not."""
    asked = []
    monkeypatch.setattr(tables, "counted", lambda name: asked.append(name) or ("1.00 M", "1.00 G"))
    for name in NAMES:
        tables.row_of(name, known={})
    larger = [name for name in NAMES if re.fullmatch(r"maxvit/.*_(384|512)_in1k", name)]  # of one row at three sizes
    converted = [
        name for name in NAMES if name.startswith(("clear/", "hedgehog/", "sparsifiner/"))
    ]  # to another mechanism
    assert asked == sorted([*converted, *larger, "moh/dense_digits", "moh/dense_to_moh_digits"]) and len(larger) == 8
    read = tables.read
    for change in (
        {"model": {"num_heads": [1, 2, 4, 8]}},
        {"image_size": 256},
        {"data_name": "digits"},
        {"mixing": "moh"},
    ):
        monkeypatch.setattr(tables, "read", lambda name, change=change: read(name) | change)
        assert tables.row_of("davit/tiny_in1k", known={})[2:4] == ("1.00 M", "1.00 G"), change
    monkeypatch.setattr(tables, "read", lambda name: read(name) | {"model": {"drop_path": 0.5}})
    assert tables.row_of("davit/tiny_in1k", known={})[2:4] == ("28.36 M", "4.52 G")


def test_what_a_recipe_must_give_is_what_its_model_publishes():
    """The row has one figure; recipes with token labels or guidance give others."""
    figures: dict[str, set[float]] = {}
    for name in NAMES:
        recipe = tables.read(name)
        if recipe["target"]["value"] is not None:  # what nobody has published
            figures.setdefault(recipe["model_name"], set()).add(recipe["target"]["value"])
    for model, values in figures.items():
        published = families.models()[model]["published"]
        assert published.get("top1", published.get("fid")) in values, model


def test_it_is_printed_as_it_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipes, "names", lambda: ["davit/tiny_in1k", "moh/dense_digits"])
    page = tmp_path / "recipes.md"
    page.write_text("<!-- papers -->\n\n<!-- /papers -->\n<!-- recipes -->\nold\n<!-- /recipes -->\nafter\n")
    monkeypatch.setattr(tables, "FILE", page)
    tables.main([])
    printed = capsys.readouterr().out
    tables.main(["--write"])
    monkeypatch.setattr(tables, "counted", None)  # nothing is counted twice
    tables.main([])
    assert capsys.readouterr().out == printed
    assert page.read_text().endswith(f"\n<!-- recipes -->\n{printed}<!-- /recipes -->\nafter\n")
    assert "| [davit](https://arxiv.org/abs/2204.03645) | `davit/tiny_in1k` | 1 | 1 |" in page.read_text()


def test_sizes_in_the_short_table_are_fields():
    table = tables.short_table()
    assert "`agent/deit_{tiny,small,small_448,base}_in1k`" in table and "`moh/dense_digits`" in table
    assert "`dit/{s_2,b_2,l_2,xl_2,xl_2_guided}_in1k`" in table
    assert "`biformer/{tiny,small,small_token_labels,base,base_token_labels,stl}_in1k`" in table


def test_a_wrong_option():
    with pytest.raises(SystemExit, match=r"recipes: no such option, got --wirte; use python -m recipes \[--write\]"):
        tables.main(["--wirte"])
