"""Register the block as operators, for each backend one in each direction: ``torch.ops.fastinception.*``.

``aten_forward`` and ``triton_forward`` allocate and return the output, and behind it what ``aten_backward`` and
``triton_backward`` need; ``inception_out`` writes into the caller's output and has no gradient. The backward's own
derivative is computed from plain operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinception import aten

_NAMES = ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2")
_PARAMS = ", ".join(f"Tensor {name}_weight, Tensor {name}_bias" for name in _NAMES)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of the block's output for ``x``: channels_last for channels_last, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    # Neither: a slice or a permutation. Either answer is right; channels that lie closest together say channels_last.
    return torch.channels_last if 0 < x.stride(1) < x.stride(3) else torch.contiguous_format


def _dense(x: Tensor, shape: Sequence[int], format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)


def _widths(params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    return params[0].shape[0], params[4].shape[0], params[8].shape[0], params[10].shape[0]


def output_shape(x: Tensor, params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Return the shape of the block's output, ``[N, c1 + c2[1] + c3[1] + c4, H, W]``."""
    return x.shape[0], sum(_widths(params)), x.shape[2], x.shape[3]


def empty_output(x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Allocate the block's output in the memory format that ``x`` asks for."""
    return _dense(x, output_shape(x, params), memory_format(x))


def _empty_aten_outputs(x: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Allocate what ``aten_forward`` returns, see :func:`aten.forward_saving`."""
    n, channels, height, width = x.shape
    widths = (params[2].shape[0], params[6].shape[0], *_widths(params), channels)
    saved = [_dense(x, (n, c, height, width), torch.channels_last) for c in widths]
    return empty_output(x, params), *saved, torch.empty_like(saved[-1], dtype=torch.int64)


def _empty_triton_outputs(x: Tensor, params: Sequence[Tensor], save: bool) -> tuple[Tensor, ...]:
    """Allocate what ``triton_forward`` returns, see :class:`fastinception.kernels.block.Saved`."""
    from fastinception.kernels import block  # needs Triton, which this module does not

    return empty_output(x, params), *block.empty_saved(x, params, save)


torch.library.define(
    "fastinception::aten_forward",
    f"(Tensor x, {_PARAMS}) -> (Tensor out, Tensor r2, Tensor r3, "
    "Tensor p1, Tensor p2, Tensor p3, Tensor p4, Tensor pooled, Tensor indices)",
    tags=_TAGS,
)
torch.library.define(
    "fastinception::triton_forward",
    f"(Tensor x, {_PARAMS}, bool save) -> (Tensor out, Tensor r2, Tensor r3, Tensor mask, Tensor pooled, Tensor codes)",
    tags=_TAGS,
)


@torch.library.impl("fastinception::aten_forward", "default")
def _aten_forward(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    out = empty_output(x, params)
    saved = aten.forward_saving(x, params, out)
    return out, *(_as_promised(tensor, _channels_last_strides(tensor.shape)) for tensor in saved)


@torch.library.impl("fastinception::triton_forward", "default")
def _triton_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from fastinception.kernels import block

    *params, save = args
    out, *saved = _empty_triton_outputs(x, params, save)
    block.forward(x, params, out, block.Saved(*saved), save)
    return out, *saved


def _channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels


def _as_promised(result: Tensor, strides: tuple[int, ...]) -> Tensor:
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


torch.library.register_fake("fastinception::aten_forward", lambda x, *params: _empty_aten_outputs(x, params))
torch.library.register_fake(
    "fastinception::triton_forward", lambda x, *args: _empty_triton_outputs(x, args[:12], args[12])
)


torch.library.define(
    "fastinception::inception_out", f"(Tensor x, {_PARAMS}, str backend, Tensor(a!) out) -> ()", tags=_TAGS
)


@torch.library.impl("fastinception::inception_out", "default")
def _inception_out(x: Tensor, *args: Any) -> None:
    *params, backend, out = args
    check_overlap(out, (x, *params))
    if backend == "aten":
        aten.forward(x, params, out)
    else:
        from fastinception.kernels import block

        block.forward(x, params, out, block.empty_saved(x, params, save=False), save=False)


def check_overlap(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise ValueError if ``out`` shares addresses with an input; neighbours that merely touch do not."""

    def addresses(t: Tensor) -> tuple[int, int]:
        extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
        return t.data_ptr(), t.data_ptr() + extent * t.element_size()

    first, end = addresses(out)
    for tensor in inputs:
        if tensor.numel() and out.numel() and tensor.device == out.device:
            other_first, other_end = addresses(tensor)
            if first < other_end and other_first < end:
                raise ValueError("out must not share memory with x or with a parameter")


@torch.library.register_fake("fastinception::inception_out")
def _inception_out_fake(x: Tensor, *args: Any) -> None:
    return None


_GRADIENTS = ", ".join(["Tensor"] * 13)
torch.library.define(
    "fastinception::aten_backward",
    f"(Tensor grad_out, Tensor x, {_PARAMS}, Tensor r2, Tensor r3, Tensor p1, Tensor p2, Tensor p3, Tensor p4, "
    f"Tensor pooled, Tensor indices, bool[] needs) -> ({_GRADIENTS})",
    tags=_TAGS,
)
torch.library.define(
    "fastinception::triton_backward",
    f"(Tensor grad_out, Tensor x, {_PARAMS}, Tensor r2, Tensor r3, Tensor mask, "
    f"Tensor pooled, Tensor codes, bool[] needs) -> ({_GRADIENTS})",
    tags=_TAGS,
)


def _empty_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Allocate each gradient with its input's strides, if it is dense; what is not needed is an empty tensor."""
    return tuple(
        torch.empty_like(t) if need else _dense(t, (0,), torch.contiguous_format)
        for t, need in zip(inputs, needs, strict=True)
    )


def _all_gradients(grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what ``_empty_gradients`` promises, filled."""
    results = []
    for grad, t in zip(grads, inputs, strict=True):
        if grad is None:
            results.append(_dense(t, (0,), torch.contiguous_format))
            continue
        dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
        results.append(_as_promised(grad, t.stride() if dense else torch.empty_like(t, device="meta").stride()))
    return tuple(results)


@torch.library.impl("fastinception::aten_backward", "default")
def _aten_backward(grad_out: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *params, r2, r3, p1, p2, p3, p4, pooled, indices, needs = args
    branches = (p1, p2, p3, p4)
    grads_out = grad_out.split(_widths(params), dim=1)

    def gradient(i: int, out: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.aten.threshold_backward.grad_input(grads_out[i], branches[i], 0, grad_input=out))

    grads = aten.backward(gradient, x, params, r2, r3, (pooled, indices), needs)
    return _all_gradients(grads, (x, *params))


@torch.library.impl("fastinception::triton_backward", "default")
def _triton_backward(grad_out: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from fastinception.kernels import block

    *params, r2, r3, mask, pooled, codes, needs = args
    inputs = (x, *params)
    formats = [memory_format(x), *(torch.channels_last if t.dim() == 4 else torch.contiguous_format for t in params)]
    grads = [
        _dense(t, t.shape, format) if need else None for t, format, need in zip(inputs, formats, needs, strict=True)
    ]
    rows = x.contiguous(memory_format=torch.channels_last)
    block.backward(grad_out, rows, params, block.Saved(r2, r3, mask, pooled, codes), grads)
    return _all_gradients(grads, inputs)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # or zeros of their size would be made for what is saved, every time
    ctx.save_for_backward(*inputs[:13], *saved)


def _differentiate_forward(backward: Any, extra: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return the derivative of a forward operator that takes ``extra`` arguments after x and the params."""

    def differentiate(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * (13 + extra)
        needs = list(ctx.needs_input_grad[:13])
        if forward_ad._current_level >= 0:  # a tangent of grad_out passes through plain operators only
            grads = _compose_backward(grad_out, ctx.saved_tensors[:13], needs)
        else:
            grads = backward(grad_out, *ctx.saved_tensors, needs)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * extra)

    return differentiate


def _compose_backward(grad_out: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the block composed of plain operators: slower, and any transform applies to them."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the derivative ends here and the tensors keep their place in an outer graph.
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        out = aten.compose(inputs[0], inputs[1:])
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    ctx.save_for_backward(*inputs[:14])


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the backward a second time, through the block composed of plain operators."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
        first = _compose_backward(tensors[0], tensors[1:], ctx.needs)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[:14]) if need]
        second = torch.autograd.grad(
            [grad for grad in first if grad is not None],
            [tensors[i] for i in wanted],
            [grad for grad, need in zip(grads, ctx.needs, strict=True) if need],
            create_graph=create_graph,
            allow_unused=True,
        )
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, second, strict=True):
        results[i] = grad
    return tuple(results)


for _backend, _extra in (("aten", 0), ("triton", 1)):
    _backward = getattr(torch.ops.fastinception, f"{_backend}_backward")
    torch.library.register_autograd(
        f"fastinception::{_backend}_forward", _differentiate_forward(_backward, _extra), setup_context=_setup_forward
    )
    torch.library.register_autograd(
        f"fastinception::{_backend}_backward", _differentiate_backward, setup_context=_setup_backward
    )
    torch.library.register_fake(
        f"fastinception::{_backend}_backward",
        lambda grad_out, x, *args: _empty_gradients((x, *args[:12]), args[-1]),
    )
