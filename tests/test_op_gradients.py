"""The gradients that the operators give to their users: which, of what, and whatever else is switched on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastinception import ops
from tests.operators import BACKENDS, FORMATS, WIDTHS, assert_same, block, fast, gradients, plain, randn_like

NAMES = ("x", *(f"{conv}.{kind}" for conv in ops._NAMES for kind in ("weight", "bias")))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_gradient(backend, format):
    """Odd sizes, with the ties of a pool behind a ReLU and whole windows of equal pixels."""
    tensors = block((3, 5, 7), (17, 9, (8, 15), (3, 10), 5), format=format)
    with torch.no_grad():
        tensors[0].relu_()
        tensors[0][0, :, :3, :3] = 1.0
    assert_same(gradients(fast(backend), tensors), gradients(plain, tensors))


SUBSETS = [{i} for i in range(13)]
SUBSETS += [set(random.Random(seed).sample(range(13), 2 + seed)) for seed in range(8)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient_gets_one(backend):
    everything = dict(enumerate(gradients(plain, block())))
    for subset in SUBSETS:
        tensors = block()
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in subset)
        y = fast(backend)(*tensors)
        y.backward(randn_like(y))
        for i, tensor in enumerate(tensors):
            if i in subset:
                assert_same([tensor.grad], [everything[i]])
            else:
                assert tensor.grad is None, (NAMES[i], subset)


class Opened(TorchDispatchMode):
    """Show the modes below the operators inside the block's own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastinception":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        return func(*args, **(kwargs or {}))


