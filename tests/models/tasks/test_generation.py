"""The task that generates: its losses, its samples, and a whole run of a tiny model."""

import json
import os
import re
import signal
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from conf.compose import compose_run
from data.sources.digits import Digits
from models import create_model
from models.diffusion import recogniser, training_losses
from models.diffusion.latents import latents_of
from models.diffusion.recogniser import Recogniser
from models.diffusion.samples import draw_grid, shown_classes
from models.tasks.generation import Generation

OPTIMIZER = {"opt": "adamw", "lr": 1e-3, "reference_batch": None, "weight_decay": 0.0, "layer_decay": None}
SCHEDULE = {"sched": "constant", "warmup_epochs": 0, "warmup_lr": 1e-6, "min_lr": 0.0, "cooldown_epochs": 0}
SAMPLING = {"steps": 3, "method": "ddim", "guidance": 1.0}
TINY = {"image_size": 8, "num_classes": 4, "latent_stride": 1, "in_channels": 1, "patch_size": 4}
TINY |= {"dim": 16, "depth": 2, "num_heads": 2}
BALANCE = {"load_balance": {"weight": 0.5, "reduction": "mean"}}


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    indices: Tensor


def batch(start: int = 0, size: int = 4, side: int = 8) -> Batch:
    indices = torch.arange(start, start + size)
    images = torch.stack([torch.rand(3, side, side, generator=torch.Generator().manual_seed(int(i))) for i in indices])
    return Batch(images * 2 - 1, indices % 4, indices)


def model(attention: str = "softmax", **settings):
    """Tiny, and with all its weights drawn: at its start a DiT predicts nothing, whatever it is given."""
    torch.manual_seed(0)
    built = create_model("dit_s_2", attention, **(TINY | settings))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def task(monkeypatch=None, network=None, **settings) -> Generation:
    arguments = {"sampling": SAMPLING, "auxiliary": BALANCE, **settings}
    made = Generation(network or model(), OPTIMIZER, SCHEDULE, 4, **arguments)
    if monkeypatch is not None:
        made.logged = {}
        monkeypatch.setattr(made, "log", lambda name, value, **_: made.logged.update({name: float(value)}))
    return made


def test_the_loss_is_error_bound_and_weighted_auxiliaries(monkeypatch):
    made = task(monkeypatch, model("moh", shared_heads=0, routed_heads=1, class_dropout=0.0))
    data = batch()
    torch.manual_seed(5)
    loss = made.training_step(data, 0)
    torch.manual_seed(5)
    x0 = data.images.mean(1, keepdim=True)
    step_B = torch.randint(1000, (4,))
    noise = torch.randn_like(x0)
    x = made.diffusion.noised(x0, step_B, noise)
    prediction, losses = made.model(x, step_B, data.labels, return_losses=True)
    parts = training_losses(made.diffusion, prediction, x0, x, step_B, noise)
    mse, vb = parts["mse"].mean(), parts["vb"].mean()
    torch.testing.assert_close(loss, mse + vb + 0.5 * losses["load_balance"].mean())
    wanted = {
        "train/loss": mse + vb,
        "train/mse": mse,
        "train/vb": vb,
        "train/load_balance": losses["load_balance"].mean(),
    }
    assert made.logged == pytest.approx({key: float(value.detach()) for key, value in wanted.items()})


def test_validation_is_the_same_however_it_is_batched(monkeypatch):
    made = task(monkeypatch)
    made.ema_model = model().eval()
    with torch.no_grad():
        made.ema_model.final.linear.bias.add_(1)
    made.eval()
    values = []
    for parts in ([(0, 6)], [(0, 1), (1, 3), (4, 2)]):
        torch.manual_seed(len(parts))
        for start, size in parts:
            made.validation_step(batch(start, size), 0)
        for kind in ("raw", "ema"):
            values.append(float(made.metrics[kind]["loss"].compute()))
            made.metrics[kind]["loss"].reset()
    assert values[:2] == pytest.approx(values[2:], rel=1e-5) and values[0] != values[1]
    assert made.figures == ["val/loss", "val/loss_ema"]


def test_samples_do_not_depend_on_their_batches():
    network = model().train()
    labels = [0, 1, 2, 3, 0]
    whole, parts = (
        torch.cat(list(task(sampling=SAMPLING | {"batch_size": size, "method": "ddpm"}).studio.draw(network, labels)))
        for size in (5, 2)
    )
    assert whole.shape == (5, 3, 8, 8) and whole.dtype == torch.uint8 and network.training
    assert int((whole.int() - parts.int()).abs().max()) <= 1  # rounding of products of another size
    assert not torch.equal(whole[0], whole[4])  # same class, other noise
    guided = torch.cat(list(task(sampling=SAMPLING | {"guidance": 3.0, "method": "ddpm"}).studio.draw(network, labels)))
    assert not torch.equal(guided, whole)
    seeded = torch.cat(list(task(sampling=SAMPLING | {"seed": 1, "method": "ddpm"}).studio.draw(network, labels)))
    assert not torch.equal(seeded, whole)


