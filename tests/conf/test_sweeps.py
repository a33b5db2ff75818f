"""Folders of a sweep are called by what differs, and stay the same when values or seeds are added."""

import json
import os

import pytest

from conf import sweeps


@pytest.fixture(autouse=True)
def forget():
    yield
    sweeps.end()


def folder(typed: list[str], job: list[str], seed: object = 0, **params: str) -> str:
    sweeps.begin(typed, params)
    return sweeps.folder(job, seed)


def test_a_folder_says_what_differs_and_the_seed():
    typed = ["data=fake", "++trainer.max_epochs=1", "attention=softmax,agent", "seed=0,1", "run.name=s"]
    job = ["data=fake", "++trainer.max_epochs=1", "attention=agent", "seed=1", "run.name=s"]
    assert folder(typed, job, 1) == "agent/seed-1"
    assert sweeps.differing(job) == {"attention": "agent", "seed": "1"}


def test_more_seeds_add_to_a_sweep():
    alone = folder(["attention=softmax,agent"], ["attention=agent"])
    assert alone == folder(["attention=softmax,agent", "seed=0,1"], ["attention=agent", "seed=0"]) == "agent/seed-0"
    assert folder(["seed=0,1"], ["seed=1"], 1) == "seed-1"


@pytest.mark.parametrize(
    ("typed", "job", "wanted"),
    [
        (["++optimizer.lr=1e-3,1e-2"], ["++optimizer.lr=0.001"], "lr-0.001/seed-0"),
        (["model=a,b", "attention/layout=grid,whole"], ["model=a", "attention/layout=grid"], "a/layout-grid/seed-0"),
        (["gate=none,eca", "pool=none,gem"], ["gate=none", "pool=none"], "gate-none/pool-none/seed-0"),
        (["a.rate=1,2", "b.rate=1,2"], ["a.rate=1", "b.rate=2"], "a.rate-1/b.rate-2/seed-0"),
        (["recipe=a/b,a/c"], ["recipe=a/c"], "a-c/seed-0"),
        (["model.dims=[1,2],[3,4]"], ["model.dims=[3,4]"], "dims-3-4/seed-0"),
        (["x.y=range(0,3)"], ["x.y=2"], "y-2/seed-0"),
        (["attention=glob(*)"], ["attention=agent"], "agent/seed-0"),
    ],
)
def test_names_of_keys_and_values(typed, job, wanted):
    assert folder(typed, job) == wanted


def test_what_a_recipe_sweeps_counts_too():
    typed, params = ["recipe=moh/dense_to_moh_digits"], {"attention.routed_heads": "2,3,4,5,6"}
    assert sweeps.begin(typed, params) == 5
    assert sweeps.folder([*typed, "attention.routed_heads=3"], 0) == "routed_heads-3/seed-0"


def test_no_two_runs_share_a_folder():
    """However long the values are, and whatever a folder cannot be called."""
    values = ["/a b/c", "/a?b/c", "/" + "long/" * 40 + "a", "/" + "long/" * 40 + "b", "..", "."]
    sweeps.begin(["data.root=x,y"], {})
    names = [sweeps.folder([f"data.root={value}"], 0) for value in values]
    assert len(set(names)) == len(values) and all(len(name) < 90 for name in names)
    assert not [name for name in names if set(name.split("/")) & {"", ".", ".."}]


def test_the_number_of_runs_where_it_is_known():
    assert sweeps.begin(["attention=softmax,agent", "seed=range(3)"], {}) == 6
    assert sweeps.begin(["attention=glob(*)", "seed=0,1"], {}) is None
    assert json.loads(os.environ[sweeps.SWEPT]) == ["attention", "seed"]