def test_unneeded_gradients_are_not_computed():
    """A frozen block costs a frozen block's work: at most the products of what was asked for and of what it needs.

    Of ATen; the launches of Triton are counted in test_block.py.
    """
    k, c1, c2, c3, c4 = WIDTHS
    entry = k * (c1 + c2[0] + c3[0])
    spatial2, spatial3, projection = 9 * c2[0] * c2[1], 25 * c3[0] * c3[1], k * c4
    # The products of one pixel for a weight, for a bias and to get there, of each convolution.
    allowed = {"x": entry + spatial2 + spatial3 + projection}
    reach = {"p1_1": 0, "p2_1": spatial2, "p2_2": 0, "p3_1": spatial3, "p3_2": 0, "p4_2": 0}
    weights = {
        "p1_1": entry,
        "p2_1": entry,
        "p2_2": spatial2,
        "p3_1": entry,
        "p3_2": spatial3,
        "p4_2": projection,
    }
    for conv in ops._NAMES:
        allowed[f"{conv}.weight"], allowed[f"{conv}.bias"] = weights[conv] + reach[conv], reach[conv]
    for i, name in enumerate(NAMES):
        tensors = block()
        for j, tensor in enumerate(tensors):
            tensor.requires_grad_(i == j)
        y = fast("aten")(*tensors)
        counter = FlopCounterMode(display=False)
        with counter, Opened():
            y.backward(randn_like(y))
        pixels = y.numel() // y.shape[1]
        assert counter.get_total_flops() <= 2 * pixels * allowed[name], name
        assert name != "x" or counter.get_total_flops() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_two_gradients_share_memory(backend):
    tensors = block()
    grads = gradients(fast(backend), tensors)
    regions = sorted((g.untyped_storage().data_ptr(), g.untyped_storage().nbytes()) for g in grads)
    for (first, size), (second, _) in itertools.pairwise(regions):
        assert first + size <= second
    for grad in grads:
        assert grad.untyped_storage().nbytes() == grad.numel() * grad.itemsize  # and none holds a larger buffer


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_shared_with_another_consumer(backend):
    """An addition hands one tensor to both of its operands."""

    def residual(f: Callable[..., Tensor], shortcut: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        y = f(*tensors) + shortcut
        return list(torch.autograd.grad(y, [shortcut, *tensors], randn_like(y)))

    tensors = block()
    shortcut = randn_like(plain(*tensors), seed=3).requires_grad_()
    assert_same(residual(fast(backend), shortcut, tensors), residual(plain, shortcut, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_may_come_back_with_other_strides(backend):
    tensors = block()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):  # packs into contiguous memory
        y = fast(backend)(*tensors)
    ours = torch.autograd.grad(y, tensors, randn_like(y))
    assert_same(ours, gradients(plain, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated_tensors(backend):
    x, *params = (t.detach() for t in block())
    negated = torch._neg_view(x)
    assert negated.is_neg()
    weights = [torch._neg_view(p) if i == 4 else p for i, p in enumerate(params)]
    assert_same([fast(backend)(negated, *weights)], [plain(-x, *[-p if i == 4 else p for i, p in enumerate(params)])])

    def negating(f: Callable[..., Tensor], place: int) -> Callable[..., Tensor]:
        return lambda *tensors: f(*(torch._neg_view(t) if i == place else t for i, t in enumerate(tensors)))

    tensors = block()
    for place in (0, 3):
        assert_same(gradients(negating(fast(backend), place), tensors), gradients(negating(plain, place), tensors))
    y, expected = fast(backend)(*tensors), plain(*tensors)
    upstream = torch._neg_view(randn_like(y))
    assert_same(torch.autograd.grad(y, tensors, upstream), torch.autograd.grad(expected, tensors, upstream))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradgradcheck(backend):
    """By finite differences; by Triton of an input, weights of both levels and a bias, along one random direction."""
    tensors = block((1, 3, 2), (3, 2, (2, 2), (1, 2), 1))
    grad_out = randn_like(plain(*tensors)).requires_grad_()
    if backend == "triton":
        tensors = [t.detach().requires_grad_(i in {0, 3, 6, 9}) for i, t in enumerate(tensors)]
    assert torch.autograd.gradgradcheck(fast(backend), tensors, grad_out, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", [set(range(13)), {0}, {1, 6}, {0, 3, 11, 12}])
def test_hessian_vector_product(backend, subset):
    """No silent zero: autograd.functional.hvp reads a cut graph as one."""
    tensors = block()
    fixed = [t.detach() for t in tensors]
    inputs = tuple(t for i, t in enumerate(fixed) if i in subset)
    vectors = tuple(randn_like(t, seed=5) for t in inputs)

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def value(*some: Tensor) -> Tensor:
            rest = iter(some)
            y = f(*(next(rest) if i in subset else t for i, t in enumerate(fixed)))
            return (y * y.sin() * randn_like(y)).sum()

        return value

    ours = torch.autograd.functional.hvp(loss(fast(backend)), inputs, vectors)[1]
    assert_same(ours, torch.autograd.functional.hvp(loss(plain), inputs, vectors)[1])
    assert any(bool(v.abs().max() > 0.1) for v in ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_inside_autocast_keeps_its_dtype(backend):
    tensors = block(dtype=torch.float32)
    y = fast(backend)(*tensors)
    expected = gradients(plain, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(y, tensors, randn_like(y))
    assert_same(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_deterministic_mode_fills_what_is_never_written(backend, format):
    """The mode fills new memory with NaN, so that a result that depends on it shows."""
    tensors = block((2, 5, 7), (17, 9, (8, 15), (3, 10), 5), format=format)
    expected = [plain(*tensors), *gradients(plain, tensors)]
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        ours = [fast(backend)(*tensors), *gradients(fast(backend), tensors)]
        with torch.no_grad():
            inference = fast(backend)(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same([*ours, inference], [*expected, expected[0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_dtype_and_device_change_nothing(backend):
    tensors = block(dtype=torch.float32)
    expected = [fast(backend)(*tensors), *gradients(fast(backend), tensors)]
    grad_out = randn_like(expected[0])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            ours = [fast(backend)(*tensors), *gradients(fast(backend), tensors, grad_out)]
            with torch.no_grad():
                ours.append(fast(backend)(*tensors))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(ours, [*expected, expected[0]], strict=True):
        assert a.dtype is torch.float32
        assert a.device == b.device
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("backend", BACKENDS)
def test_anomaly_mode(backend):
    tensors = block()
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same(gradients(fast(backend), tensors), gradients(plain, tensors))
