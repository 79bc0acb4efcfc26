"""Run on a CPU what the compiler makes of a launch for sm_90: its PTX, instruction by instruction.

Triton's interpreter runs a kernel's operators. Here is what it leaves out: bfloat16, PTX in a kernel, what the compiler
was told of a pointer or a mask, how wide it makes an access, and how it moves a tile from one layout to another.

Modelled: the threads of a program, always those that are furthest behind, so that what diverged meets again; registers,
and shared memory of the size that the launch asks for, both full of what no result may hold; tensor cores, matrix loads
and stores, shuffles and barriers. A :class:`Fault` is an access outside of the launch's tensors, or one that is not
aligned to its own size, or a barrier that some threads do not reach. Counted are the bytes of tensors that a launch
writes twice, or of which one program reads what another writes, and the bytes of shared memory of which, between two
barriers, one warp reads or writes what another writes.

Not modelled: ptxas, and so registers, spills and fused products and sums; when asynchronous copies and products end
(here at once, so that nothing tells whether they are waited for); fences; programs that run at the same time; bank
conflicts and time. A product is added up in float64 and rounded once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend

from bench import aot
from fastinception.kernels import first_layer, pool, target

CHIP = "sm_90"
WORD = np.uint64  # what a register of any size is kept in
POISON = 0xFFFFFFFFFFFFFFFF  # in every floating-point format NaN
Array = np.ndarray[Any, Any]
HANDLERS: list[tuple[re.Pattern[str], Callable[..., None]]] = []


class Fault(Exception):
    """What a GPU would stop for, or compute anything for."""


class Instruction(NamedTuple):
    guard: str | None  # the predicate of the threads that take it
    op: str
    args: list[str]
    handler: Callable[..., None]
    groups: tuple[str, ...]  # of the handler's pattern


class Program(NamedTuple):
    parameters: list[tuple[str, int]]  # name and bytes
    threads: int
    code: list[Instruction]
    labels: dict[str, int]


class Launch(NamedTuple):
    """What was counted of a launch, and which instructions it has."""

    kernel: str
    written_twice: int
    shared_by_programs: int
    races: int
    ops: set[str]


def instruction(pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a method for the instructions that match; it is given the pattern's groups, and who takes part."""

    def register(handler: Callable[..., None]) -> Callable[..., None]:
        HANDLERS.append((re.compile(pattern), handler))
        return handler

    return register


def signed(bits: Array, width: int) -> Array:
    """Return a register's low bits as int64."""
    shift = np.int64(64 - width)
    return bits.view(np.int64) << shift >> shift


def low(bits: Array, width: int) -> Array:
    return bits & WORD((1 << width) - 1)


def to_float(bits: Array, kind: str) -> Array:
    """Return float32 of a register's low 16 or 32 bits."""
    if kind == "f16":
        return low(bits, 16).astype(np.uint16).view(np.float16).astype(np.float32)
    return (low(bits, 16) << WORD(16) if kind == "bf16" else low(bits, 32)).astype(np.uint32).view(np.float32)


