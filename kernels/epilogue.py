"""Begin and finish a tile of any level: bias, ReLU, one rounding, and the packed ReLU mask that the backward needs."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def follow_predecessor(PDL: tl.constexpr):
    """Wait until the kernel in front has ended, and let the next one start; nothing may be read or written before it.

    Also what seems to depend on no kernel: memory that is reused, weights that an optimizer has just written.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def out_offsets(offs_m, pixels, stride_on, stride_op):
    """Return in int64 where pixels lie in the output. Divided in int32: longer, each is the call of a subroutine."""
    return (offs_m // pixels).to(tl.int64) * stride_on + (offs_m % pixels).to(tl.int64) * stride_op


@triton.jit
def choosable(pointer, offset, AMD: tl.constexpr):
    """``pointer + offset`` for ``tl.where``: on AMD as an integer, as its compiler ends on pointers (Triton 3.6)."""
    if AMD:
        return pointer.to(tl.int64) + offset.to(tl.int64) * (pointer.dtype.element_ty.primitive_bitwidth // 8)
    else:  # without it, Triton would want one type of both
        return pointer + offset


@triton.jit
def bias_relu(acc, b_ptr, offs_n, mask_n, dtype: tl.constexpr, RELU: tl.constexpr):
    """Return ``relu(round(acc + bias))``, without RELU the sum. NaN passes as in ATen: for it ``y <= 0`` is false."""
    bias = tl.load(b_ptr + offs_n, mask=mask_n, other=0.0)
    y = (acc + bias[None, :].to(acc.dtype)).to(dtype)
    return tl.where(y <= 0.0, 0.0, y) if RELU else y


@triton.jit
def store_active(
    mask_ptr, y, offs_m, offs_n, mask_m, columns, stride_mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store one bit an element, set where ReLU passes the gradient: channel ``8*b + i`` is bit ``i`` of byte ``b``."""
    active = ((y <= 0.0) == 0) & (offs_n < columns)[None, :]  # [BLOCK_M, BLOCK_N]
    bits = tl.reshape(active.to(tl.int32), (BLOCK_M, BLOCK_N // 8, 8)) << tl.arange(0, 8)[None, None, :]
    offs_b = tl.min(tl.reshape(offs_n, (BLOCK_N // 8, 8)), axis=1) // 8  # [BLOCK_N // 8]
    tl.store(
        mask_ptr + offs_m.to(tl.int64)[:, None] * stride_mask + offs_b[None, :],
        tl.sum(bits, axis=2).to(tl.uint8),
        mask=mask_m[:, None] & (offs_b * 8 < columns)[None, :],
    )


def is_channels_last(t: Tensor) -> bool:
    """Tell which of the two memory formats a contiguous ``[N, C, H, W]`` has."""
    return t.is_contiguous(memory_format=torch.channels_last)


def out_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int, int]:
    """Return the strides in elements from image to image, pixel to pixel and channel to channel.

    Computed, not read: where a dimension has size 1, a tensor's own stride may be any number.
    """
    _, channels, height, width = shape
    pixels = height * width
    return (pixels * channels, channels, 1) if channels_last else (channels * pixels, 1, pixels)
