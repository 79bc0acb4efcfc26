"""What the compiler makes of the kernels for sm_90, run without a GPU: results, and where and how often they access."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton, which compiles what is run here, is not installed")

from fastinception import Inception, ops
from fastinception.kernels import block, configs, first_layer, pool, target, weight_gradient
from fastinception.kernels.entry import entry
from fastinception.kernels.entry_pool import pool_steps
from fastinception.kernels.epilogue import out_run
from tests import fresh, ptx

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """A training step of a block: ``steps`` says how those of the pool go over the channels, ``run`` is ``out_run``.

    ``misaligned``: the weights of 1x1 convolutions begin one element behind what is aligned.
    """

    widths: tuple[Any, ...]
    dtype: torch.dtype
    layout: str
    images: tuple[int, int, int]
    steps: str
    run: int
    misaligned: bool = False


# Each with images that end within a tile of 64 pixels. 80 channels take two strips, of 64 and 32, in both directions.
# What is promised of an operand shows where nothing else keeps accesses from being that wide: runs, rows and channels
# by fours, not eights, from aligned tensors, and misaligned weights of rows that 16 divides. Of a batch of 120 the
# weights' gradients take one pixel of 64 images a step: of 136 channels a tile of 128, and one of 64 for the others.
CASES = {
    "strips": Case((80, 16, (16, 80), (8, 16), 8), torch.bfloat16, "nhwc", (2, 5, 7), "overlapping", 0),
    "runs": Case((32, 16, (16, 24), (8, 16), 8), torch.bfloat16, "nchw", (4, 4, 5), "even", 4, misaligned=True),
    "batch": Case((16, 80, (8, 136), (8, 8), 8), torch.bfloat16, "nhwc", (120, 1, 2), "one", 0),
    "odd": Case((24, 12, (20, 12), (7, 9), 18), torch.float16, "nchw", (2, 5, 7), "one", 1),
}
KERNELS = (
    "entry", "spatial", "split", "data_gradient", "pool_gradient", "entry_gradient", "weight_gradient", "sum",
)  # fmt: skip
RESULTS = (
    "out", "x",
    *(f"{name}.{of}" for name in ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2") for of in ("weight", "bias")),
)  # fmt: skip


# In a process without the interpreter


def numbers(shape: tuple[int, ...], largest: int, unit: float) -> Tensor:
    """Return random multiples of ``unit``: of these, both reductions are exact, and no two ways disagree on a sign."""
    return torch.randint(-largest, largest + 1, shape).double() * unit


def placed(t: Tensor, case: Case) -> Tensor:
    """Return ``t`` in a case's dtype and layout."""
    t = t.to(case.dtype)
    if case.misaligned and t.shape[2:] == (1, 1):
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    return t.contiguous(memory_format=LAYOUTS[case.layout]) if t.dim() == 4 else t


def train(case: Case) -> dict[str, Any]:
    """Return what was counted of each launch, and by how far the results and the plain block's are off, and at most."""
    torch.manual_seed(0)
    plain = Inception(*case.widths).double()
    exact = [numbers(tuple(p.shape), 2, 1 / 4) for p in plain.parameters()]
    with torch.no_grad():
        for p, value in zip(plain.parameters(), exact, strict=True):
            p.copy_(value)
    n, height, width = case.images
    channels, c1, (_, c2), (_, c3), c4 = case.widths
    x, grad = numbers((n, channels, height, width), 4, 1 / 4), numbers((n, c1 + c2 + c3 + c4, height, width), 4, 1 / 4)

    def results(dtype: torch.dtype) -> list[Tensor]:
        given = x.to(dtype).requires_grad_()
        out = plain.to(dtype)(given)
        found = torch.autograd.grad(out, [given, *plain.parameters()], grad.to(dtype))
        return [t.detach().double() for t in (out, *found)]

    truth, theirs = results(torch.float64), results(case.dtype)
    x, grad, *params = (placed(t, case) for t in (x, grad, *exact))
    # All memory that is made here holds NaN.
    torch.use_deterministic_algorithms(True)
    with ptx.emulated() as launches, torch.no_grad():
        out, saved = ops.empty_output(x, params), block.empty_saved(x, params, True)
        block.forward(x, params, out, saved)
        grads = [torch.empty_like(x)]
        grads += [torch.empty_like(p, memory_format=torch.channels_last if p.dim() == 4 else None) for p in params]
        block.backward(grad, x, params, saved, grads)
    torch.use_deterministic_algorithms(False)

    errors = {}
    for name, ours, plains, right in zip(RESULTS, (out, *grads), theirs, truth, strict=True):
        off = [(t.double() - right) for t in (ours, plains)]
        errors[name] = [*(float(t.abs().max()) for t in off), *(float(t.square().mean().sqrt()) for t in off)]
        errors[name].append(float(right.abs().max()))
    return {"errors": errors, "launches": counted(launches)}


