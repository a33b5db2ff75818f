"""How kernels are launched: the precision of products."""

from collections.abc import Iterator

import pytest
import torch

from kernels.bench.checking import exact_products
from kernels.device.launch import precision
from kernels.window_attention import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _default_precision() -> Iterator[None]:
    """PyTorch's own settings, whatever the test sets."""
    before = torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = before


def _set(where: object, name: str, value: object):
    return lambda: setattr(where, name, value)


SWITCHES = {
    "nothing": (lambda: None, "ieee"),
    "matmul": (_set(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
    "all backends": (_set(torch.backends, "fp32_precision", "tf32"), "tf32"),
    "all backends, exact": (_set(torch.backends, "fp32_precision", "ieee"), "ieee"),
    "allow_tf32": (_set(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
    "allow_tf32 off": (_set(torch.backends.cuda.matmul, "allow_tf32", False), "ieee"),
    "high": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
}


@pytest.mark.parametrize(("switch", "expected"), SWITCHES.values(), ids=SWITCHES)
def test_float32_is_rounded_where_pytorch_may_round_it(switch, expected):
    switch()
    assert precision(torch.float32) == expected
    assert precision(torch.bfloat16) == precision(torch.float16) == "tf32"
    with exact_products():
        assert precision(torch.float32) == "ieee"
    assert precision(torch.float32) == expected


def test_a_switch_for_all_backends_is_overruled_for_products():
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert precision(torch.float32) == "ieee"


@pytest.mark.parametrize("switch", ["matmul", "allow_tf32"])
def test_an_operation_runs_with_either_switch(switch):
    SWITCHES[switch][0]()
    inputs = cases.OPERATION.inputs(DEVICE, torch.float32, **next(iter(cases.CHECKS.values())))
    cases.OPERATION.run(**inputs).sum().backward()
