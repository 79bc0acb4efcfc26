"""Begin and finish a tile of any level: bias, ReLU, one rounding, and where it is stored, with the packed ReLU mask."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns from which on a tile is stored by halves: a row's address then serves both, and half as many are live.
WIDE = tl.constexpr(128)


@triton.jit
def follow_predecessor(PDL: tl.constexpr):
    """Wait until the kernel in front has ended, and let the next one start; nothing may be read or written before it.

    Also what seems to depend on no kernel: memory that is reused, weights that an optimizer has just written.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def bias_relu(acc, bias, RELU: tl.constexpr):
    """Return ``relu(round(acc + bias))`` in the bias's dtype, with None for RELU the sum. NaN passes as in ATen.

    RELU is from ``target.relu_asm``: PTX that clamps and rounds a pair of sums, or "", by operators.
    """
    y = acc + bias[None, :].to(acc.dtype)
    if RELU is None:
        return y.to(bias.dtype)
    elif RELU == "":
        y = y.to(bias.dtype)
        return tl.where(y <= 0.0, 0.0, y)  # false for NaN
    else:
        return tl.inline_asm_elementwise(RELU, "=r,f,f", [y], dtype=bias.dtype, is_pure=True, pack=2)


@triton.jit
def store_result(
    out, mask, y, offs_m, M, pixels, first, columns, column, mask_column, SAVE: tl.constexpr, RUN: tl.constexpr
):
    """Store a tile of a branch as ``store_out`` does, and with SAVE its packed ReLU mask from ``mask_column`` on.

    ``mask`` is a pointer to the mask and its bytes in a row.
    """
    if RUN == 0 and y.shape[1] >= WIDE:
        left, right = halves(y)
        _store_both(out, mask, left, offs_m, M, pixels, first, columns, column, mask_column, SAVE, RUN)
        _store_both(out, mask, right, offs_m, M, pixels, first + left.shape[1], columns, column, mask_column, SAVE, RUN)
    else:
        _store_both(out, mask, y, offs_m, M, pixels, first, columns, column, mask_column, SAVE, RUN)


@triton.jit
def _store_both(
    out, mask, y, offs_m, M, pixels, first, columns, column, mask_column, SAVE: tl.constexpr, RUN: tl.constexpr
):
    # In NCHW the mask first: the output's many addresses and what both are made of would not fit the registers.
    if SAVE and RUN > 0:
        _store_active(mask, y, offs_m, M, first, columns, mask_column)
    store_out(out, y, offs_m, M, pixels, first, columns, column, RUN)
    if SAVE and RUN == 0:
        _store_active(mask, y, offs_m, M, first, columns, mask_column)


