"""What the compiler makes of the kernels, without a GPU, and that bench/aot_report.py reads it right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import aot, aot_report, sass
from fastinception.kernels import configs
from tests import fresh

SCRIPT = Path(aot_report.__file__)
# A training step of all blocks, many of which share kernels, on the chip that the tiles are for; every chip with the
# dtypes, both modes and a K that no step divides. (All of it takes minutes: run the command.)
FORWARD = ("entry", "spatial")
BACKWARD = ("data_gradient", "entry_gradient", "weight_gradient")
SWEEPS = ("split", "pool_gradient", "sum")  # without products
FEW, FEWER = "1x14", "32x14"
OTHER_CHIPS = tuple(chip for chip in aot.CHIPS if chip != "sm_90")
COMMANDS = (
    ["--chip", "sm_90", "--dtype", "bf16", "--mode", "training"],
    ["--chip", "sm_90", "--block", "4b", "--dtype", "bf16", "--layout", "NCHW", "--kernel", *SWEEPS],
    ["--block", "4e", "--dtype", "fp32", "--mode", "inference"],
    ["--chip", *OTHER_CHIPS, "--block", "4e", "--dtype", "fp16", "--mode", "training"],
    ["--chip", "sm_90", "--block", "4e", "--dtype", "bf16", "--mode", "inference"],
    # No comparison of bfloat16 in PTX.
    ["--chip", "sm_80", "--block", "3a", "--dtype", "bf16", "--mode", "training", "--kernel", "entry"],
    # The smaller tiles of few pixels, with 64 channels and with 128.
    ["--chip", "sm_90", "--block", "4e", "--dtype", "bf16", "--images", FEW, "--kernel", *FORWARD, *BACKWARD[:2]],
    ["--chip", "sm_90", "--block", "5b", "--dtype", "bf16", "--images", "128x3", "--kernel", "entry"],
    # Fewer images than a step has pixels.
    ["--chip", "sm_90", "--block", "4b", "--dtype", "bf16", "--images", FEWER, "--kernel", "weight_gradient"],
    ["--chip", *OTHER_CHIPS, "--block", "4e", "--dtype", "fp16", "--images", FEW, "--kernel", "entry"],
    # A tile of a quarter of the channels, which has twice the pixels, with the fewest registers to spare.
    ["--chip", "sm_80", "--block", "3a", "--dtype", "fp32", "--kernel", "spatial"],
)
# Issue pressure of the default tiles on sm_90, by the kernel and the mode: what was reached, and of the pool the limits
# of DESIGN, which allows the GEMM 0.6 and the spatial level 0.5. It is the whole launch's: a tile of few channels alone
# has little work for the tensor cores and as many instructions as a wide one. Over the cycles of whole tiles, as a
# narrower last one may have no more instructions than the one in whose place it is.
LIMITS = {
    "entry gemm": {"inference": 0.31, "training": 0.31},
    "entry pool": {"inference": 2.5, "training": 4.8},
    "spatial": {"inference": 0.45, "training": 0.45},
    "data_gradient": {"training": 0.63},
    "entry_gradient": {"training": 0.53},
    "weight_gradient": {"training": 0.6},
}
# In 3a the 5x5 has 32 channels, and 1.02 by itself. In 3b it has 32 to read, and its gradient adds up 96: a larger part
# of the launch than in other blocks.
EXCEPTIONS = {("3a", "spatial"): 0.47, ("3b", "data_gradient"): 0.69}
DESIGN = {"entry gemm": 0.6, "spatial": 0.5}  # over the cycles of the tiles as they are
# Over those of what is computed, without the tiles' padding: what was reached.
ASKED = {"entry gemm": 0.41, "spatial": 0.53, "data_gradient": 0.8, "entry_gradient": 0.59, "weight_gradient": 0.9}
# Where a third of the tiles is padding: 208 channels of the 3x3 in 4a, which take two tiles of 128, the gradients of 96
# and 192, and in 3a the products of 32 channels; and where a third of the gradient is that of a narrow last tile.
ASKED_EXCEPTIONS = {
    ("4a", "spatial"): 0.56,
    ("3a", "data_gradient"): 0.92, ("4a", "data_gradient"): 0.85, ("4d", "data_gradient"): 0.83,
    ("3a", "entry_gradient"): 0.68, ("3a", "weight_gradient"): 1.0,
}  # fmt: skip

# Two warpgroups. The loop from 0x10 to 0xb0 has 11 instructions, two products and two groups of copies, one each.
PIPELINED = """
\t\tFunction : _kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
                                                                    /* 0x000fe40000000f00 */
        /*0010*/                   DEPBAR.LE SB0, 0x2 ;             /* 0x000080800000791a */
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;    /* 0x0000000000007b1d */
        /*0030*/              @!PT LDS RZ, [RZ] ;                   /* 0x00000000fffff984 */
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R107], desc[UR14][R18.64], P2 ;
        /*0080*/                   LDGDEPBAR ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R107+0x1000], desc[UR14][R20.64], !P1 ;
        /*00a0*/                   LDGDEPBAR ;
        /*00b0*/              @!P0 BRA 0x10 ;
        /*00c0*/                   LDG.E.U16 R4, desc[UR14][R2.64] ;
        /*00d0*/                   STG.E.128 desc[UR14][R2.64], R24 ;
        /*00e0*/               @P1 STG.E.U8 desc[UR14][R2.64], R28 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   BRA 0x100;
