"""Calls of the entry and spatial launchers, with all that goes in and comes out inside memory full of poison."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastinception.kernels import configs, target
from fastinception.kernels.entry import entry
from fastinception.kernels.spatial import Conv, spatial

INTERPRETED = target.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="looks at single loads and stores")
FORMATS = (torch.channels_last, torch.contiguous_format)
# Elements of poison on each side of a tensor: a multiple of every alignment, and what a lost mask reaches in rows.
FRAME = 1 << 14
LIBRARY = configs.Tiles(32, 32, 16, num_warps=4, num_stages=1, library=True)
ENGINES = [pytest.param({}, id="triton"), pytest.param({"tiles": LIBRARY}, id="library")]
SAME3, SAME5 = ((3, 3), (1, 1), (1, 1)), ((5, 5), (1, 1), (2, 2))


class Memory:
    """Hand out tensors that lie inside larger storages full of poison, and check the poison afterwards."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.frames: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> Tensor:
        """Return a tensor of poison with poison around it."""
        size = int(np.prod(shape))
        poison = 0xA5 if dtype is torch.uint8 else float("nan")
        storage = torch.full((size + 2 * FRAME,), poison, dtype=dtype, device=DEVICE)
        self.frames += [storage[:FRAME], storage[FRAME + size :]]
        # Not torch.empty, in whose place a test may have put this.
        return storage.as_strided(shape, torch.zeros(shape).contiguous(memory_format=format).stride(), FRAME)

    def randn(self, *shape: int, dtype: torch.dtype, format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return self.put(torch.randn(shape, generator=self.generator, dtype=torch.float64), dtype, format)

    def put(self, values: Tensor, dtype: torch.dtype, format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return self.empty(values.shape, dtype, format).copy_(values)

    def assert_untouched(self) -> None:
        for frame in self.frames:
            assert bool((frame == 0xA5).all() if frame.dtype is torch.uint8 else frame.isnan().all())


def assert_2x(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Check that ``ours`` is within twice the error of torch in the same dtype, plus what float64 itself rounds."""
    error, allowed = (float((y.double() - truth).abs().max()) for y in (ours, plain))
    tiny = (torch.finfo(torch.float32).eps if ours.dtype is torch.float32 else 4e-15) * float(truth.abs().max())
    assert error <= 2 * allowed + tiny, f"largest error {error:.3g}, of plain torch {allowed:.3g}, tiny {tiny:.3g}"


def relu_bits(y: Tensor) -> Tensor:
    """Return the packed mask that belongs to one branch's ``y``: bit i of byte b is channel 8*b + i of a pixel."""
    passed = ~(y <= 0).permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy()
    return torch.from_numpy(np.packbits(passed, axis=1, bitorder="little"))


def window_maxima(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ATen's maxima of x's 3x3 windows and which of its window's pixels each is, both ``[N*H*W, K]``.

    A pixel's code is 4 * row + column, with 0, 1 and 3 for the first, middle and last. On a CPU: its indices lie inside
    the window whatever is in it.
    """
    k, h, w = x.shape[1:]
    values, indices = F.max_pool2d(x.cpu().contiguous(), 3, 1, 1, return_indices=True)
    rows = indices // w - torch.arange(h)[:, None] + 1
    columns = indices % w - torch.arange(w) + 1
    steps = torch.tensor([0, 1, 3], dtype=torch.uint8)
    codes = 4 * steps[rows] + steps[columns]
    return tuple(t.permute(0, 2, 3, 1).reshape(-1, k).to(x.device) for t in (values, codes))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Entry:
    """One call of ``entry`` with everything that goes in and comes out, in poisoned memory."""

    def __init__(
        self,
        x: Tensor,
        widths: tuple[int, int, int, int] = (3, 4, 2, 5),
        *,
        out_format: torch.memory_format = torch.channels_last,
        save: bool = True,
        weight: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.memory = memory = Memory(seed)
        n, k, h, w = x.shape
        dtype = x.dtype
        self.x = memory.put(x, dtype, torch.channels_last)
        self.weights = [memory.randn(o, k, 1, 1, dtype=dtype) for o in widths]
        self.biases = [memory.randn(o, dtype=dtype) for o in widths]
        if weight is not None:
            for tensor, value in (*((t, weight) for t in self.weights), *((t, 0) for t in self.biases)):
                tensor.fill_(value)
        c1, c4 = widths[0], widths[3]
        # Two channels before and after the pooled branch belong to others.
        self.out = memory.empty((n, c1 + 2 + c4 + 2, h, w), dtype, out_format)
        self.denses = [memory.empty((n, o, h, w), dtype, torch.channels_last) for o in widths[1:3]]
        self.start = (c1 + 7) // 8
        self.mask = memory.empty((n * h * w, self.start + (c4 + 7) // 8 + 1), torch.uint8, torch.contiguous_format)
        self.pooled = memory.empty((n * h * w, k), dtype, torch.contiguous_format)
        self.codes = memory.empty((n * h * w, k), torch.uint8, torch.contiguous_format)
        self.c1, self.c4 = c1, c4
        entry(
            self.x, self.weights[:3], self.biases[:3], self.weights[3], self.biases[3], self.out, c1 + 2,
            self.denses, (self.mask, self.pooled, self.codes) if save else None, self.start, **options,
        )  # fmt: skip

    def results(self) -> list[Tensor]:
        return [self.out[:, : self.c1], *self.denses, self.out[:, self.c1 + 2 : self.c1 + 2 + self.c4]]

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        x = self.x.contiguous().to(dtype)
        inputs = (x, x, x, F.max_pool2d(x, 3, 1, 1))
        triples = zip(inputs, self.weights, self.biases, strict=True)
        return [F.relu(F.conv2d(i, w.to(dtype), b.to(dtype))) for i, w, b in triples]

    def check(self, save: bool = True) -> None:
        for triple in zip(self.results(), self.expected(self.x.dtype), self.expected(torch.float64), strict=True):
            assert_2x(*triple)
        self.check_others(save)

    def check_others(self, save: bool = True) -> None:
        """Check the mask's bits, and that channels and bytes of other branches are left alone."""
        self.memory.assert_untouched()
        others = torch.cat((self.out[:, self.c1 : self.c1 + 2], self.out[:, self.c1 + 2 + self.c4 :]), dim=1)
        assert bool(others.isnan().all())
        if not save:
            assert bool((self.mask == 0xA5).all())
            assert bool((self.codes == 0xA5).all())
            assert bool(self.pooled.isnan().all())
            return
        values, taps = window_maxima(self.x)
        torch.testing.assert_close(self.pooled, values, rtol=0, atol=0, equal_nan=True)
        by_ptx = target.max_asm(target.gpu(self.x.device), self.x.dtype, with_codes=True) is not None
        told = ~values.isnan() if by_ptx else torch.ones_like(values, dtype=torch.bool)  # of NaN it names any pixel
        assert torch.equal(self.codes[told], taps[told])
        first, _, _, last = self.results()
        bits = torch.cat((relu_bits(first), relu_bits(last), torch.full((len(self.mask), 1), 0xA5)), dim=1)
        torch.testing.assert_close(self.mask.cpu(), bits.to(torch.uint8), rtol=0, atol=0)


class Spatial:
    """One call of ``spatial`` on convolutions ``(in, out, (kh, kw), stride, padding)``, in poisoned memory."""

    def __init__(
        self,
        n: int,
        h: int,
        w: int,
        convs: list[tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int]]],
        dtype: torch.dtype = torch.float32,
        *,
        out_format: torch.memory_format = torch.channels_last,
        save: bool = True,
        special: float | None = None,
        **options: Any,
    ) -> None:
        self.memory = memory = Memory()
        self.convs, column, byte = [], 1, 1  # a channel and a byte before, between and after belong to others
        self.own, self.own_bytes = [], []
        for c, o, kernel, stride, padding in convs:
            x = memory.randn(n, c, h, w, dtype=dtype, format=torch.channels_last)
            if special is not None:
                x[:, -1, h // 2, w // 2] = special
            weight = memory.randn(o, c, *kernel, dtype=dtype, format=torch.channels_last)
            bias = memory.randn(o, dtype=dtype)
            self.convs.append(Conv(x, weight, bias, column, byte, stride, padding))
            self.own.append(slice(column, column + o))
            self.own_bytes.append(slice(byte, byte + (o + 7) // 8))
            column, byte = column + o + 1, byte + (o + 7) // 8 + 1
        size = self.expected(torch.float64)[0].shape[2:]
        self.out = memory.empty((n, column, *size), dtype, out_format)
        self.mask = memory.empty((n * size.numel(), byte), torch.uint8, torch.contiguous_format)
        self.save, self.library = save, options.get("tiles") == LIBRARY
        spatial(self.convs, self.out, self.mask if save else None, **options)

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        return [
            F.relu(F.conv2d(c.x.to(dtype), c.weight.to(dtype), c.bias.to(dtype), c.stride, c.padding))
            for c in self.convs
        ]

    def check(self) -> None:
        dtype = self.out.dtype
        if self.library:
            for own, c in zip(self.own, self.convs, strict=True):
                plain = F.relu(F.conv2d(c.x, c.weight, None, c.stride, c.padding) + c.bias[:, None, None])
                torch.testing.assert_close(self.out[:, own], plain, rtol=0, atol=0, equal_nan=True, check_stride=False)
            self.check_others()
            return
        for own, plain, truth in zip(self.own, self.expected(dtype), self.expected(torch.float64), strict=True):
            assert_2x(self.out[:, own], plain, truth)
        self.check_others()

    def check_others(self) -> None:
        self.memory.assert_untouched()
        others = torch.ones(self.out.shape[1], dtype=torch.bool)
        expected = torch.full_like(self.mask, 0xA5)
        for own, own_bytes in zip(self.own, self.own_bytes, strict=True):
            others[own] = False
            if self.save:
                expected[:, own_bytes] = relu_bits(self.out[:, own]).to(DEVICE)
        assert bool(self.out[:, others].isnan().all())
        torch.testing.assert_close(self.mask, expected, rtol=0, atol=0)
