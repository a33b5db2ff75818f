"""What changes the tokens in front of the projection: the recorded cases of the two-dimensional state space layer."""

import re

import parity
import pytest
import reference
import torch
import torch.nn.functional as F

from models import create_model
from models.attention import Grid, Site
from models.attention.pres.ssm2d import convolved, ssm2d

SITE = Site(dim=8, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
CASES = [name for name in reference.cases("module") if name.startswith("ssm2d/")]


def layer(name):
    hparams = reference.info(name)["hparams"]
    side = round(hparams["L"] ** 0.5)
    return ssm2d(
        Site(hparams["embed_dim"], 1, Grid(side, side), 0, 0, 1, "vit"),
        states=hparams["ndim"],
        groups=hparams["n_ssm"],
        directions=hparams["directions_amount"],
        complex=hparams["complex_ssm"],
        norm=hparams["normalize"],
    )


def state(theirs):
    radius = "A_radius" if "A_radius.A_1" in theirs else "A"
    stacked = {"A": [f"{radius}.A_{i}" for i in range(1, 5)]}
    stacked |= {name: [f"{name}_{i}" for i in (1, 2)] for name in "BC"}
    stacked |= {"A_angle": [f"A_angle.A_{i}" for i in range(1, 5)]} if radius == "A_radius" else {}
    ours = {key: torch.stack([theirs[name] for name in names]) for key, names in stacked.items()}
    ours |= {key.replace("normalization", "norm"): value for key, value in theirs.items() if "normal" in key}
    return ours | {"omega": theirs["omega"]}


@pytest.mark.parametrize("name", CASES)
def test_ssm2d(name):
    def call(module, x_BCHW):
        y = module(x_BCHW.flatten(2).mT, Grid(*x_BCHW.shape[2:]))
        return y.mT.unflatten(2, x_BCHW.shape[2:])

    parity.check(name, layer(name), state, call)


@pytest.mark.parametrize("name", CASES)
def test_its_kernel(name):
    module = layer(name)
    module.load_state_dict(state(reference.weights(name)))
    assert reference.compare(name, "kernel", module.kernel().flatten(0, 1).permute(1, 2, 0)) < 1e-6


def test_the_kernel_is_the_recurrence_cell_by_cell():
    part = ssm2d(SITE, states=3)
    (A1, A2, A3, A4), B, C = part.A.sigmoid(), part.B.sigmoid(), part.C
    h, v = {(0, 0): B[0]}, {(0, 0): B[1]}
    for i in range(4):
        for j in range(5):
            if (i, j) != (0, 0):
                half = 0.5 if i and j else 1
                h[i, j] = half * (A1 * h[i, j - 1] + A2 * v[i, j - 1]) if j else torch.zeros_like(B[0])
                v[i, j] = half * (A3 * h[i - 1, j] + A4 * v[i - 1, j]) if i else torch.zeros_like(B[0])
    for cell in h:
        channels = [C[0, c] @ h[cell][c % 2] + C[1, c] @ v[cell][c % 2] for c in range(16)]
        expected = torch.stack(channels).view(2, 8) / 3**0.5
        torch.testing.assert_close(part.kernel()[:, :, *cell], expected)


def test_the_convolution_looks_back_from_every_corner():
    """A cell gets what lies above and to the left, from one corner; with two of them all that lies on either side."""
    x, kernel = torch.randn(1, 8, 4, 5), torch.randn(8, 4, 5)
    padded = F.pad(x, (4, 0, 3, 0))
    expected = F.conv2d(padded, kernel.flip(1, 2)[:, None], groups=8)
    torch.testing.assert_close(convolved(x, kernel), expected, rtol=1e-4, atol=1e-5)


def test_prefix_tokens_pass_and_another_map_runs():
    part = ssm2d(SITE, norm=True)
    x = torch.randn(2, 22, 8)
    y = part(x, Grid(4, 5, 2))
    assert torch.equal(y[:, :2], x[:, :2]) and y.shape == x.shape
    torch.testing.assert_close(part(x[:, 2:], Grid(4, 5)), y[:, 2:])
    for grid in (Grid(2, 3), Grid(7, 6)):
        assert part(torch.randn(1, grid.tokens, 8), grid).isfinite().all()


def test_a_small_map_has_a_corner_of_the_kernel():
    """So a map that is part of another one, with zeros around it, gets the same output."""
    part = ssm2d(SITE)
    x = torch.randn(1, 8, 2, 3)
    small = part(x.flatten(2).mT, Grid(2, 3))
    large = part(F.pad(x, (0, 2, 0, 2)).flatten(2).mT, Grid(4, 5)).unflatten(1, (4, 5))[:, :2, :3].flatten(1, 2)
    torch.testing.assert_close(small, large)


def test_its_states_do_not_decay():
    kept = create_model("vit_32px", attention="softmax", pre="ssm2d", depth=1).no_weight_decay()
    assert {name.rpartition(".pre.")[2] for name in kept if ".pre." in name} == {"A", "B", "C"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"states": 0}, "ssm2d: states must be a whole number of at least 1, got 0; set attention.pre.states"),
        ({"groups": 3}, "ssm2d: groups must divide the 8 channels, got 3; set attention.pre.groups"),
        ({"directions": 3}, "ssm2d: directions must be 2 or 4, got 3; set attention.pre.directions"),
        ({"complex": 1}, "ssm2d: complex must be true or false, got 1; set attention.pre.complex"),
    ],
)
def test_wrong_options_are_named(given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ssm2d(SITE, **given)