WRONG = {
    "steps": ({"sampling": SAMPLING | {"steps": 1001}}, "from 1 to 1000 steps .* got 1001; set task.sampling.steps"),
    "method": ({"sampling": SAMPLING | {"method": "euler"}}, "method must be one of ddpm, ddim, got 'euler'"),
    "eta": ({"sampling": SAMPLING | {"eta": -1}}, r"eta must be in \[0, 1\], got -1"),
    "guidance": ({"sampling": SAMPLING | {"guidance": -2}}, r"guidance must be a number of at least 0 .*got -2"),
    "seed": ({"sampling": SAMPLING | {"seed": -1}}, "seed must be a whole number of at least 0, got -1"),
    "batch": ({"sampling": SAMPLING | {"batch_size": 0}}, "batch_size must be a whole number of at least 1, got 0"),
    "channels": ({"sampling": SAMPLING | {"guided_channels": 0}}, "guided_channels must be .* at least 1, got 0"),
    "unknown": ({"sampling": SAMPLING | {"stepps": 1}}, "sampling: there is no setting 'stepps'; it has steps, method"),
    "score": ({"score": {"samples": 0}}, "samples must be a whole number of at least 1, .*got 0; set task.score"),
    "every": ({"sample_every_n_epochs": 0}, "sample_every_n_epochs must be a whole number of at least 1, .*got 0"),
    "diffusion": ({"diffusion_steps": 3}, "steps must be a whole number above 20, got 3; set task.diffusion_steps"),
    "folder": ({"autoencoder": "/nowhere"}, r"works on pixels \(latent_stride=1, .*got task.autoencoder=/nowhere"),
    "classes": ({"num_classes": 5}, "must know the classes of the data, got 4 for 5; set model.num_classes=5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_named(name):
    changes, text = WRONG[name]
    arguments = {"num_classes": 4, "sampling": SAMPLING} | changes
    with pytest.raises(ValueError, match=text):
        Generation(create_model("dit_s_2", **TINY), OPTIMIZER, SCHEDULE, **arguments)


def test_guidance_needs_dropped_classes():
    with pytest.raises(ValueError, match=r"got guidance=2.0 with class_dropout=0; set task.sampling.guidance=1"):
        task(network=model(class_dropout=0), sampling=SAMPLING | {"guidance": 2.0})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"mean": (0.4, 0.5, 0.5)},
            r"images in -1 … 1, got data.mean=\[0.4, 0.5, 0.5\] .*set data.mean=\[0.5,0.5,0.5\]",
        ),
        ({"augment": SimpleNamespace(mixes=True, mixup=0.8, cutmix=0.0)}, "one class per image, got augment.mixup=0.8"),
    ],
)
def test_data_of_another_kind_is_refused(changes, text):
    data = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "augment": SimpleNamespace(mixes=False)}
    task().prepare(SimpleNamespace(**data))
    with pytest.raises(ValueError, match=text):
        task().prepare(SimpleNamespace(**(data | changes)))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A folder in diffusers' format: stride 2, 4 channels, random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderKL(**blocks, **sizes, scaling_factor=0.18215).save_pretrained(folder)
    return folder


def test_latents_of_an_autoencoder(autoencoder, monkeypatch):
    latent = partial(model, latent_stride=2, in_channels=4, patch_size=2)
    made = task(monkeypatch, latent(), autoencoder=str(autoencoder))
    images, noise = batch().images, torch.randn(4, 4, 4, 4)
    posterior = made.latents.network.encode(images).latent_dist
    wanted = 0.18215 * (posterior.mean + posterior.std * noise)
    x0 = made.latents.encode(images, lambda mean: noise)
    torch.testing.assert_close(x0, wanted)
    torch.testing.assert_close(made.latents.decode(x0), made.latents.network.decode(wanted / 0.18215).sample)
    made.latents.shift = 0.25  # as newer autoencoders have
    shifted = made.latents.encode(images, lambda mean: noise)
    torch.testing.assert_close(shifted, wanted - 0.18215 * 0.25)
    torch.testing.assert_close(made.latents.decode(shifted), made.latents.network.decode(wanted / 0.18215).sample)
    made.latents.shift = 0.0
    assert not [name for name in made.state_dict() if not name.startswith("model.")]
    made.training_step(batch(), 0).backward()
    assert not any(p.requires_grad for p in made.latents.network.parameters())
    made.eval().validation_step(batch(), 0)
    assert torch.isfinite(made.metrics["raw"]["loss"].compute())
    assert next(iter(made.studio.draw(made.model, [0, 1]))).shape == (2, 3, 8, 8)


