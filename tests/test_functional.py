"""The functional form where it offers more than the module: the block without its ReLUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastinception import Inception
from fastinception.functional import inception
from fastinception.kernels import target

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
        y = inception(x, list(net.parameters()), backend=backend, activation="none")
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


@needs_triton
def test_what_has_no_backward_is_not_saved_for_one():
    net, x = block(torch.channels_last)
    with pytest.raises(ValueError, match="save=False was expected"):
        torch.ops.fastinception.triton_forward(x, *net.parameters(), True, False)


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
