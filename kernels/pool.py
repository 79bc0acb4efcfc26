"""The max pools around the blocks, forward and backward, and what comes in front of them: a bias and a ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.entry_pool import (
    NONE,
    borders,
    own_codes,
    tap_code,
    where_code_is,
    window_gradients,
    window_maximum,
)
from fastinception.kernels.epilogue import bias_relu
from fastinception.kernels.operands import sum_dtype
from fastinception.kernels.replay import Launch
from fastinception.kernels.sums import Sum, add_up


@triton.jit(do_not_specialize=["M", "H", "W", "OUT_H", "OUT_W"])
def _max_pool_kernel(
    x_ptr, b_ptr, out_ptr, codes_ptr, M, C, H, W, OUT_H, OUT_W,
    MAX_ASM: tl.constexpr, RELU: tl.constexpr, SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``relu(max_pool2d(x, 3, 2, 1) + b)`` for BLOCK_M of M output pixels x BLOCK_N channels, each part of it if asked.

    SAVE keeps the code of each window's maximum, the first one's of numbers that are equal before the bias.
    """
    column_tiles = tl.cdiv(C, BLOCK_N)
    offs_m = (tl.program_id(0) // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    pixel = tl.minimum(offs_m, M - 1)
    n = pixel // (OUT_H * OUT_W)
    h = pixel // OUT_W % OUT_H * 2
    w = pixel % OUT_W * 2
    up, down, left, right, middle, inner = borders(h, w, H, W)
    pooled, codes = window_maximum(
        x_ptr, (n * H + h) * W + w, up, down, left, right, offs_n, mask_n, C, True, MAX_ASM, SAVE
    )
    if RELU is not None or b_ptr is not None:
        # As PyTorch adds it: to what is rounded, and a maximum commutes with rounding and with adding what is finite.
        sums = pooled.to(sum_dtype(x_ptr.dtype))
        if b_ptr is not None:
            bias = tl.load(b_ptr + offs_n, mask=mask_n, other=0.0)
        else:
            bias = tl.zeros((BLOCK_N,), x_ptr.dtype.element_ty)
        pooled = bias_relu(sums, bias, RELU)
    out = offs_m.to(tl.int64)[:, None] * C + offs_n[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    tl.store(out_ptr + out, pooled, mask=mask)
    if SAVE:
        codes = own_codes(codes, middle, inner, MAX_ASM)
        if RELU is not None:
            codes = tl.where(pooled <= 0.0, NONE, codes).to(tl.uint8)  # false for NaN
        CHUNK: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # as in entry_pool
        tl.store(codes_ptr + tl.max_contiguous(out, (1, CHUNK)), codes, mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W", "OUT_H", "OUT_W", "steps"])
def _max_pool_gradient_kernel(
    grad_ptr, codes_ptr, out_ptr, partials_ptr, M, C, H, W, OUT_H, OUT_W, steps,
    PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write two by two pixels for each of steps * BLOCK_M windows x BLOCK_N channels, and sum what passes the ReLU.

    A window has its middle at every second pixel, so that one pixel in four lies in one window, two lie in two, and one
    in four: each gathers the gradients of those whose maximum it is. No atomic addition, one order.
    """
    column_tiles = tl.cdiv(C, BLOCK_N)
    part = tl.program_id(0) // column_tiles
    offs_n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    dtype: tl.constexpr = sum_dtype(grad_ptr.dtype)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    for step in range(tl.minimum(steps, tl.cdiv(M, BLOCK_M) - part * steps)):  # pixels behind M may be beyond int32
        offs_m = (part * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        h = offs_m // OUT_W % OUT_H
        w = offs_m % OUT_W
        beside = mask_m & (w + 1 < OUT_W)
        below = mask_m & (h + 1 < OUT_H)
        g, codes = window_gradients(grad_ptr, codes_ptr, offs_m, offs_n, mask_m, mask_n, C)
        g_beside, codes_beside = window_gradients(grad_ptr, codes_ptr, offs_m + 1, offs_n, beside, mask_n, C)
        g_below, codes_below = window_gradients(grad_ptr, codes_ptr, offs_m + OUT_W, offs_n, below, mask_n, C)
        g_both, codes_both = window_gradients(
            grad_ptr, codes_ptr, offs_m + OUT_W + 1, offs_n, beside & below, mask_n, C
        )
        pixel = (offs_m // (OUT_H * OUT_W) * H + 2 * h) * W + 2 * w
        out = out_ptr + pixel.to(tl.int64)[:, None] * C + offs_n[None, :]
        right = mask_m & (2 * w + 1 < W)
        under = mask_m & (2 * h + 1 < H)
        row = W.to(tl.int64) * C
        tl.store(out, where_code_is(codes, tap_code(4), g, PTX), mask=mask_m[:, None] & mask_n[None, :])
        at = where_code_is(codes, tap_code(5), g, PTX).to(dtype)
        at += where_code_is(codes_beside, tap_code(3), g_beside, PTX).to(dtype)
        tl.store(out + C, at, mask=right[:, None] & mask_n[None, :])
        at = where_code_is(codes, tap_code(7), g, PTX).to(dtype)
        at += where_code_is(codes_below, tap_code(1), g_below, PTX).to(dtype)
        tl.store(out + row, at, mask=under[:, None] & mask_n[None, :])
        at = where_code_is(codes, tap_code(8), g, PTX).to(dtype)
        at += where_code_is(codes_beside, tap_code(6), g_beside, PTX).to(dtype)
        at += where_code_is(codes_below, tap_code(2), g_below, PTX).to(dtype)
        at += where_code_is(codes_both, tap_code(0), g_both, PTX).to(dtype)
        tl.store(out + row + C, at, mask=(right & under)[:, None] & mask_n[None, :])
        if partials_ptr is not None:
            total += tl.where(codes == NONE, 0.0, g).to(dtype)
    if partials_ptr is not None:
        tl.store(partials_ptr + part.to(tl.int64) * C + offs_n, tl.sum(total, axis=0), mask=mask_n)


def max_pool(x: Tensor, bias: Tensor | None, out: Tensor, codes: Tensor | None = None, *, relu: bool = False) -> Launch:
    """Write ``max_pool2d(x, 3, 2, 1) + bias``, with ``relu`` its ReLU, on x's device and current stream.

    Args:
        x: ``[N, C, H, W]``, contiguous in channels_last.
        bias: ``[C]``, contiguous, x's dtype, or None.
        out: ``[N, C, (H + 1) // 2, (W + 1) // 2]``, contiguous in channels_last, x's dtype.
        codes: uint8, out's shape and strides, gets what :func:`max_pool_gradient` needs, or None.

    Checked by the caller.
    """
    config = _launch_config(x.shape, relu, codes is not None, x.dtype, target.gpu(x.device))
    with target.device_of(x):
        return replay.launch(_max_pool_kernel, config, x, bias, out, codes)


def max_pool_gradient(grad: Tensor, codes: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write the gradient of :func:`max_pool` to ``out``, on its device and current stream.

    Args:
        grad: gradient of the result, contiguous in channels_last.
        codes: what :func:`max_pool` kept, grad's shape and strides.
        out: x's shape, contiguous in channels_last, grad's dtype.
        bias: gets that of the bias, ``[C]``, contiguous, grad's dtype, or None.
    """
    config, parts = _gradient_launch_config(out.shape, out.dtype, target.gpu(out.device))
    channels, dtype = out.shape[1], torch.promote_types(out.dtype, torch.float32)
    partials = None if bias is None else out.new_empty(parts * channels, dtype=dtype)
    with target.device_of(out):
        replay.launch(_max_pool_gradient_kernel, config, grad, codes, out, partials)
    if bias is not None and partials is not None:
        add_up((Sum(channels, 0, parts, channels),), (bias,), partials)


@configs.cached
def _launch_config(
    shape: torch.Size, relu: bool, save: bool, dtype: torch.dtype, gpu: target.Gpu
) -> configs.LaunchConfig:
    config = _piece(dtype, save, gpu)
    tiles, column_tiles, sizes = _tiles(shape, config)
    return configs.launch_config(
        tiles * column_tiles, sizes,
        MAX_ASM=target.max_asm(gpu, dtype, with_codes=save), RELU=target.relu_asm(gpu, dtype) if relu else None,
        SAVE=save, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip


@configs.cached
def _gradient_launch_config(shape: torch.Size, dtype: torch.dtype, gpu: target.Gpu) -> tuple[configs.LaunchConfig, int]:
    """Return the launch, and how many sums of each channel it leaves."""
    config = _piece(dtype, True, gpu)
    tiles, column_tiles, sizes = _tiles(shape, config)
    # As many steps as leave enough programs to hide latency: their sums are added up by few.
    steps = max(1, tiles * column_tiles // (8 * (gpu.processors or 1)))
    parts = configs.cdiv(tiles, steps)
    return configs.launch_config(
        parts * column_tiles, (*sizes, steps), PTX=gpu.runs_ptx and dtype.itemsize == 2,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    ), parts  # fmt: skip


def _piece(dtype: torch.dtype, trains: bool, gpu: target.Gpu) -> configs.Sweep:
    """Return what a program passes over: half as many pixels where codes take four registers, as numbers do."""
    config = configs.sweep(configs.POOL, gpu)
    return config._replace(block_m=config.block_m // 2) if trains and dtype.itemsize > 2 else config


def _tiles(shape: torch.Size, config: configs.Sweep) -> tuple[int, int, tuple[int, ...]]:
    """Return how many tiles of pixels and of channels the output has, and the kernels' sizes."""
    n, channels, height, width = shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    rows = n * out_height * out_width
    sizes = rows, channels, height, width, out_height, out_width
    return configs.cdiv(rows, config.block_m), configs.cdiv(channels, config.block_n), sizes
