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
from fastinception.kernels.operands import before, number
from fastinception.kernels.replay import Launched
from fastinception.kernels.spatial import implicit_gemm, inverses


class Gradient(NamedTuple):
    """One convolution with stride 1 whose output has its input's size: the gradient of its input."""

    shape: tuple[int, ...]  # of the weight, [O, C, kernel_h, kernel_w]
    relu: bool  # its input is the result of a ReLU
    stride: int  # columns of the matrix that the gradient is written to
    column: int = 0  # the first of them that is written
    sums: int = 0  # where in ``partials`` its sums begin, for a ReLU only


@triton.jit
def _gradient_tile(
    tile, g_ptr, w_ptr, active_ptr, out_ptr, partials_ptr, C, O, inverse, row_inverse, stride, column, M, H, W,
    KH: tl.constexpr, KW: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``conv_transpose2d(g, w)``, 0 where the ReLU was not active, for BLOCK_M pixels x BLOCK_N of its O channels.

    A ReLU's is added up over the tile's pixels as well: the gradient of the bias in front of it.
    """
    column_tiles = tl.cdiv(O, BLOCK_N)
    row_tile = tile // column_tiles
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < O
    n = offs_m // (H * W)
    h = offs_m // W % H - KH // 2
    w = offs_m % W - KW // 2
    acc = implicit_gemm(
        g_ptr, w_ptr, offs_n, n, h, w, mask_m, H, W, C, O, inverse, row_inverse,
        KH, KW, DIVISOR, True, PRECISION, BLOCK_K,
    )  # fmt: skip
    rows = offs_m.to(tl.int64)[:, None]
    mask = mask_m[:, None] & mask_n[None, :]
    if RELU:
        # Behind the last channel is what is never stored.
        actives = active_ptr + rows * O + before(offs_n, O, DIVISOR)[None, :]
        active = tl.load(actives, mask=mask_m[:, None], other=0.0)
        acc = tl.where(active <= 0.0, 0.0, acc)  # NaN passes, as in ATen; what is masked was loaded as 0
        # As they are: of rounded ones, ptxas makes tensor-core instructions wait for each other (sm_90, Triton 3.6).
        tl.store(partials_ptr + row_tile * O + offs_n, tl.sum(acc, axis=0), mask=mask_n)
    tl.store(out_ptr + rows * stride + (column + offs_n)[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W"])
def _data_gradient_kernel(
    g_ptrs, w_ptrs, active_ptrs, out_ptrs, partials_ptr,
    out_channels, in_channels, inverses, row_inverses, strides, columns, sums, M, H, W,
    LEVEL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one convolution: the tiles of the list's convolutions follow one another."""
    follow_predecessor(PDL)
    tile = tl.program_id(0)
    for i in tl.static_range(len(LEVEL)):
        tiles = tl.cdiv(M, LEVEL[i][3]) * tl.cdiv(number(in_channels[i]), LEVEL[i][4])
        if (tile >= 0) & (tile < tiles):
            _gradient_tile(
                tile, g_ptrs[i], w_ptrs[i], active_ptrs[i], out_ptrs[i], partials_ptr + number(sums[i]),
                number(out_channels[i], LEVEL[i][5]), number(in_channels[i], LEVEL[i][5]), inverses[i], row_inverses[i],
                number(strides[i], LEVEL[i][5]), number(columns[i], LEVEL[i][5]), M, H, W,
                LEVEL[i][0], LEVEL[i][1], LEVEL[i][2], LEVEL[i][3], LEVEL[i][4], LEVEL[i][5], PRECISION, BLOCK_K,
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
) -> Launched:
    """Launch on the gradients' device and current stream.

    Args:
        gradients: what to compute; kernels of odd sizes with 31 taps at most.
        grads: of their outputs, ``[M, O]``, contiguous, with ``M = N*H*W``.
        weights: ``[O, C, kernel_h, kernel_w]``, contiguous in channels_last.
        actives: for each ReLU its result, ``[N, C, H, W]`` in channels_last, else None.
        outs: rows of pixels, ``[M, stride]``, contiguous.
        shape: N, H and W of all of them.
        partials: float32 (float64 for float64), gets at ``sums`` of each ReLU ``[parts, C]``, the sums of its gradient,
            see :func:`parts`.
        tiles: see :func:`choose_tiles`.

    All but partials have one dtype. Checked by the caller.
    """
    gpu = target.gpu(partials.device)
    launch = _launch(gradients, shape, tiles, gpu, target.input_precision(weights[0].dtype, gpu))
    with target.device_of(partials):
        return replay.launch(
            _data_gradient_kernel, launch, tuple(grads), tuple(weights), tuple(actives), tuple(outs), partials
        )


def choose_tiles(rows: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, gpu: target.Gpu) -> configs.Tiles:
    """Return the tiles of the launch for ``rows`` pixels, by the weight with the most products."""
    out_channels, _, kernel_h, kernel_w = max(shapes, key=math.prod)
    columns = max(shape[1] for shape in shapes)  # of all: each convolution narrows the tile for itself
    return configs.choose("data_gradient", rows, out_channels * kernel_h * kernel_w, columns, dtype, gpu)


def parts(rows: int, channels: int, tiles: configs.Tiles, gpu: target.Gpu) -> int:
    """Return of how many parts a ReLU's sums come, where its convolution reads ``channels``."""
    return configs.tiles(rows, _fit(tiles, channels, gpu)[0])


def _fit(tiles: configs.Tiles, channels: int, gpu: target.Gpu) -> tuple[int, int]:
    # At least 32: with 16, ptxas makes every tensor-core instruction of the kernel wait for the last one (sm_90).
    return configs.fit(tiles, max(channels, 32), gpu)


@configs.cached
def _launch(
    gradients: tuple[Gradient, ...], shape: tuple[int, int, int], tiles: configs.Tiles, gpu: target.Gpu, precision: str
) -> configs.Launch:
    rows = math.prod(shape)
    level, sizes, programs = [], [], 0
    for (out_channels, in_channels, kernel_h, kernel_w), relu, stride, column, sums in gradients:
        block_m, block_n = _fit(tiles, in_channels, gpu)
        divisor = math.gcd(8, out_channels, in_channels, stride, column)
        level.append((kernel_h, kernel_w, relu, block_m, block_n, divisor))
        sizes.append((out_channels, in_channels, *inverses(out_channels, kernel_h, kernel_w), stride, column, sums))
        programs += configs.tiles(rows, block_m) * configs.tiles(in_channels, block_n)
    return configs.launch(
        programs, (*zip(*sizes, strict=True), rows, *shape[1:]),
        LEVEL=tuple(level), PRECISION=precision, BLOCK_K=tiles.block_k, **tiles.options(gpu),
    )  # fmt: skip
