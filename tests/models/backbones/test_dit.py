"""DiT and MoH-DiT: sizes, every attention in them, conditions and guidance, other sizes of the map, wrong settings."""

import copy
import functools

import pytest
import torch
from omegaconf import OmegaConf
from timm.optim import param_groups_layer_decay
from torch import nn

from conf import families
from models import create_model, list_attentions, list_models
from models.attention.moh import active_heads
from models.attention.softmax import softmax_attention
from models.backbones.dit import DiT
from models.benchmark import Steps
from models.cost import parameters
from models.factory import compose_model, instantiate
from models.layers.sinusoid import position_table

# Parameters, multiply-adds (G) of one map, and the share of heads in use: the authors' code, counted by PyTorch.
SIZES = {
    "dit_s_2": (32_963_360, 6.056, None),
    "dit_b_2": (130_512_416, 23.005, None),
    "dit_l_2": (458_102_816, 80.698, None),
    "dit_xl_2": (675_129_632, 118.621, None),
    "moh_dit_s_2_75": (32_998_688, 6.065, 0.75),
    "moh_dit_s_2_90": (32_997_152, 6.064, 0.8889),
    "moh_dit_b_2_75": (130_638_368, 23.037, 0.75),
    "moh_dit_b_2_90": (130_638_368, 23.037, 0.8958),
    "moh_dit_l_2_75": (458_528_800, 80.807, 0.75),
    "moh_dit_l_2_90": (458_512_416, 80.802, 0.8958),
    "moh_dit_xl_2_75": (675_689_504, 118.765, 0.75),
    "moh_dit_xl_2_90": (675_666_464, 118.759, 0.8996),
}
SMALL = {"image_size": 16, "latent_stride": 1, "in_channels": 3, "num_classes": 5, "dim": 32, "depth": 2}
HEADS = {"num_heads": 4}


composed = functools.cache(functools.partial(compose_model, "dit_s_2"))  # it takes a third of a second


def small(attention: str | None = None, **settings) -> DiT:
    """With random weights everywhere, so that no branch is silent as it is at the start of training."""
    torch.manual_seed(0)
    cfg = composed(attention).copy()
    for key, value in {**SMALL, **HEADS, **settings}.items():
        OmegaConf.update(cfg, f"model.{key}" if key in cfg.model else f"attention.{key}", value)
    model = instantiate(cfg.model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15)
    return model


def inputs(batch: int = 3, size: tuple[int, int] = (16, 16)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, *size, generator=generator),
        torch.randint(1000, (batch,), generator=generator),
        torch.randint(5, (batch,), generator=generator),
    )


def test_every_size_is_here():
    found = {name for name in list_models() if "dit" in name.split("_")}
    assert found == {*SIZES, "moh_dit_s_2"}
    assert compose_model("moh_dit_s_2").image_size == 256, "what fits it to the digits is of a run, not of the model"
    assert compose_model("moh_dit_s_2") == compose_model("moh_dit_s_2_90")


@pytest.mark.parametrize("name", SIZES)
def test_parameters_flops_and_active_heads(name):
    """Costs as recorded, which tests/models/test_tables.py counts."""
    count, flops, active = SIZES[name]
    with torch.device("meta"):
        model = create_model(name)
    counted = families.models()[name]["counted"]
    assert parameters(model) == counted["parameters"] == count
    assert counted["multiply_adds"] / 1e9 == pytest.approx(flops, abs=6e-4)
    assert active_heads(model) == (None if active is None else pytest.approx(active, abs=1e-4))
    assert model.latent_size == (32, 32)


# the mechanisms with losses, and every fourth: the others do in a ViT what they do here
QUICK = ("moh", "routing", *list_attentions()[::4])


@pytest.mark.parametrize(
    "attention", [pytest.param(a, marks=[] if a in QUICK else pytest.mark.full) for a in list_attentions()]
)
def test_every_attention_trains_on_any_map_and_mixes_no_samples(attention):
    model = small(attention).train()
    prediction, losses = model(*inputs(), return_losses=True)
    assert prediction.shape == (3, 6, 16, 16)
    (prediction.square().mean() + sum(loss.sum() for loss in losses.values())).backward()
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in learned.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    assert model.stem.position.sinusoid.grad is None
    latents, timesteps, labels = inputs(2, (20, 12))
    with torch.no_grad():
        both = model.eval()(latents, timesteps, labels)
        torch.testing.assert_close(model(latents[1:], timesteps[1:], labels[1:]), both[1:], rtol=1e-4, atol=1e-5)
    assert both.shape == (2, 6, 20, 12)


