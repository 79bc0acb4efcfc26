"""The whole block as launches: forward in two, level by level, and backward in six at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastinception.kernels import configs, target
from fastinception.kernels.data_gradient import Gradient, choose_tiles, data_gradient
from fastinception.kernels.entry import entry
from fastinception.kernels.entry_gradient import entry_gradient, pool_gradient
from fastinception.kernels.spatial import Conv, spatial
from fastinception.kernels.split import Branch, split
from fastinception.kernels.split import parts as split_parts
from fastinception.kernels.weight_gradient import Product, Sum, add_up, divide, weight_gradient


class Saved(NamedTuple):
    """What the backward needs, with M = N*H*W pixels. ``out`` is not among it: its owner may change it in place.

    r2, r3: what branches 2 and 3 convolve, ``[N, c2[0], H, W]`` and ``[N, c3[0], H, W]`` in channels_last.
    mask: where the output's ReLU passes a gradient, bits ``[M, bytes]`` uint8; each branch starts a byte.
    pooled: ``max_pool2d(x, 3, 1, 1)``, ``[M, K]``.
    codes: which pixel of its window each maximum is, uint8 ``[M, K]``.
    """

    r2: Tensor
    r3: Tensor
    mask: Tensor
    pooled: Tensor
    codes: Tensor


def widths(params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Return c1, c2[1], c3[1] and c4."""
    return params[0].shape[0], params[4].shape[0], params[8].shape[0], params[10].shape[0]