def counted(launches: list[ptx.Launch]) -> list[dict[str, Any]]:
    return [launch._asdict() | {"ops": sorted(launch.ops)} for launch in launches]


def special(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return images of NaN, infinities and few numbers, so that windows have ties; zeros of both signs among them."""
    values = torch.tensor([NAN, INF, -INF, -INF, 0.0, -0.0, *range(-9, 10)])
    x = values[torch.randint(len(values), (2, 24, 6, 5), generator=generator)]
    x[1, :, :2] = -INF  # whole windows
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def pools(dtype: torch.dtype) -> dict[str, Any]:
    """Return whether both max pools and the ReLU treat special values as PyTorch does, by what may be wrong."""
    generator = torch.Generator().manual_seed(0)
    x = special(generator, dtype)
    n, channels, height, width = x.shape
    weight, bias = torch.ones(8, channels, 1, 1, dtype=dtype), torch.zeros(8, dtype=dtype)
    out = torch.empty(n, 16, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    pooled, codes, mask = (torch.full((n * height * width, k), 255, dtype=torch.uint8) for k in (channels, channels, 2))
    pooled = pooled.to(dtype)
    shifts = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, 1.0], dtype=dtype).repeat(4)
    stem = torch.empty(n, channels, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with ptx.emulated() as launches:
        entry(x, (weight,), (bias,), weight, bias, out, 8, (), (mask, pooled, codes), 1, part="pool")
        pool.max_pool(x, shifts, stem, relu=True)

    right, places = F.max_pool2d(x.double(), 3, 1, 1, return_indices=True)
    pooled, codes = (t.reshape(n, height, width, channels).permute(0, 3, 1, 2) for t in (pooled, codes.int()))
    # Codes name rows and columns of a window by 0, 1 and 3. In one with NaN they may name any pixel.
    down, across = (torch.where(code == 3, 2, code) - 1 for code in (codes // 4, codes % 4))
    rows, columns = torch.arange(height)[:, None] + down, torch.arange(width) + across
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    named = (rows * width + columns).clamp(0, height * width - 1)
    found = x.double().flatten(2).gather(2, named.flatten(2)).reshape(right.shape)

    def same(a: Tensor, b: Tensor) -> bool:
        return bool(((a == b) | (a.isnan() & b.isnan())).all())

    expected = F.relu((F.max_pool2d(x.double(), 3, 2, 1) + shifts.double()[:, None, None]).to(dtype))
    return {
        "launches": counted(launches),
        "maximum": same(pooled.double(), right),
        "code": bool(inside.all()) and bool(((found == right) | right.isnan()).all()),
        "first of equals": bool(((named == places) | right.isnan()).all()),
        "stem": same(stem, expected),
        "relu": same(out[:, 8:].double(), F.relu(F.conv2d(right, weight.double())).to(dtype).double()),
    }


def trained_pool(dtype: torch.dtype) -> dict[str, Any]:
    """Return which results of a training step of bias, ReLU and max pool are wrong, of special values and ties.

    Bar NaN, whose gradients go to some pixel of a window.
    """
    generator = torch.Generator().manual_seed(0)
    x = special(generator, dtype).nan_to_num(1.0, INF, -INF).requires_grad_()
    bias = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, 1.0], dtype=dtype).repeat(4).requires_grad_()
    right = F.max_pool2d(F.relu(x + bias[:, None, None]).double(), 3, 2, 1)
    grad = (
        torch.randint(-3, 4, right.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    )
    grad[0, 0, 0, 0] = INF  # meets no product with zero
    expected = right, *torch.autograd.grad(right, (x, bias), grad.double())
    format = torch.channels_last
    out, codes = (torch.empty(right.shape, dtype=t, memory_format=format) for t in (dtype, torch.uint8))
    found = torch.full_like(x, torch.nan), torch.full_like(bias, torch.nan)
    torch.use_deterministic_algorithms(True)  # all memory that is made here holds NaN
    with ptx.emulated() as launches, torch.no_grad():
        pool.max_pool(x.detach(), bias.detach(), out, codes, relu=True)
        pool.max_pool_gradient(grad, codes, *found)
    torch.use_deterministic_algorithms(False)
    results = zip(("output", "x", "bias"), (out, *found), expected, strict=True)
    return {
        "launches": counted(launches),
        "wrong": [name for name, ours, theirs in results if not torch.equal(ours.double(), theirs.double())],
    }


def first(dtype: torch.dtype) -> dict[str, Any]:
    """Return whether the first layer's output and gradients are exact, of images with rows of more than one tile."""
    torch.manual_seed(0)
    x, weight, bias = numbers((2, 1, 9, 135), 4, 1 / 4), numbers((40, 1, 7, 7), 2, 1 / 4), numbers((40,), 2, 1 / 4)
    grad = numbers((2, 40, 5, 68), 4, 1 / 4)
    output = F.conv2d(x, weight, bias, 2, 3).relu()
    options = [40], [2, 2], [3, 3], [1, 1], False, [0, 0], 1, [False, True, True]
    exact = output, *torch.ops.aten.convolution_backward(grad, x, weight, *options)[1:]
    # All memory that is made here holds NaN.
    torch.use_deterministic_algorithms(True)
    x, weight, bias, grad, *found = (
        t.to(dtype).contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)
        for t in (x, weight, bias, grad, *map(torch.empty_like, exact))
    )
    with ptx.emulated() as launches, torch.no_grad():
        first_layer.first_layer(x, weight, bias, found[0], 2, relu=True)
        first_layer.first_layer_gradient(x, grad, *found[1:], 2)
    torch.use_deterministic_algorithms(False)
    return {
        "launches": counted(launches),
        "wrong": [
            name
            for name, ours, right in zip(("output", "weight", "bias"), found, exact, strict=True)
            if not torch.equal(ours, right.to(dtype))
        ],
    }


