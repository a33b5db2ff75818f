"""A trained model gets head gates: exactly its function where all heads stay active, and the start of a run."""

import pytest
import timm
import torch
from torch import nn

from models import create_model, list_attentions
from models.attention import mixers_of, to_moh
from models.attention.moh import MoHAttention, active_heads, balance_heads
from models.surgery.dense_to_moh import gated_weights

SMALL = {"num_classes": 10, "num_heads": 8}


def model(name: str = "vit_32px", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **SMALL | settings).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", [name for name in list_attentions() if name != "moh"])
@torch.no_grad()
def test_with_all_heads_active_the_function_stays(attention: str) -> None:
    dense = model(attention=attention)
    before, mixers = dense(images()), [mixer for _, mixer in mixers_of(dense)]
    if not mixers[0].accepts.gates:
        with pytest.raises(ValueError, match=f"moh cannot gate the heads of .*: {mixers[0].accepts.without_gates}; ch"):
            to_moh(dense, 2, 6)
        return
    names = to_moh(dense, 2, 6)
    assert names and all(isinstance(dense.get_submodule(name), MoHAttention) for name in names)
    assert active_heads(dense) == 1.0 and not dense.training
    torch.testing.assert_close(dense(images()), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"router": "l2"}, {"router": "softmax", "balance": "bias"}])
def test_fewer_heads_train_on(options: dict) -> None:
    dense = model()
    before, count = dense(images()), sum(p.numel() for p in dense.parameters())
    kept = {id(p) for p in dense.parameters()}
    to_moh(dense, 2, 3, **options)
    assert kept <= {id(p) for p in dense.parameters()}
    assert active_heads(dense) == 5 / 8
    assert not torch.allclose(dense(images()), before)
    added = sum(p.numel() for p in dense.parameters()) - count
    assert added == (0 if "l2" in options.values() else 4 * (6 + 2 + 2) * 96)
    logits, losses = dense.train()(images(), return_losses=True)
    assert set(losses) == (set() if "bias" in options.values() else {"load_balance"})
    (logits.square().mean() + sum(loss.mean() for loss in losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in dense.parameters())


def test_gates_begin_near_one_and_not_all_tokens_choose_alike() -> None:
    dense = model()
    module = dense.get_submodule(to_moh(dense, 2, 3)[0])
    gates = module.router(torch.randn(2, 16, 96))[0].detach()
    torch.testing.assert_close(gates[..., :2], torch.ones(2, 16, 2))
    assert gates[..., 2:].sum(-1).mean() == pytest.approx(3.0)
    load = (gates[..., 2:] != 0).float().mean((0, 1))
    assert load.min() > 0 and load.max() < 1


def test_some_places_and_lists() -> None:
    dense = model()
    names = to_moh(dense, 4, 2, where=lambda site: site.block > 0)
    assert active_heads(dense) == 6 / 8
    assert len(names) == 3
    swin = model("swin_32px", num_heads=[2, 4, 8, 16])
    to_moh(swin, [2, 4, 3, 4], [0, 0, 3, 8])
    assert [m.router.routed for m in swin.modules() if isinstance(m, MoHAttention)] == [0, 0, 0, 0, 3, 3, 8, 8]
    assert active_heads(swin) == 2 * (2 + 4 + 6 + 12) / 60


def test_balancing_in_a_loop_of_ones_own() -> None:
    dense = model()
    to_moh(dense, 2, 3, balance="bias")
    dense.train()(images())
    balance_heads(dense)
    assert all(m.router.bias.abs().max() > 0 for m in dense.modules() if isinstance(m, MoHAttention))


def test_errors_leave_the_model_as_it_is() -> None:
    dense = model()
    names = [name for name, _ in dense.named_parameters()]
    with pytest.raises(ValueError, match="6 shared and 3 routed heads are more than the 8 heads") as error:
        to_moh(dense, 6, 3)
    assert "stage 0 blocks 0-" in str(error.value)
    with pytest.raises(ValueError, match="to_moh: where must choose a place, got none of"):
        to_moh(dense, 2, 3, where=lambda site: False)
    assert names == [name for name, _ in dense.named_parameters()]
    assert not any(getattr(module, "gated", False) for module in dense.modules())
    to_moh(dense, 2, 3)
    with pytest.raises(ValueError, match="the model must have no head gates, got some in stages"):
        to_moh(dense, 2, 3)
    with pytest.raises(ValueError, match=r"got VisionTransformer; give a model of timm to .*replace"):
        to_moh(timm.create_model("vit_tiny_patch16_224", img_size=32), 1, 1)


@torch.no_grad()
def test_weights_of_a_dense_model_start_a_gated_one() -> None:
    dense, gated = model(), model(attention="moh", shared_heads=2, routed_heads=6)
    state = gated_weights(dense.state_dict(), gated)
    gated.load_state_dict(state)
    torch.testing.assert_close(gated(images()), dense(images()), rtol=1e-5, atol=1e-6)
    assert gated_weights(gated.state_dict(), gated) is None
    assert gated_weights(dense.state_dict(), dense) is None
