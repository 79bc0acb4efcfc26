"""Weight gradients by the library, for a table to choose in place of weight_gradient.py's."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_deterministic = threading.Lock()


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Write the gradient of the weight of a convolution with stride 1 whose output has its input's size.

    Args:
        grad: of its output, rows of pixels ``[M, O]``, contiguous.
        x: its input, ``[N, C, H, W]`` in channels_last.
        out: ``[O, C, kernel_h, kernel_w]``, odd sizes, any strides.

    By an algorithm that gives the same bits each time.
    """
    n, _, height, width = x.shape
    grad = grad.view(n, height, width, -1).permute(0, 3, 1, 2)
    padding = [size // 2 for size in out.shape[2:]]
    # Not torch.backends.cudnn: that may be closed to changes, and its precisions are not ours to touch. Autograd has a
    # thread for each device: one would find what another set, and leave it so.
    with _deterministic:
        before = torch._C._get_cudnn_deterministic()
        torch._C._set_cudnn_deterministic(True)
        try:
            _, result, _ = torch.ops.aten.convolution_backward(
                grad, x, out, None, (1, 1), padding, (1, 1), False, (0, 0), 1, (False, True, False)
            )
        finally:
            torch._C._set_cudnn_deterministic(before)
    out.copy_(result)