def report() -> None:
    """Print what the tests below ask about, as JSON; of what failed, why."""
    parts = {name: lambda case=case: train(case) for name, case in CASES.items()}
    parts |= {str(dtype): lambda dtype=dtype: pools(dtype) for dtype in target.MAX_ASM}
    parts |= {f"trained pool {dtype}": lambda dtype=dtype: trained_pool(dtype) for dtype in target.MAX_ASM}
    parts |= {f"first layer {dtype}": lambda dtype=dtype: first(dtype) for dtype in target.MAX_ASM}
    found = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except ptx.Fault as fault:
            found[name] = {"fault": str(fault)}
    print(json.dumps(found))


# In the process of the tests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    code = "from tests import test_ptx; test_ptx.report()"
    return json.loads(fresh.run(code, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache"))))


def check_launches(part: dict[str, Any], kernels: tuple[str, ...]) -> None:
    assert "fault" not in part, part["fault"]
    assert [launch["kernel"] for launch in part["launches"]] == [f"_{name}_kernel" for name in kernels]
    for launch in part["launches"]:
        # Nothing is added by atomics, and what one launch leaves is another's to read.
        counts = {name: launch[name] for name in ("written_twice", "shared_by_programs", "races")}
        assert not any(counts.values()), (launch["kernel"], counts)


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_has_no_fault_and_the_numbers_of_the_plain_block(found, name):
    part = found[name]
    check_launches(part, KERNELS)
    tiny = torch.finfo(CASES[name].dtype).eps / 4
    for result, (ours_max, plain_max, ours_rms, plain_rms, largest) in part["errors"].items():
        message = f"{result}: max {ours_max:.2e} of {plain_max:.2e}, RMS {ours_rms:.2e} of {plain_rms:.2e}"
        assert ours_max <= 2 * plain_max + tiny * largest, message
        assert ours_rms <= 2 * plain_rms + tiny / 4 * largest, message


@pytest.mark.parametrize("dtype", target.MAX_ASM, ids=str)
def test_pools_and_relu_by_ptx_treat_nan_infinities_and_ties_as_pytorch_does(found, dtype):
    part = found[str(dtype)]
    check_launches(part, ("entry", "max_pool"))
    wrong = [name for name, right in part.items() if name != "launches" and not right]
    assert not wrong
    ops = {op for launch in part["launches"] for op in launch["ops"]}
    pair = "bf16x2" if dtype is torch.bfloat16 else "f16x2"
    assert {f"max.NaN.{pair}", f"set.gt.u32.{pair}", f"cvt.rn.relu.{pair}.f32"} <= ops


@pytest.mark.parametrize("dtype", target.MAX_ASM, ids=str)
def test_a_trained_pool_is_exact(found, dtype):
    part = found[f"trained pool {dtype}"]
    check_launches(part, ("max_pool", "max_pool_gradient", "sum"))
    assert not part["wrong"]


@pytest.mark.parametrize("dtype", target.MAX_ASM, ids=str)
def test_the_first_layer_is_exact(found, dtype):
    part = found[f"first layer {dtype}"]
    check_launches(part, ("first_layer", "first_layer_gradient", "sum"))
    assert not part["wrong"]


def test_the_cases_are_what_they_are_for():
    gpu = target.Gpu(ptx.CHIP, ptx.CHIP, 132)
    for case in CASES.values():
        n, height, width = case.images
        assert pool_steps(case.widths[0], 32) == case.steps
        assert out_run((n, 1, height, width), case.layout == "nhwc") == case.run
        assert n * height * width % 64
    for kernel, reduction in (("spatial_train", 9 * 16), ("entry_gradient", 40)):
        tiles = configs.choose(kernel, 70, reduction, 80, torch.bfloat16, gpu)
        assert [strip.block_n for strip in configs.strips(tiles, 80, gpu)] == [64, 32]
    divisions = {
        name: weight_gradient.divide(case.images, [weight_gradient.Product(136, 8, 3, 3)], case.dtype, gpu)
        for name, case in CASES.items()
    }
    assert {name for name, division in divisions.items() if division.images_first} == {"batch"}
    assert divisions["batch"].tiles.block_m == 128
    assert {case.steps for case in CASES.values()} == {"one", "even", "overlapping"}


# That the emulation sees what it is for. Two warps; the parameter is eight bytes of a tensor.
KERNEL = """
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
\t.reg .pred %p<9>;
\tld.param.b64 %rd1, [kernel_param_0];
\tmov.u32 %r1, %tid.x;
\tsetp.lt.s32 %p1, %r1, 1;
\tsetp.lt.s32 %p2, %r1, 40;
\tshl.b32 %r2, %r1, 2;
\tmov.b32 %r3, global_smem;
\tadd.s32 %r4, %r3, %r2;
BODY
\tret;
}
"""
FAULTS = {
    "outside": ("@%p1 st.global.b32 [ %rd1 + 8 ], { %r1 };", "outside of the launch's tensors"),
    "unaligned": ("@%p1 st.global.b32 [ %rd1 + 2 ], { %r1 };", "aligned to 4 bytes"),
    "shared memory": ("st.shared.b32 [%r4+4], %r1;", "256 bytes of shared memory"),
    "barrier": ("@%p2 bra $L1;\n\tbar.sync 0;\n$L1:", "that all threads reach"),
}


def emulate(body: str) -> tuple[ptx.Threads, ptx.Memory]:
    memory = ptx.Memory()
    program = ptx.parse(KERNEL.replace("BODY", body))
    threads = ptx.Threads(program, [memory.address(torch.zeros(2))], memory, 256, 0)
    threads.run()
    return threads, memory


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    body, message = FAULTS[name]
    with pytest.raises(ptx.Fault, match=message):
        emulate(body)


def test_races_are_counted():
    exchange = "st.shared.b32 [%r4], %r1;\nBARRIER\nxor.b32 %r5, %r4, LANES;\nld.shared.b32 %r6, [%r5];"
    for lanes, barrier, races in (("128", "", 256), ("128", "bar.sync 0;", 0), ("64", "", 0)):
        threads, _ = emulate(exchange.replace("BARRIER", barrier).replace("LANES", lanes))
        assert threads.shared.races == races
        assert (threads.registers["%r6"] == threads.registers["%r1"] ^ (int(lanes) // 4)).all()


def test_bytes_written_twice_are_counted():
    _, memory = emulate("@%p2 st.global.b8 [ %rd1 + 3 ], { %r1 };")
    assert [int((counts > 1).sum()) for _, _, counts, *_ in memory.regions] == [1]


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"got 'sin\.approx\.f32 %f1, %f2'"):
        ptx.parse(KERNEL.replace("BODY", "sin.approx.f32 %f1, %f2;"))
