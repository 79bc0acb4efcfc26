"""The first convolution of a network, forward and backward, whose images have few channels.

The library has no tensor-core kernels for one channel: to it each number of a window is a channel padded to several.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.epilogue import bias_relu
from fastinception.kernels.operands import divisible, sum_dtype
from fastinception.kernels.replay import Launch
from fastinception.kernels.sums import Sum, add_up

_BEYOND = tl.constexpr(1 << 30)  # any row of an image


@triton.jit
def _place(tile, OUT_H, OUT_W, BLOCK_M: tl.constexpr):
    """Return of a tile of BLOCK_M pixels of an output row its image, its row there, and its first pixel there."""
    row = tile // tl.cdiv(OUT_W, BLOCK_M)
    return row // OUT_H, row % OUT_H, tile % tl.cdiv(OUT_W, BLOCK_M) * BLOCK_M


@triton.jit
def _next(n, h, w, OUT_H, OUT_W, BLOCK_M: tl.constexpr):
    """Return the place of the next tile, by additions: divisions would take most of a step's instructions."""
    w += BLOCK_M
    h = tl.where(w < OUT_W, h, h + 1)
    w = tl.where(w < OUT_W, w, 0)
    n = tl.where(h < OUT_H, n, n + 1)
    return n, tl.where(h < OUT_H, h, 0), w


@triton.jit
def _windows(
    x_ptr, n, h, offs_w, H, W, OUT_W, i, j, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr
):
    """Return number j of row i of the windows of pixels of an output row, 0 outside of image, window and row.

    A row of a window is KW * C numbers side by side in x, which is channels_last.
    """
    top = h * STRIDE - KH // 2
    inside = (i < KH) & (j < KW * C) & (top + i >= 0) & (top + i < H)
    left = (offs_w * STRIDE - KW // 2) * C
    column = tl.where(offs_w < OUT_W, left, _BEYOND)[:, None] + j[None, :]
    mask = inside[None, :] & (column >= 0) & (column < W * C)
    image_row = x_ptr + (n.to(tl.int64) * H + top) * (W * C)
    return tl.load(image_row + (left[:, None] + (i * (W * C) + j)[None, :]), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["H", "W", "OUT_H", "OUT_W", "tiles", "steps"])
def _first_layer_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, O, H, W, OUT_H, OUT_W, tiles, steps,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, ROW: tl.constexpr,
    DIVISOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``relu(conv2d(x, w, b))`` for at most ``steps`` of all ``tiles`` of BLOCK_M pixels of a row x BLOCK_N channels.

    A window's rows are ROW apart in the reduction, a power of two: shifts tell what of a window a number is. DIVISOR
    divides O.
    """
    O = divisible(O, DIVISOR)
    column_tiles = tl.cdiv(O, BLOCK_N)
    first = tl.program_id(0) // column_tiles * steps
    offs_n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < O
    i, j = tl.arange(0, BLOCK_K) // ROW, tl.arange(0, BLOCK_K) % ROW
    weights = w_ptr + (offs_n * (KH * KW * C))[None, :] + (i * (KW * C) + j)[:, None]
    weight = tl.load(weights, mask=((i < KH) & (j < KW * C))[:, None] & mask_n[None, :], other=0.0)
    bias = tl.load(b_ptr + offs_n, mask=mask_n, other=0.0)
    dtype: tl.constexpr = sum_dtype(x_ptr.dtype)
    n, h, w = _place(first, OUT_H, OUT_W, BLOCK_M)
    for _ in range(first, tl.minimum(first + steps, tiles)):
        offs_w = w + tl.arange(0, BLOCK_M)
        x = _windows(x_ptr, n, h, offs_w, H, W, OUT_W, i, j, C, KH, KW, STRIDE)
        y = bias_relu(tl.dot(x, weight, input_precision=PRECISION, out_dtype=dtype), bias, RELU)
        out = out_ptr + (n.to(tl.int64) * OUT_H + h) * OUT_W * O + (offs_w[:, None] * O + offs_n[None, :])
        tl.store(out, y, mask=(offs_w < OUT_W)[:, None] & mask_n[None, :])
        n, h, w = _next(n, h, w, OUT_H, OUT_W, BLOCK_M)


@triton.jit(do_not_specialize=["H", "W", "OUT_H", "OUT_W", "tiles", "steps"])
def _first_layer_gradient_kernel(
    x_ptr, g_ptr, partials_ptr, O, H, W, OUT_H, OUT_W, tiles, steps,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, ROW: tl.constexpr,
    DIVISOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum g times windows of x, and g alone, over a part of the pixels, for BLOCK_N channels.

    A part is at most ``steps`` of all ``tiles``, as above. Its sums are O rows of the windows' numbers, and O of g.
    """
    O = divisible(O, DIVISOR)
    column_tiles = tl.cdiv(O, BLOCK_N)
    part = tl.program_id(0) // column_tiles
    offs_n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < O
    i, j = tl.arange(0, BLOCK_K) // ROW, tl.arange(0, BLOCK_K) % ROW
    dtype: tl.constexpr = sum_dtype(x_ptr.dtype)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=dtype)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=dtype)
    n, h, w = _place(part * steps, OUT_H, OUT_W, BLOCK_M)
    for _ in range(part * steps, tl.minimum((part + 1) * steps, tiles)):
        offs_w = w + tl.arange(0, BLOCK_M)
        grads = g_ptr + (n.to(tl.int64) * OUT_H + h) * OUT_W * O + (offs_n[:, None] + offs_w[None, :] * O)
        g = tl.load(grads, mask=mask_n[:, None] & (offs_w < OUT_W)[None, :], other=0.0)
        x = _windows(x_ptr, n, h, offs_w, H, W, OUT_W, i, j, C, KH, KW, STRIDE)
        acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=dtype)
        total += g.to(dtype)
        n, h, w = _next(n, h, w, OUT_H, OUT_W, BLOCK_M)
    partials_ptr += part.to(tl.int64) * (O * (KH * KW * C + 1))
    sums = partials_ptr + offs_n[:, None] * (KH * KW * C) + (i * (KW * C) + j)[None, :]
    tl.store(sums, acc, mask=mask_n[:, None] & ((i < KH) & (j < KW * C))[None, :])
    tl.store(partials_ptr + O * (KH * KW * C) + offs_n, tl.sum(total, axis=1), mask=mask_n)