"""
# One warpgroup. Loads into registers that the same iteration stores to shared memory.
SYNCHRONOUS = """
        /*0000*/                   LDG.E.128 R32, desc[UR14][R2.64] ;
        /*0010*/                   LDG.E.64 R36, desc[UR14][R4.64+0x10] ;
        /*0020*/                   STS.128 [R58], R32 ;
        /*0030*/                   STS.64 [R58+0x800], R36 ;
        /*0040*/                   LDSM.16.M88.4 R8, [R64+UR5] ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R8, R20, R12 ;
        /*0060*/                   HMMA.1688.F32.TF32 R12, R8, R20, R12 ;
        /*0070*/              @!P0 BRA 0x0 ;
        /*0080*/                   EXIT ;
"""


def the_loop(text: str, warps: int = 8) -> sass.Loop:
    (loop,) = sass.main_loops(sass.parse(text), warps)
    return loop


def test_counts_of_a_pipelined_loop():
    copied = 2 * 16 * 32 * 8  # copies x bytes x lanes x warps
    assert the_loop(PIPELINED) == sass.Loop(
        instructions=11,
        tensor_core=2,
        fma=2 * 2 * 64 * 128 * 16,
        copies=2,
        global_bytes=copied,
        shared_bytes=copied + 2 * 2 * (64 + 128) * 32,  # the LDS under @!PT moves nothing
        narrowest_load=16,
        waits_for_own_loads=False,
        drains=False,
    )
    code = sass.parse(PIPELINED)
    assert sass.widths(code, "LDG", "LDGSTS") == {"16": 2, "2": 1}
    assert sass.widths(code, "STG") == {"16": 1, "1": 1}
    assert sass.tensor_core(code) == 2


def test_counts_of_a_synchronous_loop():
    assert the_loop(SYNCHRONOUS, warps=4) == sass.Loop(
        instructions=8,
        tensor_core=2,
        fma=4 * (16 * 8 * 16 + 16 * 8 * 8),
        copies=0,
        global_bytes=(16 + 8) * 128,
        shared_bytes=((16 + 8) + (16 + 8) + 16) * 128,
        narrowest_load=8,
        waits_for_own_loads=True,
        drains=False,
    )


def test_pressures_by_hand():
    """11 instructions x 8 warps / 4 slots, over 2 x 2 x 64 x 128 x 16 / 2048 cycles."""
    part = aot.Part("gemm", (128, 128, 32), steps=3, asked=128 * 96 * 32)
    found = aot._pressures(the_loop(PIPELINED), part, warps=8, rate=2048)
    assert found["tensor_cycles"] == 256
    assert found["issue_pressure"] == 22 / 256
    assert found["shared_pressure"] == (8192 + 24576) / 128 / 256
    assert found["l2_bytes_per_cycle"] == 8192 / 256
    assert (found["steps"], found["asked_cycles"]) == (3, 192)


def test_a_product_with_its_left_operand_in_registers_reads_one_operand():
    text = PIPELINED.replace("R24, gdesc[UR8], R24 ;", "R24, R4, gdesc[UR8], R24 ;")
    assert the_loop(PIPELINED).shared_bytes - the_loop(text).shared_bytes == 2 * 64 * 32


@pytest.mark.parametrize(
    ("change", "waits"),
    [
        pytest.param(("SB0, 0x2", "SB0, 0x1"), True, id="older group"),
        pytest.param(("SB0, 0x2", "SB0, 0x0"), True, id="both groups"),
        pytest.param(("SB0, 0x2", "SB0, 0x4"), False, id="two steps ahead"),
        pytest.param(("DEPBAR.LE SB0, 0x2", "DEPBAR.LE SB1, 0x0"), False, id="another counter"),
    ],
)
def test_waits_for_copies(change, waits):
    assert the_loop(PIPELINED.replace(*change)).waits_for_own_loads is waits


def test_copies_that_all_products_cover_are_not_waited_for():
    """Two stages: the copies start before the products, or before half of them, and are waited for after them."""
    lines = [line for line in PIPELINED.splitlines() if "DEPBAR.LE SB0" not in line]
    bodies = [line.split("*/", 1)[1] for line in lines if line.startswith("        /*")]
    loop = bodies[1:11]
    copies, products = [x for x in loop if "LDG" in x], [x for x in loop if "LDG" not in x]
    wait = "                   DEPBAR.LE SB0, 0x0 ;"
    for order, waits in (
        ([*copies, *products[:-1], wait, products[-1]], False),
        ([*products[:3], *copies, *products[3:-1], wait, products[-1]], False),
        ([*copies, wait, *products], True),
        # One of four covers them.
        ([*products[:3], products[2], products[2], *copies, *products[3:-1], wait, products[-1]], True),
    ):
        text = "\n".join(f"        /*{16 * i:04x}*/{x}" for i, x in enumerate(order)).replace("BRA 0x10", "BRA 0x0")
        assert the_loop(text).waits_for_own_loads is waits


def test_registers_that_the_next_iteration_uses_are_not_waited_for():
    lines = SYNCHRONOUS.splitlines()
    order = [*lines[3:8], lines[1], lines[2], *lines[8:]]
    text = "\n".join(f"        /*{16 * i:04x}*/{x.split('*/', 1)[1]}" for i, x in enumerate(order))
    assert not the_loop(text, warps=4).waits_for_own_loads
    # The last of the four registers that a wide load fills.
    used = text.replace("@!P0 BRA", "MOV R1, R35 ;\n        /*0075*/              @!P0 BRA")
    assert the_loop(used, warps=4).waits_for_own_loads


def test_a_load_whose_register_nothing_can_use_is_not_waited_for():
    """Into RZ. The other load is used behind the products, of the iteration before."""
    text = SYNCHRONOUS.replace("LDG.E.64 R36", "LDG.E.64 RZ").replace("STS.128 [R58], R32", "MOV R1, R2")
    assert not the_loop(text, warps=4).waits_for_own_loads


def test_drained_tensor_cores():
    assert the_loop(PIPELINED.replace("gsb0, 0x1", "gsb0, 0x0")).drains


def test_which_loops_are_main_loops():
    outer = PIPELINED.replace(
        "/*00c0*/                   LDG.E.U16 R4,", "/*00c0*/ @P0 BRA 0x0 ;\n        /*00c4*/ MOV R4,"
    )
    assert the_loop(outer) == the_loop(PIPELINED)  # not the loop around it
    # A wait that was moved behind the program's end jumps back into the loop.
    out_of_line = PIPELINED.replace("BRA 0x100;", "BRA 0x20 ;")
    assert the_loop(out_of_line) == the_loop(PIPELINED)
    assert sass.main_loops(sass.parse(PIPELINED.replace("HGMMA", "FFMA")), 8) == []


def test_what_the_machine_code_does_not_say_is_none():
    text = PIPELINED.replace("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", "UTCHMMA gdesc[UR4], gdesc[UR6]")
    loop = the_loop(text)
    assert loop.tensor_core == 2
    assert loop.fma is None
    assert loop.shared_bytes is None
    part = aot.Part("gemm", (128, 128, 64), steps=1, asked=0)
    assert aot._pressures(loop, part, warps=8, rate=4096)["tensor_cycles"] == math.prod(part.tile) / 4096


def test_unknown_ways_to_load_are_refused():
    with pytest.raises(ValueError, match="by LDG or LDGSTS"):
        the_loop(PIPELINED.replace("LDGSTS.E.BYPASS.128", "UTMALDG.2D"))


# What the compiler makes of the kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("aot")
    paths = [folder / f"{i}.json" for i in range(len(COMMANDS))]
    commands = [[*arguments, "--json", str(path)] for arguments, path in zip(COMMANDS, paths, strict=True)]
    # In one process: to start another and import PyTorch takes as long as a kernel.
    together = [[*arguments, "--jobs", "1"] for arguments in commands[:-1]]
    fresh.run(f"from bench import aot_report\nfor argv in {together}: assert aot_report.main(argv) == 0")
    # And as a user runs it, in processes of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *commands[-1], "--jobs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr  # Triton 3.9 warns of a new default where a launch says nothing
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


# In a process without the interpreter, on a driver that has no device: Triton's own launcher binds and specialises.
JIT = """
from unittest import mock
import torch
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from bench import aot

