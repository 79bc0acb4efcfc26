"""Answer what the device and the installed Triton can run. Nothing here touches a device at import."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

# Looked up, not imported: that would cost every user half a second, and torch.compile cannot trace the look-up.
_MISSING = None if importlib.util.find_spec("triton") is not None else "Triton is not installed"
_CDNA = {"gfx908", "gfx90a", "gfx942", "gfx950"}  # AMD's chips with matrix cores that Triton uses without spills
MAX_ASM = {torch.bfloat16: "max.NaN.bf16x2 $0, $1, $2;", torch.float16: "max.NaN.f16x2 $0, $1, $2;"}
# $0, $1 = the maximum of $2 and $4, and its code of $3 and $5: the second's where it is greater. In a window with NaN
# the code names some pixel of it: to name the last NaN, as ATen does, takes two instructions more in every step.
ARGMAX_ASM = {
    dtype: f"""{{
        .reg .b32 greater;
        set.gt.u32.{pair} greater, $4, $2;
        lop3.b32 $1, greater, $5, $3, 0xCA;
        max.NaN.{pair} $0, $4, $2;
    }}"""
    for dtype, pair in ((torch.bfloat16, "bf16x2"), (torch.float16, "f16x2"))
}

# $0 = a pair of $1 and $2, rounded, what is negative replaced by 0; NaN stays NaN.
RELU_ASM = {
    torch.bfloat16: "cvt.rn.relu.bf16x2.f32 $0, $2, $1;",
    torch.float16: "cvt.rn.relu.f16x2.f32 $0, $2, $1;",
}


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot run on ``device`` in ``dtype``, or None where they can."""
    if _MISSING is not None:
        return _MISSING
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"the kernels know float16, bfloat16, float32 and float64, and x is {dtype}"
    if interpreted():
        if dtype is torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly"
        if device.type != "cpu":
            return f"TRITON_INTERPRET=1 is set, which runs kernels on cpu tensors only, and x is on {device}"
        return None
    if device.type != "cuda":
        return f"x is on {device}, and Triton runs on CUDA and ROCm devices"
    if dtype is torch.float64:
        return "float64 has no tensor-core product in Triton on every supported GPU"
    return None


def without_products(device: torch.device) -> str | None:
    """Say why the kernels would be slow on a device, or not compile, or None: Triton makes no use of its tensor cores.

    On sm_75 they keep 7 KB of a thread's numbers in memory; on AMD's RDNA they spill, or Triton compiles no product.
    """
    if device.type != "cuda":
        return None
    chip = gpu(device).chip
    if chip in _CDNA or (chip.startswith("sm_") and int(chip[3:]) >= 80):
        return None
    return f"the kernels need the tensor cores of sm_80 and up, or of {', '.join(sorted(_CDNA))}, and x is on {chip}"


# Dynamo calls it, and keeps the answer. torch.compiler.assume_constant_result does that, and imports Dynamo for it.
without_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Gpu(NamedTuple):
    """What tile sizes depend on; two alike are equal."""

    name: str  # the product's
    chip: str  # sm_90, gfx942, ...; "cpu" under the interpreter
    processors: int = 0  # streaming multiprocessors, compute units; 0 where their number decides nothing

    @property
    def runs_ptx(self) -> bool:
        """Tell whether kernels may hold PTX."""
        return self.chip.startswith("sm_")

    @property
    def holds_tall_tiles(self) -> bool:
        """Tell whether a program gets shared memory for a tile's 256 pixels: 163 KB or more, and others 99 or 64."""
        return self.chip in ("cpu", "sm_80", "sm_90", "sm_100", "sm_103")

    @property
    def is_amd(self) -> bool:
        """Tell whether AMD's compiler makes the code."""
        return self.chip.startswith("gfx")

    @property
    def runs_tf32(self) -> bool:
        """Tell whether products of float32 may be rounded to TF32; Triton refuses to on other chips of AMD."""
        return self.runs_ptx or self.chip == "gfx942"

    @property
    def runs_pdl(self) -> bool:
        """Tell whether a launch may start before the one in front of it has ended."""
        return self.runs_ptx and int(self.chip[3:]) >= 90


def input_precision(dtype: torch.dtype, gpu: Gpu) -> str:
    """Return ``tl.dot``'s input precision: of float32 what PyTorch's switch for convolutions says, if the chip can."""
    if dtype is not torch.float32 or not gpu.runs_tf32:
        return "ieee"
    # Where this switch is "none", it reads as the next wider one.
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """Describe a device that kernels run on."""
    if device.type != "cuda":
        return Gpu("cpu", "cpu")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        chip = properties.gcnArchName.partition(":")[0]
    else:
        chip = f"sm_{properties.major}{properties.minor}"
    return Gpu(properties.name, chip, properties.multi_processor_count)


@functools.cache
def max_asm(gpu: Gpu, dtype: torch.dtype, *, with_codes: bool) -> str | None:
    """Return PTX for the maximum of two pairs of 16-bit elements, NaN where either is, or None where there is none.

    ``with_codes`` asks for the one that also selects, of two pairs of 16-bit codes, that of the maximum. Triton's
    operators become the same instructions, but with two byte permutations for each (PTX ISA: ``max`` sm_80, ``set`` of
    bfloat16 sm_90).
    """
    least = 90 if with_codes and dtype is torch.bfloat16 else 80
    if not gpu.runs_ptx or int(gpu.chip[3:]) < least:
        return None
    return (ARGMAX_ASM if with_codes else MAX_ASM).get(dtype)


@functools.cache
def relu_asm(gpu: Gpu, dtype: torch.dtype) -> str:
    """Return PTX that rounds two float32 to a pair of ``dtype`` behind a ReLU, or "" where there is none.

    Triton's operators take seven instructions for a pair, this takes one (PTX ISA: ``cvt.relu`` sm_80).
    """
    return RELU_ASM.get(dtype, "") if gpu.runs_ptx and int(gpu.chip[3:]) >= 80 else ""


def device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Make x's device the current one: Triton launches on the current device's current stream."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
