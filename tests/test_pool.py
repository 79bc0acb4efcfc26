"""MaxPool2d: torch.nn's values and gradients, and under torch.compile on a CPU ATen's kernels for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastinception import MaxPool2d

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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pool(x).sum().backward()
    ran = {event.name for event in profile.events()}
    assert ran >= {"fastinception::max_pool2d", "fastinception::max_pool2d_backward"}


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
    torch.library.opcheck(torch.ops.fastinception.max_pool2d_backward, (torch.ones_like(y), *args, indices))


def test_everything_else_is_torchs_own():
    """Indices, three dimensions, inference, double backward in eager mode, export."""
    x = image(torch.contiguous_format)
    _, indices = torch.compile(MaxPool2d(3, return_indices=True), backend="aot_eager")(x)
    assert torch.equal(indices, nn.MaxPool2d(3, return_indices=True)(x)[1])
    y = torch.compile(MaxPool2d(3), fullgraph=True, backend="aot_eager")(x[0])
    torch.testing.assert_close(y, nn.MaxPool2d(3)(x[0]), equal_nan=True)
    clean = x.detach().nan_to_num(0.5).add(torch.rand(x.shape, dtype=x.dtype)).requires_grad_()
    assert torch.autograd.gradgradcheck(MaxPool2d(3, 2, 1), clean)
    exported = torch.export.export(MaxPool2d(3, 2, 1), (torch.randn(1, 2, 6, 6),))
    assert not any("fastinception" in str(node.target) for node in exported.graph.nodes)
    assert MaxPool2d(3).state_dict() == {}


def test_a_compiled_functorch_transform():
    """Which torch 2.11 does not take through an operator of its own."""
    x = torch.rand(2, 3, 8, 8)
    found, expected = (
        torch.compile(torch.func.grad(lambda x, pool=pool: pool(x).square().sum()), backend="aot_eager")(x)
        for pool in (MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1))
    )
    torch.testing.assert_close(found, expected)