class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return aot.gpu_target(self.chip)

def given(attrs):
    return {place: sorted(found) for place, found in attrs.items() if found}

def record(self, key, signature, device, constexprs, options, attrs, warmup):
    asked[self.fn.__name__] = signature, constexprs, given(attrs), options.__dict__

driver.set_active(Driver())
compared = 0
for Driver.chip in aot.CHIPS:
    for kernel, module in aot.KERNELS.items():
        getattr(module, f"_{kernel}_kernel").device_caches.clear()
    for block, dtype, save in (("4e", "bf16", True), ("3a", "fp16", False), ("4b", "fp32", True)):
        asked = {}
        with mock.patch.object(JITFunction, "_do_compile", record):
            aot.launch_block(*aot.block_operands(aot.WIDTHS[block], aot.DTYPES[dtype], 16, 5, "cpu"), save, Driver.chip)
        for name, launch in aot.launches(Driver.chip, aot.WIDTHS[block], aot.DTYPES[dtype], save, 16, 5).items():
            source, options = aot.specialize(*launch, Driver.chip)
            options = make_backend(aot.gpu_target(Driver.chip)).parse_options(options).__dict__
            ours = source.signature, source.constants, given(source.attrs), options
            for one, other in zip(ours, asked.pop(f"_{name}_kernel"), strict=True):
                assert one == other, (Driver.chip, block, dtype, name, one, other)
            compared += 1
        assert not asked, asked
