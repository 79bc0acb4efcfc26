"""Level 1, one launch: a list of convolutions as implicit GEMMs, each into its channels of one output.

Where the tiles say so, the library computes the convolutions, and the launch finishes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.epilogue import (
    bias_relu,
    follow_predecessor,
    is_channels_last,
    out_run,
    out_strides,
    store_result,
)
from fastinception.kernels.implicit_gemm import implicit_gemm, inverses
from fastinception.kernels.operands import number, sum_dtype
from fastinception.kernels.replay import Launch


class Geometry(NamedTuple):
    """What the loop of a strip is compiled for: constants of the kernel, which finds them by their places.

    By names it could not before Triton 3.9.
    """

    conv: int  # which of the list's the strip is of
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    block_m: int
    block_n: int
    divisor: int  # of its channels and of the first that it writes


@triton.jit
def _conv_tile(
    tile, first_tile, column_tiles, x_ptrs, w_ptrs, b_ptrs, out, mask,
    in_channels, out_channels, inverses, row_inverses, columns, mask_columns, M, H, W, OUT_H, OUT_W,
    LEVEL: tl.constexpr, I: tl.constexpr, PRECISION: tl.constexpr,
    SAVE: tl.constexpr, RELU: tl.constexpr, RUN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``relu(conv2d(x, w, b))`` for BLOCK_M output pixels x BLOCK_N output channels of LEVEL's strip I."""
    CONV: tl.constexpr = LEVEL[I][0]
    KH: tl.constexpr = LEVEL[I][1]
    KW: tl.constexpr = LEVEL[I][2]
    SH: tl.constexpr = LEVEL[I][3]
    SW: tl.constexpr = LEVEL[I][4]
    PH: tl.constexpr = LEVEL[I][5]
    PW: tl.constexpr = LEVEL[I][6]
    BLOCK_M: tl.constexpr = LEVEL[I][7]
    BLOCK_N: tl.constexpr = LEVEL[I][8]
    DIVISOR: tl.constexpr = LEVEL[I][9]
    C, O = number(in_channels[CONV], DIVISOR), number(out_channels[CONV], DIVISOR)
    column, mask_column = number(columns[CONV], DIVISOR), number(mask_columns[CONV])
    first = (first_tile + tile % column_tiles) * BLOCK_N
    offs_m = (tile // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < O
    out_pixels = OUT_H * OUT_W
    n = offs_m // out_pixels
    pixel = offs_m % out_pixels
    h = (pixel // OUT_W) * SH - PH
    w = (pixel % OUT_W) * SW - PW
    acc = implicit_gemm(
        x_ptrs[CONV], w_ptrs[CONV], offs_n, n, h, w, mask_m, H, W, C, O, inverses[CONV], row_inverses[CONV],
        KH, KW, DIVISOR, False, PRECISION, BLOCK_K,
    )  # fmt: skip

    y = bias_relu(acc, tl.load(b_ptrs[CONV] + offs_n, mask=mask_n, other=0.0), RELU)
    store_result(out, mask, y, offs_m, M, out_pixels, first, O, column, mask_column, SAVE, RUN)


@triton.jit(do_not_specialize=["M", "H", "W", "OUT_H", "OUT_W", "stride_mask"])
def _spatial_kernel(
    x_ptrs, w_ptrs, b_ptrs, out_ptr, mask_ptr, first_tiles, column_tiles, in_channels, out_channels,
    inverses, row_inverses, columns, mask_columns, M, H, W, OUT_H, OUT_W, stride_on, stride_op, stride_oc, stride_mask,
    LEVEL: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr, RELU: tl.constexpr, RUN: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one strip of a convolution: the tiles of all strips of the list's convolutions follow one another."""
    follow_predecessor(PDL)
    out, mask = (out_ptr, stride_on, stride_op, stride_oc), (mask_ptr, stride_mask)
    tile = tl.program_id(0)
    for i in tl.static_range(len(LEVEL)):
        tiles = tl.cdiv(M, LEVEL[i][7]) * number(column_tiles[i])
        if (tile >= 0) & (tile < tiles):
            _conv_tile(
                tile, number(first_tiles[i]), number(column_tiles[i]), x_ptrs, w_ptrs, b_ptrs, out, mask,
                in_channels, out_channels, inverses, row_inverses, columns, mask_columns, M, H, W, OUT_H, OUT_W,
                LEVEL, i, PRECISION, SAVE, RELU, RUN, BLOCK_K,
            )  # fmt: skip
        tile -= tiles


@triton.jit
def _finish_tile(
    tile, y_ptr, b_ptr, out, mask, M, pixels,
    O: tl.constexpr, COLUMN: tl.constexpr, MASK_COLUMN: tl.constexpr, BLOCK_N: tl.constexpr,
    SAVE: tl.constexpr, RELU: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``relu(y + b)`` for BLOCK_M pixels x BLOCK_N channels of y ``[M, O]``, row-major."""
    COLUMN_TILES: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    first = (tile % COLUMN_TILES) * BLOCK_N
    offs_m = (tile // COLUMN_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < O
    rows = offs_m.to(tl.int64)
    y = tl.load(y_ptr + rows[:, None] * O + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0)
    y = y.to(sum_dtype(y_ptr.dtype))
    y = bias_relu(y, tl.load(b_ptr + offs_n, mask=mask_n, other=0.0), RELU)
    store_result(out, mask, y, offs_m, M, pixels, first, O, COLUMN, MASK_COLUMN, SAVE, RUN)


@triton.jit
def _library_kernel(
    y_ptrs, b_ptrs, out_ptr, mask_ptr, M, pixels, stride_on, stride_op, stride_oc, stride_mask,
    LEVEL: tl.constexpr, SAVE: tl.constexpr, RELU: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one convolution's result: the tiles of the list's convolutions follow one another.

    Its widths are constants: only a tuned table chooses it, so that few blocks compile it.
    """
    follow_predecessor(PDL)
    out, mask = (out_ptr, stride_on, stride_op, stride_oc), (mask_ptr, stride_mask)
    row_tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    for i in tl.static_range(len(LEVEL)):
        tiles = row_tiles * ((LEVEL[i][0] + LEVEL[i][3] - 1) // LEVEL[i][3])
        if (tile >= 0) & (tile < tiles):
            _finish_tile(
                tile, y_ptrs[i], b_ptrs[i], out, mask, M, pixels,
                LEVEL[i][0], LEVEL[i][1], LEVEL[i][2], LEVEL[i][3], SAVE, RELU, RUN, BLOCK_M,
            )  # fmt: skip
        tile -= tiles


class Conv(NamedTuple):
    """One convolution of a level: what it reads, its numbers, and where its result goes."""

    x: Tensor  # [N, C, H, W], contiguous in channels_last
    weight: Tensor  # [O, C, kernel_h, kernel_w], contiguous in channels_last
    bias: Tensor  # [O], contiguous
    column: int  # first output channel
    mask_column: int = 0  # first byte in the packed ReLU mask
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


def spatial(
    convs: Sequence[Conv],
    out: Tensor,
    mask: Tensor | None,
    *,
    relu: bool = True,
    tiles: configs.Tiles | None = None,
) -> Launch | None:
    """Launch level 1 on ``out``'s device and current stream. Returns None where the library computes.

    Args:
        convs: convolutions whose inputs share ``[N, :, H, W]`` and whose outputs share ``[N, :, OUT_H, OUT_W]``.
        out: ``[N, C, OUT_H, OUT_W]``, contiguous in either memory format; channels no convolution owns are left alone.
        mask: ``[N*OUT_H*OUT_W, bytes]`` uint8, the packed ReLU mask of ``out``; None skips it.
        relu: False leaves every result as it is.
        tiles: in place of those that ``configs`` chooses, by the convolution with the most products.

    All floating tensors share one dtype. Checked by the caller, but for:

    Raises:
        ValueError: a kernel has more than 31 taps, more than its bits; not where the library computes it.
    """
    specs = tuple([(c.weight.shape, c.stride, c.padding, c.column, c.mask_column) for c in convs])
    gpu = target.gpu(out.device)
    config, by_library = _launch_config(
        specs, convs[0].x.shape[2:], out.shape, is_channels_last(out), 0 if mask is None else mask.shape[1],
        out.dtype, gpu, target.input_precision(out.dtype, gpu), relu, tiles,
    )  # fmt: skip
    xs, weights, biases = (tuple([conv[i] for conv in convs]) for i in range(3))
    with target.device_of(out):
        if by_library:
            replay.launch(_library_kernel, config, tuple(map(_convolve, convs)), biases, out, mask)
            return None
        return replay.launch(_spatial_kernel, config, xs, weights, biases, out, mask)


def _convolve(conv: Conv) -> Tensor:
    """Return a convolution by the library, in channels_last and without its bias.

    Each sum of products is rounded to the dtype before that is added, as the library does without fusion.
    """
    y = F.conv2d(conv.x, conv.weight, None, conv.stride, conv.padding)
    return y.contiguous(memory_format=torch.channels_last)  # a size of 1 leaves the layout open; else it is that


@configs.cached
def _launch_config(
    convs: tuple[tuple[Any, ...], ...],
    size: torch.Size,
    out_shape: torch.Size,
    channels_last: bool,
    mask_bytes: int,
    dtype: torch.dtype,
    gpu: target.Gpu,
    precision: str,
    relu: bool,
    tiles: configs.Tiles | None,
) -> tuple[configs.LaunchConfig, bool]:
    """Return the launch, and whether the library computes the convolutions, which it finishes."""
    n, _, out_height, out_width = out_shape
    rows = n * out_height * out_width
    if tiles is None:
        kernel = "spatial_train" if mask_bytes else "spatial"
        largest = max((shape for shape, *_ in convs), key=torch.Size.numel)
        columns = max(shape[0] for shape, *_ in convs)  # of all: each convolution narrows the tile for itself
        tiles = configs.choose(kernel, rows, largest[1:].numel(), columns, dtype, gpu)
    strides = out_strides(out_shape, channels_last)
    constants = tiles.options(gpu) | {
        "SAVE": mask_bytes > 0, "RELU": target.relu_asm(gpu, dtype) if relu else None,
        "RUN": out_run(out_shape, channels_last),
    }  # fmt: skip
    if tiles.library:
        widths = [(shape[0], column, mask_column) for shape, _, _, column, mask_column in convs]
        finished = tuple([(*width, configs.narrow(tiles.block_n, width[0])) for width in widths])
        programs = configs.cdiv(rows, tiles.block_m) * sum(configs.cdiv(o, block_n) for o, _, _, block_n in finished)
        config = configs.launch_config(
            programs, (rows, out_height * out_width, *strides, mask_bytes),
            LEVEL=finished, BLOCK_M=tiles.block_m, **constants,
        )  # fmt: skip
        return config, True
    level: list[Geometry] = []
    strips: list[configs.Strip] = []
    sizes: list[tuple[int | None, ...]] = []
    for i, ((out_channels, in_channels, kernel_h, kernel_w), stride, padding, column, mask_column) in enumerate(convs):
        if kernel_h * kernel_w > 31:
            raise ValueError(f"a convolution of at most 31 taps was expected, got {kernel_h}x{kernel_w}")
        divisor = math.gcd(8, in_channels, out_channels, column)
        for strip in configs.strips(tiles, out_channels, gpu):
            level.append(Geometry(i, kernel_h, kernel_w, *stride, *padding, strip.block_m, strip.block_n, divisor))
            strips.append(strip)
        sizes.append((in_channels, out_channels, *inverses(in_channels, kernel_h, kernel_w), column, mask_column))
    programs, *lists = configs.in_turn(strips, rows)
    config = configs.launch_config(
        programs, (*lists, *zip(*sizes, strict=True), rows, *size, out_height, out_width, *strides, mask_bytes),
        LEVEL=tuple(map(tuple, level)), PRECISION=precision, BLOCK_K=tiles.block_k, **constants,
    )  # fmt: skip
    return config, False
