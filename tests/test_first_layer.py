"""The first convolution by Triton, of images of one channel: its operators, and the Conv2d that calls them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fastinception import Conv2d, FastInception, GoogLeNet, backends
from fastinception.kernels import target
from fastinception.stem import Stage

pytest.importorskip("triton")

from tests import profiled
from tests.poisoned import assert_2x

pytestmark = [
    pytest.mark.skipif(not target.interpreted(), reason="runs in Triton's interpreter, on CPU tensors"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
]
CL = torch.channels_last
operators = functools.partial(profiled.operators, prefix="first_layer")
BOTH = {"first_layer", "first_layer_backward"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)


def pair(kernel: int | tuple[int, int] = 7, stride: int = 2, out_channels: int = 9, **options: Any) -> list[nn.Conv2d]:
    """Return a convolution of our own that asks for Triton, and torch's with the same numbers."""
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    options = {"padding": tuple(side // 2 for side in sides)} | options
    own = Conv2d(1, out_channels, sides, stride, **options)
    own.backend = "triton"
    theirs = nn.Conv2d(1, out_channels, sides, stride, **options)
    theirs.load_state_dict(own.state_dict())
    return [conv.to(memory_format=CL) for conv in (own, theirs)]


def step(run: Callable[[Tensor], Tensor], conv: nn.Conv2d, x: Tensor, of_x: bool = True) -> list[Tensor]:
    """Return the output and the gradients of x, if it is ``of_x``, weight and bias."""
    x = x.detach().requires_grad_(of_x)
    y = run(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [*([x] if of_x else []), conv.weight, conv.bias], grad)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "stride", "shape"),
    [(7, 2, (3, 1, 25, 22)), ((3, 5), 1, (2, 1, 5, 70)), (3, 3, (2, 1, 7, 4)), (7, 2, (1, 1, 1, 2))],
    ids=str,
)
def test_training_is_within_twice_torchs_error(kernel, stride, shape, dtype, compiled):
    x = torch.randn(shape)
    own, theirs = (conv.to(dtype) for conv in pair(kernel, stride))
    run = torch.compile(own, backend="aot_eager", fullgraph=True) if compiled else own
    found, plain = step(run, own, x.to(dtype)), step(theirs, theirs, x.to(dtype))
    truth = step(theirs.double(), theirs, x.to(dtype).double())
    for ours, torchs, right in zip(found, plain, truth, strict=True):
        assert_2x(ours.detach(), torchs.detach(), right.detach())
        assert ours.shape == torchs.shape
        assert ours.dtype is dtype
    assert found[0].is_contiguous(memory_format=CL)
    assert [t.stride() for t in found[2:]] == [t.stride() for t in (own.weight, own.bias)]
    assert operators(lambda: step(run, own, x.to(dtype))) == BOTH


def test_what_needs_a_gradient_gets_it():
    own, theirs = pair()
    x = torch.randn(2, 1, 9, 8)
    for of_x, weight, bias in ((False, True, True), (True, False, False), (False, False, True), (False, True, False)):
        results = []
        for conv in (own, theirs):
            conv.weight.requires_grad_(weight)
            conv.bias.requires_grad_(bias)
            leaf = x.clone().requires_grad_(of_x)
            conv(leaf).square().sum().backward()
            results.append([t.grad for t in (leaf, conv.weight, conv.bias)])
            conv.zero_grad()
        for found, expected, wanted in zip(*results, (of_x, weight, bias), strict=True):
            assert (found is not None) is (expected is not None) is wanted
            if wanted:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_operators_are_as_pytorch_checks_them():
    weight, bias, x = torch.randn(4, 1, 3, 5), torch.randn(4), torch.randn(2, 1, 6, 5)
    forward, backward = torch.ops.fastinception.first_layer, torch.ops.fastinception.first_layer_backward
    # Dynamic shapes are left out: torch 2.11's own second derivative of a convolution does not take them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for format in (CL, torch.contiguous_format):
        grad = torch.randn(2, 4, 3, 3).contiguous(memory_format=format)
        operands = [t.contiguous(memory_format=format) for t in (x, weight)]
        torch.library.opcheck(forward, (*operands, bias, 2))
        torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in (*operands, bias)), 2))
        for needs in itertools.product([False, True], repeat=3):
            torch.library.opcheck(backward, (grad, *operands, 2, list(needs)))
        leaves = [t.clone().requires_grad_() for t in (grad, *operands)]
        torch.library.opcheck(backward, (*leaves, 2, [True] * 3), test_utils=checks)


