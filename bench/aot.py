"""Compile the kernels for a chip without having one, as the launchers would launch them, and measure what came out.

Not under ``TRITON_INTERPRET=1``: the interpreter replaces the compiler.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bench import sass
from bench.harness import DTYPES, LAYOUTS
from fastinception import ops
from fastinception.googlenet import WIDTHS, Widths
from fastinception.kernels import (
    block,
    configs,
    data_gradient,
    entry,
    entry_gradient,
    replay,
    spatial,
    split,
    sums,
    target,
    weight_gradient,
)


class Chip(NamedTuple):
    """What a program may use, and what its tensor cores do."""

    shared: int  # bytes of shared memory for one program
    processors: int
    fma: int | None = None  # NVIDIA's: multiply-adds in a cycle of one SM, 16-bit operands; half as many for TF32


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; gfx942's LDS. Products:
# the datasheets' dense rates over SMs and boost clock, of A100 (312 TFLOP/s, 108, 1.41 GHz), H100 SXM (989, 132, 1.83)
# and B200 (2250, 148, 1.85); MI300X has 304 compute units.
CHIPS = {
    "sm_80": Chip(163 * 1024, 108, 1024),
    "sm_90": Chip(227 * 1024, 132, 2048),
    "sm_100": Chip(227 * 1024, 148, 4096),
    "gfx942": Chip(64 * 1024, 304),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "u8"}
# In the order of their launches.
KERNELS = {
    "entry": entry,
    "spatial": spatial,
    "split": split,
    "data_gradient": data_gradient,
    "pool_gradient": entry_gradient,
    "entry_gradient": entry_gradient,
    "weight_gradient": weight_gradient,
    "sum": sums,
}


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a JIT function, what it is called with by place, and by name


class Case(NamedTuple):
    """What is compiled: a chip, a block of GoogLeNet, a dtype, ``"inference"`` or ``"training"``, images, a layout."""

    chip: str
    block: str
    dtype: str
    mode: str
    images: str  # batch x side of the block's input
    layout: str


class Part(NamedTuple):
    """A kernel's product with a main loop of its own."""

    name: str
    tile: tuple[int, int, int]  # pixels, output channels, depth of one step
    steps: int  # for one block of pixel rows, as many as the tallest tile has: K steps x tiles
    asked: int  # multiply-adds of these steps that are no padding of the tiles
    pipelined: bool = True  # loads by asynchronous copies


def block_operands(
    widths: Widths, dtype: torch.dtype, batch: int, size: int, device: str, layout: str = "channels_last"
) -> tuple[Tensor, list[Tensor]]:
    """Return an input and the twelve parameters as the module creates them."""
    k, c1, c2, c3, c4 = widths
    x = torch.empty((batch, k, size, size), dtype=dtype, device=device, memory_format=LAYOUTS[layout])
    shapes = ((c1, k, 1), (c2[0], k, 1), (c2[1], c2[0], 3), (c3[0], k, 1), (c3[1], c3[0], 5), (c4, k, 1))
    params = []
    for out_channels, in_channels, kernel in shapes:
        weight = torch.empty((out_channels, in_channels, kernel, kernel), dtype=dtype, device=device)
        bias = torch.empty((out_channels,), dtype=dtype, device=device)
        params += [weight.contiguous(memory_format=LAYOUTS[layout]), bias]
    return x, params


def launch_block(x: Tensor, params: list[Tensor], save: bool, chip: str) -> None:
    """Launch a block's kernels as on ``chip``: with ``save`` a training step's, else the forward's two alone."""
    # What the launcher would read off a device.
    with mock.patch.object(target, "gpu", return_value=target.Gpu(chip, chip, CHIPS[chip].processors)):
        out, saved = ops.empty_output(x, params), block.empty_saved(x, params, save)
        block.forward(x, params, out, saved)
        if save:
            block.backward(torch.empty_like(out), x, params, saved, [torch.empty_like(t) for t in (x, *params)])


def launches(
    chip: str,
    widths: Widths,
    dtype: torch.dtype,
    save: bool,
    batch: int = 128,
    size: int = 14,
    layout: str = "channels_last",
) -> dict[str, Launch]:
    """Return for each kernel how one block launches it, on meta tensors."""
    return collected(partial(launch_block, *block_operands(widths, dtype, batch, size, "meta", layout), save, chip))