def mask_columns(widths: Sequence[int]) -> list[int]:
    """Return the byte at which each branch starts in a row of the packed ReLU mask, and the bytes of a row."""
    columns = [0]
    for width in widths:
        columns.append(columns[-1] + (width + 7) // 8)
    return columns


def empty_saved(x: Tensor, params: Sequence[Tensor], save: bool) -> Saved:
    """Allocate what the forward writes beside the output; without ``save``, r2 and r3 only."""
    n, channels, height, width = x.shape
    rows = n * height * width if save else 0

    def dense(columns: int) -> Tensor:
        shape = (n, columns, height, width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    return Saved(
        dense(params[2].shape[0]),
        dense(params[6].shape[0]),
        torch.empty((rows, mask_columns(widths(params))[-1]), dtype=torch.uint8, device=x.device),
        torch.empty((rows, channels), dtype=x.dtype, device=x.device),
        torch.empty((rows, channels), dtype=torch.uint8, device=x.device),
    )


def _as_operand(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with rows the kernels can walk: itself but for expanded, permuted or sliced parameters."""
    if tensor.is_contiguous():
        return tensor
    if tensor.dim() == 4 and tensor.shape[2:] != (1, 1):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def forward(x: Tensor, params: Sequence[Tensor], out: Tensor, saved: Saved, save: bool) -> None:
    """Write the block of ``x`` to ``out``, ``[N, c1 + c2[1] + c3[1] + c4, H, W]``, and what is ``saved``."""
    if x.numel() == 0:
        return
    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = map(_as_operand, params)
    c1, c2, c3, _ = widths(params)
    _, mask2, mask3, mask4, _ = mask_columns(widths(params))
    x = x.contiguous(memory_format=torch.channels_last)
    r2, r3, *kept = saved
    entry(
        x, (w1, w21, w31), (b1, b21, b31), w42, b42, out, c1 + c2 + c3, (r2, r3), tuple(kept) if save else None, mask4
    )
    level = [
        Conv(r2, w22, b22, column=c1, mask_column=mask2, padding=(1, 1)),
        Conv(r3, w32, b32, column=c1 + c2, mask_column=mask3, padding=(2, 2)),
    ]
    spatial(level, out, saved.mask if save else None)


class _Partials:
    """Hand out places in one buffer of partial sums, and remember how to add them up."""

    def __init__(self) -> None:
        self.size = 0
        self.sums: list[Sum] = []

    def place(self, elements: int, parts: int) -> int:
        start = self.size
        self.size += elements * parts
        return start

    def add_up(self, out: Tensor | None, start: int, parts: int, stride: int) -> None:
        if out is not None:
            self.sums.append(Sum(out, start, parts, stride))


def backward(
    grad_out: Tensor, x: Tensor, params: Sequence[Tensor], saved: Saved, grads: Sequence[Tensor | None]
) -> None:
    """Write the gradients of ``x`` and of the twelve params to ``grads``; None is not computed.

    Nothing is added by atomics: the same input gives the same bits.

    Args:
        grad_out: ``[N, c1 + c2[1] + c3[1] + c4, H, W]``, any strides; never written.
        x, params: what the forward got.
        saved: what the forward kept.
        grads: each of its tensor's shape; x's contiguous in either memory format, 4-D weights' in channels_last.
    """
    grad_x, gw1, gb1, gw21, gb21, gw22, gb22, gw31, gb31, gw32, gb32, gw42, gb42 = grads
    w1, _, w21, _, w22, _, w31, _, w32, _, w42, _ = map(_as_operand, params)
    r2, r3, mask, pooled, codes = saved
    n, channels, height, width = x.shape
    rows = n * height * width
    c1, c2, c3, c4 = widths(params)
    c21, c31 = w21.shape[0], w31.shape[0]
    mask1, mask2, mask3, mask4, _ = mask_columns(widths(params))

    def wanted(*tensors: Tensor | None) -> bool:
        return any(t is not None for t in tensors)

    def empty(columns: int) -> Tensor:
        return torch.empty((rows, columns), dtype=x.dtype, device=x.device)

    # What has to be known of each branch: its own masked gradient, and that of the reduction in front of it.
    need_e2, need_e3 = wanted(grad_x, gw21, gb21), wanted(grad_x, gw31, gb31)
    partials = _Partials()
    # Branch 1's gradient and the reductions' side by side, so that one product each gives what they lead to.
    merged = empty(c1 + c21 + c31) if wanted(grad_x, gw1, gb1, gw21, gb21, gw31, gb31) else None
    branches, split_rows = [], split_parts(rows)
    column = 0
    masked: list[Tensor | None] = []
    for i, (columns, mask_column, need, bias) in enumerate(
        (
            (c1, mask1, wanted(grad_x, gw1, gb1), gb1),
            (c2, mask2, need_e2 or wanted(gw22, gb22), gb22),
            (c3, mask3, need_e3 or wanted(gw32, gb32), gb32),
            (c4, mask4, wanted(grad_x, gw42, gb42), gb42),
        )
    ):
        g = None
        if need:
            g = empty(columns) if i else merged
            assert g is not None  # merged: the same tensors want it
            start = partials.place(columns, split_rows)
            branches.append(Branch(columns, column, mask_column, g, start))
            partials.add_up(bias, start, split_rows, columns)
        masked.append(g)
        column += columns
    _, g2, g3, g4 = masked

    gradients = []
    tiles = choose_tiles(rows, (w22, w32, w42))
    tile_rows = configs.tiles(rows, tiles.block_m)
    for g, weight, r, need, first, bias in ((g2, w22, r2, need_e2, c1, gb21), (g3, w32, r3, need_e3, c1 + c21, gb31)):
        if need:
            assert g is not None
            assert merged is not None
            start = partials.place(weight.shape[1], tile_rows)
            gradients.append(Gradient(g, weight, r, merged, first, start))
            partials.add_up(bias, start, tile_rows, weight.shape[1])
    grad_pooled = None
    if grad_x is not None:
        assert g4 is not None
        grad_pooled = empty(channels)
        gradients.append(Gradient(g4, w42, None, grad_pooled))

    wants = (  # a product's operands, its kernel, and the gradients that are its rows one after another
        (merged, x, (1, 1), (gw1, gw21, gw31), (c1, c21, c31)),
        (g2, r2, (3, 3), (gw22,), (c2,)),
        (g3, r3, (5, 5), (gw32,), (c3,)),
        (g4, pooled, (1, 1), (gw42,), (c4,)),
    )
    wants = [want for want in wants if wanted(*want[3])]
    sizes = [(g.shape[1], source.shape[1] * kernel[0] * kernel[1]) for g, source, kernel, *_ in wants]
    products = []
    division = divide((n, height, width), sizes, x.dtype, target.gpu(x.device)) if sizes else None
    for (g, source, kernel, outs, heights), (out_rows, out_columns) in zip(wants, sizes, strict=True):
        assert division is not None
        size = out_rows * out_columns
        start = partials.place(size, division.parts)
        products.append(Product(g, source, kernel, start))
        for out, height_of_out in zip(outs, heights, strict=True):
            partials.add_up(out, start, division.parts, size)
            start += height_of_out * out_columns

    sums = torch.empty(
        partials.size, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32, device=x.device
    )
    if branches:
        split(grad_out, mask, branches, sums)
    if gradients:
        data_gradient(gradients, (n, height, width), sums, tiles)
    if grad_x is not None:
        pool_gradient(grad_pooled, codes, grad_x)
        entry_gradient(merged, (w1, w21, w31), grad_x)
    if division is not None:
        weight_gradient(products, (n, height, width), division, sums)
    if partials.sums:
        add_up(partials.sums, sums)