def test_heads_differ_from_block_to_block(recorder):
    torch.manual_seed(0)
    model = DiT(recorder, 16, 5, latent_stride=1, patch_size=4, dim=32, depth=3, num_heads=[2, 4, 6], head_dim=8)
    assert [(s.num_heads, s.head_dim, s.block, s.depth, s.kind) for s in recorder.sites] == [
        (2, 8, 0, 3, "vit"), (4, 8, 1, 3, "vit"), (6, 8, 2, 3, "vit"),
    ]  # fmt: skip
    assert {(site.dim, site.grid) for site in recorder.sites} == {(32, (4, 4, 0))}
    _, losses = model.train()(torch.randn(2, 4, 16, 16), torch.ones(2), torch.tensor([0, 1]), return_losses=True)
    assert losses["size"].shape == (3,)


def test_mixture_of_heads_per_block():
    settings = {"num_heads": [2, 4], "head_dim": 12, "shared_heads": [2, 2], "routed_heads": [0, 1]}
    model = small("moh", **settings).train()
    blocks = model.stages[0].blocks
    assert [(block.attn.router.shared, block.attn.router.routed) for block in blocks] == [(2, 0), (2, 1)]
    assert [block.attn.mixer.proj.in_features for block in blocks] == [24, 48]
    _, losses = model(*inputs(), return_losses=True)
    assert losses["load_balance"].shape == (1,)
    assert not model.eval()(*inputs(), return_losses=True)[1]


def test_a_new_model_predicts_nothing_and_its_blocks_change_nothing():
    model = instantiate(composed(None).model, **SMALL, **HEADS).eval()
    assert not model(*inputs()).any()
    x, grid, condition = model.stem(*inputs())
    assert torch.equal(model.stages[0](x, grid, condition)[0], x)


def test_timestep_and_class_count():
    model, (latents, timesteps, labels) = small().eval(), inputs()
    prediction = model(latents, timesteps, labels)
    assert (model(latents, timesteps + 1, labels) - prediction).abs().max() > 1e-4
    assert (model(latents, timesteps, (labels + 1) % 5) - prediction).abs().max() > 1e-4


def test_positions_count_and_follow_the_map():
    """On another map the table is that of the map; a file made for another size gives the same model."""
    model, larger = small().eval(), small(image_size=(20, 12)).eval()
    state = {name: value for name, value in model.state_dict().items() if "sinusoid" not in name}
    larger.load_state_dict(state, strict=False)
    torch.testing.assert_close(model(*inputs(2, (20, 12))), larger(*inputs(2, (20, 12))))
    assert torch.equal(larger.stem.position.resized("sinusoid", torch.empty(0)), position_table(10, 6, 32))
    latents, *rest = inputs()
    moved = model(latents.roll(2, -1), *rest).roll(-2, -1)
    assert (moved - model(latents, *rest)).abs().max() > 1e-3


def test_labels_are_dropped_in_training_only():
    model, (latents, timesteps, labels) = small(class_dropout=0.5), inputs(64)
    seen = []
    model.stem.register_forward_hook(lambda module, given, _: seen.append(given[2]))
    with torch.no_grad():
        for training in (True, True, False):
            torch.manual_seed(3)
            model.train(training)(latents, timesteps, labels)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], labels)
    dropped = seen[0] == 5
    assert 16 < dropped.sum() < 48 and torch.equal(seen[0][~dropped], labels[~dropped])


@torch.no_grad()
def test_guidance():
    model, (latents, timesteps, labels) = small().eval(), inputs()
    given = model(latents, timesteps, labels)
    free = model(latents, timesteps, torch.full_like(labels, 5))
    guided = model.forward_guided(latents, timesteps, labels, 1.5)
    torch.testing.assert_close(guided[:, :3], free[:, :3] + 1.5 * (given - free)[:, :3])
    torch.testing.assert_close(guided[:, 3:], given[:, 3:])
    torch.testing.assert_close(model.forward_guided(latents, timesteps, labels, 1.0), given)
    partly = model.forward_guided(latents, timesteps, labels, 1.5, channels=1)
    torch.testing.assert_close(partly, torch.cat([guided[:, :1], given[:, 1:]], dim=1))
    with pytest.raises(ValueError, match=r"guidance needs .*, got class_dropout=0; set model.class_dropout, or guid"):
        small(class_dropout=0.0).forward_guided(latents, timesteps, labels, 1.5)


