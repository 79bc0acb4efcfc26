"""Output and all 13 gradients against the plain block's own error, for every GoogLeNet block on both backends.

The rule, in maximum and in RMS: ``err(fast) <= 2 * err(plain) + tiny``, both against float64, with a random upstream
gradient and in the same dtype. The plain block's error is that of its worse layout: in float32 oneDNN sums longer
chains in channels_last than in NCHW, and the fast block computes in channels_last whatever comes. A ReLU whose sign
two roundings disagree on would drown that comparison in noise, so every bias is put where no pre-activation of its
channel is near zero, and the upstream gradient is zero where an output's pre-activation is within a few roundings of
zero.

What the cases cover (the full product would take an hour): every block at its sizes in GoogLeNet for 96x96 images
(12, 6, 3), for 224x224 images (28, 14, 7) and at odd sizes, on both backends; on ATen each of those in every dtype,
under the interpreter each in one dtype in turn, and the first block in every dtype; layouts and inputs (dense, or
sparse as after a ReLU, where pool windows tie at zero) alternate, so that each backend and dtype meets all four
pairs; batches run from 1 to 128, with 128 on both backends. Hypothesis draws the rest at small widths.

The interpreter takes its time by operation, whatever the tile: these cases have larger tiles than its others, which
halves that. Many small tiles are tested by test_a_gpus_default_tiles, and in test_kernels.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastinception import FastInception, Inception, explain
from fastinception.googlenet import WIDTHS

CONVS = {"p1_1": 0, "p2_1": 0, "p2_2": 1, "p3_1": 0, "p3_2": 2, "p4_2": 0}  # name: padding
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {
    "aten": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.float16, torch.float64),  # the interpreter computes bfloat16 wrongly
}
SMALL = (5, 4, (3, 6), (2, 3), 7)


@pytest.fixture
def large_tiles(monkeypatch):
    """Give the interpreter tiles of 256, and leave a GPU its own."""
    configs, target = (importlib.import_module(f"fastinception.kernels.{name}") for name in ("configs", "target"))
    if target.interpreted():
        size = 256
        level = configs.Tiles(size, size, size, num_warps=8, num_stages=3)
        own = {
            "entry": dataclasses.replace(level, pool=(size, size, size // 2)),
            "entry_train": dataclasses.replace(level, pool=(size, size, size // 2)),
            "weight_gradient": dataclasses.replace(
                level, block_k=128
            ),  # one pixel of 128 images, where there are so many
        }
        for kernel in configs.DEFAULTS:
            tiles = own.get(kernel, level)
            monkeypatch.setitem(configs.DEFAULTS, kernel, lambda dtype, chip, tiles=tiles: tiles)
        sweeps = {
            configs.SPLIT: configs.Sweep(64, size, num_warps=4, steps=4),  # NumPy adds the rows of a tile in one chain
            configs.POOL: configs.Sweep(size, size, num_warps=4),
            configs.SUM_FEW: configs.Sweep(1, size**2, num_warps=4),
            configs.SUM_MANY: configs.Sweep(2, size**2, num_warps=4),
        }
        monkeypatch.setattr(configs, "_INTERPRETED", sweeps)
    configs.forget()
    yield
    monkeypatch.undo()  # before the caches are emptied, or they would be filled from it again
    configs.forget()


class Truth(NamedTuple):
    """A block's numbers and what it computes in float64; every number is exact in the dtype under test."""

    tensors: dict[str, Tensor]  # x and the twelve parameters
    grad_out: Tensor
    results: dict[str, Tensor]  # out and 13 gradients
    scale: dict[str, float]  # largest magnitude that such a result takes


