"""The stem's stages by Triton, in eager mode: fewer launches than layers, and their numbers."""

from __future__ import annotations

import functools
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from fastinception import FastInception, GoogLeNet, backends
from fastinception.kernels import target
from fastinception.stem import Stage
from tests.stages import CL, integers, layers, of_integers


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Return a list that gets the name of each kernel that is launched, but for a pool by itself."""
    pytest.importorskip("triton")
    from fastinception.kernels import replay

    made: list[str] = []
    original = replay.launch

    def launch(kernel, how, x, bias, *others):
        if bias is not None:
            made.append(kernel.fn.__name__)
        return original(kernel, how, x, bias, *others)

    monkeypatch.setattr(replay, "launch", launch)
    return made


needs_interpreter = pytest.mark.skipif(not target.interpreted(), reason="runs in Triton's interpreter, on CPU tensors")
LAUNCHED = [["_max_pool_kernel"], ["_spatial_kernel", "_max_pool_kernel"]]
FIRST = ["_first_layer_kernel"]  # of images of one channel, with bias and ReLU, and a pool by itself


def by_triton(which: int, channels: int = 3, height: int = 25, width: int = 22) -> tuple[Stage, Tensor]:
    """Return the first or the second stage, of small integers, which asks for Triton, and three images of it.

    Their sums are exact in float16, too: what is rounded depends on the order of sums, and that on the cores.
    """
    own, x = of_integers(which, 3, channels, height, width)
    if which == 1:
        x = x.clamp(-1, 1)
    own.backend = "triton"
    return own.to(memory_format=CL), x.contiguous(memory_format=CL)


def by_aten(own: Stage, x: Tensor) -> Tensor:
    """Return what the stage computes without Triton, in float32 where this CPU is slower in another dtype."""
    return cast(Tensor, Stage(*own, backend="aten")(x))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("which", [0, 1])
def test_inference_is_that_of_the_layers(which, dtype, launches):
    for channels, height, width in ((1, 25, 22), (3, 8, 9), (4, 1, 2)):
        launches.clear()
        own, x = by_triton(which, channels, height, width)
        own, x = own.to(dtype), x.to(dtype)
        x[0, 0, 0, 0], x[1, 0, -1, -1], x[2, 0, 0, -1] = torch.nan, torch.inf, -torch.inf
        with torch.no_grad():
            found = own(x)
            assert launches == (FIRST if x.shape[1] == 1 else LAUNCHED[which])
            expected = layers(own)(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert found.is_contiguous(memory_format=CL)
        assert expected.isnan().any()
        assert expected.isinf().any() or height == 1 or which == 1  # where infinities meet weights of 0


@needs_interpreter
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", ["format", "autocast", "dtype", "mode", "compiled", "global hook", "padding"])
def test_where_triton_does_not_serve_the_layers_run(change, which, launches, passing):
    own, x = by_triton(which)
    run, expected = own, functools.partial(by_aten, own) if change == "autocast" else layers(own)
    with torch.no_grad():
        for p in own.parameters():
            p.normal_()  # another way would round otherwise
    if change == "format":
        own, x = own.to(memory_format=torch.contiguous_format), x.contiguous()
    if change == "dtype":
        x = x.double()
    if change == "padding":
        for conv in (own[0], own[-3]):
            conv.padding_mode = "circular"
    if change == "compiled":
        run = torch.compile(own, backend="aot_eager", fullgraph=True)
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None) if change == "global hook" else None
    mode = passing() if change == "mode" else torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast")
    results = []
    for function in (run, expected):
        with torch.no_grad(), mode:
            try:
                results.append(function(x))
            except RuntimeError as error:
                results.append(str(error))
    if hook is not None:
        hook.remove()
    assert launches == []
    if change == "dtype":
        assert results[0] == results[1]
    else:
        assert torch.equal(*results)


TRAINED = ["_max_pool_kernel", "_max_pool_gradient_kernel", "_sum_kernel"]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("which", "channels"), [(0, 1), (0, 3), (1, 64)])
def test_training_is_that_of_the_layers(which, channels, dtype, launches):
    """Of numbers whose sums are exact: values and all gradients are the same, with ties in most windows."""
    own, x = by_triton(which, channels, *((25, 22), (13, 12))[which])
    own, x = own.to(dtype), x.to(dtype)
    if which == 1:
        x.requires_grad_()
    results = []
    for run in (own, layers(own)):
        y = run(x)
        upstream = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        inputs = [*own.parameters(), *([x] if x.requires_grad else [])]
        results.append([y, *torch.autograd.grad(y, inputs, upstream)])
        if run is own and channels == 1:  # the convolution's launch adds the bias, and sums its gradient
            assert launches[-2:] == ["_first_layer_gradient_kernel", "_sum_kernel"]
            assert "_max_pool_gradient_kernel" in launches
        elif run is own:
            assert launches == TRAINED
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() <= 2048
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


@needs_interpreter
@pytest.mark.parametrize("frozen", ["nothing", "bias", "weight", "convolution"])
def test_what_is_frozen_gets_no_gradient(frozen, launches):
    own, x = by_triton(1)
    conv = own[2]
    for name, p in conv.named_parameters():
        p.requires_grad_(frozen not in (name, "convolution"))
    inputs = [p for p in own.parameters() if p.requires_grad]
    found, expected = (torch.autograd.grad(run(x).sum(), inputs) for run in (own, layers(own)))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert launches == (TRAINED if conv.bias.requires_grad else TRAINED[:2])


@needs_interpreter
def test_training_under_autocast_is_in_its_dtype(launches):
    """In float16, which the kernels take on a CPU; layers in front may be computed in float32 there."""
    own, x = by_triton(1, height=9, width=8)
    results = []
    for run in (own, layers(own)):
        with torch.autocast("cpu", torch.float16):
            y = run(x)
        upstream = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, [*own.parameters()], upstream)])
    assert launches == TRAINED
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() <= 2048
        assert torch.equal(ours, theirs)
    own[2].bias.data[:96] = 2049  # 2048 in float16
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(own(x), layers(own)(x))


@needs_interpreter
def test_the_output_may_be_changed_before_the_backward():
    own, x = by_triton(1)
    params = [*own.parameters()]
    y = own(x)
    y.mul_(2)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), params), torch.autograd.grad(2 * layers(own)(x).sum(), params), strict=True
    ):
        assert torch.equal(ours, theirs)


@needs_interpreter
@pytest.mark.parametrize("place", range(5))
def test_where_one_is_hooked_all_layers_are_called(place, launches):
    own, x = by_triton(1)
    seen: list[Tensor] = []
    own[place].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert torch.equal(own(x), layers(own)(x))
    assert torch.equal(*seen)
    assert launches == []


@needs_interpreter
def test_a_convolution_of_one_channel_in_nchw(launches):
    """The images have both formats, and the result has the weight's."""
    own, x = by_triton(0, 1)
    own, x = own.to(memory_format=torch.contiguous_format), x.contiguous()
    assert x.is_contiguous(memory_format=CL)
    with torch.no_grad():
        found, expected = own(x), layers(own)(x)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@needs_interpreter
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float16, 0.0), (torch.float64, 1e-14)])
@pytest.mark.parametrize("which", [0, 1])
def test_all_is_as_exact_as_by_the_layers(which, dtype, exact, launches):
    own, x = by_triton(which)
    for p in own.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5)
    torch.manual_seed(0)
    x = torch.randn(x.shape).contiguous(memory_format=CL)
    own, x = own.to(dtype), x.to(dtype)
    with torch.no_grad():
        found, plain = own(x), layers(own)(x)
        truth = layers(own.double())(x.double())
    assert launches == LAUNCHED[which]
    assert (found - truth).norm() <= 2 * (plain - truth).norm() + exact * truth.norm()