def test_latents_without_an_autoencoder():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for channels, grey in ((3, images), (1, images.mean(1, keepdim=True))):
        pixels, means = (latents_of(None, SimpleNamespace(latent_stride=s, in_channels=channels)) for s in (1, 4))
        torch.testing.assert_close(pixels.encode(images, None), grey)
        torch.testing.assert_close(pixels.decode(grey), grey.expand(-1, 3, -1, -1))
        x0 = means.encode(images, None)
        torch.testing.assert_close(x0, grey.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)))
        assert means.decode(x0).shape == images.shape
        flat = torch.full_like(x0, 0.3)
        torch.testing.assert_close(means.decode(flat), torch.full_like(images, 0.3))


@pytest.mark.parametrize(
    ("stride", "channels", "folder", "text"),
    [
        (
            8,
            4,
            None,
            "latent_stride=8, in_channels=4.*, got task.autoencoder=null; give a folder of one in diffusers' f",
        ),
        (
            8,
            4,
            "given",
            "the autoencoder has latents of stride 2 with 4 channels, .*latent_stride=8.*set model.latent_st",
        ),
        (1, 3, "given", r"works on pixels \(latent_stride=1, .*got task.autoencoder=.*set task.autoencoder=null"),
        (8, 4, "/nowhere", "must be a folder in diffusers' format, with a config.json, got /nowhere"),
        (8, 4, "broken", "the autoencoder cannot be read, got .*; give another"),
    ],
)
def test_autoencoders_that_do_not_fit(autoencoder, tmp_path, stride, channels, folder, text):
    (tmp_path / "config.json").write_text("{")
    folder = {"given": str(autoencoder), "broken": str(tmp_path)}.get(folder, folder)
    with pytest.raises(ValueError, match=f"^task: .*{text}"):
        latents_of(folder, SimpleNamespace(latent_stride=stride, in_channels=channels))


