"""What a device decides: all that a block's operands may be, in bf16, and streams, graphs, early launches, large sizes.

The first half runs in the interpreter, too, in fp16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.agreement import Errors, check
from bench.gpu.baselines import truncated
from bench.gpu.case import Context
from bench.gpu.kernels import Block, Shape
from bench.gpu.timing import HostTimer
from fastinception import FastInception, GoogLeNet, Inception
from fastinception.googlenet import WIDTHS, Widths
from fastinception.kernels import replay, target
from tests import fresh

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")

DEVICE, LOW = ("cpu", torch.float16) if target.interpreted() else ("cuda", torch.bfloat16)
SMALL = Widths(24, 16, (16, 24), (8, 16), 8)
NEAR_ZERO = 0.06  # beyond what bfloat16 moves a sum


def _pair(
    widths: Widths, dtype: torch.dtype, format: torch.memory_format = torch.channels_last
) -> tuple[nn.Module, FastInception]:
    """Return the plain block and the fast one with the same random numbers."""
    torch.manual_seed(0)
    plain = Inception(*widths)
    for p in plain.parameters():
        nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
    plain = plain.to(DEVICE, dtype).to(memory_format=format)
    fast = FastInception(*widths, backend="triton").to(DEVICE, dtype).to(memory_format=format)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def _images(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return random images in channels_last, made in place: some are larger than half of what is left."""
    n, channels, height, width = shape
    return torch.randn(n, height, width, channels, dtype=dtype, device=DEVICE).permute(0, 3, 1, 2)


def _misaligned(t: Tensor) -> Tensor:
    """Return a copy that starts one element behind an aligned address."""
    own = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].as_strided(t.shape, t.stride())
    return own.copy_(t.detach())


def _step(block: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, params: list[Tensor]) -> dict[str, Tensor]:
    """Return the output and all gradients by name."""
    x = x.detach().requires_grad_()
    y = block(x)
    grads = torch.autograd.grad(y, [x, *params], grad)
    return {"output": y.detach()} | {str(i): g for i, g in enumerate(grads)}


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    off = {name: float((found[name].double() - want).norm() / want.norm()) for name, want in truth.items()}
    return Errors(off.pop("output"), off, max(off.values(), default=0.0))


def _before_relu(block: Inception, x: Tensor) -> Tensor:
    """Return the block's output before its last ReLUs."""
    found = []
    convs = (block.p1_1, block.p2_2, block.p3_2, block.p4_2)
    handles = [conv.register_forward_hook(lambda *args: found.append(args[-1])) for conv in convs]
    block(x)
    for handle in handles:
        handle.remove()
    return torch.cat(found, dim=1)


def _check_step(
    widths: Widths,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    format: torch.memory_format = torch.channels_last,
    *,
    misaligned: bool = False,
    expanded: bool = False,
) -> Errors:
    """Check output and gradients by the rule of twice plain's error, in TF32 of truncation's; return the block's.

    ``misaligned``: of x and all parameters. ``expanded``: the output's gradient is one number.
    """
    plain, fast = _pair(widths, dtype, format)
    n, height, width = shape
    x = _images(n, widths.in_channels, height, width, dtype=dtype).contiguous(memory_format=format)
    with torch.no_grad():
        exact = Inception(*widths).to(DEVICE, torch.float64)
        exact.load_state_dict(plain.state_dict())
        before_relu = _before_relu(exact, x.double())
    grad = torch.randn_like(plain(x))
    if expanded:
        grad = grad[0, 0, 0, 0].expand_as(grad)
    elif dtype is torch.bfloat16:
        # Where rounding moves a number across a ReLU's zero, a gradient jumps by more than is allowed, and the library
        # rounds twice what the kernels round once: of right blocks, simulated, up to 7 in 100 would fail.
        grad *= before_relu.abs() > NEAR_ZERO
    if misaligned:
        x, grad = _misaligned(x), _misaligned(grad)
        for p in fast.parameters():
            p.data = _misaligned(p)
        assert {t.data_ptr() % 16 for t in (x, grad, *fast.parameters())} == {dtype.itemsize}
    truth = _step(exact, x.double(), grad.double(), list(exact.parameters()))
    errors = {
        name: _errors(_step(block, x, grad, list(block.parameters())), truth)
        for name, block in (("plain", plain), ("fast", fast))
    }
    usual = errors["plain"]
    if target.input_precision(dtype, target.gpu(x.device)) == "tf32":
        # Triton's products drop the bits that TF32 lacks, where the library's may round.
        cut = truncated(exact)
        usual = _errors(_step(cut, x.double(), grad.double(), list(cut.parameters())), truth)
    check(f"{widths} {shape} {dtype}", errors["fast"], usual)
    out = torch.full(grad.shape, torch.nan, dtype=dtype, device=DEVICE).contiguous(memory_format=format)
    out = _misaligned(out) if misaligned else out
    with torch.no_grad():
        assert fast(x, out=out) is out
    check(f"out= {widths} {shape} {dtype}", _errors({"output": out}, {"output": truth["output"]}), usual)
    return errors["fast"]


