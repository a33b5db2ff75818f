"""What a command line of eval.py asks for: which evaluations, and which settings it makes no use of."""

import pytest
from hydra.core.config_store import ConfigStore

from conf import resolvers, source
from conf.cases import cases, differing
from conf.compose import compose
from conf.errors import UserError
from conf.text import literal
from models.runs import evaluated
from models.runs.evaluated import _lists, offer, take_config
from models.runs.useful import is_weights


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("ckpt=a,b", [["ckpt=a"], ["ckpt=b"]]),
        ("-m ckpt=a,b", [["ckpt=a"], ["ckpt=b"]]),
        ("ckpt=[a,b]", [["ckpt=a"], ["ckpt=b"]]),
        ("image_size=[192,224]", [["image_size=192"], ["image_size=224"]]),
        ("image_size=192,224", [["image_size=192"], ["image_size=224"]]),
        ("image_size=[[192,224]]", [["image_size=[192,224]"]]),
        ("image_size=[[192,224],224]", [["image_size=[192,224]"], ["image_size=224"]]),
        ("seed=range(0,2)", [["seed=0"], ["seed=1"]]),
        ("data.mean=[0.5,0.5,0.5] --cfg job", [["data.mean=[0.5,0.5,0.5]", "--cfg", "job"]]),
        ("a=1,2 b=3 c=4,5", [[f"a={a}", "b=3", f"c={c}"] for a in (1, 2) for c in (4, 5)]),
    ],
)
def test_cases(typed, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cases(literal(typed.split()))
    assert found == wanted
    assert differing(found) == [key for key in ("ckpt", "image_size", "seed", "a", "c") if f"{key}=" in typed] or (
        len(found) == 1
    )


def test_one_path_may_have_a_comma_and_a_glob_means_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.pth", "c.pth"):
        (tmp_path / name).touch()
    assert cases(literal(["ckpt=a,b.pth"])) == [[*literal(["ckpt=a,b.pth"])]]
    assert len(cases(literal(["ckpt=*.pth"]))) == 2


@pytest.fixture
def weights(tmp_path, monkeypatch) -> list[str]:
    """A file of weights, which is not looked into here."""
    resolvers.register()
    source.register()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    return ["ckpt=w.pth", "model=vit_32px", "data=digits"]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("task=predict", r"there is no setting 'task=predict'.*to predict .* give input="),
        ("optimizer.lr=1", "optimizer.lr=1 has no effect on this evaluation; leave it out"),
        ("optimizer=sgd", "optimizer=sgd has no effect"),
        ("augment=light", "augment=light has no effect"),
        ("trainer=gpu", "trainer=gpu has no effect"),
        ("global_batch=64", "global_batch=64 has no effect"),
        ("+foo.bar=1", "there is no setting 'foo.bar'"),
        ("++prob=1", "there is no setting 'prob'; did you mean 'probe'"),
        ("probe=acuracy", "there is no 'acuracy'; did you mean 'accuracy'"),
        ("input=a.png probe=accuracy", "probe=accuracy makes no use of input, got input=a.png"),
    ],
)
def test_what_has_no_effect_is_refused(setting, text, weights):
    with pytest.raises(UserError, match=text):
        take_config([*weights, *setting.split()])


def test_what_is_used_is_taken(weights):
    assert offer([*weights, "attention=agent", "gate=eca", "image_size=48", "+trainer.limit_val_batches=1"]) == [
        "ckpt=w.pth",
        "image_size=48",
        "+trainer.limit_val_batches=1",
        "probe=accuracy",
    ]


def test_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"ckpt: no value; give one on the command line: ckpt=\.\.\.$"):
        take_config([])
    (tmp_path / "outputs/mine/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="runs here: outputs/mine"):
        take_config(["probe=accuracy"])
    assert take_config(["--help"]) == ["--help", "probe=accuracy"]


def test_what_is_a_file_of_weights(weights, tmp_path):
    (tmp_path / "best").write_text("step-00000001")  # a pointer, where a file system has no links
    found = {name: is_weights(name) for name in ("w.pth", "best", "outputs", "timm/vit_tiny", "hf-hub:a/b")}
    assert found == {"w.pth": True, "best": False, "outputs": False, "timm/vit_tiny": True, "hf-hub:a/b": True}


def test_a_copy_of_the_images_is_known_by_those_for_validation(tmp_path):
    split = tmp_path / "split.csv"
    split.write_text("file,class,label,split\nant/0.png,ant,0,train\nant/1.png,ant,0,val\nbee/1.png,bee,1,val\n")
    for name in ("copy/ant/1.png", "copy/bee/1.png", "other/ant/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert _lists(str(split), str(tmp_path / "copy")) and not _lists(str(split), str(tmp_path / "other"))
    assert not _lists(None, str(tmp_path)) and not _lists(str(tmp_path / "none.csv"), str(tmp_path))


def test_other_data_has_the_root_of_this_machine_and_the_command_line_wins(weights, monkeypatch):
    """conf/local/imagefolder.yaml, as in training."""
    store, before = ConfigStore.instance(), dict(ConfigStore.instance().repo)
    monkeypatch.setattr(store, "repo", before | {"local": {}})
    store.store(group="local", name="imagefolder", node={"root": "/data/photos"})
    monkeypatch.setattr(
        evaluated, "_evaluated", lambda arguments, probe: {"run": {"task": "classification"}, "data": {}}
    )
    for given, root in (([], "/data/photos"), (["data.root=/mine"], "/mine")):
        left = offer(["ckpt=outputs/a", "data=imagefolder", *given])
        cfg = compose("eval", [word for word in left if word.startswith("data.")])
        assert cfg.data.root == root
