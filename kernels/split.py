"""Backward, first launch: the output's gradient, masked by its ReLU, as one dense matrix for each branch."""

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
from fastinception.kernels.epilogue import run_of
from fastinception.kernels.operands import number_of, pointer_of, sum_dtype
from fastinception.kernels.replay import Launch


class Branch(NamedTuple):
    """Where a branch's gradient comes from and goes to."""

    width: int
    column: int  # first channel in the output's gradient
    mask_column: int  # first byte in the packed ReLU mask
    stride: int  # columns of the matrix that it is written to, from the first on
    offset: int  # of its sums in ``partials``


@triton.jit(do_not_specialize=["M", "H", "W", "stride_mask"])
def _split_kernel(
    grad_ptr, mask_ptr, out_ptrs, partials_ptr, firsts, widths, columns, mask_columns, strides, offsets,
    M, H, W, stride_gn, stride_gc, stride_gh, stride_gw, stride_mask,
    ALIGNED: tl.constexpr, RUN: tl.constexpr, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mask STEPS * BLOCK_M rows x BLOCK_N channels of one branch, and add up what passes, channel by channel.

    The tiles of the branches follow one another; ``firsts`` is where each one's begin. ALIGNED divides widths, columns
    and strides, and more than 1 says that pointers are aligned to 16 bytes. RUN is that of ``epilogue.out_run``, None
    of a gradient whose pixels are not all at one distance.
    """
    program = tl.program_id(0)
    out_ptr = pointer_of(program, firsts, out_ptrs, ALIGNED > 1)
    width = number_of(program, firsts, widths, ALIGNED)
    column = number_of(program, firsts, columns, ALIGNED)
    stride = number_of(program, firsts, strides, ALIGNED)
    mask_column = number_of(program, firsts, mask_columns)
    tile = program - number_of(program, firsts, firsts)
    column_tiles = tl.cdiv(width, BLOCK_N)
    part = tile // column_tiles
    offs_n = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = (tile % column_tiles) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    mask_n = offs_n < width
    channels = (column + offs_n).to(tl.int64) * stride_gc
    dtype: tl.constexpr = sum_dtype(grad_ptr.dtype)
    # A sum over all rows would have each step wait for all threads: where channels lie side by side, each adds up its
    # own rows, which are 16 apart. Where pixels do, it has rows side by side.
    SUMS: tl.constexpr = 1 if RUN else 16
    total = tl.zeros((SUMS, BLOCK_N), dtype=dtype)
    for step in range(STEPS):
        offs_m = (part * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        rows = offs_m.to(tl.int64)
        mask_g = mask
        # Divided in int32, as pixels are counted: in int64 each division is the call of a subroutine.
        if RUN is None:
            n, h, w = (offs_m // (H * W)).to(tl.int64), (offs_m // W % H).to(tl.int64), (offs_m % W).to(tl.int64)
            pixels = n * stride_gn + h * stride_gh + w * stride_gw
        elif RUN == 0:
            pixels = rows * stride_gw
        else:  # as in epilogue.store_out
            pixels = (offs_m // (H * W)).to(tl.int64) * stride_gn + (offs_m % (H * W)).to(tl.int64)
            pixels = tl.multiple_of(tl.max_contiguous(pixels, max(RUN, 2)), RUN)
            channels = tl.multiple_of(channels, RUN)
            mask_g = tl.max_constancy(mask_m, RUN)[:, None] & mask_n[None, :]
        grad = tl.load(grad_ptr + pixels[:, None] + channels[None, :], mask=mask_g, other=0.0)
        bits = tl.load(
            mask_ptr + rows[:, None] * stride_mask + (mask_column + offs_b)[None, :],
            mask=mask_m[:, None] & (offs_b * 8 < width)[None, :],
            other=0,
        )  # [BLOCK_M, BLOCK_N // 8]
        active = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        # A choice, never a product: an infinite gradient times a zero mask would be NaN.
        grad = tl.where(tl.reshape(active, (BLOCK_M, BLOCK_N)) != 0, grad, 0.0)
        tl.store(out_ptr + rows[:, None] * stride + offs_n[None, :], grad, mask=mask)
        total += tl.sum(tl.reshape(grad.to(dtype), (BLOCK_M // SUMS, SUMS, BLOCK_N)), axis=0)
    sums = partials_ptr + number_of(program, firsts, offsets) + part * width + offs_n
    tl.store(sums, tl.sum(total, axis=0), mask=mask_n)


def parts(rows: int, gpu: target.Gpu) -> int:
    """Return how many sums there are for each channel in ``partials``."""
    config = configs.sweep(configs.SPLIT, gpu)
    return configs.cdiv(rows, config.steps * config.block_m)


def split(grad: Tensor, mask: Tensor, branches: tuple[Branch, ...], outs: Sequence[Tensor], partials: Tensor) -> Launch:
    """Launch on ``grad``'s device and current stream.

    Args:
        grad: gradient of the block's output, ``[N, C, H, W]``, any strides; never written.
        mask: the packed ReLU mask that the forward kept, ``[M, bytes]`` uint8.
        branches, outs: each gets its channels as rows of pixels, ``[M, stride]``, 0 where the ReLU was not active.
        partials: float32 (float64 for float64), gets at each branch's ``offset`` its sums, ``[parts(M, gpu), width]``.

    All but mask and partials have one dtype. Checked by the caller.
    """
    aligned = replay.are_aligned(outs)
    config = _launch_config(branches, grad.shape, grad.stride(), mask.shape[1], aligned, target.gpu(grad.device))
    with target.device_of(grad):
        return replay.launch(_split_kernel, config, grad, mask, tuple(outs), partials)


@configs.cached
def _launch_config(
    branches: tuple[Branch, ...],
    shape: torch.Size,
    strides: tuple[int, ...],
    mask_bytes: int,
    aligned: bool,
    gpu: target.Gpu,
) -> configs.LaunchConfig:
    n, _, height, width = shape
    stride_n, stride_c, stride_h, stride_w = strides
    rows, config = n * height * width, configs.sweep(configs.SPLIT, gpu)
    # As epilogue.out_run, and None of a gradient with other strides.
    run = None
    if (stride_h, stride_w) == (width, 1):
        run = run_of(height * width, stride_n, stride_c)
    elif (stride_n, stride_h) == (height * width * stride_w, width * stride_w):
        run = 0
    block_n = config.block_n // 2 if run == 1 else config.block_n  # an address for each element takes registers
    tiles = (parts(rows, gpu) * configs.cdiv(branch.width, block_n) for branch in branches)
    *firsts, end = itertools.accumulate(tiles, initial=0)
    widths, columns, mask_columns, out_strides, offsets = zip(*branches, strict=True)
    lists = (tuple(firsts), widths, columns, mask_columns, out_strides, offsets)
    options = {}
    if gpu.runs_ptx and run == 0:  # five programs for an SM: left alone, ptxas makes it six, and spills (Triton 3.6)
        options["maxnreg"] = 96
    return configs.launch_config(
        end, (*lists, rows, height, width, stride_n, stride_c, stride_h, stride_w, mask_bytes),
        ALIGNED=math.gcd(8, *widths, *columns, *out_strides) if aligned else 1,
        RUN=run, STEPS=config.steps, BLOCK_M=config.block_m, BLOCK_N=block_n, num_warps=config.num_warps, **options,
    )  # fmt: skip
