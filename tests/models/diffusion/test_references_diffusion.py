"""Schedules, losses and chains equal those of the authors' code, with their noise."""

import re
from collections.abc import Iterator
from itertools import islice

import numpy as np
import parity
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import create_model
from models.checkpoints.names.dit import LAYOUTS
from models.diffusion import chain, linear_diffusion, spaced, training_losses

TABLES = [name for name in reference.cases() if name.endswith("diffusion_schedules")]
MODELS = [
    name for name in reference.cases("model") if "training_losses" in reference.info(name)["official_constructor"]
]
SPACINGS = {"full": "", "sp250": "250", "sp8": "8"}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Our model of a case, and its weights, functions of the authors' (`requires_grad`) in the second entry."""
    torch.manual_seed(0)
    model = create_model(re.sub("[/-]", "_", reference.info(name)["hparams"]["model"].lower())).eval()
    return model, {"pos_embed": model.state_dict()["stem.position.sinusoid"], **reference.weights(name)}


def given(name: str, model: nn.Module, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights under the names of our model."""
    return parity.through(LAYOUTS[0], model, "", "")(theirs)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("name", TABLES)
def test_schedules(name):
    recorded = reference.arrays(name)
    for prefix, spacing in SPACINGS.items():
        diffusion = linear_diffusion().respaced(spaced(spacing, 1000))
        np.testing.assert_array_equal(diffusion.timesteps.numpy(), recorded[f"{prefix}.timestep_map"])
        keys = [key.partition(".")[2] for key in recorded if key.startswith(f"{prefix}.")]
        for key in set(keys) - {"timestep_map"}:
            # float64: the tables differ by the order of a few roundings
            np.testing.assert_allclose(
                diffusion.tables[key].numpy(), recorded[f"{prefix}.{key}"], rtol=1e-12, err_msg=f"{prefix}.{key}"
            )


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_their_gradients(name):
    case, recorded = reference.info(name), reference.arrays(name)
    model, theirs = build(name)
    theirs = {key: value.requires_grad_(key in case["param_names"]) for key, value in theirs.items()}
    x0 = reference.model_input(name).requires_grad_()
    step_B, labels_B = (torch.from_numpy(recorded[key]) for key in ("t", "y"))
    diffusion, draw = linear_diffusion(), noise(tuple(case["input_shape"]), case["noise_seed"])
    x = diffusion.noised(x0, step_B, draw)
    prediction = functional_call(model, given(name, model, theirs), (x, diffusion.timesteps[step_B], labels_B))
    parts = training_losses(diffusion, prediction, x0, x, step_B, draw)
    output = parts["mse"] + parts["vb"]
    for key, value in {"output": output, **parts}.items():
        assert reference.compare(name, key, value) <= parity.OUTPUT, key
    names = case["param_names"]
    grads = torch.autograd.grad(output.square().mean(), [x0, *(theirs[key] for key in names)])
    assert reference.compare(name, "input_grad", grads[0]) <= parity.GRADIENT
    wanted = recorded["grad_norms"]
    found = [float(grad.norm()) for grad in grads[1:]]
    np.testing.assert_allclose(found, wanted, rtol=parity.GRADIENT, atol=1e-7 * wanted.max())


def draws(name: str) -> Iterator[Tensor]:
    """The noise of the recorded chains: the start, then one draw for each step."""
    shape = tuple(reference.info(name)["input_shape"])
    yield noise(shape, 77)
    for number in range(1, 9):
        yield noise(shape, 5000 + number)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "key", "count"),
    [
        ("ddpm", "sample_chain", 3),
        pytest.param("ddpm", "sample_chain", 8, marks=pytest.mark.full),
        pytest.param("ddim", "ddim_sample", 8, marks=pytest.mark.full),
    ],
)
@torch.no_grad()
def test_guided_chains_of_eight_steps(name, method, key, count):
    """Of DDPM, which is recorded after every step, only the first three in `make test`."""
    model, theirs = build(name)
    model.load_state_dict(given(name, model, theirs))
    labels_B = torch.from_numpy(reference.arrays(name)["y"])
    diffusion, noises = linear_diffusion().respaced(spaced("8", 1000)), draws(name)

    def predict(x: Tensor, timesteps_B: Tensor) -> Tensor:
        return model.forward_guided(x, timesteps_B, labels_B, 1.5, channels=3)

    steps = list(islice(chain(predict, diffusion, lambda: next(noises), method=method), count))
    assert len(steps) == count
    if method == "ddim":
        assert reference.compare(name, key, steps[-1]) <= parity.OUTPUT
        return
    recorded, size = reference.arrays(name)[key], steps[0].numel()
    where = np.linspace(0, 8 * size - 1, recorded.size).astype(np.int64)
    found, wanted = torch.cat([x.flatten() for x in steps]).numpy(), recorded[where < count * size]
    assert np.linalg.norm(found[where[where < count * size]] - wanted) <= parity.OUTPUT * np.linalg.norm(wanted)