def first_layer(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, stride: int, *, relu: bool = False) -> Launch:
    """Write ``conv2d(x, weight, bias, stride)`` on x's device and current stream, with ``relu`` the ReLU of it.

    Args:
        x: ``[N, C, H, W]``, contiguous in channels_last.
        weight: ``[O, C, kernel_h, kernel_w]``, both odd, contiguous in channels_last; the padding is half of them. A
            product takes a whole window: with more than 64 numbers registers spill.
        bias: ``[O]``, contiguous.
        out: ``[N, O, ceil(H / stride), ceil(W / stride)]``, contiguous in channels_last.

    All of one dtype. Checked by the caller.
    """
    gpu = target.gpu(x.device)
    config = _launch_config(x.shape, weight.shape, stride, relu, x.dtype, gpu, target.input_precision(x.dtype, gpu))
    with target.device_of(x):
        return replay.launch(_first_layer_kernel, config, x, weight, bias, out)


def first_layer_gradient(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, stride: int) -> None:
    """Launch the gradients of weight and bias on x's device and current stream: sums over parts, and their sums.

    Args:
        x: as for :func:`first_layer`.
        grad: of its output, contiguous in channels_last.
        weight, bias: get the gradients, contiguous as those of :func:`first_layer`.

    All of one dtype. Checked by the caller.
    """
    gpu = target.gpu(x.device)
    config, parts = _gradient_launch_config(x.shape, weight.shape, stride, gpu, target.input_precision(x.dtype, gpu))
    size = weight.numel() + bias.numel()
    partials = x.new_empty(parts * size, dtype=torch.promote_types(x.dtype, torch.float32))
    with target.device_of(x):
        replay.launch(_first_layer_gradient_kernel, config, x, grad, partials)
    sums = Sum(weight.numel(), 0, parts, size), Sum(bias.numel(), weight.numel(), parts, size)
    add_up(sums, (weight, bias), partials)


@configs.cached
def _launch_config(
    shape: torch.Size,
    weight_shape: torch.Size,
    stride: int,
    relu: bool,
    dtype: torch.dtype,
    gpu: target.Gpu,
    precision: str,
) -> configs.LaunchConfig:
    tiles, sizes, constants = _common(shape, weight_shape, stride, precision)
    steps = max(1, min(configs.FIRST_LAYER.steps, tiles // gpu.processors if gpu.processors else tiles))
    programs = configs.cdiv(tiles, steps) * configs.cdiv(weight_shape[0], constants["BLOCK_N"])
    relu_asm = target.relu_asm(gpu, dtype) if relu else None
    return configs.launch_config(programs, (*sizes, tiles, steps), **constants, RELU=relu_asm)


@configs.cached
def _gradient_launch_config(
    shape: torch.Size, weight_shape: torch.Size, stride: int, gpu: target.Gpu, precision: str
) -> tuple[configs.LaunchConfig, int]:
    """Return the launch and its number of parts, as many as fill a GPU."""
    tiles, sizes, constants = _common(shape, weight_shape, stride, precision)
    steps = max(configs.FIRST_LAYER.steps, configs.cdiv(tiles, configs.programs(gpu)))
    parts = configs.cdiv(tiles, steps)
    programs = parts * configs.cdiv(weight_shape[0], constants["BLOCK_N"])
    return configs.launch_config(programs, (*sizes, tiles, steps), **constants), parts


def _common(
    shape: torch.Size, weight_shape: torch.Size, stride: int, precision: str
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Return the number of tiles of pixels of an output row, and both kernels' sizes and constants."""
    n, channels, height, width = shape
    out_channels, _, kernel_h, kernel_w = weight_shape
    out_height, out_width = configs.cdiv(height, stride), configs.cdiv(width, stride)
    sizes = out_channels, height, width, out_height, out_width
    row, config = triton.next_power_of_2(kernel_w * channels), configs.FIRST_LAYER
    block_m, block_n = configs.narrow(config.block_m, out_width), configs.narrow(config.block_n, out_channels)
    constants = {
        "C": channels, "KH": kernel_h, "KW": kernel_w, "STRIDE": stride, "ROW": row,
        "DIVISOR": math.gcd(8, out_channels), "PRECISION": precision, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_K": max(16, triton.next_power_of_2(kernel_h * row)), "num_warps": config.num_warps,
    }  # fmt: skip
    return n * out_height * configs.cdiv(out_width, block_m), sizes, constants
