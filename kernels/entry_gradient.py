"""Backward, third and fourth launch: the gradient of x, from the pool and from the convolutions that read it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.entry_pool import tap_code, where_code_is, window_gradients
from fastinception.kernels.epilogue import follow_predecessor, is_channels_last, out_run, out_strides, store_out
from fastinception.kernels.operands import before, divisible, matrix_of, sum_dtype
from fastinception.kernels.replay import Launch


@triton.jit(do_not_specialize=["M", "H", "W"])
def _pool_gradient_kernel(
    grad_ptr, codes_ptr, out_ptr, M, K, H, W, stride_on, stride_op, stride_oc,
    PTX: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gather, for BLOCK_M pixels x BLOCK_N channels, the gradients of the windows whose maximum the pixel is.

    Nine windows hold a pixel, and each has the code of its maximum: no atomic addition, one order.
    """
    column_tiles = tl.cdiv(K, BLOCK_N)
    offs_m = (tl.program_id(0) // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % column_tiles) * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < K
    h = offs_m // W % H
    w = offs_m % W
    dtype: tl.constexpr = sum_dtype(grad_ptr.dtype)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    for tap in tl.static_range(9):  # the pixel is this tap of the window around (h - dh, w - dw)
        dh = tap // 3 - 1
        dw = tap % 3 - 1
        inside = mask_m & (h - dh >= 0) & (h - dh < H) & (w - dw >= 0) & (w - dw < W)
        grad, codes = window_gradients(grad_ptr, codes_ptr, offs_m - dh * W - dw, offs_n, inside, mask_n, K)
        acc += where_code_is(codes, tap_code(tap), grad, PTX).to(dtype)
    store_out((out_ptr, stride_on, stride_op, stride_oc), acc, offs_m, M, H * W, first, K, 0, RUN)


@triton.jit
def _entry_gradient_tile(
    row_tile, first, g_ptr, w_ptrs, out, widths, M, K, COLUMNS, pixels,
    DIVISOR: tl.constexpr, EVEN_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, AMD: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add ``g @ w`` for one tile to ``out``, with the convolutions' weights below one another."""
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    columns = divisible(COLUMNS, DIVISOR)
    # Rows past the end read the last row instead of a masked one: their results are never stored.
    g_rows = g_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * columns
    CHUNK: tl.constexpr = 128 // g_ptr.dtype.element_ty.primitive_bitwidth if ALIGNED else 1  # divides K
    stride = divisible(K, CHUNK)
    w_offsets = (offs_k * stride)[:, None] + before(offs_n, stride, CHUNK)[None, :]
    dtype: tl.constexpr = sum_dtype(g_ptr.dtype)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    for k in range(0, COLUMNS, BLOCK_K):
        j = k + offs_k
        w_matrix = matrix_of(w_ptrs, widths, j, stride, DIVISOR, AMD)
        w_rows = w_matrix[:, None] + (w_offsets + k * stride)
        if ALIGNED:  # Triton forgets it in tl.where, and then copies the weights two bytes at a time, unpipelined
            w_rows = tl.multiple_of(w_rows, (1, 16))
        if EVEN_COLUMNS:
            g = tl.load(g_rows + j[None, :])  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_rows)  # [BLOCK_K, BLOCK_N]
        else:
            mask_k = j < columns
            g = tl.load(g_rows + j[None, :], mask=mask_k[None, :], other=0.0)
            w = tl.load(w_rows, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION, out_dtype=dtype)
    store_out(out, acc, offs_m, M, pixels, first, K, 0, RUN, ADD=True)


@triton.jit(do_not_specialize=["M", "COLUMNS", "pixels"])
def _entry_gradient_kernel(
    g_ptr, w_ptrs, out_ptr, widths, M, K, COLUMNS, pixels, stride_on, stride_op, stride_oc,
    DIVISOR: tl.constexpr, EVEN_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, AMD: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAST_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile; a block of rows has them side by side, and the last one is LAST_N wide.

    DIVISOR divides the widths. ALIGNED says that the rows of the weights are aligned to 16 bytes.
    """
    follow_predecessor(PDL)
    out = out_ptr, stride_on, stride_op, stride_oc
    column_tiles = tl.cdiv(K, BLOCK_N)
    row_tile = tl.program_id(0) // column_tiles
    tile = tl.program_id(0) % column_tiles
    if LAST_N == BLOCK_N or tile < column_tiles - 1:
        _entry_gradient_tile(
            row_tile, tile * BLOCK_N, g_ptr, w_ptrs, out, widths, M, K, COLUMNS, pixels,
            DIVISOR, EVEN_COLUMNS, ALIGNED, PRECISION, AMD, RUN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _entry_gradient_tile(
            row_tile, tile * BLOCK_N, g_ptr, w_ptrs, out, widths, M, K, COLUMNS, pixels,
            DIVISOR, EVEN_COLUMNS, ALIGNED, PRECISION, AMD, RUN, BLOCK_M, LAST_N, BLOCK_K,
        )  # fmt: skip


def pool_gradient(grad: Tensor, codes: Tensor, out: Tensor) -> Launch:
    """Write the gradient of ``max_pool2d(x, 3, 1, 1)`` to ``out``, on its device and current stream.

    Args:
        grad: gradient of the pooled x, ``[M, K]``, contiguous.
        codes: what the entry level kept, uint8 ``[M, K]``.
        out: ``[N, K, H, W]``, contiguous in either memory format, grad's dtype.
    """
    config = _pool_launch_config(out.shape, is_channels_last(out), out.dtype, target.gpu(out.device))
    with target.device_of(out):
        return replay.launch(_pool_gradient_kernel, config, grad, codes, out)


@configs.cached
def _pool_launch_config(
    shape: torch.Size, channels_last: bool, dtype: torch.dtype, gpu: target.Gpu
) -> configs.LaunchConfig:
    n, channels, height, width = shape
    rows, config = n * height * width, configs.sweep(configs.POOL, gpu)
    tiles = configs.cdiv(rows, config.block_m) * configs.cdiv(channels, config.block_n)
    return configs.launch_config(
        tiles, (rows, channels, height, width, *out_strides(shape, channels_last)),
        PTX=gpu.runs_ptx and dtype.itemsize == 2, RUN=out_run(shape, channels_last),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip


def entry_gradient(
    grad: Tensor, weights: Sequence[Tensor], out: Tensor, *, tiles: configs.Tiles | None = None
) -> Launch:
    """Add the data gradient of the 1x1 convolutions that read x to ``out``, on its device and current stream.

    Args:
        grad: gradients of their results side by side, ``[M, O_0 + O_1 + ...]``, contiguous.
        weights: ``[O_i, K, 1, 1]``, contiguous.
        out: ``[N, K, H, W]``, contiguous in either memory format.
        tiles: in place of those that ``configs`` chooses.

    All of one dtype. Checked by the caller.
    """
    aligned = replay.are_aligned(weights)
    gpu = target.gpu(out.device)
    config = _entry_launch_config(
        out.shape, tuple([w.shape[0] for w in weights]), is_channels_last(out), aligned, out.dtype,
        gpu, target.input_precision(out.dtype, gpu), tiles,
    )  # fmt: skip
    with target.device_of(out):
        return replay.launch(_entry_gradient_kernel, config, grad, tuple(weights), out)


@configs.cached
def _entry_launch_config(
    shape: torch.Size,
    widths: tuple[int, ...],
    channels_last: bool,
    aligned: bool,
    dtype: torch.dtype,
    gpu: target.Gpu,
    precision: str,
    tiles: configs.Tiles | None,
) -> configs.LaunchConfig:
    n, channels, height, width = shape
    rows, columns = n * height * width, sum(widths)
    tiles = tiles or configs.choose("entry_gradient", rows, columns, channels, dtype, gpu)
    strips = configs.strips(tiles, channels, gpu)
    programs = configs.cdiv(rows, tiles.block_m) * sum(strip.tiles for strip in strips)
    sizes = (widths, rows, channels, columns, height * width, *out_strides(shape, channels_last))
    return configs.launch_config(
        programs, sizes,
        DIVISOR=math.gcd(8, *widths), EVEN_COLUMNS=columns % tiles.block_k == 0,
        ALIGNED=aligned and channels * dtype.itemsize % 16 == 0,
        PRECISION=precision, AMD=gpu.is_amd, RUN=out_run(shape, channels_last),
        BLOCK_M=tiles.block_m, BLOCK_N=strips[0].block_n, LAST_N=strips[-1].block_n, BLOCK_K=tiles.block_k,
        **tiles.options(gpu),
    )  # fmt: skip