def bias_between(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Choose for each channel of ``y`` a bias far from ``-y``: about as many below as above, none near zero."""
    v = -y.transpose(0, 1).flatten(1).sort(dim=1).values.flip(1)  # [O, M], ascending
    rows = v.shape[1]
    if rows < 8:
        return (v[:, -1] + 0.5).to(dtype).double()
    middle = v[:, rows // 4 : rows - rows // 4].contiguous()
    best = middle.diff().topk(min(32, middle.shape[1] - 1), dim=1).indices
    candidates = ((middle.gather(1, best) + middle.gather(1, best + 1)) / 2).to(dtype).double()
    after = torch.searchsorted(middle, candidates).clamp(1, middle.shape[1] - 1)
    margin = torch.minimum(candidates - middle.gather(1, after - 1), middle.gather(1, after) - candidates)
    return candidates.gather(1, margin.argmax(dim=1, keepdim=True))[:, 0]


def truth(widths, dtype, batch, height, width, *, seed=0, sparse=False, upstreams=1) -> Truth:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    in_channels, c1, c2, c3, c4 = widths
    x = draw(batch, in_channels, height, width)
    x = ((x - 1).relu() if sparse else x).to(dtype).double().requires_grad_()
    tensors = {"x": x}

    def conv(name, data, channels):
        kernel = 2 * CONVS[name] + 1
        fan_in = data.shape[1] * kernel * kernel
        weight = (draw(channels, data.shape[1], kernel, kernel) * (2 / fan_in) ** 0.5).to(dtype).double()
        y = F.conv2d(data, weight.requires_grad_(), padding=CONVS[name])
        bias = bias_between(y.detach(), dtype).requires_grad_()
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = weight, bias
        return y + bias[:, None, None]

    p1 = conv("p1_1", x, c1)
    p2 = conv("p2_2", conv("p2_1", x, c2[0]).relu(), c2[1])
    p3 = conv("p3_2", conv("p3_1", x, c3[0]).relu(), c3[1])
    p4 = conv("p4_2", F.max_pool2d(x, 3, 1, 1), c4)
    before = torch.cat((p1, p2, p3, p4), dim=1)
    out = before.relu()
    steady = before.detach().abs() > 8 * torch.finfo(dtype).eps * before.detach().abs().mean()

    scale: dict[str, float] = {"out": out.detach().abs().max().item()}
    for i in range(upstreams):  # the last one counts; with few elements, one alone may be small by chance
        grad_out = (draw(*out.shape) * steady).to(dtype).double()
        grads = torch.autograd.grad(out, list(tensors.values()), grad_out, retain_graph=i + 1 < upstreams)
        for name, grad in zip(tensors, grads, strict=True):
            scale[name] = max(scale.get(name, 0.0), grad.abs().max().item())
    results = {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}
    return Truth({name: t.detach() for name, t in tensors.items()}, grad_out, results, scale)


def load(block: Inception, truth: Truth, dtype: torch.dtype, layout: torch.memory_format) -> Inception:
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.data = (
                truth.tensors[name]
                .to(dtype)
                .contiguous(memory_format=layout if parameter.dim() == 4 else torch.contiguous_format)
            )
    return block


def run(block: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """Return the output and the 13 gradients of ``block(x)``."""
    block.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = block(x)
    out.backward(grad_out)
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


def errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = result.double() - exact
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def check_twice_rule(fast, plains, exact, scale, dtype, *, roundings=1) -> None:
    """Fail with every result that breaks the rule: its maximum and RMS errors, and what they may be.

    ``roundings`` of the largest value are tiny: one, but where a tensor may have so few elements that the plain
    block's error is no sample of anything.
    """
    eps = torch.finfo(dtype).eps
    # In float64 the reference itself is off by a sum's roundings.
    slack = 500 if dtype is torch.float64 else roundings
    broken = []
    for name, reference in exact.items():
        for plain in plains:
            assert fast[name].dtype == plain[name].dtype, name
            assert fast[name].shape == plain[name].shape, name
        ours = errors(fast[name], reference)
        theirs = [max(pair) for pair in zip(*(errors(plain[name], reference) for plain in plains), strict=True)]
        for kind, our, their, share in zip(("max", "RMS"), ours, theirs, (1, 0.5), strict=True):
            allowed = 2 * their + share * slack * eps * scale[name]
            if not our <= allowed:
                broken.append(f"{name}: {kind} error {our:.3e}, allowed {allowed:.3e} (plain {their:.3e})")
    assert not broken, "\n".join(broken)


def check_block(backend, widths, dtype, batch, height, width, layout, *, seed=0, sparse=False, few=False):
    exact = truth(widths, dtype, batch, height, width, seed=seed, sparse=sparse, upstreams=4 if few else 1)
    x, grad_out = exact.tensors["x"].to(dtype), exact.grad_out.to(dtype)
    plains = [
        run(load(Inception(*widths), exact, dtype, f), x.contiguous(memory_format=f), grad_out)
        for f in LAYOUTS.values()
    ]
    x = x.contiguous(memory_format=LAYOUTS[layout])
    fast = load(FastInception(*widths, backend=backend), exact, dtype, LAYOUTS[layout])
    assert explain(fast, x).name == backend
    roundings = 8 if few else 1
    check_twice_rule(run(fast, x, grad_out), plains, exact.results, exact.scale, dtype, roundings=roundings)


# The nine blocks

PAIRS = list(itertools.product(LAYOUTS, (False, True)))  # layout, sparse


def sizes(name: str) -> dict[str, tuple[int, int]]:
    stage = "345".index(name[0])
    small, large = (12, 6, 3)[stage], (28, 14, 7)[stage]
    return {"96": (small, small), "224": (large, large), "odd": ((9, 13), (7, 5), (1, 5))[stage]}


def googlenet_cases():
    for backend, dtypes in DTYPES.items():
        turn = 0
        for i, name in enumerate(WIDTHS):
            for j, (resolution, size) in enumerate(sizes(name).items()):
                if backend == "aten":
                    chosen, batches = dtypes, {"96": (1, 2, 5, 8), "224": (1, 2, 3), "odd": (3, 1, 7)}
                else:
                    chosen = dtypes if name == "3a" and resolution != "224" else dtypes[(i + j) % 3 :][:1]
                    batches = {"96": (2, 1, 3), "224": (1,), "odd": (1, 3)}
                for dtype in chosen:
                    # Three dtypes and four pairs have no common divisor: each dtype meets each pair.
                    yield (
                        backend,
                        name,
                        dtype,
                        batches[resolution][turn % len(batches[resolution])],
                        size,
                        turn,
                    )
                    turn += 1
    # Large batches of narrow blocks: what grows with the pixels does so at any width, and a CPU is slow in bfloat16.
    yield "aten", "3a", torch.float32, 128, (12, 13), 1  # nine whole chains of _weight_gradient and a rest
    yield "aten", "4a", torch.float32, 128, (6, 6), 0
    yield "aten", "3a", torch.bfloat16, 128, (6, 6), 2
    yield "aten", "3a", torch.float64, 128, (3, 3), 3
    yield "triton", "3a", torch.float16, 128, (3, 3), 1
    yield "triton", "3a", torch.float32, 128, (1, 1), 2


def describe(case) -> str:
    backend, name, dtype, batch, (height, width), turn = case
    layout, sparse = PAIRS[turn % 4]
    kind = "sparse" if sparse else "dense"
    return f"{backend}-{name}-{str(dtype)[6:]}-{batch}x{height}x{width}-{layout}-{kind}"


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", list(googlenet_cases()), ids=describe)
def test_googlenet_block(case):
    backend, name, dtype, batch, (height, width), turn = case
    layout, sparse = PAIRS[turn % 4]
    check_block(backend, WIDTHS[name], dtype, batch, height, width, layout, seed=turn, sparse=sparse)


@pytest.mark.usefixtures("large_tiles")
def test_the_largest_batches_sum_one_pixel_of_many_images():
    weight_gradient, target = (
        pytest.importorskip(f"fastinception.kernels.{name}") for name in ("weight_gradient", "target")
    )
    product, gpu = weight_gradient.Product(8, 8, 3, 3), target.gpu(torch.device("cpu"))
    for batch, images_first in ((128, target.interpreted()), (2, False)):
        assert weight_gradient.divide((batch, 3, 3), [product], torch.float32, gpu).images_first is images_first


def test_cases_cover_what_the_file_says():
    seen = list(googlenet_cases())
    for backend, dtypes in DTYPES.items():
        ours = [case for case in seen if case[0] == backend]
        for name in WIDTHS:
            for size in sizes(name).values():
                met = {case[2] for case in ours if case[1] == name and case[4] == size}
                assert met == set(dtypes) if backend == "aten" else met, (backend, name, size)
        for dtype in dtypes:
            assert {case[5] % 4 for case in ours if case[2] is dtype} == {0, 1, 2, 3}, (backend, dtype)
        assert {1, 128} <= {case[3] for case in ours}
        assert (28, 28) in {case[4] for case in ours}


@pytest.mark.parametrize("dtype", DTYPES["triton"])
def test_a_gpus_default_tiles(dtype, monkeypatch):
    """The interpreter has larger ones of its own; several tiles and steps of each kind here, and a rest of each."""
    configs, target = (pytest.importorskip(f"fastinception.kernels.{name}") for name in ("configs", "target"))
    for kernel, default in configs.DEFAULTS.items():
        monkeypatch.setitem(configs.DEFAULTS, kernel, lambda dtype, chip, default=default: default(dtype, "sm_90"))
    monkeypatch.setattr(configs, "_INTERPRETED", {})
    configs.forget()
    try:
        assert (
            configs.choose("spatial", 9, 9, 99, dtype, target.gpu(torch.device("cpu"))).block_k == 128 // dtype.itemsize
        )
        check_block("triton", (70, 130, (36, 140), (9, 33), 130), dtype, 2, 9, 8, "nhwc", seed=3)
    finally:
        configs.forget()


# Any block

WIDTH = st.integers(1, 20)


@pytest.mark.parametrize(("backend", "examples"), [("aten", 50), ("triton", 15)])
def test_any_small_block(backend, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(
        widths=st.tuples(WIDTH, WIDTH, st.tuples(WIDTH, WIDTH), st.tuples(WIDTH, WIDTH), WIDTH),
        batch=st.integers(1, 5),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
        dtype=st.sampled_from(DTYPES[backend]),
        layout=st.sampled_from(list(LAYOUTS)),
        sparse=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def check(widths, batch, height, width, dtype, layout, sparse, seed):
        check_block(backend, widths, dtype, batch, height, width, layout, seed=seed, sparse=sparse, few=True)

    check()


# Autocast


@pytest.mark.parametrize(
    ("backend", "dtype"), [("aten", torch.bfloat16), ("aten", torch.float16), ("triton", torch.float16)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(backend, dtype, layout):
    """As the plain block under autocast: its output dtype, float32 gradients for float32 parameters."""
    widths = (17, 16, (9, 24), (5, 15), 8)
    exact = truth(widths, dtype, 3, 6, 5, upstreams=4)
    x = exact.tensors["x"].float().contiguous(memory_format=LAYOUTS[layout])
    plains = []
    with torch.autocast("cpu", dtype):
        for f in LAYOUTS.values():
            plain = load(Inception(*widths), exact, torch.float32, f)
            plains.append(run(plain, x.contiguous(memory_format=f), exact.grad_out.to(dtype)))
        fast = load(FastInception(*widths, backend=backend), exact, torch.float32, LAYOUTS[layout])
        assert explain(fast, x).name == backend
        ours = run(fast, x, exact.grad_out.to(dtype))
    assert ours["out"].dtype is dtype
    assert {t.dtype for name, t in ours.items() if name != "out"} == {torch.float32}
    check_twice_rule(ours, plains, exact.results, exact.scale, dtype, roundings=8)


@pytest.mark.parametrize("backend", DTYPES)
def test_autocast_leaves_float64_alone(backend):
    exact = truth(SMALL, torch.float64, 2, 5, 4)
    block = load(FastInception(*SMALL, backend=backend), exact, torch.float64, torch.contiguous_format)
    x, grad_out = exact.tensors["x"], exact.grad_out
    with torch.autocast("cpu", torch.bfloat16):
        under = run(block, x, grad_out)
    assert under["out"].dtype is torch.float64
    for name, expected in exact.results.items():
        torch.testing.assert_close(under[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", DTYPES)
def test_autocast_switched_off_inside(backend):
    torch.manual_seed(0)
    block, x = FastInception(*SMALL, backend=backend), torch.randn(2, 5, 4, 4)
    with torch.autocast("cpu", torch.float16), torch.autocast("cpu", enabled=False):
        assert torch.equal(block(x), block(x.clone()))
        assert block(x).dtype is torch.float32
