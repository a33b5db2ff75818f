"""`python -m models.checkpoints`: what it writes loads, what it cannot write it says in one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from safetensors import safe_open

from models import create_model
from models.checkpoints import load_weights
from models.checkpoints.__main__ import main
from models.checkpoints.format.directory import step_name
from models.checkpoints.format.write import write_checkpoint

ROOT = Path(__file__).parents[3]


def authors(case="biformer/biformer_tiny"):
    """The authors' state dict of a case in half precision, with a value of its own in each tensor."""
    state = reference.info(case)["state"]
    types = {name: torch.half if dtype == "float32" else getattr(torch, dtype) for name, (_, dtype) in state.items()}
    return {name: torch.full(shape, place, dtype=types[name]) for place, (name, (shape, _)) in enumerate(state.items())}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as the authors of BiFormer released it, not to be changed."""
    path = tmp_path_factory.mktemp("released") / "biformer_tiny_best.pth"
    averaged = {f"module.{name}": value + 1 for name, value in authors().items()}
    torch.save({"model": authors(), "model_ema": averaged, "epoch": 299}, path)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run("convert", file, "--model", …) -> (exit status, output, errors)` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_to_ours_and_back(run, released, tmp_path):
    status, output, errors = run("convert", released, "--model", "biformer_tiny", "-o", "ours.safetensors")
    assert (status, errors) == (0, "")
    assert output == (
        "biformer_tiny: 264 tensors, 13.1 M parameters, 1000 classes, names of rayleizhu/BiFormer → this project, "
        "written: ours.safetensors\n"
        'load it: create_model("biformer_tiny", num_classes=1000).load_state_dict(load_weights("ours.safetensors"))\n'
    )
    create_model("biformer_tiny", num_classes=1000).load_state_dict(load_weights("ours.safetensors"))
    with safe_open("ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "biformer_tiny", "source": "biformer_tiny_best.pth"}
    for theirs in ("theirs.pth", "theirs.safetensors"):
        status, output, errors = run("export", "ours.safetensors", "--model", "biformer_tiny", "-o", theirs)
        assert (status, errors) == (0, "")
        assert f"names of this project → rayleizhu/BiFormer, written: {theirs}\n" in output
        assert equal(load_weights(theirs), authors())
    assert torch.load("theirs.pth", weights_only=True).keys() == {"model"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.safetensors", "theirs.pth", "theirs.safetensors"]


def test_averaged_weights(run, released):
    assert run("convert", released, "--ema", "--model", "biformer_tiny", "-o", "ema.safetensors")[0] == 0
    assert run("export", "ema.safetensors", "--model", "biformer_tiny", "-o", "ema.pth")[0] == 0
    assert equal(load_weights("ema.pth"), {name: value + 1 for name, value in authors().items()})


def test_a_checkpoint_of_a_run(run, tmp_path):
    with torch.device("meta"):
        shapes = create_model("davit_tiny", num_classes=3).state_dict()
    raw = {name: torch.zeros(value.shape, dtype=torch.half) for name, value in shapes.items()}
    tensors = {"model.safetensors": raw, "ema.safetensors": {name: value + 2 for name, value in raw.items()}}
    path = tmp_path / step_name(7)
    write_checkpoint(path, tensors, {"config.json": {}}, {"step": 7, "epoch": 1, "metrics": {}, "versions": {}})
    status, output, _ = run("export", path, "--ema", "--model", "davit_tiny", "-o", "theirs.pth")
    assert status == 0 and "3 classes, names of this project → dingmyu/davit, written: theirs.pth" in output
    theirs = load_weights("theirs.pth")
    assert "main_blocks.2.2.1.cpe.1.proj.weight" in theirs and all((value == 2).all() for value in theirs.values())


def test_a_detector_gives_a_pyramid(run):
    backbone = authors("davit/davit_mm_tiny__200x264")
    detector = {f"backbone.{name}": value for name, value in backbone.items()} | {"roi_head.bias": torch.ones(3)}
    torch.save({"meta": {}, "state_dict": detector}, "mask_rcnn.pth")
    status, output, _ = run("convert", "mask_rcnn.pth", "--model", "davit_tiny", "-o", "pyramid.safetensors")
    assert status == 0 and "davit_tiny: 216 tensors, 27.6 M parameters, pyramid, no classifier, names of" in output
    assert 'create_model("davit_tiny", features_only=True).load_state_dict' in output
    create_model("davit_tiny", features_only=True).load_state_dict(load_weights("pyramid.safetensors"))


def test_warnings_are_one_line(run):
    torch.save(authors("biformer/biformer_stl_nchw"), "nchw.pth")
    status, output, errors = run("convert", "nchw.pth", "--model", "biformer_stl", "-o", "stl.safetensors")
    assert status == 0 and "written: stl.safetensors" in output
    assert errors.startswith("warning: convert: biformer_stl from rayleizhu/BiFormer (STL, nchw): these weights belong")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "model", "out", "text"),
    [
        (
            "convert",
            "biformer_tny",
            "a.safetensors",
            "--model: must be one of .*, got 'biformer_tny'; did you mean 'bi",
        ),
        ("convert", "davit_tiny", "a.safetensors", "convert: .* names in the file are none of davit_tiny, got "),
        ("convert", "biformer_small", "a.safetensors", "convert: .*; it holds biformer_tiny$"),
        ("export", "coatnet_0", "a.pth", "export: coatnet_0 has no names but ours"),
        ("convert", "biformer_tiny", "a.pth", "--output: must end in .safetensors, got a.pth; rename it"),
        ("export", "biformer_tiny", "a.onnx", "--output: must end in .pth or .safetensors, got a.onnx; rename it"),
        (
            "export",
            "biformer_tiny",
            "no/a.pth",
            "--output: must lie in a folder that exists, got no/a.pth; make no first",
        ),
        ("export", "biformer_tiny", "old.pth", "--output: must be a new file, got old.pth, which exists; remove it"),
        ("export", "biformer_tiny", "link.pth", "--output: must be a new file, got link.pth, which exists; remove it"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(run, released, tmp_path, command, model, out, text):
    (tmp_path / "old.pth").write_text("old")
    (tmp_path / "link.pth").symlink_to("nowhere")
    status, output, errors = run(command, released, "--model", model, "-o", out)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert re.search(f"^models.checkpoints: {text}", errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.pth", "old.pth"]
    assert (tmp_path / "old.pth").read_text() == "old"


def test_files_that_cannot_be_read(run, released, tmp_path):
    (tmp_path / "cut.pth").write_bytes(released.read_bytes()[:100_000])
    for file, text in [("cut.pth", "this file cannot be read"), ("none.pth", "there is nothing at this path")]:
        status, _, errors = run("convert", file, "--model", "biformer_tiny", "-o", "a.safetensors")
        assert (status, errors.count("\n")) == (2, 1) and text in errors
    assert [path.name for path in tmp_path.iterdir()] == ["cut.pth"]


@pytest.mark.parametrize("out", ["a.safetensors", "a.pth"])
def test_a_full_disk_leaves_nothing_behind(run, released, tmp_path, monkeypatch, out):
    def save_file(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def save(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr("models.checkpoints.write.save_tensors", save_file)
    monkeypatch.setattr(torch, "save", save)
    status, output, errors = run("export", released, "--model", "biformer_tiny", "-o", out)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert f"models.checkpoints: --output: cannot be written, got {out}: " in errors
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_never_half_a_file(run, released, tmp_path, monkeypatch):
    """While the file is written it has another, hidden name."""
    seen = []

    def save_file(state, path, metadata):
        seen.append(
            (path.name.startswith(".writing-a.safetensors-"), path.parent, (tmp_path / "a.safetensors").exists())
        )
        path.write_bytes(b"whole")

    monkeypatch.setattr("models.checkpoints.write.save_tensors", save_file)
    out = tmp_path / "a.safetensors"
    assert run("convert", released, "--model", "biformer_tiny", "-o", out)[0] == 0
    assert seen == [(True, tmp_path, False)] and out.read_bytes() == b"whole"


def test_weights_of_any_memory_layout_are_written(run):
    state = {
        name: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in authors().items()
    }
    state["stages.0.1.norm1.weight"] = state["stages.0.0.norm1.weight"]  # tied: two names of one storage
    torch.save(state, "tied.pth")
    assert run("convert", "tied.pth", "--model", "biformer_tiny", "-o", "a.safetensors")[0] == 0
    assert run("export", "a.safetensors", "--model", "biformer_tiny", "-o", "b.safetensors")[0] == 0
    assert equal(load_weights("b.safetensors"), state)


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_and_wrong_arguments_do_not_wait_for_torch():
    wrong = ["convert", "a.pth", "--model", "biformer_tny", "-o", "a.safetensors"]
    done = python(
        "-c",
        "import sys; from models.checkpoints.__main__ import main; "
        f"assert main({wrong}) == 2 and 'torch' not in sys.modules; main(['export', '--help'])",
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m models.checkpoints export"), done.stderr


@pytest.mark.full
def test_the_command_as_a_program(tmp_path):
    output = str(tmp_path / "a.pth")
    done = python("-m", "models.checkpoints", "export", str(tmp_path / "none.pth"), "--model=davit_tiny", "-o", output)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("models.checkpoints: checkpoint: there is nothing at this path, got ")
