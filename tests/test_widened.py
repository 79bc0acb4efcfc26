"""Half precisions in which the CPU is slower than in float32: computed in that and rounded once."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastinception import Conv2d, FastInception, GoogLeNet, Inception, backends, explain
from fastinception.functional import inception
from fastinception.module import _params

HALVES = (torch.bfloat16, torch.float16)
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def widening(monkeypatch):
    """As on a CPU that has products of neither, whatever this one has."""
    torch.compiler.reset()
    monkeypatch.setattr(backends, "_WIDENED", dict.fromkeys(HALVES, 0))


def half_block(dtype: torch.dtype) -> tuple[Inception, FastInception, Tensor]:
    """Return a block whose parameters are in ``dtype``, in float64 and as it is, and an input for both."""
    torch.manual_seed(0)
    exact = Inception(24, 8, (8, 16), (4, 8), 8).to(dtype).double()
    fast = FastInception(24, 8, (8, 16), (4, 8), 8, backend="aten").to(dtype)
    fast.load_state_dict(exact.state_dict())
    return exact, fast, torch.randn(2, 24, 7, 6).to(dtype).contiguous(memory_format=torch.channels_last)


def convolved(run: Callable[[], Any]) -> set[torch.dtype]:
    """Return the dtypes of what the convolutions of ``run`` compute."""
    dtypes = set()
    conv2d = F.conv2d

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        y = conv2d(*args, **kwargs)
        dtypes.add(y.dtype)
        return y

    with mock.patch.object(F, "conv2d", watch):
        run()
    return dtypes


@pytest.mark.parametrize("dtype", HALVES)
def test_inference_rounds_once(dtype):
    exact, fast, x = half_block(dtype)
    with torch.no_grad():
        expected = exact(x.double())
        y = fast(x)
        out = fast(x, out=torch.empty_like(y))
    assert y.dtype is dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, out)
    # One rounding; what is left is float32's.
    assert ((y.double() - expected).abs() <= (1.01 * ROUNDOFF[dtype]) * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_round_once(dtype, compiled):
    exact, fast, x = half_block(dtype)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    grad = torch.randn(exact(wide).shape).to(dtype)
    run = torch.compile(fast, fullgraph=True, backend="aot_eager") if compiled else fast
    found = torch.autograd.grad(run(x), [x, *fast.parameters()], grad)
    expected = torch.autograd.grad(exact(wide), [wide, *exact.parameters()], grad.double())
    for own, theirs in zip(found, expected, strict=True):
        assert own.dtype is dtype
        allowed = (1.01 * ROUNDOFF[dtype]) * theirs.abs() + 1e-6 * theirs.abs().max()  # the last is float32's
        assert ((own.double() - theirs).abs() / allowed).max() <= 1


def test_nothing_is_computed_in_the_slower_dtype():
    """In inference, training, autocast and into a buffer; x's dtype would take many times as long."""
    _, fast, x = half_block(torch.bfloat16)
    buffer = torch.empty_like(fast(x)).detach()
    net = GoogLeNet(block=FastInception)
    images = torch.rand(1, 1, 32, 32)

    def autocast_step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(images)
        y.float().sum().backward()

    with torch.no_grad():
        assert convolved(lambda: fast(x)) == {torch.float32}
        assert convolved(lambda: fast(x, out=buffer)) == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            assert convolved(lambda: fast(x)) == {torch.float32}
            assert convolved(lambda: fast(x, out=buffer)) == {torch.float32}
    assert convolved(lambda: fast(x).sum().backward()) == {torch.float32}
    assert convolved(autocast_step) == {torch.float32}
    assert convolved(lambda: Inception(24, 8, (8, 16), (4, 8), 8).to(x.dtype)(x)) == {torch.bfloat16}


