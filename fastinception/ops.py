"""Register the block as operators, one for each direction: ``torch.ops.fastinception.inception_*``.

``inception_forward`` allocates and returns, ``inception_out`` writes into the caller's output and has no gradient.
Whatever the backend, the backward is ``inception_backward``, whose own derivative is computed from plain operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def _mask_columns(params: Sequence[Tensor]) -> list[int]:
    """Return the byte at which each branch starts in a row of the packed ReLU mask, and the bytes of a row."""
    columns = [0]
    for width in _widths(params):
        columns.append(columns[-1] + (width + 7) // 8)
    return columns


def output_shape(x: Tensor, params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Return the shape of the block's output, ``[N, c1 + c2[1] + c3[1] + c4, H, W]``."""
    return x.shape[0], sum(_widths(params)), x.shape[2], x.shape[3]


def empty_output(x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Allocate the block's output in the memory format that ``x`` asks for."""
    return _dense(x, output_shape(x, params), memory_format(x))


def _empty_outputs(x: Tensor, params: Sequence[Tensor], backend: str, save: bool) -> tuple[Tensor, ...]:
    """Allocate out, r2, r3, mask, pooled and indices: what ``inception_forward`` returns, real or fake.

    The mask says where the output's ReLU passes a gradient, apart from the output, which its owner may change in
    place. From Triton it is bits ``[N*H*W, bytes]``, set where it passes. From ATen it is a copy of the output: to
    pick gradients by a bool mask takes a CPU several times as long. ATen also keeps the max pool and its indices.
    What is not kept is empty: from Triton the pool, without ``save`` all three.
    """
    n, _, height, width = x.shape
    out = empty_output(x, params)
    r2 = _dense(x, (n, params[2].shape[0], height, width), torch.channels_last)
    r3 = _dense(x, (n, params[6].shape[0], height, width), torch.channels_last)
    mask = torch.empty((0,), dtype=torch.uint8, device=x.device)
    pooled = torch.empty((0,), dtype=x.dtype, device=x.device)
    indices = torch.empty((0,), dtype=torch.int64, device=x.device)
    if save and backend == "aten":
        mask = torch.empty_like(out)
        pooled = _dense(x, x.shape, torch.channels_last)
        indices = torch.empty_like(pooled, dtype=torch.int64)
    elif save:
        rows = n * height * width
        mask = torch.empty((rows, _mask_columns(params)[-1]), dtype=torch.uint8, device=x.device)
    return out, r2, r3, mask, pooled, indices


def _as_kernel_operand(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with rows the kernels can walk: itself but for expanded, permuted or sliced parameters."""
    if tensor.dim() < 4 or tensor.shape[2:] == (1, 1):
        return tensor.contiguous()
    if tensor.is_contiguous():
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _launch(x: Tensor, params: Sequence[Tensor], out: Tensor, r2: Tensor, r3: Tensor, mask: Tensor | None) -> None:
    """Compute the block in two launches, level by level."""
    from fastinception.kernels.entry import entry  # needs Triton, which this module does not
    from fastinception.kernels.spatial import Conv, spatial

    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = map(_as_kernel_operand, params)
    c1, c2, c3, _ = _widths(params)
    _, mask2, mask3, mask4, _ = _mask_columns(params)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.numel() == 0:
        return
    entry(x, (w1, w21, w31), (b1, b21, b31), w42, b42, out, c1 + c2 + c3, (r2, r3), mask, mask4)
    level = [
        Conv(r2, w22, b22, column=c1, mask_column=mask2, padding=(1, 1)),
        Conv(r3, w32, b32, column=c1 + c2, mask_column=mask3, padding=(2, 2)),
    ]
    spatial(level, out, mask)


torch.library.define(
    "fastinception::inception_forward",
    f"(Tensor x, {_PARAMS}, str backend, bool save) -> "
    "(Tensor out, Tensor r2, Tensor r3, Tensor mask, Tensor pooled, Tensor indices)",
    tags=_TAGS,
)


@torch.library.impl("fastinception::inception_forward", "default")
def _inception_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *params, backend, save = args
    if backend == "triton":
        out, r2, r3, mask, pooled, indices = _empty_outputs(x, params, backend, save)
        _launch(x, params, out, r2, r3, mask if save else None)
        return out, r2, r3, mask, pooled, indices
    out = empty_output(x, params)
    pool = aten.max_pool_with_indices(x) if save else (None, None)
    r2, r3 = aten.forward(x, params, out, pool[0])
    return _as_promised((out, r2, r3, out.clone() if save else None, *pool), _empty_outputs(x, params, backend, save))


def _as_promised(results: Sequence[Tensor | None], promised: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return ``results`` with the strides of ``promised``, the fake's, and memory of its own for each.

    They differ where a size of 1 leaves channels_last open, and where a gradient is a slice of a merged one.
    """
    kept = []
    for result, empty in zip(results, promised, strict=True):
        if result is None:
            kept.append(empty)
        elif result.stride() == empty.stride() and result.untyped_storage().nbytes() == empty.nbytes:
            kept.append(result)
        else:
            kept.append(empty.copy_(result))
    return tuple(kept)


@torch.library.register_fake("fastinception::inception_forward")
def _inception_forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *params, backend, save = args
    return _empty_outputs(x, params, backend, save)


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
        _, r2, r3, *_ = _empty_outputs(x, params, backend, save=False)
        _launch(x, params, out, r2, r3, None)


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


torch.library.define(
    "fastinception::inception_backward",
    f"(Tensor grad_out, Tensor x, {_PARAMS}, Tensor r2, Tensor r3, Tensor mask, "
    f"Tensor pooled, Tensor indices, bool[] needs) -> "
    f"({', '.join(['Tensor'] * 13)})",
    tags=_TAGS,
)


def _empty_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Allocate each gradient in its input's memory format; what is not needed is an empty tensor."""
    return [
        _dense(t, t.shape, memory_format(t) if t.dim() == 4 else torch.contiguous_format)
        if need
        else torch.empty((0,), dtype=t.dtype, device=t.device)
        for t, need in zip(inputs, needs, strict=True)
    ]


@torch.library.impl("fastinception::inception_backward", "default")
def _inception_backward(grad_out: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *params, r2, r3, mask, pooled, indices, needs = args
    grads_out = _block_gradients(grad_out, mask, params)
    grads = aten.backward(grads_out, x, params, r2, r3, pooled, indices, needs)
    return _as_promised(grads, _empty_gradients((x, *params), needs))


def _block_gradients(grad_out: Tensor, mask: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Split ``grad_out`` into its branches, ``[N, c, H, W]`` in channels_last, zero where ReLU blocks.

    A choice, never a product: an infinite gradient times a zero mask would be NaN.
    """
    widths = _widths(params)
    grads = grad_out.split(widths, dim=1)
    if mask.dtype is grad_out.dtype:
        outs = mask.split(widths, dim=1)
        blocked = [torch.ops.aten.threshold_backward(grad, out, 0) for grad, out in zip(grads, outs, strict=True)]
    else:
        n, _, height, width = grad_out.shape
        columns = _mask_columns(params)
        bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
        blocked = []
        for i, (grad, c) in enumerate(zip(grads, widths, strict=True)):
            passed = (mask[:, columns[i] : columns[i + 1], None] >> bits) & 1  # [N*H*W, bytes, 8]
            passed = passed.flatten(1)[:, :c].reshape(n, height, width, c).permute(0, 3, 1, 2)
            blocked.append(torch.where(passed != 0, grad, 0))
    return [grad.contiguous(memory_format=torch.channels_last) for grad in blocked]


@torch.library.register_fake("fastinception::inception_backward")
def _inception_backward_fake(grad_out: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients((x, *args[:12]), args[-1]))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # or zeros of their size would be made for what is saved, every time
    ctx.save_for_backward(*inputs[:13], *saved)


def _differentiate_forward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 15
    needs = list(ctx.needs_input_grad[:13])
    if forward_ad._current_level >= 0:  # a tangent of grad_out passes through plain operators only
        grads = _compose_backward(grad_out, ctx.saved_tensors[:13], needs)
    else:
        grads = torch.ops.fastinception.inception_backward(grad_out, *ctx.saved_tensors, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None)


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


torch.library.register_autograd(
    "fastinception::inception_forward", _differentiate_forward, setup_context=_setup_forward
)


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
    results: list[Tensor | None] = [None] * 20
    for i, grad in zip(wanted, second, strict=True):
        results[i] = grad
    return tuple(results)


torch.library.register_autograd(
    "fastinception::inception_backward", _differentiate_backward, setup_context=_setup_backward
)
