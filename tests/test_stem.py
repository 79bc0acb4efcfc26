"""The stem's stages, which pass a pool in parts of the batch on a CPU, against their layers one after another."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastinception import Conv2d, FastInception, GoogLeNet, Inception, MaxPool2d, backends, conv_backward, stem
from fastinception.stem import Stage
from tests import profiled

CL = torch.channels_last
operators = functools.partial(profiled.operators, prefix="conv_pool_relu")
FORMATS = torch.contiguous_format, CL
BATCH, IMAGES = 13, 4  # of which one part is


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """Take every batch of :func:`stage` in parts of 4 images, whatever these cores and this malloc do best."""
    torch.compiler.reset()
    monkeypatch.setattr(stem, "_KEPT", 0)
    monkeypatch.setattr(stem, "BLOCKED_PAYS", False)


def integers(*shape: int, high: int = 4) -> Tensor:
    """Return small integers: every sum of their products is exact in float32."""
    return torch.randint(-high, high + 1, shape).float()


def stage(which: int, monkeypatch, channels: int = 3, height: int = 25, width: int = 22) -> tuple[Stage, Tensor]:
    """Return the first or the second stage, of small integers, and images of it."""
    torch.manual_seed(0)
    own = GoogLeNet(block=FastInception, in_channels=channels)[which]
    with torch.no_grad():
        for p in own.parameters():
            p.copy_(integers(*p.shape, high=1))
    x = integers(BATCH, (channels, 64)[which], height, width)
    last = own[-3]
    pixels = -(-height // last.stride[0]) * -(-width // last.stride[0])
    monkeypatch.setattr(stem, "_PART", IMAGES * last.out_channels * pixels * 4)
    return own, x


def layers(own: Stage) -> nn.Sequential:
    return nn.Sequential(*own)


def results(run, x: Tensor, params) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = run(x)
    torch.manual_seed(1)
    grad = torch.randint_like(y, -3, 4)
    return [y, *torch.autograd.grad(y, [x, *params], grad)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_inference_is_that_of_the_layers(which, format, blocked, mode, monkeypatch):
    monkeypatch.setattr(stem, "BLOCKED_PAYS", blocked)
    for channels, height, width in ((1, 25, 22), (3, 8, 9), (4, 1, 2), (5, 12, 12)):
        own, x = stage(which, monkeypatch, channels, height, width)
        own, x = own.to(memory_format=format), x.contiguous(memory_format=format)
        with mode():
            assert operators(lambda own=own, x=x: own(x)) == {"conv_pool_relu"}
            found, expected = own(x), layers(own)(x)
        assert torch.equal(found, expected)
        assert found[0, 0].numel() == 1 or found.stride() == expected.stride()  # one pixel has any


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_training_is_that_of_the_layers(which, format, compiled, monkeypatch):
    own, x = stage(which, monkeypatch)
    own, x = own.to(memory_format=format), x.contiguous(memory_format=format)
    run = torch.compile(own, fullgraph=True, backend="aot_eager") if compiled else own
    params = list(own.parameters())
    found, expected = results(run, x, params), results(layers(own), x, params)
    assert len(operators(lambda: results(run, x, params))) == 2
    assert all(map(torch.equal, found, expected))
    assert found[0].stride() == expected[0].stride()
    assert [t.stride() for t in found[1:]] == [t.stride() for t in (x, *params)]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_other_kernels_and_strides(kernel, stride, monkeypatch):
    """Those whose gradients are products of matrices where the stride is 1."""
    monkeypatch.setattr(conv_backward, "COLUMNS_PAY", True)
    own = Stage(nn.Conv2d(16, 17, kernel, stride, kernel // 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).to(memory_format=CL)
    with torch.no_grad():
        for p in own.parameters():
            p.copy_(integers(*p.shape))
    x, params = integers(16, 16, 9, 8).contiguous(memory_format=CL), list(own.parameters())
    assert operators(lambda: own(x))
    assert all(map(torch.equal, results(own, x, params), results(layers(own), x, params)))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_part_is_as_large_as_it_may_be(trained, dtype, monkeypatch):
    monkeypatch.setattr(backends, "_WIDENED", {})
    own, x = stage(0, monkeypatch)
    own, x = own.to(dtype), x.to(dtype).requires_grad_(trained)
    seen: list[int] = []
    convolve = torch.nn.functional.conv2d

    def watch(part, *args):
        seen.append(len(part))
        return convolve(part, *args)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watch)
    with torch.set_grad_enabled(trained):
        own(x)
    images = IMAGES * 4 // dtype.itemsize
    assert seen == [images] * (BATCH // images) + [BATCH % images]


@pytest.mark.parametrize("side", [28, 33, 96, 224, 299])
def test_malloc_reuses_each_parts_result(side, monkeypatch):
    """Below 32 MiB with malloc's header, at the sizes that users have."""
    monkeypatch.undo()
    x, weight = torch.empty((), dtype=torch.float32).expand(1000, 1, side, side), torch.empty(64, 1, 7, 7)
    for part in stem._parts(x, weight, 2):
        assert 64 * ((side + 1) // 2) ** 2 * 4 * (part.stop - part.start) < 2**25 - 2**14


@pytest.mark.parametrize(("which", "side", "most"), [(0, 96, 56), (1, 24, 75)])
def test_parts_begin_where_malloc_would_not_reuse_the_result(which, side, most, monkeypatch):
    """As the README says, of images of 96 pixels."""
    monkeypatch.undo()
    monkeypatch.setattr(stem, "BLOCKED_PAYS", False)
    own = Stage(*GoogLeNet(block=FastInception)[which][-3:])
    x = torch.zeros(1, own[0].in_channels, side, side).expand(most + 1, -1, -1, -1)
    with torch.no_grad():
        assert operators(lambda: own(x)) == {"conv_pool_relu"}
        assert operators(lambda: own(x[:most])) == set()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_is_needed_is_computed(needs, monkeypatch):
    own, x = stage(0, monkeypatch)
    for t, need in zip((x, own[0].weight, own[0].bias), needs, strict=True):
        t.requires_grad_(need)
    seen = []
    convolve = stem.conv_backward
    monkeypatch.setattr(stem, "conv_backward", lambda *args, **kw: seen.append(args[3]) or convolve(*args, **kw))
    grads = []
    for run in (own, layers(own)):
        y = run(x)
        assert y.requires_grad == any(needs)
        leaves = x, own[0].weight, own[0].bias
        if any(needs):
            torch.manual_seed(1)
            y.backward(torch.randint_like(y, -3, 4))
        grads.append([t.grad for t in leaves])
        for t in leaves:
            t.grad = None
    for found, expected, need in zip(*grads, needs, strict=True):
        assert (found is not None) == (expected is not None) == need
        assert not need or torch.equal(found, expected)
    assert set(seen) == ({(*needs[:2], False)} if any(needs[:2]) else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("which", "channels"), [(0, 1), (0, 3), (0, 5), (1, 64)])
def test_the_error_is_within_twice_the_layers(which, channels, dtype, monkeypatch):
    """In the library's worse layout, against float64; also in what a CPU emulates, where the parts are of float32."""
    monkeypatch.setattr(stem, "BLOCKED_PAYS", True)
    channels = 3 if which else channels
    own, x = stage(which, monkeypatch, channels)
    torch.manual_seed(2)
    nn.init.xavier_uniform_(own[-3].weight)
    own, x = own.to(dtype), torch.randn_like(x).to(dtype)

    def all_results(run, x: Tensor, params, to) -> list[Tensor]:
        x = x.detach().to(to).requires_grad_()
        y = run(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype).to(to)
        return [t.double() for t in (y, *torch.autograd.grad(y, [x, *params], grad))]

    wide, plain = (GoogLeNet(in_channels=channels)[which] for _ in range(2))  # the textbook's
    for net in (wide, plain):
        net.load_state_dict(own.state_dict())
    wide, plain = wide.double(), plain.to(dtype)
    exact = all_results(wide, x, list(wide.parameters()), torch.float64)

    def errors(run) -> list[float]:
        found = all_results(run, x, list(run.parameters()), dtype)
        with torch.no_grad():
            found.append(run(x).double())  # by another way
        return [(a - b).abs().max().item() for a, b in zip(found, [*exact, exact[0]], strict=True)]

    ours = errors(own)
    theirs = [max(pair) for pair in zip(*(errors(plain.to(memory_format=f)) for f in FORMATS), strict=True)]
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_many_parts_gradients_are_rounded_once(monkeypatch):
    """In a half precision, which this CPU may emulate outside of the operator: 64 parts against one."""
    torch.manual_seed(0)
    x, weight, bias = (t.bfloat16() for t in (torch.randn(64, 3, 9, 9), torch.randn(8, 3, 3, 3), torch.randn(8)))
    out, indices = torch.ops.fastinception.conv_pool_relu(x, weight, bias, 1, True, CL)
    operands = torch.randn_like(out), x, weight, out, indices
    backward, needs = torch.ops.fastinception.conv_pool_relu_backward, [False, True, True]
    exact = backward(*(t.double() if t.is_floating_point() else t for t in operands), 1, needs)
    errors = []
    for size in (2**30, 1):
        monkeypatch.setattr(stem, "_PART", size)
        found = backward(*operands, 1, needs)
        errors.append([(a - b).norm() for a, b in zip(found[1:], exact[1:], strict=True)])
    assert all(many <= 2 * one for one, many in zip(*errors, strict=True)), errors


def test_a_gradient_under_autocast_is_not_rounded(monkeypatch):
    """Whose products, if autocast saw them, would be of bfloat16."""
    monkeypatch.setattr(stem, "_PART", 1)
    x, weight, bias = torch.randn(4, 5, 8, 8), torch.randn(6, 5, 1, 1), torch.randn(6)
    out, indices = torch.ops.fastinception.conv_pool_relu(x, weight, bias, 1, True, CL)
    operands = torch.randn_like(out), x, weight, out, indices, 1, [True] * 3
    expected = torch.ops.fastinception.conv_pool_relu_backward(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, torch.ops.fastinception.conv_pool_relu_backward(*operands), expected))


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_nan_and_infinities_are_where_the_layers_put_them(where, value, monkeypatch):
    """Also from sums that overflow; oneDNN's blocked pool would lose the NaN."""
    monkeypatch.setattr(stem, "BLOCKED_PAYS", True)
    own, x = stage(0, monkeypatch)
    with torch.no_grad():
        {"x": x, "weight": own[0].weight, "bias": own[0].bias}[where].view(-1)[7] = value
        assert operators(lambda: own(x))
        torch.testing.assert_close(own(x), layers(own)(x), rtol=0, atol=0, equal_nan=True)
    params = list(own.parameters())
    for found, expected in zip(results(own, x, params), results(layers(own), x, params), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_images_of_few_channels_are_convolved_blocked_in_inference(monkeypatch):
    """At any size, in float32 and where oneDNN may be used; without that it takes a large batch as elsewhere."""
    own, x = stage(0, monkeypatch)
    wide, y = stage(0, monkeypatch, channels=5)
    monkeypatch.setattr(stem, "_KEPT", 2**40)
    blocked: list[int] = []
    convolve = torch.mkldnn_convolution
    monkeypatch.setattr(
        torch, "mkldnn_convolution", lambda part, *args: blocked.append(len(part)) or convolve(part, *args)
    )
    with torch.no_grad():
        own(x)
        assert not blocked
        monkeypatch.setattr(stem, "BLOCKED_PAYS", True)
        own(x)
        assert blocked == [4, 4, 4, 1]
        assert not operators(lambda: wide(y))
        assert not operators(lambda: own.double()(x.double()))
        own.float()
        with torch.backends.mkldnn.flags(enabled=False):
            own(x)
        monkeypatch.setattr(stem, "_KEPT", 0)
        assert operators(lambda: wide(y))
    results(own, x, [own[0].weight])
    assert len(blocked) == 4
    monkeypatch.setattr(stem, "_KEPT", 2**40)
    own.requires_grad_(False)(x)
    assert len(blocked) == 8


def test_the_convolution_is_not_kept_for_the_backward(monkeypatch):
    own, x = stage(0, monkeypatch)
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = own(x)
    assert sum(kept.values()) == x.nbytes + own[0].weight.nbytes + y.nbytes + 8 * y.numel()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, which, monkeypatch):
    own, x = stage(which, monkeypatch)
    leaves = [x.requires_grad_(), *own.parameters()]
    for call in (own, torch.compile(own, backend="aot_eager")):
        upstream = integers(*call(x).shape, high=1)
        expected = torch.autograd.grad(call(x), leaves, upstream)
        y = checkpoint(call, x, use_reentrant=use_reentrant)
        for leaf in leaves:
            leaf.grad = None
        y.backward(upstream)
        assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