def test_autocast_gives_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        y = FastInception(24, 8, (8, 16), (4, 8), 8)(torch.randn(2, 24, 7, 6))
        z = Conv2d(3, 4, 3)(torch.randn(2, 3, 7, 6))
    assert y.dtype is z.dtype is torch.bfloat16
    y.float().sum().backward()


def test_into_a_buffer_keeps_its_checks():
    _, fast, x = half_block(torch.bfloat16)
    with torch.no_grad():
        y = fast(x)
        with pytest.raises(TypeError, match=r"out must be of dtype torch\.bfloat16, got torch\.float32"):
            fast(x, out=y.float())
        square = FastInception(16, 4, (4, 4), (4, 4), 4).bfloat16()
        x = torch.randn(2, 16, 4, 4).bfloat16()
        with pytest.raises(ValueError, match="share memory"):
            square(x, out=x)


def test_explain_says_so():
    _, fast, x = half_block(torch.bfloat16)
    assert str(explain(fast, x)).endswith("in float32, in which this CPU is faster than in torch.bfloat16")
    assert "float32" not in str(explain(fast.float(), x.float()))


def test_other_paths_are_left_alone(monkeypatch):
    """Float32, another activation, an exported program; and with products of its own, the dtype itself."""
    _, fast, x = half_block(torch.bfloat16)
    params = [p.detach() for p in _params(fast)]
    assert convolved(lambda: inception(x, params, activation="none")) == {torch.bfloat16}
    exported = torch.export.export(Conv2d(24, 4, 1).bfloat16(), (x,))
    assert [str(node.target) for node in exported.graph.nodes if node.op == "call_function"] == ["aten.conv2d.default"]
    monkeypatch.setattr(backends, "_WIDENED", {})
    with torch.no_grad():
        assert convolved(lambda: fast(x)) == {torch.bfloat16}
        assert convolved(lambda: Conv2d(24, 4, 1).bfloat16()(x)) == {torch.bfloat16}


def test_conv_casts_nothing_where_nothing_is_slower(monkeypatch):
    """Autocast does it inside the convolution, and remembers the weight's."""
    monkeypatch.setattr(backends, "_WIDENED", {})
    conv, x = Conv2d(3, 4, 3), torch.randn(2, 3, 7, 6)
    monkeypatch.setattr(Tensor, "to", None)
    monkeypatch.setattr(Tensor, "float", None)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype is torch.bfloat16


def test_conv_leaves_float64_alone():
    """As autocast does."""
    with torch.autocast("cpu", torch.bfloat16):
        assert Conv2d(3, 4, 3).double()(torch.randn(2, 3, 7, 6).double()).dtype is torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_conv_is_torchs(dtype, bias):
    torch.manual_seed(0)
    own = Conv2d(5, 4, 3, stride=2, padding=1, padding_mode="reflect", groups=1, bias=bias).to(dtype)
    wide = nn.Conv2d(5, 4, 3, stride=2, padding=1, padding_mode="reflect", bias=bias).double()
    wide.load_state_dict(own.state_dict())
    x = torch.randn(2, 5, 8, 9).to(dtype)
    y, expected = own(x), wide(x.double())
    assert y.dtype is dtype
    assert ((y.double() - expected).abs() <= (1.01 * ROUNDOFF[dtype]) * expected.abs() + 1e-6).all()
    with pytest.raises(RuntimeError):  # as torch.nn.Conv2d: the dtypes differ, and nothing is cast in silence
        own.float()(x)


EPYC = {"cpu_name": "AMD EPYC 9R14"}
XEON = {"cpu_name": "Intel Xeon"}
TILES = {"amx_bf16": True, "amx_fp16": True}


