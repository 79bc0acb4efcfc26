"""What the launchers read and write, where and how often, by which tiles, and in how many launches."""

from __future__ import annotations

import collections
import dataclasses
import mmap
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastinception import FastInception, backends

pytest.importorskip("triton")

from triton.runtime import interpreter

from fastinception.kernels import configs, target
from fastinception.kernels import data_gradient as data_gradient_module
from fastinception.kernels import entry as entry_module
from fastinception.kernels import entry_gradient as entry_gradient_module
from fastinception.kernels import first_layer as first_layer_module
from fastinception.kernels import pool as pool_module
from fastinception.kernels import spatial as spatial_module
from fastinception.kernels import split as split_module
from fastinception.kernels import weight_gradient as weight_gradient_module
from fastinception.kernels.entry import entry
from fastinception.kernels.spatial import Conv, spatial
from tests.poisoned import (
    DEVICE,
    ENGINES,
    FORMATS,
    LIBRARY,
    SAME3,
    Entry,
    Memory,
    Spatial,
    needs_interpreter,
    normal,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")


# Who writes what, and how often, and what is read


def block_buffers(shape: tuple[int, int, int, int], out_format: torch.memory_format, memory: Memory) -> dict[str, Any]:
    n, k, h, w = shape
    c1, c2, c3, c4 = (
        9,
        (5, 130),
        (3, 8),
        130,
    )  # two column tiles of the first convolution and of the pooled branch
    f32 = torch.float32
    return {
        "x": memory.randn(n, k, h, w, dtype=f32, format=torch.channels_last),
        "widths": (c1, c2, c3, c4),
        "out": memory.empty((n, c1 + c2[1] + c3[1] + c4, h, w), f32, out_format),
        "r2": memory.empty((n, c2[0], h, w), f32, torch.channels_last),
        "r3": memory.empty((n, c3[0], h, w), f32, torch.channels_last),
        "mask": memory.empty((n * h * w, 2 + 17 + 1 + 17), torch.uint8, torch.contiguous_format),
        "pooled": memory.empty((n * h * w, k), f32, torch.contiguous_format),
        "codes": memory.empty((n * h * w, k), torch.uint8, torch.contiguous_format),
    }


def launch_both(b: dict[str, Any], memory: Memory, **engine: Any) -> None:
    k = b["x"].shape[1]
    c1, c2, c3, c4 = b["widths"]
    w1, w21, w31, w42 = (memory.randn(o, k, 1, 1, dtype=torch.float32) for o in (c1, c2[0], c3[0], c4))
    b1, b21, b31, b42, b22, b32 = (memory.randn(o, dtype=torch.float32) for o in (c1, c2[0], c3[0], c4, c2[1], c3[1]))
    entry(
        b["x"],
        (w1, w21, w31),
        (b1, b21, b31),
        w42,
        b42,
        b["out"],
        c1 + c2[1] + c3[1],
        (b["r2"], b["r3"]),
        (b["mask"], b["pooled"], b["codes"]),
        20,
    )
    w22 = memory.randn(c2[1], c2[0], 3, 3, dtype=torch.float32)
    w32 = memory.randn(c3[1], c3[0], 5, 5, dtype=torch.float32)
    level = [
        Conv(b["r2"], w22, b22, c1, mask_column=2, padding=(1, 1)),
        Conv(b["r3"], w32, b32, c1 + c2[1], mask_column=19, padding=(2, 2)),
    ]
    spatial(level, b["out"], b["mask"], **engine)


@needs_interpreter
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 17, 9, 5)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_element_is_written_exactly_once(monkeypatch, shape, out_format, engine):
    writes: collections.Counter[int] = collections.Counter()
    original = interpreter.InterpreterBuilder.create_masked_store

    def counted(self, ptrs, value, mask, *rest):
        writes.update(ptrs.data[mask.data.astype(bool)].tolist())
        return original(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", counted)
    memory = Memory()
    buffers = block_buffers(shape, out_format, memory)
    launch_both(buffers, memory, **engine)
    expected: dict[int, int] = {}
    for name in ("out", "r2", "r3", "mask", "pooled", "codes"):
        tensor = buffers[name]
        expected |= {tensor.data_ptr() + i * tensor.itemsize: 1 for i in range(tensor.numel())}
    assert dict(writes) == expected
    memory.assert_untouched()


@needs_interpreter
def test_each_program_computes_one_tile(monkeypatch):
    """A list of convolutions with several row and column tiles each; no program idles or does another's work."""
    written: dict[int, list[bool]] = {}
    original = interpreter.InterpreterBuilder.create_masked_store

    def noted(self, ptrs, value, mask, *rest):
        written.setdefault(self.grid_idx[0], []).append(bool(mask.data.any()))
        return original(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", noted)
    Spatial(3, 9, 11, [(3, 130, *SAME3), (2, 140, (1, 1), (1, 1), (0, 0)), (2, 3, *SAME3)])
    # Of 297 pixels three row tiles of 128 channels; of the 2 and the 12 behind them, and of three channels, two row
    # tiles twice as tall. The output and its mask are two stores, of 128 channels one for each half.
    many, few = [[True] * 4] * 3, [[True, True]] * 2
    assert written == dict(enumerate([*many, *few, *many, *few, *few]))
    written.clear()
    Entry(normal(3, 15, 9, 11), (70, 50, 20, 130))
    # For each row tile two GEMM tiles, each storing to four places, and two column tiles of the pooled branch.
    assert sorted(written) == list(range(3 * (2 + 2)))
    assert all(any(stores) for stores in written.values())
    # The same, all GEMM tiles first: without a mask these store to three places, those of the pooled branch to one.
    for tiles, order in (({}, [True, True, False, False] * 3), ({"interleaved": False}, [True] * 6 + [False] * 6)):
        written.clear()
        tiles = dataclasses.replace(configs.DEFAULTS["entry"](torch.float32, "cpu"), **tiles)
        Entry(normal(3, 15, 9, 11), (70, 50, 20, 130), save=False, tiles=tiles)
        assert [len(written[program]) > 2 for program in range(12)] == order


@needs_interpreter
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_outside_is_read(monkeypatch, engine):
    """Poison shows what reaches a result; this shows what is read and then dropped, a fault on a GPU."""
    reads: set[int] = set()
    original = interpreter.InterpreterBuilder.create_masked_load

    def recorded(self, ptrs, mask, *rest):
        reads.update(np.unique(ptrs.data[mask.data.astype(bool)]).tolist())
        return original(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", recorded)
    memory = Memory()
    framed = mock.Mock(conv2d=lambda *args: memory.put(F.conv2d(*args), torch.float32, torch.channels_last))
    monkeypatch.setattr(spatial_module, "F", framed)
    buffers = block_buffers((3, 17, 9, 5), torch.channels_last, memory)
    launch_both(buffers, memory, **engine)
    bias, out = memory.randn(17, dtype=torch.float32), memory.empty((3, 17, 5, 3), torch.float32, torch.channels_last)
    pool_module.max_pool(buffers["x"], bias, out)
    frames = [(frame.data_ptr(), frame.data_ptr() + frame.nbytes) for frame in memory.frames]
    assert len(reads) > 1000
    assert not [address for address in reads for first, end in frames if first <= address < end]


# Which addresses


def huge(n: int, c: int, h: int = 1, w: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return a channels_last tensor in address space only: no page of it is ever touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    space = mmap.mmap(-1, dtype.itemsize * n * c * h * w, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(space, dtype=dtype).view(n, h, w, c).permute(0, 3, 1, 2)


class Notes:
    """Run one program of a grid, and note what it reads and writes: loads give zeros, and no memory is touched.

    ``behind``: which program, counted from the last.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        self.behind = self.program = 0
        self.patch = monkeypatch.setattr
        builder = interpreter.InterpreterBuilder
        self.patch(builder, "create_masked_load", lambda builder, *args: self.load(*args))
        self.patch(builder, "create_load", lambda builder, ptr, *args: self.load(ptr, None, None))
        self.patch(builder, "create_masked_store", lambda builder, *args: self.store(*args))
        self.patch(builder, "set_grid_idx", lambda builder, *args: setattr(builder, "grid_idx", (self.program, 0, 0)))
        self.patch(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)

    def load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        self.read.append(ptrs.data[mask.data.astype(bool)] if mask is not None else ptrs.data.ravel())
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        return interpreter.TensorHandle(np.zeros_like(ptrs.data, dtype=dtype), ptrs.get_element_ty())

    def store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        self.written.append(ptrs.data[mask.data.astype(bool)])

    def once(self, module: Any, name: str) -> None:
        """Have a module's kernel run its one program only."""
        kernel = getattr(module, name)

        def at(_: Any, grid: tuple[int]) -> Any:
            self.program = grid[0] - 1 - self.behind
            return kernel[(1,)]

        self.patch(module, name, type("Once", (), {"__getitem__": at})())

    def assert_inside(self, *tensors: Tensor, first: int = 2**31) -> None:
        """Each address lies in one of the tensors, and of a large one the last pixels are among them, none in front of
        its element ``first``."""
        touched = np.unique(np.concatenate([addresses.ravel() for addresses in (*self.read, *self.written)]))
        known = np.zeros(len(touched), dtype=bool)
        for t in tensors:
            inside = (touched >= t.data_ptr()) & (touched < t.data_ptr() + t.nbytes)
            known |= inside
            if t.numel() > 2**31:
                assert inside.any(), t.shape
                assert touched[inside].min() >= t.data_ptr() + t.itemsize * first
                assert touched[inside].max() >= t.data_ptr() + t.nbytes - 2 * t.itemsize * t.shape[1]
        assert known.all(), "an address is in none of the tensors"


MANY = 4_400_000, 16, 6, 6  # more elements than int32 counts


@needs_interpreter
@pytest.mark.parametrize("level", ["entry", "spatial", "library"])
def test_addresses_beyond_two_to_the_31_elements(monkeypatch, level):
    """The last program of tensors with more elements than int32 counts reads and writes their last pixels."""
    n, c, *size = MANY
    x, out = huge(n, c, *size), huge(n, 2 * c, *size)
    weight, bias = torch.zeros(c, c, 1, 1, dtype=torch.float16), torch.zeros(c, dtype=torch.float16)
    notes = Notes(monkeypatch)
    operands = [x, out, weight, bias]
    if level == "entry":
        notes.once(entry_module, "_entry_kernel")
        # The last program is a tile of the pooled branch; the GEMM's last tile comes before the pool tiles.
        dense, mask, codes = huge(*MANY), huge(n * 36, 4, dtype=torch.uint8), huge(n * 36, c, dtype=torch.uint8)
        pooled = huge(n * 36, c)
        for notes.behind in (0, 1):
            entry(x, (weight, weight), (bias, bias), weight, bias, out, c, (dense,), (mask, pooled, codes), 2)
        operands += [dense, mask, pooled, codes]
    elif level == "library":
        result = huge(*MANY)
        monkeypatch.setattr(spatial_module, "F", mock.Mock(conv2d=lambda *args: result))
        notes.once(spatial_module, "_library_kernel")
        spatial([Conv(x, weight, bias, c)], out, None, tiles=LIBRARY)
        operands[0] = result
    else:
        notes.once(spatial_module, "_spatial_kernel")
        spatial([Conv(x, weight, bias, c)], out, None)
    notes.assert_inside(*operands)


@needs_interpreter
def test_addresses_beyond_two_to_the_31_elements_in_the_stems_pool(monkeypatch):
    x, out = (huge(140_000_000, 16) for _ in range(2))
    bias, notes = torch.zeros(16, dtype=torch.float16), Notes(monkeypatch)
    notes.once(pool_module, "_max_pool_kernel")
    pool_module.max_pool(x, bias, out)
    notes.assert_inside(x, out, bias)


@needs_interpreter
def test_the_last_steps_of_the_stems_pool_gradient_do_not_pass_two_to_the_31_pixels(monkeypatch):
    """By as many tiles as they would be beyond the images."""
    pixels, notes = backends._MOST_PIXELS, Notes(monkeypatch)
    grad, out, codes = huge(pixels, 2), huge(pixels, 2), huge(pixels, 2, dtype=torch.uint8)
    monkeypatch.setattr(target, "gpu", lambda device: target.Gpu("cpu", "cpu", 21_183))
    config, parts = pool_module._gradient_launch_config(out.shape, out.dtype, target.gpu(out.device))
    assert parts * config.sizes[-1] * config.constants["BLOCK_M"] > 2**31 + 128
    notes.once(pool_module, "_max_pool_gradient_kernel")
    pool_module.max_pool_gradient(grad, codes, out)
    notes.assert_inside(grad, codes, out)


@needs_interpreter
@pytest.mark.parametrize(
    ("kernel", "images"),
    [
        *((f"{name}_gradient", MANY) for name in ("data", "pool", "entry", "weight")),
        ("split", MANY),
        # Images so large that those of one step go beyond it, and fewer than a step has pixels.
        ("weight_gradient", (128, 16, 1100, 1100)),
        ("weight_gradient", (127, 16, 1100, 1100)),
    ],
)
def test_addresses_beyond_two_to_the_31_elements_in_the_backward(monkeypatch, kernel, images):
    n, c, height, width = images
    pixels, shape = n * height * width, (n, height, width)
    gpu, notes = target.gpu(torch.device("cpu")), Notes(monkeypatch)
    module = entry_gradient_module if kernel == "pool_gradient" else globals()[f"{kernel}_module"]
    notes.once(module, f"_{kernel}_kernel")
    images, rows, bytes_ = huge(*images), huge(pixels, c), huge(pixels, c, dtype=torch.uint8)
    weight = torch.zeros(c, c, 3, 3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    operands = [images, rows]
    if kernel == "split":
        partials = torch.empty(split_module.parts(pixels, gpu) * c)
        split_module.split(images, bytes_, (split_module.Branch(c, 0, c - 2, c, 0),), [rows], partials)
        operands += [bytes_, partials]
    elif kernel == "data_gradient":
        tiles, out = configs.Tiles(32, 32, 16, num_warps=4, num_stages=2), huge(pixels, c)
        partials = torch.empty(data_gradient_module.parts(pixels, c, tiles, gpu) * c)
        gradient = data_gradient_module.Gradient(weight.shape, relu=True, stride=c)
        data_gradient_module.data_gradient((gradient,), [rows], [weight], [images], [out], shape, partials, tiles)
        operands += [out, weight, partials]
    elif kernel == "pool_gradient":
        entry_gradient_module.pool_gradient(rows, bytes_, images)
        operands += [bytes_]
    elif kernel == "entry_gradient":
        weight = weight[:, :, :1, :1].contiguous()
        entry_gradient_module.entry_gradient(rows, (weight,), images)
        operands += [weight]
    else:
        product = weight_gradient_module.Product(c, c, 3, 3)
        tiles = configs.Tiles(32, 64, 128, num_warps=4, num_stages=2)
        division = weight_gradient_module.divide(shape, [product], torch.float16, gpu, tiles)
        division = division._replace(steps_of_part=1, parts=division.steps)
        notes.behind = 1  # the last tile's taps are those below and right of the last pixel
        partials = huge(division.parts * c, 9 * c, dtype=torch.float32)
        weight_gradient_module.weight_gradient((product,), [rows], [images], shape, division, partials)
        operands += [partials]
    notes.assert_inside(*operands, first=0 if n == 128 else 2**31)  # each image's pixel


@needs_interpreter
@pytest.mark.parametrize("kernel", ["first_layer", "first_layer_gradient"])
def test_addresses_beyond_two_to_the_31_elements_in_the_first_layer(monkeypatch, kernel):
    notes, operands = Notes(monkeypatch), [huge(60_000, 1, 180, 180), huge(60_000, 16, 60, 60)]
    weight = torch.zeros(16, 1, 7, 7, dtype=torch.float16)
    bias = torch.zeros(16, dtype=torch.float16)
    notes.once(first_layer_module, f"_{kernel}_kernel")
    if kernel == "first_layer":
        first_layer_module.first_layer(operands[0], weight, bias, operands[1], 3)
        operands += [weight, bias]
    else:
        monkeypatch.setattr(configs, "PROGRAMS", 10**5)  # a part has few steps
        monkeypatch.setattr(first_layer_module, "add_up", lambda sums, outs, partials: operands.append(partials))
        configs.forget()
        first_layer_module.first_layer_gradient(*operands, weight, bias, 3)
        configs.forget()
    notes.assert_inside(*operands)


@needs_interpreter
def test_the_last_tile_of_data_gradients_reads_nothing_behind_its_pixels(monkeypatch):
    n, c, height, width = 5, 16, 3, 3
    pixels, tiles = n * height * width, configs.Tiles(32, 32, 16, num_warps=4, num_stages=2)
    gpu, notes = target.gpu(torch.device("cpu")), Notes(monkeypatch)
    notes.once(data_gradient_module, "_data_gradient_kernel")
    weight = torch.zeros(c, c, 3, 3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    active = torch.zeros(n, c, height, width, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    rows, out = (torch.zeros(pixels, c, dtype=torch.float16) for _ in range(2))
    partials = torch.empty(data_gradient_module.parts(pixels, c, tiles, gpu) * c)
    gradient = data_gradient_module.Gradient(weight.shape, relu=True, stride=c)
    data_gradient_module.data_gradient(
        (gradient,), [rows], [weight], [active], [out], (n, height, width), partials, tiles
    )
    notes.assert_inside(rows, weight, active, out, partials)


# How much work


@needs_interpreter
@pytest.mark.parametrize("kernel", ["entry", "entry_gradient", "weight_gradient"])
def test_what_is_left_behind_whole_tiles_takes_smaller_ones(monkeypatch, kernel):
    """Of 192 channels or rows the last 64: half of a tile's products."""
    shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
    own = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        shapes[(*a.data.shape, b.data.shape[1])] += 1
        return own(self, a, b, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    n, gpu, format = 128, target.gpu(torch.device("cpu")), torch.channels_last
    images, wide = (torch.zeros(n, c, 1, 2, dtype=torch.float16).to(memory_format=format) for c in (8, 192))
    rows = torch.zeros(2 * n, 8, dtype=torch.float16)
    if kernel == "entry":
        weight, bias = torch.zeros(192, 8, 1, 1, dtype=torch.float16), torch.zeros(192, dtype=torch.float16)
        entry(images, (weight,), (bias,), weight, bias, wide, 0, (), None, 0, part="gemm")
    elif kernel == "entry_gradient":
        entry_gradient_module.entry_gradient(rows, (torch.zeros(8, 192, 1, 1, dtype=torch.float16),), wide)
    else:
        product = weight_gradient_module.Product(192, 8, 1, 1)
        division = weight_gradient_module.divide((n, 1, 2), [product], torch.float16, gpu)
        assert division.images_first
        partials = torch.zeros(division.parts * 192 * 8)
        grads = torch.zeros(2 * n, 192, dtype=torch.float16)
        weight_gradient_module.weight_gradient((product,), [grads], [images], (n, 1, 2), division, partials)
    narrow = {"weight_gradient": (64, 128, 16)}.get(kernel, (128, 128, 64))
    whole = {"weight_gradient": (128, 128, 16)}.get(kernel, (128, 128, 128))
    assert shapes == {whole: 2, narrow: 2}


class Operators(TorchDispatchMode):
    """List the operators that run, those inside the block's own operator too, but not the interpreter's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.paused = False
        self.key = torch._C.DispatchKey.CPU if DEVICE == "cpu" else torch._C.DispatchKey.CUDA

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused:
            self.names.append(str(func.name()))
        if func.namespace != "fastinception":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(torch._C.DispatchKeySet(self.key), *args)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_launches_and_no_other_work(monkeypatch, grad, weight_format, engine):
    if engine:
        monkeypatch.setitem(configs.DEFAULTS, "spatial_train" if grad else "spatial", lambda dtype, chip: LIBRARY)
    configs.forget()
    block = FastInception(16, 9, (4, 8), (3, 5), 7, backend="triton").to(DEVICE, memory_format=weight_format)
    x = normal(2, 16, 4, 5).contiguous(memory_format=torch.channels_last).to(DEVICE)
    expected = super(FastInception, block).forward(x)
    operators, launched = Operators(), []
    kernel = type(entry_module._entry_kernel)
    original = kernel.run

    def run(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        operators.paused = True
        try:
            return original(self, *args, **kwargs)
        finally:
            operators.paused = False

    monkeypatch.setattr(kernel, "run", run)
    with torch.set_grad_enabled(grad), operators:
        y = block(x)
    torch.testing.assert_close(y, expected)
    configs.forget()
    assert launched == ["_entry_kernel", "_library_kernel" if engine else "_spatial_kernel"]
    views = {"aten::slice.Tensor", "aten::detach", "aten::alias", "aten::view", "aten::split_with_sizes"}
    allocations = {"aten::empty.memory_format"}
    compute = [name for name in operators.names if name not in views | allocations]
    copies = ["aten::copy_"] * (2 if weight_format is torch.contiguous_format else 0)  # of the spatial weights
    # With the library nothing else but the two convolutions.
    own = "fastinception::triton_forward" if grad else "fastinception::triton_inference"
    assert compute == [own, *copies, *(["aten::conv2d"] * 2 if engine else [])]
    if not engine:
        assert sum(name in allocations for name in operators.names) <= 7 + len(copies)