def collected(run: Callable[[], Any]) -> dict[str, Launch]:
    """Return for each kernel that ``run`` launches its JIT function and the arguments; nothing is launched."""
    return {
        step.kernel.__name__.removeprefix("_").removesuffix("_kernel"): (
            step.kernel, (*step.tensors, *step.config.sizes), step.config.constants
        )
        for step in replay.collect(run)
        if step.config is not None  # a kernel of Triton's
    }  # fmt: skip


def gpu_target(chip: str) -> GPUTarget:
    """Return what Triton calls a chip."""
    return GPUTarget("hip", chip, 64) if chip.startswith("gfx") else GPUTarget("cuda", int(chip[3:]), 32)


def compile_launch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chip: str) -> CompiledKernel:
    """Compile a launch for ``chip``, specialised on its arguments as Triton's own launcher does."""
    source, options = specialize(function, args, kwargs, chip)
    return triton.compile(source, target=gpu_target(chip), options=options)


def specialize(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chip: str
) -> tuple[ASTSource, dict[str, Any]]:
    """Return what a launch has Triton compile, and its options."""
    options = {name: value for name, value in kwargs.items() if name not in function.arg_names}
    values = [*args, *(kwargs[name] for name in function.arg_names[len(args) :])]
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[object]]] = {}
    signature = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple) and path[0] < len(args):
            return tuple(describe(item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, int) and len(path) == 1 and function.params[path[0]].do_not_specialize:
            return integer(value)
        if path[0] >= len(args) or value is None or (isinstance(value, int) and value == 1):
            constexprs[path] = value
            return "constexpr"
        # A caching allocator's blocks are aligned; what a view adds is known from its offset.
        aligned = value.storage_offset() * value.itemsize if isinstance(value, Tensor) else value
        found = [["tt.divisibility", 16]] if aligned % 16 == 0 else []
        if chip.startswith("gfx") and isinstance(value, Tensor) and value.untyped_storage().nbytes() < 2**31:
            found.append(["tt.pointer_range", 32])  # loads and stores of buffers, not of addresses
        if found:
            attrs[path] = found
        if isinstance(value, Tensor):
            return f"*{_NAMES[value.dtype]}"
        return integer(value)

    def integer(value: int) -> str:
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, (name, value) in enumerate(zip(function.arg_names, values, strict=True)):
        signature[name] = describe(value, (i,))
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attrs)
    return source, options


def parts(kernel: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Part]:
    """Return the products that a launch's arguments ask for."""
    given = dict(zip(function.arg_names, args, strict=False)) | kwargs
    if kernel in ("spatial", "data_gradient"):
        return _strips(given, backward=kernel == "data_gradient")
    if kernel == "weight_gradient":
        return _weight_gradients(given)
    if kernel == "entry_gradient":
        return _gemm(given, given["COLUMNS"], given["K"])
    if kernel == "entry":
        return [*_gemm(given, given["K"], sum(configs.from_list(given["widths"]))), _pool(given)]
    return []  # what has no products: splits, pools' gradients, sums


