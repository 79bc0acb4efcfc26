"""Spare Triton's interpreter work that changes no number, and takes four fifths of its time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from triton.language import core, semantic
from triton.runtime import interpreter


class _Memory:
    """Values in memory from an address on, as NumPy takes them for an array."""

    def __init__(self, first: int, count: int, dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {"data": (first, True), "shape": (count,), "typestr": dtype.str, "version": 3}


def hasten() -> None:
    """Replace what the interpreter does again and again, for this process."""
    _hasten_calls()
    _hasten_values()
    _hasten_operators()
    interpreter._interpreter.load = _load


def _hasten_calls() -> None:
    """In each call of a device function it looks through triton.language again for what it put there at the first."""
    function = interpreter.InterpretedFunction
    first_call, called = function.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self in called:
            return self.rewrite()(*args, **kwargs)
        called.add(self)
        return first_call(self, *args, **kwargs)

    function.__call__ = call


def _hasten_values() -> None:
    """For every value it checks and wraps a shape that it has met before, and builds a table to look up one dtype."""
    first_type, first_tensor, first_dtype = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    types: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    tensors: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    dtypes: dict[str, Any] = {}

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        if (key := tuple(shape)) not in types:
            first_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, words = types[key]
        self.name = f"<{words}, {element_ty}>"

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        if (key := tuple(type.shape) if type.is_block() else ()) not in tensors:
            first_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    def look_up(dtype: Any) -> Any:
        if (name := dtype.scalar.name) not in dtypes:
            dtypes[name] = first_dtype(dtype)
        return dtypes[name]

    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = make_type, make_tensor, look_up


def _hasten_operators() -> None:
    """For every operation it works out again which shape and dtype come of two, also where they are the same.

    And for every sum and product of integers whether they overflow, for an assertion that it leaves out (its option
    ``debug`` is off).
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    semantics = semantic.TritonSemantic
    first_broadcast, first_result = semantics.broadcast_impl_value, semantics.computation_type_impl
    first_check = semantics.binary_op_type_checking_impl
    results: dict[tuple[Any, ...], Any] = {}
    # The result has the dtype of both operands; of floats, not where they are divided, which further arguments say.
    integers = {id(dtype) for dtype in (core.int1, core.int32, core.int64)}
    floats = {id(dtype) for dtype in (core.float32, core.float64)}

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if lhs.shape is rhs.shape else first_broadcast(self, lhs, rhs)

    def result(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, divides: bool) -> Any:
        if (key := (a.name, a_is_scalar, b.name, b_is_scalar, divides)) not in results:
            results[key] = first_result(self, a, a_is_scalar, b, b_is_scalar, divides)
        return results[key]

    def check(self: Any, lhs: Any, rhs: Any, *how: bool, **more: bool) -> tuple[Any, Any]:
        dtype = getattr(lhs, "dtype", None)
        if id(dtype) in integers or (id(dtype) in floats and len(how) < 3 and not more):
            if dtype is getattr(rhs, "dtype", None):
                return self.broadcast_impl_value(lhs, rhs)
            if dtype is core.int32 and type(rhs) is int and -(2**31) <= rhs < 2**31:
                return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, dtype))
        return first_check(self, lhs, rhs, *how, **more)

    semantics.broadcast_impl_value, semantics.computation_type_impl = broadcast, result
    semantics.binary_op_type_checking_impl = check


def _load(addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
    """Load what it loads element by element, each behind the checks of three arrays' bounds."""
    dtype = np.dtype(dtype)
    loaded = other.astype(dtype)
    if mask.any():
        reached = addresses[mask]
        first = reached.min()
        places = (reached - first) // np.uint64(dtype.itemsize)
        loaded[mask] = np.asarray(_Memory(int(first), int(places.max()) + 1, dtype))[places]
    return loaded
