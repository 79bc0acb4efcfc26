"""Differentiate a convolution: on a CPU by matrix products, where they take less time than the library's gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

_CHAIN = 2048  # pixels that a float32 product may sum one after another

# On cores with AVX2 alone oneDNN's gradient of a 3x3 weight in channels_last runs at 65 to 85 GFLOP/s (AMD EPYC, two
# threads), a matrix product at 130 to 165, and its error is 2 to 10 times a product's. With AVX-512 (Intel) it runs at
# 210 to 310, columns at 170 to 230. Asked once, on import. Other cores were not measured.
COLUMNS_PAY = torch.backends.cpu.get_cpu_capability() == "AVX2"
_COLUMNS_CHAIN = 512  # pixels of a product of columns: these stay in the cache, 3.5 MB for 192 channels
_LEAST_PIXELS = 512  # at 144 the library took 0.7 to 1.1 times as long, at 576 1.2 to 1.7 times
# Pixels from which a product computes a 1x1 weight's gradient. With AVX2 its error is 0.4 to 1.3 times that of oneDNN's
# convolution at 576 and 1152 pixels, in 0.3 to 0.9 of its time, and 1.7 times at 144; with AVX-512 it was 2 to 5 times
# below one chain.
_LEAST_CHAIN = 512 if COLUMNS_PAY else _CHAIN
_LEAST_CHANNELS = 16  # below, MKL sums all pixels in one chain: with 4 of 3, 5 times the library's error


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
    into: Tensor | None = None,
    stride: int = 1,
) -> Gradients:
    """Return the gradients of ``conv2d`` for x, weight and bias, as ``needs`` says.

    Args:
        grad: gradient of the result of ``conv2d(x, weight, bias, stride, padding=[kernel height // 2, kernel width //
            2])``, ``[N, O, ceil(H / stride), ceil(W / stride)]``.
        x: ``[N, C, H, W]``; fastest in channels_last, as ``grad`` is.
        weight: ``[O, C, kernel height, kernel width]``, both odd.
        needs: which of the three are wanted; the others are None.
        into: a gradient of x from elsewhere, to which x's is added, and which is returned in its place.
        stride: of the convolution, in both directions.

    Returns:
        The weight's gradient may have other strides than the weight.
    """
    if x.device.type == "cpu" and weight.shape[2:] == (1, 1) and stride == 1 and not _are_products_rounded(x):
        return _pointwise(grad, x, weight, needs, into)
    if needs[1] and stride == 1 and by_columns(x, weight):
        grad_x, _, _ = library(grad, x, weight, (needs[0], False, False))
        grad_weight: Tensor | None = _weight_gradient_by_columns(grad, x, weight)
        grad_bias = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1]).sum(0) if needs[2] else None
    else:
        grad_x, grad_weight, grad_bias = library(grad, x, weight, needs, stride)
    return grad_x if into is None or grad_x is None else into.add_(grad_x), grad_weight, grad_bias


def _are_products_rounded(x: Tensor) -> bool:
    """Tell whether matrix products of x are computed in less than float32, and convolutions are not.

    ``torch.set_float32_matmul_precision`` asks for that, on cores with tensor tiles.
    """
    if x.dtype is not torch.float32:
        return False
    mkldnn: Any = torch.backends.mkldnn  # whose attributes are made as it is imported
    return mkldnn.matmul.fp32_precision not in ("ieee", "none", mkldnn.conv.fp32_precision)


def padding(weight: Tensor) -> list[int]:
    """Return the padding that keeps the image's size at stride 1."""
    return [int(side) // 2 for side in weight.shape[2:]]


def result_size(x: Tensor, stride: int) -> tuple[int, int]:
    """Return height and width of the result of a convolution with that padding."""
    height, width = ((side + stride - 1) // stride for side in x.shape[2:])
    return height, width


def templates(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the gradients of x, weight and bias are shaped as."""
    return x, weight, weight.new_empty(weight.shape[:1])


def library(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], stride: int = 1) -> Gradients:
    """Return what :func:`conv_backward` does, by PyTorch's operator, which has a derivative."""
    if not any(needs):
        return None, None, None
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [stride, stride], padding(weight), [1, 1], False, [0, 0], 1, needs
    )
    grad_x, grad_weight, grad_bias = (one if need else None for one, need in zip(found, needs, strict=True))
    return grad_x, grad_weight, grad_bias  # oneDNN gives the weight's with the bias's


def _pointwise(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], into: Tensor | None
) -> Gradients:
    """Compute plain matrix products: where images are small, oneDNN's gradients take up to twice as long."""
    n, channels, height, width = x.shape
    matrix = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])  # [N*H*W, O]
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        weight_rows = weight.reshape(-1, channels)
        if into is None:
            rows = torch.mm(matrix, weight_rows)  # [N*H*W, C]
        else:
            # Not a view: a side of one pixel may have any stride.
            rows = into.permute(0, 2, 3, 1).reshape(-1, channels).addmm_(matrix, weight_rows)
        grad_x = rows.view(n, height, width, channels).permute(0, 3, 1, 2)
    if needs[1]:
        grad_weight = _pointwise_weight_gradient(matrix, x, weight, grad)
    if needs[2]:
        grad_bias = matrix.sum(0)
    return grad_x, grad_weight, grad_bias