print("compared", compared)
"""


def test_what_the_report_compiles_is_what_a_launch_compiles():
    assert fresh.run(JIT).split() == ["compared", str(len(aot.CHIPS) * (8 + 2 + 8))]


# In a process without the interpreter: how many kernels training steps of GoogLeNet need, image size after image size.
COUNT = """
import json, torch
from bench import aot

found = {}
for batch, sides in ((128, (12, 6, 3)), (128, (28, 14, 7)), (256, (13, 7, 5))):
    for block, widths in aot.WIDTHS.items():
        side = dict(zip("345", sides))[block[0]]
        for name, launch in aot.launches("sm_90", widths, torch.bfloat16, True, batch, side).items():
            source, options = aot.specialize(*launch, "sm_90")
            found.setdefault(name, set()).add((source.hash(), str(sorted(options.items()))))
    print(json.dumps({name: len(kernels) for name, kernels in found.items()}))
"""


def test_blocks_and_image_sizes_share_kernels():
    """Each differs from the others by its tiles, by whether steps end within the channels, or by what 8 divides."""
    first, second, third = map(json.loads, fresh.run(COUNT).splitlines())
    few = {"split": 1, "pool_gradient": 1, "weight_gradient": 1, "sum": 1}
    assert first == few | {"entry": 6, "spatial": 5, "data_gradient": 5, "entry_gradient": 5}
    # 7x7 pixels fill larger tiles than 3x3.
    assert second == third == few | {"entry": 8, "spatial": 6, "data_gradient": 6, "entry_gradient": 6}


# In a process without the interpreter: the operands of each rounding of a pair, by the kernel's PTX and by Triton's.
PAIRS = """
import re, torch
from bench import aot
from fastinception.kernels import target

gpu = target.Gpu("sm_90", "sm_90")
for dtype in (torch.bfloat16, torch.float16):
    function, args, kwargs = aot.launches("sm_90", aot.WIDTHS["3a"], dtype, False)["spatial"]
    assert kwargs["RELU"] == target.relu_asm(gpu, dtype) != ""
    for relu in (kwargs["RELU"], None):
        ptx = aot.compile_launch(function, args, kwargs | {"RELU": relu}, "sm_90").asm["ptx"]
        name = "cvt.rn" + (".relu" if relu else "") + (".bf16x2" if dtype is torch.bfloat16 else ".f16x2") + ".f32"
        pairs = re.findall(re.escape(name) + r"\\s+%r\\d+, %[rf](\\d+), %[rf](\\d+);", ptx)
        print(len(pairs), sum(int(upper) == int(lower) + 1 for upper, lower in pairs))