def test_what_is_kept_is_unpacked_once(monkeypatch):
    """As a hook that had moved it to the CPU would move it back each time."""
    own, x = stage(0, monkeypatch)
    packed, unpacked = [], []
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: unpacked.append(t) or t):
        own(x.requires_grad_()).sum().backward()
    assert len(packed) == len(unpacked) > 1


def test_a_changed_result_is_an_error(monkeypatch):
    own, x = stage(0, monkeypatch)
    y = own(x)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("which", [0, 1])
def test_transforms(which, passing, monkeypatch):
    """Each by the operator or around it: second derivatives, forward mode, functorch."""
    own, x = stage(which, monkeypatch, height=9, width=6)
    own, x = own.double(), torch.randn_like(x).double().requires_grad_()
    wanted = [x, *own.parameters()]

    def second(run) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(run(x).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    def of_the_weight_alone(run) -> tuple[Tensor, ...]:
        weight = wanted[-2]
        (first,) = torch.autograd.grad(run(x.detach()).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [weight])

    def watched(run) -> tuple[Tensor, ...]:
        with passing():
            return second(run)

    def forward(run) -> tuple[Tensor, ...]:
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(run(torch.autograd.forward_ad.make_dual(x, x)))

    def forward_over_backward(run) -> tuple[Tensor, ...]:
        y = run(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            (grad,) = torch.autograd.grad(y, x, dual)
            return torch.autograd.forward_ad.unpack_dual(grad)

    def jacobian(run) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))(x[:, None])

    assert len(operators(lambda: second(own))) == 2
    for transform in (second, of_the_weight_alone, watched, forward, forward_over_backward, jacobian):
        for found, expected in zip(transform(own), transform(layers(own)), strict=True):
            assert expected is not None
            torch.testing.assert_close(found, expected)