def test_the_picture_has_a_row_for_every_class(tmp_path):
    assert shown_classes(3) == [0, 1, 2] and shown_classes(1000)[:3] == [0, 100, 200] and len(shown_classes(1000)) == 10
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    images[0::2] = 255  # of two classes in turn, the first is white
    path = draw_grid(images, ["white", "black"], tmp_path / "grid.png", "a title")
    pixels = np.asarray(Image.open(path).convert("L"))[:, 100:-20]
    rows = pixels[:, pixels.shape[1] // 2]
    dark = np.flatnonzero(rows[30:] < 10) + 30
    assert len(dark) > 20 and (rows[dark[0] : dark[-1]] < 10).all() and rows[dark[0] - 10] > 245


@pytest.mark.full
def test_the_recogniser_knows_real_digits_from_others(monkeypatch):
    """All of its 250 steps give 99 %; a third of them, here, measured 97 %."""
    monkeypatch.setattr(recogniser, "STEPS", 80)
    source = Digits()
    before = torch.get_rng_state()
    found = Recogniser(source, 10, 16)
    assert torch.equal(before, torch.get_rng_state())
    assert found.top1 >= 0.93
    noise = torch.randint(256, (100, 3, 16, 16), dtype=torch.uint8)
    assert found.share(noise, [i % 10 for i in range(100)]) < 0.4


RUN = ("model=dit_s_2", "attention=moh", "task=generation", "data=digits", "logger=none", "data.workers=0")
RUN += ("model.dim=24", "model.depth=2", "trainer.max_epochs=2", "trainer.limit_train_batches=3")
RUN += ("data.batch_size=8", "trainer.limit_val_batches=2", "trainer.log_every_n_steps=1")
RUN += (
    "trainer.check_val_every_n_epoch=1",
    "task.sampling.steps=2",
    "task.score.samples=20",
    "task.sample_every_n_epochs=1",
)


@pytest.mark.full
def test_a_run_from_training_to_samples(command, tmp_path, monkeypatch):
    """Trained, stopped in the second epoch and continued: the weights of an uninterrupted run; then evaluated."""
    monkeypatch.setattr(recogniser, "STEPS", 5)
    status, out, err = command("train", *RUN, "run.name=whole")
    assert status == 0, err
    assert "dit_s_2, reduced, with moh attention on digits" in out
    assert "reduced by conf/fit/dit_s_2_generation_digits.yaml: dim 24, depth 2, patch_size 2" in out
    whole = tmp_path / "outputs" / "whole"
    assert (whole / "samples.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((whole / "metrics.json").read_text())
    scored = {"val/recognised", "val/recognised_ema", "val/recogniser_top1"}
    assert scored | {"val/loss", "val/loss_ema", "train/vb", "train/load_balance", "best/val/loss"} <= set(figures)
    assert "val/recognised" in (whole / "metrics.csv").read_text()

    step = Generation.training_step

    def interrupted(made, data, batch_idx):
        if made.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(made, data, batch_idx)

    monkeypatch.setattr(Generation, "training_step", interrupted)
    assert command("train", *RUN, "run.name=parts")[0] == 75
    monkeypatch.setattr(Generation, "training_step", step)
    parts = tmp_path / "outputs" / "parts"
    assert not (parts / "metrics.json").exists()
    status, out, err = command("train", *RUN, "run.name=parts")
    assert status == 0 and "continues from outputs/parts/checkpoints/step-00000005" in out, err
    for name in ("model", "ema"):
        a, b = (load_file(run / "checkpoints" / "last" / f"{name}.safetensors") for run in (whole, parts))
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    again = json.loads((parts / "metrics.json").read_text())
    assert all(again[key] == figures[key] for key in (*scored, "val/loss", "val/loss_ema"))

    last = whole / "checkpoints" / "last"
    status, out, err = command("eval", f"ckpt={last}", "samples=12", "task.sampling.steps=2")
    assert status == 0, err
    measured = json.loads((whole / "checkpoints" / "metrics.json").read_text())
    assert measured["val/recognised_ema"] == figures["val/recognised_ema"] and measured["flops"] > 1e4
    assert "12 images as the ADM evaluation suite reads them; FID is not computed here" in out and "recognised" in out
    with np.load(whole / "checkpoints" / "samples.npz") as file:
        assert file["arr_0"].shape == (12, 32, 32, 3) and file["arr_0"].dtype == np.uint8
    for setting, text in [
        (
            "samples=0",
            "eval: samples must be a whole number of at least 1, or null for no file, got 0; set samples=50000",
        ),
        ("task.sampling.steps=2000", "from 1 to 1000 steps fit into the diffusion of 1000, got 2000"),
        ("task.sampling.stops=2", "no setting 'task.sampling.stops'; did you mean 'steps'"),
    ]:
        status, _, err = command("eval", f"ckpt={last}", setting)
        assert status == 2 and text in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("model=swin_32px task=generation", "generation needs a model that predicts noise, got Swin"),
        ("model=dit_s_2", "classification needs a model that names the class of an image, got DiT, which generates"),
        ("model=dit_s_2 task=generation ~fit", r"latent_stride=8, in_channels=4.*got task.autoencoder=null"),
        ("model=dit_s_2 task=generation checkpoint.monitor=val/top1", "monitor must be one of val/loss, val/loss_ema"),
        ("model=dit_s_2 task=generation data.mean=[0,0,0]", r"images in -1 … 1, got data.mean=\[0, 0, 0\]"),
    ],
)
def test_a_task_and_a_model_that_do_not_fit_are_one_error(command, tmp_path, arguments, text):
    status, _, err = command("train", "logger=csv", *arguments.split())
    assert status == 2 and re.search(text, err), err
    assert "Traceback" not in err and not list(tmp_path.rglob("metrics.csv"))


def test_a_fit_is_for_one_model_task_and_data_and_gives_way_to_the_command_line():
    def composed(*arguments: str):
        return compose_run(list(arguments))[0]

    chosen = ("model=moh_dit_s_2", "task=generation", "data=digits")
    cfg = composed(*chosen, "model.dim=48")
    assert (cfg.model.dim, cfg.model.latent_stride, cfg.image_size) == (48, 4, 32)
    assert cfg.run.fit == "moh_dit_s_2_generation_digits"
    assert cfg.checkpoint.monitor == "val/loss" and cfg.checkpoint.mode == "min" and cfg.augment.shift == 0
    for others in ((*chosen, "~fit"), (*chosen[:2], "data=fake"), chosen[::2], ("model=moh_dit_s_2_75", *chosen[1:])):
        cfg = composed(*others)
        assert cfg.model.dim == 384 and "fit" not in cfg.run
    cfg = composed()
    assert cfg.checkpoint.monitor == "val/top1" and "fit" not in cfg.run
