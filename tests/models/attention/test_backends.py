"""The fused kernels inside the mechanisms: same outputs and gradients as in PyTorch, and a line that says what runs."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import kernels
from kernels import dispatch
from models import create_model, list_attentions
from models.attention import Grid, Refused, Site, build, check
from models.attention.agent import agent_attention
from models.attention.aggregated import aggregated_attention
from models.attention.axial import AxialAttention
from models.attention.backend import describe_backend
from models.attention.biases.relative import relative
from models.attention.biformer import BiLevelRoutingAttention, biformer_attention
from models.attention.conv import conv
from models.attention.cores.xca import xca_attention
from models.attention.dual import dual_attention
from models.attention.focused_linear import focused_linear_attention
from models.attention.inline import inline_attention
from models.attention.layouts.grid import grid as dilated
from models.attention.mixers.neighborhood import neighborhood_attention
from models.attention.moh import MoHAttention
from models.attention.multi_window import multi_window_attention
from models.attention.softmax import softmax_attention
from models.attention.weights.clipped import clipped
from models.attention.weights.sigmoid import sigmoid
from models.factory import compose_model, instantiate

SITE = Site(dim=32, num_heads=2, grid=Grid(8, 8), stage=0, block=1, depth=2, kind="hierarchical")
MECHANISMS = {
    "swin": lambda site: softmax_attention(site, window=4, shift=True, relative_position_bias=True),
    "windows without projection bias": lambda site: softmax_attention(site, window=3, qkv_bias=False),
    "channels by cosine": lambda site: xca_attention(site),
    "channels by cosine in windows": lambda site: xca_attention(site, window=4),
    "channel groups": lambda site: dual_attention(site, scale="tokens"),
    "windows with position": lambda site: dual_attention(site._replace(block=0), window=5),
    "agents": lambda site: agent_attention(site, agent_tokens=9),
    "agents in windows": lambda site: agent_attention(site, agent_tokens=[2, 3], window=4, bias=False, kernel_size=5),
    "focused": lambda site: focused_linear_attention(site, power=4, lepe=True),
    "focused in windows": lambda site: focused_linear_attention(site, window=4),
    "routed": lambda site: BiLevelRoutingAttention(site, num_regions=3, topk=2),
    "routed, the other padding": lambda site: BiLevelRoutingAttention(site, num_regions=3, topk=2, padding="qkv"),
    "routed, no lepe": lambda site: BiLevelRoutingAttention(site, num_regions=2, topk=1, lepe_kernel=0, qk_dim=16),
    # 2 of 3: with one active head its gate is 1, and the router's gradient is the rounding of zero
    "heads routed": lambda site: MoHAttention(
        site._replace(num_heads=4), core=softmax_attention, shared_heads=1, routed_heads=2
    ),
    "heads of agents routed": lambda site: MoHAttention(
        site._replace(num_heads=4), core=agent_attention, shared_heads=1, routed_heads=2
    ),
    "agents in stripes": lambda site: agent_attention(site, agent_tokens=[2, 2], stripe=3),
    "focused in stripes": lambda site: focused_linear_attention(site, stripe=2),
    "inline": lambda site: inline_attention(site, lepe=True),
    "inline in windows": lambda site: inline_attention(site, window=4),
    "inline in stripes": lambda site: inline_attention(site, stripe=3, lepe=True),
    "inline without residual": lambda site: inline_attention(site, residual=False),
    "windows of each head": lambda site: multi_window_attention(site, windows=[3, 4], shift=True),
    "neighborhoods": lambda site: neighborhood_attention(site, kernel=3, dilation=2),
    "sigmoid weights": lambda site: softmax_attention(site, weights=lambda s: sigmoid(s, bias="learned")),
    "sigmoid weights in windows": lambda site: softmax_attention(
        site, weights=lambda s: sigmoid(s, bias="tokens", temperature=0.5), layout=partial(dilated, size=3)
    ),
    "clipped weights": lambda site: softmax_attention(site, weights=clipped),
    "heads of sigmoid weights routed": lambda site: MoHAttention(
        site._replace(num_heads=4), core=partial(softmax_attention, weights=sigmoid), shared_heads=1, routed_heads=2
    ),
    "completed neighborhoods": lambda site: neighborhood_attention(site, kernel=[7, 3], stride=[2, 1]),
    "heads in neighborhoods routed": lambda site: MoHAttention(
        site._replace(num_heads=4),
        core=lambda site: neighborhood_attention(site, kernel=3, relative_position_bias=False),
        shared_heads=1,
        routed_heads=2,
    ),
    "axes": AxialAttention,
    "conv": conv,
    "heads of neighbours routed": lambda site: MoHAttention(
        site._replace(num_heads=4),
        core=lambda site: aggregated_attention(site, sr_ratio=4, hidden=8),
        shared_heads=1,
        routed_heads=2,
    ),
    "heads routed by a bias": lambda site: MoHAttention(
        site._replace(num_heads=4), core=softmax_attention, shared_heads=1, routed_heads=2, balance="bias"
    ),
    "heads routed by their queries": lambda site: MoHAttention(
        site._replace(num_heads=4), core=softmax_attention, shared_heads=1, routed_heads=2, router="l2"
    ),
}


def outcome(mixer: nn.Module, x: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Output, losses and every gradient of one training step."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    mixed = mixer.train()(x, grid)
    total = (mixed.x * torch.randn(mixed.x.shape)).sum() + sum(mixed.losses.values())
    leaves = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"output": mixed.x.detach(), **{k: v.detach() for k, v in mixed.losses.items()}, **named}


def assert_same(fused: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """2e-5 of the norm: float32 through two projections and the sums over all tokens that weight gradients are."""
    assert fused.keys() == plain.keys()
    errors = {key: ((fused[key] - value).norm() / value.norm()).item() for key, value in plain.items()}
    assert max(errors.values()) < 2e-5, errors


def randomised(mixer: nn.Module) -> nn.Module:
    """No parameter stays at an initial zero, which would hide what it does."""
    torch.manual_seed(0)
    for p in mixer.parameters():
        nn.init.normal_(p, std=0.3)
    return mixer


def quick(names, chosen) -> list:
    """Test cases; interpreted, each takes seconds, so all but the chosen are for `make test-all`."""
    return [pytest.param(name, marks=[] if name in chosen else pytest.mark.full) for name in names]


# the same kernels in another layout, or a second router: the slowest of them
ALIKE = {
    *("agents in windows", "focused in windows", "focused in stripes", "inline in windows", "inline in stripes"),
    *("heads of neighbours routed", "routed, no lepe", "windows of each head", "axes"),
    *("agents in stripes", "heads of agents routed", "neighborhoods", "heads in neighborhoods routed"),
    *("sigmoid weights in windows", "heads of sigmoid weights routed"),
}


@pytest.mark.fused
@pytest.mark.parametrize("name", quick(MECHANISMS, MECHANISMS.keys() - ALIKE))
@pytest.mark.parametrize(
    "grid", [pytest.param(Grid(8, 8), id="8x8", marks=pytest.mark.full), pytest.param(Grid(5, 7), id="5x7")]
)
def test_the_backend_changes_nothing_beyond_rounding(name, grid):
    (mixer,) = build(MECHANISMS[name], [SITE])
    assert mixer.runs().fused
    randomised(mixer)
    x = torch.randn(2, grid.tokens, 32)
    fused = outcome(mixer, x, grid)
    with kernels.reference():
        plain = outcome(mixer, x, grid)
    assert_same(fused, plain)


@pytest.mark.fused
@pytest.mark.parametrize("name", ["channel groups", "agents", "focused", "inline", "heads routed"])
def test_class_tokens_take_the_same_path(name):
    site = SITE._replace(grid=Grid(6, 6, prefix=1), kind="vit")
    mixer = randomised(MECHANISMS[name](site))
    x = torch.randn(2, site.grid.tokens, 32)
    mixer = getattr(mixer, "mixer", mixer) if name == "channel groups" else mixer
    fused = outcome(mixer, x, site.grid)
    with kernels.reference():
        plain = outcome(mixer, x, site.grid)
    assert_same(fused, plain)


@pytest.mark.fused
@pytest.mark.parametrize("attention", quick(list_attentions(), ["dual", "moh", "window"]))
def test_whole_models_agree(attention):
    torch.manual_seed(0)
    model = create_model("coatnet_32px", attention=attention, num_classes=10).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fused = model(images)
        with kernels.reference():
            plain = model(images)
    assert (fused - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.fused
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        pytest.param("biformer_tiny", [1, 2, 2, 4], marks=pytest.mark.full),
        pytest.param("biformer_stl_nchw", [1, 2, 2, 4], marks=pytest.mark.full),
        pytest.param("davit_tiny", [1, 1, 2, 2], marks=pytest.mark.full),
    ],
)
def test_models_of_the_papers_agree(name, heads):
    """With every kernel they use, also position encoding and norm in one; outputs and all gradients."""
    torch.manual_seed(0)
    model = create_model(name, dims=[16, 32, 32, 64], depths=[1, 1, 1, 1], num_heads=heads, num_classes=5).eval()
    images, results = torch.randn(1, 3, 64, 72), []
    for context in (kernels.reference(), nullcontext()):
        with context:
            logits = model(images)
            gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for plain, fused in zip(*results, strict=True):
        assert (fused - plain).norm() <= 1e-4 * plain.norm() + 1e-9


@pytest.mark.fused
@pytest.mark.parametrize(
    "name",
    quick(
        [
            *("swin", "channel groups", "agents", "focused", "routed", "heads routed", "conv"),
            *("sigmoid weights", "sigmoid weights in windows", "clipped weights"),
        ],
        ["swin", "heads routed"],
    ),
)
def test_autocast_agrees(name):
    """The two paths round at different places; bfloat16 carries not quite 3 digits."""
    mixer = randomised(MECHANISMS[name](SITE)).eval()
    x = torch.randn(2, 64, 32)
    with torch.no_grad():
        exact = mixer(x, SITE.grid).x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused = mixer(x, SITE.grid).x
            with kernels.reference():
                plain = mixer(x, SITE.grid).x
    assert fused.dtype == plain.dtype
    assert (fused - exact).norm() < max(2 * (plain - exact).norm().item(), 0.01 * exact.norm().item())


@pytest.mark.parametrize("name", list_attentions())
def test_every_yaml_has_the_key(name):
    attention = compose_model("vit_32px", name).attention
    assert attention.backend == "auto"
    factory = instantiate({**attention, "backend": "cuda"})
    with pytest.raises(ValueError, match=r"backend=cuda is unknown; set attention.backend to auto, triton, torch"):
        build(factory, [SITE])


def test_what_has_no_kernel_is_refused_when_triton_is_asked_for():
    cases = {
        "PyTorch's own fused kernel": softmax_attention(SITE, backend="triton"),
        "keys come from a map of another size": agent_attention(SITE, agent_tokens=4, sr_ratio=2, backend="triton"),
        "its windows are masked": softmax_attention(SITE, weights=sigmoid, window=4, shift=True, backend="triton"),
        "written out for SigmoidWeights": softmax_attention(SITE, weights=sigmoid, bias=relative, backend="triton"),
        "written out for ClippedSoftmax": softmax_attention(SITE, weights=clipped, qk_norm=True, backend="triton"),
        "dense attention is PyTorch's own": biformer_attention(SITE, topk="all", backend="triton"),
        "up to 7x7": conv(SITE, kernel_size=9, backend="triton"),
        "wider than 128 channels": dual_attention(SITE._replace(dim=512), backend="triton"),
        "at most 256 agents": agent_attention(SITE._replace(grid=Grid(20, 20)), agent_tokens=289, backend="triton"),
        "at most 1024 regions": BiLevelRoutingAttention(SITE, num_regions=40, backend="triton"),
    }
    for reason, mixer in cases.items():
        with pytest.raises(Refused, match=rf"has no Triton kernel: .*{reason}.*; set attention.backend=auto"):
            check(mixer, SITE)


def test_the_line_says_what_runs_where(monkeypatch):
    model = create_model("swin_32px", attention="dual", num_classes=10)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("models.attention.backend.INTERPRETED", False)
    assert describe_backend(model, cpu) == "attention in PyTorch: Triton kernels run on CUDA devices, this is a CPU"
    line = describe_backend(model, cuda)
    assert "window_attention in Triton (" in line and "channel_attention in Triton (" in line
    plain = create_model("vit_32px", num_classes=10)
    assert describe_backend(plain, cuda) == (
        "attention: scaled_dot_product_attention in PyTorch (dense attention is PyTorch's own fused kernel)"
    )
    forced = nn.Sequential(dual_attention(SITE, backend="triton"))
    with pytest.raises(ValueError, match=r"attention.backend=triton: Triton kernels run on CUDA devices, got cpu"):
        describe_backend(forced, cpu)
    assert "(attention.backend=torch)" in describe_backend(nn.Sequential(dual_attention(SITE, backend="torch")), cuda)


def test_a_gpu_backend_on_a_cpu_is_one_error(command):
    if torch.cuda.is_available() or dispatch.INTERPRETED:
        pytest.skip("the device could run the kernels")
    status, _, errors = command("train", "attention=dual", "attention.backend=triton", "logger=none")
    assert status == 2 and "set attention.backend=auto" in errors