def _pointwise_weight_gradient(matrix: Tensor, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """Return the weight gradient of a 1x1 convolution; ``matrix`` is ``grad`` as rows of pixels."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [N*H*W, C]
    if x.dtype is not torch.float32:
        return torch.mm(matrix.t(), rows).view(weight.shape)
    # In float32 a product sums all its pixels in one chain and rounds at each step.
    if len(rows) < _LEAST_CHAIN:
        _, grad_weight, _ = library(grad, x, weight, (False, True, False))
        return cast(Tensor, grad_weight)
    parts, whole = len(rows) // _CHAIN, len(rows) // _CHAIN * _CHAIN
    if parts == 0:
        return torch.mm(matrix.t(), rows).view(weight.shape)
    chains = [t[:whole].view(parts, _CHAIN, -1) for t in (matrix, rows)]
    gradient = torch.bmm(chains[0].mT, chains[1]).sum(0)
    if whole < len(rows):
        gradient.addmm_(matrix[whole:].t(), rows[whole:])
    return gradient.view(weight.shape)


def by_columns(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the gradient of a spatial weight is computed by columns, which is faster then."""
    if not COLUMNS_PAY or x.dtype is not torch.float32 or x.device.type != "cpu":
        return False
    out_channels, channels, kernel_h, kernel_w = weight.shape
    n, _, height, width = x.shape
    if n * height * width < _LEAST_PIXELS or min(out_channels, channels) < _LEAST_CHANNELS:
        return False
    # A larger kernel has more columns to copy for each of x's numbers, which pays only where most of them are padding.
    return 1 < kernel_h * kernel_w <= 9 or (height < kernel_h and width < kernel_w)


def _weight_gradient_by_columns(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return a spatial weight's gradient as matrix products of x's windows (im2col), a few pixels at a time.

    Zeros around the image are multiplied like any pixel: an infinite gradient at the border gives NaN, the library's
    infinity or nothing.
    """
    out_channels, channels, kernel_h, kernel_w = weight.shape
    gradient = x.new_zeros(kernel_h * kernel_w * channels, out_channels)
    images = max(1, _COLUMNS_CHAIN // x[0, 0].numel())
    for some, pixels in zip(x.split(images), grad.permute(0, 2, 3, 1).split(images), strict=True):
        padded = F.pad(some, (kernel_w // 2, kernel_w // 2, kernel_h // 2, kernel_h // 2))
        windows = padded.unfold(2, kernel_h, 1).unfold(3, kernel_w, 1).permute(0, 2, 3, 4, 5, 1)  # [n, H, W, kh, kw, C]
        for part, matrix in zip(_pieces(windows), _pieces(pixels), strict=True):
            columns = part.reshape(-1, len(gradient))
            gradient.addmm_(columns.t(), matrix.reshape(-1, out_channels))
    return gradient.view(kernel_h, kernel_w, channels, out_channels).permute(3, 2, 0, 1)


def _pieces(images: Tensor) -> Iterator[Tensor]:
    """Yield ``[n, H, W, ...]`` in lines, or in pieces of a line, of at most ``_COLUMNS_CHAIN`` pixels an image."""
    for lines in images.split(max(1, _COLUMNS_CHAIN // images.shape[2]), 1):
        yield from lines.split(_COLUMNS_CHAIN, 2)