@needs_interpreter
@pytest.mark.parametrize("which", [0, 1])
def test_a_weight_of_another_kernel_is_that_of_the_layers(which, launches):
    own, x = by_triton(which)
    with torch.no_grad():
        for conv in (own[0], own[-3]):
            conv.weight = nn.Parameter(integers(*conv.weight.shape[:2], 5, 5, high=4))
        assert torch.equal(own(x), layers(own)(x))
    assert launches == []


@needs_interpreter
def test_without_a_bias_and_with_other_pools_the_layers_run(launches):
    for conv, pool in (
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.MaxPool2d(3, 2, 1)),
        (nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.MaxPool2d(3, 2, 1)),
        (nn.Conv2d(3, 6, 3, padding=2, dilation=2), nn.MaxPool2d(3, 2, 1)),
    ):
        own = Stage(conv, nn.ReLU(), pool, backend="triton").to(memory_format=CL)
        x = torch.randn(2, 3, 8, 8).contiguous(memory_format=CL)
        with torch.no_grad():
            assert torch.equal(own(x), layers(own)(x))
    assert launches == []


@needs_interpreter
def test_operands_of_two_devices_are_not_launched():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 1, 1)
    assert backends.by_triton("triton", x, weight)
    assert not backends.by_triton("triton", x, weight.to("meta"))


