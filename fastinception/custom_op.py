"""What the operators of this package share: how they are defined, the strides that they promise, their derivatives."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
# What it registers lives as long as it, past a reload of this module.
_LIBRARY = globals().get("_LIBRARY") or torch.library.Library("fastinception", "FRAGMENT")
# The dispatcher's keys of a call of plain tensors that nothing watches, neither mode nor transform nor trace.
_UNWATCHED = ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "BackendSelect")
_KEYS = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in _UNWATCHED]
_WATCHED = ~functools.reduce(operator.or_, _KEYS)  # all others


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define ``torch.ops.fastinception.<name>``.

    By ``torch.library.register_autograd`` each call of a compiled graph, which records no gradient, would go through
    Python and the dispatcher once more, which takes the host 5 to 10 us.

    Args:
        name: the operator's.
        schema: its arguments and results, as ``torch.library.define`` takes them.
        run: what computes it on every device.
        fake: what allocates the results.
        backward, setup_context: its derivative, as ``torch.library.register_autograd`` takes them; what ``backward``
            returns for arguments beyond those that were passed must be None.
    """
    qualified = f"fastinception::{name}"
    torch.library.define(qualified, schema, tags=_TAGS)
    torch.library.impl(qualified, "default")(run)
    torch.library.register_fake(qualified, fake)
    if backward is not None and setup_context is not None:
        call = _differentiable(name, run, backward, setup_context)
        _LIBRARY.impl(name, call, "Autograd", with_keyset=True)


def _differentiable(
    name: str, run: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Return what records an operator's derivative where one is wanted, and else only calls it."""
    overload = getattr(torch.ops.fastinception, name).default

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        results = below(*args)
        setup_context(ctx, args, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"fastinception_{name}_", (torch.autograd.Function,), methods)  # PyTorch appends Backward

    def call(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if is_recorded(t for t in args if isinstance(t, Tensor)):
            return function.apply(*args)
        return below(*args) if keys.raw_repr() & _WATCHED else run(*args)

    return call


def is_recorded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether autograd records what is computed of ``tensors``."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def memory_format(t: Tensor) -> torch.memory_format:
    """Return the format as which PyTorch's convolutions read ``t``: the strides decide, whether it is dense or not.

    C++'s ``Tensor.suggest_memory_format``, whose copy in ``torch._prims_common`` imports SymPy at the first call, which
    takes most of a second.
    """
    sizes, strides, least = t.shape, t.stride(), 1
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return torch.contiguous_format  # the last: one pixel, with the strides of contiguous
        least = strides[dim] * sizes[dim]
    return torch.channels_last


def _nothing(like: Tensor) -> Tensor:
    """Return what stands for a tensor that an operator has to return and does not compute."""
    return torch.empty(0, dtype=like.dtype, device=like.device)


def as_promised(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``result`` with the strides that the fake has, and memory of its own.

    It lacks them where a size of 1 leaves channels_last open, and where a gradient is a slice of a merged one.
    """
    if result.untyped_storage().nbytes() == result.nbytes:
        if result.stride() == strides:
            return result
        sizes = zip(result.shape, result.stride(), strides, strict=True)
        if all(size == 1 or own == promised for size, own, promised in sizes):
            return result.as_strided(result.shape, strides)
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)


def empty_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Allocate each gradient with its input's strides, if it is dense; what is not needed is an empty tensor."""
    return tuple(torch.empty_like(t) if need else _nothing(t) for t, need in zip(inputs, needs, strict=True))


def finish(grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients with the strides that ``empty_gradients`` promises, and memory of their own."""
    results = list(grads)
    for i, (grad, t) in enumerate(zip(grads, inputs, strict=True)):
        if grad is not None:
            dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
            results[i] = as_promised(grad, t.stride() if dense else torch.empty_like(t, device="meta").stride())
    return results


def without_none(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Return what an operator may: an empty tensor for each that is not needed."""
    return tuple([_nothing(like) if result is None else result for result in results])


def needed(ctx: Any, count: int) -> list[bool]:
    """Return which of the gradients of a function's first ``count`` tensors the running backward has a use for.

    ``ctx.needs_input_grad`` tells what requires one; of these ``torch.autograd.grad(y, x)`` leads to x's alone. Takes
    about 5 us, and 30 more for each of two leaves whose gradients are asked for by name.
    """
    nodes = [node for node, _ in ctx.next_functions[:count]]
    nodes += [None] * (count - len(nodes))  # what is None has no node
    required = [node is not None for node in nodes]
    if torch.compiler.is_compiling():  # compiled autograd traces this, and no node of another function
        return required
    found, named, runs = list(required), 0, torch._C._will_engine_execute_node
    for i, node in enumerate(nodes):
        if node is not None:
            try:
                found[i] = runs(node)
            except RuntimeError:  # a leaf that was asked for by name
                named += 1
                if named == 2:  # who asks for two will ask for most, and an exception takes its time
                    break
    return found if any(found) else required  # run by hand in another graph's backward, which knows nothing of these


def differentiate_twice(ctx: Any, grads: Sequence[Tensor], backward: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    """Return the derivative of a backward operator, as that of a ``backward`` made of plain operators.

    ``ctx`` has saved the operator's tensors, which come first among its arguments; ``ctx.needs`` is its last.
    ``backward`` takes both, and its results may be None.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_(t.is_floating_point())
            for t in ctx.saved_tensors
        ]
        first = backward(*tensors, ctx.needs)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[: len(tensors)]) if need]
        second = torch.autograd.grad(
            [grad for grad, need in zip(first, ctx.needs, strict=True) if need],
            [tensors[i] for i in wanted],
            [grad for grad, need in zip(grads, ctx.needs, strict=True) if need],
            create_graph=create_graph,
            allow_unused=True,
        )
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, second, strict=True):
        results[i] = grad
    return tuple(results)
