"""The launchers against torch, in the interpreter or on the device, inside poisoned memory."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import mmap
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastinception import FastInception

pytest.importorskip("triton")

from triton.runtime import interpreter

from fastinception.kernels import configs, target
from fastinception.kernels import data_gradient as data_gradient_module
from fastinception.kernels import entry as entry_module
from fastinception.kernels import entry_gradient as entry_gradient_module
from fastinception.kernels import library as library_module
from fastinception.kernels import spatial as spatial_module
from fastinception.kernels import split as split_module
from fastinception.kernels import weight_gradient as weight_gradient_module
from fastinception.kernels.entry import entry
from fastinception.kernels.spatial import Conv, spatial

INTERPRETED = target.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
# NumPy's, under the interpreter, on the infinities that some tests are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="looks at single loads and stores")
DTYPES = (torch.float16, torch.float32, torch.float64 if INTERPRETED else torch.bfloat16)
FORMATS = (torch.channels_last, torch.contiguous_format)
# Elements of poison on each side of a tensor: a multiple of every alignment, and what a lost mask reaches in rows.
FRAME = 1 << 14


@pytest.fixture(autouse=True)
def _exact_reference():
    """Keep float32 references float32 on a GPU as well."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


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
        return storage[FRAME:].as_strided(shape, torch.empty(shape, memory_format=format).stride(), FRAME)

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


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Level 0


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 17, 5, 7), (15, 17, 1, 17)),
        ((1, 64, 4, 1), (16, 24, 8, 32)),  # a whole BLOCK_K
        ((3, 70, 1, 6), (70, 50, 20, 130)),  # two column tiles, and a first one that spans two convolutions
        ((3, 15, 9, 11), (8, 16, 24, 9)),  # three row tiles, the last one not full
    ],
)
def test_entry(dtype, shape, widths):
    Entry(normal(*shape, dtype=dtype), widths).check()


@pytest.mark.device
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 17, 5, 3), (1, 16, 1, 9), (9, 16, 1, 1), (2, 1, 4, 4)])
def test_entry_layouts_and_modes(shape, out_format, save):
    Entry(normal(*shape), (9, 4, 2, 5), out_format=out_format, save=save).check(save)