def test_derivatives_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(stem, "_PART", 1)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 3, 3), torch.randn(2)
    operands = [t.double().requires_grad_() for t in (x, weight, bias)]
    operator = torch.ops.fastinception.conv_pool_relu
    for stride in (1, 2):
        assert torch.autograd.gradcheck(lambda *t, s=stride: operator(*t, s, True, CL)[0], operands)
        assert torch.autograd.gradgradcheck(lambda *t, s=stride: operator(*t, s, True, CL)[0], operands)


@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, repeat=3)), ids=str)
def test_opcheck(formats, monkeypatch):
    own, x = stage(0, monkeypatch)
    x, weight = x.contiguous(memory_format=formats[0]), own[0].weight.detach().contiguous(memory_format=formats[1])
    bias = own[0].bias.detach()
    forward, backward = torch.ops.fastinception.conv_pool_relu, torch.ops.fastinception.conv_pool_relu_backward
    out, indices = forward(x, weight, bias, 2, True, formats[2])
    assert out.is_contiguous(memory_format=formats[2])
    torch.library.opcheck(forward, (x, weight, bias, 2, False, formats[2]))
    monkeypatch.setattr(stem, "BLOCKED_PAYS", True)
    torch.library.opcheck(forward, (x, weight, bias, 2, False, formats[2]))
    torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in (x, weight, bias)), 2, True, formats[2]))
    grad = torch.randn_like(out)
    for needs in itertools.product([False, True], repeat=3):
        torch.library.opcheck(backward, (grad, x, weight, out, indices, 2, list(needs)))
    # Dynamic shapes are left out: torch 2.11's own second derivative of a convolution does not take them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    leaves = [t.clone().requires_grad_() for t in (grad, x, weight)]
    torch.library.opcheck(backward, (*leaves, out, indices, 2, [True] * 3), test_utils=checks)