# In a process that believes in a GPU: which tests run, and where their kernels do.
SELECTED = """
import json, sys
import pytest, torch

torch.cuda.is_available = lambda: True

class Found:
    def pytest_collection_finish(self, session):
        from fastinception.kernels import target

        items = [item for item in session.items if item.get_closest_marker("skip") is None]
        print("\\nFOUND", json.dumps([sorted({item.originalname for item in items}), target.interpreted()]))

sys.exit(pytest.main(["-q", "--collect-only", "tests/test_gpu.py", "tests/test_block.py", *OPTIONS], plugins=[Found()]))
"""


def test_on_a_gpu_a_run_is_for_it_or_for_the_interpreter():
    found = {}
    for options in ("[]", "['-m', 'gpu']"):
        printed = fresh.run(SELECTED.replace("*OPTIONS", f"*{options}"))
        (line,) = (line for line in printed.splitlines() if line.startswith("FOUND"))
        found[options] = json.loads(line.removeprefix("FOUND"))
    (usual, interpreted), (selected, not_interpreted) = found.values()
    assert interpreted
    assert not not_interpreted
    assert {"test_both_layouts", "test_unneeded_gradients_are_not_computed"} < set(usual)
    assert "test_the_same_bits_twice" not in usual
    assert {"test_both_layouts", "test_the_same_bits_twice", "test_the_backward_stays_inside_its_tensors"} < set(
        selected
    )
    assert "test_unneeded_gradients_are_not_computed" not in selected


@pytest.mark.device
@pytest.mark.parametrize("dtype", [LOW, torch.float16, torch.float32])
def test_small_block_forward_and_backward(dtype):
    _check_step(SMALL, (2, 5, 7), dtype)


@pytest.mark.device
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(7, 7), (6, 5), (6, 6), (4, 4)])  # pixels that 1, 2, 4 and 16 divide
def test_both_layouts(size, format):
    _check_step(SMALL, (3, *size), LOW, format)


@pytest.mark.device
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("widths", [Widths(17, 15, (9, 33), (5, 13), 7), Widths(12, 4, (8, 20), (4, 4), 12)])
def test_widths_that_8_does_not_divide(widths, format):
    _check_step(widths, (2, 5, 7), LOW, format)


@pytest.mark.device
def test_a_step_of_one_pixel_of_many_images():
    _check_step(SMALL, (128, 3, 3), LOW)


@pytest.mark.device
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_operands_that_are_not_aligned(format):
    _check_step(SMALL, (2, 6, 6), LOW, format, misaligned=True)


@pytest.mark.device
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_a_gradient_of_one_number(format):
    _check_step(SMALL, (2, 6, 6), LOW, format, expanded=True)


@pytest.mark.device
def test_the_stem_in_few_launches(monkeypatch):
    launched, launch = [], replay.launch

    def noted(kernel, *args):
        launched.append((kernel.fn.__name__, args[2] is not None))  # a pool by itself has no bias
        return launch(kernel, *args)

    monkeypatch.setattr(replay, "launch", noted)
    torch.manual_seed(0)
    net = GoogLeNet(block=partial(FastInception, backend="triton"), in_channels=3).to(DEVICE, LOW)
    net = net.to(memory_format=torch.channels_last)
    x = _images(3, 3, 33, 30, dtype=LOW)
    x[0, 0, 0, 0], x[1, 0, -1, -1] = torch.nan, -torch.inf
    for stage in net[:2]:
        with torch.inference_mode():
            found = stage(x)
            expected = nn.Sequential(*stage)(x)
        assert expected.isnan().any()
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, equal_nan=True)
        assert found.stride() == expected.stride()
        x = expected.nan_to_num(1.0, 1.0, 0.0)
        x[2, 5, 3, 2] = torch.nan
    assert launched == [("_max_pool_kernel", True), ("_spatial_kernel", True), ("_max_pool_kernel", True)]


@pytest.mark.device
@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem_trains(channels):
    """With twice the layers' own errors, which come from single pixels across a ReLU's zero, or equal in a window."""
    torch.manual_seed(0)
    net = GoogLeNet(block=partial(FastInception, backend="triton"), in_channels=channels)[:2]
    net = net.to(DEVICE, LOW).to(memory_format=torch.channels_last)
    x, params = _images(3, channels, 33, 30, dtype=LOW), [*net.parameters()]
    y = net(x)
    assert "max_pool_relu" in type(y.grad_fn).__name__
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, params, grad)
    plain = nn.Sequential(*(nn.Sequential(*stage) for stage in net))
    own = torch.autograd.grad(plain(x), params, grad)
    exact = torch.autograd.grad(plain.double()(x.double()), [*plain.parameters()], grad.double())

    def error(grads: tuple[Tensor, ...]) -> float:
        return sum(float((grad - right).norm() / right.norm()) for grad, right in zip(grads, exact, strict=True))

    assert error(found) <= 2 * error(own)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["3a", "4d", "5b"])
