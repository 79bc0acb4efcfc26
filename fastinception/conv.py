"""Convolve around the blocks as fast as within them where a CPU has no products of a half precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastinception import backends


class Conv2d(nn.Conv2d):
    """Convolve as ``torch.nn.Conv2d`` does, and in float32 where a CPU emulates the dtype.

    PyTorch's own loops for bfloat16 and float16 on such a CPU take many times as long. The operands are widened and
    the result is rounded once, so that it is at least as exact. Everywhere else, and in an exported program, it is
    ``torch.nn.Conv2d`` itself.

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
        if not fitting or not backends.emulated(dtype, input.device) or torch.compiler._is_exporting_flag:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):  # it would narrow the operands again
            x, weight, *bias = [t.float() for t in operands]
            y: Tensor = self._conv_forward(x, weight, bias[0] if bias else None)
        return y.to(dtype)