def from_float(values: Array, kind: str) -> Array:
    """Return the bits of float32, rounded to even; a NaN of 16 bits is the one that the chip gives."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(WORD)
    if kind == "f32":
        return bits
    if kind == "f16":
        rounded = values.astype(np.float16).view(np.uint16).astype(WORD)
    else:
        rounded = low((bits + WORD(0x7FFF) + (bits >> WORD(16) & WORD(1))) >> WORD(16), 16)
    return np.where(np.isnan(values), WORD(0x7FFF), rounded)


def listed(arg: str) -> list[str]:
    """Return the registers between braces, or the one without."""
    return [name.strip() for name in arg.strip("{} ").split(",")]


def parse(text: str) -> Program:
    """Read the one kernel of a module.

    Raises:
        NotImplementedError: names an instruction that is not known here.
    """
    text = re.sub(r"//.*|^\s*\.loc\b.*", "", text, flags=re.MULTILINE)
    head, body = text[text.index(".visible .entry") :].split("\n{", 1)
    sizes = {name: int(bits) // 8 for bits, name in re.findall(r"\.param \.[a-z](\d+)[^\n]*?(\w+_param_\d+)", head)}
    threads = int(re.search(r"\.reqntid (\d+)", head)[1])
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body[: body.index("\n}")].split(";"):
        statement = statement.strip("{} \t\n")  # none begins with a vector
        while label := re.match(r"(\$\w+):\s*", statement):
            labels[label[1]] = len(code)
            statement = statement[label.end() :].lstrip("{ \t\n")
        if not statement or statement.startswith("."):
            continue
        guard, op, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL).groups()
        args = [arg.strip() for arg in re.findall(r"\{[^}]*(?:\}|$)|\[[^\]]*\]|[^,\s][^,]*", rest)]
        for pattern, handler in HANDLERS:
            if found := pattern.fullmatch(op):
                code.append(Instruction(guard, op, args, handler, found.groups()))
                break
        else:
            raise NotImplementedError(f"an instruction that tests/ptx.py knows was expected, got {statement!r}")
    return Program(list(sizes.items()), threads, code, labels)


class Memory:
    """A launch's tensors, at addresses far from one another."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}
        self.regions: list[tuple[int, Array, Array, Array, Array]] = []
        self.shared_by_programs = 0

    def address(self, t: Tensor) -> int:
        """Return where a tensor is, aligned as on a GPU, whose storages all are."""
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        first, size = t.storage_offset() * t.itemsize, (last + 1) * t.itemsize
        if (key := (t.data_ptr(), size)) not in self.places:
            contents = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()[first : first + size]
            start = ((len(self.regions) + 1) << 32) + first % 256
            counts, writers, readers = (np.full(size, value, np.int32) for value in (0, -1, -1))
            self.regions.append((start, contents, counts, writers, readers))
            self.places[key] = start
        return self.places[key]

    def _parts(self, addresses: Array, size: int) -> Iterator[tuple[Array, Array, tuple[Any, ...]]]:
        if (addresses % WORD(size)).any():
            raise Fault(f"an address aligned to {size} bytes was expected")
        left = len(addresses)
        for start, contents, *notes in self.regions:
            here = (addresses >= start) & (addresses + WORD(size) <= WORD(start + len(contents)))
            if here.any():
                left -= int(here.sum())
                places = (addresses[here] - WORD(start)).astype(np.int64)[:, None] + np.arange(size)
                yield here, places, (contents, *notes)
        if left:
            raise Fault(f"{left} threads access {size} bytes outside of the launch's tensors")

    def read(self, addresses: Array, size: int, program: int) -> Array:
        """Return ``size`` bytes from each address on."""
        result = np.empty((len(addresses), size), np.uint8)
        for here, places, (contents, _, writers, readers) in self._parts(addresses, size):
            result[here] = contents[places]
            self.shared_by_programs += int(((writers[places] >= 0) & (writers[places] != program)).sum())
            known = readers[places]
            readers[places] = np.where((known == -1) | (known == program), program, -2)  # -2: several
        return result

    def write(self, addresses: Array, values: Array, program: int) -> None:
        """Write the bytes of each row to an address."""
        for here, places, (contents, counts, writers, readers) in self._parts(addresses, values.shape[1]):
            contents[places] = values[here]
            np.add.at(counts, places, 1)
            writers[places] = program
            self.shared_by_programs += int(((readers[places] != -1) & (readers[places] != program)).sum())


class Shared:
    """A program's shared memory, and by which warps each byte was written and read last, between which barriers."""

    def __init__(self, size: int) -> None:
        self.contents = np.full(size, 0xFF, np.uint8)
        self.races = 0
        self.epoch = 1
        self.writers, self.written, self.readers, self.read_at = (np.zeros(size, np.int64) for _ in range(4))

    def places(self, addresses: Array, size: int) -> Array:
        """Return the indices of ``size`` bytes from each address on."""
        places = low(addresses, 32).astype(np.int64)[..., None] + np.arange(size)
        if (places[..., 0] % size).any():
            raise Fault(f"an address in shared memory that is aligned to {size} bytes was expected")
        if places.size and places.max() >= len(self.contents):
            raise Fault(f"an access within {len(self.contents)} bytes of shared memory was expected")
        return places

    def read(self, places: Array, warps: Any) -> Array:
        """Return bytes; ``warps`` says who reads, -1 all of a warpgroup."""
        self.races += int(((self.written[places] == self.epoch) & (self.writers[places] != warps)).sum())
        self.readers[places], self.read_at[places] = warps, self.epoch
        return self.contents[places]

    def write(self, places: Array, values: Array, warps: Any) -> None:
        """Write bytes."""
        others = (self.written[places] == self.epoch) & (self.writers[places] != warps)
        others |= (self.read_at[places] == self.epoch) & (self.readers[places] != warps)
        self.races += int(others.sum())
        self.writers[places], self.written[places] = warps, self.epoch
        self.contents[places] = values


