"""Backward, second launch: data gradients of a list of convolutions as implicit GEMMs, each where it is needed next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.epilogue import follow_predecessor
from fastinception.kernels.implicit_gemm import implicit_gemm, inverses
from fastinception.kernels.operands import before, number
from fastinception.kernels.replay import Launch


class Gradient(NamedTuple):
    """One convolution with stride 1 whose output has its input's size: the gradient of its input."""

    shape: tuple[int, ...]  # of the weight, [O, C, kernel_h, kernel_w]
    relu: bool  # its input is the result of a ReLU
    stride: int  # columns of the matrix that the gradient is written to
    column: int = 0  # the first of them that is written
    offset: int = 0  # of its sums in ``partials``, for a ReLU only


@triton.jit
def _gradient_tile(
    tile, first_tile, column_tiles, g_ptrs, w_ptrs, active_ptrs, out_ptrs, partials_ptr,
    out_channels, in_channels, inverses, row_inverses, strides, columns, offsets, M, H, W,
    LEVEL: tl.constexpr, I: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``conv_transpose2d(g, w)``, 0 where the ReLU was not active, for BLOCK_M pixels x BLOCK_N channels of strip I.

    C is the forward's output channels, over which the sum runs, O its input channels. A ReLU's is added up over the
    tile's pixels as well: the gradient of the bias in front of it.
    """
    CONV: tl.constexpr = LEVEL[I][0]
    KH: tl.constexpr = LEVEL[I][1]
    KW: tl.constexpr = LEVEL[I][2]
    RELU: tl.constexpr = LEVEL[I][3]
    BLOCK_M: tl.constexpr = LEVEL[I][4]
    BLOCK_N: tl.constexpr = LEVEL[I][5]
    DIVISOR: tl.constexpr = LEVEL[I][6]
    C, O = number(out_channels[CONV], DIVISOR), number(in_channels[CONV], DIVISOR)
    stride, column = number(strides[CONV], DIVISOR), number(columns[CONV], DIVISOR)
    row_tile = tile // column_tiles
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (first_tile + tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < O
    n = offs_m // (H * W)
    h = offs_m // W % H - KH // 2
    w = offs_m % W - KW // 2
    acc = implicit_gemm(
        g_ptrs[CONV], w_ptrs[CONV], offs_n, n, h, w, mask_m, H, W, C, O, inverses[CONV], row_inverses[CONV],
        KH, KW, DIVISOR, True, PRECISION, BLOCK_K,
    )  # fmt: skip
    rows = offs_m.to(tl.int64)[:, None]
    mask = mask_m[:, None] & mask_n[None, :]
    if RELU:
        # Behind the last channel is what is never stored.
        active_tile = active_ptrs[CONV] + rows * O + before(offs_n, O, DIVISOR)[None, :]
        active = tl.load(active_tile, mask=mask_m[:, None], other=0.0)
        acc = tl.where(active <= 0.0, 0.0, acc)  # NaN passes, as in ATen; what is masked was loaded as 0
        # As they are: of rounded ones, ptxas makes tensor-core instructions wait for each other (sm_90, Triton 3.6).
        sums_ptr = partials_ptr + number(offsets[CONV])
        tl.store(sums_ptr + row_tile * O + offs_n, tl.sum(acc, axis=0), mask=mask_n)
    tl.store(out_ptrs[CONV] + rows * stride + (column + offs_n)[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W"])
def _data_gradient_kernel(
    g_ptrs, w_ptrs, active_ptrs, out_ptrs, partials_ptr, first_tiles, column_tiles,
    out_channels, in_channels, inverses, row_inverses, strides, columns, offsets, M, H, W,
    LEVEL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one strip of a convolution: the tiles of all strips of the list's convolutions follow one another."""
    follow_predecessor(PDL)
    tile = tl.program_id(0)
    for i in tl.static_range(len(LEVEL)):
        tiles = tl.cdiv(M, LEVEL[i][4]) * number(column_tiles[i])
        if (tile >= 0) & (tile < tiles):
            _gradient_tile(
                tile, number(first_tiles[i]), number(column_tiles[i]),
                g_ptrs, w_ptrs, active_ptrs, out_ptrs, partials_ptr,
                out_channels, in_channels, inverses, row_inverses, strides, columns, offsets, M, H, W,
                LEVEL, i, PRECISION, BLOCK_K,
            )  # fmt: skip
        tile -= tiles


def data_gradient(
    gradients: tuple[Gradient, ...],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    actives: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    shape: tuple[int, int, int],
    partials: Tensor,
    tiles: configs.Tiles,
) -> Launch:
    """Launch on the gradients' device and current stream.

    Args:
        gradients: what to compute; kernels of odd sizes with 31 taps at most.
        grads: of their outputs, ``[M, O]``, contiguous, with ``M = N*H*W``.
        weights: ``[O, C, kernel_h, kernel_w]``, contiguous in channels_last.
        actives: for each ReLU its result, ``[N, C, H, W]`` in channels_last, else None.
        outs: rows of pixels, ``[M, stride]``, contiguous.
        shape: N, H and W of all of them.
        partials: float32 (float64 for float64), gets at ``offset`` of each ReLU ``[parts, C]``: the sums of its
            gradient, see :func:`parts`.
        tiles: see :func:`choose_tiles`.

    All but partials have one dtype. Checked by the caller.
    """
    gpu = target.gpu(partials.device)
    dtype = weights[0].dtype
    config = _launch_config(gradients, shape, tiles, dtype, gpu, target.input_precision(dtype, gpu))
    with target.device_of(partials):
        return replay.launch(
            _data_gradient_kernel, config, tuple(grads), tuple(weights), tuple(actives), tuple(outs), partials
        )


def choose_tiles(rows: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, gpu: target.Gpu) -> configs.Tiles:
    """Return the tiles of the launch for ``rows`` pixels, by the weight with the most products."""
    out_channels, _, kernel_h, kernel_w = max(shapes, key=math.prod)
    columns = max(shape[1] for shape in shapes)  # of all: each convolution narrows the tile for itself
    return configs.choose("data_gradient", rows, out_channels * kernel_h * kernel_w, columns, dtype, gpu)


def parts(rows: int, channels: int, tiles: configs.Tiles, gpu: target.Gpu) -> int:
    """Return of how many parts a ReLU's sums come, where its convolution reads ``channels``."""
    return configs.cdiv(rows, _strips(tiles, channels, gpu)[0].block_m)


def _strips(tiles: configs.Tiles, channels: int, gpu: target.Gpu) -> list[configs.Strip]:
    # No tile below 32, as there. All strips' are of as many pixels, as each row of tiles adds one part to ``partials``.
    # What is left and takes half a tile gets a whole one: beside another tile of half the width, ptxas makes
    # tensor-core instructions wait for each other (3.6).
    strips = configs.strips(tiles, max(channels, 32), gpu)
    if len(strips) == 2 and 2 * strips[1].block_n == strips[0].block_n:
        return [strips[0]._replace(tiles=strips[0].tiles + 1)]
    return [strip._replace(block_m=strips[0].block_m) for strip in strips]


@configs.cached
def _launch_config(
    gradients: tuple[Gradient, ...],
    shape: tuple[int, int, int],
    tiles: configs.Tiles,
    dtype: torch.dtype,
    gpu: target.Gpu,
    precision: str,
) -> configs.LaunchConfig:
    rows = math.prod(shape)
    level, strips, sizes = [], [], []
    for i, ((out_channels, in_channels, kernel_h, kernel_w), relu, stride, column, offset) in enumerate(gradients):
        divisor = math.gcd(8, out_channels, in_channels, stride, column)
        for strip in _strips(tiles, in_channels, gpu):
            level.append((i, kernel_h, kernel_w, relu, strip.block_m, strip.block_n, divisor))
            strips.append(strip)
        sizes.append((out_channels, in_channels, *inverses(out_channels, kernel_h, kernel_w), stride, column, offset))
    options = tiles.options(gpu)
    if gpu.chip == "sm_90" and dtype.itemsize == 2 and tiles.block_m * tiles.block_n <= 64 * 32 * tiles.num_warps:
        options["maxnreg"] = 128  # two programs for an SM: left alone, ptxas takes 150 for some lists of strips
    programs, *lists = configs.in_turn(strips, rows)
    return configs.launch_config(
        programs, (*lists, *zip(*sizes, strict=True), rows, *shape[1:]),
        LEVEL=tuple(level), PRECISION=precision, BLOCK_K=tiles.block_k, **options,
    )  # fmt: skip
