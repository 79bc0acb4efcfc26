"""The functional form where it offers more than the module: the block without its ReLUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastinception import Inception, functional
from fastinception.functional import inception
from fastinception.kernels import configs, target

DEVICE = "cpu" if target.unsupported(torch.device("cpu"), torch.float64) is None else "cuda"
HAS_TRITON = target.unsupported(torch.device(DEVICE), torch.float32) is None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here")
TRITON = pytest.param("triton", marks=needs_triton)
BACKENDS = pytest.mark.parametrize("backend", ["aten", TRITON])
FORMATS = pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")


def block(format: torch.memory_format) -> tuple[Inception, Tensor]:
    torch.manual_seed(0)
    net = Inception(7, 5, (3, 9), (2, 6), 4).to(DEVICE)
    return net, torch.randn(3, 7, 4, 5, device=DEVICE).contiguous(memory_format=format)


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
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
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


@pytest.mark.parametrize("activation", ["ReLU", "gelu", None])
def test_unknown_activation(activation):
    net, x = block(torch.channels_last)
    with pytest.raises(ValueError, match=r"activation must be one of 'relu', 'none', got "):
        inception(x, list(net.parameters()), activation=activation)


# A call like an earlier one: its checks and its launches are known.


def call(net: Inception, x: Tensor, **options) -> Tensor:
    return inception(x, [p.detach() for p in net.parameters()], backend="triton", **options)


@pytest.fixture
def planned():
    """A block and an input with which one inference call was made."""
    configs.forget()
    net, x = block(torch.channels_last)
    call(net, x)
    yield net, x
    configs.forget()


@needs_triton
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_known_call_goes_straight_to_its_launches(planned, mode, monkeypatch):
    net, x = planned
    with mode():
        first, expected = call(net, x), net(-x)
        monkeypatch.setattr(functional, "prepare", lambda *args: pytest.fail("a known call was checked again"))
        second = call(net, -x)  # other numbers
    torch.testing.assert_close(first, net(x))
    torch.testing.assert_close(second, expected)
    assert second.stride() == first.stride()
    assert second.is_inference() is (mode is torch.inference_mode)


@needs_triton
def test_a_known_call_follows_the_parameters(planned):
    net, x = planned
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(call(net, x), net(x))
        net.p1_1 = torch.nn.Conv2d(7, 5, 1).to(DEVICE)
        torch.testing.assert_close(call(net, x), net(x))


def misaligned(t: Tensor) -> Tensor:
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].view(t.shape).copy_(t)


@needs_triton
@pytest.mark.parametrize(
    "change", ["batch", "layout", "slice", "width", "weights' layout", "expanded bias", "misaligned weight", "float16"]
)
def test_another_call_is_not_taken_for_a_known_one(planned, change):
    net, x = planned
    with torch.no_grad():
        if change == "batch":
            x = torch.cat((x, x))
        elif change == "layout":
            x = x.contiguous()
        elif change == "slice":
            x = torch.cat((x, x), dim=1).contiguous(memory_format=torch.channels_last)[:, :7]
        elif change == "width":
            net.p1_1.weight.data, net.p1_1.bias.data = net.p1_1.weight[:3], net.p1_1.bias[:3]
        elif change == "weights' layout":
            net.to(memory_format=torch.channels_last)
        elif change == "expanded bias":
            net.p2_2.bias.data = torch.ones(1, device=DEVICE).expand(9)
        elif change == "misaligned weight":
            net.p2_1.weight.data = misaligned(net.p2_1.weight)
        else:
            net, x = net.half(), x.half()
        assert not functional._known(x, [p.detach() for p in net.parameters()], "triton", True)
        for _ in range(2):  # planned, then known
            y = call(net, x)
            assert y.is_contiguous(memory_format=torch.contiguous_format if change == "layout" else torch.channels_last)
            tolerance = {"rtol": 2e-2, "atol": 2e-3} if change == "float16" else {}
            torch.testing.assert_close(y, net(x), **tolerance)


@needs_triton
@pytest.mark.parametrize("wrong", ["dtype", "channels", "width", "device", "backend"])
def test_a_bad_call_is_an_error_after_a_known_one(planned, wrong):
    net, x = planned
    params = [p.detach() for p in net.parameters()]
    backend = "Triton" if wrong == "backend" else "triton"
    if wrong == "dtype":
        params[4] = params[4].double()
    elif wrong == "channels":
        x = torch.randn(3, 8, 4, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    elif wrong == "width":
        params[3] = params[3][:2]
    elif wrong == "device":
        params[2] = params[2].to("meta")
    with pytest.raises((TypeError, ValueError)):
        inception(x, params, backend=backend)


@needs_triton
def test_what_watches_a_call_meets_it_after_a_known_one(planned):
    net, x = planned
    params = [p.detach() for p in net.parameters()]

    def run(x: Tensor) -> Tensor:
        return inception(x, params, backend="triton")

    expected = net(x).detach()
    stacked = torch.stack((x, -x))
    torch.testing.assert_close(torch.vmap(run)(stacked), torch.stack((expected, net(-x))))
    _, tangent = torch.func.jvp(run, (x,), (x,))
    torch.testing.assert_close(tangent, torch.func.jvp(net, (x,), (x,))[1])
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(x, x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    assert inception(x, list(net.parameters()), backend="triton").requires_grad
    assert run(x.clone().requires_grad_()).requires_grad
    with torch.autocast(DEVICE, torch.float16):
        assert run(x).dtype is torch.float16
    torch.testing.assert_close(run(torch._neg_view(-x)), expected)
    relus = [y.min() >= 0 for y in (run(x), call(net, x, activation="none"), run(x), call(net, x, activation="none"))]
    assert relus == [True, False, True, False]


@needs_triton
@pytest.mark.parametrize("special", ["library", "empty"])
def test_what_takes_more_than_two_launches_is_never_planned(planned, special, monkeypatch):
    net, x = planned
    if special == "library":
        tiles = configs.Tiles(32, 32, 16, num_warps=4, num_stages=1, library=True)
        monkeypatch.setitem(configs.DEFAULTS, "spatial", lambda dtype, chip: tiles)
        configs.forget()
    else:
        x = x[:0]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(call(net, x), net(x))
            assert not functional._known(x, [p.detach() for p in net.parameters()], "triton", True)


@needs_triton
def test_known_calls_are_forgotten_with_their_tiles(planned):
    net, x = planned
    with torch.no_grad():
        assert functional._known(x, list(net.parameters()), "triton", True) == []  # of parameters, not of detached ones
        params = [p.detach() for p in net.parameters()]
        assert len(functional._known(x, params, "triton", True)) == 1
        configs.forget()
        assert functional._known(x, params, "triton", True) == []
