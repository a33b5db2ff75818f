"""Follows the launches of interpreted kernels: which argument a pointer comes from, and what is loaded and stored.

Triton's interpreter has one function for each operation on pointers; they are replaced inside `watching` by ones that
pass on where a pointer comes from. It runs a kernel for one program after the other, so that accesses have an order.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from kernels.sanitize.accesses import ATOMIC, UNFILLED, Access, Finding, Launch, Memory

# operations that give a pointer for a pointer
POINTERS = tuple(f"create_{name}" for name in ("addptr", "splat", "broadcast", "expand_dims", "reshape", "bitcast"))
ATOMICS = ("create_atomic_rmw", "create_atomic_cas")
FILLING = 97  # what a GPU may give for a masked load without `other`; NaN for numbers that have one


@contextmanager
def watching() -> Iterator[list[Finding]]:
    """The list has what is wrong with the launches inside, and grows with each of them."""
    watch = _Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    instead = {
        (executor, "__call__"): watch.launch,
        (executor, "_init_args_hst"): watch.arguments,
        (interpreter, "_implicit_cvt"): watch.argument,
        (builder, "create_masked_load"): watch.load,
        (builder, "create_masked_store"): watch.store,
        (builder, "create_barrier"): watch.barrier,
        **{(builder, name): _passing_on for name in POINTERS},
        **{(builder, name): watch.atomic for name in ATOMICS},
    }
    with ExitStack() as stack:
        for (owner, name), made in instead.items():
            stack.enter_context(patch.object(owner, name, made(getattr(owner, name))))
        yield watch.findings


def _passing_on(function):
    @wraps(function)
    def run(builder, *arguments, **options):
        out = function(builder, *arguments, **options)
        memory = next((a.attr["memory"] for a in arguments if "memory" in getattr(a, "attr", ())), None)
        if memory is not None:
            out.attr["memory"] = memory
        return out

    return run


class _Watch:
    """The launch that runs; each method makes the function that stands in for one of the interpreter's."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._launch: Launch | None = None
        self._names: dict[int, str] = {}
        self._program, self._barriers = -1, 0

    def launch(self, function):
        def run(executor, *arguments, **options):
            self._launch, self._program = Launch(executor.fn.__name__), -1
            try:
                return function(executor, *arguments, **options)
            finally:
                self.findings += self._launch.findings()
                self._launch = None

        return run

    def arguments(self, function):
        def run(executor, arguments, options):
            given, named = function(executor, arguments, options)
            self._names = {id(a): name for name, a in (*zip(executor.arg_names, given, strict=False), *named.items())}
            return given, named

        return run

    def argument(self, function):
        def run(argument):
            converted = function(argument)
            if isinstance(argument, Tensor):
                converted.handle.attr["memory"] = Memory(argument, self._names[id(argument)])
            return converted

        return run

    def load(self, function):
        def run(builder, pointers, mask, other, *options):
            there = self._access(builder, pointers, mask)
            if other is None and not there.all():
                self._launch.note(pointers.attr["memory"].name, UNFILLED)
                dtype = interpreter._get_np_dtype(pointers.get_element_ty())
                filling = np.nan if np.issubdtype(dtype, np.floating) else FILLING
                data = np.full(pointers.data.shape, filling, dtype)
                other = interpreter.TensorHandle(data, pointers.get_element_ty())
            return function(builder, pointers, mask, other, *options)

        return run

    def store(self, function):
        def run(builder, pointers, value, mask, *options):
            self._access(builder, pointers, mask, value.data)
            return function(builder, pointers, value, mask, *options)

        return run

    def barrier(self, function):
        def run(builder):
            self._barriers += 1
            return function(builder)

        return run

    def atomic(self, function):
        def run(builder, *arguments, **options):
            pointers = next(a for a in arguments if "memory" in getattr(a, "attr", ()))
            self._launch.note(pointers.attr["memory"].name, ATOMIC)
            return function(builder, *arguments, **options)

        return run

    def _access(self, builder, pointers, mask, stored: np.ndarray | None = None) -> np.ndarray:
        """Keeps a load, or what is stored; where the mask is open."""
        x, y, z = builder.grid_idx
        program = (z << 48) | (y << 24) | x
        if program != self._program:
            self._program, self._barriers = program, 0
        open_ = np.broadcast_to(mask.data, pointers.data.shape).ravel()
        cells = np.flatnonzero(open_)
        width = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        bits = None
        if stored is not None:
            stored = np.ascontiguousarray(np.broadcast_to(stored, pointers.data.shape)).ravel()[cells]
            bits = stored.view(f"u{stored.itemsize}")
        shape, places = self._launch.shape(pointers.data.shape), pointers.data.ravel()[cells]
        access = Access(pointers.attr["memory"], program, self._barriers, shape, places, cells, bits)
        self._launch.add(access, width)
        return open_