def strided(t: Tensor) -> nn.Parameter:
    """Return a parameter like ``t`` that has twice its steps in memory."""
    return nn.Parameter(torch.stack((t.detach(), t.detach()), -1)[..., 0])


@needs_interpreter
@pytest.mark.parametrize(
    ("change", "launched"),
    [
        ("nothing", LAUNCHED[1]),
        ("strided weight", LAUNCHED[0]),
        ("strided bias", LAUNCHED[0]),
        ("strided last bias", ["_spatial_kernel"]),
        ("stride", LAUNCHED[0]),
        ("padding", LAUNCHED[0]),
        ("no bias", LAUNCHED[0]),
        ("many pixels", ["_spatial_kernel"]),
        ("one channel", []),
    ],
)
def test_what_the_kernels_do_not_read_is_left_to_the_layers(change, launched, launches, monkeypatch):
    """With a gradient asked of none, so that a mode is not what keeps it from them."""
    torch.manual_seed(0)
    options = {"stride": {"stride": 2}, "padding": {"padding": 1}, "no bias": {"bias": False}}.get(change, {})
    padding = 2 if change == "many pixels" else 1
    channels = 1 if change == "one channel" else 8
    first, last = nn.Conv2d(channels, 16, 1, **options), nn.Conv2d(16, 8, 3, padding=padding)
    own = Stage(first, nn.ReLU(), last, nn.ReLU(), nn.MaxPool2d(3, 2, 1), backend="triton")
    x = torch.randn(2, channels, 9, 8)
    if change != "one channel":  # such images have both formats, and the convolution the weight's
        own, x = own.to(memory_format=CL), x.contiguous(memory_format=CL)
    if change == "strided weight":
        first.weight = strided(first.weight)
    if change == "strided bias":
        first.bias = strided(first.bias)
    if change == "strided last bias":
        last.bias = strided(last.bias)
    if change == "many pixels":
        monkeypatch.setattr(backends, "_MOST_PIXELS", 2 * 9 * 8)
    own.requires_grad_(False)
    found, expected = own(x), layers(own)(x)
    assert launches == launched
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("backend", ["auto", "aten", "triton"])
def test_the_network_around_the_blocks_has_their_backend(backend):
    net = GoogLeNet(block=functools.partial(FastInception, backend=backend))
    assert {stage.backend for stage in net[:4]} == {net[2][0].backend}


@needs_interpreter
def test_an_empty_batch_and_wrong_images_are_those_of_the_layers(launches):
    own, x = by_triton(0)
    with torch.no_grad():
        assert own(x[:0]).shape == (0, 64, 7, 6)
        for which, channels in ((0, 4), (1, 63)):
            own, x = by_triton(which)
            other = torch.empty(2, channels, 48, 48).contiguous(memory_format=CL)
            for wrong in (other, x[0, 0], x.to(torch.int32)):
                with pytest.raises((RuntimeError, ValueError)) as expected:
                    layers(own)(wrong)
                with pytest.raises(type(expected.value)) as found:
                    own(wrong)
                assert str(found.value) == str(expected.value)
    assert launches == []
