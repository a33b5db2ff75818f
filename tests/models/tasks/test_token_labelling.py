"""Token labelling: the loss by its formula, what is refused, and training and resuming with label maps."""

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from data.module import ImageData
from data.sources.imagefolder import ImageFolder
from models import create_model
from models.callbacks.checkpoint import Checkpoints
from models.callbacks.directory_io import DirectoryCheckpointIO
from models.callbacks.ema import EMA
from models.callbacks.randomness import StepRandomness
from models.layers.grid import Grid
from models.tasks.classification import Classification
from models.tasks.token_labelling import TokenHead, prepare, with_tokens

OPTIMIZER = {"opt": "adamw", "lr": 1e-2, "reference_batch": None, "weight_decay": 0.05, "layer_decay": None}
SCHEDULE = {"sched": "cosine", "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 1e-3, "cooldown_epochs": 0}


class Net(nn.Module):
    """Two channels a token of 4 pixels, pooled and classified; what a task needs of a backbone."""

    channels, strides = [5, 2], [2, 4]

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 2, 4, stride=4), nn.Linear(2, classes)

    def forward(self, images, return_losses=False):
        tokens, grid, losses = self.forward_tokens(images)
        logits = self.classify(tokens, grid)
        return (logits, losses) if return_losses else logits

    def forward_tokens(self, images):
        tokens = self.stem(images)
        return tokens.permute(0, 2, 3, 1).flatten(1, 2), Grid(*tokens.shape[2:]), {}

    def classify(self, tokens, grid):
        return self.fc(tokens.unflatten(1, grid[:2]).mean((1, 2)))

    def classify_with_losses(self, tokens, grid, labels=None):
        return self.classify(tokens, grid), {}

    def set_gradient_checkpointing(self, enabled):
        pass

    def no_weight_decay(self):
        return set()


def task(weight=0.5, model=None, **settings):
    return Classification(model or Net(), OPTIMIZER, SCHEDULE, 3, token_weight=weight, **settings)


@pytest.fixture
def labelled(tmp_path):
    """The folders of 6 images of a colour per class, and of maps that have the class of the image in every cell."""
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cow")):
            for i in range(2):
                file = tmp_path / "images" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                colour = [0, 0, 0]
                colour[label] = 200 + 20 * i
                Image.new("RGB", (16, 16), tuple(colour)).save(file)
                maps = tmp_path / "maps" / name / f"{i}.npz"
                maps.parent.mkdir(parents=True, exist_ok=True)
                scores = np.full((1, 6, 6), 20, np.float16)
                np.savez(maps, scores=scores, classes=np.full((1, 6, 6), label, np.uint8))
    return tmp_path / "images", tmp_path / "maps"


def images(labelled, **changes):
    settings = {"num_classes": 3, "image_size": 16, "batch_size": 3, "workers": 0, "seed": 1, **changes}
    return ImageData(ImageFolder(labelled[0]), token_labels=labelled[1], **settings)


def fit(module, data, folder=None, resume=None, callbacks=(), **settings):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    if folder is not None:
        checkpoints = Checkpoints(every_n_steps=1, keep=9)
        checkpoints.describe_run(folder, {})
        callbacks = [checkpoints, EMA(), StepRandomness(1), *callbacks]
    trainer = pl.Trainer(
        accelerator="cpu",
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        plugins=[DirectoryCheckpointIO()],
        default_root_dir=folder,
        callbacks=[*callbacks],
        **quiet,
        **settings,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_class_and_half_that_of_the_tokens(smoothing, monkeypatch):
    module = task(0.5, label_smoothing=smoothing)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    nn.init.normal_(module.token_head.bias)
    pixels, labels, targets = torch.randn(4, 3, 8, 12), torch.rand(4, 3).softmax(1), torch.rand(4, 2, 3, 3).softmax(-1)
    logits, _, tokens = with_tokens(module.model, pixels)
    expected = -(((1 - smoothing) * labels + smoothing / 3) * logits.log_softmax(1)).sum(1).mean()
    for i in range(4):
        for row in range(2):
            for column in range(3):
                scores = tokens[i, row, column] @ module.token_head.weight.T + module.token_head.bias
                soft = (1 - smoothing) * targets[i, row, column] + smoothing / 3
                expected = expected - 0.5 * (soft * scores.log_softmax(0)).sum() / (4 * 2 * 3)
    batch = SimpleNamespace(images=pixels, labels=labels, token_labels=targets)
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_targets_for_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"task: the model has \(2, 3\) tokens, got targets for \(3, 2\); the last of"):
        TokenHead(5, 4).loss(torch.zeros(1, 2, 3, 5), torch.zeros(1, 3, 2, 4), 0.0)


@pytest.mark.parametrize("weight", [-1, "half", True, None])
def test_a_weight_is_a_number(weight):
    with pytest.raises(
        ValueError, match=f"task: token_weight must be a number of at least 0, got {weight!r}; set task"
    ):
        task(weight)


def test_without_a_weight_there_is_no_head():
    module = task(0.0)
    assert module.token_head is None
    assert not [name for name in module.state_dict() if name.startswith("token_head")]


