"""Makes an operator of a launch function: visible to torch.compile, fake tensors, export and FLOP counters.

`torch.library.Library.define` and `impl` with one `autograd.Function` outside is the cheapest boundary that has all of
these: `custom_op` with `register_autograd` costs two to three times the time per call on the host.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "vision_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_launching = False


@contextmanager
def launching_fakes() -> Iterator[None]:
    """Fake tensors reach the launch functions inside, so that `kernels.compile` sees what would be launched."""
    global _launching
    _launching = True
    try:
        yield
    finally:
        _launching = False


def define(schema: str, launch: Callable, fake: Callable, flops: Callable) -> torch._ops.OpOverload:
    """The operator `schema` describes, e.g. "window_forward(Tensor qkv, int heads) -> (Tensor, Tensor)".

    Args:
        schema: name, arguments and results. Functional: no argument is changed, and no result aliases an argument.
        launch: computes it with Triton. Operations of PyTorch in it must not be ones that autocast changes.
        fake: empty results of the right shapes, dtypes and strides.
        flops: `(*shapes of the tensor arguments and the other arguments, out_shape=...) -> int`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):  # CPU: only ever reached when the kernels are interpreted
        LIBRARY.impl(name, launch, key)

    def fake_or_launch(*arguments):
        return (launch if _launching else fake)(*arguments)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_or_launch, lib=LIBRARY)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(packet)(flops)
    return packet.default


def differentiable(
    forward_op: torch._ops.OpOverload,
    backward_op: torch._ops.OpOverload,
    keep: Callable[..., tuple],
    outputs: int = 1,
    *,
    selective: bool = False,
) -> Callable:
    """`forward_op` with its derivative, to be called with the same arguments.

    Args:
        forward_op: an operator whose first arguments are those that have a gradient.
        backward_op: gives their gradients, in their order, from those of the outputs and what was kept; what it gives
            for an argument that needs none is dropped. With several outputs it takes None for those of which nothing
            was used.
        keep: `(arguments, results of forward_op) -> arguments of backward_op` after the gradients of the outputs.
        outputs: how many of the results are returned; the others are there to be kept.
        selective: the last argument of backward_op says of every gradient whether it is needed, and it may give an
            empty tensor for one that is not.
    """
    gradients_of = len(backward_op._schema.returns)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            results = forward_op(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            kept = keep(arguments, results)
            ctx.save_for_backward(*(k if isinstance(k, Tensor) else None for k in kept))
            ctx.others = tuple(None if isinstance(k, Tensor) else k for k in kept)
            ctx.set_materialize_grads(False)
            return results[0] if outputs == 1 else results[:outputs]

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *gradients):
            none = [None] * len(ctx.needs_input_grad)
            if all(g is None for g in gradients):
                return tuple(none)
            kept = (other if t is None else t for t, other in zip(ctx.saved_tensors, ctx.others, strict=True))
            needed = list(ctx.needs_input_grad[:gradients_of])
            found = backward_op(*gradients, *kept, *([needed] if selective else []))
            found = found if isinstance(found, tuple) else (found,)
            return *(g if wanted else None for g, wanted in zip(found, needed, strict=True)), *none[gradients_of:]

    return Differentiable.apply
