"""Convolve around the blocks as fast as within them: in a half precision that a CPU emulates, and in training."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastinception import backends, conv_backward, ops

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


class Conv2d(nn.Conv2d):
    """Convolve as ``torch.nn.Conv2d`` does; on a CPU by another way where that is several times as fast.

    Where a CPU emulates the dtype, in float32: PyTorch's own loops for bfloat16 and float16 on such a CPU take many
    times as long. The operands are widened and the result is rounded once, so that it is at least as exact.

    Where a matrix product gives a weight's gradient sooner than oneDNN, by that: on cores with AVX2 alone, in float32,
    for kernels of odd size with stride 1 that keep the image's size.

    Everywhere else, and in an exported program, it is ``torch.nn.Conv2d`` itself.

    Args:
        in_channels, out_channels, kernel_size, ...: as for ``torch.nn.Conv2d``.

    Shape:
        As ``torch.nn.Conv2d``: ``[N, C, H, W]`` to ``[N, out_channels, H_out, W_out]``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if backends.symbolic(input):
            return super().forward(input)
        casts = input.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if casts else input.dtype
        operands = [input, self.weight] if self.bias is None else [input, self.weight, self.bias]
        fitting = all(t.dtype is dtype or (casts and t.dtype is torch.float32) for t in operands)
        if not fitting or torch.compiler._is_exporting_flag:
            return super().forward(input)
        if not backends.emulated(dtype, input.device):
            return super().forward(input) if casts else self._convolve(*operands)
        with torch.autocast("cpu", enabled=False):  # it would narrow the operands again
            y = self._convolve(*[t.float() for t in operands])
        return y.to(dtype)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._has_a_faster_gradient(x, weight, bias):
            return cast(Tensor, torch.ops.fastinception.conv2d(x, weight, bias))
        return cast(Tensor, self._conv_forward(x, weight, bias))

    def _has_a_faster_gradient(self, *operands: Tensor | None) -> bool:
        tensors = [t for t in operands if t is not None]
        height, width = self.kernel_size
        return (
            type(self) is Conv2d  # another class may convolve by its own _conv_forward
            and conv_backward.COLUMNS_PAY
            and torch.is_grad_enabled()
            and any(t.requires_grad for t in tensors)
            and all(type(t) in backends.PLAIN and t.device.type == "cpu" and t.dtype is torch.float32 for t in tensors)
            and tensors[0].dim() == 4
            and height % 2 == width % 2 == 1
            and self.padding == (height // 2, width // 2)
            and self.padding_mode == "zeros"
            and self.stride == self.dilation == (1, 1)
            and self.groups == 1
            and backends.special_state() is None
        )


torch.library.define("fastinception::conv2d", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=_TAGS)
torch.library.define(
    "fastinception::conv2d_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _same(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=[side // 2 for side in weight.shape[2:]])


def _memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the result's: what oneDNN chooses, and PyTorch's fake does not know."""
    format = ops.memory_format(x)
    return ops.memory_format(weight) if format is torch.contiguous_format else format


torch.library.impl("fastinception::conv2d", "default")(
    lambda x, weight, bias: _same(x, weight, bias).contiguous(memory_format=_memory_format(x, weight))
)
torch.library.register_fake(
    "fastinception::conv2d",
    lambda x, weight, bias: torch.empty_like(_same(x, weight, bias), memory_format=_memory_format(x, weight)),
)


def _inputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the gradients of x, weight and bias are shaped as."""
    return x, weight, weight.new_empty(weight.shape[:1])


@torch.library.impl("fastinception::conv2d_backward", "default")
def _conv2d_backward(grad_out: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    rows, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_out))
    with torch.autocast(x.device.type, enabled=False):  # it would narrow the products' operands
        found = conv_backward.conv_backward(grad, rows, weight, (needs[0], needs[1], needs[2]))
    return ops.without_none(ops.finish(found, _inputs(x, weight)), like=x)


torch.library.register_fake(
    "fastinception::conv2d_backward",
    lambda grad_out, x, weight, needs: ops.empty_gradients(_inputs(x, weight), needs),
)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    if torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack():
        padding = [side // 2 for side in weight.shape[2:]]  # the gradient's own derivative is wanted
        grads: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            grad_out, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1, needs
        )
        return grads
    grads = torch.ops.fastinception.conv2d_backward(grad_out, x, weight, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


torch.library.register_autograd("fastinception::conv2d", _differentiate, setup_context=_setup)
