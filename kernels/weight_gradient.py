"""Backward, last launch but one: weight gradients, as partial sums over parts of the pixels."""

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
from fastinception.kernels.implicit_gemm import taps_inside
from fastinception.kernels.operands import before, number, number_of, pointer_of, sum_dtype
from fastinception.kernels.replay import Launch


class Product(NamedTuple):
    """One convolution with stride 1 whose output has its input's size: the gradient of its weight."""

    out_channels: int
    in_channels: int
    kernel_h: int
    kernel_w: int
    offset: int = 0  # of its sums in ``partials``

    @property
    def columns(self) -> int:
        """Return the number of weights of an output channel."""
        return self.in_channels * self.kernel_h * self.kernel_w


@triton.jit
def _product_tile(
    first_o, first_j, part, g_ptr, x_ptr, partials_ptr, N, H, W, steps, steps_of_part, O, C, KH, KW,
    IMAGES_FIRST: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum ``g[m, o] * x[m shifted by tap, c]`` over one part of the pixels, for BLOCK_M o x BLOCK_N (tap, c).

    The tile begins at ``first_o`` and ``first_j``. Columns are packed as in the forward, j = tap * C + c; the
    reduction, BLOCK_K a step, runs over pixels.
    IMAGES_FIRST, a step takes one pixel of BLOCK_K images: whether a tap lies inside is then one answer for all.
    Else KH and KW have to be constants.
    """
    columns = KH * KW * C
    offs_o = first_o + tl.arange(0, BLOCK_M)
    j = first_j + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_o = offs_o < O
    mask_j = j < columns
    tap_h = j // (KW * C) - KH // 2
    tap_w = j // C % KW - KW // 2
    x_columns = (tap_h * W + tap_w) * C + j % C
    dtype: tl.constexpr = sum_dtype(g_ptr.dtype)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    first_step = part * steps_of_part
    # Of the first step; of each next one by additions, as divisions take most of a step's instructions.
    image = first_step % tl.cdiv(N, BLOCK_K) * BLOCK_K
    pixel = first_step // tl.cdiv(N, BLOCK_K) if IMAGES_FIRST else first_step * BLOCK_K + offs_k
    h, w = pixel // W % H, pixel % W
    # Of a step that begins with pixel 0 of image 0 or, one image after another, with the part's first pixel.
    apart = offs_k.to(tl.int64) * (H * W if IMAGES_FIRST else 1)
    g_ptrs = g_ptr + before(offs_o, O, ALIGNED)[:, None] + (apart * O)[None, :]
    x_ptrs = x_ptr + x_columns[None, :] + (apart * C)[:, None]
    if not IMAGES_FIRST:
        g_ptrs += tl.cast(first_step, tl.int64) * BLOCK_K * O
        x_ptrs += tl.cast(first_step, tl.int64) * BLOCK_K * C
    end = tl.minimum(first_step + steps_of_part, steps)
    tl.assume(first_step < end)  # else, in IMAGES_FIRST, ptxas makes each product wait for the last (sm_90, Triton 3.6)
    for step in range(first_step, end):
        if IMAGES_FIRST:
            mask_m = image + offs_k < N
            row = image.to(tl.int64) * (H * W) + (h * W + w)
            inside = mask_j & (h + tap_h >= 0) & (h + tap_h < H) & (w + tap_w >= 0) & (w + tap_w < W)
            mask_x = mask_m[:, None] & inside[None, :]
            # By choices: a branch would end the prefetching.
            image += BLOCK_K
            w = tl.where(image < N, w, w + 1)
            image = tl.where(image < N, image, 0)
            h = tl.where(w < W, h, h + 1)
            w = tl.where(w < W, w, 0)
        else:
            offs_m = step * BLOCK_K + offs_k
            mask_m = offs_m < N * H * W
            if KH * KW == 1:
                mask_x = mask_m[:, None] & mask_j[None, :]
            else:
                taps = taps_inside(h - KH // 2, w - KW // 2, mask_m, H, W, KH, KW)
                mask_x = (taps[:, None] & (1 << tl.minimum(j // C, 31))[None, :]) != 0  # bit 31 is never set
                w += BLOCK_K % W
                h += BLOCK_K % (H * W) // W + tl.where(w < W, 0, 1)
                w = tl.where(w < W, w, w - W)
                h = tl.where(h < H, h, h - H)
            row = (step - first_step) * BLOCK_K  # with its channels within 32 bits, as `divide` sees to
        g = tl.load(g_ptrs + row * O, mask=mask_m[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs + row * C, mask=mask_x, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=dtype)
    out = partials_ptr + (part * O).to(tl.int64) * columns + offs_o[:, None] * columns + j[None, :]
    tl.store(out, acc, mask=mask_o[:, None] & mask_j[None, :])


@triton.jit(do_not_specialize=["tiles", "N", "H", "W", "steps", "steps_of_part"])
def _weight_gradient_kernel(
    g_ptrs, x_ptrs, partials_ptr, firsts, offsets, out_channels, in_channels, kernel_h, kernel_w,
    tiles, N, H, W, steps, steps_of_part,
    LEVEL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, LAST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one product over one part of the pixels: the tiles of a part follow one another.

    ``firsts`` is where each product's begin. LEVEL has the kernels' sizes where a step takes pixels of one image after
    another; else it is None, and a product's last rows take tiles of LAST_M rows, if these hold them. ALIGNED divides
    the channels and ``offsets``, and more than 1 says that pointers are aligned to 16 bytes.
    """
    follow_predecessor(PDL)
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if LEVEL is None:  # choices: compiled once for blocks of any widths
        g_ptr, x_ptr = pointer_of(tile, firsts, g_ptrs, ALIGNED > 1), pointer_of(tile, firsts, x_ptrs, ALIGNED > 1)
        partials_ptr += number_of(tile, firsts, offsets, ALIGNED)
        O = number_of(tile, firsts, out_channels, ALIGNED)
        C = number_of(tile, firsts, in_channels, ALIGNED)
        KH, KW = number_of(tile, firsts, kernel_h), number_of(tile, firsts, kernel_w)
        tile -= number_of(tile, firsts, firsts)
        column_tiles = tl.cdiv(KH * KW * C, BLOCK_N)
        first_o, first_j = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
        if LAST_M == BLOCK_M or first_o + LAST_M < O:
            _product_tile(
                first_o, first_j, part, g_ptr, x_ptr, partials_ptr, N, H, W, steps, steps_of_part, O, C, KH, KW,
                True, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _product_tile(
                first_o, first_j, part, g_ptr, x_ptr, partials_ptr, N, H, W, steps, steps_of_part, O, C, KH, KW,
                True, ALIGNED, PRECISION, LAST_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        for i in tl.static_range(len(LEVEL)):
            first = number(firsts[i])
            if (tile >= first) & (tile < number(firsts[i + 1])):
                C = number(in_channels[i], ALIGNED)
                column_tiles = tl.cdiv(LEVEL[i][0] * LEVEL[i][1] * C, BLOCK_N)
                _product_tile(
                    (tile - first) // column_tiles * BLOCK_M, (tile - first) % column_tiles * BLOCK_N, part,
                    g_ptrs[i], x_ptrs[i], partials_ptr + number(offsets[i], ALIGNED), N, H, W, steps, steps_of_part,
                    number(out_channels[i], ALIGNED), C, LEVEL[i][0], LEVEL[i][1],
                    False, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip


class Division(NamedTuple):
    """How the sums over pixels are computed, and divided into parts, each with partial sums of its own."""

    tiles: configs.Tiles
    images_first: bool  # a step takes one pixel of many images, else many pixels of one image after another
    steps: int  # of tiles.block_k pixels, over all of them
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
    # Images beyond the batch are multiplied, too. The loop has fewer instructions (issue pressure 0.6 on sm_90, the
    # other's 0.9): as far as they overlap with products nothing is gained, and as far as not, up to a fifth.
    filled = configs.cdiv(n, tiles.block_k) * tiles.block_k
    images_first = n >= tiles.block_k and filled <= 1.125 * n
    images = filled if images_first else n
    steps = configs.cdiv(images * height * width, tiles.block_k)
    steps_of_part = max(4, configs.cdiv(steps, max(1, configs.programs(gpu) // programs)))
    channels = max(size for product in products for size in product[:2])
    steps_of_part = min(steps_of_part, max(1, (2**31 - 1) // (tiles.block_k * channels)))
    return Division(tiles, images_first, steps, steps_of_part, configs.cdiv(steps, steps_of_part))


def _programs(products: Sequence[Product], tiles: configs.Tiles) -> int:
    return sum(configs.cdiv(p.out_channels, tiles.block_m) * configs.cdiv(p.columns, tiles.block_n) for p in products)


def weight_gradient(
    products: tuple[Product, ...],
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    shape: tuple[int, int, int],
    division: Division,
    partials: Tensor,
) -> Launch:
    """Launch the products on the partials' device and current stream.

    Args:
        products: what to compute; kernels of odd sizes with 31 taps at most.
        grads: of the convolutions' outputs, rows of pixels ``[M, O]``, contiguous.
        xs: their inputs, ``[N, C, H, W]`` in channels_last, or the same as rows of pixels, ``[M, C]``.
        shape: N, H and W of all of them.
        division: see :func:`divide`.
        partials: float32 (float64 for float64), gets at ``offset`` of each product
            ``[division.parts, O, kernel_h, kernel_w, C]``.

    All but partials have one dtype. Checked by the caller.
    """
    gpu = target.gpu(partials.device)
    aligned = replay.are_aligned((*grads, *xs))
    config = _launch_config(products, shape, division, aligned, gpu, target.input_precision(xs[0].dtype, gpu))
    with target.device_of(partials):
        return replay.launch(_weight_gradient_kernel, config, tuple(grads), tuple(xs), partials)


@configs.cached
def _launch_config(
    products: tuple[Product, ...],
    shape: tuple[int, int, int],
    division: Division,
    aligned: bool,
    gpu: target.Gpu,
    precision: str,
) -> configs.LaunchConfig:
    tiles, images_first, steps, steps_of_part, parts = division
    *firsts, programs = itertools.accumulate((_programs([product], tiles) for product in products), initial=0)
    *shapes, offsets = zip(*products, strict=True)
    return configs.launch_config(
        programs * parts, ((*firsts, programs), offsets, *shapes, programs, *shape, steps, steps_of_part),
        LEVEL=None if images_first else tuple(zip(*shapes[2:], strict=True)),
        ALIGNED=math.gcd(8, *offsets, *shapes[0], *shapes[1]) if aligned else 1, PRECISION=precision,
        BLOCK_M=tiles.block_m, LAST_M=tiles.block_m // 2 if tiles.block_m >= 128 else tiles.block_m,
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, **tiles.options(gpu),
    )  # fmt: skip