"""


def test_pairs_are_rounded_behind_a_relu_in_the_order_in_which_triton_rounds_them():
    """No machine without a GPU runs that PTX: the upper half comes first, and is the later of two sums."""
    counts = [line.split() for line in fresh.run(PAIRS).splitlines()]
    assert len(counts) == 4
    for pairs, in_order in counts:
        assert int(pairs) == int(in_order) > 0, counts


@pytest.mark.parametrize("widths", [aot.WIDTHS["4b"], (20, 12, (4, 8), (4, 12), 20), (9, 5, (2, 6), (3, 1), 7)])
def test_what_the_sums_promise_the_compiler_holds(widths):
    function, args, kwargs = aot.launches("sm_90", widths, torch.float32, save=True)["sum"]
    named = dict(zip(function.arg_names, args, strict=False))
    numbers = [number for name in ("offsets", "sizes", "strides") for number in configs.from_list(named[name])]
    assert all(number % kwargs["ALIGNED"] == 0 for number in numbers)
    assert kwargs["ALIGNED"] == 8 or any(number % (2 * kwargs["ALIGNED"]) for number in numbers)


def name(row: dict[str, Any]) -> str:
    return " ".join(row[key] for key in aot_report.KEY)


def test_all_was_compiled(compiled):
    expected = 8 * len(aot.WIDTHS) + 3 + 2 * len(aot.CHIPS) + 8 * len(OTHER_CHIPS) + 2 + 1
    expected += 4 + 1 + 1 + len(OTHER_CHIPS) + 1
    assert len(compiled) == expected
    assert set(aot.KERNELS) == {*FORWARD, *BACKWARD, *SWEEPS}
    assert {row["chip"] for row in compiled} == set(aot.CHIPS)
    assert {row["kernel"] for row in compiled} == set(aot.KERNELS)
    read = {row["layout"]: set(row["loads"]) for row in compiled if (row["kernel"], row["block"]) == ("split", "4b")}
    assert read == {"channels_last": {"16", "1"}, "NCHW": {"8", "1"}}
    for row in compiled:
        if row["kernel"] in ("entry", "spatial"):  # only training stores the bytes of the ReLU mask
            assert ("1" in row["stores"]) is (row["mode"] == "training"), name(row)


def test_nothing_spills_and_all_fits_the_chip(compiled):
    for row in compiled:
        assert row["stack"] == row["local"] == 0, name(row)
        assert row["shared"] <= aot.CHIPS[row["chip"]].shared, name(row)


def test_no_subroutine_is_called(compiled):
    """As for a division in int64, of which an epilogue has one for each of its pixels."""
    for row in compiled:
        if row["chip"] in ("sm_80", "sm_90"):  # sm_100 has some that guard its tensor cores
            assert row["subroutines"] == 0, name(row)


def test_products_run_on_tensor_cores_from_a_main_loop_each(compiled):
    for row in compiled:
        if row["kernel"] in SWEEPS:
            assert row["tensor_core"] == 0, name(row)
            continue
        assert row["tensor_core"] >= 4, name(row)
        if row["chip"] != "gfx942":
            parts = {
                "entry": {"gemm", "pool"},
                "spatial": {"3x3", "5x5"},
                "data_gradient": {"3x3", "5x5", "1x1"},
                "entry_gradient": {"gemm"},
                "weight_gradient": {"1x1", "3x3", "5x5"} if row["images"] == FEWER else {"products"},
            }[row["kernel"]]
            assert {part.partition(" ")[0] for part in row["loops"]} == parts, name(row)
        for part, loop in row.get("loops", {}).items():
            rate = aot.CHIPS[row["chip"]].fma / (2 if row["dtype"] == "fp32" else 1)
            assert loop["tensor_cycles"] == math.prod(loop["tile"]) / rate, f"{name(row)}: {part}"


def test_loops_are_asked_for_the_products_of_the_block(compiled):
    for row in compiled:
        if row["kernel"] in SWEEPS or row["chip"] == "gfx942":
            continue
        k, c1, (c21, c2), (c31, c3), c4 = aot.WIDTHS[row["block"]]
        entry, pool, spatial = k * (c1 + c21 + c31), k * c4, 9 * c21 * c2 + 25 * c31 * c3
        of_pixel = {
            "entry": entry + pool,
            "spatial": spatial,
            "data_gradient": spatial + pool,
            "entry_gradient": entry,
            "weight_gradient": entry + spatial + pool,
        }[row["kernel"]]
        tiles = [loop["tile"] for loop in row["loops"].values()]
        pixels = tiles[0][2] if row["kernel"] == "weight_gradient" else max(tile[0] for tile in tiles)
        rate = aot.CHIPS[row["chip"]].fma / (2 if row["dtype"] == "fp32" else 1)
        asked = sum(loop["asked_cycles"] for loop in row["loops"].values())
        assert asked == pytest.approx(pixels * of_pixel / rate), name(row)


def test_operands_are_loaded_16_bytes_at_a_time(compiled):
    for row in compiled:
        for part, loop in row.get("loops", {}).items():
            assert loop["narrowest_load"] == 16, f"{name(row)}: {part}"
        if row["kernel"] == "sum":
            assert set(row["loads"]) == {"16"}, name(row)
        if row["kernel"] in SWEEPS:
            continue
        # Narrow ones are the biases of the epilogue; on gfx942 also 8-byte ones of the weights.
        assert row["loads"]["16"] >= 16, name(row)
        assert row["loads"]["16"] > sum(n for width, n in row["loads"].items() if width != "16"), name(row)
        wide = row["stores"].get("16", 0) + (row["stores"].get("8", 0) if row["chip"] == "gfx942" else 0)
        assert wide >= (4 if row["images"] == FEW else 8), name(row)


def cycles_of_whole_tile(loops: dict[str, dict[str, Any]], part: str) -> float:
    """Return the tensor cycles of a loop's step, of a smaller last tile's those of a tile as large as the others."""
    whole = loops[part.partition(" from ")[0]]
    if part.startswith("products"):
        return whole["tensor_cycles"]
    return whole["tensor_cycles"] * loops[part]["tile"][0] / whole["tile"][0]  # of few channels for more pixels


def test_issue_pressure_of_the_default_tiles(compiled):
    checked = set()
    for row in compiled:
        if row["chip"] != "sm_90" or row["kernel"] in SWEEPS or row["images"] != "128x14":
            continue  # of few pixels each tile has a processor of its own, and latency decides
        parts: dict[str, dict[str, dict[str, Any]]] = {}
        for loop_name, loop in row["loops"].items():
            part = row["kernel"] + (f" {loop_name.partition(' ')[0]}" if row["kernel"] == "entry" else "")
            parts.setdefault(part, {})[loop_name] = loop
        for part, loops in parts.items():
            issue = sum(loop["steps"] * loop["issue_cycles"] for loop in loops.values())
            tensor = sum(loop["steps"] * loop["tensor_cycles"] for loop in loops.values())
            asked = sum(loop["asked_cycles"] for loop in loops.values())
            whole = sum(loop["steps"] * cycles_of_whole_tile(loops, loop_name) for loop_name, loop in loops.items())
            told = f"{name(row)}: {part}"
            assert issue / whole <= EXCEPTIONS.get((row["block"], part), LIMITS[part][row["mode"]]), told
            if part in DESIGN:
                assert issue / tensor <= DESIGN[part], told
            if part in ASKED:
                assert issue / asked <= ASKED_EXCEPTIONS.get((row["block"], part), ASKED[part]), told
            if row["kernel"] != "entry":
                assert row["launch_pressure"] == pytest.approx(issue / asked)
                assert row["padding"] == pytest.approx(tensor / asked)
            checked.add((row["block"], part, row["mode"]))
    assert checked == {
        (block, part, mode) for block in aot.WIDTHS for part in LIMITS for mode in LIMITS[part]
        if mode == "training" or block == "4e"
    }  # fmt: skip


def test_two_programs_share_a_multiprocessor(compiled):
    """One computes while the other waits for memory: the default tiles of 16-bit types on sm_90, but for few pixels."""
    rows = [r for r in compiled if (r["chip"], r["images"]) == ("sm_90", "128x14") and r["kernel"] not in SWEEPS]
    rows = [r for r in rows if r["dtype"] != "fp32" and r["layout"] == "channels_last"]
    assert {row["kernel"] for row in rows} == {*FORWARD, *BACKWARD}
    for row in rows:
        assert 2 * 256 * row["registers"] <= 65536, name(row)
        assert 2 * (row["shared"] + 1024) <= 228 * 1024, name(row)


def test_few_pixels_get_smaller_tiles(compiled):
    tiles = {
        row["images"]: {part: tuple(loop["tile"]) for part, loop in row["loops"].items()} | {"shared": row["shared"]}
        for row in compiled
        if (row["chip"], row["dtype"], row["mode"], row["kernel"]) == ("sm_90", "bf16", "training", "entry")
    }
    assert tiles[FEW] == {"gemm": (64, 64, 64), "pool": (32, 128, 32), "shared": 5 * 16 * 1024}
    assert tiles["128x3"] == {"gemm": (64, 128, 64), "pool": (32, 128, 64), "shared": 3 * 24 * 1024}
    assert tiles["128x14"] == {"gemm": (128, 128, 64), "pool": (64, 128, 64), "shared": 3 * 32 * 1024}


def test_main_loops_overlap_their_loads_with_products(compiled):
    for row in compiled:
        for part, loop in row.get("loops", {}).items():
            # The pooled branch has no pipeline by design: nine loads a step would take 96 KB of shared memory.
            assert loop["waits_for_own_loads"] is (part == "pool"), f"{name(row)}: {part}"
            assert part == "pool" or not loop["drains"], f"{name(row)}: {part}"


def test_pooled_values_go_through_shared_memory_once(compiled):
    """Not each of the nine loads, which doubles what passes the port (9.75 instead of 3.75 on sm_80)."""
    (pressure,) = (
        row["loops"]["pool"]["shared_pressure"]
        for row in compiled
        if (row["chip"], row["images"], row["dtype"], row["kernel"], row["mode"])
        == ("sm_80", "128x14", "fp16", "entry", "training")
    )
    assert pressure < 5


def test_codes_are_stored_in_the_layout_of_the_pools_loads(compiled):
    """Else these take every second 16 bytes of x, and the maxima change their layout to be stored."""
    rows = [
        r
        for r in compiled
        if (r["chip"], r["images"], r["mode"], r["kernel"]) == ("sm_90", "128x14", "training", "entry")
    ]
    assert {row["block"] for row in rows} == set(aot.WIDTHS)
    for row in rows:
        assert row["stores"]["8"] <= 2, name(row)  # of codes: everything else is 16 bytes wide, or the mask's one
        assert row["loops"]["pool"]["shared_pressure"] <= 7.5, name(row)


# In a process without the interpreter: the first stage of bf16 and fp32, as its launches are in inference, and what
# trains its convolution and its pool.
STAGE = """
import json, torch
from unittest import mock
from bench import aot
from fastinception.kernels import first_layer, pool, target

