"""Level 0, one launch: the 1x1 convolutions that read x as one GEMM, and the max pool with its projection."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.entry_pool import pool_steps, pooled_tile
from fastinception.kernels.epilogue import (
    bias_relu,
    follow_predecessor,
    is_channels_last,
    out_run,
    out_strides,
    store_result,
    store_rows,
)
from fastinception.kernels.operands import before, choosable, divisible, matrix_of, number, sum_dtype
from fastinception.kernels.replay import Launch


@triton.jit
def _gemm_tile(
    row_tile, first, x_ptr, w_ptrs, b_ptrs, out, dense_ptrs, mask, widths, M, K, pixels,
    DIVISOR: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, AMD: tl.constexpr, PRECISION: tl.constexpr,
    SAVE: tl.constexpr, RELU: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``relu(x @ w.T + b)`` for one tile of the convolutions side by side, each column stored where it belongs."""
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    columns = number(widths[0], DIVISOR)
    for i in tl.static_range(1, len(widths)):
        columns += number(widths[i], DIVISOR)
    # One pointer for each column, chosen among the convolutions' weights: no packed copy, no extra launch.
    rows = before(offs_n, columns, DIVISOR)
    w_rows = matrix_of(w_ptrs, widths, rows, K, DIVISOR, AMD) + rows * K
    if ALIGNED:  # Triton 3.9 forgets it in tl.where, and then copies the weights two bytes at a time, unpipelined
        w_rows = tl.multiple_of(w_rows, 16)

    # Rows past the end read the last row instead of a masked one: their results are never stored.
    x_rows = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=sum_dtype(x_ptr.dtype))
    for k in range(0, K, BLOCK_K):
        w_tile = w_rows[None, :] + (k + offs_k)[:, None]
        if EVEN_K:
            x = tl.load(x_rows + (k + offs_k)[None, :])  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_tile)  # [BLOCK_K, BLOCK_N]
        else:
            mask_k = k + offs_k < K
            x = tl.load(x_rows + (k + offs_k)[None, :], mask=mask_k[None, :], other=0.0)
            w = tl.load(w_tile, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)

    b_columns = choosable(b_ptrs[0], offs_n, AMD)  # not by matrix_of: of pairs Triton 3.9 sees that they are aligned
    start = number(widths[0], DIVISOR)
    for i in tl.static_range(1, len(b_ptrs)):
        b_columns = tl.where(offs_n < start, b_columns, choosable(b_ptrs[i], offs_n - start, AMD))
        start += number(widths[i], DIVISOR)
    # A small load the compiler repeats in the layout of the sums, where each thread would choose and load the biases of
    # all its columns, a fifth of the tile's instructions. One of as many elements as eight warps have threads it leaves
    # as it is: hence rows, of which the first is loaded.
    ROWS: tl.constexpr = max(2, (512 if AMD else 256) // BLOCK_N)
    repeated = tl.broadcast_to(b_columns.to(b_ptrs[0].dtype)[None, :], (ROWS, BLOCK_N))
    loaded = (tl.arange(0, ROWS) == 0)[:, None] & (offs_n < columns)[None, :]
    y = bias_relu(acc, tl.sum(tl.load(repeated, mask=loaded, other=0.0), axis=0), RELU)
    store_result(out, mask, y, offs_m, M, pixels, first, number(widths[0], DIVISOR), 0, 0, SAVE, RUN)
    start = number(widths[0], DIVISOR)
    for i in tl.static_range(1, len(w_ptrs)):
        width = number(widths[i], DIVISOR)
        store_rows(dense_ptrs[i - 1], y, offs_m, M, first - start, width)
        start += width


@triton.jit(do_not_specialize=[
    "pool_width", "pool_column", "pool_mask_column", "M", "H", "W", "stride_mask"
])  # fmt: skip
def _entry_kernel(
    x_ptr, w_ptrs, b_ptrs, out_ptr, dense_ptrs, pool_w_ptr, pool_b_ptr, mask_ptr, pooled_ptr, codes_ptr,
    widths, pool_width, pool_column, pool_mask_column,
    M, K, H, W, stride_on, stride_op, stride_oc, stride_mask,
    PART: tl.constexpr, DIVISOR: tl.constexpr, EVEN_K: tl.constexpr, POOL_STEPS: tl.constexpr, ALIGNED: tl.constexpr,
    AMD: tl.constexpr, PTX: tl.constexpr, MAX_ASM: tl.constexpr,
    PRECISION: tl.constexpr, SAVE: tl.constexpr, RELU: tl.constexpr, RUN: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    POOL_M: tl.constexpr, POOL_N: tl.constexpr, POOL_K: tl.constexpr,
):  # fmt: skip
    """One tile of the GEMM or of the pooled branch; a block of rows has some of each.

    PART says that all are of the one, None of both. DIVISOR divides the widths and ``pool_column``. ALIGNED says that
    the rows of the GEMM's weights are aligned to 16 bytes. LAST_N is the width of the GEMM's last column tile.

    INTERLEAVED: for each block of rows first its GEMM tiles, then its pool tiles, so that x comes from device memory
    once and from the L2 cache after that. Else all GEMM tiles, then all pool tiles.
    """
    follow_predecessor(PDL)
    out, mask = (out_ptr, stride_on, stride_op, stride_oc), (mask_ptr, stride_mask)
    columns = number(widths[0])
    for i in tl.static_range(1, len(w_ptrs)):
        columns += number(widths[i])
    pool_column_tiles = tl.cdiv(pool_width, POOL_N)
    gemm_tiles = 0 if PART == "pool" else tl.cdiv(columns, BLOCK_N)
    pool_tiles = 0 if PART == "gemm" else (BLOCK_M // POOL_M) * pool_column_tiles
    program = tl.program_id(0)
    row_tile = program // (gemm_tiles + pool_tiles)
    tile = program % (gemm_tiles + pool_tiles)
    if PART is None and not INTERLEAVED:
        behind = program - tl.cdiv(M, BLOCK_M) * gemm_tiles
        row_tile = tl.where(behind < 0, program // gemm_tiles, behind // pool_tiles)
        tile = tl.where(behind < 0, program % gemm_tiles, gemm_tiles + behind % pool_tiles)
    if PART == "gemm" or (PART is None and tile < gemm_tiles):
        if LAST_N == BLOCK_N or tile < gemm_tiles - 1:
            _gemm_tile(
                row_tile, tile * BLOCK_N, x_ptr, w_ptrs, b_ptrs, out, dense_ptrs, mask, widths, M, K, H * W,
                DIVISOR, EVEN_K, ALIGNED, AMD, PRECISION, SAVE, RELU, RUN, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _gemm_tile(
                row_tile, tile * BLOCK_N, x_ptr, w_ptrs, b_ptrs, out, dense_ptrs, mask, widths, M, K, H * W,
                DIVISOR, EVEN_K, ALIGNED, AMD, PRECISION, SAVE, RELU, RUN, BLOCK_M, LAST_N, BLOCK_K,
            )  # fmt: skip
    else:
        pool_tile = tile - gemm_tiles
        pooled_tile(
            row_tile * (BLOCK_M // POOL_M) + pool_tile // pool_column_tiles, pool_tile % pool_column_tiles,
            x_ptr, pool_w_ptr, pool_b_ptr, out, mask, pooled_ptr, codes_ptr,
            divisible(pool_width, DIVISOR), divisible(pool_column, DIVISOR), pool_mask_column, M, K, H, W,
            DIVISOR, POOL_STEPS, PTX, MAX_ASM, PRECISION, SAVE, RELU, RUN, POOL_M, POOL_N, POOL_K,
        )  # fmt: skip


def entry(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    pool_weight: Tensor,
    pool_bias: Tensor,
    out: Tensor,
    pool_column: int,
    denses: Sequence[Tensor],
    saved: tuple[Tensor, Tensor, Tensor] | None,
    pool_mask_column: int,
    *,
    relu: bool = True,
    tiles: configs.Tiles | None = None,
    part: str | None = None,
) -> Launch:
    """Launch level 0 on ``x``'s device and current stream.

    Args:
        x: ``[N, K, H, W]``, contiguous in channels_last: a row-major matrix ``[M, K]`` with ``M = N*H*W``.
        weights, biases: of the merged 1x1 convolutions, ``[O_i, K, 1, 1]`` and ``[O_i]``, contiguous.
        pool_weight, pool_bias: of the projection behind the max pool, ``[C4, K, 1, 1]`` and ``[C4]``, contiguous.
        out: ``[N, C, H, W]``, contiguous in either memory format. Channels ``[0, O_0)`` get the first convolution,
            ``[pool_column, pool_column + C4)`` the pooled branch; the others are left alone.
        denses: one ``[N, O_i, H, W]`` in channels_last for every convolution after the first.
        saved: what the backward needs, to be written; None skips it. The packed ReLU mask of ``out``, ``[M, bytes]``
            uint8 (one bit an element, each branch starts a byte); the pooled x, ``[M, K]``; and uint8 ``[M, K]``, which
            pixel of its window each maximum is, as :func:`entry_pool.tap_code` numbers them.
        pool_mask_column: the byte at which the pooled branch starts in the mask.
        relu: False leaves every result as it is.
        tiles: in place of those that ``configs`` chooses.
        part: ``"gemm"`` or ``"pool"`` launches that part alone, to time it; None both.

    All floating tensors have x's dtype. Checked by the caller, but for:

    Raises:
        ValueError: ``part`` is no part.
    """
    mask, pooled, codes = saved or (None, None, None)
    aligned = replay.are_aligned(weights)
    gpu = target.gpu(x.device)
    config = _launch_config(
        x.shape, tuple([w.shape[0] for w in weights]), pool_weight.shape[0], pool_column, pool_mask_column,
        out.shape[1], is_channels_last(out), 0 if mask is None else mask.shape[1], aligned, x.dtype,
        gpu, target.input_precision(x.dtype, gpu), relu, tiles, part,
    )  # fmt: skip
    with target.device_of(x):
        return replay.launch(
            _entry_kernel, config, x, tuple(weights), tuple(biases), out, tuple(denses), pool_weight, pool_bias,
            mask, pooled, codes,
        )  # fmt: skip


@configs.cached
def _launch_config(
    shape: torch.Size,
    widths: tuple[int, ...],
    pool_width: int,
    pool_column: int,
    pool_mask_column: int,
    out_channels: int,
    channels_last: bool,
    mask_bytes: int,
    aligned: bool,
    dtype: torch.dtype,
    gpu: target.Gpu,
    precision: str,
    relu: bool,
    tiles: configs.Tiles | None,
    part: str | None,
) -> configs.LaunchConfig:
    if part not in (None, "gemm", "pool"):
        raise ValueError(f"part must be None, 'gemm' or 'pool', got {part!r}")
    n, channels, height, width = shape
    rows, save = n * height * width, mask_bytes > 0
    kernel = "entry_train" if save else "entry"
    tiles = tiles or configs.choose(kernel, rows, channels, sum(widths), dtype, gpu)
    pool_m, pool_n, pool_k = tiles.pool
    # Not below 64, the least that a Hopper tensor-core instruction takes: the product is transposed.
    pool_n = configs.narrow(pool_n, max(pool_width, 64))
    if gpu.runs_ptx and channels % pool_k and pool_k * dtype.itemsize > 64:
        # An incomplete step takes registers of its own, which half as many channels leave. The codes want as many
        # elements in a step again: pixels, where the product has room for them.
        pool_k //= 2
        if save and pool_n == 64 and pool_m < tiles.block_m:
            pool_m *= 2
    strips = configs.strips(tiles, sum(widths), gpu)
    gemm_tiles = 0 if part == "pool" else sum(strip.tiles for strip in strips)
    pool_tiles = 0 if part == "gemm" else tiles.block_m // pool_m * configs.cdiv(pool_width, pool_n)
    out_shape = n, out_channels, height, width
    strides = out_strides(out_shape, channels_last)
    return configs.launch_config(
        configs.cdiv(rows, tiles.block_m) * (gemm_tiles + pool_tiles),
        (widths, pool_width, pool_column, pool_mask_column, rows, channels, height, width, *strides, mask_bytes),
        PART=part, DIVISOR=math.gcd(8, *widths, pool_width, pool_column),
        EVEN_K=channels % tiles.block_k == 0, POOL_STEPS=pool_steps(channels, pool_k),
        ALIGNED=aligned and channels * dtype.itemsize % 16 == 0,
        AMD=gpu.is_amd, PTX=gpu.runs_ptx, MAX_ASM=target.max_asm(gpu, dtype, with_codes=save), PRECISION=precision,
        SAVE=save, RELU=target.relu_asm(gpu, dtype) if relu else None, RUN=out_run(out_shape, channels_last),
        INTERLEAVED=tiles.interleaved,
        BLOCK_M=tiles.block_m, BLOCK_N=strips[0].block_n, LAST_N=strips[-1].block_n, BLOCK_K=tiles.block_k,
        POOL_M=pool_m, POOL_N=pool_n, POOL_K=pool_k, **tiles.options(gpu),
    )  # fmt: skip
