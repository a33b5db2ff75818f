"""What is wrong with a command line is answered with what to write in its place."""

import re

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf, open_dict

from conf import foreign, help, layout, mistakes, settings
from conf.compose import compose_run
from conf.errors import UserError
from conf.names import choosable, options
from models import list_models


def refused(*arguments: str, program: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        mistakes.refuse_choices(list(arguments))
        mistakes.refuse_recipes(list(arguments))
        mistakes.Parser(get_args_parser(), program).parsed(list(arguments))
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--epochs", "5"), "got '--epochs 5'; write trainer.max_epochs=5"),
        (("seed=1", "--lr=0.1"), "got '--lr=0.1'; write optimizer.lr=0.1"),
        (("-b", "64", "seed=1"), "got '-b 64'; write data.batch_size=64"),
        (("--batch-size", "64"), "write data.batch_size=64"),
        (("--model", "vit_tiny"), "write model=vit_tiny"),
        (("--amp",), "got '--amp'; write trainer.precision=..."),
        (("--drop-path", "0.1"), "write model.drop_path=0.1"),
        (("--nonsense", "seed=1"), "got '--nonsense'; write nonsense=..."),
        (("vit_tiny",), "got 'vit_tiny'; write model=vit_tiny"),
        (("biformer/tiny_in1k",), "write recipe=biformer/tiny_in1k"),
        (("photos",), "got 'photos'; write data=imagefolder data.root=photos"),
        (("old.pth",), "write init=old.pth"),
        (("seed", "=", "1"), "without spaces, got 'seed =1'; write seed=1"),
        (("epochs",), "write trainer.max_epochs=..."),
        (("nonsense",), "got 'nonsense'; see --help"),
        (("--cfg", "nonsense"), "invalid choice: 'nonsense' (choose from"),
        (("data=./photos",), "a folder of images is data=imagefolder data.root=./photos"),
        (("recipe=biformer",), "available: biformer/base_in1k, biformer/base_token_labels_in1k"),
        (("recipe=biformer",), "\nall "),
    ],
)
def test_what_is_no_setting(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "old.pth").touch()
    assert said in refused(*arguments)


def test_evaluation_has_its_own_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert "write ckpt=mine" in refused("mine", program="eval")
    assert "write ckpt=x" in refused("--checkpoint", "x", program="eval")
    assert foreign.ours("eval", "task") == ["probe"] and foreign.ours("eval", "batch_size") == ["data.batch_size"]


def test_options_of_hydra_stay():
    parsed = mistakes.Parser(get_args_parser(), "train").parsed(["a=1", "--cfg", "job", "-p", "model", "b=2", "~c"])
    assert parsed.overrides == ["a=1", "b=2", "~c"] and parsed.cfg == "job" and parsed.package == "model"


def test_what_others_call_something_exists_here():
    cfg, _ = compose_run(["data=imagefolder"])
    of_others = {"adapter", "data.channels"}  # groups and keys that come with what they are for
    for key in {*foreign.TRAIN} - {*choosable(), "recipe"} - of_others:
        parent, _, leaf = key.rpartition(".")
        assert leaf in (OmegaConf.select(cfg, parent) if parent else cfg), key


def test_the_command_line_says_it(command):
    cases = {
        "ckpt_path=a.pth": "write init=a.pth (weights to start from) or resume=a.pth (a run to continue)",
        "+optimizer.foo=1": "no optimizer of timm has the setting 'foo'; leave optimizer.foo out",
        "model=resnet50": "model: there is no 'resnet50'",
    }
    for argument, said in cases.items():
        status, _, err = command("train", argument)
        assert status == 2 and said in err, err
    assert re.search(r"\ball \d+:", err) and "python train.py list models" in err and len(err) < 400


def test_evaluation_says_it_before_it_misses_a_checkpoint(command):
    assert "there is no setting 'ckpt_path'; write ckpt=x" in command("eval", "ckpt_path=x")[2]
    assert "got 'vit_tiny'; write " in command("eval", "vit_tiny")[2]


def test_values_are_judged_without_torch():
    def composed(*arguments):
        cfg, _ = compose_run(list(arguments))
        with open_dict(cfg):
            del cfg["run"]  # of a run that has begun
        return cfg

    settings.check(composed())
    settings.check(composed("+optimizer.momentum=0.9", "+optimizer.caution=true"))
    for argument, said in [
        ("optimizer.lr=abc", "optimizer: lr must be a number of at least 0, got 'abc'; set optimizer.lr"),
        ("schedule.min_lr=-1", "schedule: min_lr must be a number of at least 0, got -1"),
        ("data=imagefolder", "data.root: no image folder, got None"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            settings.check(composed(argument))


def test_what_is_written_in_its_place():
    assert foreign.advice("train", "optimizer.learning_rate", "0.1") == "; write optimizer.lr=0.1"
    assert (
        foreign.advice("train", "--experiment", "") == "; write recipe=... (a published result with all its settings)"
    )
    assert foreign.advice("train", "nonsense", "1") == ""


def test_messages_fit_the_terminal():
    names = [f"name_{i}" for i in range(30)]
    fitted = layout.fitted(f"model: there is no 'x' {'word ' * 30}\navailable: {', '.join(names)}\nshort", 60)
    assert max(map(len, fitted.splitlines())) <= 60
    assert all(re.search(rf"\b{name}\b", fitted) for name in names) and fitted.endswith("\nshort")
    assert layout.columns(["a", "bb", "c", "d"], 12) == "  a   c\n  bb  d"


@pytest.mark.parametrize("program", ["train", "eval"])
def test_help_fits_a_page(program):
    lines = help.text(program).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120 and "_bases" not in "".join(lines)
    listed = " ".join(lines)
    if program == "train":
        assert f"{len(list_models())}: " in listed and "swin 4" in listed
        assert all(name in listed for name in options("attention") if "/" not in name)
    else:
        assert all(name in listed for name in options("probe"))
