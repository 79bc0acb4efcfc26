"""Choose tile sizes: one frozen type, one validity rule, one default for each kernel, cached for the launchers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Size of the tile that one program computes, and how it is compiled.

    ``block_m`` counts pixels, ``block_n`` output channels, ``block_k`` one step of the reduction.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16 (tl.dot), got {size}")
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1:
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16 and num_stages at least 1, got {self}")


def _narrow(size: int, channels: int) -> int:
    """Halve a channel tile while it is at least twice as wide as the channels need."""
    while size > 16 and size // 2 >= channels:
        size //= 2
    return size


def _block_k(dtype: torch.dtype) -> int:
    return 128 // dtype.itemsize  # rows of 128 bytes: whole cache lines, and the widest shared-memory swizzle


@functools.cache
def gemm(columns: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the entry level's merged 1x1 convolutions, ``columns`` wide."""
    return Tiles(128, _narrow(128, columns), _block_k(dtype), num_warps=8, num_stages=3)


@functools.cache
def pool(dtype: torch.dtype) -> Tiles:
    """Tiles of the entry level's pooled branch; ``num_warps`` and ``num_stages`` are the launch's, from ``gemm``.

    Half as deep as the GEMM's: nine shifted loads are live at once. 64 channels are the least that a Hopper
    tensor-core instruction takes.
    """
    return Tiles(128, 64, max(16, _block_k(dtype) // 2), num_warps=8, num_stages=1)


@functools.cache
def spatial(columns: int, dtype: torch.dtype) -> Tiles:
    """Tiles of one convolution of the spatial level with ``columns`` output channels."""
    return Tiles(128, _narrow(128, columns), _block_k(dtype), num_warps=8, num_stages=3)


def tiles(size: int, block: int) -> int:
    """Return how many tiles of ``block`` cover ``size`` (``triton.cdiv`` takes 2 us: it serves kernels, too)."""
    return -(-size // block)
