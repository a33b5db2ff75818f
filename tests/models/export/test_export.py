"""Every format holds the model: what is written computes the same on real images, or nothing is left."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from models.checkpoints import create_from, load_weights
from models.export import job
from models.export.graphs import Written
from tests.models.export.conftest import TINY, run_of


def images(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count * 3 * 32 * 32).reshape(count, 3, 32, 32)


def expected(run: Path, count: int = 5, ema: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return create_from(run, ema)(images(count))


def same(got, wanted) -> None:
    torch.testing.assert_close(torch.as_tensor(got), wanted, atol=1e-5, rtol=1e-5)


def test_onnx(export, run, tmp_path):
    import onnxruntime

    status, output, errors = export(f"ckpt={run}", "format=onnx", "-o", "mine.onnx")
    assert (status, errors) == (0, ""), errors
    session = onnxruntime.InferenceSession("mine.onnx")
    for count in (1, 5):
        same(session.run(None, {"images": images(count).numpy()})[0], expected(run, count))
    facts = json.loads(Path("mine.onnx.json").read_text())
    assert facts["inputs"] == {"images": ["batch", 3, 32, 32]} and facts["output"] == "logits"
    assert facts["opset"] >= 18 and facts["largest_difference"] < 1e-5 and facts["step"] == 7
    assert facts["bytes"] == Path("mine.onnx").stat().st_size and facts["mean"] == [0.5, 0.5, 0.5]
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == [str(label) for label in range(10)] and json.loads(told["std"]) == [0.5] * 3
    assert "images (batch, 3, 32, 32) → logits" in output and f"opset {facts['opset']}" in output
    assert "on 1×3×32×32, 3×3×32×32" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.onnx", "mine.onnx.json"]


@pytest.mark.parametrize("weights", [pytest.param("raw", marks=pytest.mark.full), "ema"])
def test_safetensors(export, run, weights):
    status, output, errors = export(f"ckpt={run}", "format=safetensors", "-o", "mine.safetensors", f"weights={weights}")
    assert (status, errors) == (0, ""), errors
    assert f"step 7: {weights} weights" in output and "largest difference 0.0e+00" in output
    assert torch.equal(create_from("mine.safetensors")(images(2)), expected(run, 2, ema=weights == "ema"))
    with safe_open("mine.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["run"]["model"] == "vit_32px" and config["model"]["dim"] == 32 and "logger" not in config


def test_a_folder_for_the_hub(export, run, tmp_path):
    status, output, errors = export(f"ckpt={run}", "format=hf", "-o", "mine", "weights=raw")
    assert (status, errors) == (0, ""), errors
    names = ["README.md", "config.json", "labels.json", "metrics.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in Path("mine").iterdir()) == names
    assert torch.equal(create_from("mine")(images(2)), expected(run, 2))
    assert load_weights("mine").keys() == load_weights(run).keys()
    card = ModelCard.load("mine/README.md")
    assert card.data.pipeline_tag == "image-classification" and {"vit_32px", "softmax"} <= {*card.data.tags}
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.5, "digits")
    assert "top-1 | 50.00%" in card.text and "images of 32 × 32 pixels" in card.text
    assert json.loads(Path("mine/labels.json").read_text())["3"] == "3"
    assert json.loads(Path("mine/metrics.json").read_text())["val/top1_ema"] == 0.75
    prepared = json.loads(Path("mine/preprocessor_config.json").read_text())
    assert prepared["image_size"] == [32, 32] and prepared["mean"] == [0.5, 0.5, 0.5]
    assert "hf upload" in output and str(tmp_path) not in Path("mine/config.json").read_text()


def test_what_computes_something_else_is_not_left(export, run, tmp_path, monkeypatch):
    def wrong(subject, path, asked) -> Written:
        path.write_text("a file")
        return Written(lambda inputs: subject.model(*inputs) * 1.001, {}, "")

    monkeypatch.setitem(job.WRITERS, "onnx", wrong)
    status, _, errors = export(f"ckpt={run}", "format=onnx", "-o", "mine.onnx")
    assert status == 1 and "does not compute what the model computes: largest difference" in errors
    assert "the bound is 0.0001 of the largest output. Nothing is left" in errors
    assert list(tmp_path.iterdir()) == []


def test_what_takes_one_batch_only_is_not_left(export, run, tmp_path, monkeypatch):
    def narrow(inputs):
        if len(inputs[0]) == 3:
            raise RuntimeError("expected a batch of\n2")

    def wrong(subject, path, asked) -> Written:
        path.write_text("a file")
        return Written(lambda inputs: narrow(inputs) or subject.model(*inputs), {}, "")

    monkeypatch.setitem(job.WRITERS, "onnx", wrong)
    status, _, errors = export(f"ckpt={run}", "format=onnx", "-o", "mine.onnx")
    assert status == 1 and list(tmp_path.iterdir()) == []
    assert "format=onnx: what was written cannot take 3×3×32×32 (expected a batch of 2). Nothing is left" in errors


def test_a_model_that_gives_no_numbers_is_refused(export, tmp_path):
    broken = run_of(tmp_path / "outputs", *TINY, spread=1e30)
    status, _, errors = export(f"ckpt={broken}", "format=safetensors", "-o", "mine.safetensors")
    assert status == 2 and "ckpt: the model itself gives no finite numbers for its images; export another" in errors
    assert not Path("mine.safetensors").exists()


def test_what_cannot_be_held_is_named_and_not_left(export, run, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("No ONNX function found\nfor aten.sort")

    monkeypatch.setattr(torch.onnx, "export", broken)
    status, _, errors = export(f"ckpt={run}", "format=onnx", "-o", "mine.onnx")
    assert status == 2 and "format=onnx: vit_32px with softmax attention cannot be held by it: " in errors
    assert "No ONNX function found for aten.sort; choose" in errors and list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_a_trace_for_one_batch_only_is_refused_by_name(export, tmp_path):
    run = run_of(tmp_path / "outputs", *TINY, "attention=inline")
    status, _, errors = export(f"ckpt={run}", "format=torchscript", "-o", "mine.pt")
    assert status == 2 and not Path("mine.pt").exists()
    assert "format=torchscript: vit_32px with inline attention cannot be held by it: … " in errors
    assert errors.endswith("; choose another format: safetensors and hf hold every model\n")


@pytest.mark.full
def test_folded_norms(export, run, tmp_path):
    """The file has none, and was compared with the model that has them; a model without is refused."""
    normed = run_of(tmp_path / "outputs", "model=swiftformer_32px", "model.depths=[1,1]", *TINY[4:])
    status, output, errors = export(f"ckpt={normed}", "format=torchscript", "-o", "mine.pt", "fold_norms=true")
    assert (status, errors) == (0, ""), errors
    assert "largest difference" in output
    names = set(torch.jit.load("mine.pt").state_dict())
    left = {name.removesuffix(".bn.running_mean") for name in names if "running_mean" in name}
    assert {name.rpartition(".")[2] for name in left} == {"norm", "norm2"} and len(left) == 3  # in front of products
    status, _, errors = export(f"ckpt={run}", "format=torchscript", "-o", "other.pt", "fold_norms=true")
    assert status == 2 and "fold_norms: a batch norm must stand behind a product, got none in ViT; leave it" in errors
    assert not (tmp_path / "other.pt").exists()


def test_torchscript(export, run):
    status, _, errors = export(f"ckpt={run}", "format=torchscript", "-o", "mine.pt")
    assert (status, errors) == (0, ""), errors
    held = {"classes": ""}
    traced = torch.jit.load("mine.pt", _extra_files=held)
    same(traced(images(5)), expected(run))
    assert json.loads(held["classes"])[9] == "9"


@pytest.mark.full
def test_pt2_runs_without_this_project(export, run, tmp_path):
    """In a process that cannot import us, with torch alone."""
    status, _, errors = export(f"ckpt={run}", "format=pt2", "-o", "mine.pt2")
    assert (status, errors) == (0, ""), errors
    np.save("images.npy", images(5).numpy())
    code = """
