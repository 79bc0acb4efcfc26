"""The block as launches: how many, of what, what is kept between them, and that their sums have one order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")


from bench import memory
from fastinception import FastInception, Inception
from fastinception.googlenet import WIDTHS
from fastinception.kernels import block as launches
from fastinception.kernels import configs, entry, library, target
from tests.poisoned import Memory

DEVICE = "cpu" if target.interpreted() else "cuda"
SMALL = (16, 9, (4, 8), (3, 5), 7)
PARAMS = [f"{conv}.{kind}" for conv in ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2") for kind in ("weight", "bias")]
# What a single gradient takes: the branches split off, the convolutions whose data gradient it needs, and the rest.
NEEDS: dict[str, dict[str, int]] = {
    "x": {"split": 4, "data_gradient": 3, "pool_gradient": 1, "entry_gradient": 1},
    "p1_1.weight": {"split": 1, "weight_gradient": 1, "add_up": 1},
    "p1_1.bias": {"split": 1, "add_up": 1},
    "p2_1.weight": {"split": 1, "data_gradient": 1, "weight_gradient": 1, "add_up": 1},
    "p2_1.bias": {"split": 1, "data_gradient": 1, "add_up": 1},
    "p2_2.weight": {"split": 1, "weight_gradient": 1, "add_up": 1},
    "p2_2.bias": {"split": 1, "add_up": 1},
}
NEEDS |= {name.replace("p2", "p3"): counts for name, counts in NEEDS.items() if name.startswith("p2")}
NEEDS |= {name.replace("p1_1", "p4_2"): counts for name, counts in NEEDS.items() if name.startswith("p1")}

# NumPy's, under the interpreter, on the infinities that a test is about.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
]


@pytest.fixture(autouse=True)
def _exact_reference() -> Iterator[None]:
    """Keep float32 references float32 on a GPU as well."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).to(DEVICE)


def randn_like(y: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype).to(y.device)


class Operators(TorchDispatchMode):
    """List what runs on the device but the interpreter's own: operators that compute, and kernels."""

    FREE = ("view", "split", "detach", "empty", "slice", "alias", "as_strided", "permute", "transpose", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.deterministic: list[bool] = []  # of convolutions, whether cuDNN has to be
        self.paused = False
        self.key = torch._C.DispatchKey.CPU if DEVICE == "cpu" else torch._C.DispatchKey.CUDA

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "fastinception":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(self.key), *args)
        if name == "convolution_backward":
            self.deterministic.append(torch.backends.cudnn.deterministic)
        if not self.paused and not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operators]:
    operators = Operators()
    kernel = type(entry._entry_kernel)
    original = kernel.run

    def run(self, *args, **kwargs):
        operators.names.append(self.fn.__name__)
        operators.paused = True
        try:
            return original(self, *args, **kwargs)
        finally:
            operators.paused = False

    with monkeypatch.context() as patched, operators:
        patched.setattr(kernel, "run", run)
        yield operators


@pytest.mark.parametrize("batch", [2, 40])
def test_a_training_step_is_eight_launches_and_nothing_else(monkeypatch, batch):
    """Two forward and six backward; the issue's limit is ten backward, and the plain block takes about thirty."""
    block = FastInception(*SMALL, backend="triton").to(DEVICE, memory_format=torch.channels_last)
    x = images((batch, 16, 2, 3)).requires_grad_()
    grad = randn_like(block(x))
    with counted(monkeypatch) as operators:
        y = block(x)
        forward = list(operators.names)
        torch.autograd.grad(y, [x, *block.parameters()], grad)
    assert forward == ["_entry_kernel", "_spatial_kernel"]
    kernels = "split", "data_gradient", "pool_gradient", "entry_gradient", "weight_gradient", "sum"
    assert operators.names[2:] == [f"_{name}_kernel" for name in kernels]


@pytest.mark.parametrize("name", NEEDS)
def test_unneeded_gradients_are_not_computed(monkeypatch, name):
    ran: dict[str, int] = {}

    def record(launcher: str, original: Any) -> Any:
        def recorded(*args: Any) -> None:
            listed = [a for a in args if isinstance(a, list)]  # of branches, convolutions, products
            ran[launcher] = len(listed[0]) if listed and launcher != "add_up" else 1
            original(*args)

        return recorded

    for launcher in ("split", "data_gradient", "pool_gradient", "entry_gradient", "weight_gradient", "add_up"):
        monkeypatch.setattr(launches, launcher, record(launcher, getattr(launches, launcher)))
    block = FastInception(*SMALL, backend="triton").to(DEVICE)
    block.requires_grad_(False)
    x = images((2, 16, 3, 2))
    leaves = {"x": x, **dict(block.named_parameters())}
    leaves[name].requires_grad_()
    y = block(x)
    y.backward(randn_like(y))
    assert ran == NEEDS[name]
    assert [key for key, leaf in leaves.items() if leaf.grad is not None] == [name]


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["3a", "5b"])  # the first and the widest
def test_saved_tensors_take_six_tenths_of_the_plain_block(name, dtype):
    plain = Inception(*WIDTHS[name]).to(DEVICE, dtype)
    fast = FastInception.from_reference(plain, backend="triton")
    x = images((1, WIDTHS[name].in_channels, 1, 1), dtype).requires_grad_()
    kept = []
    for block in (plain, fast):
        with memory.saved_bytes(block) as storages:
            block(x)
        kept.append(sum(storages.values()))
    assert 0 < kept[1] <= 0.6 * kept[0]
    if target.interpreted():
        assert kept == list(memory.saved_by_block(name, dtype, 1, 1))  # what the command prints, without the kernels