def infer(x, weight, bias, conv, out, codes):
    first_layer.first_layer(x, weight, bias, conv, 2, relu=True)
    pool.max_pool(conv, bias, out, relu=True)
    first_layer.first_layer_gradient(x, conv, weight, bias, 2)

def train(x, weight, bias, conv, out, codes):
    pool.max_pool(conv, bias, out, codes, relu=True)
    pool.max_pool_gradient(out, codes, conv, bias)

for chip in aot.CHIPS:
    for dtype in (torch.bfloat16, torch.float32):
        shapes = (128, 1, 96, 96), (64, 1, 7, 7), (64,), (128, 64, 48, 48), (128, 64, 24, 24)
        operands = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        operands.append(torch.empty(shapes[-1], dtype=torch.uint8, device="meta"))
        operands = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in operands]
        with mock.patch.object(target, "gpu", return_value=target.Gpu(chip, chip, 132)):
            launches = [*aot.collected(lambda: infer(*operands)).items()]
            launches += [(f"trained {name}", one) for name, one in aot.collected(lambda: train(*operands)).items()]
        for name, one in launches:
            if name == "trained sum":
                continue
            made = aot.compile_launch(*one, chip)
            if chip == "gfx942":
                row = aot._read_amd(made.asm["amdgcn"])
            else:
                row = aot.read_nvidia(made, aot.disassemble([made], chip)[0])
            print(json.dumps([name, chip, dtype.itemsize, row]))
