"""Backward, last launches: weight gradients as partial sums over parts of the pixels, then the sums of all partials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.epilogue import follow_predecessor
from fastinception.kernels.replay import Launched
from fastinception.kernels.spatial import taps_inside


class Product(NamedTuple):
    """One convolution with stride 1 whose output has its input's size: the gradient of its weight.

    The kernel finds the first four by their places.
    """

    out_channels: int
    in_channels: int
    kernel_h: int
    kernel_w: int
    sums: int = 0  # where in ``partials`` it begins

    @property
    def columns(self) -> int:
        """Return the number of weights of an output channel."""
        return self.in_channels * self.kernel_h * self.kernel_w


class Sum(NamedTuple):
    """Partial sums to be added up."""

    elements: int
    sums: int  # where in ``partials`` the first part begins
    parts: int
    stride: int  # from part to part


@triton.jit
def _product_tile(
    tile, part, g_ptr, x_ptr, partials_ptr, N, H, W, steps, steps_of_part,
    O: tl.constexpr, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, IMAGES_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum ``g[m, o] * x[m shifted by tap, c]`` over one part of the pixels, for BLOCK_M o x BLOCK_N (tap, c).

    Columns are packed as in the forward, j = tap * C + c; the reduction, BLOCK_K a step, runs over pixels.
    IMAGES_FIRST, a step takes one pixel of BLOCK_K images: whether a tap lies inside is then one answer for all.
    """
    COLUMNS: tl.constexpr = KH * KW * C
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    offs_o = (tile // COLUMN_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (tile % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_o = offs_o < O
    mask_j = j < COLUMNS
    tap_h = j // (KW * C) - KH // 2
    tap_w = j // C % KW - KW // 2
    x_columns = (tap_h * W + tap_w) * C + j % C
    dtype: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    first = part * steps_of_part
    pixel = first // tl.cdiv(N, BLOCK_K)
    image = first % tl.cdiv(N, BLOCK_K) * BLOCK_K
    h = pixel // W
    w = pixel % W
    for step in range(first, tl.minimum(first + steps_of_part, steps)):
        if IMAGES_FIRST:
            mask_m = image + offs_k < N
            rows = (image + offs_k).to(tl.int64) * (H * W) + (h * W + w)
            inside = mask_j & (h + tap_h >= 0) & (h + tap_h < H) & (w + tap_w >= 0) & (w + tap_w < W)
            mask_x = mask_m[:, None] & inside[None, :]
            # The next step's, by choices: a branch that changes them would end the prefetching.
            image += BLOCK_K
            w = tl.where(image < N, w, w + 1)
            image = tl.where(image < N, image, 0)
            h = tl.where(w < W, h, h + 1)
            w = tl.where(w < W, w, 0)
        else:
            offs_m = step * BLOCK_K + offs_k
            mask_m = offs_m < N * H * W
            rows = offs_m.to(tl.int64)
            if KH * KW == 1:
                mask_x = mask_m[:, None] & mask_j[None, :]
            else:
                taps = taps_inside(offs_m // W % H - KH // 2, offs_m % W - KW // 2, mask_m, H, W, KH, KW)
                mask_x = (taps[:, None] & (1 << tl.minimum(j // C, 31))[None, :]) != 0  # bit 31 is never set
        g = tl.load(g_ptr + rows[None, :] * O + offs_o[:, None], mask=mask_m[None, :] & mask_o[:, None], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * C + x_columns[None, :], mask=mask_x, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=dtype)
    out = partials_ptr + (part * O).to(tl.int64) * COLUMNS + offs_o[:, None] * COLUMNS + j[None, :]
    tl.store(out, acc, mask=mask_o[:, None] & mask_j[None, :])


@triton.jit
def _weight_gradient_kernel(
    g_ptrs, x_ptrs, partials_ptr, sums, N, H, W, steps, steps_of_part,
    LEVEL: tl.constexpr, TILES: tl.constexpr, IMAGES_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one product over one part of the pixels: the TILES tiles of a part follow one another."""
    follow_predecessor(PDL)
    part = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    for i in tl.static_range(len(LEVEL)):
        columns = LEVEL[i][1] * LEVEL[i][2] * LEVEL[i][3]
        tiles = ((LEVEL[i][0] + BLOCK_M - 1) // BLOCK_M) * ((columns + BLOCK_N - 1) // BLOCK_N)
        if (tile >= 0) & (tile < tiles):
            _product_tile(
                tile, part, g_ptrs[i], x_ptrs[i], partials_ptr + sums[i], N, H, W, steps, steps_of_part,
                LEVEL[i][0], LEVEL[i][1], LEVEL[i][2], LEVEL[i][3], IMAGES_FIRST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        tile -= tiles


@triton.jit
def _sum_kernel(
    partials_ptr,
    out_ptrs,
    firsts,
    sums,
    sizes,
    parts,
    strides,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up the parts of BLOCK_N elements of one result, each BLOCK_P-th in order, and their BLOCK_P sums at the end.

    A sum over the tile in each step would wait for its loads, and for all threads, before the next. The tiles of the
    results follow one another; ``firsts`` is where each result's begin. ALIGNED divides sums, sizes and strides.
    """
    tile = tl.program_id(0)
    out_ptr = out_ptrs[0]
    first, start, size, count, stride = 0, 0, 0, 0, 0
    for i in tl.static_range(COUNT):  # choices: by branches the loop would be compiled COUNT times
        begun = tile >= firsts[i]
        out_ptr = tl.where(begun, out_ptrs[i], out_ptr)
        first = tl.where(begun, firsts[i], first)
        start = tl.where(begun, sums[i], start)
        size = tl.where(begun, sizes[i], size)
        count = tl.where(begun, parts[i], count)
        stride = tl.where(begun, strides[i], stride)
    # What a choice is a multiple of the compiler does not see, and would load one number at a time.
    start, size, stride = tl.multiple_of(start, ALIGNED), tl.multiple_of(size, ALIGNED), tl.multiple_of(stride, ALIGNED)
    offs_n = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < size
    offs_p = tl.arange(0, BLOCK_P)
    part = partials_ptr + start + offs_p.to(tl.int64)[:, None] * stride + offs_n[None, :]
    step = stride.to(tl.int64) * BLOCK_P
    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=partials_ptr.dtype.element_ty)
    for done in tl.range(0, count, BLOCK_P, loop_unroll_factor=4):
        total += tl.load(part, mask=(offs_p < count - done)[:, None] & mask_n[None, :], other=0.0)
        part += step
    tl.store(out_ptr + offs_n, tl.sum(total, axis=0), mask=mask_n)


class Division(NamedTuple):
    """How the sums over pixels are computed and divided."""

    tiles: configs.Tiles
    images_first: bool
    steps: int
    steps_of_part: int
    parts: int


def divide(
    shape: tuple[int, int, int],
    products: Sequence[Product],
    dtype: torch.dtype,
    gpu: target.Gpu,
    tiles: configs.Tiles | None = None,
) -> Division:
    """Divide the sums over N, H and W into as many parts as fill a GPU.

    ``tiles`` replaces those that ``configs`` chooses, by the largest product.
    """
    n, height, width = shape
    largest = max(products, key=lambda product: product.out_channels * product.columns)
    rows, reduction, columns = largest.out_channels, n * height * width, largest.columns
    tiles = tiles or configs.choose("weight_gradient", rows, reduction, columns, dtype, gpu)
    programs = _programs(products, tiles)
    # Images beyond the batch are multiplied, too. By the pressures of the two ways' loops a quarter more is even.
    filled = configs.tiles(n, tiles.block_k) * tiles.block_k
    images_first = n >= tiles.block_k and filled <= 1.25 * n
    images = filled if images_first else n
    steps = configs.tiles(images * height * width, tiles.block_k)
    steps_of_part = max(4, configs.tiles(steps, max(1, configs.PROGRAMS // programs)))
    return Division(tiles, images_first, steps, steps_of_part, configs.tiles(steps, steps_of_part))


def _programs(products: Sequence[Product], tiles: configs.Tiles) -> int:
    return sum(configs.tiles(p.out_channels, tiles.block_m) * configs.tiles(p.columns, tiles.block_n) for p in products)


def weight_gradient(
    products: tuple[Product, ...],
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    shape: tuple[int, int, int],
    division: Division,
    partials: Tensor,
) -> Launched:
    """Launch the products on the partials' device and current stream.

    Args:
        products: what to compute; kernels of odd sizes with 31 taps at most.
        grads: of the convolutions' outputs, rows of pixels ``[M, O]``, contiguous.
        xs: their inputs, ``[N, C, H, W]`` in channels_last, or the same as rows of pixels, ``[M, C]``.
        shape: N, H and W of all of them.
        division: see :func:`divide`.
        partials: float32 (float64 for float64), gets at ``sums`` of each product
            ``[division.parts, O, kernel_h, kernel_w, C]``.

    All but partials have one dtype. Checked by the caller.
    """
    gpu = target.gpu(partials.device)
    launch = _launch(products, shape, division, gpu, target.input_precision(xs[0].dtype, gpu))
    with target.device_of(partials):
        return replay.launch(_weight_gradient_kernel, launch, tuple(grads), tuple(xs), partials)


@configs.cached
def _launch(
    products: tuple[Product, ...], shape: tuple[int, int, int], division: Division, gpu: target.Gpu, precision: str
) -> configs.Launch:
    tiles, images_first, steps, steps_of_part, parts = division
    programs = _programs(products, tiles)
    sums = tuple(product.sums for product in products)
    return configs.launch(
        programs * parts, (sums, *shape, steps, steps_of_part),
        LEVEL=tuple(tuple(product[:4]) for product in products), TILES=programs, IMAGES_FIRST=images_first,
        PRECISION=precision, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, **tiles.options(gpu),
    )  # fmt: skip


def add_up(sums: tuple[Sum, ...], outs: Sequence[Tensor], partials: Tensor) -> Launched:
    """Launch the sums of all partial sums on the partials' device and current stream, each rounded once.

    Each of ``outs`` gets as many elements as its sum has, in the order of its memory.
    """
    launch = _sum_launch(sums, target.gpu(partials.device))
    with target.device_of(partials):
        return replay.launch(_sum_kernel, launch, partials, tuple(outs))


@configs.cached
def _sum_launch(sums: tuple[Sum, ...], gpu: target.Gpu) -> configs.Launch:
    config = configs.sweep(configs.SUM, gpu)
    elements, starts, parts, strides = zip(*sums, strict=True)
    *firsts, end = itertools.accumulate((configs.tiles(size, config.block_n) for size in elements), initial=0)
    return configs.launch(
        end, (tuple(firsts), starts, elements, parts, strides),
        COUNT=len(sums), ALIGNED=math.gcd(16, *elements, *starts, *strides),
        BLOCK_P=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
