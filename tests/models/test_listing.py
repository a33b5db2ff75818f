"""`python train.py list`: every name with its figures, found by the words that it is made of."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from conf import recipes
from conf.errors import UserError
from conf.names import options
from models import list_attentions, list_models, recipe_tables, tables
from models.listing import show


def listed(*arguments: str) -> list[list[str]]:
    out = io.StringIO()
    show(list(arguments), Console(file=out))
    return [line.split() for line in out.getvalue().splitlines()]


def names(*arguments: str) -> list[str]:
    return [line[0] for line in listed(*arguments)[1:]]


def test_every_name_has_a_line():
    assert sorted(names("models")) == list_models()
    assert set(list_attentions()) <= set(names("attentions"))
    assert names("recipes") == recipes.names()
    assert set(options("data")) <= set(names("data"))
    assert {"attention/layout=window", "gate=eca", "pool=simpool"} <= set(names("parts"))
    assert {"models", "recipes", "optimizer"} <= set(names())


def test_a_line_has_the_figures():
    (row,) = (line for line in listed("models=swin") if line[0] == "swin_tiny")
    assert row[1:6] == ["window", "224", "28.3", "4.49", "2103.14030"]
    (row,) = (line for line in listed("recipes=biformer/tiny") if line[0] == "biformer/tiny_in1k")
    assert row[1:] == ["biformer_tiny", "imagenet1k", "2303.08810", "81.4", "unverified"]


def test_words_and_patterns_choose():
    assert "swin_tiny" in names("models=swin,vit") and "vit_tiny" in names("models=swin,vit")
    assert not [name for name in names("models=vit") if "davit" in name]
    assert names("models=sw*_tiny") == ["swin_tiny"]
    assert names("attentions=agent") == ["agent"]


def test_what_is_not_there_is_said():
    with pytest.raises(UserError, match=r"list: there is no 'modles'; did you mean 'models'\?\navailable: models, "):
        listed("modles")
    with pytest.raises(UserError, match=r"begins so, got models=swim; did you mean 'swin_.*try models alone"):
        listed("models=swim")


def test_the_programs_list(command):
    status, out, _ = command("train", "list", "models=swin_tiny")
    assert status in (0, None) and "28.3" in out
    status, _, err = command("train", "list", "x")
    assert status == 2 and err.startswith("train.py: list: there is no 'x'")


def test_generators_explain_themselves_and_write_nothing(capsys, monkeypatch):
    for module in (tables, recipe_tables):
        monkeypatch.setattr(Path, "write_text", None)
        module.main(["--help"])
        assert capsys.readouterr().out.startswith("python -m ")
