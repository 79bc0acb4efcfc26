"""Convolutions by the library: level 1 into dense buffers and one launch that finishes them, and weight gradients."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from fastinception.kernels.spatial import Conv


@triton.jit
def _finish_tile(
    tile, y_ptr, b_ptr, out_ptr, mask_ptr, M, pixels, stride_on, stride_op, stride_oc, stride_mask,
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
    y = y.to(tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32)
    y = bias_relu(y, tl.load(b_ptr + offs_n, mask=mask_n, other=0.0), RELU)
    store_result(
        out_ptr, mask_ptr, y, offs_m, M, first, O,
        pixels, stride_on, stride_op, stride_oc, stride_mask, COLUMN, MASK_COLUMN, SAVE, RUN,
    )  # fmt: skip


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
    row_tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    for i in tl.static_range(len(LEVEL)):
        tiles = row_tiles * ((LEVEL[i][0] + LEVEL[i][3] - 1) // LEVEL[i][3])
        if (tile >= 0) & (tile < tiles):
            _finish_tile(
                tile, y_ptrs[i], b_ptrs[i], out_ptr, mask_ptr,
                M, pixels, stride_on, stride_op, stride_oc, stride_mask,
                LEVEL[i][0], LEVEL[i][1], LEVEL[i][2], LEVEL[i][3], SAVE, RELU, RUN, BLOCK_M,
            )  # fmt: skip
        tile -= tiles


def convolve(convs: Sequence[Conv], out: Tensor, mask: Tensor | None, relu: bool, tiles: configs.Tiles) -> None:
    """Compute what ``spatial`` computes; its arguments. ``tiles`` are those of the launch that finishes.

    Each sum of products is rounded to the dtype before its bias is added, as the library does without fusion.
    """
    # A size of 1 leaves the layout open; elsewhere the results have it already.
    results = [
        F.conv2d(conv.x, conv.weight, None, conv.stride, conv.padding).contiguous(memory_format=torch.channels_last)
        for conv in convs
    ]
    n, _, height, width = out.shape
    pixels = height * width
    level, programs = [], 0
    for conv in convs:
        channels = conv.weight.shape[0]
        block_n = configs.narrow(tiles.block_n, channels)
        level.append((channels, conv.column, conv.mask_column, block_n))
        programs += configs.cdiv(n * pixels, tiles.block_m) * configs.cdiv(channels, block_n)
    strides, mask_bytes = out_strides(out.shape, is_channels_last(out)), 0 if mask is None else mask.shape[1]
    run = out_run(out.shape, is_channels_last(out))
    gpu = target.gpu(out.device)
    config = configs.launch_config(
        programs, (n * pixels, pixels, *strides, mask_bytes),
        LEVEL=tuple(level), SAVE=mask is not None, RELU=target.relu_asm(gpu, out.dtype) if relu else None,
        RUN=run, BLOCK_M=tiles.block_m,
        **tiles.options(gpu),
    )  # fmt: skip
    with target.device_of(out):
        replay.launch(_library_kernel, config, tuple(results), tuple(conv.bias for conv in convs), out, mask)


_deterministic = threading.Lock()


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Write the gradient of the weight of a convolution with stride 1 whose output has its input's size.

    Args:
        grad: of its output, rows of pixels ``[M, O]``, contiguous.
        x: its input, ``[N, C, H, W]`` in channels_last.
        out: ``[O, C, kernel_h, kernel_w]``, odd sizes, any strides.

    By an algorithm that gives the same bits each time.
    """
    n, _, height, width = x.shape
    grad = grad.view(n, height, width, -1).permute(0, 3, 1, 2)
    padding = [size // 2 for size in out.shape[2:]]
    # Not torch.backends.cudnn: that may be closed to changes, and its precisions are not ours to touch. Autograd has a
    # thread for each device: one would find what another set, and leave it so.
    with _deterministic:
        before = torch._C._get_cudnn_deterministic()
        torch._C._set_cudnn_deterministic(True)
        try:
            _, result, _ = torch.ops.aten.convolution_backward(
                grad, x, out, None, (1, 1), padding, (1, 1), False, (0, 0), 1, (False, True, False)
            )
        finally:
            torch._C._set_cudnn_deterministic(before)
    out.copy_(result)
