"""torch.compile and torch.export: one graph, no recompilation, eager's numbers, eager's layouts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastinception import FastInception, GoogLeNet, Inception, aten
from fastinception.kernels import target

DEVICE = "cpu" if target.interpreted() else "cuda"
HAS_TRITON = target.unsupported(torch.device(DEVICE), torch.float32) is None
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here"))
BACKENDS = ("aten", TRITON)
FORMATS = (torch.channels_last, torch.contiguous_format)
WIDTHS = (16, 8, (6, 10), (4, 5), 3)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
    # torch.compile tells of what it could do better on this machine.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # Without worker processes: on torch 2.11 one that hangs holds up the end of the run for five minutes.
    with torch._inductor.config.patch(compile_threads=1), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch._dynamo.reset()


def make(backend: str = "aten", seed: int = 0) -> FastInception:
    torch.manual_seed(seed)
    return FastInception(*WIDTHS, backend=backend).to(DEVICE)


def image(
    n: int = 2, h: int = 5, w: int = 4, format: torch.memory_format = torch.channels_last, seed: int = 1
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTHS[0], h, w, generator=generator).contiguous(memory_format=format)
    return x.to(DEVICE).requires_grad_()


def step(run: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and every gradient of one training step."""
    block.zero_grad()
    x.grad = None
    y = run(x)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert a.stride() == b.stride()


def plain_step(block: FastInception, x: Tensor) -> list[Tensor]:
    """Return the step of the textbook block with the same parameters."""
    plain = Inception(*WIDTHS).to(DEVICE)
    plain.load_state_dict(block.state_dict())
    return step(plain, plain, x)


