"""Backward, second launch: data gradients of a list of convolutions as implicit GEMMs, each where it is needed next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, target
from fastinception.kernels.epilogue import follow_predecessor
from fastinception.kernels.spatial import implicit_gemm


class Gradient(NamedTuple):
    """One convolution with stride 1 whose output has its input's size: the gradient of its input."""

    grad: Tensor  # of its output, [M, O], contiguous
    weight: Tensor  # [O, C, kernel_h, kernel_w], contiguous in either memory format; channels_last reads faster
    active: Tensor | None  # its input, [N, C, H, W] in channels_last, if that is the result of a ReLU
    out: Tensor  # rows of pixels, contiguous: [M, stride]
    column: int = 0  # first column in out
    sums: int = 0  # where in ``partials`` its sums begin, for a ReLU only


@triton.jit
def _gradient_tile(
    tile, g_ptr, w_ptr, active_ptr, out_ptr, partials_ptr,
    K, M, H, W,
    C: tl.constexpr, O: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE: tl.constexpr, COLUMN: tl.constexpr, BLOCK_N: tl.constexpr, PACKED_WEIGHT: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``conv_transpose2d(g, w)``, 0 where the ReLU was not active, for BLOCK_M pixels x BLOCK_N of its O channels.

    A ReLU's is added up over the tile's pixels as well: the gradient of the bias in front of it.
    """
    COLUMN_TILES: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    row_tile = tile // COLUMN_TILES
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < O
    n = offs_m // (H * W)
    h = offs_m // W % H - KH // 2
    w = offs_m % W - KW // 2
    acc = implicit_gemm(
        g_ptr, w_ptr, offs_n, n, h, w, mask_m, K, H, W, C, O, KH, KW, True, PACKED_WEIGHT, PRECISION, BLOCK_K
    )
    y = acc.to(out_ptr.dtype.element_ty)
    rows = offs_m.to(tl.int64)[:, None]
    mask = mask_m[:, None] & mask_n[None, :]
    if RELU:
        active = tl.load(active_ptr + rows * O + offs_n[None, :], mask=mask, other=0.0)
        y = tl.where((active <= 0.0) | (mask == 0), 0.0, y)  # NaN passes, as in ATen
        tl.store(partials_ptr + row_tile * O + offs_n, tl.sum(y.to(acc.dtype), axis=0), mask=mask_n)
    tl.store(out_ptr + rows * STRIDE + (COLUMN + offs_n)[None, :], y, mask=mask)


@triton.jit
def _data_gradient_kernel(
    g_ptrs, w_ptrs, active_ptrs, out_ptrs, partials_ptr, sums, reductions, M, H, W,
    LEVEL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one convolution: the tiles of the list's convolutions follow one another."""
    follow_predecessor(PDL)
    row_tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    for i in tl.static_range(len(LEVEL)):
        tiles = row_tiles * ((LEVEL[i][1] + LEVEL[i][6] - 1) // LEVEL[i][6])
        if (tile >= 0) & (tile < tiles):
            _gradient_tile(
                tile, g_ptrs[i], w_ptrs[i], active_ptrs[i], out_ptrs[i], partials_ptr + sums[i],
                reductions[i], M, H, W,
                LEVEL[i][0], LEVEL[i][1], LEVEL[i][2], LEVEL[i][3], LEVEL[i][4], LEVEL[i][5], LEVEL[i][6], LEVEL[i][7],
                LEVEL[i][8], PRECISION, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        tile -= tiles


def data_gradient(
    gradients: Sequence[Gradient], shape: tuple[int, int, int], partials: Tensor, tiles: configs.Tiles
) -> None:
    """Launch on the gradients' device and current stream.

    Args:
        gradients: what to compute; all of one dtype, kernels of odd sizes with 31 taps at most.
        shape: N, H and W of all of them, ``M = N*H*W``.
        partials: float32 (float64 for float64), gets at ``sums`` of each ReLU ``[parts, C]``, the sums of its gradient,
            where parts is ``M / tiles.block_m``, rounded up.
        tiles: see :func:`choose_tiles`.
    """
    n, height, width = shape
    rows = n * height * width
    level, programs = [], 0
    for gradient in gradients:
        out_channels, in_channels, kernel_h, kernel_w = gradient.weight.shape
        # At least 32: with 16, ptxas makes every tensor-core instruction of the kernel wait for the last one (sm_90).
        block_n = configs.narrow(tiles.block_n, max(in_channels, 32))
        packed = gradient.weight.is_contiguous(memory_format=torch.channels_last)
        stride, relu = gradient.out.shape[1], gradient.active is not None
        level.append((out_channels, in_channels, kernel_h, kernel_w, stride, gradient.column, block_n, packed, relu))
        programs += configs.tiles(rows, tiles.block_m) * configs.tiles(in_channels, block_n)
    with target.device_of(partials):
        _data_gradient_kernel[(programs,)](
            tuple(gradient.grad for gradient in gradients),
            tuple(gradient.weight for gradient in gradients),
            tuple(gradient.active for gradient in gradients),
            tuple(gradient.out for gradient in gradients),
            partials,
            tuple(gradient.sums for gradient in gradients),
            tuple(o * kernel_h * kernel_w for o, _, kernel_h, kernel_w, *_ in level),
            rows, height, width,
            LEVEL=tuple(level), PRECISION=target.input_precision(gradients[0].weight.dtype),
            BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, **tiles.options(target.gpu(partials.device)),
        )  # fmt: skip


def choose_tiles(rows: int, weights: Sequence[Tensor]) -> configs.Tiles:
    """Return the tiles of the launch for ``rows`` pixels, by the convolution with the most products."""
    out_channels, in_channels, kernel_h, kernel_w = max((w.shape for w in weights), key=torch.Size.numel)
    gpu = target.gpu(weights[0].device)
    taps = kernel_h * kernel_w
    return configs.choose("data_gradient", rows, out_channels * taps, in_channels, weights[0].dtype, gpu)
