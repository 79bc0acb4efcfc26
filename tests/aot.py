"""Compile the kernels for a chip without having one, as the launchers would launch them, and read what came out.

``python tests/aot.py 90:3a:bfloat16:train gfx942:4e:float16:infer`` prints a line of JSON for each kernel. Not under
``TRITON_INTERPRET=1``: the interpreter replaces the compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fastinception import ops
from fastinception.googlenet import WIDTHS, Widths
from fastinception.kernels import entry, spatial

# Shared memory that one program may use, in bytes: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"; the LDS of gfx942.
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
}
_DIVISIBLE = [["tt.divisibility", 16]]


def target(chip: str) -> GPUTarget:
    """Return Triton's target for a compute capability (``"90"``) or an AMD architecture (``"gfx942"``)."""
    return GPUTarget("hip", chip, 64) if chip.startswith("gfx") else GPUTarget("cuda", int(chip), 32)


class _Recorder:
    """Stand in for a JIT function and keep the arguments of its one launch."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def launches(
    widths: Widths, dtype: torch.dtype, save: bool, batch: int, size: int
) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Return for each kernel its JIT function and the arguments with which one block's forward launches it.

    On meta tensors, for a channels_last input and weights as the module creates them.
    """
    x = torch.empty((batch, widths.in_channels, size, size), dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    k, c1, c2, c3, c4 = widths
    shapes = ((c1, k, 1), (c2[0], k, 1), (c2[1], c2[0], 3), (c3[0], k, 1), (c3[1], c3[0], 5), (c4, k, 1))
    params = []
    for out_channels, in_channels, kernel in shapes:
        weight = torch.empty((out_channels, in_channels, kernel, kernel), dtype=dtype, device="meta")
        bias = torch.empty((out_channels,), dtype=dtype, device="meta")
        params += [weight.contiguous(memory_format=torch.channels_last), bias]
    modules = {"_entry_kernel": entry, "_spatial_kernel": spatial}
    functions = {name: getattr(module, name) for name, module in modules.items()}
    recorders = {name: _Recorder() for name in modules}
    try:
        for name, module in modules.items():
            setattr(module, name, recorders[name])
        out, r2, r3, mask = ops._empty_triton_outputs(x, params, save)
        ops._launch(x, params, out, r2, r3, mask if save else None)
    finally:
        for name, module in modules.items():
            setattr(module, name, functions[name])
    return {name: (functions[name], recorders[name].args, recorders[name].kwargs) for name in modules}


def compile_launch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chip: str) -> CompiledKernel:
    """Compile a launch for ``chip``, specialised on its arguments as Triton's own launcher does."""
    options = {name: value for name, value in kwargs.items() if name not in function.arg_names}
    values = [*args, *(kwargs[name] for name in function.arg_names[len(args) :])]
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[object]]] = {}
    signature = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if path[0] >= len(args) or (isinstance(value, int) and value == 1):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i)) for i, item in enumerate(value))
        # A caching allocator's blocks are aligned; what a view adds is known from its offset.
        aligned = value.storage_offset() * value.itemsize if isinstance(value, Tensor) else value
        if aligned % 16 == 0:
            attrs[path] = _DIVISIBLE
        if isinstance(value, Tensor):
            return f"*{_NAMES[value.dtype]}"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, (name, value) in enumerate(zip(function.arg_names, values, strict=True)):
        signature[name] = describe(value, (i,))
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target(chip), options=options)


def resources(kernel: CompiledKernel, chip: str) -> dict[str, int]:
    """Return registers, bytes of stack and of shared memory, and counts of what matters in the machine code."""
    shared = kernel.metadata.shared
    if chip.startswith("gfx"):
        text = kernel.asm["amdgcn"]

        def value(key: str) -> int:
            (found,) = re.findall(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
            return int(found)

        return {
            "registers": value("vgpr_count"),
            "stack": value("private_segment_fixed_size"),
            "local": value("vgpr_spill_count"),
            "shared": shared,
            "tensor_core": len(re.findall(r"^\s*v_mfma_", text, re.MULTILINE)),
            "wide_loads": len(re.findall(r"^\s*(?:global|buffer)_load_dwordx4", text, re.MULTILINE)),
            "wide_stores": len(re.findall(r"^\s*(?:global|buffer)_store_dwordx4", text, re.MULTILINE)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+\s+)?{pattern}", sass, re.MULTILINE))

    return {
        "registers": int(registers),
        "stack": int(stack),
        "local": count(r"(?:LDL|STL)\b"),
        "shared": shared,
        "tensor_core": count(r"(?:HGMMA|HMMA|UTCHMMA)\b"),
        "wide_loads": count(r"(?:LDGSTS|LDG)\.\S*\b128\b"),
        "narrow_loads": count(r"(?:LDGSTS|LDG)\.") - count(r"(?:LDGSTS|LDG)\.\S*\b128\b"),
        "pipelined_loads": count(r"LDGSTS\.\S*\b128\b"),
        "wide_stores": count(r"STG\.\S*\b128\b"),
    }


def report(case: str) -> list[dict[str, Any]]:
    """Compile both kernels for a case such as ``"90:3a:bfloat16:train"`` (chip, block, dtype, train or infer)."""
    chip, block, dtype_name, mode = case.split(":")
    dtype, save = getattr(torch, dtype_name), {"train": True, "infer": False}[mode]
    return [
        {"case": case, "chip": chip, "kernel": name} | resources(compile_launch(*launch, chip), chip)
        for name, launch in launches(WIDTHS[block], dtype, save, batch=128, size=14).items()
    ]


if __name__ == "__main__":
    for case in sys.argv[1:]:
        for row in report(case):
            print(json.dumps(row), flush=True)