"""


def test_the_first_stages_kernels_keep_their_registers_and_access_memory_widely():
    rows = [json.loads(line) for line in fresh.run(STAGE).splitlines()]
    assert len(rows) == 6 * 2 * len(aot.CHIPS)
    for name, chip, itemsize, row in rows:
        told = f"{name} {chip} {itemsize}: {row}"
        assert row["stack"] == row["local"] == 0, told
        if name == "max_pool":
            assert set(row["loads"]) == set(row["stores"]) == {"16"}, told
            assert row["registers"] <= 80, told
        if name.startswith("trained"):
            assert row["loads"]["16"] >= 4, told
            assert row["stores"]["16"] >= 1, told
            # Beside them bytes of codes, half as wide as two-byte numbers and a quarter of four-byte ones.
            narrow = {"8", "4"} if itemsize == 2 else {"4"}
            assert {*row["loads"], *row["stores"]} <= {"16", *narrow}, told
            assert row["registers"] <= 128, told
        if name == "first_layer":
            assert set(row["stores"]) == {"8" if chip == "gfx942" and itemsize == 2 else "16"}, told
            if chip != "gfx942":  # so many programs of 128 threads have registers at a time
                assert (4 if itemsize == 2 else 3) * 128 * row["registers"] <= 65536, told
        if name.startswith("first_layer"):
            assert row["tensor_core"] > 0, told


# In a process without the interpreter. Of each kernel: what is said of its machine code, and the orders of the layouts
# in which it moves the numbers that are NCHW, loads of the split and stores of the others.
NCHW = """
import json, re, sys
import torch
from bench import aot

CASES = (
    ("4e", 14, ("entry", "spatial", "split", "pool_gradient", "entry_gradient")),
    ("5b", 7, ("spatial", "split", "entry_gradient")),
)
for block, side, names in CASES:
    # A batch of which 16 does not divide the pixels: else the compiler needs to be told less.
    launches = aot.launches("sm_90", aot.WIDTHS[block], torch.bfloat16, True, 129, side, "NCHW")
    compiled = [aot.compile_launch(*launches[name], "sm_90") for name in names]
    for name, kernel, code in zip(names, compiled, aot.disassemble(compiled, "sm_90")):
        row = aot.read_nvidia(kernel, code)
        layouts = dict(re.findall(r"^#(\\w+) = #ttg.blocked<.* order = \\[(.*)\\]", kernel.asm["ttgir"], re.M))
        moved = r"tt.load .*" if name == "split" else r"^ *tt.store .*"
        found = re.findall(moved + r"x!tt.ptr<bf16>, #(\\w+)>", kernel.asm["ttgir"], re.M)
        print(json.dumps([name, side, row, [layouts[layout] for layout in found]]))