def test_the_variance_is_optional():
    assert small(learn_sigma=False)(*inputs()).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("attention", ["moh", "biformer"])
def test_gradient_checkpointing_changes_nothing(attention):
    gradients = []
    for enabled in (False, True):
        model = small(attention).train()
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(2)
        prediction, losses = model(*inputs(), return_losses=True)
        (prediction.square().mean() + sum(loss.sum() for loss in losses.values())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_autocast_and_half_precision():
    model = small("moh").eval()
    expected = model(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(*inputs())
    # bfloat16 keeps 8 bits, about 0.4 % per step, and may choose other heads where two are as good
    assert (prediction.float() - expected).norm() < 0.1 * expected.norm()
    latents, timesteps, labels = inputs()
    half = copy.deepcopy(model).bfloat16()(latents.bfloat16(), timesteps, labels)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_layer_decay():
    """The stem with timestep and labels learns slowest, the last layer at the full rate."""
    model = small()
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if name.startswith("stem")} == {0.125}
    assert {rate for name, rate in rates.items() if name.startswith("final")} == {1.0}
    assert rates["stages.0.blocks.0.modulation.weight"] == 0.25


def test_a_step_of_the_benchmark():
    steps = Steps("moh_dit_s_2", None, 1, 32, "cpu")
    assert [tuple(value.shape) for value in steps.inputs] == [(1, 4, 4, 4), (1,), (1,)]
    steps.training()
    assert steps.inference().shape == (1, 8, 4, 4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"image_size": 15},
            r"DiT: image_size must be a multiple of 2 pixels \(patches of 2 latents.*, got 15; change",
        ),
        ({"num_heads": [4]}, r"DiT: num_heads must be one number, or one for each of the 2 blocks, got 1; set model.n"),
        ({"num_heads": [4, 0]}, r"DiT: num_heads must be a whole number of at least 1, got 0; set model.num_heads"),
        ({"class_dropout": 1.0}, r"DiT: class_dropout must be in \[0, 1\), got 1.0; set model.class_dropout"),
        ({"dim": 34, "num_heads": 2}, r"position_table: .* multiple of 4 channels, got 34; change model.dim"),
        ({"head_dim": 0}, r"DiT: head_dim must be a whole number of at least 1, got 0; set model.head_dim"),
        ({"mlp_ratio": 0}, r"DiT: mlp_ratio must be a number above 0, got 0; set model.mlp_ratio"),
        ({"num_classes": 0}, r"DiT: num_classes must be a whole number of at least 1, got 0; set model.num_classes"),
        (
            {"features_only": True},
            r"features_only: a backbone for images is needed, got DiT, which makes images; choos",
        ),
        (
            {"attention": "inline", "head_dim": 12},
            r"stage 0 blocks 0-1 .*: 4 heads of 12 channels are not the 32 channels of the tokens.*; change model.num_",
        ),
        (
            {"attention": "plan/moh_dit_s_2_90"},
            r"shared_heads has 12 entries for 2 blocks; give attention.shared_heads one entry per block",
        ),
    ],
)
def test_wrong_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        create_model("dit_s_2", **{**SMALL, **HEADS, **settings})


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 4, 16, 16), (2, 3, 16, 15)])
def test_wrong_latents(shape):
    model = DiT(softmax_attention, 16, 5, latent_stride=1, in_channels=3, dim=32, depth=1, num_heads=4)
    with pytest.raises(ValueError, match=r"DiT: latents must be \(batch, 3, height, width\) with sides that patches"):
        model(torch.randn(*shape), torch.ones(2), torch.zeros(2, dtype=torch.long))


def test_timesteps_and_labels_of_another_number():
    model = DiT(softmax_attention, 16, 5, latent_stride=1, in_channels=3, dim=32, depth=1, num_heads=4)
    for given in ((torch.ones(1), torch.zeros(2, dtype=torch.long)), (torch.ones(2), torch.zeros(2, 1).long())):
        with pytest.raises(
            ValueError, match=r"DiT: (timesteps|labels) must be one number for each of the 2 latents, got"
        ):
            model(torch.randn(2, 3, 16, 16), *given)