def test_first_and_second_derivatives():
    conv = pair((3, 5), 2, 3)[0].double()
    x = torch.randn(2, 1, 5, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fastinception.first_layer(x, weight, bias, 2)

    assert torch.autograd.gradcheck(run, (x, conv.weight, conv.bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, conv.weight, conv.bias), fast_mode=True)


def test_the_same_bits_on_two_runs():
    own, _ = pair()
    x = torch.randn(16, 1, 20, 20)
    first, second = (step(own, own, x) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast", "checkpoint", "twice compiled"])
def test_modes(mode):
    own, theirs = pair()
    x = torch.randn(4, 1, 10, 12)
    if mode in ("no_grad", "inference"):
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            assert operators(lambda: own(x)) == {"first_layer"}
            torch.testing.assert_close(own(x), theirs(x))
    elif mode == "autocast":
        with torch.autocast("cpu", torch.float16):
            found = step(own, own, x)
            assert operators(lambda: step(own, own, x)) == BOTH
            expected = step(theirs, theirs, x)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-2, atol=2e-2)
    elif mode == "checkpoint":
        run = functools.partial(torch.utils.checkpoint.checkpoint, own, use_reentrant=False)
        assert all(map(torch.equal, step(run, own, x), step(own, own, x)))
    else:
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(own, backend=counter, fullgraph=True, dynamic=True)
        for n in (4, 2, 3):
            found, expected = (step(f, own, x[:n], of_x=False) for f in (run, own))
            assert all(map(torch.equal, found, expected))
        assert counter.frame_count == 1


class Own(Tensor):
    """A tensor of another class."""


OTHERS: dict[str, Any] = {
    "aten": lambda conv, x: setattr(conv, "backend", "aten"),
    "auto": lambda conv, x: setattr(conv, "backend", "auto"),
    "no bias": lambda conv, x: setattr(conv, "bias", None),
    "nchw": lambda conv, x: conv.to(memory_format=torch.contiguous_format),
    "padding": lambda conv, x: setattr(conv, "padding", (2, 3)),
    "padding by name": lambda conv, x: setattr(conv, "padding", "valid"),
    "circular": lambda conv, x: conv.__init__(1, 9, 7, 2, 3, padding_mode="circular"),
    "dilation": lambda conv, x: setattr(conv, "dilation", (2, 2)),
    "strides": lambda conv, x: setattr(conv, "stride", (2, 1)),
    "9x9": lambda conv, x: conv.__init__(1, 9, 9, 2, 4),
    "even": lambda conv, x: conv.__init__(1, 9, 4, 2, 2),
    "another weight": lambda conv, x: setattr(conv, "weight", nn.Parameter(torch.randn(9, 1, 5, 5))),
    "a weight of more channels": lambda conv, x: setattr(conv, "weight", nn.Parameter(torch.randn(9, 3, 7, 7))),
    "another bias": lambda conv, x: setattr(conv, "bias", nn.Parameter(torch.randn(3))),
    "images of three channels": lambda conv, x: x.expand(2, 3, 12, 10),
    "another device": lambda conv, x: setattr(conv, "bias", nn.Parameter(torch.randn(9, device="meta"))),
    "bfloat16": lambda conv, x: conv.bfloat16() and x.bfloat16(),
    "three channels": lambda conv, x: conv.__init__(3, 9, 7, 2, 3),
    "subclass": lambda conv, x: x.as_subclass(Own),
    "two tensors": lambda conv, x: TwoTensor(x, x.clone()),
    "double": lambda conv, x: x.double(),
    "no batch": lambda conv, x: x[0],
    "empty": lambda conv, x: x[:0],
    "meta": lambda conv, x: conv.to("meta") and x.to("meta"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_the_kernels_do_not_serve_is_torchs_own(kind):
    conv, _ = pair()
    x = torch.randn(2, 3 if kind == "three channels" else 1, 12, 10)
    changed = OTHERS[kind](conv, x)
    x = changed if isinstance(changed, Tensor) else x
    if kind != "nchw":  # another weight, too, is as the network's are
        conv.to(memory_format=CL)
    if kind not in ("aten", "auto"):
        conv.backend = "triton"

    def outcome(run: Callable[[Tensor], Tensor]) -> Any:
        try:
            return run(x)
        except (RuntimeError, NotImplementedError) as error:
            return str(error)

    found, expected = (outcome(run) for run in (conv, functools.partial(nn.Conv2d.forward, conv)))
    assert type(found) is type(expected)
    if isinstance(found, str) or x.is_meta:
        assert found == expected if isinstance(found, str) else found.shape == expected.shape
    elif kind == "two tensors":
        assert torch.equal(found.a, expected.a)
    elif kind != "another device":  # of which torch reads what is no memory
        assert torch.equal(found, expected)
    assert operators(lambda: outcome(conv)) == set()


def test_a_gpu_without_products_and_too_many_pixels_are_left_to_torch(monkeypatch):
    conv, _ = pair()
    x = torch.randn(2, 1, 12, 10)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_MOST_PIXELS", 2 * 12 * 10 - 1)
        assert operators(lambda: conv(x)) == set()
    monkeypatch.setattr(target, "without_products", lambda device: "it has none")
    assert operators(lambda: conv(x)) == set()


def test_transforms_and_exports_get_torchs_operator():
    own, theirs = pair()
    x = torch.randn(3, 1, 8, 8)
    batched = torch.vmap(own)(x[:, None])
    torch.testing.assert_close(batched, torch.vmap(theirs)(x[:, None]))
    for strict in (False, True):
        exported = torch.export.export(own, (x,), strict=strict)
        assert "fastinception" not in str(exported.graph)
    with FlopCounterMode(display=False) as counter:
        own(x)
    assert counter.get_total_flops() == 2 * 3 * 9 * 16 * 49
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(conv(dual)).tangent for conv in (own, theirs)]
    torch.testing.assert_close(*tangents)
    tangents = []
    for conv in (own, theirs):
        y = conv(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), y.detach())
            (grad,) = torch.autograd.grad(y, conv.weight, dual)
            tangents.append(torch.autograd.forward_ad.unpack_dual(grad).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)


def test_strides_of_any_kind():
    """One of several channels, every second pixel, a bias that is a column."""
    own, theirs = pair()
    images, bias = torch.randn(2, 3, 12, 20).to(memory_format=CL), torch.randn(9, 2)
    for conv in (own, theirs):
        conv.bias = nn.Parameter(bias[:, 1])
    for x in (images[:, 1:2], images[:, :1, :, ::2], images[:, :1].transpose(2, 3)):
        for found, expected in zip(step(own, own, x), step(theirs, theirs, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert operators(lambda x=x: own(x)) == {"first_layer"}


def test_an_empty_batch_and_a_changed_shape_reach_no_kernel():
    conv, _ = pair()
    y = torch.ops.fastinception.first_layer(torch.empty(0, 1, 8, 8), conv.weight, conv.bias, 2)
    assert y.shape == (0, 9, 4, 4)
    y.sum().backward()
    assert not conv.weight.grad.any()
    assert not conv.bias.grad.any()
    x = torch.randn(2, 1, 8, 8)
    y = conv(x)
    x.data = torch.randn(2, 1, 4, 4)
    with pytest.raises(RuntimeError, match="another shape or dtype in the backward than in the forward"):
        y.sum().backward()


def test_the_network_trains_by_it():
    """In NCHW it does not: there the result would have another layout."""
    stage, x = GoogLeNet(block=functools.partial(FastInception, backend="triton"))[0], torch.randn(2, 1, 33, 33)
    for format, expected in ((torch.contiguous_format, set()), (CL, BOTH)):
        stage.to(memory_format=format)
        assert operators(lambda: stage(x).sum().backward()) == expected


def test_a_stage_with_another_pool_convolves_by_its_backend():
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    for backend, expected in (("triton", {"first_layer"}), ("aten", set())):
        stage = Stage(*layers, backend=backend).to(memory_format=CL)
        assert operators(lambda stage=stage: stage(torch.randn(2, 1, 8, 8))) == expected


@pytest.mark.parametrize("value", ["aten", "auto", "triton", ""])
def test_the_environment_chooses_the_backend(value, monkeypatch):
    monkeypatch.setenv("FASTINCEPTION_BACKEND", value)
    assert Conv2d(1, 1, 1).backend == (value or "auto")
