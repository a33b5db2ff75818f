"""iFAM: masked blocks are the authors', closed cells change nothing at all, every loss teaches the first stage."""

from functools import partial

import numpy as np
import parity
import pytest
import reference
import torch
from torch import nn

from models import create_model
from models.attention import Grid, Site
from models.attention.softmax import softmax_attention
from models.layers.block import Block, Stage
from models.layers.gated import OPEN
from models.wrappers import part_losses

CASES = [name for name in reference.cases("module") if name.startswith("ifam/")]
SMALL = {"class_token": True, "depth": 4, "dim": 32, "num_heads": 4, "num_classes": 5}
LOSSES = {"parts", "presence", "background", "orthogonality", "entropy", "variation", "equivariance"}


def ifam(attention: str | None = None, model: str = "vit_32px", wrapper: dict | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    node = {"_target_": "models.wrappers.ifam.IFAM", "_partial_": True, "parts": 3, **(wrapper or {})}
    return create_model(model, attention, wrapper=node, **{**SMALL, **options})


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def masked_blocks(case: dict) -> Stage:
    hparams, (_, N, _) = case["hparams"], case["input_shape"]
    sites = [
        Site(hparams["dim"], hparams["num_heads"], Grid(1, N - 1, 1), 0, block, hparams["depth"], "vit")
        for block in range(hparams["depth"])
    ]
    return Stage([Block(hparams["dim"], softmax_attention(site), norm_eps=1e-5) for site in sites])


def through(keep: torch.Tensor, stage: Stage, x: torch.Tensor) -> torch.Tensor:
    return stage(x, Grid(1, x.shape[1] - 1, 1), carry={OPEN: keep})[0][:, 0]


@pytest.mark.parametrize("name", CASES)
def test_masked_blocks_are_the_authors(name):
    case = reference.info(name)
    B, N, _ = case["input_shape"]
    drawn = np.random.default_rng(93).random((B, N - 1))
    keep = torch.from_numpy(drawn).float() if case["hparams"]["soft"] else torch.from_numpy(drawn > 0.5)
    parity.check(name, masked_blocks(case), lambda theirs: theirs, partial(through, keep))


def test_the_cases_are_found():
    assert CASES


@pytest.mark.parametrize("attention", ["softmax", "moh", "xca", "agent", "linear"])
@torch.no_grad()
def test_closed_cells_change_nothing_at_all(attention):
    """To the last bit, whatever mixes tokens; and open ones do."""
    model = ifam(attention).eval()
    x, grid = model.stem(images(2, 3, 32, 32))
    open_BS = torch.rand(2, grid.cells, generator=torch.Generator().manual_seed(2)) > 0.5
    changed = torch.cat([x[:, :1], torch.where(open_BS[..., None], x[:, 1:], x[:, 1:] + 10)], 1)

    def class_token(x):
        carry = {OPEN: open_BS}
        for stage in model.stages:
            x, _, _, carry = stage(x, grid, carry=carry)
        return x[:, 0]

    before = class_token(x)
    assert torch.equal(class_token(changed), before)
    x[:, 1:][open_BS] += torch.randn(32)
    assert (class_token(x) - before).norm() > 1e-4 * before.norm()


@torch.no_grad()
def test_an_image_is_judged_by_the_cells_that_the_first_stage_opens():
    model = ifam().eval()
    model.wrapper.prototypes.weight.mul_(3)
    x = images(2, 3, 32, 32)
    found = model.wrapper.find(x)
    assert found.maps.shape == (2, 4, 8, 8) and found.features.shape == (2, 4, 32) and found.open.shape == (2, 64)
    torch.testing.assert_close(found.maps.sum(1), torch.ones(2, 8, 8))
    best = found.maps.flatten(2)[:, :-1].amax(1) >= found.maps.flatten(2)[:, -1]
    assert torch.equal(found.open, best) and found.open.any() and not found.open.all()
    closed = (~found.open).view(2, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    model.wrapper.find = lambda _: found  # the first stage would find others in changed images
    torch.testing.assert_close(model(x + 10 * closed), model(x), rtol=0, atol=0)


def test_every_parameter_of_both_stages_learns_from_labels():
    model = ifam().train()
    logits, losses = model(images(4, 3, 32, 32), return_losses=True, labels=torch.tensor([0, 1, 2, 3]))
    assert losses.keys() == LOSSES and all(loss.shape == (1,) and loss.isfinite() for loss in losses.values())
    (logits.square().mean() + sum(loss.sum() for loss in losses.values())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_behind_hard_masks_the_first_stage_learns_by_its_losses_alone():
    for mask, expected in (("hard", False), ("soft", True)):
        model = ifam(wrapper={"mask": mask}).train()
        model(images(2, 3, 32, 32)).square().sum().backward()
        assert (model.wrapper.prototypes.weight.grad is not None) == expected


def test_evaluation_has_no_noise_and_no_losses_and_training_has():
    model, x = ifam(), images(2, 3, 32, 32)
    evaluated, losses = model.eval()(x, return_losses=True)
    assert torch.equal(model(x), evaluated) and losses == {}
    assert not torch.equal(model.train()(x), model(x))


def test_losses_of_blocks_come_from_both_stages():
    model = ifam("moh").train()
    _, losses = model(images(2, 3, 32, 32), return_losses=True)
    assert losses.keys() == LOSSES - {"parts"} | {"load_balance"} and losses["load_balance"].shape == (2 * 4,)


def test_recomputation_gives_the_same_gradients():
    plain, recomputed = ifam(), ifam()
    recomputed.set_gradient_checkpointing(True)
    for model in (plain, recomputed):
        torch.manual_seed(3)
        logits, losses = model.train()(images(2, 3, 32, 32), return_losses=True)
        (logits.square().mean() + sum(loss.sum() for loss in losses.values())).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_another_resolution_and_a_class_token_that_joins_later():
    assert ifam().eval()(images(1, 3, 48, 40)).shape == (1, 5)
    late = ifam("softmax", "convit_32px", token_before=3).eval()
    assert late(images(2, 3, 32, 32)).shape == (2, 5)


def test_losses_know_good_maps_from_bad_ones():
    """A part in the middle of a background, against the same share of all parts everywhere."""
    good, even = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 1 / 3)
    good[:, 2], good[:, 0, 3:6, 3:6], good[:, 2, 3:6, 3:6] = 1, 1, 0
    features = torch.randn(1, 3, 16)
    of_good, of_even = (part_losses.losses_of_parts(maps, features) for maps in (good, even))
    assert of_good["presence"] == 0.5 and abs(of_even["presence"] - 2 / 3) < 1e-6, "one of two parts is somewhere"
    assert of_good["entropy"] < 1e-6 and abs(of_even["entropy"] - np.log(3)) < 1e-6
    assert of_good["variation"] == 2 * 12 / 64 and of_even["variation"] == 0
    assert of_good["background"] < 1e-6 < of_even["background"]
    same = part_losses.orthogonality(torch.ones(1, 3, 16))
    assert abs(same - 6 / 9) < 1e-6 and part_losses.orthogonality(torch.eye(3, 16)[None]) < 1e-12


def rigid(angle, shift, scale, aspect):
    return part_losses.rigid(torch.tensor(angle), torch.tensor(shift), torch.tensor(scale), aspect)


@pytest.mark.parametrize("size", [(24, 24), (16, 32)])
def test_what_is_turned_and_turned_back_is_where_it_was(size):
    """A quarter turn is exact on cells of a square; the middle of a wide image comes back through any turn."""
    x = torch.zeros(1, 1, *size)
    x[..., size[0] // 2 - 4 : size[0] // 2 + 4, size[1] // 2 - 4 : size[1] // 2 + 4] = 1
    x = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    turn = rigid(0.7, (0.05, -0.1), 1.1, size[1] / size[0])
    back = part_losses.turned(part_losses.turned(x, turn), torch.linalg.inv(turn))
    assert (back - x).norm() < 0.1 * x.norm()
    if size[0] == size[1]:
        square = torch.randn(1, 1, *size)
        quarter = part_losses.turned(square, rigid(np.pi / 2, (0, 0), 1.0, 1.0))
        torch.testing.assert_close(quarter, square.rot90(1, (2, 3)), rtol=0, atol=1e-4)


def test_maps_that_turn_with_the_image_have_no_loss():
    x = torch.rand(2, 3, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(x, 9, 1, 4)
    torch.manual_seed(0)
    moving = part_losses.equivariance(blurred, blurred, lambda turned: turned)
    torch.manual_seed(0)
    standing = part_losses.equivariance(blurred, blurred, lambda turned: torch.rand(2, 3, 32, 32))
    assert moving < 0.25 * standing + 0.1


@pytest.mark.parametrize(
    ("wrapper", "options", "text"),
    [
        ({"parts": 0}, {}, r"ifam: parts must be a whole number of at least 1, got 0; set wrapper.parts"),
        ({"temperature": 0}, {}, r"ifam: temperature must be a positive number, got 0; set wrapper.temperature"),
        ({"part_dropout": 1}, {}, r"ifam: part_dropout must be at least 0 and below 1, got 1; set wrapper.part_dr"),
        ({"mask": "grey"}, {}, r"ifam: mask must be .*hard.*soft, got 'grey'; set wrapper.mask"),
        ({"equivariance": 2}, {}, r"ifam: equivariance must be true or false, got 2; set wrapper.equivariance=tr"),
        ({"mask": "soft"}, {"attention": "xca"}, r"a soft mask is added to the logits of keys, which .* has not; s"),
        ({}, {"class_token": False}, r"classifies by a class token, .*, got the mean of the map; set model.class_"),
        ({}, {"pool": "simpool"}, r"classifies by a class token, .*, got SimPool; set model.class_token=true and le"),
        ({}, {"reducer": "top"}, r"its masks are for all cells of the map and all blocks, got a ViT with a reducer"),
        ({}, {"features_only": True}, r"features_only: maps are those of a model alone, got the wrapper IFAM; leave"),
    ],
)
def test_misfits_are_named(wrapper, options, text):
    with pytest.raises(ValueError, match=text):
        ifam(options.pop("attention", None), wrapper=wrapper, **options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("swin_32px", r"ifam: both stages are plain ViTs, got Swin; choose a vit model"),
        ("moh_dit_s_2", r"wrapper: it stands around a model that images go through, got DiT; leave wrapper= out"),
        ("xcit_32px", r"ifam: its masks are for all cells of the map and all blocks, got a XCiT with a reducer or cl"),
    ],
)
def test_other_models_are_refused(name, text):
    with pytest.raises(ValueError, match=text):
        create_model(name, wrapper="ifam")