def test_a_forward_that_kept_nothing_has_no_backward(monkeypatch):
    own, x = stage(0, monkeypatch)
    y, _ = torch.ops.fastinception.conv_pool_relu(x, own[0].weight, own[0].bias, 2, False, CL)
    with pytest.raises(RuntimeError, match="save must be True"):
        y.sum().backward()


def test_inductor(monkeypatch):
    own, x = stage(0, monkeypatch)
    compiled = torch.compile(own, fullgraph=True)
    params = list(own.parameters())
    assert all(map(torch.equal, results(compiled, x, params), results(layers(own), x, params)))
    assert len(operators(lambda: results(compiled, x, params))) == 2


@pytest.mark.parametrize("grad", [False, True])
def test_a_graph_for_large_batches_and_one_for_small(grad, monkeypatch):
    own, x = stage(0, monkeypatch)
    monkeypatch.setattr(stem, "_KEPT", stem._PART)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(own, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(grad):
        for batch, graphs in {5: 1, 9: 1, 100: 1, 4: 2, 2: 2, 3: 2, 11: 2}.items():
            images = integers(batch, *x.shape[1:])
            assert torch.equal(compiled(images), layers(own)(images))
            assert counter.frame_count == graphs


@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_that_depends_on_data_is_taken_in_parts(grad, monkeypatch):
    own, x = stage(0, monkeypatch)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, chosen: Tensor) -> Tensor:
        return own(x[chosen])

    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for chosen in (torch.arange(BATCH) % 3 > 0, torch.zeros(BATCH, dtype=torch.bool)):
            assert operators(lambda chosen=chosen: run(x, chosen))
            assert torch.equal(run(x, chosen), layers(own)(x[chosen]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("program", ["traced", "exported", "exported strictly", "fx"])
def test_a_program_that_is_kept_takes_any_batch(program, monkeypatch):
    """Of standard operators, where it may run without the package."""
    own, x = stage(0, monkeypatch)
    monkeypatch.setattr(stem, "_KEPT", 5 * 64 * 13 * 11 * 4)  # a graph compiled for this batch alone has three parts
    with torch.no_grad():
        if program == "traced":
            kept = torch.jit.trace(own, x)
        elif program == "fx":
            kept = make_fx(own)(x)
        else:
            sizes, strict = {"input": {0: torch.export.Dim.AUTO}}, program == "exported strictly"
            kept = torch.export.export(own, (x,), dynamic_shapes=sizes, strict=strict).module()
        assert not operators(lambda: kept(x))
        for batch in (2, 7, BATCH):
            assert torch.equal(kept(x[:batch]), own(x[:batch]))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled, widened, trained, monkeypatch):
    """Casts as the layers' convolution does, in a compiled graph as well, and widens what is slower."""
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 0} if widened else {})
    monkeypatch.setattr(stem, "_KEPT", BATCH * 64 * 13 * 11 * (4 if widened else 2) - 1)  # bytes that are computed
    own, x = stage(0, monkeypatch)
    run = torch.compile(own, fullgraph=True, backend="aot_eager") if compiled else own
    params = list(own.parameters())
    seen = set()
    convolve = torch.nn.functional.conv2d

    def watch(*args):
        y = convolve(*args)
        seen.add(y.dtype)
        return y

    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
        assert bool(operators(lambda: run(x))) is (trained or not compiled)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "conv2d", watch)
            run(x)
        assert seen == {torch.float32 if widened else torch.bfloat16}
        if trained:
            found, expected = results(run, x, params), results(layers(own), x, params)
        else:
            found, expected = [run(x)], [layers(own)(x)]
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert found[0].dtype is torch.bfloat16
    for own_result, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own_result, theirs, rtol=2e-2, atol=0)


