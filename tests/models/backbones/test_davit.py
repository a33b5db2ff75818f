"""DaViT: equal to timm's with the same weights; the sizes of the paper; any image."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.checkpoints import convert

# parameters and multiply-adds (fvcore, which also counts norms) of the authors' code; 384 pixels for the large one.
# Huge and giant were never released: the parameters are those of timm's models.
SIZES = {
    "davit_tiny": (28_360_168, 4_540_244_736),
    "davit_small": (49_745_896, 8_800_488_192),
    "davit_base": (87_954_408, 15_510_430_720),
    "davit_large": (196_811_752, 102.97e9),
    "davit_huge": (348_922_856, None),
    "davit_giant": (1_406_470_120, None),
}
SMALL = {"dims": [32, 32, 64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "num_classes": 5}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "davit_tiny" else pytest.mark.full) for name in SIZES]
)
def test_parameters_and_flops(name):
    parameters, flops = SIZES[name]
    with torch.device("meta"):
        model = create_model(name).eval()
        theirs = timm.create_model(name)
        images = torch.empty(1, 3, *[384 if flops == 102.97e9 else 224] * 2)
    assert sum(p.numel() for p in model.parameters()) == parameters == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert flops is None or counter.get_total_flops() / 2 == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("size", [(64, 64), (100, 68), (33, 150)])
def test_equals_timm(size):
    """Logits, and gradients of the weights under timm's own names."""
    torch.manual_seed(0)
    names = {"embed_dims": "dims", "depths": "depths", "num_heads": "num_heads", "num_classes": "num_classes"}
    theirs = timm.create_model("davit_tiny", **{timms: SMALL[mine] for timms, mine in names.items()}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.5, 0.1) if parameter.ndim == 1 else parameter.normal_(
                0, 0.5 * parameter[0].numel() ** -0.5
            )
    ours = create_model("davit_tiny", **SMALL).eval()
    shape = {key: SMALL[key] for key in ("dims", "depths", "num_heads")}
    ours.load_state_dict(convert(theirs.state_dict(), "davit_tiny", **shape), strict=True)
    images = torch.randn(2, 3, *size)
    for model in (ours, theirs):
        model(images).square().sum().backward()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    gradients = convert({key: p.grad for key, p in theirs.named_parameters()}, "davit_tiny", **shape)
    for key, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[key]).norm() / gradients[key].norm().clamp(min=1e-6)
        assert error < 1e-4, f"gradient of {key}"


def test_every_block_has_a_drop_path_rate_of_its_own():
    """timm gives a pair one rate; the authors count both of its blocks."""
    model = create_model("davit_tiny", drop_path=0.1, **SMALL)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 9 for i in range(10)])


def test_windows_and_channels_take_turns():
    model = create_model("davit_tiny", **SMALL)
    windows = [block.attn.window for stage in model.stages for block in stage.blocks]
    assert windows == [(7, 7), None] * 5
    assert create_model("davit_large", **SMALL).stages[0].blocks[0].attn.window == (12, 12)


@pytest.mark.parametrize("size", [(224, 224), (97, 131)])
def test_any_size_trains(size):
    torch.manual_seed(0)
    model = create_model("davit_tiny", downsample_kernel=3, **SMALL).train()
    model.set_gradient_checkpointing(True)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    maps = create_model("davit_tiny", features_only=True, **SMALL)(torch.randn(1, 3, *size))
    assert [x.shape[2:] for x in maps] == [torch.Size(-(-side // s) for side in size) for s in (4, 8, 16, 32)]
