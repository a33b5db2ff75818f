"""What the keys of blocks put where, and which families refuse them."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from models import create_model
from models.backbones.block_keys import set_wiring
from models.layers.adaptive_block import AdaptiveBlock
from models.layers.block import Block
from models.layers.convnext_block import ConvNeXtBlock
from models.layers.deformable import DeformableDownsample
from models.layers.norm import TokenBatchNorm

SMALL = {"depths": [1, 1, 1, 1], "num_classes": 5}


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Block | ConvNeXtBlock | AdaptiveBlock)]


def test_parallel_branches_read_the_same_tokens():
    model = create_model("vit_32px", depth=4, dim=32, wiring="parallel").eval()
    block, (x, grid) = blocks(model)[0], model.stem(torch.randn(2, 3, 32, 32))
    expected = x + block.attn(block.norm1(x), grid).x + block.mlp(block.norm2(x))
    torch.testing.assert_close(block(x, grid)[0], expected)


def slope(block, x, grid):
    """The sum of both branches, scaled and gated."""
    mixed, hidden = block.attn(block.norm1(x), grid).x, block.mlp(block.norm2(x))
    mixed = mixed if block.gate is None else block.gate(mixed, grid).x
    return block.scale1(mixed) + block.scale2(hidden)


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}, {"gate": "se"}, {"class_token": True}])
def test_a_runge_kutta_step_is_the_formula(options):
    torch.manual_seed(0)
    model = create_model("vit_32px", depth=4, dim=32, wiring="rk4", **options).eval()
    block, (x, grid) = model.stages[1].blocks[0], model.stem(torch.randn(2, 3, 32, 32))
    k1 = slope(block, x, grid)
    k2 = slope(block, x + k1 / 2, grid)
    k3 = slope(block, x + k2 / 2, grid)
    k4 = slope(block, x + k3, grid)
    torch.testing.assert_close(block(x, grid)[0], x + (k1 + 2 * k2 + 2 * k3 + k4) / 6)


@pytest.mark.parametrize(("wiring", "order"), [("parallel", 1), ("rk4", 4)])
def test_equal_blocks_follow_the_equation_with_their_order(wiring, order):
    """Of n blocks with the same weights, whose branches are scaled by 1/n; the error falls with n to this power."""
    torch.manual_seed(0)
    model = create_model("vit_32px", depth=4, dim=16, num_heads=2, layer_scale=1.0, wiring=wiring).double().eval()
    block, (x, grid) = model.stages[0].blocks[0], model.stem(torch.randn(1, 3, 32, 32).double())
    with torch.no_grad():
        for weight in (p for p in block.parameters() if p.ndim == 2):
            weight *= 10  # a slope that bends

        def end(steps: int, wired: str) -> torch.Tensor:
            block.wiring, y = wired, x
            for scale in (block.scale1, block.scale2):
                scale.gamma.fill_(1 / steps)
            for _ in range(steps):
                y = block(y, grid)[0]
            return y

        exact = end(256, "rk4")
        errors = [(end(steps, wiring) - exact).norm() for steps in (8, 16, 32)]
    measured = [(a / b).log2().item() for a, b in pairwise(errors)]
    assert measured == pytest.approx([order] * 2, abs=0.35)


def test_drop_path_skips_the_whole_step_and_losses_are_weighted_means():
    torch.manual_seed(0)
    heads = {"attention": "moh", "shared_heads": 1, "routed_heads": 1}
    model = create_model("vit_32px", depth=4, dim=32, wiring="rk4", drop_path=0.9, **heads).train()
    block, (x, grid) = model.stages[3].blocks[0], model.stem(torch.randn(64, 3, 32, 32))
    y, losses = block(x, grid)
    moved = (y != x).flatten(1).any(1)
    assert 0 < moved.sum() < 32 and losses and all(loss.ndim == 0 for loss in losses.values())
    block.eval()
    points = [x, x + slope(block, x, grid) / 2]
    points.append(x + slope(block, points[1], grid) / 2)
    points.append(x + slope(block, points[2], grid))
    found, of_points = block(x, grid)[1], [block.attn(block.norm1(point), grid).losses for point in points]
    for name, loss in found.items():
        one, two, three, four = (losses[name] for losses in of_points)
        torch.testing.assert_close(loss, (one + 2 * two + 2 * three + four) / 6)


def test_what_is_carried_has_no_order_in_four_evaluations():
    text = "ViT: its attention hands on what it carries, which four evaluations have no order for, got wiring=rk4"
    with pytest.raises(ValueError, match=text):
        create_model("vit_32px", attention="reversed", wiring="rk4")
    with pytest.raises(ValueError, match=r"gate: what PKCAM carries has no order in four evaluations, got wiring=rk4"):
        create_model("vit_32px", gate="pkcam", wiring="rk4")
    create_model("vit_32px", gate="pkcam", gate_at="block", wiring="rk4")(torch.randn(1, 3, 32, 32))


def test_norms_of_blocks_and_the_last_one_are_of_the_kind():
    model = create_model("convnext_32px", attention="softmax", norm="rmsnorm", **SMALL)
    assert isinstance(model.head_norm, nn.RMSNorm)
    assert all(isinstance(block.norm1, nn.RMSNorm) for block in blocks(model) if isinstance(block, Block))
    assert all(isinstance(block.norm, nn.RMSNorm) for block in blocks(model) if isinstance(block, ConvNeXtBlock))
    assert isinstance(model.stages[1].downsample.norm, nn.LayerNorm)  # between stages as it was
    assert isinstance(create_model("biformer_32px").norm, TokenBatchNorm)
    model = create_model("biformer_32px", norm="layernorm")
    assert isinstance(model.norm, nn.LayerNorm)
    model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["biformer_32px", "davit_32px"])
def test_positions_in_front_of_an_rms_norm(name):
    """The kernel of a position encoding with a norm is for LayerNorm."""
    model = create_model(name, norm="rmsnorm").eval()
    assert not any(isinstance(m, nn.LayerNorm) for block in blocks(model) for m in (block.norm1, block.norm2))
    block = blocks(model)[0]
    x, grid = model.stem(torch.randn(2, 3, 32, 32))
    block(x, grid)[0].mean().backward()
    assert block.norm1.weight.grad is not None


@pytest.mark.parametrize("name", ["pvt_v2_32px", "transnext_32px"])
def test_activations_behind_a_convolution(name):
    torch.manual_seed(0)
    plain = create_model(name, **SMALL).eval()
    torch.manual_seed(0)
    relu, gelu = (create_model(name, activation=a, **SMALL).eval() for a in ("relu2", "gelu"))
    for model in (relu, gelu):
        model.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(gelu(images), plain(images)) and not torch.allclose(relu(images), plain(images))


def test_deformable_where_the_map_is_only_halved():
    model = create_model("coatnet_32px", num_classes=5, downsample="deformable")
    kinds = [type(stage.downsample).__name__ for stage in model.stages]
    assert kinds == ["MBConvDownsample", "PoolDownsample", "DeformableDownsample"]  # the second has stride 1
    model = create_model("swin_32px", downsample="deformable", **SMALL)
    assert [isinstance(stage.downsample, DeformableDownsample) for stage in model.stages] == [False, True, True, True]
    model.set_gradient_checkpointing(True)
    model.train()(torch.randn(2, 3, 32, 32)).mean().backward()


@pytest.mark.parametrize(
    ("name", "chosen", "text"),
    [
        (
            "dit_s_2",
            {"norm": "rmsnorm"},
            "DiT: its norms take scale and shift from .*, got norm=rmsnorm",
        ),
        (
            "dit_s_2",
            {"wiring": "parallel"},
            "DiT: AdaptiveBlock is no block of two .*, got wiring=parallel; set model.w",
        ),
        ("dit_s_2", {"downsample": "deformable"}, "DiT: nothing between its stages only halves the map"),
        (
            "davit_32px",
            {"wiring": "parallel"},
            "DaViT: its blocks have .* a position encoding between .*, got wir",
        ),
        ("pvt_32px", {"downsample": "deformable"}, "PVT: nothing between its stages only halves the map"),
        (
            "pvt_v2_32px",
            {"activation": "swiglu"},
            "PVTv2: its MLPs have a convolution or norms inside, .*, got activation=s",
        ),
    ],
)
def test_what_a_family_cannot_have(name, chosen, text):
    with pytest.raises(ValueError, match=text):
        create_model(name, **chosen, **({"depth": 1, "dim": 24} if name == "dit_s_2" else {}))


def test_norms_behind_the_branches_are_not_parallel():
    model = create_model("vit_32px", depth=4, dim=32)
    blocks(model)[0].post_norm = True
    with pytest.raises(ValueError, match=r"ViT: the norms of its blocks stand behind .*; set model.wiring=sequential"):
        set_wiring(model, "parallel")


def test_a_dit_takes_activations():
    model = create_model("dit_s_2", activation="swiglu", depth=2, dim=24)
    assert all(type(block.mlp).__name__ == "SwiGLU" for block in blocks(model))


def test_the_norm_of_a_pvt_is_its_last_or_the_kind_of_all():
    last, kind = create_model("pvt_32px", norm="none"), create_model("pvt_32px", norm="rmsnorm")
    assert isinstance(last.norm, nn.Identity) and isinstance(kind.norm, nn.RMSNorm)
    assert any(isinstance(module, nn.RMSNorm) for module in kind.stages.modules())
