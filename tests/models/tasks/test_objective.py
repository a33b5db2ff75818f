"""Losses of classifiers against their definitions, weights of classes, and images with several labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torchmetrics.functional.classification import multilabel_average_precision

from data.augment import Augment
from data.batch import Batch
from data.device import DeviceStage
from data.module import ImageData
from data.sources.fake import Fake
from models import create_model
from models.tasks.classification import Classification
from models.tasks.multilabel import MultiLabel, positive_weights
from models.tasks.objective import class_weights, loss_of

LABELS = np.array([0, 0, 0, 1, 1, 2])


def model(classes=3):
    return create_model("vit_32px", num_classes=classes, depth=1, dim=16, num_heads=2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms(smoothing):
    logits, labels = torch.randn(5, 7), torch.randint(7, (5,))
    assert torch.equal(loss_of(logits, labels, "bce", smoothing, None), BinaryCrossEntropy(smoothing)(logits, labels))
    soft = torch.rand(5, 7).softmax(1)
    expected = F.binary_cross_entropy_with_logits(logits, soft * (1 - smoothing) + smoothing / 7)
    assert torch.equal(loss_of(logits, soft, "bce", smoothing, None), expected)


def test_cross_entropy_without_weights_is_torchs():
    logits, labels = torch.randn(5, 7), torch.randint(7, (5,))
    assert torch.equal(loss_of(logits, labels, "ce", 0.1, None), F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_weights_are_inverse_to_the_images_of_a_class():
    assert class_weights("auto", LABELS, 3).tolist() == pytest.approx([6 / 9, 1, 2])
    assert class_weights([1, 2, 3], LABELS, 3).tolist() == [1, 2, 3] and class_weights(None, LABELS, 3) is None
    logits, labels, weights = torch.randn(6, 3), torch.from_numpy(LABELS), class_weights("auto", LABELS, 3)
    each = F.cross_entropy(logits, labels, reduction="none")
    expected = (each * weights[labels]).sum() / weights[labels].sum()
    assert torch.allclose(loss_of(logits, labels, "ce", 0, weights), expected)


def test_the_task_takes_its_weights_from_the_training_images():
    source = Fake(3, train_images=6, val_images=3)
    source.train.labels[:] = LABELS
    task = Classification(model(), {}, {}, 3, class_weights="auto")
    task.prepare(ImageData(source, 3, 32, 2))
    assert task.class_weights.tolist() == pytest.approx([6 / 9, 1, 2])
    assert "class_weights" not in task.state_dict()
    with pytest.raises(ValueError, match=r"class_weights must be auto or 3 positive numbers, one per class, got"):
        Classification(model(), {}, {}, 3, class_weights=[1, 2])
    with pytest.raises(ValueError, match=r"loss must be ce or bce, got 'focal'; set task.loss"):
        Classification(model(), {}, {}, 3, loss="focal")


def test_top5_is_measured_of_more_than_five_classes():
    assert "val/top5" in Classification(model(6), {}, {}, 6).figures
    assert "val/top5" not in Classification(model(5), {}, {}, 5).figures


class Several(Fake):
    """Images of which number i has the labels i and i + 1, modulo the classes."""

    def __init__(self) -> None:
        super().__init__(3, 16, 12, 6)
        for split in (self.train, self.val):
            hot = np.eye(3, dtype=bool)[split.labels]
            split.labels = hot | np.roll(hot, 1, axis=1)
            split.__class__ = SeveralSplit


class SeveralSplit(type(Fake().train)):
    def __getitem__(self, index):
        rows, self.labels = self.labels, np.zeros(len(self.labels), int)
        image, _ = super().__getitem__(index)
        self.labels = rows
        return image, rows[index]


def test_several_labels_are_batched_mixed_and_learned(trainer_of):
    data = ImageData(
        Several(), 3, 32, 4, augment={"mixup": 0.8}, mean=(0.5,) * 3, std=(0.5,) * 3, eval={"squash": True}
    )
    data.check()
    batch = next(iter(data.val_dataloader()))
    assert batch.labels.dtype == torch.float32 and batch.labels[0].tolist() == [1, 1, 0]
    optimizer = {"opt": "sgd", "lr": 0.1, "weight_decay": 0.0}
    schedule = {"sched": "cosine", "warmup_epochs": 0, "cooldown_epochs": 0, "min_lr": 0.0}
    task = MultiLabel(model(), optimizer, schedule, 3, class_weights="auto")
    run = trainer_of()
    run.fit(task, data)
    assert task.positive_weights.tolist() == [0.5, 0.5, 0.5]
    figures = run.validate(task, data, verbose=False)[0]
    with torch.no_grad():
        batches = [data._stage(b, training=False) for b in data.val_dataloader()]
        logits = torch.cat([task.model.eval()(b.images) for b in batches])
    labels = torch.cat([b.labels for b in batches])
    assert figures["val/map"] == pytest.approx(multilabel_average_precision(logits, labels.long(), 3).item(), abs=1e-5)
    assert figures["val/loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels).item(), abs=1e-5)


def test_mixed_labels_keep_their_shares():
    images, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    stage = DeviceStage((0.5,) * 3, (0.5,) * 3, Augment(mixup=0.8), 3, seed=0)
    mixed = stage(Batch(images, labels, torch.arange(2), 0, 0), training=True).labels
    share = mixed[0, 0].item()
    assert 0 < share < 1 and torch.allclose(mixed, labels * share + labels.flip(0) * (1 - share))


def test_a_task_for_the_other_kind_of_labels_is_named():
    with pytest.raises(ValueError, match=r"an image of this data has several labels, .* train with task=multilabel"):
        Classification(model(), {}, {}, 3).prepare(ImageData(Several(), 3, 32, 4))
    with pytest.raises(ValueError, match=r"an image of this data has one label, .* train with task=classification"):
        MultiLabel(model(), {}, {}, 3).prepare(ImageData(Fake(3), 3, 32, 4))
    with pytest.raises(ValueError, match=r"data.balanced: images have several labels"):
        ImageData(Several(), 3, 32, 4, balanced=True).check()


def test_positive_weights_are_the_images_without_a_label_over_those_with_it():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]], bool)
    assert positive_weights("auto", labels).tolist() == [3, 0.25, 3]


@pytest.fixture
def trainer_of():
    import pytorch_lightning as pl

    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lambda: pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, use_distributed_sampler=False, **silent)


@pytest.mark.full
def test_a_run_with_several_labels_and_its_evaluation(command, tmp_path):
    from PIL import Image

    rows = ["file,label"]
    for i in range(12):
        Image.new("RGB", (9, 9), (250 * (i % 2), 0, 250 * (i % 3 == 0))).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png," + ";".join(["red"] * (i % 2) + ["blue"] * (i % 3 == 0) + ["any"]))
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = ("data=imagelist", "data.source.train=labels.csv", "data.source.separator=;", "data.batch_size=4")
    status, _, err = command(
        "train", "task=multilabel", "model=vit_32px", "logger=none", "trainer.max_epochs=1", "run.name=m", *data
    )
    assert status == 0, err
    status, out, err = command("eval", "ckpt=outputs/m", "probe=multilabel")
    assert status == 0 and "mean average precision" in out, err
    status, out, err = command("eval", "ckpt=outputs/m")
    assert status == 0 and "mean average precision" in out, err
