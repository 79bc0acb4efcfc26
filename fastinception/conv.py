"""Convolve around the blocks as fast as within them: on a CPU in half precision and in training, on a GPU images."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastinception import backends, conv_backward, custom_op
from fastinception.kernels import target


class Conv2d(nn.Conv2d):
    """Convolve as ``torch.nn.Conv2d`` does; by another way where that is faster.

    On a GPU that runs Triton, images of one channel, which the library convolves slowly, in channels_last: with a bias
    and a kernel of odd sizes, at most 7x7, padded by half of them.

    Where a CPU is slower in the dtype than in float32, in that: without products of bfloat16 or float16 PyTorch's own
    loops take many times as long, and some have them at half the rate. The operands are widened and the result is
    rounded once, so that it is at least as exact.

    On cores with AVX2 alone, in training in float32 and channels_last, a 3x3 weight's gradient is a matrix product
    where oneDNN's takes up to twice as long: with stride 1, padding 1 and at least 16 channels in and out.

    Everywhere else, and in an exported program, it is ``torch.nn.Conv2d`` itself.

    Args:
        in_channels, out_channels, kernel_size, ...: as for ``torch.nn.Conv2d``.

    Shape:
        As ``torch.nn.Conv2d``: ``[N, C, H, W]`` to ``[N, out_channels, H_out, W_out]``.

    Attributes:
        backend: ``"aten"`` keeps Triton out; ``"triton"`` asks for it on CPU tensors, in Triton's interpreter. A
            convolution starts with what the environment variable FASTINCEPTION_BACKEND says when it is built.
    """

    backend: str = "auto"
    __prepare_scriptable__ = backends.refuse_script

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backends.check("auto")

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, input, self.backend)


def convolve(conv: nn.Conv2d, input: Tensor, backend: str) -> Tensor:
    """Return what the forward of :class:`Conv2d` does of a convolution, which may be ``torch.nn.Conv2d``'s."""
    if not isinstance(input, Tensor):  # a torch.fx.Proxy, or an error that is torch's
        return nn.Conv2d.forward(conv, input)
    if serves_first_layer(conv, input, backend):
        device = input.device.type
        operands = [input, conv.weight, cast(Tensor, conv.bias)]
        if torch.is_autocast_enabled(device):
            operands = [t.to(torch.get_autocast_dtype(device)) for t in operands]
        return cast(Tensor, torch.ops.fastinception.first_layer(*operands, conv.stride[0]))
    casts = input.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if casts else input.dtype
    operands = [input, conv.weight] if conv.bias is None else [input, conv.weight, conv.bias]
    fitting = all(t.dtype is dtype or (casts and t.dtype is torch.float32) for t in operands)
    if not fitting or backends.exporting():
        return nn.Conv2d.forward(conv, input)
    if not backends.widened(dtype, input):
        return nn.Conv2d.forward(conv, input) if casts else _convolve(conv, *operands)
    with torch.autocast("cpu", enabled=False):  # it would narrow the operands again
        y = _convolve(conv, *[t.float() for t in operands])
    return y.to(dtype)


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _has_a_faster_gradient(conv, x, weight, bias):
        return cast(Tensor, torch.ops.fastinception.conv2d(x, weight, bias))
    return cast(Tensor, conv._conv_forward(x, weight, bias))


def serves_first_layer(conv: nn.Conv2d, x: Tensor, backend: str) -> bool:
    """Tell whether Triton convolves x, images of one channel."""
    if conv.in_channels != 1 or backend == "aten" or (backend == "auto" and x.device.type != "cuda"):
        return False  # first: all others pay for no more
    device, weight, bias = x.device, conv.weight, conv.bias
    casts = device.type != "meta" and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if casts else x.dtype
    return (
        bias is not None
        and backends.special_state() is None
        and _is_padded_by_half(conv, x, weight, bias)
        and conv.stride[0] == conv.stride[1]
        and max(conv.kernel_size) <= 7
        and weight.shape == (conv.out_channels, 1, *conv.kernel_size)
        and bias.shape == weight.shape[:1]
        and x.shape[1] == 1
        and all(t.dtype is dtype or (casts and t.dtype is torch.float32) for t in (x, weight, bias))
        and device == weight.device == bias.device
        and target.unsupported(device, dtype) is None
        and target.without_products(device) is None
        and backends.are_countable(x)
        and result_format(x, weight) is torch.channels_last
    )


def _is_padded_by_half(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether this convolves plain tensors as its class does, by a kernel of odd sizes around each pixel."""
    return (
        type(conv) in (Conv2d, nn.Conv2d)  # others may convolve by their own _conv_forward, and so may one module
        and "_conv_forward" not in backends.attributes()(conv)
        and all(type(t) in backends.PLAIN for t in (x, weight, bias) if t is not None)
        and x.dim() == weight.dim() == 4
        and weight.shape[2] % 2 == weight.shape[3] % 2 == 1
        and conv.padding == (weight.shape[2] // 2, weight.shape[3] // 2)
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def _has_a_faster_gradient(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        conv_backward.COLUMNS_PAY
        and backends.special_state() is None  # first: a trace would keep, and compare, what is asked of shapes
        and torch.is_grad_enabled()
        and weight.requires_grad
        and _is_padded_by_half(conv, x, weight, bias)
        and conv.stride == (1, 1)
        and custom_op.memory_format(x) is torch.channels_last
        and conv_backward.by_columns(x, weight)
    )


def _same(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=conv_backward.padding(weight))


def result_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the memory format of the result: what oneDNN chooses, and PyTorch's fake does not know."""
    format = custom_op.memory_format(x)
    return custom_op.memory_format(weight) if format is torch.contiguous_format else format


def _conv2d_backward(grad_out: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    rows, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_out))
    with torch.autocast(x.device.type, enabled=False):  # it would narrow the products' operands
        found = conv_backward.conv_backward(grad, rows, weight, (needs[0], needs[1], needs[2]))
    return custom_op.without_none(custom_op.finish(found, conv_backward.templates(x, weight)), like=x)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    x, weight = ctx.saved_tensors
    needs = custom_op.needed(ctx, 3)
    if forward_ad._current_level >= 0:  # a tangent of grad_out passes through plain operators only
        return conv_backward.library(grad_out, x, weight, needs)
    grads = torch.ops.fastinception.conv2d_backward(grad_out, x, weight, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[3]
    ctx.save_for_backward(*inputs[:3])


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return custom_op.differentiate_twice(ctx, grads, conv_backward.library)


custom_op.define(
    "conv2d_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _conv2d_backward,
    lambda grad_out, x, weight, needs: custom_op.empty_gradients(conv_backward.templates(x, weight), needs),
    _differentiate_backward,
    _setup_backward,
)
custom_op.define(
    "conv2d",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: _same(x, weight, bias).contiguous(memory_format=result_format(x, weight)),
    lambda x, weight, bias: torch.empty_like(_same(x, weight, bias), memory_format=result_format(x, weight)),
    _differentiate,
    _setup,
)
