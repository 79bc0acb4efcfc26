"""What the compiler makes of the options that tables may choose: the library's epilogue, tile order, early launch."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

from tests import fresh

# In a process without the interpreter. A level of 128 and of 32 channels, so that tiles of two widths occur.
CODE = """
import dataclasses, json
from unittest import mock
from bench import aot
from fastinception.googlenet import WIDTHS
from fastinception.kernels import configs

level = configs.Tiles(64, 128, 16, num_warps=8, num_stages=1, library=True, launch_pdl=True)
entry = configs.DEFAULTS["entry"](aot.DTYPES["bf16"], "sm_90")
entry = dataclasses.replace(entry, interleaved=False, launch_pdl=True)
with mock.patch.dict(configs.DEFAULTS, {"entry_train": lambda *_: entry, "spatial_train": lambda *_: level}):
    launches = aot.launches("sm_90", WIDTHS["3a"], aot.DTYPES["bf16"], True)
launches = {name: launches[name] for name in ("entry", "library")}
compiled = [aot.compile_launch(*launch, "sm_90") for launch in launches.values()]
rows = {}
for name, kernel, code in zip(launches, compiled, aot.disassemble(compiled, "sm_90")):
    rows[name] = aot.read_nvidia(kernel, code) | {
        "starts": code[0].operands, "shared": kernel.metadata.shared, "launch_pdl": kernel.metadata.launch_pdl,
        "waits": kernel.asm["ptx"].count("griddepcontrol.wait"),
        "signals": kernel.asm["ptx"].count("griddepcontrol.launch_dependents"),
    }
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(fresh.run(CODE))
    return rows


def test_nothing_spills(compiled):
    assert set(compiled) == {"entry", "library"}
    for name, row in compiled.items():
        assert row["stack"] == row["local"] == 0, name
        assert row["shared"] <= 227 * 1024, name


def test_each_is_read_from_its_first_instruction_on(compiled):
    """They are disassembled together; a kernel begins with its stack pointer."""
    for name, row in compiled.items():
        assert row["starts"].startswith("R1, c[0x0]"), name


def test_an_early_launch_waits_once_and_lets_the_next_one_start(compiled):
    for name, row in compiled.items():
        assert row["launch_pdl"], name
        assert (row["waits"], row["signals"]) == (1, 1), name


def test_the_librarys_epilogue_moves_16_bytes_at_a_time(compiled):
    loads, stores = compiled["library"]["loads"], compiled["library"]["stores"]
    assert loads["16"] >= 4
    # Beside the results: the biases, and bytes of the ReLU mask.
    assert stores["16"] >= 4
    assert set(stores) == {"16", "1"}
    assert compiled["library"]["tensor_core"] == 0
