"""Backward, last launch: add up the partial sums that the launches in front of it left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.operands import number_of, pointer_of
from fastinception.kernels.replay import Launch


class Sum(NamedTuple):
    """Partial sums to be added up."""

    elements: int
    offset: int  # of the first part in ``partials``
    parts: int
    stride: int  # from part to part


@triton.jit
def _sum_kernel(
    partials_ptr, out_ptrs, firsts, offsets, sizes, parts, strides, ALIGNED: tl.constexpr,
    FEW_P: tl.constexpr, FEW_N: tl.constexpr, MANY_P: tl.constexpr, MANY_N: tl.constexpr,
):  # fmt: skip
    """Add up the parts of some elements of one result, by a tile for few parts or by one for more than MANY_P.

    The tiles of the results follow one another; ``firsts`` is where each result's begin. ALIGNED divides offsets, sizes
    and strides.
    """
    program = tl.program_id(0)
    partials_ptr += number_of(program, firsts, offsets, ALIGNED)
    size = number_of(program, firsts, sizes, ALIGNED)
    count = number_of(program, firsts, parts)
    tile = program - number_of(program, firsts, firsts)
    stride = number_of(program, firsts, strides, ALIGNED).to(tl.int64)
    out_ptr = pointer_of(program, firsts, out_ptrs, False)
    if count > MANY_P:
        _sum_tile(tile, partials_ptr, out_ptr, size, count, stride, MANY_P, MANY_N)
    else:
        _sum_tile(tile, partials_ptr, out_ptr, size, count, stride, FEW_P, FEW_N)


@triton.jit
def _sum_tile(tile, partials_ptr, out_ptr, size, count, stride, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add up the parts of BLOCK_N elements, each BLOCK_P-th in order, and these BLOCK_P sums at the end.

    A sum over the tile in each step would wait for its loads, and for all threads, before the next.
    """
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < size
    offs_p = tl.arange(0, BLOCK_P)
    part = partials_ptr + offs_p[:, None] * stride + offs_n[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=partials_ptr.dtype.element_ty)
    for done in tl.range(0, count, BLOCK_P, loop_unroll_factor=4):
        total += tl.load(part + done * stride, mask=(offs_p < count - done)[:, None] & mask_n[None, :], other=0.0)
    tl.store(out_ptr + offs_n, tl.sum(total, axis=0), mask=mask_n)


def add_up(sums: tuple[Sum, ...], outs: Sequence[Tensor], partials: Tensor) -> Launch:
    """Launch the sums of all partial sums on the partials' device and current stream, each rounded once.

    Each of ``outs`` gets as many elements as its sum has, in the order of its memory.
    """
    config = _launch_config(sums, target.gpu(partials.device))
    with target.device_of(partials):
        return replay.launch(_sum_kernel, config, partials, tuple(outs))


@configs.cached
def _launch_config(sums: tuple[Sum, ...], gpu: target.Gpu) -> configs.LaunchConfig:
    few, many = configs.sweep(configs.SUM_FEW, gpu), configs.sweep(configs.SUM_MANY, gpu)
    elements, offsets, parts, strides = zip(*sums, strict=True)
    blocks = [(many if count > many.block_m else few).block_n for count in parts]
    tiles = (configs.cdiv(size, block_n) for size, block_n in zip(elements, blocks, strict=True))
    *firsts, end = itertools.accumulate(tiles, initial=0)
    return configs.launch_config(
        end, (tuple(firsts), offsets, elements, parts, strides),
        ALIGNED=math.gcd(8, *elements, *offsets, *strides),
        FEW_P=few.block_m, FEW_N=few.block_n, MANY_P=many.block_m, MANY_N=many.block_n, num_warps=few.num_warps,
    )  # fmt: skip
