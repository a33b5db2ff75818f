"""What `input=` may be."""

import pytest

from conf.errors import UserError
from conf.inputs import images_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p/q").mkdir(parents=True)
    for name in ("p/b.jpg", "p/a.png", "p/q/c.JPEG", "p/.hidden.png", "p/notes.md"):
        (tmp_path / name).touch()
    return tmp_path


def test_images_folders_and_globs(folder):
    assert images_of("p") == (["p/a.png", "p/b.jpg", "p/q/c.JPEG"], "1 .md")
    assert images_of("p/a.png").files == ["p/a.png"] and images_of("p/notes.md").files == ["p/notes.md"]
    assert images_of("p/*.*g").files == ["p/a.png", "p/b.jpg"]
    assert images_of("p/**/*.JPEG").files == ["p/q/c.JPEG"]
    assert images_of(["p/b.jpg", "p"]).files == ["p/b.jpg", "p/a.png", "p/q/c.JPEG"], "each once"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "a.png\n\nb.jpg\n"),
        ("l.csv", "label,file\n1,a.png\n2,b.jpg\n"),
        ("l.csv", "a.png,1\nb.jpg,2\n"),
        ("l.tsv", "path\tx\na.png\t1\nb.jpg\t2\n"),
        ("l.json", '["a.png", "b.jpg"]'),
        ("l.json", '[{"file": "a.png"}, ["b.jpg", 3]]'),
        ("l.jsonl", '{"image": "a.png"}\n"b.jpg"\n'),
    ],
)
def test_lists(folder, name, text):
    (folder / "p" / name).write_text(text)
    assert images_of(f"p/{name}").files == ["p/a.png", "p/b.jpg"]


def test_what_is_nothing(folder):
    (folder / "bad.json").write_text("{")
    (folder / "empty").mkdir()
    for given, text in (
        ("nowhere", "there is nothing at this path, got nowhere"),
        ("empty", "no image, got empty; give an image"),
        ("bad.json", "bad.json is no list of files"),
    ):
        with pytest.raises(UserError, match=text):
            images_of(given)
