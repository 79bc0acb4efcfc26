"""Read NVIDIA machine code (SASS) as ``nvdisasm`` prints it: widths of accesses, and what a main loop costs.

A main loop is an innermost loop with tensor-core instructions. All figures are per iteration of one whole program.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_TENSOR_CORE = ("HGMMA", "HMMA", "UTCHMMA")
# What the names of mma.sync instructions mean: rows, columns, depth.
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that one lane moves, where the instruction accesses memory."""
        modifiers = self.opcode.split(".")
        if self.base == "LDSM" or self.base == "STSM":
            return 4 * int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 4
        return next((size for name, size in _WIDTHS.items() if name in modifiers), 4)


_WIDTHS = {"128": 16, "96": 12, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Loop:
    """One main loop. ``None`` stands for what the machine code does not say."""

    instructions: int  # that each warp issues
    tensor_core: int  # of them on the tensor cores
    fma: int | None  # multiply-adds on the tensor cores
    copies: int  # asynchronous ones, from global to shared memory
    global_bytes: int  # loaded from global memory; what L1 serves is included
    shared_bytes: int | None  # through the port of shared memory and L1
    narrowest_load: int  # bytes a lane, of the loads from global memory
    waits_for_own_loads: bool  # the tensor cores idle while loads of the same iteration arrive
    drains: bool  # waits until the tensor cores have finished everything


def text_section(cubin: bytes) -> bytes:
    """Return the machine code of the one kernel in a cubin, an ELF file: System V ABI, "Section Header"."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]
    (found,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", strings + name)
    )
    return found


def parse(text: str) -> list[Instruction]:
    """Return the instructions of a disassembly."""
    return [Instruction(int(a, 16), p, opcode, operands) for a, p, opcode, operands in _LINE.findall(text)]


def widths(code: list[Instruction], *bases: str) -> dict[str, int]:
    """Count the instructions ``bases`` by the bytes that a lane moves, widest first."""
    found = Counter(i.width for i in code if i.base in bases)
    return {str(width): found[width] for width in sorted(found, reverse=True)}


def tensor_core(code: list[Instruction]) -> int:
    """Count the tensor-core instructions."""
    return sum(i.base in _TENSOR_CORE for i in code)


def main_loops(code: list[Instruction], warps: int) -> list[Loop]:
    """Describe the main loops of a kernel of ``warps`` warps, in the order of the code."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for end, branch in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", branch.operands) if branch.base == "BRA" else None
        start = position.get(int(target[1], 16), end) if target else end
        body = code[start : end + 1]
        # A jump back across the program's end leads from a wait that was moved out of line: no loop.
        ends = any(i.base == "EXIT" and not i.predicate for i in body)
        if start < end and not ends and tensor_core(body):
            spans.append((start, end))
    inner = [
        (start, end)
        for start, end in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans)
    ]
    return [_describe(code[start : end + 1], warps) for start, end in sorted(inner)]


def _describe(body: list[Instruction], warps: int) -> Loop:
    loads = [i for i in body if i.base in ("LDG", "LDGSTS")]
    if not loads or any(i.base == "UTMALDG" for i in body):
        raise ValueError("a main loop that loads by LDG or LDGSTS was expected: this reader knows no other kind")
    lanes = 32 * warps
    through_port = [i for i in body if i.base in ("LDG", "LDGSTS", "LDS", "STS", "LDSM", "STSM")]
    moved = sum(lanes * i.width for i in through_port if i.predicate != "@!PT")
    fma, operands = _products(body, warps) or (None, None)
    return Loop(
        instructions=len(body),
        tensor_core=tensor_core(body),
        fma=fma,
        copies=sum(i.base == "LDGSTS" for i in body),
        global_bytes=sum(lanes * i.width for i in loads),
        shared_bytes=None if operands is None else moved + operands,
        narrowest_load=min(i.width for i in loads),
        waits_for_own_loads=_waits_for_own_copies(body) or _waits_for_own_registers(body),
        drains=any(i.base == "WARPGROUP" and "gsb0, 0x0" in i.operands for i in body),
    )


def _products(body: list[Instruction], warps: int) -> tuple[int, int] | None:
    """Return multiply-adds on the tensor cores, and the bytes that they themselves read from shared memory."""
    fma = operands = 0
    for i in body:
        if i.base == "UTCHMMA":  # its shape is in a register
            return None
        if i.base == "HMMA":
            fma += warps * _HMMA[i.opcode.split(".")[1]]
        elif i.base == "HGMMA":
            rows, columns, depth = map(int, i.opcode.split(".")[1].split("x"))
            fma += warps // 4 * rows * columns * depth
            # A step is 32 bytes deep. The left operand comes from shared memory unless a register holds it.
            left = 0 if re.search(r"\bR\d+\b.*gdesc", i.operands.partition(",")[2]) else rows
            operands += warps // 4 * 32 * (left + columns)
    return fma, operands


def _waits_for_own_copies(body: list[Instruction]) -> bool:
    """Tell whether asynchronous copies are waited for before half an iteration's products have covered them.

    LDGDEPBAR closes a group of copies; DEPBAR.LE SB0, n waits until all but the newest n groups have arrived.
    """
    products = tensor_core(body)
    for i, wait in enumerate(body):
        if not wait.opcode.startswith("DEPBAR") or not wait.operands.startswith("SB0"):
            continue
        newer, covered, pending = 0, 0, int(wait.operands.split(",")[1].split()[0], 16)
        for instruction in (*reversed(body[:i]), *reversed(body[i:])):  # one iteration backwards
            covered += instruction.base in _TENSOR_CORE
            newer += instruction.base == "LDGDEPBAR"
            if newer > pending:
                if 2 * covered < products:
                    return True
                break
    return False


def _waits_for_own_registers(body: list[Instruction]) -> bool:
    """Tell whether a register that an iteration loads from global memory is used later in the same iteration."""
    for i, load in enumerate(body):
        into = re.match(r"R(\d+)", load.operands) if load.base == "LDG" else None
        if into is None:  # RZ: nothing can use it
            continue
        names = "|".join(str(int(into[1]) + n) for n in range(max(1, load.width // 4)))
        if any(re.search(rf"\bR(?:{names})\b", later.operands) for later in body[i + 1 :]):
            return True
    return False