@triton.jit
def halves(y):
    """Return the first and the second half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store_active(mask, y, offs_m, M, first, columns, mask_column):
    """Store one bit an element, set where ReLU passes the gradient: channel ``8*b + i`` is bit ``i`` of byte ``b``."""
    mask_ptr, stride_mask = mask
    mask_ptr += mask_column
    BLOCK_M: tl.constexpr = y.shape[0]
    BLOCK_N: tl.constexpr = y.shape[1]
    offs_n = first + tl.arange(0, BLOCK_N)
    active = ((y <= 0.0) == 0) & (offs_n < columns)[None, :]  # [BLOCK_M, BLOCK_N]
    # Two at a time, which a thread has: the sum of eight would be gathered from several threads, or moved to one first.
    bits = active.to(tl.int32)
    for i in tl.static_range(3):
        low, high = tl.split(tl.reshape(bits, (BLOCK_M, BLOCK_N // (2 << i), 2)))
        bits = low | (high << (1 << i))
    offs_b = first // 8 + tl.arange(0, BLOCK_N // 8)
    tl.store(
        mask_ptr + offs_m.to(tl.int64)[:, None] * stride_mask + offs_b[None, :],
        bits.to(tl.uint8),
        mask=(offs_m < M)[:, None] & (offs_b * 8 < columns)[None, :],
    )


@triton.jit
def store_out(out, y, offs_m, M, pixels, first, columns, column, RUN: tl.constexpr, ADD: tl.constexpr = False):
    """Store ``y``, with ADD its sum with what is there: from channel ``first`` on, as far as there are ``columns``.

    ``out`` is a pointer to the output, and what ``out_strides`` returns. Channel c is the output's channel
    ``column + c``. RUN is from ``out_run``.
    """
    if RUN == 1:  # an address for each element: with ADD, those of all at once do not fit the registers
        left, right = halves(y)
        _store_part(out, left, offs_m, M, pixels, first, columns, column, RUN, ADD)
        _store_part(out, right, offs_m, M, pixels, first + left.shape[1], columns, column, RUN, ADD)
    else:
        _store_part(out, y, offs_m, M, pixels, first, columns, column, RUN, ADD)


@triton.jit
def store_rows(out_ptr, y, offs_m, M, first, columns):
    """Store ``y`` into the matrix ``[M, columns]`` from its column ``first`` on, which may lie in front of it."""
    if y.shape[1] >= WIDE:
        left, right = halves(y)
        _store_rows(out_ptr, left, offs_m, M, first, columns)
        _store_rows(out_ptr, right, offs_m, M, first + left.shape[1], columns)
    else:
        _store_rows(out_ptr, y, offs_m, M, first, columns)


@triton.jit
def _store_rows(out_ptr, y, offs_m, M, first, columns):
    offs_n = first + tl.arange(0, y.shape[1])
    inside = (offs_n >= 0) & (offs_n < columns)
    out = out_ptr + offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    tl.store(out, y, mask=(offs_m < M)[:, None] & inside[None, :])


@triton.jit
def _store_part(out, y, offs_m, M, pixels, first, columns, column, RUN: tl.constexpr, ADD: tl.constexpr):
    out_ptr, stride_on, stride_op, stride_oc = out
    offs_n = first + tl.arange(0, y.shape[1])
    mask_m = offs_m < M
    if RUN == 0:  # images follow one another as pixels do
        rows = offs_m.to(tl.int64) * stride_op
        channels = (column + offs_n).to(tl.int64)
    else:
        # Divided in int32: in int64 each division is the call of a subroutine.
        rows = (offs_m // pixels).to(tl.int64) * stride_on + (offs_m % pixels).to(tl.int64) * stride_op
        channels = (column + offs_n).to(tl.int64) * stride_oc
        # What is contiguous decides along what the lanes lie, and how wide accesses are, as far as it is aligned, too.
        # Odd images align nothing: there 2 makes nothing wider, and without it Triton 3.9 lays lanes along channels.
        rows = tl.multiple_of(tl.max_contiguous(rows, max(RUN, 2)), RUN)
        channels = tl.multiple_of(channels, RUN)
        mask_m = tl.max_constancy(mask_m, RUN)  # of what was made here: a hint on a parameter is lost
    places = out_ptr + rows[:, None] + channels[None, :]
    mask = mask_m[:, None] & (offs_n < columns)[None, :]
    if ADD:
        y += tl.load(places, mask=mask, other=0.0).to(y.dtype)
    tl.store(places, y, mask=mask)


def is_channels_last(t: Tensor) -> bool:
    """Tell which of the two memory formats a contiguous ``[N, C, H, W]`` has."""
    return t.is_contiguous(memory_format=torch.channels_last)


def out_run(shape: tuple[int, ...], channels_last: bool) -> int:
    """Return RUN, a number of pixels: as many lie side by side from each of its multiples on; 0 where channels do."""
    return 0 if channels_last else run_of(shape[2] * shape[3])


def run_of(*counts: int) -> int:
    """Return the largest power of two, 16 at most, that divides ``counts``: a run's length and distances from others.

    1 for 2: with pairs the test of 6x5 pixels failed once on an H200. No CPU has shown a cause, and no GPU has run it
    again.
    """
    run = math.gcd(*counts, 16)
    return 1 if run == 2 else run


def out_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int, int]:
    """Return the strides in elements from image to image, pixel to pixel and channel to channel.

    Computed, not read: where a dimension has size 1, a tensor's own stride may be any number.
    """
    _, channels, height, width = shape
    pixels = height * width
    return (pixels * channels, channels, 1) if channels_last else (channels * pixels, 1, pixels)