def test_a_compiled_cast_leaves_one_channel_in_its_format(monkeypatch):
    """Of whose strides Inductor keeps none, and by which the library would convolve in NCHW, at half the speed."""
    monkeypatch.setattr(backends, "_WIDENED", {})
    own, x = stage(0, monkeypatch, channels=1)
    own, x = own.to(memory_format=CL), x.to(memory_format=CL)
    run, formats = torch.compile(own, fullgraph=True), set()

    def watched(convolve):
        def watch(*args, **kwargs):
            tensors = [t for t in args[:3] if isinstance(t, Tensor) and t.dim() == 4]
            formats.add((len(tensors), *(t.stride(1) == 1 for t in tensors)))
            return convolve(*args, **kwargs)

        return watch

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched(torch.nn.functional.conv2d))
    monkeypatch.setattr(stem, "conv_backward", watched(stem.conv_backward))
    for trained in (True, False):
        formats.clear()
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
            y = run(x)
            assert y.is_contiguous(memory_format=CL)
            if trained:
                y.float().sum().backward()
        assert formats == ({(2, True, True), (3, True, True, True)} if trained else {(2, True, True)})


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_inference_of_one_size_has_few_parts(dynamic, blocked, monkeypatch):
    """Of the layers, which Inductor fuses: one part more would be needed for images of another number."""
    own, x = stage(0, monkeypatch)
    monkeypatch.setattr(stem, "BLOCKED_PAYS", blocked)
    monkeypatch.setattr(stem, "_KEPT", 5 * 64 * 13 * 11 * 4)
    graphs: list[torch.fx.GraphModule] = []
    run = torch.compile(own, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        assert torch.equal(run(x), layers(own)(x))
        called = [getattr(node.target, "__name__", "") for node in graphs[-1].graph.nodes if node.op == "call_function"]
        convolved = called.count("conv2d"), sum("conv_pool_relu" in name for name in called)
        assert convolved == ((0, 1) if dynamic or blocked else (3, 0))
        assert torch.equal(run(x[:11]), layers(own)(x[:11]))
        assert len(graphs) == (1 if dynamic else 2)
        run = torch.compile(own, fullgraph=True, dynamic=False, backend="aot_eager")
        assert operators(lambda: run(x[:5])) == ({"conv_pool_relu"} if blocked else set())
        image = 64 * 13 * 11 * 4
        # A graph of any number of parts would take long to compile, and no part is less than an image.
        for kept, images, parts in ((image, 8, True), (image, 9, False), (image - 1, 3, True)):
            monkeypatch.setattr(stem, "_KEPT", kept)
            run = torch.compile(own, fullgraph=True, dynamic=False, backend="aot_eager")
            assert bool(operators(lambda run=run, images=images: run(x[:images]))) is not (parts and not blocked)


@pytest.mark.parametrize(
    ("images", "most", "expected"), [(64, 56, 32), (13, 5, 5), (12, 4, 4), (57, 56, 29), (3, 1, 1)]
)
def test_parts_are_even(images, most, expected):
    assert stem._evenly(images, most) == expected


def test_a_backward_lays_out_what_has_one_channel(monkeypatch):
    own, x = stage(0, monkeypatch, channels=1)
    weight, seen = own[0].weight.detach(), []
    out, indices = torch.ops.fastinception.conv_pool_relu(x, weight, own[0].bias.detach(), 2, True, CL)
    convolve = stem.conv_backward
    monkeypatch.setattr(stem, "conv_backward", lambda *args, **how: seen.append(args[:3]) or convolve(*args, **how))
    torch.ops.fastinception.conv_pool_relu_backward(out, x, weight, out, indices, 2, [False, True, True])
    assert {t.stride(1) for tensors in seen for t in tensors} == {1}
    assert x.stride(1) > 1 < weight.stride(1)


def test_a_small_call_asks_no_more(monkeypatch):
    """And is never one that pays, as which the largest number and stride are taken."""
    own = Stage(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).double()
    x = torch.randn(BATCH, 3, 25, 22).double()
    monkeypatch.setattr(stem, "_KEPT", 4 * 8 * 25 * 22 * 8)
    assert operators(lambda: own(x[:5]))
    monkeypatch.setattr(stem, "_is_simple", None)
    own(x[:4])
    with pytest.raises(TypeError):
        own(x[:5])


def test_everything_else_is_its_layers(monkeypatch):
    own, x = stage(0, monkeypatch)
    assert operators(lambda: own(x))

    def under(context) -> None:
        with context:
            own(x)

    def with_layer(place: int, layer: nn.Module) -> Stage:
        changed = Stage(*own)
        changed[place] = layer
        return changed

    assert not operators(lambda: under(FlopCounterMode(display=False)))
    assert not operators(lambda: own(x[0]))
    narrow = x[0, :, :3]  # three lines, as if they were channels
    assert torch.equal(own(narrow), layers(own)(narrow))
    with monkeypatch.context() as patch:
        patch.setattr(stem, "BLOCKED_PAYS", True)
        patch.setattr(stem, "_KEPT", 2**40)
        assert not operators(lambda: own(x))  # with a gradient
    assert not operators(lambda: own(TwoTensor(x, x)))
    assert not operators(lambda: own.to("meta")(x.to("meta")))
    with monkeypatch.context() as patch:
        patch.setattr(stem, "_is_served", None)  # no other device, and no wrong type, gets as far as that
        own(x.to("meta"))
        with pytest.raises(TypeError, match=r"invalid combination of arguments - got .list"):
            own([1.0])
    own, x = stage(0, monkeypatch)
    for options in (
        {"padding": 2}, {"padding": (3, 2)}, {"padding": (2, 3)}, {"dilation": 2}, {"padding_mode": "reflect"},
        {"bias": False}, {"kernel_size": (7, 6)}, {"kernel_size": (6, 7)}, {"stride": 3},
        {"stride": (1, 2)}, {"stride": 1, "padding": "same"}, {"groups": 3},
    ):  # fmt: skip
        options = {"kernel_size": 7, "padding": 3, **options}
        changed = with_layer(0, nn.Conv2d(3, 6, **options))
        assert not operators(lambda changed=changed: changed(x)), options
        assert torch.equal(changed(x), layers(changed)(x))
    for options in ({"kernel_size": 2}, {"stride": 1}, {"padding": 0}, {"ceil_mode": True}, {"dilation": 2}):
        options = {"kernel_size": 3, "stride": 2, "padding": 1, **options}
        changed = with_layer(2, nn.MaxPool2d(**options))
        assert not operators(lambda changed=changed: changed(x)), options
        assert torch.equal(changed(x), layers(changed)(x))
    for place, layer in ((0, Conv2d(3, 64, 7, 2, 3)), (1, nn.ReLU6()), (2, MaxPool2d(3, 2, 1))):
        changed = with_layer(place, layer)
        assert not operators(lambda changed=changed: changed(x))
    for name, t in list(own[0].named_parameters()):
        changed = with_layer(0, Conv2d(3, 64, 7, 2, 3))
        setattr(changed[0], name, nn.Parameter(TwoTensor(t.detach(), t.detach())))
        assert not operators(lambda changed=changed: changed(x)), name
    for start, stop in ((0, 0), (0, 1), (0, 2), (1, 3)):
        part = own[start:stop]
        assert type(part) is nn.Sequential
        y = integers(2, 3, 20, 20)
        assert torch.equal(part(y), layers(part)(y))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_of_another_class_is_called(place, monkeypatch):
    own, x = stage(0, monkeypatch)

    class Doubled(type(own[place])):
        def forward(self, y):
            return 2 * super().forward(y)

    own[place].__class__ = Doubled
    assert torch.equal(own(x), layers(own)(x))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_see_the_whole_batch(place, monkeypatch):
    own, x = stage(0, monkeypatch)
    seen: list[int] = []
    hook = own[place].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    own(x)
    hook.remove()
    forward = own[place].forward
    own[place].forward = lambda y: seen.append(len(y)) or forward(y)
    own(x)
    del own[place].forward
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(len(out)) if module is own[place] else None
    )
    try:
        own(x)
    finally:
        hook.remove()
    own(x)
    assert seen == [BATCH] * 3


