"""Every family, and every part that keeps tensors: made elsewhere, copied, cast, exported, without images.

Found are tensors beside parameters and buffers, buffers that no file has, and what is kept from one call to the next.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conf import families
from models import create_model
from models.reparam import is_reparametrised

DIT = {"model": "dit_s_2", "image_size": 32, "depth": 2}
# in a ViT: what is made from sizes alone, or moves in training
PARTS = {
    "alibi": {"bias": "alibi"},
    "relative": {"bias": "relative"},
    "soft_mask": {"factor": "soft_mask"},
    "rope": {"transform": "rope"},
    "hedgehog": {"attention": "hedgehog"},
    "multi_window": {"attention": "multi_window", "model": "coatnet_32px"},
    "moh": {"attention": "moh", "balance": "bias"},
    "routing": {"attention": "routing", "model": "coatnet_32px"},
    "sigma": {"reparam": "sigma"},
}
CASES = {**{name: {"model": name} for name in families.small()}, "dit": DIT, **PARTS}
FEW = ("swin_32px", "rope", "moh")  # the others with `make test-all`
each = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in FEW else [pytest.mark.full]) for name in CASES]
)


def make(case: str) -> nn.Module:
    torch.manual_seed(0)
    settings = dict(CASES[case])
    settings = {"model": "vit_32px"} | ({} if "model" in settings else {"attention": "softmax"}) | settings
    return create_model(settings.pop("model"), settings.pop("attention", None), num_classes=5, **settings).eval()


def inputs(model: nn.Module, batch: int = 2, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    made = torch.Generator().manual_seed(batch)
    if not getattr(model, "generates", False):
        return (torch.randn(batch, 3, 32, 32, generator=made).to(dtype),)
    latents, numbers = torch.randn(batch, 4, 4, 4, generator=made).to(dtype), torch.arange(batch)
    return latents, numbers + 3, numbers


def moved(model: nn.Module) -> nn.Module:
    """With parameters away from their start, where zeros hide much."""
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=made)
    return model


@pytest.fixture
def usual(case):
    return moved(make(case))


def check_same(model: nn.Module, usual: nn.Module, atol: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs(usual)), usual(*inputs(usual)), rtol=1e-4, atol=atol)


@each
@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_made_on_the_meta_device(case, how, usual):
    """It computes what the usual one does, and it trains; memory that nobody filled is poisoned."""
    with torch.device("meta"):
        model = make(case)
    if how == "to_empty":
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(torch.nan if tensor.is_floating_point() else 10**9)
    model.load_state_dict(copy.deepcopy(usual.state_dict()), assign=how == "assign")
    check_same(model, usual)
    model.train()(*inputs(usual)).sum().backward()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@each
def test_a_copy_and_a_pickle_are_alike_and_apart(case, usual):
    alike = [copy.deepcopy(usual)]
    if not is_reparametrised(usual):  # which PyTorch does not pickle
        alike.append(pickle.loads(pickle.dumps(usual)))
    for model in alike:
        check_same(model, usual)
        own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
        theirs = {tensor.data_ptr() for tensor in (*usual.parameters(), *usual.buffers()) if tensor.numel()}
        assert not own & theirs


@each
def test_in_another_precision(case, usual):
    """Wider weights give the same function; halves of them compute and train in theirs."""
    with torch.no_grad():
        wide = copy.deepcopy(usual).double()(*inputs(usual, dtype=torch.double))
        assert wide.dtype == torch.double
        torch.testing.assert_close(wide.float(), usual(*inputs(usual)), rtol=1e-2, atol=1e-4)
    half = copy.deepcopy(usual).bfloat16()
    logits = half(*inputs(usual, dtype=torch.bfloat16))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    logits.float().sum().backward()


@each
def test_on_another_device(case, usual):
    """The meta device refuses every tensor that stayed behind."""
    usual.to("meta")(*(tensor.to("meta") for tensor in inputs(usual)))


@each
def test_trains_after_inference_mode(case, usual):
    """Nothing that was made in it is kept for the backward pass."""
    with torch.inference_mode():
        usual(*inputs(usual))
    usual.train()(*inputs(usual)).sum().backward()


@each
def test_no_images(case, usual):
    with torch.no_grad():
        logits = usual(*inputs(usual, batch=0))
        assert logits.shape == (0, *usual(*inputs(usual)).shape[1:])


@each
def test_computes_after_fake_tensors(case, usual):
    """What tracers make of a model is not kept for it, nor for others."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        usual(*(mode.from_tensor(tensor) for tensor in inputs(usual)))
    check_same(moved(make(case)), usual)
    assert type(usual(*inputs(usual))) is Tensor


@pytest.mark.full
@pytest.mark.parametrize("case", ["swin_32px", "dit", *PARTS])  # the other families are exported to ONNX, so as well
def test_exported_with_any_batch(case, usual):
    """The program computes what the model does; afterwards the model, and others like it, still compute."""
    batch = torch.export.Dim("batch", min=1, max=64)
    given = inputs(usual)
    program = torch.export.export(usual, given, dynamic_shapes=tuple({0: batch} for _ in given)).module()
    with torch.no_grad():
        three = inputs(usual, batch=3)
        torch.testing.assert_close(program(*three), usual(*three), rtol=1e-4, atol=1e-5)
    check_same(moved(make(case)), usual)