def test_bf16_blocks_of_the_network(name):
    _check_step(WIDTHS[name], (3, 7, 9), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_follows_the_convolutions_switch(tf32):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        error = _check_step(WIDTHS["3a"], (2, 7, 7), torch.float32).output
    # TF32 keeps 10 bits of a product's operands, and no card's TF32 is as exact as float32.
    assert (error < 1e-5) != tf32 or not _has_tf32()


def _has_tf32() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.gpu
def test_a_step_is_two_launches_and_six():
    """By the device's own account, behind the call in which kernels are compiled."""
    _, fast = _pair(SMALL, torch.bfloat16)
    x = _images(2, SMALL.in_channels, 9, 9, dtype=torch.bfloat16)
    grad = torch.randn_like(fast(x))

    def ran() -> list[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            _step(fast, x, grad, list(fast.parameters()))
            torch.cuda.synchronize()
        return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]

    ran()
    names = ("entry", "spatial", "split", "data_gradient", "pool_gradient", "entry_gradient", "weight_gradient", "sum")
    assert ran() == [f"_{name}_kernel" for name in names]


@pytest.mark.gpu
def test_the_same_bits_twice():
    _, fast = _pair(WIDTHS["3b"], torch.bfloat16)
    x = _images(4, WIDTHS["3b"].in_channels, 14, 14, dtype=torch.bfloat16)
    grad = torch.randn_like(fast(x))
    first, second = (_step(fast, x, grad, list(fast.parameters())) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
def test_a_side_stream_is_waited_for_and_used():
    """The input is written late on the side stream: a launch on any other stream reads zeros."""
    _, fast = _pair(SMALL, torch.bfloat16)
    values = _images(2, SMALL.in_channels, 9, 9, dtype=torch.bfloat16)
    grad = torch.randn_like(fast(values))
    params = list(fast.parameters())
    expected = _step(fast, values, grad, params)
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.copy_(values)
        found = _step(fast, x, grad, params)
    side.synchronize()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.gpu
def test_a_cuda_graph_replays_on_new_input():
    _, fast = _pair(SMALL, torch.bfloat16)
    params = list(fast.parameters())
    batches = [_images(2, SMALL.in_channels, 9, 9, dtype=torch.bfloat16) for _ in range(3)]
    grad = torch.randn_like(fast(batches[0]))
    expected = [_step(fast, x, grad, params) for x in batches]
    static = batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _step(fast, static, grad, params)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _step(fast, static, grad, params)
    for x, want in zip(batches, expected, strict=True):
        static.copy_(x)
        graph.replay()
        for name in want:
            assert torch.equal(found[name], want[name]), name


@pytest.mark.gpu
def test_reduce_overhead_computes_what_eager_computes():
    _, fast = _pair(SMALL, torch.bfloat16)
    compiled = torch.compile(fast, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):  # the graph is recorded in the second call
            x = _images(2, SMALL.in_channels, 9, 9, dtype=torch.bfloat16)
            assert torch.equal(compiled(x).clone(), fast(x))


@pytest.mark.gpu
def test_launches_that_start_early_wait_for_what_they_read():
    """Twenty times two dependent launches over poison; one that does not wait reads it."""
    context = Context(torch.device(DEVICE), False, HostTimer(torch.device(DEVICE)), Path(), 0.0)
    block = Block(Shape("3a", WIDTHS["3a"], 64, 96), context)
    entry, spatial = (replace(block.tiles(level, tuned=False), launch_pdl=True) for level in ("entry", "spatial"))

    def both() -> None:
        block.entry(entry)
        block.spatial(spatial, chained=True)

    for _ in range(20):
        check("early launches", block.launched("block", both).errors, block.plain("block").errors)


# 513 images of 256x256 pixels with 64 channels: 2^31 elements and 4,194,304 more, in and out.
HUGE = Widths(64, 16, (16, 16), (16, 16), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_more_elements_than_int32_can_count(backward):
    if torch.cuda.mem_get_info()[0] < (60 if backward else 20) * 10**9:
        pytest.skip("needs 20 GB of free memory, 60 with the backward")
    _, fast = _pair(HUGE, torch.bfloat16)
    x = _images(513, HUGE.in_channels, 256, 256, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    last = x[-1:].clone(memory_format=torch.channels_last)
    if not backward:
        with torch.inference_mode():
            found, expected = {"output": fast(x)[-1:]}, {"output": fast(last)}
    else:
        grad = _images(513, 64, 256, 256, dtype=torch.bfloat16)
        found = {name: t[-1:] for name, t in _step(fast, x, grad, []).items()}
        expected = _step(fast, last, grad[-1:].clone(memory_format=torch.channels_last), [])
    for name, want in expected.items():
        # Not bit by bit: a table of tuned tiles may sum in another order for one image.
        error = float((found[name].float() - want.float()).norm() / want.float().norm())
        assert error < 1e-2, f"{name} is off by {error:.2e}"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    _, fast = _pair(SMALL, torch.bfloat16)
    x = _images(2, SMALL.in_channels, 9, 9, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = fast(x)
        for _ in range(2):  # planned, then known
            assert torch.equal(fast.to("cuda:1")(x.to("cuda:1")).to(DEVICE), expected)
