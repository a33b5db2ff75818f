"""Paths, names and other text arrive as they are typed, whatever Hydra's grammar makes of it."""

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf import text
from conf.compose import compose_run
from conf.errors import UserError

TYPED = (
    *("birds (1)", "lr=0.1", "it's", 'say "hi"', "données", "日本", "#1", "a #1", "p$h", "a,b", "a:b", "~x", " lead"),
    *("2026_11_28", "1e3", "007", "1.0", "on", "off", "true", "No", "nan", "inf", "-1", "0x1f", "1_000"),
    *(
        "train[:80%]",
        "train[:10%]+train[20%:]",
        "*.jpg",
        "C:\\new\\table",
        "end\\",
        'a\\"b\\',
        "{a",
        "a}b",
        "[a",
        "choice(a)",
    ),
    *("hf-hub:timm/vit", "outputs/x/checkpoints/best", "${data.root}/x", "uoft-cs/cifar10", "a'b'c", "'a'b'", "../a b"),
)


def read(argument: str):
    """What Hydra reads in it."""
    value = OverridesParser.create().parse_override(argument).value()
    plain = [getattr(part, "text", part) for part in value] if isinstance(value, list) else value
    return getattr(plain, "text", plain)


@pytest.mark.parametrize("value", TYPED)
def test_text_is_what_was_typed(value):
    for key in ("run.name", "data.root", "+data.source.path", "data.source.train", "init", "ckpt", "logger.project"):
        (argument,) = text.literal([f"{key}={value}"])
        assert read(argument) == value
        assert text.literal([argument]) == [argument]
        assert text.plain(argument.partition("=")[2]) == value


def test_home_null_and_what_is_quoted(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me (2)")
    assert read(text.literal(["data.root=~/birds"])[0]) == "/home/me (2)/birds"
    assert read(text.literal(["input=[~/a,~/b]"])[0]) == ["/home/me (2)/a", "/home/me (2)/b"]
    for argument, value in [("init=null", None), ("init='null'", "null"), ("ckpt='a b'", "a b"), ('ckpt="1e3"', "1e3")]:
        assert text.literal([argument]) == [argument] and read(argument) == value


def test_lists_are_of_text():
    (argument,) = text.literal(["ckpt=[outputs/lr=0.1/best, b (2) ,'c,d',007]"])
    assert read(argument) == text.listed(argument.partition("=")[2]) == ["outputs/lr=0.1/best", "b (2)", "c,d", "007"]
    assert read(text.literal(["logger.tags=[1e3,on]"])[0]) == ["1e3", "on"]
    given = "data.source.data_files={train: a.parquet}"
    assert text.literal([given]) == [given]


def test_a_sweep_has_several_texts():
    def swept(argument):
        override = OverridesParser.create().parse_override(text.literal(["-m", argument])[1])
        return list(override.sweep_string_iterator()) if override.is_sweep_override() else read(argument)

    assert swept("data.root=a,b=1,é") == ["a", '"b=1"', '"é"']
    assert swept("data.source.train=train[:10%],train[:50%]") == ['"train[:10%]"', '"train[:50%]"']
    assert swept("run.name=2026_11_28,1e3,x") == ['"2026_11_28"', '"1e3"', "x"]
    assert swept("init=choice(a,b)") == ["a", "b"] and swept("ckpt=[a,b],[c]") == ["[a,b]", "[c]"]


def test_what_exists_is_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "[x]", "choice(a,b)"):
        (tmp_path / name).mkdir()
        assert read(text.literal(["-m", f"data.root={name}"])[1]) == name


def test_other_settings_are_left_alone():
    others = ["seed=1e3", "model.depths=[1,2]", "optimizer.lr=1_000", "data=a,b", "-m", "~data.root", "data.root=", "x"]
    assert text.literal(others) == others


def test_an_interpolation_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"init: after \$\{ must come a key and \}, got 'a\$\{b'; rename"):
        text.literal(["init=a${b"])


def test_the_command_line_takes_them(command, tmp_path, monkeypatch):
    given = ["data=imagefolder", "data.root=it's", "+data.source.path=données (1)", "++logger.name=1e3"]
    status, out, err = command("train", "--cfg", "job", *given)
    assert status == 0, err
    assert "root: 'it''s'" in out  # as YAML and Hydra want it
    cfg = yaml.safe_load(out)
    assert (cfg["data"]["root"], cfg["data"]["source"]["path"], cfg["logger"]["name"]) == ("it's", "données (1)", "1e3")
    monkeypatch.setenv("HOME", str(tmp_path / "lr=0.1 (2)"))
    assert f"got {tmp_path}/lr=0.1 (2)/it's" in command("eval", "ckpt=~/it's")[2]


def test_options_may_stand_between_settings(command):
    status, out, err = command("train", "seed=1", "--cfg", "job", "data=fake", "-p", "data", "image_size=48")
    assert status == 0 and "size: ${image_size}" in out, err


def test_what_is_local_to_a_machine_is_read_and_the_command_line_wins(monkeypatch):
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", dict(store.repo))
    store.store(group="local", name="imagefolder", node={"root": "/data/photos"})
    store.store(group="local", name="wandb", node={"entity": "team"})
    cfg, _ = compose_run(["data=imagefolder"])
    assert (cfg.data.root, cfg.logger.entity) == ("/data/photos", "team")
    cfg, _ = compose_run(["data=imagefolder", "data.root=/other", "logger=none"])
    assert cfg.data.root == "/other" and "entity" not in cfg.logger
