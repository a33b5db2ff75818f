"""Lambda layers against timm's module and the explicit matrices of positions; what they cost, and what they refuse."""

import pytest
import torch
from timm.layers.lambda_layer import LambdaLayer
from torch.utils.flop_counter import FlopCounterMode

from models.attention import Grid, Refused, Site
from models.attention.lambda_conv import LambdaConv

MAP = Grid(5, 7)
SITE = Site(dim=24, num_heads=2, grid=MAP, stage=0, block=0, depth=2, kind="convnet")


def made(**options: object) -> LambdaConv:
    torch.manual_seed(0)
    mixer = LambdaConv(SITE, key_dim=4, kernel_size=3, **options).double().eval()
    for name, value in mixer.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("running_var") else 0.5 * torch.randn_like(value))
    return mixer


def tokens(batch: int = 2, grid: Grid = MAP) -> torch.Tensor:
    return torch.randn(batch, grid.tokens, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_equals_timm() -> None:
    """Output and gradients, in training mode too, where batch norms see the tokens of all images."""
    ours, theirs = made(), LambdaLayer(24, num_heads=2, dim_head=4, r=3).double().eval()
    state = {
        key.replace(".bn.", ".").replace("position.conv", "conv_lambda"): v for key, v in ours.state_dict().items()
    }
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    theirs.load_state_dict({key: value.reshape(shapes[key]) for key, value in state.items()})
    for training in (False, True):
        x = tokens().requires_grad_()
        output = ours.train(training)(x, MAP).x
        expected = theirs.train(training)(x.mT.unflatten(2, MAP[:2])).flatten(2).mT
        torch.testing.assert_close(output, expected)
        found = torch.autograd.grad(output.square().sum(), [x, ours.qkv.weight, ours.position.conv.weight])
        wanted = torch.autograd.grad(expected.square().sum(), [x, theirs.qkv.weight, theirs.conv_lambda.weight])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b.reshape(a.shape))


def test_equals_the_matrices_of_positions() -> None:
    """E_nm of every pair of tokens, written out."""
    mixer, x, r = made(), tokens(), 1
    q, k, v = mixer.qkv(x).split(mixer.dims, dim=-1)
    q, v = mixer.norm_q(q).unflatten(-1, (2, 4)), mixer.norm_v(v)
    filters, bias = mixer.position.conv.weight[:, 0], mixer.position.conv.bias
    places = torch.cartesian_prod(torch.arange(MAP.height), torch.arange(MAP.width))
    offsets = places[None] - places[:, None]  # (N, S, 2): of the value less that of the query
    near = (offsets.abs() <= r).all(-1)
    index = offsets.clamp(-r, r) + r
    embedded = filters[:, index[..., 0], index[..., 1]] * near  # (K, N, S)
    lambdas = torch.einsum("kns,bsv->bnkv", embedded, v) + bias[:, None]
    lambdas = lambdas + torch.einsum("bsk,bsv->bkv", k.softmax(1), v)[:, None]
    expected = torch.einsum("bnmk,bnkv->bnmv", q, lambdas).flatten(2)
    torch.testing.assert_close(mixer(x, MAP).x, expected)


def test_without_positions_tokens_are_a_set() -> None:
    mixer, x, order = made(), tokens(), torch.randperm(MAP.tokens)
    assert not torch.allclose(mixer(x[:, order], MAP).x, mixer(x, MAP).x[:, order])
    torch.nn.init.zeros_(mixer.position.conv.weight)
    torch.testing.assert_close(mixer(x[:, order], MAP).x, mixer(x, MAP).x[:, order])


def test_its_cost_is_linear_in_tokens() -> None:
    counts = []
    for grid in (Grid(8, 8), Grid(16, 16)):
        with FlopCounterMode(display=False) as counter:
            made()(tokens(1, grid), grid)
        counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0]


def test_gates_weight_the_channels_of_a_head() -> None:
    mixer, x = made(), tokens()
    gates = torch.rand(2, MAP.tokens, 2, dtype=torch.double)
    expected = mixer(x, MAP).x.unflatten(-1, (2, 12)) * gates[..., None]
    torch.testing.assert_close(mixer(x, MAP, gates).x, expected.flatten(2))


def test_a_projection_can_be_had() -> None:
    assert isinstance(made(output_projection=True).proj, torch.nn.Linear)
    assert made(qkv_bias=True).qkv.bias.shape == (2 * 4 + 4 + 12,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dim": 0}, r"lambda_conv: key_dim must be a whole number of at least 1, got 0; set attention.key_dim"),
        ({"kernel_size": 4}, r"lambda_conv: kernel_size must be odd and positive, got 4; set attention.kernel_size"),
        ({"qkv_bias": 1}, r"lambda_conv: qkv_bias must be true or false, got 1; set attention.qkv_bias=true or false"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LambdaConv(SITE, **options)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(Refused, match=r"24 channels do not divide into 5 heads; change model.num_heads"):
        LambdaConv(SITE._replace(num_heads=5))