@pytest.mark.skipif(not target.interpreted(), reason="kernels are stubbed in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", WIDTHS)
def test_so_they_do_in_each_block_by_the_command(name, dtype):
    plain, fast = memory.saved_by_block(name, dtype, 2, 3)
    assert 0 < fast <= 0.6 * plain


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [3, 70])
def test_the_same_bits_on_two_runs(batch, dtype):
    """Also where the tensors lie elsewhere, and other work went before."""
    block = FastInception(*SMALL, backend="triton").to(DEVICE, dtype)
    x = images((batch, 16, 3, 3), dtype).requires_grad_()
    results = []
    for size in (1, 12345):
        held = torch.full((size,), float("nan"), device=DEVICE)
        y = block(x)
        results.append([y, *torch.autograd.grad(y, [x, *block.parameters()], randn_like(y))])
        del held
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.device
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("batch", [3, 30, 32])  # a step of a weight gradient takes one pixel of 16 images, if so many
def test_the_backward_stays_inside_its_tensors(monkeypatch, batch, format):
    """Every buffer starts as NaN and lies in NaN: what is read outside, or before it is written, spoils a result."""
    channels_last, contiguous = torch.channels_last, torch.contiguous_format
    exact, tolerance = (torch.float64, {}) if DEVICE == "cpu" else (torch.float32, {"rtol": 1e-3, "atol": 1e-3})
    # More channels than one tile of some; a tile of others narrowed to a quarter.
    plain = Inception(67, 5, (4, 70), (3, 9), 66).to(DEVICE, exact)
    x = images((batch, 67, 3, 5), exact).contiguous(memory_format=format).requires_grad_()
    y = plain(x)
    upstream = randn_like(y)
    expected = torch.autograd.grad(y, [x, *plain.parameters()], upstream)
    poisoned = Memory()
    formats = [channels_last if p.dim() == 4 else contiguous for p in plain.parameters()]
    with torch.no_grad():
        own_x = poisoned.put(x, exact, channels_last)
        params = [poisoned.put(p, exact, f) for p, f in zip(plain.parameters(), formats, strict=True)]
    grads = [poisoned.empty(t.shape, exact, f) for t, f in zip((x, *params), (format, *formats), strict=True)]

    def empty(shape: Any, *, dtype: torch.dtype, device: Any, memory_format: Any = contiguous) -> Tensor:
        return poisoned.empty((shape,) if isinstance(shape, int) else tuple(shape), dtype, memory_format)

    with monkeypatch.context() as patched:
        tiles = configs.Tiles(128, 128, 16, num_warps=8, num_stages=3)
        patched.setitem(configs.DEFAULTS, "weight_gradient", lambda dtype, chip: tiles)
        configs.forget()
        patched.setattr(torch, "empty", empty)
        saved = launches.empty_saved(own_x, params, save=True)
        out = poisoned.empty(y.shape, exact, channels_last)
        launches.forward(own_x, params, out, saved)
        launches.backward(poisoned.put(upstream, exact, format), own_x, params, saved, grads)
    configs.forget()
    poisoned.assert_untouched()
    for own, theirs in zip((out, *grads), (y, *expected), strict=True):
        torch.testing.assert_close(own, theirs, **tolerance)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs another chip's code, in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_special_on_amd_gives_the_same_numbers(monkeypatch, dtype):
    """Weights and biases are chosen by integer addresses there, whichever convolutions share a tile."""
    monkeypatch.setattr(target, "gpu", lambda device: target.Gpu("", "gfx942"))
    plain = Inception(24, 40, (60, 33), (70, 9), 17).to(dtype)
    fast = FastInception.from_reference(plain, backend="triton")
    x = images((2, 24, 5, 4), dtype).requires_grad_()
    inputs, upstream = [x, *plain.parameters()], randn_like(plain(x))
    torch.testing.assert_close(fast(x), plain(x))
    ours, theirs = (torch.autograd.grad(block(x), inputs, upstream) for block in (fast, plain))
    torch.testing.assert_close(ours, theirs)


