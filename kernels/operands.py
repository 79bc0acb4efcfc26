"""Read what a launch passes to all programs: lists of numbers, and which of several tensors a tile or a row is of."""

import triton
import triton.language as tl


@triton.constexpr_function
def sum_dtype(pointer):
    """Return the dtype in which what a pointer of this type leads to is added up."""
    return tl.float64 if pointer.element_ty == tl.float64 else tl.float32


@triton.jit
def number(listed, DIVISOR: tl.constexpr = 1):
    """Return a number of a list, as ``configs.as_list`` made it one; DIVISOR divides it, as the compiler sees."""
    return listed // (2 * DIVISOR) * DIVISOR if DIVISOR > 1 else (listed >> 1) - 1


@triton.jit
def number_of(tile, firsts, numbers, DIVISOR: tl.constexpr = 1):
    """Return that of ``numbers`` whose tiles ``tile`` is among: ``firsts`` is where each one's begin.

    By choices, so that what is made of it is compiled once, for any of them; branches would be compiled for each.
    """
    listed = numbers[0]
    listed_tile = 2 * tile + 3
    for i in tl.static_range(1, len(numbers)):
        listed = tl.where(listed_tile >= firsts[i], numbers[i], listed)
    return number(listed, DIVISOR)


@triton.jit
def pointer_of(tile, firsts, pointers, ALIGNED: tl.constexpr):
    """Return that of ``pointers`` whose tiles ``tile`` is among, as above; ALIGNED, all are aligned to 16 bytes."""
    pointer = pointers[0]
    listed_tile = 2 * tile + 3
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(listed_tile >= firsts[i], pointers[i], pointer)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer  # the compiler loses it in tl.where


@triton.jit
def divisible(value, DIVISOR: tl.constexpr):
    """Return ``value``, which DIVISOR divides, as something of which the compiler sees that it does."""
    return value // DIVISOR * DIVISOR if DIVISOR > 1 else value  # a hint on an argument is lost


@triton.jit
def choosable(pointer, offset, AMD: tl.constexpr):
    """``pointer + offset`` for ``tl.where``: on AMD as an integer, as its compiler ends on pointers (Triton 3.6)."""
    if AMD:
        return pointer.to(tl.int64) + tl.cast(offset, tl.int64) * (pointer.dtype.element_ty.primitive_bitwidth // 8)
    else:  # without it, Triton would want one type of both
        return pointer + offset


@triton.jit
def matrix_of(pointers, heights, j, stride, DIVISOR: tl.constexpr, AMD: tl.constexpr):
    """Return for rows ``j`` of matrices, as if they lay below one another, pointers to which to add ``j * stride``.

    ``heights`` is a list. DIVISOR divides them: as many rows side by side are of one matrix.
    """
    matrix = choosable(pointers[0], tl.zeros_like(j), AMD)
    start = number(heights[0], DIVISOR)
    for i in tl.static_range(1, len(pointers)):
        matrix = tl.where(j < start, matrix, choosable(pointers[i], -start * stride, AMD))
        start += number(heights[i], DIVISOR)
    return matrix.to(pointers[0].dtype)


@triton.jit
def before(offs, end, DIVISOR: tl.constexpr):
    """Return consecutive ``offs``, for those from ``end`` on others below it, in the same runs of DIVISOR.

    To load what is never used takes fewer instructions than to leave it out. DIVISOR divides ``end``.
    """
    return tl.multiple_of(tl.max_contiguous(tl.where(offs < end, offs, offs % DIVISOR), DIVISOR), DIVISOR)
