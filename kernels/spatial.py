"""Level 1, one launch: a list of convolutions as implicit GEMMs, each into its channels of one output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, target
from fastinception.kernels.epilogue import bias_relu, follow_predecessor, out_strides, store_active


class Geometry(NamedTuple):
    """What a convolution does, apart from its numbers: all of it compile-time constants of the kernel."""

    in_channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    block_n: int
    packed_weight: bool


@triton.jit
def _conv_tile(
    tile, x_ptr, w_ptr, b_ptr, out_ptr, mask_ptr,
    K, M, H, W, OUT_H, OUT_W, stride_on, stride_op, stride_oc, stride_mask,
    C: tl.constexpr, O: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PACKED_WEIGHT: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``relu(conv2d(x, w, b))`` for BLOCK_M output pixels x BLOCK_N output channels.

    The reduction runs over j = tap * C + c, taps and channels packed without gaps, so that 16 channels of a 5x5
    waste nothing. x is channels_last, therefore consecutive j are consecutive addresses within a kernel row.
    Whether a tap lies inside the image is one bit per output pixel, computed once; j past the last tap finds no bit.
    K = KH * KW * C comes as an argument: as a constant LLVM would unroll the whole reduction where it is short.
    """
    COLUMN_TILES: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    offs_m = (tile // COLUMN_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < O
    out_pixels = OUT_H * OUT_W
    n = offs_m // out_pixels
    pixel = offs_m % out_pixels
    h = (pixel // OUT_W) * SH - PH
    w = (pixel % OUT_W) * SW - PW

    inside = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for tap in tl.static_range(KH * KW):
        tap_h = h + tap // KW
        tap_w = w + tap % KW
        ok = mask_m & (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
        inside |= ok.to(tl.int32) << tap

    x_rows = x_ptr + (((n.to(tl.int64) * H + h) * W + w) * C)[:, None]
    w_rows = w_ptr + offs_n[None, :] * (KH * KW * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for k in range(0, K, BLOCK_K):
        j = k + offs_k
        mask_x = (inside[:, None] & (1 << tl.minimum(j // C, 31))[None, :]) != 0  # bit 31 is never set
        mask_w = mask_n[None, :] & (j < KH * KW * C)[:, None]
        x_columns = j + (j // (KW * C)) * ((W - KW) * C)
        x = tl.load(x_rows + x_columns[None, :], mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        w_columns = j if PACKED_WEIGHT else (j % C) * (KH * KW) + j // C
        weight = tl.load(w_rows + w_columns[:, None], mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=acc.dtype)

    y = bias_relu(acc, b_ptr, offs_n, mask_n, out_ptr.dtype.element_ty)
    out_rows = n.to(tl.int64) * stride_on + pixel.to(tl.int64) * stride_op
    out = out_ptr + out_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_oc
    tl.store(out, y, mask=mask_m[:, None] & mask_n[None, :])
    if SAVE:
        store_active(mask_ptr, y, offs_m, offs_n, mask_m, O, stride_mask, BLOCK_M, BLOCK_N)


@triton.jit
def _spatial_kernel(
    x_ptrs, w_ptrs, b_ptrs, out_ptrs, mask_ptrs, reductions,
    M, H, W, OUT_H, OUT_W, stride_on, stride_op, stride_oc, stride_mask,
    LEVEL: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of one convolution: the tiles of the list's convolutions follow one another."""
    follow_predecessor(PDL)
    row_tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    for i in tl.static_range(len(LEVEL)):
        tiles = row_tiles * ((LEVEL[i][1] + LEVEL[i][8] - 1) // LEVEL[i][8])
        if (tile >= 0) & (tile < tiles):
            _conv_tile(
                tile, x_ptrs[i], w_ptrs[i], b_ptrs[i], out_ptrs[i], mask_ptrs[i],
                reductions[i], M, H, W, OUT_H, OUT_W, stride_on, stride_op, stride_oc, stride_mask,
                LEVEL[i][0], LEVEL[i][1], LEVEL[i][2], LEVEL[i][3], LEVEL[i][4], LEVEL[i][5], LEVEL[i][6], LEVEL[i][7],
                LEVEL[i][9], PRECISION, SAVE, BLOCK_M, LEVEL[i][8], BLOCK_K,
            )  # fmt: skip
        tile -= tiles


class Conv(NamedTuple):
    """One convolution of a level: what it reads, its numbers, and where its result goes."""

    x: Tensor  # [N, C, H, W], contiguous in channels_last
    weight: Tensor  # [O, C, kernel_h, kernel_w], contiguous in either memory format; channels_last reads faster
    bias: Tensor  # [O], contiguous
    column: int  # first output channel
    mask_column: int = 0  # first byte in the packed ReLU mask
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


def spatial(convs: Sequence[Conv], out: Tensor, mask: Tensor | None, *, tiles: configs.Tiles | None = None) -> None:
    """Launch level 1 on ``out``'s device and current stream.

    Args:
        convs: convolutions whose inputs share ``[N, :, H, W]`` and whose outputs share ``[N, :, OUT_H, OUT_W]``.
        out: ``[N, C, OUT_H, OUT_W]``, contiguous in either memory format; channels no convolution owns are left alone.
        mask: ``[N*OUT_H*OUT_W, bytes]`` uint8, the packed ReLU mask of ``out``; None skips it.
        tiles: in place of those that ``configs`` chooses, by the convolution with the most products.

    All floating tensors share one dtype. Checked by the caller, but for:

    Raises:
        ValueError: a kernel has more than 31 taps, more than its bits.
    """
    n, _, height, width = convs[0].x.shape
    out_height, out_width = out.shape[2:]
    rows = n * out_height * out_width
    gpu = target.gpu(out.device)
    if tiles is None:
        largest = max((conv.weight.shape for conv in convs), key=torch.Size.numel)
        tiles = configs.choose("spatial", rows, largest[1:].numel(), largest[0], out.dtype, gpu)
    level, programs = [], 0
    for conv in convs:
        out_channels, in_channels, kernel_h, kernel_w = conv.weight.shape
        if kernel_h * kernel_w > 31:
            raise ValueError(f"a convolution of at most 31 taps was expected, got {kernel_h}x{kernel_w}")
        block_n = configs.narrow(tiles.block_n, out_channels)
        packed = conv.weight.is_contiguous(memory_format=torch.channels_last)
        level.append(
            Geometry(
                in_channels,
                out_channels,
                kernel_h,
                kernel_w,
                *conv.stride,
                *conv.padding,
                block_n,
                packed,
            )
        )
        programs += configs.tiles(rows, tiles.block_m) * configs.tiles(out_channels, block_n)
    save = mask is not None
    with target.device_of(out):
        _spatial_kernel[(programs,)](
            tuple(conv.x for conv in convs),
            tuple(conv.weight for conv in convs),
            tuple(conv.bias for conv in convs),
            tuple(out[:, conv.column :] for conv in convs),
            tuple(mask[:, conv.mask_column :] if mask is not None else out for conv in convs),
            tuple(conv.in_channels * conv.kernel_h * conv.kernel_w for conv in level),
            rows, height, width, out_height, out_width,
            *out_strides(out), mask.stride(0) if mask is not None else 0,
            LEVEL=tuple(tuple(geometry) for geometry in level),
            PRECISION=target.input_precision(out.dtype), SAVE=save,
            BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, **tiles.options(gpu),
        )  # fmt: skip