@pytest.mark.device
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_training_step(backend, format):
    block, x = make(backend), image(format=format)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    eager = step(block, block, x)
    with torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True):  # as the operators say they are
        for _ in range(3):
            assert_same(step(compiled, block, x), eager)
    assert counter.frame_count == 1
    assert eager[0].is_contiguous(memory_format=format)
    assert eager[1].is_contiguous(memory_format=format)
    for a, b in zip(eager, plain_step(block, x), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_inference(backend, format):
    block, x = make(backend), image(format=format).detach()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for _ in range(2):
                y = compiled(x)
                torch.testing.assert_close(y, block(x), rtol=2e-5, atol=2e-5)
                assert y.stride() == block(x).stride()
        assert counter.frame_count == 1
        torch._dynamo.reset()
        counter.frame_count = 0


@pytest.mark.device
@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor(backend):
    """The real compiler, forward and training step, in the fast layout; strides are Inductor's to choose inside."""
    block, x = make(backend), image()
    eager = step(block, block, x)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_same(step(compiled, block, x), eager)
    assert counter.frame_count == 1
    with torch.no_grad():
        y = compiled(x)
        assert_same([y, compiled(x)], [eager[0]] * 2)
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
@pytest.mark.parametrize("grad", [True, False])
def test_batch_sizes_without_recompilation(backend, how, grad):
    block = make(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True if how == "dynamic=True" else None)
    for n in (2, 3, 5, 8, 3):
        x = image(n)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        if grad:
            ours = step(compiled, block, x)
            assert_same(ours, step(block, block, x))
        else:
            with torch.no_grad():
                assert_same([compiled(x)], [block(x)])
    assert counter.frame_count == 1


def test_batch_sizes_through_inductor():
    block = make()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (2, 5, 8):
            torch.testing.assert_close(compiled(image(n)), block(image(n)), rtol=2e-5, atol=2e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_autocast_inside(backend):
    block, x = make(backend), image()

    def run(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return block(x)

    eager = step(run, block, x)
    assert eager[0].dtype is torch.bfloat16
    assert eager[1].dtype is eager[2].dtype is torch.float32
    compiled = step(torch.compile(run, backend="aot_eager", fullgraph=True), block, x)
    for a, b in zip(compiled, eager, strict=True):
        assert a.dtype is b.dtype
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    with torch.no_grad():
        y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, eager[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_out(backend, compiler):
    block, x = make(backend), image().detach()
    expected = block(x).detach()
    out = torch.full_like(expected, float("nan"))

    @torch.compile(backend=compiler, fullgraph=True)
    def run(x: Tensor, out: Tensor) -> Tensor:
        y = block(x, out=out)
        return y + 1

    with torch.no_grad():
        y = run(x, out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(y, expected + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_changed_in_place_inside(backend):
    block, x = make(backend), image()

    def run(x: Tensor) -> Tensor:
        y = block(x)
        y += 1.0
        return nn.functional.relu_(y.sub_(1.5))

    assert_same(step(torch.compile(run, backend="aot_eager", fullgraph=True), block, x), step(run, block, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_leaves_nothing_behind(backend):
    """What was made under inference_mode must not reach a training step: such tensors cannot be saved for backward."""
    block, x = make(backend), image()
    expected = plain_step(block, x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        compiled(x.detach())
        block(x.detach())
    for run in (compiled, block):
        for a, b in zip(step(run, block, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_parameters_may_change_between_calls():
    """Nothing of the parameters is baked into a graph, whatever way they are written."""
    block, x = make(), image()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    step(compiled, block, x)
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    for run in (compiled, block):
        for a, b in zip(step(run, block, x), plain_step(block, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_inside(backend):
    block = make(backend)
    x = image(3).detach()
    samples = torch.stack((x, -x))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        batched = torch.compile(torch.func.vmap(lambda x: block(x)), backend="aot_eager", fullgraph=True)(samples)
    torch.testing.assert_close(batched, torch.stack((block(x), block(-x))), rtol=2e-5, atol=2e-5)
    gradient = torch.compile(torch.func.grad(lambda x: block(x).square().sum()), backend="aot_eager", fullgraph=True)(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(block(leaf).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_backward_behind_two_eager_blocks(backend):
    """Compiled autograd traces what a block's backward asks about the other's."""
    first, (_, c1, c2, c3, c4) = make(backend), WIDTHS
    second = FastInception(c1 + c2[1] + c3[1] + c4, *WIDTHS[1:], backend=backend).to(DEVICE)
    blocks = nn.Sequential(first, second)
    expected = step(blocks, blocks, image())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = step(blocks, blocks, image())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_export_holds_standard_operators_only(backend, strict, grad):
    block, x = make(backend).eval(), image(3).detach()
    expected = block(x).detach()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(block, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert len(called) > 6
    assert {op.namespace for op in called if isinstance(op, torch._ops.OpOverload)} == {"aten"}
    torch.testing.assert_close(program.module()(x).detach(), expected, rtol=2e-5, atol=2e-5)
    more = image(7).detach()
    torch.testing.assert_close(program.module()(more).detach(), block(more).detach(), rtol=2e-5, atol=2e-5)


def test_googlenet_training_step():
    """The whole network through Inductor against eager, and against the plain network."""
    torch.manual_seed(0)
    net = GoogLeNet(block=FastInception).to(DEVICE, memory_format=torch.channels_last)
    plain = GoogLeNet().to(DEVICE)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 1, 32, 32, device=DEVICE)
    labels = torch.tensor([3, 7], device=DEVICE)

    def train(run: Callable[[Tensor], Tensor], module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        loss = nn.functional.cross_entropy(run(x), labels)
        loss.backward()
        return [loss.detach(), *(p.grad for p in module.parameters())]

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    expected = train(plain, plain)
    for ours in (train(net, net), train(compiled, net), train(compiled, net)):
        for a, b in zip(ours, expected, strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale)
    assert counter.frame_count == 1


def test_blocks_of_one_shape_share_a_graph():
    """Nine blocks are compiled as regions: two of one shape must not cost two compilations."""
    blocks = [make(seed=0), copy.deepcopy(make(seed=1))]
    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=True):
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
            block(image())
    assert counter.frame_count <= 2


@pytest.mark.parametrize("size", [(4, 3), (1, 3), (1, 1), (5, 6), (2, 1), (12, 2), (21, 5), (11, 3)])
@pytest.mark.parametrize("layout", FORMATS)
def test_inference_form_puts_nan_and_infinity_where_the_plain_block_does(size, layout):
    """Its pool takes rows together: a lost tap, a row of another group or a maximum that drops NaN would show."""
    torch.manual_seed(0)
    block = Inception(5, 4, (3, 6), (2, 3), 7).double()
    x = (torch.randn(3, 5, *size, dtype=torch.float64) - 3).contiguous(memory_format=layout)
    x[0, 1, 0, 0], x[1, 2, -1, -1], x[2, 3] = float("nan"), float("inf"), float("-inf")
    with torch.no_grad():
        result = aten.compose_for_inductor(x, list(block.parameters()))
        torch.testing.assert_close(result, block(x), equal_nan=True, rtol=1e-12, atol=1e-12)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("of_weights", FORMATS)
@pytest.mark.parametrize("of_x", FORMATS)
def test_compiled_inference_has_the_plain_blocks_format(of_x, of_weights):
    """Inside it is channels_last whatever x is."""
    plain = Inception(6, 4, (5, 8), (3, 4), 8).to(memory_format=of_weights)
    compiled = torch.compile(FastInception.from_reference(plain), backend="aot_eager", fullgraph=True)
    x = torch.rand(2, 6, 6, 5).contiguous(memory_format=of_x)
    with torch.no_grad():
        y, expected = compiled(x), plain(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()


def test_heights_that_vary_share_a_graph_in_inference():
    """As many rows of the pool as divide a height would be a graph for each."""
    plain = Inception(6, 4, (5, 8), (3, 4), 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FastInception.from_reference(plain), backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for height in (12, 10, 7):
            x = torch.rand(2, 6, height, 5)
            torch.testing.assert_close(compiled(x), plain(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_whose_size_depends_on_data_may_be_empty(grad):
    torch.manual_seed(0)
    plain = Inception(6, 4, (5, 8), (3, 4), 8)
    fast = FastInception.from_reference(plain, backend="aten")
    x = torch.rand(6, 6, 7, 9)
    compiled = torch.compile(lambda x, chosen: fast(x[chosen]), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (4, 2, 0):
            chosen = torch.arange(6) < count
            torch.testing.assert_close(compiled(x, chosen), plain(x[chosen]))
