"""callbacks=watch: a run is bit for bit what it is without, and every look is in metrics.csv."""

import pytest
import pytorch_lightning as pl
import torch

from conf.compose import compose_run
from conf.errors import UserError
from models import create_model
from models.attention.figures import figures_of
from models.callbacks.ema import EMA
from models.callbacks.randomness import StepRandomness
from models.callbacks.routing import Routing
from models.callbacks.watch import Watch, _untouched
from models.loggers.metrics_csv import MetricsCSV, read_metrics
from models.runs.preflight import part_of
from tests.models.callbacks.test_resume import assert_equal

TINY = ("model.depth=2", "model.dim=16", "data.batch_size=4", "data.workers=0", "logger=none")
DROPS = ("model.drop_path=0.5",)
KEYS = ("model=vit_32px", "attention/transform=random_keys", *TINY, *DROPS)
CASES = {"routers": ("model=vit_32px", "attention=moh", "attention.balance=bias", *TINY, *DROPS)}
SLOW = {
    "random keys": KEYS,
    "regions": ("model=biformer_32px", "data.batch_size=2", "data.workers=0"),
    "clusters": ("model=vit_32px", "attention=routing", "model.class_token=false", *TINY),
    "convolutions": ("model=convnext_32px", "data.batch_size=2", "data.workers=0"),
    "stages": ("model=coatnet_32px", "data.batch_size=2", "data.workers=0"),
}


def run(folder, case, *callbacks, **settings):
    """State at the end, losses of every step, rows of metrics.csv, and the callback."""
    cfg, _ = compose_run(["callbacks.checkpoints=null", *case])
    pl.seed_everything(0, verbose=False)
    task, data = part_of(cfg, "task"), part_of(cfg, "data")
    losses = Losses()
    settings = {"limit_train_batches": 5, "limit_val_batches": 1, "max_epochs": 1, "log_every_n_steps": 1} | settings
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=[MetricsCSV(folder / "metrics.csv")], default_root_dir=folder,
        callbacks=[StepRandomness(0), EMA(), Routing(), *callbacks, losses], use_distributed_sampler=False,
        num_sanity_val_steps=0, **quiet, **settings,
    )  # fmt: skip
    trainer.fit(task, data)
    state = dict(task.model.state_dict()) | {f"ema.{k}": v for k, v in task.ema_model.state_dict().items()}
    return state | {"losses": losses.seen, "modes": [m.training for m in task.modules()]}, read_metrics(
        folder / "metrics.csv"
    )


class Losses(pl.Callback):
    """Notes the loss of every step, and the next number that would be drawn."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((outputs["loss"].item(), torch.rand((), generator=_copy()).item()))


def _copy() -> torch.Generator:
    return torch.Generator().set_state(torch.random.get_rng_state())


def watched(rows):
    return {
        float(row["step"]): {k: float(v) for k, v in row.items() if k.startswith("watch/")}
        for row in rows
        if any(key.startswith("watch/") for key in row)
    }


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.full) for name in SLOW)])
def test_a_run_that_is_watched_is_the_same_run(tmp_path, capsys, name):
    case = (CASES | SLOW)[name]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain, rows = run(tmp_path / "a", case)
    found, with_looks = run(tmp_path / "b", case, Watch(every_n_steps=2, images=2))
    assert_equal(found, plain)
    assert not watched(rows)
    looks = watched(with_looks)
    assert list(looks) == [0, 1, 3]  # after the first step and every second one, as Lightning counts them
    gradients = [key for key in looks[0] if key.startswith("watch/gradient/")]
    assert len(gradients) >= 3 and "watch/gradient/head" in gradients
    assert all(value == value and value >= 0 for look in looks.values() for value in look.values())
    assert "watch: 3 looks of " in capsys.readouterr().out
    if name == "routers":
        kinds = {key.split("/")[1] for key in looks[0]}
        assert kinds == {"gradient", "entropy", "load_min", "load_max", "router_entropy"}
    if name == "regions":
        assert any("routes_changed" in key for key in looks[1]) and not any("routes_changed" in key for key in looks[0])
    if name == "convolutions":
        assert len(gradients) == len(looks[0])


def test_norms_are_those_of_the_gradients_that_make_the_step(tmp_path):
    """Over accumulated batches: the norm over all parts is that of the whole model, which is logged beside it."""

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.whole = torch.nn.utils.get_total_norm(
                [p.grad for p in pl_module.model.parameters() if p.grad is not None]
            )

    norm = Norm()
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 2}
    _, rows = run(tmp_path, KEYS, Watch(every_n_steps=100), norm, **settings)
    (look,) = watched(rows).values()
    squares = [value**2 for key, value in look.items() if key.startswith("watch/gradient/")]
    assert sum(squares) ** 0.5 == pytest.approx(float(norm.whole), rel=1e-5)


@pytest.mark.full  # importing what compiles takes seconds
def test_a_compiled_model_is_looked_at_uncompiled():
    model = create_model("vit_32px", dim=16, depth=1, num_classes=4)
    model.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    with _untouched(model, torch.device("cpu"), compiled=True):
        assert not any(module.training for module in model.modules())
        (figures,) = figures_of(model, torch.randn(1, 3, 32, 32))[0].values()
    assert 0 < figures["entropy"] <= 1 and all(module.training for module in model.modules())


@pytest.mark.full
def test_a_model_that_generates_is_watched(command, tmp_path):
    small = ("model=dit_s_2", "task=generation", "data=digits", "model.depth=1", "trainer.max_epochs=1", "logger=none")
    steps = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "data.batch_size=4", "task.score=null")
    status, out, err = command("train", *small, *steps, "callbacks=watch", "run.name=x")
    assert status == 0 and "watch: 1 looks of " in out, err
    (look,) = watched(read_metrics(tmp_path / "outputs/x/metrics.csv")).values()
    assert any(key.startswith("watch/entropy/") for key in look)


def test_watch_keeps_no_state_and_is_one_of_the_usual_callbacks():
    assert Watch().state_dict() == {}
    usual, more = (compose_run([f"callbacks={name}"])[0].callbacks for name in ("default", "watch"))
    assert set(more) - set(usual) == {"watch"} and all(more[key] == usual[key] for key in usual)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"every_n_steps": 0},
            r"Watch: every_n_steps must be a whole number of at least 1, got 0; set callbacks\.watch\.",
        ),
        (
            {"images": "four"},
            r"Watch: images must be a whole number of at least 1, got 'four'; set callbacks\.watch\.im",
        ),
    ],
)
def test_wrong_settings_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        Watch(**options)
