"""The max pool by Triton where it trains: PyTorch's values and, rounding aside, gradients, by a byte a maximum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastinception import MaxPool2d, pool_relu
from fastinception.kernels import target

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="runs in Triton's interpreter, on CPU tensors")
CL = torch.channels_last
OPERATOR, BACKWARD = torch.ops.fastinception.max_pool_relu, torch.ops.fastinception.max_pool_relu_backward
SIZES = [(1, 1), (1, 2), (2, 1), (7, 8), (12, 12), (9, 3)]
BEFORE = ["nothing", "relu", "bias"]  # in front of the pool
DTYPES = [torch.float16, torch.float32, torch.float64]


def integers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return small integers, of which every sum here is exact, and many of a window are equal."""
    return torch.randint(-3, 4, shape).to(dtype)


def operands(before: str, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None, bool]:
    """Return what the operator takes."""
    x = integers(*shape, dtype=dtype).contiguous(memory_format=CL).requires_grad_()
    bias = integers(shape[1], dtype=dtype).requires_grad_() if before == "bias" else None
    return x, bias, before != "nothing"


def by_layers(x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Return what PyTorch's operators do, one after another."""
    x = x if bias is None else x + bias.view(-1, 1, 1)
    return F.max_pool2d(F.relu(x) if relu else x, 3, 2, 1)


def gradients(run: Any, x: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, ...]:
    """Return the result and its gradients, by a random gradient of small integers."""
    y = run(x, bias, relu)
    upstream = torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, *torch.autograd.grad(y, [x] if bias is None else [x, bias], upstream)


def launched(x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return pool_relu.launch(x, bias, relu=relu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [3, 130])
@pytest.mark.parametrize("before", BEFORE)
def test_values_and_gradients_are_those_of_the_layers(before, channels, size, dtype):
    """With ties in most windows, infinities and NaN."""
    torch.manual_seed(0)
    args = operands(before, 3, channels, *size, dtype=dtype)
    with torch.no_grad():
        args[0][0, :, -1, -1], args[0][1, :, 0, 0], args[0][2, :, 0, -1] = torch.nan, torch.inf, -torch.inf
        args[0][2, 1] = -torch.inf
    found, expected = gradients(launched, *args), gradients(by_layers, *args)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert ours.dim() == 1 or ours.is_contiguous(memory_format=CL)
    assert found[0].grad_fn is not None


@pytest.mark.parametrize("before", BEFORE)
def test_many_programs_sum_the_biass_gradient(before, monkeypatch):
    """Several tiles of pixels and of channels, and several steps of a program."""
    from fastinception.kernels import configs

    torch.manual_seed(0)
    args = operands(before, 5, 40, 13, 11)
    expected = gradients(by_layers, *args)
    for processors in (None, 1, 2):  # 8 programs for each
        monkeypatch.setattr(configs, "_INTERPRETED", {configs.POOL: configs.Sweep(16, 16, num_warps=4)})
        monkeypatch.setattr(target, "gpu", lambda device, n=processors: target.Gpu("cpu", "cpu", n))
        configs.forget()
        for ours, theirs in zip(gradients(launched, *args), expected, strict=True):
            assert torch.equal(ours, theirs)
    configs.forget()


@pytest.mark.parametrize("before", BEFORE)
def test_gradients_of_gradients(before):
    torch.manual_seed(0)
    x, bias, relu = operands(before, 1, 2, 4, 3)
    with torch.no_grad():
        x.add_(torch.rand_like(x))  # no ties, which differences of both sides would tell apart
        x[:, 1] -= 9  # a ReLU that lets nothing through
    inputs = [x] if bias is None else [x, bias]
    assert torch.autograd.gradcheck(lambda x, bias=None: launched(x, bias, relu), inputs)
    assert torch.autograd.gradgradcheck(lambda x, bias=None: launched(x, bias, relu), inputs)


@pytest.mark.parametrize("before", BEFORE)
def test_opcheck(before):
    args = operands(before, 2, 3, 5, 6)
    torch.library.opcheck(OPERATOR, args)
    y, codes = OPERATOR(*args)
    grad = torch.randn_like(y).requires_grad_()
    for needs in ([True, False], [False, True], [True, True]):
        torch.library.opcheck(BACKWARD, (grad, codes, 5, 6, needs))


@pytest.mark.parametrize("wanted", ["x", "bias", "both", "result"])
def test_only_what_is_asked_for_is_returned(wanted):
    torch.manual_seed(0)
    x, bias, relu = operands("bias", 2, 3, 5, 6)
    assert bias is not None
    x.requires_grad_(wanted in ("x", "both"))
    bias.requires_grad_(wanted in ("bias", "both"))
    inputs = [t for t in (x, bias) if t.requires_grad]
    if not inputs:
        assert launched(x, bias, relu).grad_fn is None
        return
    results = [torch.autograd.grad(run(x, bias, relu).square().sum(), inputs) for run in (launched, by_layers)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_of_any_strides_and_what_was_saved_elsewhere():
    """An expanded gradient, and codes that a hook brings back in another format."""
    x, _, relu = operands("relu", 2, 3, 6, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        found = torch.autograd.grad(launched(x, None, relu).sum(), x)
    assert torch.equal(*found, *torch.autograd.grad(by_layers(x, None, relu).sum(), x))


def test_the_largest_before_the_bias_gets_the_gradient():
    """Where the sums are rounded to one number, whose first PyTorch takes."""
    x = torch.tensor([0.25, 0.5], dtype=torch.float16).view(1, 1, 1, 2).contiguous(memory_format=CL).requires_grad_()
    bias = torch.tensor([2048.0], dtype=torch.float16)
    ours, theirs = (torch.autograd.grad(run(x, bias, True).sum(), x)[0].tolist() for run in (launched, by_layers))
    assert (ours, theirs) == ([[[[0.0, 1.0]]]], [[[[1.0, 0.0]]]])


def test_a_bias_without_a_relu():
    x, bias, _ = operands("bias", 2, 3, 6, 6)
    for ours, theirs in zip(gradients(launched, x, bias, False), gradients(by_layers, x, bias, False), strict=True):
        assert torch.equal(ours, theirs)


def test_what_changed_its_shape_is_refused():
    y, codes = OPERATOR(*operands("relu", 2, 3, 6, 6))
    for args in ((y[:1], codes, 6, 6), (y, codes[:, :2], 6, 6), (y, codes, 7, 6), (y, codes, 6, 4)):
        with pytest.raises(RuntimeError, match="another shape"):
            BACKWARD(*args, [True, False])


def test_a_pool_of_its_own_trains_by_the_operator():
    pool = MaxPool2d(3, 2, 1)
    pool.backend = "triton"
    x, _, _ = operands("nothing", 2, 3, 6, 6)
    y = pool(x)
    assert "max_pool_relu" in type(y.grad_fn).__name__
    assert torch.equal(*torch.autograd.grad(y.sum(), x), *torch.autograd.grad(by_layers(x, None, False).sum(), x))
    assert "max_pool_relu" not in type(pool(x.detach().contiguous().requires_grad_()).grad_fn).__name__


def test_what_is_kept_is_a_byte_for_each_maximum():
    x, bias, relu = operands("bias", 2, 8, 6, 6, dtype=torch.float16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = launched(x, bias, relu)
    assert sum(t.nbytes for t in kept) == y.numel()