@pytest.mark.device
def test_nothing_is_assumed_about_alignment():
    """Weights that start at odd addresses, as views of one flat buffer do."""
    flat = normal(3 * 16 + 1).to(DEVICE)
    weight = flat[1:].view(3, 16, 1, 1)
    x = normal(2, 16, 3, 3).contiguous(memory_format=torch.channels_last).to(DEVICE)
    out = torch.empty(2, 6, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    dense = torch.empty(2, 3, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    bias = torch.zeros(3, device=DEVICE)
    entry(x, (weight, weight), (bias, bias), weight, bias, out, 3, (dense,), None, 0)
    torch.testing.assert_close(out[:, :3], F.relu(F.conv2d(x, weight)))
    torch.testing.assert_close(dense, out[:, :3].contiguous(memory_format=torch.channels_last))


@pytest.mark.device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pool_and_relu_treat_special_values_as_aten_does(value, sign):
    """One special pixel at each place of the image in turn, and a plane of nothing else."""
    h, w = 4, 3
    x = normal(h * w + 1, 1, h, w)
    for i in range(h * w):
        x[i, 0, i // w, i % w] = value
    x[-1] = value
    case = Entry(x, (1, 1, 1, 1), weight=sign)
    for ours, plain in zip(case.results(), case.expected(torch.float32), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)
    case.check_others()


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["behind a ReLU", "zeros", "few"])
@pytest.mark.parametrize("shape", [(2, 17, 1, 1), (1, 8, 1, 7), (1, 9, 5, 1), (2, 32, 7, 9)])
def test_of_equal_maxima_the_first_counts(shape, values, dtype):
    x = normal(*shape, dtype=dtype)
    x = {"behind a ReLU": x.relu(), "zeros": x * 0, "few": x.round()}[values]  # also -0.0
    Entry(x).check_others()


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_in_a_sum(dtype):
    x = normal(2, 17, 3, 3, dtype=dtype)
    x[0, 3, 1, 1], x[0, 4, 1, 1], x[1, 16, 2, 2], x[1, 0, 0, 0] = (
        float("inf"),
        float("-inf"),
        float("inf"),
        float("nan"),
    )
    case = Entry(x)
    for ours, truth in zip(case.results(), case.expected(torch.float64), strict=True):
        for kind in (torch.isnan, torch.isposinf):
            assert torch.equal(kind(ours), kind(truth))
    assert bool(case.results()[0].isnan().any())
    assert bool(case.results()[0].isposinf().any())
    case.check_others()


@pytest.mark.device
def test_sums_of_few_and_of_many_parts(monkeypatch):
    """In one launch, by the tiles of a GPU: those of few parts are longer."""
    monkeypatch.setattr(configs, "_INTERPRETED", {})
    configs.forget()
    sizes = [(1, 1025), (2, 24), (15, 1024), (16, 130), (17, 129), (40, 128), (3, 2100)]  # parts, elements
    parts = [normal(count, size) for count, size in sizes]
    columns = [size + 3 for _, size in sizes]  # between two parts of one
    partials = torch.cat([F.pad(part, (0, 3), value=torch.nan).flatten() for part in parts]).to(DEVICE)
    starts = itertools.accumulate((part.shape[0] * (part.shape[1] + 3) for part in parts), initial=0)
    sums = [
        weight_gradient_module.Sum(size, start, count, stride)
        for (count, size), start, stride in zip(sizes, starts, columns, strict=False)
    ]
    outs = [torch.full((size + 1,), torch.nan, device=DEVICE) for _, size in sizes]
    weight_gradient_module.add_up(tuple(sums), [out[:-1] for out in outs], partials)
    configs.forget()
    for out, part in zip(outs, parts, strict=True):
        torch.testing.assert_close(out[:-1].cpu(), part.double().sum(0).float(), rtol=1e-5, atol=1e-5)
        assert out[-1].isnan()


@pytest.mark.device
def test_half_precision_sums_beyond_its_range():
    """60000 + 60000 + ... - 60000 ... passes 65504 and comes back; without its negative half it is inf."""
    x = torch.full((1, 34, 2, 2), 60000.0, dtype=torch.float16)
    x[:, 17:33] = -60000.0
    x[:, 33] = -3000.0
    case = Entry(x, weight=1.0)
    assert bool((case.results()[0] == 57000.0).all())
    assert bool((case.results()[3] == 57000.0).all())
    assert bool(Entry(x.abs(), weight=1.0).results()[0].isposinf().all())


SMALL = configs.Tiles(32, 16, 16, num_warps=4, num_stages=2, pool=(16, 32, 16))


@pytest.mark.device
@pytest.mark.parametrize("options", [{}, {"interleaved": False}, {"launch_pdl": True}])
def test_entry_with_other_tiles(options):
    """Several row and column tiles of both parts, of sizes that are not each other's."""
    Entry(normal(3, 19, 4, 7), (17, 20, 3, 35), tiles=dataclasses.replace(SMALL, **options)).check()


@pytest.mark.device
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("part", ["gemm", "pool"])
def test_one_part_of_the_entry_alone(part, interleaved):
    case = Entry(
        normal(3, 19, 4, 7), (17, 20, 3, 35), tiles=dataclasses.replace(SMALL, interleaved=interleaved), part=part
    )
    case.memory.assert_untouched()
    results = list(zip(case.results(), case.expected(torch.float32), case.expected(torch.float64), strict=True))
    for triple in results[:3] if part == "gemm" else results[3:]:
        assert_2x(*triple)
    for untouched, *_ in results[3:] if part == "gemm" else results[:3]:
        assert bool(untouched.isnan().all())


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="part must be None, 'gemm' or 'pool', got 'pooled'"):
        Entry(normal(1, 1, 1, 1), (1, 1, 1, 1), part="pooled")


# Level 1

LIBRARY = configs.Tiles(32, 32, 16, num_warps=4, num_stages=1, library=True)
ENGINES = [pytest.param({}, id="triton"), pytest.param({"tiles": LIBRARY}, id="library")]


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


SAME3, SAME5 = ((3, 3), (1, 1), (1, 1)), ((5, 5), (1, 1), (2, 2))


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "channels"),
    [
        ((1, 1, 1), (1, 1, 1, 1)),
        ((2, 5, 7), (15, 17, 17, 1)),
        ((1, 1, 6), (16, 24, 8, 9)),
        ((3, 9, 1), (3, 130, 2, 33)),  # two column tiles beside one
        ((3, 9, 11), (4, 8, 5, 16)),  # three row tiles, the last one not full
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_spatial(dtype, size, channels, engine):
    c, o, d, p = channels
    Spatial(*size, [(c, o, *SAME3), (d, p, *SAME5)], dtype, **engine).check()


@pytest.mark.device
@pytest.mark.parametrize("launch_pdl", [True, False])
def test_spatial_with_other_tiles(launch_pdl):
    tiles = configs.Tiles(16, 64, 32, num_warps=4, num_stages=2, launch_pdl=launch_pdl)
    Spatial(3, 4, 7, [(5, 130, *SAME3), (3, 33, *SAME5)], tiles=tiles).check()


@pytest.mark.device
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("engine", ENGINES)
def test_spatial_layouts_and_modes(out_format, save, engine):
    Spatial(2, 4, 3, [(6, 9, *SAME3), (8, 3, *SAME5)], out_format=out_format, save=save, **engine).check()


@pytest.mark.device
@pytest.mark.parametrize(
    "convs",
    [
        pytest.param([(3, 9, *SAME3), (5, 4, *SAME5), (8, 2, (1, 1), (1, 1), (0, 0))], id="three"),
        pytest.param([(7, 5, (1, 7), (1, 1), (0, 3)), (8, 6, (7, 1), (1, 1), (3, 0))], id="1x7 and 7x1"),
        pytest.param([(5, 9, (3, 3), (2, 2), (0, 0))], id="stride 2"),
        pytest.param([(5, 9, (3, 3), (2, 2), (1, 1)), (3, 4, (5, 5), (2, 2), (2, 2))], id="stride 2, padded"),
        pytest.param([(5, 9, (3, 3), (2, 1), (0, 1))], id="stride 2 in rows only"),
        pytest.param([(2, 3, (1, 31), (1, 1), (0, 15))], id="31 taps"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_level_is_data(convs, engine):
    for h, w in ((7, 8), (8, 5)):
        Spatial(2, h, w, convs, **engine).check()


def test_the_library_takes_any_number_of_taps_and_nan_passes():
    Spatial(1, 9, 9, [(1, 1, (4, 8), (1, 1), (0, 0))], tiles=LIBRARY).check()
    case = Spatial(2, 5, 6, [(3, 9, *SAME3), (9, 4, *SAME5)], special=float("nan"), tiles=LIBRARY)
    assert bool(case.out[:, case.own[0]].isnan().any())
    case.check()


def test_more_taps_than_bits_are_refused():
    with pytest.raises(ValueError, match=r"at most 31 taps was expected, got 4x8"):
        Spatial(1, 9, 9, [(1, 1, (4, 8), (1, 1), (0, 0))])


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 7), (31, 1), (1, 31)])
def test_a_factor_divides_all_that_a_reduction_meets(kernel):
    kernel_h, kernel_w = kernel
    generator, refused = np.random.default_rng(0), []
    for channels in (*range(1, 300), *range(300, 20_000, 37), 512, 1 << 12, 1 << 14):
        end = kernel_h * kernel_w * channels + 1024
        factors = spatial_module.inverses(channels, *kernel)
        if factors == (None, None):
            refused.append(channels)
            continue
        for divisor, factor in zip((channels, kernel_w * channels), factors, strict=True):
            multiples = np.arange(divisor, end, max(divisor, end // 50 // divisor * divisor))
            j = np.concatenate([generator.integers(0, end, 50), multiples, multiples - 1, [end - 1]])
            assert (8 * j < 1 << 32).all()
            assert (8 * j * factor >> 32 == j // divisor).all(), (channels, divisor)
    assert not refused or min(refused) > 700  # far beyond those of a network


def test_too_many_channels_for_a_factor_are_divided(monkeypatch):
    monkeypatch.setattr(spatial_module, "inverses", lambda *_: (None, None))
    monkeypatch.setattr(data_gradient_module, "inverses", lambda *_: (None, None))
    configs.forget()
    Spatial(2, 5, 7, [(15, 17, *SAME3), (9, 4, *SAME5)]).check()
    block = FastInception(6, 4, (5, 9), (3, 7), 4, backend="triton").to(DEVICE, torch.float64)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, device=DEVICE)
    assert torch.autograd.gradcheck(block, x.requires_grad_(), fast_mode=True)
    configs.forget()


@pytest.mark.device
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_stay_in_their_windows(special, dtype):
    case = Spatial(2, 5, 6, [(3, 9, *SAME3), (9, 4, *SAME5)], dtype, special=special)
    for own, truth in zip(case.own, case.expected(torch.float64), strict=True):
        for kind in (torch.isnan, torch.isposinf):
            assert torch.equal(kind(case.out[:, own]), kind(truth))
        finite = truth.isfinite()
        torch.testing.assert_close(case.out[:, own][finite].double(), truth[finite], rtol=0.02, atol=0.02)
    case.check_others()


@pytest.mark.device
def test_half_precision_spatial_sums_beyond_its_range():
    x = torch.full((1, 16, 3, 3), 60000.0, dtype=torch.float16, device=DEVICE)
    x[:, 8:] = -60000.0
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.ones(1, 16, 3, 3, dtype=torch.float16, device=DEVICE)
    bias = torch.full((1,), 5.0, dtype=torch.float16, device=DEVICE)
    out = torch.empty(1, 1, 3, 3, dtype=torch.float16, device=DEVICE)
    spatial([Conv(x, weight, bias, 0, padding=(1, 1))], out, None)
    assert bool((out == 5.0).all())


# Both levels: who writes what, and how often


def block_buffers(shape: tuple[int, int, int, int], out_format: torch.memory_format, memory: Memory) -> dict[str, Any]:
    n, k, h, w = shape
    c1, c2, c3, c4 = (
        9,
        (5, 130),
        (3, 8),
        130,
    )  # two column tiles of the first convolution and of the pooled branch
    f32 = torch.float32
    return {
        "x": memory.randn(n, k, h, w, dtype=f32, format=torch.channels_last),
        "widths": (c1, c2, c3, c4),
        "out": memory.empty((n, c1 + c2[1] + c3[1] + c4, h, w), f32, out_format),
        "r2": memory.empty((n, c2[0], h, w), f32, torch.channels_last),
        "r3": memory.empty((n, c3[0], h, w), f32, torch.channels_last),
        "mask": memory.empty((n * h * w, 2 + 17 + 1 + 17), torch.uint8, torch.contiguous_format),
        "pooled": memory.empty((n * h * w, k), f32, torch.contiguous_format),
        "codes": memory.empty((n * h * w, k), torch.uint8, torch.contiguous_format),
    }


def launch_both(b: dict[str, Any], memory: Memory, **engine: Any) -> None:
    k = b["x"].shape[1]
    c1, c2, c3, c4 = b["widths"]
    w1, w21, w31, w42 = (memory.randn(o, k, 1, 1, dtype=torch.float32) for o in (c1, c2[0], c3[0], c4))
    b1, b21, b31, b42, b22, b32 = (memory.randn(o, dtype=torch.float32) for o in (c1, c2[0], c3[0], c4, c2[1], c3[1]))
    entry(
        b["x"],
        (w1, w21, w31),
        (b1, b21, b31),
        w42,
        b42,
        b["out"],
        c1 + c2[1] + c3[1],
        (b["r2"], b["r3"]),
        (b["mask"], b["pooled"], b["codes"]),
        20,
    )
    w22 = memory.randn(c2[1], c2[0], 3, 3, dtype=torch.float32)
    w32 = memory.randn(c3[1], c3[0], 5, 5, dtype=torch.float32)
    level = [
        Conv(b["r2"], w22, b22, c1, mask_column=2, padding=(1, 1)),
        Conv(b["r3"], w32, b32, c1 + c2[1], mask_column=19, padding=(2, 2)),
    ]
    spatial(level, b["out"], b["mask"], **engine)


@needs_interpreter
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 17, 9, 5)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_element_is_written_exactly_once(monkeypatch, shape, out_format, engine):
    writes: collections.Counter[int] = collections.Counter()
    original = interpreter.InterpreterBuilder.create_masked_store

    def counted(self, ptrs, value, mask, *rest):
        writes.update(ptrs.data[mask.data.astype(bool)].tolist())
        return original(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", counted)
    memory = Memory()
    buffers = block_buffers(shape, out_format, memory)
    launch_both(buffers, memory, **engine)
    expected: dict[int, int] = {}
    for name in ("out", "r2", "r3", "mask", "pooled", "codes"):
        tensor = buffers[name]
        expected |= {tensor.data_ptr() + i * tensor.itemsize: 1 for i in range(tensor.numel())}
    assert dict(writes) == expected
    memory.assert_untouched()


@needs_interpreter
@pytest.mark.parametrize("channels", [60, 64, 72])
def test_channels_that_two_steps_of_the_pool_share_count_once(channels):
    """Steps of 64 channels: the second of 72 begins at the eighth. An infinity among them is no NaN."""
    x = normal(2, channels, 3, 4)
    x[0, 20, 1, 1] = torch.inf
    made = Entry(x)
    for found, want in zip(made.results(), made.expected(torch.float64), strict=True):
        assert not found.isnan().any()
        torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-3)
    made.memory.assert_untouched()


@needs_interpreter
def test_each_program_computes_one_tile(monkeypatch):
    """A list of convolutions with several row and column tiles each; no program idles or does another's work."""
    written: dict[int, list[bool]] = {}
    original = interpreter.InterpreterBuilder.create_masked_store

    def noted(self, ptrs, value, mask, *rest):
        written.setdefault(self.grid_idx[0], []).append(bool(mask.data.any()))
        return original(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", noted)
    Spatial(3, 9, 11, [(3, 130, *SAME3), (2, 140, (1, 1), (1, 1), (0, 0)), (2, 3, *SAME3)])
    # Of 297 pixels three row tiles of 128 channels; of the 2 and the 12 behind them, and of three channels, two row
    # tiles twice as tall. The output and its mask are two stores, of 128 channels one for each half.
    many, few = [[True] * 4] * 3, [[True, True]] * 2
    assert written == dict(enumerate([*many, *few, *many, *few, *few]))
    written.clear()
    Entry(normal(3, 15, 9, 11), (70, 50, 20, 130))
    # For each row tile two GEMM tiles, each storing to four places, and two column tiles of the pooled branch.
    assert sorted(written) == list(range(3 * (2 + 2)))
    assert all(any(stores) for stores in written.values())
    # The same, all GEMM tiles first: without a mask these store to three places, those of the pooled branch to one.
    for tiles, order in (({}, [True, True, False, False] * 3), ({"interleaved": False}, [True] * 6 + [False] * 6)):
        written.clear()
        tiles = dataclasses.replace(configs.DEFAULTS["entry"](torch.float32, "cpu"), **tiles)
        Entry(normal(3, 15, 9, 11), (70, 50, 20, 130), save=False, tiles=tiles)
        assert [len(written[program]) > 2 for program in range(12)] == order


@needs_interpreter
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_outside_is_read(monkeypatch, engine):
    """Poison shows what reaches a result; this shows what is read and then dropped, a fault on a GPU."""
    reads: set[int] = set()
    original = interpreter.InterpreterBuilder.create_masked_load

    def recorded(self, ptrs, mask, *rest):
        reads.update(np.unique(ptrs.data[mask.data.astype(bool)]).tolist())
        return original(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", recorded)
    memory = Memory()
    framed = mock.Mock(conv2d=lambda *args: memory.put(F.conv2d(*args), torch.float32, torch.channels_last))
    monkeypatch.setattr(library_module, "F", framed)
    launch_both(block_buffers((3, 17, 9, 5), torch.channels_last, memory), memory, **engine)
    frames = [(frame.data_ptr(), frame.data_ptr() + frame.nbytes) for frame in memory.frames]
    assert len(reads) > 1000
    assert not [address for address in reads for first, end in frames if first <= address < end]


def huge(n: int, c: int, h: int = 1, w: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return a channels_last tensor in address space only: no page of it is ever touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    space = mmap.mmap(-1, dtype.itemsize * n * c * h * w, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(space, dtype=dtype).view(n, h, w, c).permute(0, 3, 1, 2)


class Notes:
    """Run one program of a grid, and note what it reads and writes: loads give zeros, and no memory is touched.

    ``behind``: which program, counted from the last.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        self.behind = self.program = 0
        self.patch = monkeypatch.setattr
        builder = interpreter.InterpreterBuilder
        self.patch(builder, "create_masked_load", lambda builder, *args: self.load(*args))
        self.patch(builder, "create_load", lambda builder, ptr, *args: self.load(ptr, None, None))
        self.patch(builder, "create_masked_store", lambda builder, *args: self.store(*args))
        self.patch(builder, "set_grid_idx", lambda builder, *args: setattr(builder, "grid_idx", (self.program, 0, 0)))
        self.patch(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)

    def load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        self.read.append(ptrs.data[mask.data.astype(bool)] if mask is not None else ptrs.data.ravel())
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        return interpreter.TensorHandle(np.zeros_like(ptrs.data, dtype=dtype), ptrs.get_element_ty())

    def store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        self.written.append(ptrs.data[mask.data.astype(bool)])

    def once(self, module: Any, name: str) -> None:
        """Have a module's kernel run its one program only."""
        kernel = getattr(module, name)

        def at(_: Any, grid: tuple[int]) -> Any:
            self.program = grid[0] - 1 - self.behind
            return kernel[(1,)]

        self.patch(module, name, type("Once", (), {"__getitem__": at})())

    def assert_inside(self, *tensors: Tensor, first: int = 2**31) -> None:
        """Each address lies in one of the tensors, and of a large one the last pixels are among them, none in front of
        its element ``first``."""
        touched = np.unique(np.concatenate([addresses.ravel() for addresses in (*self.read, *self.written)]))
        known = np.zeros(len(touched), dtype=bool)
        for t in tensors:
            inside = (touched >= t.data_ptr()) & (touched < t.data_ptr() + t.nbytes)
            known |= inside
            if t.numel() > 2**31:
                assert inside.any(), t.shape
                assert touched[inside].min() >= t.data_ptr() + t.itemsize * first
                assert touched[inside].max() >= t.data_ptr() + t.nbytes - 2 * t.itemsize * t.shape[1]
        assert known.all(), "an address is in none of the tensors"


MANY = 4_400_000, 16, 6, 6  # more elements than int32 counts


@needs_interpreter
@pytest.mark.parametrize("level", ["entry", "spatial", "library"])
def test_addresses_beyond_two_to_the_31_elements(monkeypatch, level):
    """The last program of tensors with more elements than int32 counts reads and writes their last pixels."""
    n, c, *size = MANY
    x, out = huge(n, c, *size), huge(n, 2 * c, *size)
    weight, bias = torch.zeros(c, c, 1, 1, dtype=torch.float16), torch.zeros(c, dtype=torch.float16)
    notes = Notes(monkeypatch)
    operands = [x, out, weight, bias]
    if level == "entry":
        notes.once(entry_module, "_entry_kernel")
        # The last program is a tile of the pooled branch; the GEMM's last tile comes before the pool tiles.
        dense, mask, codes = huge(*MANY), huge(n * 36, 4, dtype=torch.uint8), huge(n * 36, c, dtype=torch.uint8)
        pooled = huge(n * 36, c)
        for notes.behind in (0, 1):
            entry(x, (weight, weight), (bias, bias), weight, bias, out, c, (dense,), (mask, pooled, codes), 2)
        operands += [dense, mask, pooled, codes]
    elif level == "library":
        result = huge(*MANY)
        monkeypatch.setattr(library_module, "F", mock.Mock(conv2d=lambda *args: result))
        notes.once(library_module, "_library_kernel")
        spatial([Conv(x, weight, bias, c)], out, None, tiles=LIBRARY)
        operands[0] = result
    else:
        notes.once(spatial_module, "_spatial_kernel")
        spatial([Conv(x, weight, bias, c)], out, None)
    notes.assert_inside(*operands)


@needs_interpreter
@pytest.mark.parametrize(
    ("kernel", "images"),
    [
        *((f"{name}_gradient", MANY) for name in ("data", "pool", "entry", "weight")),
        ("split", MANY),
        # Images so large that those of one step go beyond it, and fewer than a step has pixels.
        ("weight_gradient", (128, 16, 1100, 1100)),
        ("weight_gradient", (127, 16, 1100, 1100)),
    ],
)
def test_addresses_beyond_two_to_the_31_elements_in_the_backward(monkeypatch, kernel, images):
    n, c, height, width = images
    pixels, shape = n * height * width, (n, height, width)
    gpu, notes = target.gpu(torch.device("cpu")), Notes(monkeypatch)
    module = entry_gradient_module if kernel == "pool_gradient" else globals()[f"{kernel}_module"]
    notes.once(module, f"_{kernel}_kernel")
    images, rows, bytes_ = huge(*images), huge(pixels, c), huge(pixels, c, dtype=torch.uint8)
    weight = torch.zeros(c, c, 3, 3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    operands = [images, rows]
    if kernel == "split":
        partials = torch.empty(split_module.parts(pixels, gpu) * c)
        split_module.split(images, bytes_, (split_module.Branch(c, 0, c - 2, c, 0),), [rows], partials)
        operands += [bytes_, partials]
    elif kernel == "data_gradient":
        tiles, out = configs.Tiles(32, 32, 16, num_warps=4, num_stages=2), huge(pixels, c)
        partials = torch.empty(data_gradient_module.parts(pixels, c, tiles, gpu) * c)
        gradient = data_gradient_module.Gradient(weight.shape, relu=True, stride=c)
        data_gradient_module.data_gradient((gradient,), [rows], [weight], [images], [out], shape, partials, tiles)
        operands += [out, weight, partials]
    elif kernel == "pool_gradient":
        entry_gradient_module.pool_gradient(rows, bytes_, images)
        operands += [bytes_]
    elif kernel == "entry_gradient":
        weight = weight[:, :, :1, :1].contiguous()
        entry_gradient_module.entry_gradient(rows, (weight,), images)
        operands += [weight]
    else:
        product = weight_gradient_module.Product(c, c, 3, 3)
        tiles = configs.Tiles(32, 64, 128, num_warps=4, num_stages=2)
        division = weight_gradient_module.divide(shape, [product], torch.float16, gpu, tiles)
        division = division._replace(steps_of_part=1, parts=division.steps)
        notes.behind = 1  # the last tile's taps are those below and right of the last pixel
        partials = huge(division.parts * c, 9 * c, dtype=torch.float32)
        weight_gradient_module.weight_gradient((product,), [rows], [images], shape, division, partials)
        operands += [partials]
    notes.assert_inside(*operands, first=0 if n == 128 else 2**31)  # each image's pixel


@needs_interpreter
def test_the_last_tile_of_data_gradients_reads_nothing_behind_its_pixels(monkeypatch):
    n, c, height, width = 5, 16, 3, 3
    pixels, tiles = n * height * width, configs.Tiles(32, 32, 16, num_warps=4, num_stages=2)
    gpu, notes = target.gpu(torch.device("cpu")), Notes(monkeypatch)
    notes.once(data_gradient_module, "_data_gradient_kernel")
    weight = torch.zeros(c, c, 3, 3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    active = torch.zeros(n, c, height, width, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    rows, out = (torch.zeros(pixels, c, dtype=torch.float16) for _ in range(2))
    partials = torch.empty(data_gradient_module.parts(pixels, c, tiles, gpu) * c)
    gradient = data_gradient_module.Gradient(weight.shape, relu=True, stride=c)
    data_gradient_module.data_gradient(
        (gradient,), [rows], [weight], [active], [out], (n, height, width), partials, tiles
    )
    notes.assert_inside(rows, weight, active, out, partials)


@needs_interpreter
@pytest.mark.parametrize("kernel", ["entry", "entry_gradient", "weight_gradient"])
def test_what_is_left_behind_whole_tiles_takes_smaller_ones(monkeypatch, kernel):
    """Of 192 channels or rows the last 64: half of a tile's products."""
    shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
    own = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        shapes[(*a.data.shape, b.data.shape[1])] += 1
        return own(self, a, b, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    n, gpu, format = 128, target.gpu(torch.device("cpu")), torch.channels_last
    images, wide = (torch.zeros(n, c, 1, 2, dtype=torch.float16).to(memory_format=format) for c in (8, 192))
    rows = torch.zeros(2 * n, 8, dtype=torch.float16)
    if kernel == "entry":
        weight, bias = torch.zeros(192, 8, 1, 1, dtype=torch.float16), torch.zeros(192, dtype=torch.float16)
        entry(images, (weight,), (bias,), weight, bias, wide, 0, (), None, 0, part="gemm")
    elif kernel == "entry_gradient":
        entry_gradient_module.entry_gradient(rows, (torch.zeros(8, 192, 1, 1, dtype=torch.float16),), wide)
    else:
        product = weight_gradient_module.Product(192, 8, 1, 1)
        division = weight_gradient_module.divide((n, 1, 2), [product], torch.float16, gpu)
        assert division.images_first
        partials = torch.zeros(division.parts * 192 * 8)
        grads = torch.zeros(2 * n, 192, dtype=torch.float16)
        weight_gradient_module.weight_gradient((product,), [grads], [images], (n, 1, 2), division, partials)
    narrow = {"weight_gradient": (64, 128, 16)}.get(kernel, (128, 128, 64))
    whole = {"weight_gradient": (128, 128, 16)}.get(kernel, (128, 128, 128))
    assert shapes == {whole: 2, narrow: 2}


class Operators(TorchDispatchMode):
    """List the operators that run, those inside the block's own operator too, but not the interpreter's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.paused = False
        self.key = torch._C.DispatchKey.CPU if DEVICE == "cpu" else torch._C.DispatchKey.CUDA

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused:
            self.names.append(str(func.name()))
        if func.namespace != "fastinception":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(torch._C.DispatchKeySet(self.key), *args)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_launches_and_no_other_work(monkeypatch, grad, weight_format, engine):
    if engine:
        monkeypatch.setitem(configs.DEFAULTS, "spatial_train" if grad else "spatial", lambda dtype, chip: LIBRARY)
    configs.forget()
    block = FastInception(16, 9, (4, 8), (3, 5), 7, backend="triton").to(DEVICE, memory_format=weight_format)
    x = normal(2, 16, 4, 5).contiguous(memory_format=torch.channels_last).to(DEVICE)
    expected = super(FastInception, block).forward(x)
    operators, launched = Operators(), []
    kernel = type(entry_module._entry_kernel)
    original = kernel.run

    def run(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        operators.paused = True
        try:
            return original(self, *args, **kwargs)
        finally:
            operators.paused = False

    monkeypatch.setattr(kernel, "run", run)
    with torch.set_grad_enabled(grad), operators:
        y = block(x)
    torch.testing.assert_close(y, expected)
    configs.forget()
    assert launched == ["_entry_kernel", "_library_kernel" if engine else "_spatial_kernel"]
    views = {"aten::slice.Tensor", "aten::detach", "aten::alias", "aten::view", "aten::split_with_sizes"}
    allocations = {"aten::empty.memory_format"}
    compute = [name for name in operators.names if name not in views | allocations]
    copies = ["aten::copy_"] * (2 if weight_format is torch.contiguous_format else 0)  # of the spatial weights
    # With the library nothing else but the two convolutions.
    own = "fastinception::triton_forward" if grad else "fastinception::triton_inference"
    assert compute == [own, *copies, *(["aten::conv2d"] * 2 if engine else [])]
    if not engine:
        assert sum(name in allocations for name in operators.names) <= 7 + len(copies)
