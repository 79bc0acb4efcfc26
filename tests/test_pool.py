"""MaxPool2d: torch.nn's values and gradients, compiled for a CPU by ATen's kernels, in eager mode by Triton."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastinception import MaxPool2d, backends
from fastinception.kernels import target
from tests import profiled

SETTINGS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
]
FORMATS = (torch.channels_last, torch.contiguous_format)


def image(format: torch.memory_format, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return ``[2, 5, 7, 8]`` with ties in nearly every window, behind a ReLU, and a NaN."""
    x = torch.randn(2, 5, 7, 8, generator=torch.Generator().manual_seed(0)).round().relu_()
    x[0, 0, 3, 3] = float("nan")
    return x.to(dtype).contiguous(memory_format=format).requires_grad_()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_and_gradients_are_those_of_torch(settings, format, compiled):
    results = []
    for pool in (nn.MaxPool2d(**settings), MaxPool2d(**settings)):
        x = image(format)
        run = torch.compile(pool, fullgraph=True, backend="aot_eager") if compiled and type(pool) is MaxPool2d else pool
        y = run(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        results.append((y, *torch.autograd.grad(y, x, grad)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_runs_atens_kernels(dtype):
    x = image(torch.channels_last, dtype)
    pool = torch.compile(MaxPool2d(3, 2, 1), fullgraph=True)
    pool(x).sum().backward()  # compiles
    assert profiled.operators(lambda: pool(x).sum().backward()) == {"max_pool2d", "max_pool2d_backward"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_opcheck(settings, format):
    pool = MaxPool2d(**settings)
    pairs = [list(nn.modules.utils._pair(getattr(pool, n))) for n in ("kernel_size", "stride", "padding", "dilation")]
    x = image(format).detach().nan_to_num(1.0)  # opcheck compares results without equal_nan
    args = (x, *pairs, pool.ceil_mode)
    torch.library.opcheck(torch.ops.fastinception.max_pool2d, args)
    torch.library.opcheck(torch.ops.fastinception.max_pool2d, (x.clone().requires_grad_(), *args[1:]))
    y, indices = torch.ops.fastinception.max_pool2d(*args)
    for grad in (torch.ones_like(y), torch.randn_like(y).requires_grad_()):
        torch.library.opcheck(torch.ops.fastinception.max_pool2d_backward, (grad, *args, indices))


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_second_and_third_derivatives_and_tangents(settings, format, dual):
    """Compiled by a backend that leaves the derivatives to autograd."""
    results = []
    for pool in (nn.MaxPool2d(**settings), MaxPool2d(**settings)):
        x, generator = image(format), torch.Generator().manual_seed(1)
        run = torch.compile(pool, fullgraph=True, backend="eager") if type(pool) is MaxPool2d else pool
        y = run(x)
        first, tangent = (torch.randn(y.shape, generator=generator, dtype=y.dtype) for _ in range(2))
        first.requires_grad_()
        with forward_ad.dual_level() if dual else nullcontext():
            grad = forward_ad.make_dual(first, tangent) if dual else first
            (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
            found = [grad_x, forward_ad.unpack_dual(grad_x).tangent] if dual else [grad_x]
            (second,) = torch.autograd.grad(grad_x.pow(3).sum(), first, create_graph=True)
            found += second, *torch.autograd.grad(second.pow(2).sum(), first)
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_everything_else_is_torchs_own():
    """Indices, three dimensions, inference, double backward in eager mode, export."""
    x = image(torch.contiguous_format)
    indexed = torch.compile(MaxPool2d(3, return_indices=True), backend="aot_eager")
    assert torch.equal(indexed(x)[1], nn.MaxPool2d(3, return_indices=True)(x)[1])
    pool = torch.compile(MaxPool2d(3), fullgraph=True, backend="aot_eager")
    for images in (x, x[0]):
        torch.testing.assert_close(pool(images), nn.MaxPool2d(3)(images), equal_nan=True)
    assert profiled.operators(lambda: pool(x)) == {"max_pool2d"}
    for run in (
        lambda: pool(x[0]),
        lambda: pool(x.detach()),
        lambda: torch.no_grad()(pool)(x),
        lambda: MaxPool2d(3)(x),
        lambda: pool(x.detach().to("meta").requires_grad_()),
    ):
        assert not profiled.operators(run)
    clean = x.detach().nan_to_num(0.5).add(torch.rand(x.shape, dtype=x.dtype)).requires_grad_()
    assert torch.autograd.gradgradcheck(MaxPool2d(3, 2, 1), clean)
    settings = [3, 3], [2, 2], [1, 1], [1, 1], False
    assert torch.autograd.gradcheck(lambda x: torch.ops.fastinception.max_pool2d(x, *settings)[0], clean)
    for strict in (False, True):
        exported = torch.export.export(MaxPool2d(3, 2, 1), (clean,), strict=strict)
        assert "fastinception" not in str(exported.graph)
    assert MaxPool2d(3).state_dict() == {}


def test_a_compiled_functorch_transform():
    """Which torch 2.11 does not take through an operator of its own, of what was computed in it."""
    x = torch.rand(2, 3, 8, 8)
    found, expected = (
        torch.compile(torch.func.grad(lambda x, pool=pool: pool(2 * x).square().sum()), backend="aot_eager")(x)
        for pool in (MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1))
    )
    torch.testing.assert_close(found, expected)


needs_interpreter = pytest.mark.skipif(not target.interpreted(), reason="runs in Triton's interpreter, on CPU tensors")


def half(**settings: Any) -> MaxPool2d:
    """Return a pool of windows of 3x3 at every second pixel that asks for Triton."""
    pool = MaxPool2d(**{"kernel_size": 3, "stride": 2, "padding": 1} | settings)
    pool.backend = "triton"
    return pool


@pytest.fixture
def launches(monkeypatch) -> list[bool]:
    """Return a list that grows by one for each launch, True where it adds a bias."""
    kernel = pytest.importorskip("fastinception.kernels.pool")
    made: list[bool] = []
    original = kernel.max_pool
    monkeypatch.setattr(
        kernel,
        "max_pool",
        lambda x, bias, *others, relu: made.append(bias is not None) or original(x, bias, *others, relu=relu),
    )
    return made


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (7, 8), (12, 12), (9, 3)], ids=str)
@pytest.mark.parametrize("channels", [3, 64, 130])
def test_by_triton_the_values_are_torchs(channels, size, dtype, launches):
    x = torch.randn(3, channels, *size).round().to(dtype)
    x[0, :, -1, -1], x[1, :, 0, 0], x[2, :, 0, -1], x[2, 1] = torch.nan, torch.inf, -torch.inf, -torch.inf
    x = x.contiguous(memory_format=torch.channels_last)
    found, expected = half()(x), nn.MaxPool2d(3, 2, 1)(x)
    assert launches == [False]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.is_contiguous(memory_format=torch.channels_last)


@needs_interpreter
def test_a_launch_writes_each_output_and_nothing_else():
    kernel = pytest.importorskip("fastinception.kernels.pool")
    x = torch.randn(2, 5, 9, 6).contiguous(memory_format=torch.channels_last)
    space = torch.full((2 * 5 * 3 * 5 + 8,), torch.nan)
    out = space[4:-4].view(2, 5, 3, 5).permute(0, 3, 1, 2)
    kernel.max_pool(x, None, out)
    assert torch.equal(out, nn.MaxPool2d(3, 2, 1)(x))
    assert space.isnan().sum() == 8


class Own(Tensor):
    """A tensor of another class."""


# How each makes of an image what Triton does not serve.
UNSERVED = {
    "format": Tensor.contiguous,
    "cropped": lambda x: x[:, :, 1:],
    "some channels": lambda x: x[:, 1:],
    "dtype": lambda x: x.to(torch.bfloat16),
    "3-D": lambda x: x[0],
    "empty": lambda x: x[:0],
    "subclass": lambda x: x.as_subclass(Own),
    "vmap": lambda x: x[None],
    "negated": torch._neg_view,
    "zeros": lambda x: torch._efficientzerotensor(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2),
    "one channel": lambda x: x[:, :1].contiguous(),
    "one pixel": lambda x: x[:, :, :1, :1].contiguous(),
}


@needs_interpreter
@pytest.mark.parametrize(
    "change",
    ["nothing", "pairs", "autocast", "settings", "one side", "dilation", "ceil", "indices", *UNSERVED, "compiled"],
)
def test_what_triton_does_not_serve_is_torchs_own(change, launches):
    x = UNSERVED.get(change, Tensor.detach)(torch.randn(2, 5, 8, 6).contiguous(memory_format=torch.channels_last))
    settings = {"settings": {"stride": 1}, "dilation": {"dilation": 2}, "ceil": {"ceil_mode": True}}
    settings |= {"pairs": {"kernel_size": (3, 3), "padding": [1, 1]}, "one side": {"stride": (2, 1)}}
    run = half(**settings.get(change, {}), return_indices=change == "indices")
    own = nn.MaxPool2d(run.kernel_size, run.stride, run.padding, run.dilation, run.return_indices, run.ceil_mode)
    if change == "vmap":
        run, own = torch.vmap(run), torch.vmap(own)
    if change == "compiled":
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", enabled=change == "autocast"):
        found, expected = run(x), own(x)
    assert launches == ([False] if change in ("nothing", "pairs", "autocast") else [])
    assert type(found) is type(expected)
    if change != "indices":
        assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_interpreter
@pytest.mark.parametrize(
    ("most", "lacking", "launched"), [(96, None, [False]), (95, None, []), (96, "it has no tensor cores", [])]
)
def test_what_is_beyond_the_kernels_or_the_chip_is_torchs_own(most, lacking, launched, launches, monkeypatch):
    monkeypatch.setattr(backends, "_MOST_PIXELS", most)
    monkeypatch.setattr(target, "without_products", lambda device: lacking)
    x = torch.randn(2, 5, 8, 6).contiguous(memory_format=torch.channels_last)
    assert torch.equal(half()(x), nn.MaxPool2d(3, 2, 1)(x))
    assert launches == launched


def test_settings_are_left_to_torch(launches):
    """As it takes them, in a constructor or set later."""
    x = torch.randn(2, 5, 8, 6).contiguous(memory_format=torch.channels_last)
    for pool in (half(kernel_size=np.int64(2), padding=0), half()):
        if pool.kernel_size == 3:
            pool.stride = None
        own = nn.MaxPool2d(pool.kernel_size, pool.stride, pool.padding)
        own.stride = pool.stride
        assert torch.equal(pool(x), own(x))
    for padding, images in ((5, x), (1, x[:, :0]), (1, [1.0])):
        with pytest.raises((RuntimeError, TypeError)) as expected:
            nn.MaxPool2d(3, 2, padding)(images)
        with pytest.raises(type(expected.value)) as found:
            half(padding=padding)(images)
        assert str(found.value) == str(expected.value)
    assert half()(x.to("meta")).shape == (2, 5, 4, 3)
    assert launches == []


@pytest.mark.parametrize("value", ["aten", "auto", ""])
def test_the_environment_chooses_a_pools_backend(value, monkeypatch):
    monkeypatch.setenv("FASTINCEPTION_BACKEND", value)
    assert MaxPool2d(3, 2, 1).backend == (value or "auto")


@pytest.mark.parametrize("backend", ["ATen", None])
def test_an_unknown_backend_is_refused_by_the_next_call(backend):
    pool = MaxPool2d(3, 2, 1)
    pool.backend = backend
    with pytest.raises(ValueError, match=f"backend must be one of 'auto', 'triton', 'aten', got {backend!r}"):
        pool(torch.zeros(1, 1, 4, 4))


@needs_interpreter
@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_without_a_gpu_triton_is_asked_for(backend, launches):
    pool = half()
    pool.backend = backend
    pool(torch.randn(2, 5, 8, 6).contiguous(memory_format=torch.channels_last))
    assert launches == []