@pytest.mark.parametrize(("place", "method"), [(0, "forward"), (0, "_conv_forward"), (1, "forward"), (2, "forward")])
def test_a_patch_behind_the_first_compiled_call_counts(place, method, monkeypatch):
    own, x = stage(0, monkeypatch)
    run = torch.compile(own, backend="eager")
    unpatched, original = run(x), getattr(own[place], method)
    setattr(own[place], method, lambda *args: 2 * original(*args))
    assert torch.equal(run(x), 2 * unpatched)


def test_hooks_on_layers_in_front_run(monkeypatch):
    own, x = stage(1, monkeypatch)
    assert operators(lambda: own(x))
    seen: list[int] = []
    own[0].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    assert not operators(lambda: own(x))
    assert seen == [BATCH]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["hooked", "traced", "exported", "fx", "mode"])
def test_who_watches_sees_the_textbooks_layers(kind, which, monkeypatch):
    """By whose classes, order and inputs quantizers, counters, explanations, adapters and extractors go."""
    own = stage(which, monkeypatch)[0] if which < 2 else GoogLeNet(block=FastInception)[2]
    plain = GoogLeNet(in_channels=3)[which].eval()
    plain.load_state_dict(own.eval().state_dict())
    x = integers(4, (3, 64, 192)[which], 13, 12)
    kinds = [FastInception if type(m) is Inception else type(m) for m in plain.modules()]
    assert [*map(type, own.modules())][1:] == kinds[1:]
    seen: list[list[str]] = []
    for net in (own, plain):
        if kind == "hooked":
            kept: list[str] = []
            for name, module in net.named_modules():
                module.register_forward_hook(
                    lambda module, args, out, kept=kept, name=name: kept.append(f"{name} {args[0].sum()} {out.sum()}")
                )
            net(x)
        elif kind == "mode":
            with profiled.Functions() as mode:
                net(x)
            kept = mode.names
        elif kind == "traced":
            graph = torch.jit.trace(net, x).inlined_graph
            kept = [f"{node.kind()} {node.scopeName().split('/')[-1]}" for node in graph.nodes()]
        else:
            program = torch.fx.symbolic_trace(net) if kind == "fx" else torch.export.export(net, (x,))
            kept = [
                f"{node.op} {node.target} {[*node.meta.get('nn_module_stack', {})]}" for node in program.graph.nodes
            ]
        seen.append(kept)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 0, 40), None),
        ((2, 3, 48, 0), None),
        ((2, 4, 48, 48), None),
        ((2, 3, 48, 48), torch.float64),
        ("nested", None),
    ],
)
def test_wrong_images_are_the_convolutions_error(shape, dtype, monkeypatch):
    own, _ = stage(0, monkeypatch)
    if shape == "nested":
        images = torch._nested_tensor_from_tensor_list([torch.empty(3, 8, 8), torch.empty(3, 9, 8)])
    else:
        images = torch.empty(shape, dtype=dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as expected:
            layers(own)(images)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as found:
            own(images)
        assert str(found.value) == str(expected.value)


def test_an_empty_batch_stays_empty(monkeypatch):
    monkeypatch.setattr(stem, "BLOCKED_PAYS", True)
    own, x = stage(0, monkeypatch)
    assert own(x[:0]).shape == (0, 64, 7, 6)
    weight, bias = own[0].weight.detach(), own[0].bias.detach()
    for save in (False, True):
        out, indices = torch.ops.fastinception.conv_pool_relu(x[:0], weight, bias, 2, save, CL)
        assert out.shape == (0, 64, 7, 6)
    grads = torch.ops.fastinception.conv_pool_relu_backward(out, x[:0], weight, out, indices, 2, [True] * 3)
    assert grads[0].shape == (0, 3, 25, 22)
    assert torch.equal(grads[1], torch.zeros_like(weight))
    assert torch.equal(grads[2], torch.zeros_like(bias))


@pytest.mark.parametrize(
    ("change", "compiled"),
    [*itertools.product(["x's side", "x's batch"], [False, True]), ("weight", False)],  # no graph's operator knows it
)
def test_another_shape_in_the_backward_is_an_error(change, compiled, monkeypatch):
    """A side of 26 has as many maxima as one of 25, and indices beyond the end of 25's plane."""
    torch.manual_seed(0)
    monkeypatch.setattr(stem, "_PART", 4 * 26 * 26 * 4)
    own = Stage(nn.Conv2d(3, 2, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    x = torch.zeros(4, 3, 26, 26)
    x[..., -1, -1] = 9  # the last index of all
    with torch.no_grad():
        for p in own.parameters():
            p.fill_(1)
    run = torch.compile(own, backend="aot_eager") if compiled else own
    y = run(x)
    if change == "weight":
        own[0].weight.data = torch.randn(2, 3, 5, 5)
    else:
        x.data = torch.zeros(4, 3, 25, 25) if change == "x's side" else torch.zeros(2, 3, 26, 26)
    with pytest.raises(RuntimeError, match="another shape in the backward"):
        y.sum().backward()


@pytest.mark.parametrize("index", [-1, 13 * 11])
def test_an_index_beyond_its_plane_is_an_error(index, monkeypatch):
    """As a hook of saved tensors may bring back; the backward would write there."""
    own, x = stage(0, monkeypatch)
    weight = own[0].weight.detach()
    out, indices = torch.ops.fastinception.conv_pool_relu(x, weight, own[0].bias.detach(), 2, True, CL)
    indices[-1, -1, -1, -1] = index
    with pytest.raises(RuntimeError, match="another shape in the backward"):
        torch.ops.fastinception.conv_pool_relu_backward(out, x, weight, out, indices, 2, [True] * 3)
