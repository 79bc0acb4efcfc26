"""The functional form where it offers more than the module: the block without its ReLUs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fastinception import Inception, functional
from fastinception.functional import inception
from fastinception.kernels import configs, replay, target

HAS_TRITON = target.unsupported(torch.device("cpu"), torch.float32) is None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here")
TRITON = pytest.param("triton", marks=needs_triton)
BACKENDS = pytest.mark.parametrize("backend", ["aten", TRITON])
FORMATS = pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")


def block(format: torch.memory_format) -> tuple[Inception, Tensor]:
    torch.manual_seed(0)
    net = Inception(7, 5, (3, 9), (2, 6), 4)
    return net, torch.randn(3, 7, 4, 5).contiguous(memory_format=format)


def without_relu(net: Inception, x: Tensor) -> Tensor:
    return torch.cat((net.p1_1(x), net.p2_2(net.p2_1(x)), net.p3_2(net.p3_1(x)), net.p4_2(F.max_pool2d(x, 3, 1, 1))), 1)


@BACKENDS
@FORMATS
def test_no_activation(backend, format):
    net, x = block(format)
    expected = without_relu(net, x)
    assert all(bool((branch < 0).any()) for branch in expected.split((5, 9, 6, 4), dim=1))
    with torch.no_grad():
        assert not (inception(x, list(net.parameters()), backend=backend) < 0).any()
        y = inception(x, list(net.parameters()), backend=backend, activation="none")  # behind one that has it
        out = torch.full_like(expected, float("nan"))
        assert inception(x, list(net.parameters()), backend=backend, activation="none", out=out) is out
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(out, expected)
    assert y.is_contiguous(memory_format=format)


@BACKENDS
def test_no_activation_has_gradients(backend):
    net, x = block(torch.channels_last)
    x.requires_grad_()
    params = list(net.parameters())
    expected = without_relu(net, x)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    y = inception(x, params, backend=backend, activation="none")
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(*(torch.autograd.grad(t, [x, *params], upstream) for t in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_no_activation_compiles_as_one_graph(backend):
    net, x = block(torch.channels_last)
    params = [p.detach() for p in net.parameters()]
    compiled = torch.compile(
        lambda x: inception(x, params, backend=backend, activation="none"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), without_relu(net, x))


@BACKENDS
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_params_of_a_wrong_type_are_named(backend, grad, autocast):
    net, x = block(torch.channels_last)
    params = [p.detach().requires_grad_(grad) for p in net.parameters()]
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        for wrong, message in (
            (dict(net.named_parameters()), "params must be a sequence of 12 tensors, got dict"),
            (net.parameters(), "params must be a sequence of 12 tensors, got generator"),
            (net, r"got Inception: pass list\(block\.parameters\(\)\)"),
            ([*params[:3], None, *params[4:]], r"params must be tensors, got NoneType as params\[3\]"),
            ([p.detach().cpu().numpy() for p in params], r"params must be tensors, got ndarray as params\[0\]"),
        ):
            with pytest.raises(TypeError, match=message):
                inception(x, wrong, backend=backend)
        expected = inception(x, params, backend=backend)
        for right in (tuple(params), nn.ParameterList(params)):
            torch.testing.assert_close(inception(x, right, backend=backend), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["ReLU", "gelu", None])
def test_unknown_activation(activation):
    net, x = block(torch.channels_last)
    with pytest.raises(ValueError, match=r"activation must be one of 'relu', 'none', got "):
        inception(x, list(net.parameters()), activation=activation)


def test_a_call_like_an_earlier_one_is_not_checked_again(monkeypatch):
    configs.forget()
    net, x = block(torch.channels_last)
    params, checked = [p.detach() for p in net.parameters()], []
    check = functional._check_input
    monkeypatch.setattr(functional, "_check_input", lambda *args: checked.append(args[0].shape[0]) or check(*args))
    first = inception(x, params)
    assert torch.equal(inception(x.clone(), [p.clone() for p in params]), first)
    assert checked == [3]
    assert torch.equal(inception(x[:2], params), first[:2])
    assert checked == [3, 2]
    monkeypatch.setattr(replay, "TensorGuards", None)  # another PyTorch may have none
    configs.forget()
    for _ in range(2):
        assert torch.equal(inception(x, params), first)
    assert checked == [3, 2, 3, 3]


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, torch.Tensor.double, TypeError, "p1_1's weight"),
        (9, torch.Tensor.bfloat16, TypeError, "p3_2's bias"),
        (4, lambda w: w[:, :, :1], ValueError, r"p2_2's weight must be \[c, 3, 3, 3\]"),
        (11, lambda b: b[:-1], ValueError, "p4_2's bias must be"),
        (3, lambda b: b.to("meta"), ValueError, "on one device"),
        (6, lambda w: w.tolist(), TypeError, r"got list as params\[6\]"),
    ],
)
def test_what_does_not_fit_is_named_behind_a_call_that_did(place, change, error, message):
    net, x = block(torch.channels_last)
    params = [p.detach() for p in net.parameters()]
    for _ in range(2):
        inception(x, params)
    with pytest.raises(error, match=message):
        inception(x, [*params[:place], change(params[place]), *params[place + 1 :]])
    with pytest.raises(ValueError, match="x must have 7 channels, got 6"):
        inception(x[:, :6], params)
    with pytest.raises(ValueError, match="backend must be one of"):
        inception(x, params, backend="cuda")


def test_special_operands_behind_a_call_without_them():
    """What only standard operators serve, of the same sizes as what was seen."""
    net, x = block(torch.channels_last)
    params = [p.detach() for p in net.parameters()]
    for _ in range(2):
        expected = inception(x, params)
    doubled = TwoTensor(x, x)
    for _ in range(2):
        assert type(inception(doubled, params)) is TwoTensor
    assert torch.equal(inception(x._neg_view(), params), inception(-x, params))
    torch.testing.assert_close(torch.func.vmap(lambda x: inception(x[None], params)[0])(x), expected)
    with forward_ad.dual_level():
        y = inception(forward_ad.make_dual(x, torch.ones_like(x)), params)
        assert forward_ad.unpack_dual(y).tangent.abs().sum() > 0
    with FlopCounterMode(display=False) as counter:
        inception(x, params)
    assert counter.get_total_flops() > 0
    fake = FakeTensorMode(shape_env=ShapeEnv())
    with fake:
        symbolic = [fake.from_tensor(t) for t in (x, *params)]
        for _ in range(2):
            assert inception(symbolic[0], symbolic[1:]).shape == expected.shape


@pytest.mark.parametrize("backend", ["aten", pytest.param("triton", marks=needs_triton)])
def test_the_memory_format_is_plains_whatever_the_weights_have(backend):
    plain = Inception(3, 2, (2, 3), (2, 2), 2)
    weights = [p for p in plain.parameters() if p.dim() == 4]
    x = torch.randn(2, 3, 4, 5)
    for formats in itertools.product((torch.contiguous_format, torch.channels_last), repeat=len(weights)):
        for weight, format in zip(weights, formats, strict=True):
            weight.data = weight.data.to(memory_format=format)
        with torch.no_grad():
            y = inception(x, list(plain.parameters()), backend=backend)
            assert y.stride() == plain(x).stride(), formats


class Marked(Tensor):
    """A subclass, which PyTorch asks about each operator on it."""


@BACKENDS
def test_gradients_are_plain_tensors_whatever_comes_upstream(backend):
    """Also from a backward like an earlier one, of which Triton knows the launches."""
    plain = Inception(3, 2, (2, 3), (2, 2), 2)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = inception(x, list(plain.parameters()), backend=backend)
    inputs, upstream = [x, *plain.parameters()], torch.ones_like(y).as_subclass(Marked)
    for _ in range(3):
        assert {type(grad) for grad in torch.autograd.grad(y, inputs, upstream, retain_graph=True)} == {Tensor}
