"""Convolve images of one channel by Triton: the library's convolution, made for many, takes several times as long."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinception import custom_op
from fastinception.conv_backward import library, result_size, templates


def launch(x: Tensor, weight: Tensor, bias: Tensor, stride: int, relu: bool = False) -> Tensor:
    """Return ``conv2d(x, weight, bias, stride)`` in channels_last, with ``relu`` its ReLU.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[O, C, kernel_h, kernel_w]``, both odd; the padding is half of them.
        bias: ``[O]``.
        stride: in both directions.

    All of one dtype and device. Checked by the caller.
    """
    from fastinception.kernels.first_layer import first_layer

    out = _empty(x, weight, bias, stride)
    first_layer(_dense(x), _dense(weight), bias.contiguous(), out, stride, relu=relu)
    return out


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    return x.shape[0], weight.shape[0], *result_size(x, stride)


def _empty(x: Tensor, weight: Tensor, _: Tensor, stride: int) -> Tensor:
    shape = _shape(x, weight, stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _backward(grad_out: Tensor, x: Tensor, weight: Tensor, stride: int, needs: list[bool]) -> tuple[Tensor, ...]:
    if grad_out.shape != _shape(x, weight, stride) or {grad_out.dtype, weight.dtype} != {x.dtype}:
        raise RuntimeError("x or the weight has another shape or dtype in the backward than in the forward")
    grads = list(library(grad_out, x, weight, (needs[0], False, False), stride))
    _, grad_weight, grad_bias = like = templates(x, weight)
    if needs[1] or needs[2]:
        from fastinception.kernels.first_layer import first_layer_gradient

        found = torch.empty_like(grad_weight, memory_format=torch.channels_last), torch.empty_like(grad_bias)
        first_layer_gradient(_dense(x), _dense(grad_out), *found, stride)
        grads[1:] = [grad if need else None for grad, need in zip(found, needs[1:], strict=True)]
    return custom_op.without_none(custom_op.finish(grads, like), like=x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.stride = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 4
    x, weight = ctx.saved_tensors
    needs = custom_op.needed(ctx, 3)
    if forward_ad._current_level >= 0:  # a tangent of grad_out passes through plain operators only
        return *library(grad_out, x, weight, needs, ctx.stride), None
    grads = torch.ops.fastinception.first_layer_backward(grad_out, x, weight, ctx.stride, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.stride, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return custom_op.differentiate_twice(ctx, grads, functools.partial(library, stride=ctx.stride))


custom_op.define(
    "first_layer_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, int stride, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_out, x, weight, stride, needs: custom_op.empty_gradients(templates(x, weight), needs),
    _differentiate_backward,
    _setup_backward,
)
custom_op.define(
    "first_layer",
    "(Tensor x, Tensor weight, Tensor bias, int stride) -> Tensor",
    launch,
    _empty,
    _differentiate,
    _setup,
)