"""


def test_what_is_nchw_is_read_and_written_along_pixels():
    """Without a spill, by lanes side by side in memory, and eight bytes at a time where 14x14 pixels align them."""
    for name, side, row, orders in map(json.loads, fresh.run(NCHW).splitlines()):
        told = f"{name} {side}x{side}: {row} {orders}"
        assert row["stack"] == row["local"] == 0, told
        assert ("2" in row["loads" if name == "split" else "stores"]) is (side == 7), told
        along_pixels = "0, 1"
        if name == "entry":  # which also stores what others read, in channels_last
            assert along_pixels in orders, told
        else:
            assert set(orders) == {along_pixels}, told


# The command


def a_row(**changes: Any) -> dict[str, Any]:
    loop = aot._pressures(the_loop(PIPELINED), aot.Part("gemm", (128, 128, 32), 1, 128 * 128 * 32), 8, 2048)
    return {
        "chip": "sm_90", "block": "3a", "images": "128x14", "layout": "NCHW", "dtype": "bf16", "mode": "training",
        "kernel": "entry",
        "registers": 128, "stack": 0, "local": 0, "shared": 98304, "tensor_core": 2,
        "loads": {"16": 2, "2": 1}, "stores": {"16": 1},
        "loops": {"gemm": loop}, "launch_pressure": 22 / 256, "padding": 1.0,
    } | changes  # fmt: skip


def test_lines_show_what_was_measured():
    text = "\n".join(aot_report.lines(a_row()))
    for shown in ("regs 128", "96.0 KB", "loads 2x16 1x2", "128x128x32", "256 tensor cycles", "issue  0.09"):
        assert shown in text
    assert "WAITS" not in text
    row = a_row(subroutines=2)
    assert "CALLS 2 subroutines" in "\n".join(aot_report.lines(row))
    row["loops"]["gemm"] |= {"waits_for_own_loads": True, "shared_pressure": None}
    assert "WAITS" in "\n".join(aot_report.lines(row))
    assert "no main loop" in "\n".join(aot_report.lines(a_row(loops={}, launch_pressure=None)))


def test_differences_name_the_kernel_the_figure_and_both_values():
    ours, other = a_row(), a_row(registers=130, loads={"16": 3})
    other["loops"]["gemm"] |= {"issue_pressure": 0.25}
    found = aot_report.differences({"rows": [ours, a_row(block="3b")]}, {"rows": [other, a_row(block="4a")]})
    assert found == [
        "sm_90 3a 128x14 NCHW bf16 training entry: registers 128, the other 130",
        "sm_90 3a 128x14 NCHW bf16 training entry: loads.16 2, the other 3",
        "sm_90 3a 128x14 NCHW bf16 training entry: loads.2 1, the other None",
        "sm_90 3a 128x14 NCHW bf16 training entry: loops.gemm.issue_pressure 0.086, the other 0.250",
        "sm_90 3b 128x14 NCHW bf16 training entry: only in this report",
        "sm_90 4a 128x14 NCHW bf16 training entry: only in the other report",
    ]
    assert aot_report.differences({"rows": [ours]}, {"rows": [a_row()]}) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "sm_75"], "invalid choice: 'sm_75'"),
        (["--block", "6a"], "invalid choice: '6a'"),
        (["--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["--mode", "both"], "invalid choice: 'both'"),
        (["--layout", "nhwc"], "invalid choice: 'nhwc'"),
        (["--kernel", "conv"], "invalid choice: 'conv'"),
        (["--jobs", "0"], "--jobs: must be a whole number, at least 1, got '0'"),
        (["--images", "0x14"], "BATCHxSIDE in pixels of the block's input was expected, got '0x14'"),
        (["--against", "no/such.json"], "--against no/such.json: No such file or directory"),
        (["--against", "EMPTY"], "is no report: it lacks commit, rows, triton"),
        (["--against", "OTHER"], "is no report: it lacks rows"),
        (["--against", "OLD"], "is no report: it lacks layout"),  # found before minutes of compilation
        (["--json", "no/such/new.json"], "--json: no/such/new.json: there is no folder"),
        (["--json", ""], "--json: the name of a file was expected, got ''"),
        ([], "TRITON_INTERPRET is set"),
    ],
)
def test_bad_arguments_are_named(arguments, message, monkeypatch, capsys, tmp_path):
    rows = [{key: "" for key in aot_report.KEY if key != "layout"}]
    files = {"EMPTY": [{}], "OLD": {"triton": "", "commit": "", "rows": rows}}
    files["OTHER"] = {"triton": "", "commit": "", "rows": [3]}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    arguments = [str(tmp_path / argument) if argument in files else argument for argument in arguments]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        aot_report.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_was_compiled_before_an_interrupt_is_kept(monkeypatch, tmp_path, capsys):
    def measure(case, kernels):
        if case.block == "3b":
            raise KeyboardInterrupt
        return [a_row(block=case.block)]

    monkeypatch.setattr(aot, "measure", measure)
    monkeypatch.setattr(aot_report.target, "interpreted", lambda: False)
    path = tmp_path / "kept.json"
    options = ["--chip", "sm_90", "--dtype", "bf16", "--mode", "training", "--jobs", "1", "--json", str(path)]
    assert aot_report.main(options) == 130
    assert [row["block"] for row in json.loads(path.read_text())["rows"]] == ["3a"]
    assert capsys.readouterr().err == "stopped\n"


def test_an_interrupt_ends_a_worker_without_a_word():
    """Each of them gets it, as does the command, which says that it was stopped."""
    code = f"import runpy, signal; runpy.run_path({str(SCRIPT)!r}, run_name='__mp_main__')"
    assert fresh.run(f"{code}; print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL)") == "True\n"