def _strips(given: dict[str, Any], backward: bool) -> list[Part]:
    """Return the products of a level of convolutions: a strip is some tiles of one, side by side."""
    depth, reduced, stored = given["BLOCK_K"], *(configs.from_list(given[f"{of}_channels"]) for of in ("in", "out"))
    if backward:
        reduced, stored = stored, reduced
    firsts, counts = (configs.from_list(given[f"{of}_tiles"]) for of in ("first", "column"))
    tallest = max(height for *_, height, _, _ in given["LEVEL"])
    found = []
    # A strip's constants begin with its convolution and its kernel's size, and end with the tile's and a divisor.
    for (conv, kernel_h, kernel_w, *_, height, width, _), first, count in zip(
        given["LEVEL"], firsts, counts, strict=True
    ):
        products, start = kernel_h * kernel_w * reduced[conv], first * width
        name = f"{kernel_h}x{kernel_w}" + (f" from {start}" if start else "")
        steps = configs.cdiv(products, depth) * count * (tallest // height)
        asked = tallest * products * min(stored[conv] - start, count * width)
        found.append(Part(name, (height, width, depth), steps, asked))
    return found


def _weight_gradients(given: dict[str, Any]) -> list[Part]:
    """Return each weight's product, or where one loop has those of all, its whole tiles and the smaller last ones."""
    whole, width, depth = (given[f"BLOCK_{axis}"] for axis in "MNK")
    names = "out_channels", "in_channels", "kernel_h", "kernel_w"
    weights = list(zip(*(configs.from_list(given[name]) for name in names), strict=True))

    def part(name: str, height: int, products: list[tuple[int, int]]) -> Part:
        steps = sum(configs.cdiv(rows, height) * configs.cdiv(columns, width) for rows, columns in products)
        return Part(name, (height, width, depth), steps, sum(map(math.prod, products)) * depth)

    if given["LEVEL"] is not None:
        return [part(f"{h}x{w} {o}", whole, [(o, c * h * w)]) for o, c, h, w in weights]
    last, in_whole, in_last = given["LAST_M"], [], []
    for rows, *rest in weights:
        left = rows % whole if rows % whole <= last < whole else 0
        in_whole.append((rows - left, math.prod(rest)))
        in_last.append((left, math.prod(rest)))
    found = [part("products", whole, in_whole)]
    return [*found, part("products from last rows", last, in_last)] if last < whole else found


def _gemm(given: dict[str, Any], reduced: int, columns: int) -> list[Part]:
    """Return the product of a block of rows: of its whole tiles and, if it is narrower, of the last one."""
    rows, width, depth = (given[f"BLOCK_{axis}"] for axis in "MNK")
    last, steps, tiles = given["LAST_N"], configs.cdiv(reduced, depth), configs.cdiv(columns, width)
    if last == width:
        return [Part("gemm", (rows, width, depth), steps * tiles, rows * reduced * columns)]
    before = (tiles - 1) * width
    return [
        Part("gemm", (rows, width, depth), steps * (tiles - 1), rows * reduced * before),
        Part(f"gemm from {before}", (rows, last, depth), steps, rows * reduced * (columns - before)),
    ]


def _pool(given: dict[str, Any]) -> Part:
    """Return the product of the pooled pixels of a block of rows."""
    rows, reduced, columns = given["BLOCK_M"], given["K"], given["pool_width"]
    height, width, depth = tile = given["POOL_M"], given["POOL_N"], given["POOL_K"]
    steps = configs.cdiv(reduced, depth) * (rows // height) * configs.cdiv(columns, width)
    return Part("pool", tile, steps, rows * reduced * columns, pipelined=False)


def measure(case: Case, kernels: Collection[str] = tuple(KERNELS)) -> list[dict[str, Any]]:
    """Compile a case's kernels; return for each of ``kernels`` what the machine code uses, ready for JSON."""
    dtype = DTYPES[case.dtype]
    batch, side = map(int, case.images.split("x"))
    arguments = case.chip, WIDTHS[case.block], dtype, case.mode == "training", batch, side, case.layout
    chosen = {name: launch for name, launch in launches(*arguments).items() if name in kernels}
    compiled = [compile_launch(*launch, case.chip) for launch in chosen.values()]
    rows = [
        case._asdict() | {"kernel": name, "shared": kernel.metadata.shared}
        for name, kernel in zip(chosen, compiled, strict=True)
    ]
    if (fma := CHIPS[case.chip].fma) is None:
        return [row | _read_amd(kernel.asm["amdgcn"]) for row, kernel in zip(rows, compiled, strict=True)]
    rate = fma // (2 if dtype is torch.float32 else 1)
    for row, kernel, code in zip(rows, compiled, disassemble(compiled, case.chip), strict=True):
        expected = parts(row["kernel"], *chosen[row["kernel"]])
        row |= read_nvidia(kernel, code) | _loops(code, kernel.metadata.num_warps, expected, rate)
    return rows


def _read_amd(text: str) -> dict[str, Any]:
    def value(key: str) -> int:
        (found,) = re.findall(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
        return int(found)

    def widths(kind: str) -> dict[str, int]:
        names = re.findall(rf"^\s*(?:global|buffer)_{kind}_[us]?(byte|short|dword)(?:x(\d))?", text, re.MULTILINE)
        sizes = [{"byte": 1, "short": 2, "dword": 4}[unit] * int(count or 1) for unit, count in names]
        return {str(size): sizes.count(size) for size in sorted(set(sizes), reverse=True)}

    return {
        "registers": value("vgpr_count"),
        "stack": value("private_segment_fixed_size"),
        "local": value("vgpr_spill_count"),
        "tensor_core": len(re.findall(r"^\s*v_mfma_", text, re.MULTILINE)),
        "loads": widths("load"),
        "stores": widths("store"),
    }


_disassembled: dict[bytes, list[sass.Instruction]] = {}  # by cubin: several blocks have the same


def disassemble(kernels: Sequence[CompiledKernel], chip: str) -> list[list[sass.Instruction]]:
    """Return the instructions of kernels for one NVIDIA chip, in one run of the disassembler, whose start is slow."""
    cubins = [kernel.asm["cubin"] for kernel in kernels]
    texts = {cubin: sass.text_section(cubin) for cubin in cubins if cubin not in _disassembled}
    if texts:
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(b"".join(texts.values()))
            file.flush()
            arch = f"SM{chip[3:]}" + ("a" if int(chip[3:]) >= 90 else "")
            command = triton.knobs.nvidia.nvdisasm.path, "--binary", arch, file.name
            code = sass.parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        start = 0
        for cubin, text in texts.items():
            _disassembled[cubin] = [i for i in code if start <= i.address < start + len(text)]
            start += len(text)
    return [_disassembled[cubin] for cubin in cubins]


def read_nvidia(kernel: CompiledKernel, code: list[sass.Instruction]) -> dict[str, Any]:
    """Return what a kernel uses, and how it accesses memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "local": sum(i.base in ("LDL", "STL") for i in code),
        "subroutines": sum(i.base == "RET" for i in code),
        "tensor_core": sass.tensor_core(code),
        "loads": sass.widths(code, "LDG", "LDGSTS"),
        "stores": sass.widths(code, "STG"),
    }


def _loops(code: list[sass.Instruction], warps: int, expected: list[Part], rate: int) -> dict[str, Any]:
    """Describe the main loop of each expected product, and what they ask of a whole launch."""
    loops = sass.main_loops(code, warps)
    if len(loops) != len(expected):  # unrolled, or several for one product: nothing to attribute
        return {"loops": {}, "launch_pressure": None, "padding": None}
    if not expected:
        return {}
    described = {}
    for part in expected:  # the compiler may swap the branches of a kernel

        def unlike(loop: sass.Loop, part: Part = part) -> tuple[bool, bool]:
            return loop.fma not in (None, math.prod(part.tile)), (loop.copies > 0) != part.pipelined

        loop = min(loops, key=unlike)
        loops.remove(loop)
        described[part.name] = _pressures(loop, part, warps, rate)
    issue = sum(part.steps * described[part.name]["issue_cycles"] for part in expected)
    tensor = sum(part.steps * described[part.name]["tensor_cycles"] for part in expected)
    asked = sum(part.asked for part in expected) / rate
    return {"loops": described, "launch_pressure": issue / asked, "padding": tensor / asked}


def _pressures(loop: sass.Loop, part: Part, warps: int, rate: int) -> dict[str, Any]:
    """Return a loop's figures against the cycles that its products take on the tensor cores.

    Issue pressure: instructions x warps / 4 slots a cycle. Shared-memory pressure: bytes / 128 a cycle.
    """
    cycles = (loop.fma or math.prod(part.tile)) / rate
    issue = loop.instructions * warps / 4
    return asdict(loop) | {
        "tile": list(part.tile),
        "steps": part.steps,
        "asked_cycles": part.asked / rate,
        "issue_cycles": issue,
        "tensor_cycles": cycles,
        "issue_pressure": issue / cycles,
        "shared_pressure": None if loop.shared_bytes is None else loop.shared_bytes / 128 / cycles,
        "l2_bytes_per_cycle": loop.global_bytes / cycles,
    }
