"""Level 0's pooled branch: the max pool of x and its projection, a tile at a time; and any max pool's windows."""

from __future__ import annotations

import triton
import triton.language as tl

from fastinception.kernels.epilogue import bias_relu, store_result
from fastinception.kernels.operands import before, sum_dtype

NONE = tl.constexpr(255)  # the code of a window of which no pixel gets a gradient


@triton.jit
def maximum(a, b, ASM: tl.constexpr):
    """``max(a, b)``, NaN if either is: by ``ASM`` on pairs of 16-bit elements, by Triton's operator if it is None."""
    if ASM is None:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)


@triton.jit
def _maximum_at(a, code_a, b, code_b, ASM: tl.constexpr):
    """``max(a, b)`` and its code: the first's of equals; by Triton's operators the last NaN's, as in ATen."""
    if ASM is None:
        take = (b > a) | (b != b)
        return tl.where(take, b, a), tl.where(take, code_b, code_a)
    else:
        return tl.inline_asm_elementwise(
            ASM, "=&r,=&r,r,r,r,r", [a, code_a, b, code_b], dtype=(a.dtype, tl.int16), is_pure=True, pack=2
        )


@triton.constexpr_function
def tap_code(tap):
    """Return what names a tap of a 3x3 window: 4 * row + column, with 0, 1 and 3 for the first, middle and last."""
    row, column = tap // 3, tap % 3
    return 4 * (row + row // 2) + column + column // 2


@triton.constexpr_function
def code_type(max_asm):
    """Return the type of the codes: pairs of 16 bits fit a register, but for operators cost more."""
    return tl.int32 if max_asm is None else tl.int16


@triton.jit
def own_codes(codes, middle, inner, MAX_ASM: tl.constexpr):
    """``(codes | middle) & inner`` as bytes; of 16-bit codes by PTX, as the compiler takes pairs of them apart."""
    CODE: tl.constexpr = code_type(MAX_ASM)
    middle = middle.to(CODE)[:, None]
    inner = inner.to(CODE)[:, None]
    if MAX_ASM is None:
        return ((codes | middle) & inner).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 two, others;
                lop3.b32 two, $1, $3, $5, 0xA8;
                lop3.b32 others, $2, $4, $6, 0xA8;
                prmt.b32 $0, two, others, 0x6420;
            }""",
            "=r,r,r,r,r,r,r", [codes, middle, inner], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def borders(h, w, H, W):
    """Return how far up, down, left and right of pixels a window reaches, in pixels, and two masks for ``own_codes``.

    A tap outside the image is replaced by the border pixel, which its window holds already: the maximum is the
    same, and no -inf and no mask is needed. Its tap's code is kept: where taps stand for the border pixel, one OR and
    one AND make every code the pixel's own.
    """
    up = tl.where(h > 0, -W, 0)
    down = tl.where(h < H - 1, W, 0)
    left = tl.where(w > 0, -1, 0)
    right = tl.where(w < W - 1, 1, 0)
    middle = tl.where(h == 0, 4, 0) | tl.where(w == 0, 1, 0)
    inner = tl.where(h == H - 1, 7, 15) & tl.where(w == W - 1, 13, 15)
    return up, down, left, right, middle, inner


@triton.jit
def window_maximum(
    x_ptr, pixel, up, down, left, right, columns, mask, K, MASKED: tl.constexpr, MAX_ASM: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """Return the maximum of the 3x3 windows around the pixels, and with SAVE its taps' codes."""
    CODE: tl.constexpr = code_type(MAX_ASM)
    for tap in tl.static_range(9):
        dh = up if tap // 3 == 0 else (down if tap // 3 == 2 else 0)
        dw = left if tap % 3 == 0 else (right if tap % 3 == 2 else 0)
        x_tap = x_ptr + (pixel + dh + dw).to(tl.int64)[:, None] * K + columns[None, :]
        value = tl.load(x_tap, mask=mask[None, :], other=0.0) if MASKED else tl.load(x_tap)
        code = tl.full(value.shape, tap_code(tap), CODE)
        if tap == 0:
            pooled = value
            codes = code
        elif SAVE:
            pooled, codes = _maximum_at(pooled, codes, value, code, MAX_ASM)
        else:
            pooled = maximum(pooled, value, MAX_ASM)
    return pooled, codes


@triton.jit
def window_gradients(grad_ptr, codes_ptr, offs_m, offs_n, mask_m, mask_n, K):
    """Return the gradients and the codes of windows, outside of the masks the code of none."""
    CHUNK: tl.constexpr = 128 // grad_ptr.dtype.element_ty.primitive_bitwidth
    offsets = offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    # 16 bytes of codes a thread, in the layout of both, would take every second 16 bytes of the gradient at a time.
    codes = tl.load(codes_ptr + tl.max_contiguous(offsets, (1, CHUNK)), mask=mask, other=NONE)
    return tl.load(grad_ptr + offsets, mask=mask, other=0.0), codes


