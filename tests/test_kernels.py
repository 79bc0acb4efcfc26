"""The launchers against torch, in the interpreter or on the device, inside poisoned memory."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastinception import FastInception

pytest.importorskip("triton")

from fastinception.kernels import configs
from fastinception.kernels import data_gradient as data_gradient_module
from fastinception.kernels import spatial as spatial_module
from fastinception.kernels.entry import entry
from fastinception.kernels.first_layer import first_layer, first_layer_gradient
from fastinception.kernels.implicit_gemm import inverses
from fastinception.kernels.spatial import Conv, spatial
from fastinception.kernels.sums import Sum, add_up
from tests.poisoned import (
    DEVICE,
    ENGINES,
    FORMATS,
    INTERPRETED,
    LIBRARY,
    SAME3,
    SAME5,
    Entry,
    Memory,
    Spatial,
    assert_2x,
    needs_interpreter,
    normal,
)

# NumPy's, under the interpreter, on the infinities that some tests are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
]
DTYPES = (torch.float16, torch.float32, torch.float64 if INTERPRETED else torch.bfloat16)


@pytest.fixture(autouse=True)
def _exact_reference():
    """Keep float32 references float32 on a GPU as well."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


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
        Sum(size, start, count, stride) for (count, size), start, stride in zip(sizes, starts, columns, strict=False)
    ]
    outs = [torch.full((size + 1,), torch.nan, device=DEVICE) for _, size in sizes]
    add_up(tuple(sums), [out[:-1] for out in outs], partials)
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


def test_the_librarys_results_are_rows_of_pixels_whatever_format_it_chose():
    """Of one channel, which is contiguous in both formats, it may be either."""
    x, weight, bias = normal(2, 1, 4, 5).to(DEVICE), normal(3, 1, 3, 3).to(DEVICE), normal(3).to(DEVICE)
    out = torch.empty(2, 3, 4, 5, device=DEVICE)
    spatial([Conv(x, weight, bias, 0, padding=(1, 1))], out, None, tiles=LIBRARY)
    torch.testing.assert_close(out, F.relu(F.conv2d(x, weight, bias, padding=1)))


def test_more_taps_than_bits_are_refused():
    with pytest.raises(ValueError, match=r"at most 31 taps was expected, got 4x8"):
        Spatial(1, 9, 9, [(1, 1, (4, 8), (1, 1), (0, 0))])


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 7), (31, 1), (1, 31)])
def test_a_factor_divides_all_that_a_reduction_meets(kernel):
    kernel_h, kernel_w = kernel
    generator, refused = np.random.default_rng(0), []
    for channels in (*range(1, 300), *range(300, 20_000, 37), 512, 1 << 12, 1 << 14):
        end = kernel_h * kernel_w * channels + 1024
        factors = inverses(channels, *kernel)
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


# The first convolution of a network


@pytest.mark.device
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride"),
    [((1, 64), (7, 7), 2), ((1, 70), (3, 5), 1), ((3, 9), (3, 3), 2), ((2, 1), (1, 7), 3), ((5, 16), (1, 1), 1)],
)
def test_first_layer(channels, kernel, stride, dtype, relu):
    """A weight, a bias and an output that lie in poison; infinities and NaN stay in their windows.

    Behind the images are others: a poisoned window would leave the poison of the output as it is.
    """
    padding, (c, o) = [side // 2 for side in kernel], channels
    for n, height, width in ((3, 14, 15), (2, 8, 7), (1, 7, 150)):
        memory = Memory()
        x = memory.randn(n + 2, c, height, width, dtype=dtype, format=torch.channels_last)[:n]
        weight = memory.randn(o, c, *kernel, dtype=dtype, format=torch.channels_last)
        bias = memory.randn(o, dtype=dtype)
        x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, 0, 3, 5] = float("nan"), float("inf"), -float("inf")
        truth = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
        plain = F.conv2d(x, weight, bias, stride, padding)
        if relu:
            truth, plain = F.relu(truth), F.relu(plain)
        out = memory.empty(truth.shape, dtype, torch.channels_last)
        first_layer(x, weight, bias, out, stride, relu=relu)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(out), kind(truth))
        finite = truth.isfinite()
        assert finite.sum() > 0
        assert_2x(out[finite], plain[finite], truth[finite])
        memory.assert_untouched()


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [((1, 64), (7, 7), 2), ((3, 70), (3, 5), 1), ((2, 1), (1, 7), 3)]
)
def test_first_layer_gradient(channels, kernel, stride, dtype, monkeypatch):
    """Of several parts, the last one with fewer steps."""
    monkeypatch.setattr(configs, "FIRST_LAYER", configs.FIRST_LAYER._replace(steps=5))
    configs.forget()
    padding, (c, o) = [side // 2 for side in kernel], channels
    for n, height, width in ((3, 14, 15), (2, 8, 7), (1, 7, 150)):
        memory = Memory()
        x = memory.randn(n, c, height, width, dtype=dtype, format=torch.channels_last)
        shape = n, o, -(-height // stride), -(-width // stride)
        grad = memory.randn(*shape, dtype=dtype, format=torch.channels_last)
        found = memory.empty((o, c, *kernel), dtype, torch.channels_last), memory.empty((o,), dtype, FORMATS[1])

        def library(dtype, operands=(grad, x, found[0])):
            options = [o], [stride] * 2, padding, [1, 1], False, [0, 0], 1, [False, True, True]
            return torch.ops.aten.convolution_backward(*(t.to(dtype) for t in operands), *options)[1:]

        first_layer_gradient(x, grad, *found, stride)
        for ours, plain, truth in zip(found, library(dtype), library(torch.float64), strict=True):
            assert_2x(ours, plain, truth)
        # A number at the border is in windows that there would be beyond the output's rows.
        x[0, 0, 3, -1] = float("nan")
        first_layer_gradient(x, grad, *found, stride)
        windows = F.unfold(x.double(), kernel, padding=padding, stride=stride)  # [n, numbers of a window, pixels]
        in_any = windows.isnan().any(2).any(0).view(c, *kernel)
        assert in_any.any()
        assert torch.equal(found[0].isnan(), in_any.expand_as(found[0]))
        memory.assert_untouched()
    configs.forget()