@pytest.mark.parametrize(
    ("cpu", "products", "expected"),
    [
        (EPYC, (False, False), {torch.bfloat16: 0, torch.float16: 0}),
        (EPYC, (True, False), {torch.float16: 0}),
        (EPYC | TILES, (True, True), {}),
        (XEON, (False, False), {torch.bfloat16: 0, torch.float16: 0}),
        (XEON | {"amx_bf16": False}, (True, True), {torch.bfloat16: 256, torch.float16: 0}),
        (XEON | {"amx_bf16": True}, (True, True), {torch.float16: 0}),
        (XEON | TILES, (True, True), {}),
        ({}, (True, True), {torch.float16: 0}),
    ],
)
def test_which_dtypes_are_widened(cpu, products, expected, monkeypatch):
    """PyTorch's own convolutions decide by the products; the rate of these depends on the maker, and on tiles."""
    monkeypatch.setattr(backends.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    has = mock.Mock(_is_mkldnn_bf16_supported=lambda: products[0], _is_mkldnn_fp16_supported=lambda: products[1])
    monkeypatch.setattr(torch.ops, "mkldnn", has)
    assert backends._widened(cpu) == expected
    monkeypatch.setattr(backends.platform, "machine", lambda: "aarch64")
    assert backends._widened(cpu) == {}


def test_only_a_cpu_is_slower(monkeypatch):
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 256, torch.float16: 0})
    for device, expected in (("cpu", True), ("meta", False)):
        for dtype in HALVES:
            assert backends.is_slower(dtype, torch.device(device)) is expected
            assert backends.is_emulated(dtype, torch.device(device)) is (expected and dtype is torch.float16)
            assert backends.widened(dtype, torch.empty(1, device=device)) is expected
    assert not backends.is_slower(torch.float64, torch.device("cpu"))


def test_this_cpu_was_asked_on_import():
    code = (
        "import torch; from fastinception import backends; cpu = torch.cpu.get_capabilities(); "
        "print(backends._WIDENED == backends._widened(cpu), cpu['architecture'] != 'x86_64' or 'cpu_name' in cpu)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["True", "True"]


@pytest.mark.parametrize("compiled", [False, True])
def test_few_pixels_are_left_in_their_dtype(compiled, monkeypatch):
    """Where products are slower, not missing: casts of the weights would take longer than they spare."""
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 2 * 7 * 6})
    _, fast, x = half_block(torch.bfloat16)
    conv = Conv2d(24, 4, 3).bfloat16()
    for own in (fast, conv):
        run = torch.compile(own, fullgraph=True, backend="aot_eager", dynamic=True) if compiled else own
        with torch.no_grad():
            assert run(x[:1]).dtype is run(x).dtype is torch.bfloat16
            assert convolved(lambda run=run: run(x[:1])) == {torch.bfloat16}
            assert convolved(lambda run=run: run(x)) == {torch.float32}
    assert ("float32" in str(explain(fast, x)), "float32" in str(explain(fast, x[:1]))) == (True, False)
    assert conv(x[0]).shape == (4, 5, 4)  # one image without a batch


def test_a_graph_whose_batch_depends_on_data_widens(monkeypatch):
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 2 * 7 * 6})  # of what may be one image or two
    conv, x = Conv2d(24, 4, 3).bfloat16(), torch.randn(2, 24, 7, 6).bfloat16()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def some(x, chosen):
        return conv(x[chosen.nonzero()[:, 0]])

    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert convolved(lambda: some(x, torch.tensor([0, 1]))) == {torch.float32}
        torch.testing.assert_close(some(x, torch.tensor([0, 1])), conv(x[1:]), rtol=2e-2, atol=1e-2)


def test_a_trace_widens_whatever_comes(monkeypatch):
    """It keeps what one batch did, and warns wherever a shape is looked at."""
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 2**20})
    conv, x = Conv2d(24, 4, 3).bfloat16(), torch.randn(2, 24, 7, 6).bfloat16()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        traced = torch.jit.trace(conv, (x,))
    assert not [str(warning.message) for warning in caught if warning.category is torch.jit.TracerWarning]
    assert "aten::to" in str(traced.graph)
    torch.testing.assert_close(traced(x), conv(x), rtol=2e-2, atol=1e-2)
