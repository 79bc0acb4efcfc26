"""The registered operators: what torch.library asks of them, their strides, and the graphs that hold them."""

from __future__ import annotations

import gc
import importlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastinception import custom_op
from tests import profiled
from tests.operators import (
    BACKENDS,
    BACKWARD,
    FORMATS,
    FORWARD,
    HAS_TRITON,
    ONE,
    assert_same,
    block,
    fast,
    gradients,
    plain,
    randn_like,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_forward(backend, format, grad):
    torch.library.opcheck(FORWARD[backend], block(format=format, grad=grad))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("relu", [True, False])
def test_opcheck_inference(format, relu):
    torch.library.opcheck(torch.ops.fastinception.triton_inference, (*block(format=format, grad=False), relu))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("needs", [[True] * 13, [i % 3 == 0 for i in range(13)]])
def test_opcheck_backward(backend, format, needs):
    # Without requires_grad: torch 2.11's own _convolution_double_backward cannot trace symbolic shapes.
    tensors = block(format=format, grad=False)
    y, *saved = FORWARD[backend](*tensors)
    torch.library.opcheck(BACKWARD[backend], (randn_like(y), *tensors, *saved, needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_out(backend, format):
    tensors = block(format=format, grad=False)
    out = torch.empty_like(plain(*tensors))
    torch.library.opcheck(torch.ops.fastinception.inception_out, (*tensors, backend, out))


def test_only_triton_comes_without_relu():
    tensors = block(grad=False)
    out = torch.empty_like(plain(*tensors))
    with pytest.raises(ValueError, match="only Triton"):
        torch.ops.fastinception.inception_out(*tensors, "aten", out, False)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here")
def test_what_keeps_nothing_has_no_backward():
    y = torch.ops.fastinception.triton_inference(*block(), True)
    with pytest.raises(RuntimeError, match="triton_forward was expected"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
def test_what_records_no_gradient_is_dispatched_once(backend, grad):
    tensors = block()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.set_grad_enabled(grad), torch.profiler.profile(activities=activities, acc_events=True) as profile:
        FORWARD[backend](*tensors)
    names = [event.name for event in profile.events()]
    assert names.count(f"fastinception::{backend}_forward") == (2 if grad else 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reload_keeps_the_derivatives(backend):
    importlib.reload(custom_op)
    gc.collect()
    y, *_ = FORWARD[backend](*block())
    assert y.requires_grad


def awkward() -> Iterator[object]:
    def case(id: str, change: Callable[[list[Tensor]], None], **kwargs: object) -> object:
        return pytest.param(kwargs, change, id=id)

    def nothing(tensors: list[Tensor]) -> None:
        return None

    def x(f: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
        def change(tensors: list[Tensor]) -> None:
            tensors[0] = f(tensors[0])

        return change

    def weights(f: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
        def change(tensors: list[Tensor]) -> None:
            tensors[1::2] = [f(weight) for weight in tensors[1::2]]
            tensors[2::2] = [torch.stack((bias, bias), 1)[:, 0] for bias in tensors[2::2]]

        return change

    def five_of_ten(t: Tensor, format: torch.memory_format) -> Tensor:
        return torch.cat((t, t), 1).contiguous(memory_format=format)[:, 3:8]

    for format in FORMATS:
        name = str(format).removeprefix("torch.")
        yield case(f"one channel, {name}", nothing, widths=ONE, format=format)
        yield case(f"one pixel, {name}", nothing, shape=(2, 1, 1), format=format)
        yield case(f"one image, {name}", nothing, shape=(1, 4, 3), format=format)
        yield case(f"one row, {name}", nothing, shape=(1, 1, 3), format=format)
        yield case(f"one of everything, {name}", nothing, shape=(1, 1, 1), widths=ONE, format=format)
        yield case(f"sliced channels, {name}", x(partial(five_of_ten, format=format)), format=format)
        yield case(f"cropped, {name}", x(lambda t: t[:, :, 1:, :-1]), format=format)
        yield case(f"every second image, {name}", x(lambda t: t[::2]), shape=(4, 3, 4), format=format)
    yield case("expanded images", x(lambda t: t[:1].expand(3, -1, -1, -1)))
    yield case("expanded channels", x(lambda t: t[:, :1].expand(-1, 5, -1, -1)))
    yield case("expanded pixels", x(lambda t: t[:, :, :1, :1].expand(-1, -1, 3, 3)))
    yield case("height and width swapped", x(lambda t: t.mT))
    yield case("channels and width swapped", x(lambda t: t.transpose(1, 3)), shape=(2, 3, 5))
    yield case("strange strides of size 1", x(lambda t: t.as_strided(t.shape, (7, 1, 99, 1))), shape=(1, 1, 5))
    yield case("expanded weights", weights(lambda t: t[:1].expand(t.shape)))
    yield case("channels_last weights", weights(lambda t: t.contiguous(memory_format=torch.channels_last)))
    yield case("HWIO weights", weights(lambda t: t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)))
    yield case("sliced weights", weights(lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kwargs", "change"), list(awkward()))
def test_strides_are_the_fakes_and_values_are_right(backend, kwargs, change):
    tensors = block(**kwargs, grad=False)
    change(tensors)
    real = FORWARD[backend](*tensors)
    y, *saved = real
    grad_out = randn_like(y)
    real_grads = BACKWARD[backend](grad_out, *tensors, *saved, [True] * 13)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*tensors, grad_out)]
        fake = FORWARD[backend](*fakes[:13])
        fake_grads = BACKWARD[backend](fakes[13], *fakes[:13], *fake[1:], [True] * 13)
    for a, b in zip((*real, *real_grads), (*fake, *fake_grads), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    assert_same([y], [plain(*tensors)])
    leaves = [t.detach().requires_grad_() for t in tensors]
    assert_same(real_grads, gradients(plain, leaves, grad_out))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_results_keep_the_format_of_what_they_belong_to(backend, format):
    tensors = [t.detach().contiguous(memory_format=format).requires_grad_() if t.dim() == 4 else t for t in block()]
    assert fast(backend)(*tensors).is_contiguous(memory_format=format)
    # Not .grad: to accumulate one, autograd copies a gradient of other strides.
    for tensor, grad in zip(tensors, gradients(fast(backend), tensors), strict=True):
        assert grad.stride() == tensor.stride()


def test_the_memory_format_is_the_one_that_pytorch_suggests():
    chosen, found = random.Random(0), set()
    for _ in range(5000):
        size = [chosen.choice((0, 1, 2, 3, 5)) for _ in range(4)]
        format = chosen.choice((torch.channels_last, torch.contiguous_format))
        strides = list(torch.empty(size, device="meta").contiguous(memory_format=format).stride())
        strides[chosen.randrange(4)] *= chosen.choice((0, 1, 1, 2))
        t = torch.empty_strided(size, strides, device="meta")
        expected = torch._prims_common.suggest_memory_format(t)
        assert custom_op.memory_format(t) is expected, (size, strides)
        found.add(expected)
    assert len(found) == 2


def below_a_convolution(f: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return a network whose gradient goes on past the block, and has a path beside it."""
    own, *params = tensors
    hidden = torch.nn.functional.conv2d(x, own.new_ones(own.shape[1], 1, 1, 1))
    return x.sin() + f(hidden, *params).square().mean(1, keepdim=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second", [False, True])
def test_a_graph_of_make_fx_has_the_gradients(backend, second):
    """The operators in it keep their derivatives, of the backward's, too."""
    tensors = block()
    x = randn_like(tensors[0][:, :1]).requires_grad_()

    def run(f: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = below_a_convolution(f, x, tensors)
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0] if second else y

    graph = make_fx(partial(run, fast(backend)))(x)
    results = [run(plain, x), graph(x)]
    assert_same([results[1]], [results[0]])
    wanted = [x, *tensors[1:]]
    assert_same(*(torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in results[::-1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpoints_know_the_operator(backend):
    tensors = block()
    saved = partial(create_selective_checkpoint_contexts, [FORWARD[backend].default])
    y = checkpoint(fast(backend), *tensors, use_reentrant=False, context_fn=saved)
    with profiled.Operators() as ran:
        grads = torch.autograd.grad(y, tensors, randn_like(y))
    assert ran.names.count(f"fastinception.{backend}_forward.default") == 0
    assert ran.names.count(f"fastinception.{backend}_backward.default") == 1
    assert_same(grads, gradients(plain, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_operator_called_inside_autocast_keeps_its_dtype(backend):
    tensors = block(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, *_ = FORWARD[backend](*tensors)
    grads = torch.autograd.grad(y, tensors, randn_like(y))
    assert_same([y, *grads], [plain(*tensors), *gradients(plain, tensors)], rtol=1e-4, atol=1e-4)
