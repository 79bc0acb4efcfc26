"""The registered operators: what torch.library asks of them, and the gradients they give to their users."""

from __future__ import annotations

import gc
import importlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fastinception import custom_op, ops
from fastinception.functional import inception
from fastinception.kernels import target

HAS_TRITON = target.unsupported(torch.device("cpu"), torch.float32) is None
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here"))
BACKENDS = ("aten", TRITON)
FORMATS = (torch.channels_last, torch.contiguous_format)
WIDTHS = (5, 3, (4, 6), (2, 3), 2)
NAMES = ("x", *(f"{conv}.{kind}" for conv in ops._NAMES for kind in ("weight", "bias")))
FORWARD = {backend: getattr(torch.ops.fastinception, f"{backend}_forward") for backend in ("aten", "triton")}
BACKWARD = {backend: getattr(torch.ops.fastinception, f"{backend}_backward") for backend in ("aten", "triton")}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")


def block(
    shape: tuple[int, int, int] = (2, 4, 3),
    widths: tuple[int, int, tuple[int, int], tuple[int, int], int] = WIDTHS,
    *,
    format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
    seed: int = 0,
) -> list[Tensor]:
    """Return x ``[N, K, H, W]`` and the twelve parameters, leaves."""
    k, c1, c2, c3, c4 = widths
    n, h, w = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [randn(n, k, h, w).contiguous(memory_format=format)]
    for o, i, size in (
        (c1, k, 1),
        (c2[0], k, 1),
        (c2[1], c2[0], 3),
        (c3[0], k, 1),
        (c3[1], c3[0], 5),
        (c4, k, 1),
    ):
        tensors += [randn(o, i, size, size), randn(o)]
    return [t.requires_grad_(grad) for t in tensors]


def randn_like(y: Tensor, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def plain(x: Tensor, *params: Tensor) -> Tensor:
    """Return the block as the textbook writes it."""
    f, relu = torch.nn.functional, torch.nn.functional.relu
    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = params
    p1 = relu(f.conv2d(x, w1, b1))
    p2 = relu(f.conv2d(relu(f.conv2d(x, w21, b21)), w22, b22, padding=1))
    p3 = relu(f.conv2d(relu(f.conv2d(x, w31, b31)), w32, b32, padding=2))
    p4 = relu(f.conv2d(f.max_pool2d(x, 3, 1, 1), w42, b42))
    return torch.cat((p1, p2, p3, p4), 1)


def fast(backend: str) -> Callable[..., Tensor]:
    return lambda x, *params: inception(x, params, backend=backend)


def gradients(f: Callable[..., Tensor], tensors: Sequence[Tensor], grad_out: Tensor | None = None) -> list[Tensor]:
    y = f(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    return list(torch.autograd.grad(y, wanted, randn_like(y) if grad_out is None else grad_out))


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], **tolerance: float) -> None:
    """Check float64 results against each other; far from any error but a rounding."""
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-10}
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, **tolerance, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


# torch.library's own checks


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


# Strides of the fake and of the real results

ONE = (1, 1, (1, 1), (1, 1), 1)


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


# First derivatives


def test_gradcheck_aten():
    assert torch.autograd.gradcheck(fast("aten"), block((1, 3, 2)))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here")
def test_gradcheck_triton():
    # Fast mode, random projections of the Jacobian: two launches for each input instead of two for each of 500 numbers.
    assert torch.autograd.gradcheck(fast("triton"), block((1, 3, 2)), fast_mode=True)


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


