"""What is wrong with `python -m models.export` is one sentence, before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from conf.extras import requirement

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["format=onnx", "-o", "a.onnx"], "ckpt: no value; give a run, a checkpoint or a file of weights"),
        (["ckpt=x", "-o", "a.onnx"], "format: no value; give one of onnx, pt2, torchscript, safetensors, hf"),
        (["ckpt=x", "format=onx", "-o", "a.onnx"], "got 'onx'; did you mean 'onnx'?"),
        (["ckpt=x", "format=onnx"], "-o: no value; give the file to write: -o mine.onnx"),
        (["ckpt=x", "format=hf"], "-o: no value; give the folder to write: -o mine"),
        (["ckpt=x", "format=onnx", "-o"], "-o: no value; give the file to write"),
        (["ckpt=x", "format=onnx", "-o", "a.pt2"], "-o: must end in .onnx for format=onnx, got a.pt2; rename it"),
        (["ckpt=x", "format=torchscript", "-o", "a"], "must end in .pt or .ts for format=torchscript"),
        (["ckpt=x", "format=onnx", "-o", "there.onnx"], "-o: must be new, got there.onnx, which exists; remove it"),
        (
            ["ckpt=x", "format=hf", "-o", "no/where"],
            "-o: must lie in a folder that exists, got no/where; make no first",
        ),
        (["ckpt=x", "format=onnx", "-o", "a.onnx", "dynamic_size=maybe"], "dynamic_size must be true or false"),
        (["ckpt=x", "format=pt2", "-o", "a.pt2", "quantize=int8"], "quantize: only format=onnx can have it"),
        (["ckpt=x", "format=onnx", "-o", "a.onnx", "quantize=int4"], "quantize must be one of int8, got 'int4'"),
        (
            ["ckpt=x", "format=torchscript", "-o", "a.pt", "dynamic_size=true"],
            "cannot have it, as a trace holds one size",
        ),
        (["ckpt=x", "format=hf", "-o", "a", "dynamic_size=true"], "as it holds weights, which take any size"),
        (
            ["ckpt=x", "format=hf", "-o", "a", "fold_norms=true"],
            "fold_norms: hf cannot have it, as it holds the weights",
        ),
        (["ckpt=x", "format=pt2", "-o", "a.pt2", "fold_norms=1"], "fold_norms must be true or false, got 1; set fold"),
        (["ckpt=x", "format=pt2", "-o", "a.pt2", "opset=20"], "opset: only format=onnx has one, got format=pt2"),
        (["ckpt=x", "format=onnx", "-o", "a.onnx", "opset=9"], "opset must be a whole number of at least 18, got 9"),
        (["ckpt=x", "format=onnx", "-o", "a.onnx", "images=0"], "images must be a positive number or all, got 0"),
        (["ckpt=x", "fromat=onnx", "-o", "a.onnx"], "there is no setting 'fromat'; did you mean 'format'?"),
        (["checkpoint=x", "format=onnx", "-o", "a.onnx"], "there is no setting 'checkpoint'; write ckpt=x"),
        (["ckpt=x", "format=onnx", "output=a.onnx"], "output=a.onnx has no effect on an export"),
        (["there.onnx", "format=onnx"], "settings are written key=value, got 'there.onnx'; write ckpt=there.onnx"),
        (["ckpt=x", "--opset=18"], "settings are written key=value, got '--opset=18'; see --help"),
        (["ckpt=nowhere", "format=onnx", "-o", "a.onnx"], "there is nothing at this path, got nowhere"),
    ],
)
def test_what_is_wrong_is_one_sentence(export, tmp_path, given, said):
    (tmp_path / "there.onnx").touch()
    status, output, errors = export(*given)
    assert status == 2 and output == "" and said in errors and errors.startswith("models.export: "), errors
    assert errors.count("\n") == 1, errors
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_settings_of_an_evaluation_are_judged_as_there(export, run):
    status, _, errors = export(f"ckpt={run}", "format=onnx", "-o", "a.onnx", "attention=agent")
    assert status == 2 and "this command asks for attention=agent; leave attention= out" in errors
    status, _, errors = export(f"ckpt={run}", "format=onnx", "-o", "a.onnx", "data.evl.size=4")
    assert status == 2 and "there is no setting 'data.evl.size'" in errors, errors
    status, _, errors = export(f"ckpt={run}", "format=onnx", "-o", "a.onnx", "weights=mean")
    assert status == 2 and "weights must be raw, ema or auto, got 'mean'" in errors, errors


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_sentence(export, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    status, _, errors = export("ckpt=x", "format=onnx", "-o", "a.onnx")
    assert status == 2 and errors == (
        f"models.export: format=onnx needs the package {package}, which is not installed; "
        f"run: python -m pip install '{requirement(package)}'\n"
    )


def test_help_and_mistakes_do_not_wait_for_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from models.export.__main__ import main; sys.exit(main({0}))"
    for given, status in ((["--help"], 0), ([], 2), (["ckpt=x", "format=onx"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(given)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert ("torchscript: a trace" in done.stdout) == (given in (["--help"], []))