def to_bytes(bits: Array, size: int) -> Array:
    return bits.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :size]


def from_bytes(values: Array) -> Array:
    words = np.zeros((len(values), 8), np.uint8)
    words[:, : values.shape[1]] = values
    return words.view("<u8")[:, 0].astype(WORD)


class Threads:
    """The threads of one program."""

    def __init__(self, program: Program, values: list[int], memory: Memory, shared: int, index: int) -> None:
        self.program, self.memory, self.index = program, memory, index
        self.count = program.threads
        ids = np.arange(self.count)
        self.lane, self.warp = ids % 32, ids // 32
        self.registers: dict[str, Array] = {
            "%tid.x": ids.astype(WORD),
            "%ctaid.x": np.full(self.count, index, WORD),
            "global_smem": np.zeros(self.count, WORD),
        }
        self.shared = Shared(shared)
        parameters = b""
        for (name, size), value in zip(program.parameters, values, strict=True):
            parameters += bytes(-len(parameters) % size)
            self.registers[name] = np.full(self.count, len(parameters), WORD)
            parameters += (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        self.parameters = np.frombuffer(parameters, np.uint8)

    def get(self, name: str) -> Array:
        """Return a register or a number, of all threads."""
        if name not in self.registers:
            if name.startswith("0f"):
                value = int(name[2:], 16)
            elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", name):
                value = int(name.rstrip("U"), 0) & POISON
            else:  # never written
                value = POISON
            self.registers[name] = np.full(self.count, value, WORD)
        return self.registers[name]

    def holds(self, name: str) -> Array:
        """Return a predicate of all threads."""
        if name.startswith("!"):
            return ~self.holds(name[1:])
        if name in self.registers and self.registers[name].dtype == bool:
            return self.registers[name]
        return np.full(self.count, bool(int(name)) if name.lstrip("-").isdigit() else True)

    def put(self, name: str, value: Array, active: Array) -> None:
        """Write a register of the threads that are active."""
        if value.dtype != bool:
            value = value.astype(WORD, copy=False)
        if not active.all():
            before = self.registers.get(name)
            if before is None:
                before = np.full(self.count, True if value.dtype == bool else POISON, value.dtype)
            value = np.where(active, value, before)
        self.registers[name] = value

    def address(self, arg: str) -> Array:
        base, offset = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", arg).groups()
        return self.get(base) + WORD(int(offset or 0) & POISON)

    def run(self) -> None:
        """Run all threads to their end."""
        code, labels = self.program.code, self.program.labels
        at = np.zeros(self.count, np.int64)
        running = np.ones(self.count, bool)
        while running.any():
            here = at[running].min()
            active = running & (at == here)
            guard, op, args, handler, groups = code[here]
            taking = active & self.holds(guard) if guard else active
            at[active] += 1
            try:
                if op.startswith("bra"):
                    at[taking] = labels[args[0]]
                elif op == "ret":
                    running &= ~taking
                elif op == "bar.sync":
                    if (taking != running).any():
                        raise Fault("a barrier that all threads reach was expected")
                    self.shared.epoch += 1
                elif taking.any():
                    handler(self, taking, args, *groups)
            except Fault as fault:
                raise Fault(f"{fault}, in program {self.index}: {op} {', '.join(args)}") from None

    @instruction(r"bra|bra\.uni|ret|bar\.sync|bar\.warp\.sync|fence\..*|griddepcontrol\..*")
    @instruction(r"(?:cp\.async|wgmma)\.(?:fence|commit_group|wait_group|wait_all).*")
    def _nothing(self, active: Array, args: list[str]) -> None:
        """Do what is done elsewhere, or needs no doing as all ends at once."""

    @instruction(r"ld\.param\.([bsu])(\d+)")
    def _parameter(self, active: Array, args: list[str], kind: str, width: str) -> None:
        places = self.address(args[1])[active].astype(np.int64)[:, None] + np.arange(int(width) // 8)
        value = np.zeros(self.count, WORD)
        value[active] = from_bytes(self.parameters[places])
        self.put(args[0], signed(value, int(width)).view(WORD) if kind == "s" else value, active)

    @instruction(r"ld\.(global|shared)(?:\.v([24]))?\.b(\d+)")
    def _load(self, active: Array, args: list[str], space: str, count: str | None, width: str) -> None:
        size, addresses = int(width) // 8, self.address(args[1])[active]
        total = size * int(count or 1)
        if space == "global":
            loaded = self.memory.read(addresses, total, self.index)
        else:
            loaded = self.shared.read(self.shared.places(addresses, total), self.warp[active][:, None])
        for i, name in enumerate(listed(args[0])):
            value = np.zeros(self.count, WORD)
            value[active] = from_bytes(loaded[:, i * size : (i + 1) * size])
            self.put(name, value, active)

    @instruction(r"st\.(global|shared)(?:\.v[24])?\.b(\d+)")
    def _store(self, active: Array, args: list[str], space: str, width: str) -> None:
        names, addresses = listed(args[1]), self.address(args[0])[active]
        values = np.concatenate([to_bytes(self.get(name)[active], int(width) // 8) for name in names], 1)
        if space == "global":
            self.memory.write(addresses, values, self.index)
        else:
            places = self.shared.places(addresses, values.shape[1])
            self.shared.write(places, values, self.warp[active][:, None])

    @instruction(r"cp\.async\.(?:ca|cg)\.shared\.global")
    def _copy(self, active: Array, args: list[str]) -> None:
        size = int(args[2], 0)
        wanted = low(self.get(args[3]), 32) if len(args) > 3 else np.full(self.count, size)
        if not np.isin(wanted[active], (0, size)).all():
            raise Fault("a copy of all bytes or of none was expected")
        values = np.zeros((self.count, size), np.uint8)
        reading = active & (wanted > 0)
        values[reading] = self.memory.read(self.address(args[1])[reading], size, self.index)
        places = self.shared.places(self.address(args[0])[active], size)
        self.shared.write(places, values[active], self.warp[active][:, None])

    @instruction(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
    def _matrix(self, active: Array, args: list[str], way: str, transposed: str | None) -> None:
        """Of matrix i, lane ``8 * i + r`` has the address of row r, and each lane two elements side by side."""
        addresses, names = (args[1], args[0]) if way == "ld" else (args[0], args[1])
        rows_at = self.address(addresses)
        for i, name in enumerate(listed(names)):
            value = np.zeros(self.count, WORD)
            for half in range(2):
                row, column = self.lane // 4, self.lane % 4 * 2 + half
                if transposed:
                    row, column = column, row
                at = rows_at[self.warp * 32 + i * 8 + row] + (2 * column).astype(WORD)
                places, warps = self.shared.places(at[active], 2), self.warp[active][:, None]
                if way == "ld":
                    value[active] |= from_bytes(self.shared.read(places, warps)) << WORD(16 * half)
                else:
                    self.shared.write(places, to_bytes(self.get(name)[active] >> WORD(16 * half), 2), warps)
            if way == "ld":
                self.put(name, value, active)

    @instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
    def _product(self, active: Array, args: list[str], columns: str, kind: str) -> None:
        """``d = a @ b + d`` of four warps, a from registers or, as b, from shared memory."""
        if not active.all():
            raise Fault("a product of all warps was expected")
        if args[4:6] != ["1", "1"]:
            raise NotImplementedError(f"a product of operands as they are was expected, got {args[4:]}")
        names, adding, thread = listed(args[0]), self.holds(args[3]), np.arange(128)
        results = [np.empty(self.count, WORD) for _ in names]
        for first in range(0, self.count, 128):
            group = slice(first, first + 128)
            if args[1].startswith("{"):
                a = np.empty((64, 16), np.float32)
                for i, name in enumerate(listed(args[1])):
                    for half in range(2):
                        row = thread // 32 * 16 + thread % 32 // 4 + i % 2 * 8
                        column = thread % 4 * 2 + half + i // 2 * 8
                        a[row, column] = to_float(self.get(name)[group] >> WORD(16 * half), kind)
            else:
                a = self._operand(int(self.get(args[1])[first]), 64, kind, args[-2] == "1")
            b = self._operand(int(self.get(args[2])[first]), int(columns), kind, args[-1] == "1")
            sums = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)
            for i, name in enumerate(names):
                row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
                new = sums[row, i // 4 * 8 + thread % 4 * 2 + i % 2]
                old = to_float(self.get(name)[group], "f32")
                results[i][group] = from_float(np.where(adding[group], old + new, new), "f32")
        for name, result in zip(names, results, strict=True):
            self.put(name, result, active)

    def _operand(self, descriptor: int, rows: int, kind: str, transposed: bool) -> Array:
        """Return ``[rows, 16]`` of shared memory, by the PTX ISA's matrix descriptor and its swizzles."""
        start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        swizzle = descriptor >> 62
        width = (16, 128, 64, 32)[swizzle]  # bytes of a row
        row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
        if transposed:
            span = width // 2
            at = row % span * 2 + row // span * leading + column % 8 * width + column // 8 * stride
        elif swizzle:
            at = row % 8 * width + row // 8 * stride + column * 2
        else:
            at = row % 8 * 16 + row // 8 * stride + column // 8 * leading + column % 8 * 2
        at = at + start
        at ^= (at >> 7 & (0, 7, 3, 1)[swizzle]) << 4
        found = self.shared.read(self.shared.places(at.astype(WORD), 2), -1)
        return to_float(from_bytes(found.reshape(-1, 2)), kind).reshape(rows, 16)

    @instruction(r"shfl\.sync\.(bfly|idx)\.b32")
    def _shuffle(self, active: Array, args: list[str], way: str) -> None:
        other = low(self.get(args[2]), 5).astype(np.int64)
        source = self.warp * 32 + (self.lane ^ other if way == "bfly" else other)
        if not active[source[active]].all():
            raise Fault("a shuffle of all lanes was expected")
        self.put(args[0], self.get(args[1])[source], active)

    @instruction(r"mov\.pred")
    def _move_predicate(self, active: Array, args: list[str]) -> None:
        self.put(args[0], self.holds(args[1]), active)

    @instruction(r"mov\.[bsuf](\d+)")
    def _move(self, active: Array, args: list[str], width: str) -> None:
        """Move a register, or take one apart, or put it together."""
        outs, sources = listed(args[0]), listed(args[1])
        part = int(width) // max(len(outs), len(sources))
        value = np.zeros(self.count, WORD)
        for i, name in enumerate(sources):
            value = value | low(self.get(name), int(width) // len(sources)) << WORD(i * part)
        for i, name in enumerate(outs):
            self.put(name, low(value >> WORD(i * part), part if len(outs) > 1 else int(width)), active)

    @instruction(r"selp\.[bsuf](\d+)")
    def _select(self, active: Array, args: list[str], width: str) -> None:
        value = np.where(self.holds(args[3]), self.get(args[1]), self.get(args[2]))
        self.put(args[0], low(value, int(width)), active)

    def _compared(self, how: str, a: Array, b: Array) -> Array:
        relation = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
        relation |= {"eq": "equal", "ne": "not_equal"}
        found = getattr(np, relation[how[:2]])(a, b)
        if a.dtype == np.float32:
            unordered = np.isnan(a) | np.isnan(b)
            return found | unordered if how.endswith("u") else found & ~unordered
        return found

    @instruction(r"setp\.(lt|le|gt|ge|eq|ne)\.([bsu])(\d+)")
    def _compare(self, active: Array, args: list[str], how: str, kind: str, width: str) -> None:
        read = signed if kind == "s" else low
        a, b = (read(self.get(arg), int(width)) for arg in args[1:])
        self.put(args[0], self._compared(how, a, b), active)

    @instruction(r"setp\.((?:lt|le|gt|ge|eq|ne)u?)\.(f32|f16|bf16)(x2)?")
    def _compare_floats(self, active: Array, args: list[str], how: str, kind: str, pair: str | None) -> None:
        for i, name in enumerate(args[0].split("|")):
            a, b = (to_float(self.get(arg) >> WORD(16 * i), kind) for arg in args[1:])
            self.put(name, self._compared(how, a, b), active)

    @instruction(r"set\.((?:lt|le|gt|ge|eq|ne)u?)\.u32\.(f16|bf16)x2")
    def _set(self, active: Array, args: list[str], how: str, kind: str) -> None:
        value = np.zeros(self.count, WORD)
        for at in map(WORD, (0, 16)):
            a, b = (to_float(self.get(arg) >> at, kind) for arg in args[1:])
            value |= np.where(self._compared(how, a, b), WORD(0xFFFF), WORD(0)) << at
        self.put(args[0], value, active)

    @instruction(r"(and|or|xor|not)\.pred")
    def _logic(self, active: Array, args: list[str], how: str) -> None:
        a, *b = map(self.holds, args[1:])
        self.put(args[0], getattr(np, f"logical_{how}")(a, *b), active)

    @instruction(r"(add|sub|mul|max|min)(\.NaN)?\.(f32|f16|bf16)(x2)?")
    def _floats(self, active: Array, args: list[str], how: str, nan: str | None, kind: str, pair: str | None) -> None:
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}.get(how)
        if operation is None:  # without .NaN, the number
            operation = getattr(np, how + "imum" if nan else "f" + how)
        value = np.zeros(self.count, WORD)
        for at in map(WORD, (0, 16) if pair else (0,)):
            a, b = (to_float(self.get(arg) >> at, kind) for arg in args[1:])
            value |= from_float(operation(a, b), kind) << at
        self.put(args[0], value, active)

    @instruction(r"cvt\.(?:rn\.)?(relu\.)?(f32|f16|bf16)(x2)?\.(f32|f16|bf16)")
    def _round(self, active: Array, args: list[str], relu: str | None, to: str, pair: str | None, kind: str) -> None:
        """Convert a number, or two into a pair, the first into its upper half."""
        value = np.zeros(self.count, WORD)
        for arg in args[1:]:
            number = to_float(self.get(arg), kind)
            number = np.where(number <= 0, np.float32(0), number) if relu else number
            value = value << WORD(16) | from_float(number, to)
        self.put(args[0], value, active)

    @instruction(r"cvt\.[su](\d+)\.([su])(\d+)")
    def _convert(self, active: Array, args: list[str], to: str, kind: str, width: str) -> None:
        value = self.get(args[1])
        value = signed(value, int(width)).view(WORD) if kind == "s" else low(value, int(width))
        self.put(args[0], low(value, int(to)), active)

    @instruction(r"bfe\.([su])32")
    def _field(self, active: Array, args: list[str], kind: str) -> None:
        first, width = int(args[2], 0), int(args[3], 0)
        value = low(self.get(args[1]) >> WORD(first), width)
        self.put(args[0], low(signed(value, width).view(WORD), 32) if kind == "s" else value, active)

    @instruction(r"prmt\.b32")
    def _permute(self, active: Array, args: list[str]) -> None:
        both, chosen = low(self.get(args[1]), 32) | self.get(args[2]) << WORD(32), int(args[3].rstrip("U"), 0)
        value = np.zeros(self.count, WORD)
        for i in range(4):
            if (byte := chosen >> 4 * i & 15) > 7:
                raise NotImplementedError(f"a permutation of bytes as they are was expected, got {args[3]}")
            value |= low(both >> WORD(8 * byte), 8) << WORD(8 * i)
        self.put(args[0], value, active)

    @instruction(r"lop3\.b32")
    def _table(self, active: Array, args: list[str]) -> None:
        a, b, c = map(self.get, args[1:4])
        value = np.zeros(self.count, WORD)
        for i in range(8):
            if int(args[4], 0) >> i & 1:
                value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        self.put(args[0], low(value, 32), active)

    @instruction(r"(shl|shr)\.([bsu])(\d+)")
    def _shift(self, active: Array, args: list[str], how: str, kind: str, width: str) -> None:
        bits, by = int(width), low(self.get(args[2]), 32)
        value, within = low(self.get(args[1]), bits), np.minimum(by, WORD(63))
        if kind == "s":
            value = (signed(value, bits) >> within.astype(np.int64)).view(WORD)
        else:
            value = np.where(by < bits, value << within if how == "shl" else value >> within, WORD(0))
        self.put(args[0], low(value, bits), active)

    @instruction(r"(mul|mad)\.(lo|wide|hi)\.([su])(\d+)")
    def _multiply(self, active: Array, args: list[str], how: str, part: str, kind: str, width: str) -> None:
        bits, read = int(width), signed if kind == "s" else low
        value = np.multiply(*(read(self.get(arg), bits) for arg in args[1:3]))
        if part == "hi":
            if bits > 32:
                raise NotImplementedError("the upper half of 64 bits at most was expected")
            value = value >> value.dtype.type(bits)
        value = value.view(WORD) + (self.get(args[3]) if how == "mad" else WORD(0))
        self.put(args[0], low(value, 2 * bits if part == "wide" else bits), active)

    @instruction(r"(add|sub|and|or|xor|not|neg|min|max|div|rem)\.([bsu])(\d+)")
    def _integers(self, active: Array, args: list[str], how: str, kind: str, width: str) -> None:
        read = signed if kind == "s" else low
        a, *others = (read(self.get(arg), int(width)) for arg in args[1:])
        if how in ("div", "rem"):  # towards zero; what is divided by zero is used by nobody
            b = np.where(others[0] == 0, others[0].dtype.type(1), others[0])
            value = np.fmod(a, b) if how == "rem" else (a - np.fmod(a, b)) // b
        else:
            names = {"sub": "subtract", "neg": "negative", "min": "minimum", "max": "maximum", "not": "invert"}
            names |= {name: f"bitwise_{name}" for name in ("and", "or", "xor")}
            value = getattr(np, names.get(how, how))(a, *others)
        self.put(args[0], low(value.view(WORD), int(width)), active)


class _Emulated:
    """Stand in for a JIT function: compile each launch, and run it on its tensors."""

    def __init__(self, function: Any, launches: list[Launch]) -> None:
        self.function, self.launches = function, launches
        self.grid: tuple[int, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> _Emulated:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        name = self.function.fn.__name__
        compiled = aot.compile_launch(self.function, args, kwargs, CHIP)
        source, _ = aot.specialize(self.function, args, kwargs, CHIP)
        memory = Memory()
        values: list[int] = []

        def add(value: Any, described: Any) -> None:
            if isinstance(described, tuple):
                for item, of_item in zip(value, described, strict=True):
                    add(item, of_item)
            elif described != "constexpr":
                values.append(memory.address(value) if isinstance(value, Tensor) else value)

        names = self.function.arg_names
        for arg, value in zip(names, [*args, *(kwargs[arg] for arg in names[len(args) :])], strict=True):
            add(value, source.signature[arg])
        program = parse(compiled.asm["ptx"])
        values += [0, 0]  # scratch memory, of which there is none
        races = 0
        try:
            with np.errstate(all="ignore"):  # of threads whose results nobody takes, and of infinities
                for index in range(self.grid[0]):
                    threads = Threads(program, values, memory, compiled.metadata.shared, index)
                    threads.run()
                    races += threads.shared.races
        except Fault as fault:
            raise Fault(f"{name}: {fault}") from None
        twice = sum(int((counts > 1).sum()) for _, _, counts, *_ in memory.regions)
        ops = {instruction.op for instruction in program.code}
        self.launches.append(Launch(name, twice, memory.shared_by_programs, races, ops))


@contextlib.contextmanager
def emulated() -> Iterator[list[Launch]]:
    """Run all launches here, on CPU tensors, as on ``CHIP``; yields the list that they are added to.

    Not under ``TRITON_INTERPRET=1``, and with a ``TRITON_CACHE_DIR`` of its own: no machine code is made, which would
    take longer than the rest, and what is cached lacks it.
    """
    launches: list[Launch] = []
    with contextlib.ExitStack() as patched:
        around = {"max_pool": pool, "max_pool_gradient": pool}
        around |= {"first_layer": first_layer, "first_layer_gradient": first_layer}
        for name, module in (aot.KERNELS | around).items():
            kernel = f"_{name}_kernel"
            patched.enter_context(mock.patch.object(module, kernel, _Emulated(getattr(module, kernel), launches)))
        gpu = target.Gpu(CHIP, CHIP, aot.CHIPS[CHIP].processors)
        patched.enter_context(mock.patch.object(target, "gpu", return_value=gpu))
        patched.enter_context(mock.patch.object(CUDABackend, "make_cubin", return_value=b""))
        yield launches