@triton.jit
def where_code_is(codes, CODE: tl.constexpr, grad, PTX: tl.constexpr):
    """Return ``grad`` where ``codes`` are CODE, else 0; by PTX of 16-bit types, two at a time."""
    if PTX:  # bytes, compared as float16 of which none is a normal number, give 16 bits each to mask the gradient by
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 two, others;
                prmt.b32 two, $2, 0, 0x4140;
                prmt.b32 others, $2, 0, 0x4342;
                set.eq.u32.f16x2 two, two, $5;
                set.eq.u32.f16x2 others, others, $6;
                and.b32 $0, two, $3;
                and.b32 $1, others, $4;
            }""",
            "=&r,=&r,r,r,r,r,r", [codes, grad, tl.full(codes.shape, CODE, tl.int16)],
            dtype=grad.dtype, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.where(codes == CODE, grad, 0.0)


@triton.jit
def _pool_step(
    acc, k, x_ptr, w_rows, pixel, up, down, left, right, pooled_ptr, codes_ptr, middle, inner, mask_saved,
    K, STEPS: tl.constexpr, PTX: tl.constexpr, MAX_ASM: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the product over BLOCK_K of K, from k on, to ``acc``; STEPS is from ``pool_steps``."""
    columns = (tl.minimum(k, K - BLOCK_K) if STEPS == "overlapping" else k) + tl.arange(0, BLOCK_K)
    mask_k = columns < K if STEPS == "one" else columns >= k
    pooled, codes = window_maximum(
        x_ptr, pixel, up, down, left, right, columns, mask_k, K, STEPS == "one", MAX_ASM, SAVE
    )
    if PTX:
        # Impure, so that the maxima stay in the layout of the loads. The compiler would move them behind the change of
        # layout that the product needs: each of the nine loads would go through it, and each maximum be computed often.
        REGISTER: tl.constexpr = 32 // pooled.dtype.primitive_bitwidth
        pooled = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [pooled], dtype=pooled.dtype, is_pure=False, pack=REGISTER
        )
    if SAVE:
        kept = pixel.to(tl.int64)[:, None] * K + columns[None, :]
        mask_kept = mask_saved[:, None] if STEPS == "even" else mask_saved[:, None] & mask_k[None, :]
        tl.store(pooled_ptr + kept, pooled, mask=mask_kept)
        codes = own_codes(codes, middle, inner, MAX_ASM)
        # 16 bytes of codes a thread, in the layout of all, would take every second 16 bytes of x at a time.
        CHUNK: tl.constexpr = 128 // pooled.dtype.primitive_bitwidth
        tl.store(codes_ptr + tl.max_contiguous(kept, (1, CHUNK)), codes, mask=mask_kept)
    w_columns = w_rows + columns[None, :]
    w = tl.load(w_columns) if STEPS == "even" else tl.load(w_columns, mask=mask_k[None, :], other=0.0)
    if STEPS == "overlapping":  # infinities times the weights' zeros would be NaN
        pooled = tl.where(mask_k[None, :], pooled, 0.0)
    return tl.dot(w, tl.trans(pooled.to(w.dtype)), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def pooled_tile(
    row_tile, column_tile, x_ptr, w_ptr, b_ptr, out, mask, pooled_ptr, codes_ptr,
    width, column, mask_column, M, K, H, W,
    DIVISOR: tl.constexpr, STEPS: tl.constexpr,
    PTX: tl.constexpr, MAX_ASM: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr, RELU: tl.constexpr,
    RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``relu(max_pool2d(x, 3, 1, 1) @ w.T + b)`` for one tile; the first column tile keeps what the pool found."""
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    pixel = tl.minimum(offs_m, M - 1)
    up, down, left, right, middle, inner = borders((pixel // W) % H, pixel % W, H, W)

    # The product is transposed, [BLOCK_N, BLOCK_M]: sm_90 takes pooled from shared memory as the right operand.
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=sum_dtype(x_ptr.dtype))
    w_rows = w_ptr + (before(offs_n, width, DIVISOR) * K)[:, None]
    mask_saved = offs_m < tl.where(column_tile == 0, M, 0)
    for k in tl.range(0, K, BLOCK_K, num_stages=1):  # nine loads a step: pipelined, they take 96 KB
        acc = _pool_step(
            acc, k, x_ptr, w_rows, pixel, up, down, left, right, pooled_ptr, codes_ptr, middle, inner, mask_saved,
            K, STEPS, PTX, MAX_ASM, PRECISION, SAVE, BLOCK_K,
        )  # fmt: skip

    y = bias_relu(tl.trans(acc), tl.load(b_ptr + offs_n, mask=mask_n, other=0.0), RELU)
    store_result(out, mask, y, offs_m, M, H * W, column_tile * BLOCK_N, width, column, mask_column, SAVE, RUN)


def pool_steps(channels: int, depth: int) -> str:
    """Return how steps of ``depth`` go over the channels: all whole; the last begins before its own; one is too many.

    A last step with masks would be a second copy of the loop's nine loads, with registers of its own.
    """
    if channels % depth == 0:
        return "even"
    return "overlapping" if channels > depth else "one"