class Named(TorchDispatchMode):
    """List the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


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


# Upstream gradients


def upstreams(y: Tensor) -> dict[str, Tensor]:
    n, c, h, w = y.shape
    wide = randn_like(torch.empty(n, 2 * c + 1, h, w, dtype=y.dtype))
    return {
        "one number": randn_like(y[0, 0, 0, 0]).expand(y.shape),
        "one for each channel": randn_like(y[:, :, :1, :1]).expand(y.shape),
        "one for each image": randn_like(y[:, :1, :1, :1]).expand(y.shape),
        "slice of a concatenation": wide[:, 1 : c + 1],
        "slice of a channels_last one": wide.contiguous(memory_format=torch.channels_last)[:, c + 1 :],
        "permuted": randn_like(torch.empty(w, h, c, n, dtype=y.dtype)).permute(3, 2, 1, 0),
        "stepped": randn_like(torch.empty(n, c, 2 * h, 2 * w, dtype=y.dtype))[:, :, ::2, 1::2],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(upstreams(torch.empty(1, 1, 1, 1))))
@pytest.mark.parametrize("format", FORMATS)
def test_upstream_gradients_of_any_strides_are_only_read(backend, name, format):
    tensors = block(format=format)
    expected_y = plain(*tensors)
    grad_out = upstreams(expected_y)[name]
    before = grad_out.clone()
    assert_same(gradients(fast(backend), tensors, grad_out), gradients(plain, tensors, grad_out))
    assert torch.equal(grad_out, before)


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
def test_relu_backward_chooses(backend):
    """The gradient passes where the output is NaN, and an infinite one that is blocked is 0, not NaN."""
    tensors = block((1, 3, 3), ONE)
    with torch.no_grad():
        tensors[0][0, 0, 0, 0] = float("nan")
        for weight, bias in zip(tensors[1::2], tensors[2::2], strict=True):
            weight.fill_(1.0)
            bias.fill_(0.0)
        tensors[0][0, 0, 2] = -1.0  # blocked in branch 1
    y = plain(*tensors)
    assert bool(y.isnan().any())
    assert bool((y == 0).any())
    grad_out = torch.where(y == 0, float("inf"), 1.0)
    assert_same(gradients(fast(backend), tensors, grad_out), gradients(plain, tensors, grad_out))


# Second derivatives


def test_gradgradcheck_aten():
    tensors = block((1, 3, 2), (3, 2, (2, 2), (1, 2), 1))
    grad_out = randn_like(plain(*tensors)).requires_grad_()
    assert torch.autograd.gradgradcheck(fast("aten"), tensors, grad_out)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here")
def test_gradgradcheck_triton():
    """By finite differences, of an input, weights of both levels and a bias; of all of them in test_transforms."""
    tensors = [
        t.detach().requires_grad_(i in {0, 3, 6, 9}) for i, t in enumerate(block((1, 3, 2), (3, 2, (2, 2), (1, 2), 1)))
    ]
    grad_out = randn_like(plain(*tensors)).requires_grad_()
    assert torch.autograd.gradgradcheck(fast("triton"), tensors, grad_out, fast_mode=True)


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
def test_gradient_penalty_and_third_derivative(backend):
    def derivatives(f: Callable[..., Tensor]) -> list[Tensor]:
        x, *params = block()
        y = (f(x, *params) ** 3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        second = torch.autograd.grad((first**2).sum(), [x, params[0], params[4]], create_graph=True)
        third = torch.autograd.grad(sum((g**2).sum() for g in second), [x, *params], allow_unused=True)
        return [first, *second, *third]

    ours, theirs = derivatives(fast(backend)), derivatives(plain)
    for a, b in zip(ours, theirs, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * scale)


# Transforms


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_upstream_gradients(backend):
    """vmap over the backward, as jacobian(vectorize=True) and is_grads_batched do."""
    x, *params = block((1, 3, 2))
    y = fast(backend)(x, *params)
    batch = torch.stack([randn_like(y, seed) for seed in range(3)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        batched = torch.autograd.grad(y, [x, *params], batch, is_grads_batched=True, retain_graph=True)
        mapped = torch.func.vmap(lambda grad: torch.autograd.grad(y, [x, *params], grad, retain_graph=True))(batch)
    singles = [gradients(plain, [x, *params], grad) for grad in batch]
    expected = [torch.stack(grads) for grads in zip(*singles, strict=True)]
    assert_same(batched, expected)
    assert_same(mapped, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_and_forward_mode(backend):
    tensors = [t.detach() for t in block()]
    x, *params = tensors
    tangents = tuple(randn_like(t, seed=2) for t in tensors)
    samples = torch.stack([x, 2 * x, -x])
    ours = torch.func.vmap(fast(backend), in_dims=(0, *[None] * 12))(samples, *params)
    assert_same([ours], [torch.stack([plain(sample, *params) for sample in samples])])
    ours, theirs = (torch.func.jvp(f, tuple(tensors), tangents)[1] for f in (fast(backend), plain))
    assert_same([ours], [theirs])
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
        ours, theirs = (torch.autograd.forward_ad.unpack_dual(f(dual, *params)).tangent for f in (fast(backend), plain))
        assert_same([ours], [theirs])
    both = [
        torch.func.grad(lambda *t, f=f: f(*t).sin().sum(), argnums=tuple(range(13)))(*tensors)
        for f in (fast(backend), plain)
    ]
    assert_same(*both)


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
    with Named() as ran:
        grads = torch.autograd.grad(y, tensors, randn_like(y))
    assert ran.names.count(f"fastinception::{backend}_forward") == 0
    assert ran.names.count(f"fastinception::{backend}_backward") == 1
    assert_same(grads, gradients(plain, tensors))


# In-place changes between forward and backward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda y: y.add_(1.0), id="add_"),
        pytest.param(lambda y: torch.nn.functional.relu_(y.sub_(0.5)), id="relu_"),
        pytest.param(lambda y: y.mul_(-1.0), id="mul_"),
    ],
)
def test_output_may_be_changed_before_backward(backend, change):
    tensors = block()
    assert_same(*(gradients(lambda *t, f=f: change(f(*t)), tensors) for f in (fast(backend), plain)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", [i for i in range(13) if i % 2 or i == 0])
def test_inputs_may_not_be_changed_before_backward(backend, i):
    tensors = block()
    y = fast(backend)(*tensors)
    with torch.no_grad():
        tensors[i].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(randn_like(y))


# Repeatability, and state around a call


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend):
    tensors = block((3, 5, 7), (17, 9, (8, 15), (3, 10), 5), dtype=torch.float32)
    runs = [[fast(backend)(*tensors), *gradients(fast(backend), tensors)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


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


# out=


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out_format", FORMATS)
def test_out_is_filled_whatever_its_format(backend, format, out_format):
    tensors = block(format=format, grad=False)
    expected = plain(*tensors)
    storage = torch.full((expected.numel() + 20,), float("nan"), dtype=torch.float64)
    strides = torch.empty_like(expected, memory_format=out_format).stride()
    out = storage.as_strided(expected.shape, strides, 10)
    assert inception(tensors[0], tensors[1:], backend=backend, out=out) is out
    assert_same([out], [expected])
    assert bool(storage[:10].isnan().all())
    assert bool(storage[-10:].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_must_not_overlap_an_input(backend):
    tensors = block(widths=(14, 3, (4, 6), (2, 3), 2), grad=False)
    size = tensors[0].numel()
    storage = torch.zeros(2 * size, dtype=torch.float64)
    x = storage.as_strided(tensors[0].shape, tensors[0].stride(), 0).copy_(tensors[0])
    strides = torch.empty_like(plain(*tensors), memory_format=torch.channels_last).stride()
    expected = plain(*tensors)
    for offset in (0, 1, size - 1):
        before = storage.clone()
        out = storage.as_strided(expected.shape, strides, offset)
        with pytest.raises(ValueError, match="must not share memory"):
            inception(x, tensors[1:], backend=backend, out=out)
        assert torch.equal(storage, before)
    touching = storage.as_strided(expected.shape, strides, size)
    assert_same([inception(x, tensors[1:], backend=backend, out=touching)], [expected])


# What skipping the dispatcher must not skip


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


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here")
def test_what_keeps_nothing_has_no_backward():
    y = torch.ops.fastinception.triton_inference(*block(), True)
    with pytest.raises(RuntimeError, match="triton_forward was expected"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_inside_autocast_keeps_its_dtype(backend):
    tensors = block(dtype=torch.float32)
    y = fast(backend)(*tensors)
    expected = gradients(plain, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(y, tensors, randn_like(y))
    assert_same(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_operator_called_inside_autocast_keeps_its_dtype(backend):
    tensors = block(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, *_ = FORWARD[backend](*tensors)
    grads = torch.autograd.grad(y, tensors, randn_like(y))
    assert_same([y, *grads], [plain(*tensors), *gradients(plain, tensors)], rtol=1e-4, atol=1e-4)


def test_only_triton_comes_without_relu():
    tensors = block(grad=False)
    out = torch.empty_like(plain(*tensors))
    with pytest.raises(ValueError, match="only Triton"):
        torch.ops.fastinception.inception_out(*tensors, "aten", out, False)


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
