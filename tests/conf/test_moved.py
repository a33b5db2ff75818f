"""Modules under the names that they had are those of today."""

import importlib
import sys

import pytest

from conf import moved


@pytest.mark.parametrize("name", moved.MOVED)
def test_a_former_name_is_the_module_of_today(name, monkeypatch):
    now = importlib.import_module(moved.MOVED[name])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{name} is {moved.MOVED[name]} now; import that"):
        former = importlib.import_module(name)
    assert former is now and now.__name__ == moved.MOVED[name] and now.__spec__.name == now.__name__
    monkeypatch.delitem(sys.modules, name)


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"models\.tasks\.nothing"):
        importlib.import_module("models.tasks.nothing")
