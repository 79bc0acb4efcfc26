"""Pool by Triton around every second pixel, with the bias and the ReLU that come in front, forward and backward."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinception import custom_op

_NONE = 255  # as in kernels/entry_pool.py, which imports Triton: of a window whose ReLU lets no gradient through


def is_launchable(x: Tensor) -> bool:
    """Tell whether :func:`launch` takes x, and returns the format that ATen would."""
    return x.is_contiguous(memory_format=torch.channels_last) and custom_op.memory_format(x) is torch.channels_last


def launch(x: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """Return ``max_pool2d(x, 3, 2, 1) + bias`` of x in channels_last, with ``relu`` its ReLU.

    Values are those of the bias in front of the pool. The gradient goes to the first of the numbers that are equal
    before the bias: after it, rounding makes more of them equal.
    """
    if custom_op.is_recorded((x,) if bias is None else (x, bias)):
        out, _ = torch.ops.fastinception.max_pool_relu(x, bias, relu)
        return cast(Tensor, out)
    from fastinception.kernels.pool import max_pool

    out = _empty(x, x.dtype)
    max_pool(x, bias, out, relu=relu)
    return out


def _pooled(height: int, width: int) -> tuple[int, int]:
    return (height + 1) // 2, (width + 1) // 2


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    shape = *x.shape[:2], *_pooled(*x.shape[2:])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _empty_outputs(x: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    return _empty(x, x.dtype), _empty(x, torch.uint8)


def _run(x: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    from fastinception.kernels.pool import max_pool

    out, codes = _empty_outputs(x, bias, relu)
    bias = None if bias is None else bias.contiguous()
    max_pool(x.contiguous(memory_format=torch.channels_last), bias, out, codes, relu=relu)
    return out, codes


def _templates(grad_out: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Allocate what the gradients of the pool of ``[N, C, height, width]`` and of its bias may be written to."""
    shape = *grad_out.shape[:2], height, width
    format, bias = torch.channels_last, grad_out.new_empty(grad_out.shape[1])
    return torch.empty(shape, dtype=grad_out.dtype, device=grad_out.device, memory_format=format), bias


def _run_backward(grad_out: Tensor, codes: Tensor, height: int, width: int, needs: list[bool]) -> tuple[Tensor, ...]:
    from fastinception.kernels.pool import max_pool_gradient

    grad_x, grad_bias = _templates(grad_out, height, width)
    if codes.shape != grad_out.shape or codes.shape[2:] != _pooled(height, width):
        raise RuntimeError("x or what was saved has another shape in the backward than in the forward")
    grad, codes = (t.contiguous(memory_format=torch.channels_last) for t in (grad_out, codes))
    max_pool_gradient(grad, codes, grad_x, grad_bias if needs[1] else None)
    found = [result if need else None for result, need in zip((grad_x, grad_bias), needs, strict=True)]
    return custom_op.without_none(found, like=grad_out)


def _differentiable(
    grad_out: Tensor, codes: Tensor, height: int, width: int, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return what the backward does by operators that have a derivative."""
    out_height, out_width = grad_out.shape[2:]
    passes = codes != _NONE
    row, column = ((code - code // 3).long() for code in (codes // 4 % 4, codes % 4))
    row = row + 2 * torch.arange(out_height, device=codes.device)[:, None] - 1
    column = column + 2 * torch.arange(out_width, device=codes.device) - 1
    indices = torch.where(passes, row * width + column, 0)
    grad = torch.where(passes, grad_out, 0.0)
    x, _ = _templates(grad_out, height, width)  # asked for its shape only
    settings = [3, 3], [2, 2], [1, 1], [1, 1], False
    grad_x = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *settings, indices) if needs[0] else None
    return grad_x, grad.sum((0, 2, 3)) if needs[1] else None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    (codes,) = ctx.saved_tensors
    (height, width), needs = ctx.size, custom_op.needed(ctx, 2)
    if forward_ad._current_level >= 0:  # a tangent of grad_out passes through plain operators only
        return *_differentiable(grad_out, codes, height, width, needs), None
    grads = torch.ops.fastinception.max_pool_relu_backward(grad_out, codes, height, width, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_out, codes, *ctx.size, ctx.needs = inputs
    ctx.save_for_backward(grad_out, codes)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    height, width = ctx.size
    return custom_op.differentiate_twice(
        ctx, grads, lambda grad_out, codes, needs: _differentiable(grad_out, codes, height, width, needs)
    )


custom_op.define(
    "max_pool_relu_backward",
    "(Tensor grad_out, Tensor codes, SymInt height, SymInt width, bool[] needs) -> (Tensor, Tensor)",
    _run_backward,
    lambda grad_out, codes, height, width, needs: custom_op.empty_gradients(_templates(grad_out, height, width), needs),
    _differentiate_backward,
    _setup_backward,
)
custom_op.define(
    "max_pool_relu",
    "(Tensor x, Tensor? bias, bool relu) -> (Tensor out, Tensor codes)",
    _run,
    _empty_outputs,
    _differentiate,
    _setup,
)
