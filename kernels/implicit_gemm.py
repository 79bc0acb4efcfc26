"""The loop that the convolutions and their data gradients share: products of windows of images with a weight."""

from __future__ import annotations

import triton
import triton.language as tl

from fastinception.kernels.operands import before, number, sum_dtype


@triton.jit
def taps_inside(h, w, mask_m, H, W, KH: tl.constexpr, KW: tl.constexpr):
    """Return int32 ``[BLOCK]``: bit ``i * KW + j`` says that pixel (h + i, w + j) lies inside the image."""
    columns = ((1 << tl.minimum(tl.maximum(W - w, 0), KW)) - 1) & (-1 << tl.minimum(tl.maximum(-w, 0), KW))
    inside = tl.zeros(h.shape, dtype=tl.int32)
    for i in tl.static_range(KH):
        inside |= tl.where(mask_m & (h + i >= 0) & (h + i < H), columns << (i * KW), 0)
    return inside


@triton.jit
def implicit_gemm(
    x_ptr, w_ptr, offs_n, n, h, w, mask_m, H, W, C, O, inverse, row_inverse,
    KH: tl.constexpr, KW: tl.constexpr, DIVISOR: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the sums of products ``[BLOCK_M, BLOCK_N]`` of the windows at (h, w) of images n with channels offs_n.

    The reduction runs over j = tap * C + c, taps and channels packed without gaps, so that 16 channels of a 5x5
    waste nothing. x is channels_last, therefore consecutive j are consecutive addresses within a kernel row.
    Whether a tap lies inside the image is one bit per output pixel, computed once; j past the last tap finds no bit.
    ``inverse`` and ``row_inverse`` are those of C that ``inverses`` returns, in lists. DIVISOR divides C and O.

    The weight is ``[O, C, KH, KW]``, channels_last. TRANSPOSED it is ``[C, O, KH, KW]`` and its taps are taken from the
    last to the first: the convolution that gives a data gradient.
    """
    offs_k = tl.arange(0, BLOCK_K)
    inside = taps_inside(h, w, mask_m, H, W, KH, KW)
    x_rows = x_ptr + (((n.to(tl.int64) * H + h) * W + w) * C)[:, None]
    columns = before(offs_n, O, DIVISOR)
    if TRANSPOSED:
        weights = w_ptr + ((KH * KW - 1) * O + offs_k * (KH * KW * O))[:, None] + columns[None, :]
    else:
        weights = w_ptr + (columns * (KH * KW * C))[None, :]
    dtype: tl.constexpr = sum_dtype(x_ptr.dtype)
    acc = tl.zeros((h.shape[0], offs_n.shape[0]), dtype=dtype)
    for k in range(0, KH * KW * C, BLOCK_K):
        j = k + offs_k
        mask_j = offs_k < KH * KW * C - k
        x_columns = j
        w_step = k * (KH * KW * O) if TRANSPOSED else j[:, None]
        if KH * KW == 1:
            mask_x = (inside != 0)[:, None] & mask_j[None, :]
        else:
            if inverse is None:
                tap, tap_h = j // C, j // (KW * C)
            else:  # the same: divisions would take more instructions than all else
                tap, tap_h = tl.umulhi(j * 8, number(inverse)), tl.umulhi(j * 8, number(row_inverse))
            tap, tap_h = tl.max_constancy(tap, DIVISOR), tl.max_constancy(tap_h, DIVISOR)
            mask_x = (inside[:, None] & (1 << tl.minimum(tap, 31))[None, :]) != 0  # bit 31 is never set
            x_columns += tap_h * ((W - KW) * C)
            if TRANSPOSED:
                w_step = (w_step - tap * ((KH * KW * C + 1) * O))[:, None]
        x = tl.load(x_rows + x_columns[None, :], mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weights + w_step, mask=mask_j[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=dtype)
    return acc


def inverses(channels: int, kernel_h: int, kernel_w: int) -> tuple[int | None, int | None]:
    """Return by which factors ``umulhi(8 * j, factor)`` divides j by ``channels``, and by ``kernel_w * channels``.

    For every j that a reduction meets. None where there are too many of them for that.
    """
    end = kernel_h * kernel_w * channels + 1024  # more than a step behind the last
    divisors = channels, kernel_w * channels
    one, other = factors = [-(-(1 << 29) // divisor) for divisor in divisors]
    # Each is too large by less than one part in 2**29 of j, times this.
    excess = max(factor * divisor - (1 << 29) for factor, divisor in zip(factors, divisors, strict=True))
    return (one, other) if end * max(excess, 1) < 1 << 29 else (None, None)