@pytest.mark.parametrize(
    ("weight", "folder", "size", "text"),
    [
        (0.5, None, 16, r"got task.token_weight=0.5 and data.token_labels=None; set both, or 0 and null"),
        (0.0, "/maps", 16, r"got task.token_weight=0.0 and data.token_labels=/maps; set both, or 0 and null"),
        (0.5, "/maps", 18, r"whole tokens, which are 4 pixels wide, got image_size=18; set image_size to a multiple"),
    ],
)
def test_weight_label_maps_and_image_size_must_agree(weight, folder, size, text):
    data = SimpleNamespace(token_labels=folder, image_size=size, token_grid=None)
    with pytest.raises(ValueError, match=text):
        prepare(data, weight, Net())
    assert data.token_grid is None


def test_the_data_learns_which_tokens_the_model_has():
    data = SimpleNamespace(token_labels="/maps", image_size=24, token_grid=None)
    prepare(data, 0.5, Net())
    assert data.token_grid == (6, 6)
    prepare(None, 0.0, nn.Identity())  # loaders without a data module have no label maps


def test_a_weight_without_label_maps_stops_before_the_first_batch(labelled):
    module = task(0.5)
    monitor = []
    module.training_step = lambda *args: monitor.append(args)
    with pytest.raises(ValueError, match=r"token labels and their weight go together, got task\.token_weight=0\.5"):
        fit(module, images((labelled[0], None)), max_epochs=1)
    with pytest.raises(ValueError, match=r"token labels and their weight go together, got task\.token_weight=0\.0"):
        fit(task(0.0), images(labelled), max_epochs=1)
    assert not monitor


def test_the_head_is_trained_by_the_rules_of_the_models_head(labelled):
    module = task(0.5)
    trainer = fit(module, images(labelled), max_epochs=1)
    groups = {
        id(p): {key: value for key, value in group.items() if key != "params"}
        for group in trainer.optimizers[0].param_groups
        for p in group["params"]
    }
    for name in ("weight", "bias"):
        assert groups[id(getattr(module.token_head, name))] == groups[id(getattr(module.model.fc, name))]
    assert len(groups) == len(list(module.parameters()))


def test_tokens_learn_their_labels(labelled):
    """With all weight on the tokens of the maps, they come to say the class of their image."""
    torch.manual_seed(0)
    losses = []

    class Looker(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["train/token_loss"].item())

    module = task(0.5)
    before = module.token_head.weight.clone()
    fit(module, images(labelled, augment={"cutmix": 1.0, "hflip": 0.5}), callbacks=[Looker()], max_epochs=30)
    assert losses[0] > 0.9 and max(losses[-4:]) < 0.5
    assert not torch.equal(module.token_head.weight, before)


def state(module, trainer):
    found = {f"task.{name}": value for name, value in module.state_dict().items()}
    for index, moments in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    return found


def test_a_resumed_run_equals_an_uninterrupted_one(labelled, tmp_path):
    def run(name, **settings):
        torch.manual_seed(4)
        module = task(0.5)
        data = images(labelled, augment={"cutmix": 1.0, "scale": (0.3, 1.0), "hflip": 0.5})
        return module, fit(module, data, tmp_path / name, max_epochs=2, **settings)

    whole, trainer = run("whole")
    expected = state(whole, trainer)
    step = tmp_path / "whole" / "checkpoints" / "step-00000001"
    torch.manual_seed(9)
    again = task(0.5)
    data = images(labelled, augment={"cutmix": 1.0, "scale": (0.3, 1.0), "hflip": 0.5})
    found = state(again, fit(again, data, tmp_path / "again", resume=step, max_epochs=2))
    assert found.keys() == expected.keys() and "task.token_head.weight" in found
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_head_is_no_part_of_the_evaluated_model(labelled, tmp_path):
    from models.checkpoints import load_weights

    module = task(0.5)
    fit(module, images(labelled), tmp_path / "run", max_epochs=1)
    for ema in (False, True):
        weights = load_weights(tmp_path / "run" / "checkpoints" / "last", ema=ema)
        assert weights.keys() == module.model.state_dict().keys()


@pytest.mark.parametrize("name", ["vit_32px", "vit_tiny", "swin_32px", "convnext_32px", "coatnet_32px"])
def test_backbones_give_logits_and_tokens_of_one_pass(name):
    model, passes = create_model(name, num_classes=3, image_size=32).eval(), []
    model.stem.register_forward_hook(lambda *_: passes.append(1))
    pixels = torch.randn(2, 3, 32, 32)
    logits, losses, tokens = with_tokens(model, pixels)
    assert passes == [1]
    assert torch.equal(logits, model(pixels)) and losses.keys() == model(pixels, return_losses=True)[1].keys()
    side = 32 // model.strides[-1]
    assert tokens.shape == (2, side, side, model.channels[-1])
    assert torch.equal(tokens.flatten(1, 2), model.forward_features(pixels)[:, -side * side :])


def test_logits_and_tokens_are_one_graph_when_compiled():
    """The task compiles this function, since `model.compile` is about `model(images)` alone."""
    model = create_model("vit_32px", num_classes=3, depth=2, dim=32, num_heads=2).train()
    model.set_gradient_checkpointing(True)
    pixels, results = torch.randn(2, 3, 32, 32), []
    for run in (with_tokens, torch.compile(with_tokens, backend="eager", fullgraph=True)):
        logits, _, tokens = run(model, pixels)
        model.zero_grad()
        (logits.square().sum() + tokens.square().sum()).backward()
        results.append([logits, tokens, *(p.grad.clone() for p in model.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