SPATIAL = ["p2_2.weight", "p3_2.weight"]


@pytest.mark.parametrize(
    ("wanted", "ran"),
    [
        (["x", *PARAMS], 2 * ["convolution_backward"] + ["_weight_gradient_kernel", "_sum_kernel"]),
        (["p1_1.weight", "p3_2.weight"], ["convolution_backward", "_weight_gradient_kernel", "_sum_kernel"]),
        (SPATIAL, 2 * ["convolution_backward"]),
        (["p1_1.weight"], ["_weight_gradient_kernel", "_sum_kernel"]),
    ],
)
def test_spatial_weight_gradients_by_the_library(monkeypatch, wanted, ran):
    """As a table may choose; the others stay in their launch and keep their bits."""
    default = configs.DEFAULTS["weight_gradient"]
    block = FastInception(*SMALL, backend="triton").to(DEVICE, torch.float64)
    x = images((2, 16, 3, 4), torch.float64)
    leaves = {"x": x, **dict(block.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    inputs = [leaves[name] for name in wanted]
    upstream = randn_like(block(x))
    by_triton = torch.autograd.grad(block(x), inputs, upstream)
    monkeypatch.setitem(configs.DEFAULTS, "weight_gradient", lambda *args: replace(default(*args), library=True))
    configs.forget()
    try:
        y = block(x)
        with counted(monkeypatch) as operators:
            grads = torch.autograd.grad(y, inputs, upstream)
    finally:
        configs.forget()
    assert [name for name in operators.names if name != "copy_"][-len(ran) :] == ran
    assert operators.names.count("_weight_gradient_kernel") == ran.count("_weight_gradient_kernel")
    assert operators.deterministic == [True] * ran.count("convolution_backward")
    assert not torch.backends.cudnn.deterministic
    for name, own, theirs in zip(wanted, grads, by_triton, strict=True):
        assert own.stride() == theirs.stride(), name
        if name in SPATIAL:
            torch.testing.assert_close(own, theirs)
        else:
            assert torch.equal(own, theirs), name


@pytest.mark.parametrize("before", [False, True])
def test_the_librarys_gradient_leaves_its_switch_as_it_was(before, monkeypatch):
    """Also where it fails, and where two threads, as autograd's of two devices, ask for it at once."""
    grad, x, out = torch.randn(24, 3), images((2, 5, 3, 4)), torch.empty(3, 5, 3, 3)
    seen = []

    def slow(*args: Any) -> tuple[None, Tensor, None]:
        first = torch.backends.cudnn.deterministic
        time.sleep(0.02 * (len(seen) + 1))
        seen.append((first, torch.backends.cudnn.deterministic))
        return None, out, None

    with torch.backends.cudnn.flags(deterministic=before):
        with pytest.raises(RuntimeError):
            library.weight_gradient(grad, x[:, :4], out)
        assert torch.backends.cudnn.deterministic is before
        monkeypatch.setattr(torch.ops.aten, "convolution_backward", slow)
        threads = [threading.Thread(target=library.weight_gradient, args=(grad, x, out)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.backends.cudnn.deterministic is before
    assert seen == [(True, True)] * 2


@pytest.mark.parametrize("values", ["zeros", "ties", "minus infinity"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 1), (2, 2), (4, 7)])
def test_the_pools_gradient_goes_to_atens_pixel(values, size):
    """Where values tie, as zeros behind a ReLU do, the first of the window gets it, in both layouts."""
    plain = Inception(8, 3, (2, 3), (2, 3), 5).to(DEVICE, torch.float64)
    fast = FastInception.from_reference(plain, backend="triton")
    x = images((2, 8, *size), torch.float64)
    x = {"zeros": x * 0, "ties": x.round().clamp(-1, 1), "minus infinity": torch.where(x > 1, x, -torch.inf)}[values]
    if values == "minus infinity":
        x[0] = -torch.inf
    with torch.no_grad():
        # Branch 4 alone has a gradient, and is active everywhere: -inf times these is inf.
        plain.p4_2.weight.copy_(-1 - torch.arange(40.0).view(5, 8, 1, 1))
        plain.p4_2.bias.fill_(1e6)
    grads = []
    for block in (plain, fast):
        own = x.clone().requires_grad_()
        y = block(own)
        upstream = randn_like(y)
        upstream[:, :-5] = 0
        grads.append(torch.autograd.grad(y, own, upstream)[0])
    assert bool(grads[0].isfinite().all())
    assert bool((grads[0] != 0).any())
    torch.testing.assert_close(grads[1], grads[0])