import sys, numpy, torch
sys.modules |= dict.fromkeys(("models", "conf", "data", "kernels", "timm"))
numpy.save("logits.npy", torch._inductor.aoti_load_package("mine.pt2")(torch.from_numpy(numpy.load("images.npy"))))
"""
    elsewhere = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env=elsewhere, check=True)
    same(np.load("logits.npy"), expected(run))


@pytest.mark.full
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_any_size(export, run, form):
    status, output, errors = export(f"ckpt={run}", f"format={form}", "-o", f"mine.{form}", "dynamic_size=true")
    assert (status, errors) == (0, ""), errors
    assert "images (batch, 3, height, width) → logits" in output and "2×3×48×64" in output


def test_a_size_that_torch_cannot_leave_open_is_refused_in_time(export, run, tmp_path, monkeypatch):
    """Sizes that are compared for ever end, though sympy and torch wrap what ends them."""

    def endless(*given, **options):
        try:
            while True:
                pass
        except TimeoutError as error:
            raise RuntimeError(f"unflatten got an unexpected error:\nTimeoutError: {error}\n\nAt:\n  sympy") from error

    monkeypatch.setattr(torch.export, "export", endless)
    monkeypatch.setattr("models.export.program.PATIENCE", 0.2)
    status, _, errors = export(f"ckpt={run}", "format=pt2", "-o", "mine.pt2", "dynamic_size=true")
    assert status == 2 and list(tmp_path.iterdir()) == []
    assert "vit_32px with softmax attention does not allow images of any size in one graph (torch was still " in errors
    assert "ten minutes); leave dynamic_size out, or give image_size=... and export one file for each size" in errors


@pytest.mark.full
@pytest.mark.parametrize(
    "chosen", [("coatnet_32px", "softmax"), ("cswin_32px", "cswin"), ("pvt_32px", "focused_linear")]
)
def test_other_models(export, tmp_path, chosen):
    model, attention = chosen
    run = run_of(tmp_path / "outputs", f"model={model}", f"attention={attention}", "data=digits", spread=0.05)
    for form, end in (("onnx", "onnx"), ("torchscript", "pt"), ("hf", "hf")):
        status, output, errors = export(f"ckpt={run}", f"format={form}", "-o", f"mine.{end}")
        assert (status, errors) == (0, ""), errors
        assert f"{model} with {attention} attention on digits, step 7: " in output


@pytest.mark.full
@pytest.mark.parametrize("attention", ["biformer", "moh", "inline"])
def test_what_computes_in_another_way_in_onnx(export, tmp_path, attention):
    """A stable sort, and convolutions with a group for each channel of each image."""
    run = run_of(tmp_path / "outputs", "model=pvt_32px", f"attention={attention}", "data=digits", spread=0.05)
    status, output, errors = export(f"ckpt={run}", "format=onnx", "-o", "mine.onnx")
    assert (status, errors) == (0, "") and "checked: largest difference " in output, errors


@pytest.mark.full
def test_a_model_that_generates(export, tmp_path):
    arguments = ("task=generation", "model=dit_s_2", "model.depth=1", "data=digits", "data.workers=0")
    run = run_of(tmp_path / "outputs", *arguments, spread=0.05)
    status, output, errors = export(f"ckpt={run}", "format=onnx", "-o", "mine.onnx")
    assert (status, errors) == (0, ""), errors
    assert "latents (batch, " in output and "timesteps (batch), labels (batch) → prediction" in output


@pytest.mark.full
@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_what_was_exported_is_evaluated_as_the_run(export, run, command, tmp_path, form):
    """Its data, its preparation, its class names, its figures; and weights of a new run."""
    place = "mine.safetensors" if form == "safetensors" else "mine"
    assert export(f"ckpt={run}", f"format={form}", "-o", place, "weights=raw")[0] == 0
    small = ("probe.charts=false", "+trainer.limit_val_batches=1", "trainer.accelerator=cpu")
    found = []
    for ckpt in (run, tmp_path / place):
        status, output, errors = command("eval", f"ckpt={ckpt}", f"output={tmp_path / 'found'}", "weights=raw", *small)
        assert status == 0, errors
        found.append(json.loads(next(Path("found").glob("*.json")).read_text()))
        shutil.rmtree("found")
    assert found[0]["val/loss"] == found[1]["val/loss"] and found[0]["val/top1"] == found[1]["val/top1"]
    assert "vit_32px with softmax attention on digits, mine" in output
    status, _, errors = command("eval", f"ckpt={place}", "attention=agent")
    assert status == 2 and "this command asks for attention=agent; leave attention= out" in errors


def test_a_configuration_that_names_what_is_not_ours_is_refused(export, run):
    assert export(f"ckpt={run}", "format=hf", "-o", "mine")[0] == 0
    config = json.loads(Path("mine/config.json").read_text())
    config["model"]["_target_"] = "os.system"
    Path("mine/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.model\._target_: .* got 'os\.system'"):
        create_from("mine")
    status, _, errors = export("ckpt=mine", "format=hf", "-o", "again")
    assert status == 2 and "'os.system'" in errors


def test_weights_without_a_configuration_make_no_model(run, tmp_path):
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"^create_from: these weights carry no configuration, got .*bare.safetensors"):
        create_from(tmp_path / "bare.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0 no JSON")
    with pytest.raises(ValueError, match=r"^load_weights: not a valid safetensors file, got .*broken.safetensors"):
        create_from(tmp_path / "broken.safetensors")


@pytest.mark.full
def test_int8_says_what_it_costs(export, run):
    status, output, errors = export(
        f"ckpt={run}", "format=onnx", "-o", "mine.onnx", "quantize=int8", "images=40", "weights=raw"
    )
    assert (status, errors) == (0, ""), errors
    facts = json.loads(Path("mine.onnx.json").read_text())
    assert facts["images"] == 40 and abs(facts["top1"] - facts["top1_before"]) <= 0.1
    assert 0 < facts["largest_difference_quantized"] < 0.1 * facts["largest_output"]
    assert "int8:" in output and "on 40 images" in output
    import onnx

    weights = onnx.load("mine.onnx").graph.initializer
    assert sum(weight.data_type == onnx.TensorProto.INT8 for weight in weights) >= 5  # qkv, proj, fc1, fc2, head
