"""Tiles: what is refused, what a GPU's table gives, and what the launchers make of it."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastinception.kernels import configs, target

H100 = target.Gpu("NVIDIA H100 80GB HBM3", "sm_90")
NAME = "nvidia-h100-80gb-hbm3.json"
TILES = {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 2}
CONDITIONS = dict.fromkeys(configs.CONDITIONS, "") | {"device": H100.name}


def entry(
    kernel: str = "spatial", dtype: str = "bfloat16", shape: tuple[int, int, int] = (1000, 100, 64), **tiles: Any
):
    rows, reduction, columns = shape
    return {
        "kernel": kernel, "dtype": dtype, "rows": rows, "reduction": reduction, "columns": columns,
        "tiles": TILES | tiles,
    }  # fmt: skip


def write(folder: Path, *entries: dict[str, Any], name: str = NAME) -> Path:
    (folder / name).write_text(json.dumps({"conditions": CONDITIONS, "entries": entries}))
    return folder / name


@pytest.fixture(autouse=True)
def tuned(monkeypatch, tmp_path):
    """Use an empty folder of tables, and forget it afterwards."""
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    monkeypatch.setattr(configs, "_warned", set())
    configs.forget()
    yield tmp_path
    configs.forget()
    configs._read_once.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 48}, "block_m must be a power of two"),
        ({"block_n": 8}, "block_n must be a power of two of at least 16"),
        ({"block_k": 0}, "block_k must be a power of two"),
        ({"block_k": 32.0}, "block_k must be a power of two"),
        ({"num_warps": 3}, "num_warps must be"),
        ({"num_warps": 32}, "num_warps must be 1, 2, 4, 8 or 16"),
        ({"num_stages": 0}, "num_stages at least 1"),
        ({"num_stages": True}, "num_stages at least 1"),
        ({"pool": (128, 64, 32)}, "pool's block_m must divide block_m, got 128 and 64"),
        ({"pool": (32, 64, 8)}, "pool's block_k must be a power of two"),
        ({"pool": (32, 64)}, "shorter"),
        ({"launch_pdl": 1}, "launch_pdl must be True or False, got 1"),
        ({"library": "yes"}, "library must be True or False"),
        ({"interleaved": None}, "interleaved must be True or False"),
    ],
)
def test_bad_tiles_are_refused(change, message):
    configs.Tiles(**TILES)
    with pytest.raises(ValueError, match=message):
        configs.Tiles(**TILES | change)


def test_numbers_in_a_list_are_neither_1_nor_multiples_of_16():
    numbers = (*range(100), (1 << 29) - 1, 1 << 29)
    launch = configs.launch_config(3, (16, numbers, (None, 1)))
    single, listed, others = launch.sizes
    assert (launch.grid, single, others) == ((3,), 16, (None, 5))
    assert all(number > 1 and number % 16 for number in listed)
    assert max(listed) < 1 << 31
    assert configs.from_list(listed) == numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chip", ["cpu", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_defaults(dtype, chip):
    for kernel in configs.DEFAULTS:
        for columns in (1, 15, 16, 17, 100, 1024):
            tiles = configs.choose(kernel, 100, 64, columns, dtype, target.Gpu("", chip))
            assert tiles.block_k == (128 if chip == "cpu" else 128 // dtype.itemsize)
            assert min(columns, 128) <= max(tiles.block_n, 16) < max(2 * columns, 17)
            assert (tiles.pool is not None) is (kernel in ("entry", "entry_train"))
            if tiles.pool is not None:
                pixels = 64 if chip.startswith("sm_") else 128
                assert tiles.pool == (pixels, 128, max(16, tiles.block_k * 64 // pixels))
            assert tiles.num_stages == (4 if chip == "sm_80" else 3)
            assert not tiles.launch_pdl
            assert not tiles.library
            assert tiles.interleaved


@pytest.mark.parametrize(
    ("rows", "columns", "processors", "size"),
    [
        (49, 448, 132, (64, 64, 5)),
        (18 * 64, 448, 126, (64, 64, 5)),  # 18 x 7 tiles
        (18 * 64, 448, 125, (64, 128, 3)),
        (18 * 64 + 1, 448, 126, (64, 128, 3)),
        (18 * 64, 449, 126, (64, 128, 3)),
        (33 * 64, 512, 132, (64, 128, 3)),  # 33 x 4
        (33 * 64, 512, 131, (128, 128, 3)),
        (49, 448, 0, (128, 128, 3)),  # not known
        (132 * 64, 40, 132, (64, 64, 5)),  # one tile wide in any case
    ],
)
def test_tiles_get_smaller_while_all_run_at_once(rows, columns, processors, size):
    gpu = target.Gpu("", "sm_90", processors)
    for kernel in configs.DEFAULTS:
        large = configs.DEFAULTS[kernel](torch.bfloat16, "sm_90")
        found = configs.default(kernel, rows, columns, torch.bfloat16, gpu)
        if kernel == "weight_gradient" or size[0] == 128:
            assert found == large
            continue
        assert (found.block_m, found.block_n, found.num_stages) == size
        assert (found.num_warps, found.block_k) == (4, 64)
        if found.pool is not None:
            assert found.pool == (32, 128, 64)
        chosen = configs.choose(kernel, rows, 64, columns, torch.bfloat16, gpu)
        assert chosen.block_n == configs.narrow(found.block_n, columns)
        assert chosen.num_stages == found.num_stages


@pytest.mark.parametrize(
    ("sizes", "channels", "chip", "tile"),
    [
        ((128, 128), 32, "sm_90", (256, 32)),
        ((128, 128), 17, "cpu", (256, 32)),
        ((128, 128), 33, "sm_90", (128, 64)),  # half as wide
        ((128, 64), 16, "sm_80", (256, 16)),
        ((128, 64), 64, "sm_80", (128, 64)),
        ((64, 128), 16, "sm_90", (64, 16)),  # for few pixels
        ((256, 128), 32, "sm_90", (256, 32)),
        ((128, 128), 32, "gfx942", (128, 32)),  # no shared memory for more
        *(((128, 128), 32, chip, (256, 32)) for chip in ("sm_100", "sm_103")),
        *(((128, 128), 32, chip, (128, 32)) for chip in ("sm_86", "sm_89", "sm_120")),
    ],
)
def test_a_tile_of_a_quarter_of_the_channels_has_twice_the_pixels(sizes, channels, chip, tile):
    assert configs.fit(configs.Tiles(*sizes, 64, 8, 3), channels, target.Gpu("", chip)) == tile


@pytest.mark.parametrize(
    ("sizes", "channels", "chip", "strips"),
    [
        ((128, 128), 128, "sm_90", [(128, 128, 0, 1)]),
        ((128, 128), 384, "sm_90", [(128, 128, 0, 3)]),
        ((128, 128), 192, "sm_90", [(128, 128, 0, 1), (128, 64, 2, 1)]),
        ((128, 128), 193, "sm_90", [(128, 128, 0, 2)]),
        ((128, 128), 288, "sm_90", [(128, 128, 0, 2), (256, 32, 8, 1)]),
        ((128, 128), 288, "gfx942", [(128, 128, 0, 2), (128, 32, 8, 1)]),
        ((128, 128), 129, "cpu", [(128, 128, 0, 1), (256, 32, 4, 1)]),  # not of 16
        ((128, 128), 96, "sm_90", [(128, 128, 0, 1)]),  # nothing in front of it
        ((128, 128), 17, "sm_90", [(256, 32, 0, 1)]),
        ((64, 64), 96, "sm_90", [(64, 64, 0, 1), (64, 32, 2, 1)]),
        ((128, 32), 48, "sm_90", [(128, 32, 0, 2)]),
    ],
)
def test_what_is_left_behind_the_last_whole_tile_gets_a_narrower_one(sizes, channels, chip, strips):
    found = configs.strips(configs.Tiles(*sizes, 64, 8, 3), channels, target.Gpu("", chip))
    assert found == strips
    ends = [(strip.first + strip.tiles) * strip.block_n for strip in found]
    starts = [strip.first * strip.block_n for strip in found]
    assert starts == [0, *ends[:-1]]
    assert ends[-1] - found[-1].block_n < channels <= ends[-1]


def test_only_what_can_be_launched_early_is(tuned):
    tiles = configs.Tiles(**TILES, launch_pdl=True)
    size = {"num_warps": 4, "num_stages": 2}
    for chip in ("sm_90", "sm_100", "sm_120"):
        assert tiles.options(target.Gpu("", chip)) == size | {"PDL": True, "launch_pdl": True}
        assert configs.Tiles(**TILES).options(target.Gpu("", chip)) == size | {"PDL": False}
    for chip in ("sm_75", "sm_80", "sm_89", "gfx942", "cpu"):
        assert tiles.options(target.Gpu("", chip)) == size | {"PDL": False}


def test_the_nearest_shape_by_its_factors(tuned):
    write(
        tuned,
        entry(shape=(1000, 100, 64), num_stages=1),
        entry(shape=(40000, 100, 64), num_stages=2),
        entry(shape=(1000, 1600, 64), num_stages=3),
        entry(shape=(1000, 100, 512), num_stages=4, block_n=128),
        entry(shape=(5000, 300, 128), dtype="float16", num_stages=5),
        entry("entry", shape=(5000, 300, 128), num_stages=6, pool=[16, 32, 16], interleaved=False),
    )

    def stages(*shape: int) -> int:
        return configs.choose("spatial", *shape, torch.bfloat16, H100).num_stages

    assert stages(1000, 100, 64) == 1
    # By differences the first would be nearer than the second.
    assert stages(20000, 100, 64) == 2
    assert stages(5000, 100, 64) == 1
    assert stages(1000, 500, 64) == 3
    assert stages(1000, 100, 200) == 4
    # Another dtype and another kernel are the exact shape's, and do not count.
    assert stages(5000, 300, 128) in (1, 2, 3, 4)
    other = configs.choose("entry", 5000, 150, 512, torch.bfloat16, H100)
    assert other == configs.Tiles(64, 64, 32, 4, 6, pool=(16, 32, 16), interleaved=False)
    # A tile that is far wider than the channels is narrowed.
    assert configs.choose("spatial", 1000, 100, 300, torch.bfloat16, H100).block_n == 128
    assert configs.choose("spatial", 2000, 100, 20, torch.bfloat16, H100).block_n == 32


def test_tiles_for_far_more_rows_do_not_fit(tuned):
    write(tuned, entry(shape=(1000, 100, 64), num_stages=5), entry(shape=(300, 25, 64), num_stages=6))

    def found(rows: int) -> configs.Tiles:
        return configs.choose("spatial", rows, 100, 64, torch.bfloat16, H100)

    assert found(250).num_stages == 5
    assert found(249).num_stages == 6  # the nearest that fits
    assert found(8000).num_stages == 5
    with pytest.warns(UserWarning, match=r"no entry for spatial in torch.bfloat16 near \(74, 100, 64\)"):
        assert found(74) == configs.choose("spatial", 74, 100, 64, torch.bfloat16, target.Gpu("", "sm_90"))


@pytest.mark.parametrize(("factors", "near"), [((8, 1, 1), True), ((2, 0.5, 2), True), ((2, 0.25, 1.5), False)])
def test_what_was_tuned_for_a_shape_far_away_does_not_count(tuned, factors, near):
    """A table of the network's first block says nothing of its last, where the default is made for both."""
    write(tuned, entry(shape=(1000, 100, 64), num_stages=5))
    shape = [int(size * factor) for size, factor in zip((1000, 100, 64), factors, strict=True)]
    with contextlib.nullcontext() if near else pytest.warns(UserWarning, match="no entry"):
        found = configs.choose("spatial", *shape, torch.bfloat16, H100)
    assert (found.num_stages == 5) is near


def test_a_table_is_read_once(tuned):
    path = write(tuned, entry(num_stages=5))
    first = configs.choose("spatial", 1000, 100, 64, torch.bfloat16, H100)
    path.unlink()
    assert configs.choose("spatial", 1000, 100, 64, torch.bfloat16, H100) is first
    assert configs.choose("spatial", 2000, 100, 32, torch.bfloat16, H100).num_stages == 5


def test_one_warning_where_a_table_has_nothing(tuned):
    path = write(tuned, entry())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = configs.choose("entry", 100, 64, 128, torch.bfloat16, H100)
        configs.choose("spatial", 100, 64, 128, torch.float32, H100)
        configs.choose("entry", 200, 64, 128, torch.bfloat16, H100)
    assert len(caught) == 1
    assert f"{path} has no entry for entry in torch.bfloat16" in str(caught[0].message)
    assert chosen == configs.DEFAULTS["entry"](torch.bfloat16, "sm_90")
    configs.forget()
    with pytest.warns(UserWarning, match="no entry for spatial in torch.float32"):  # of a table that is read again
        configs.choose("spatial", 100, 64, 128, torch.float32, H100)


def test_no_warning_without_a_table(tuned):
    write(tuned, entry())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = configs.choose("spatial", 1, 1, 1024, torch.bfloat16, target.Gpu("NVIDIA H200", "sm_90"))
    assert chosen == configs.DEFAULTS["spatial"](torch.bfloat16, "sm_90")


GOOD = {"conditions": CONDITIONS, "entries": [entry()]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("[1, 2", "Expecting"),
        ("[]", "conditions and entries were expected"),
        ("3", "not iterable"),
        ('{"conditions": {}, "entries": NaN}', "NaN is not JSON"),
        (GOOD | {"more": 1}, "conditions and entries were expected, got conditions, entries, more"),
        (GOOD | {"conditions": {"device": H100.name}}, "conditions lack driver, torch, triton, commit, date"),
        (GOOD | {"conditions": CONDITIONS | {"device": "NVIDIA A100"}}, "measured on 'NVIDIA A100'"),
        (GOOD | {"conditions": CONDITIONS | {"device": None}}, "lower"),
        (GOOD | {"entries": 3}, "not iterable"),
        (GOOD | {"entries": ["spatial"]}, "must be a mapping"),
        (GOOD | {"entries": [entry("conv")]}, "kernel must be one of entry, .*, got 'conv'"),
        (GOOD | {"entries": [entry(dtype="bf16")]}, "dtype must be the name of a torch.dtype, got 'bf16'"),
        (GOOD | {"entries": [entry(shape=(0, 1, 1))]}, "rows must be a positive int, got 0"),
        (GOOD | {"entries": [entry(shape=(1, 1.5, 1))]}, "reduction must be a positive int, got 1.5"),
        (GOOD | {"entries": [entry(shape=(1, 1, True))]}, "columns must be a positive int, got True"),
        (GOOD | {"entries": [entry(block_m=48)]}, "block_m must be a power of two"),
        (GOOD | {"entries": [entry(block_q=64)]}, "block_q"),
        (GOOD | {"entries": [entry("entry")]}, "has a pool's tile and no other has, got None for entry"),
        (GOOD | {"entries": [entry(pool=[16, 16, 16])]}, r"no other has, got \[16, 16, 16\] for spatial"),
        (GOOD | {"entries": [entry() | {"tiles": [1]}]}, "list"),
        (GOOD | {"entries": [{"kernel": "spatial"}]}, "missing 5 required"),
    ],
)
def test_a_damaged_or_foreign_table_is_named(tuned, content, message):
    (tuned / NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as refused:
        configs.choose("spatial", 1, 1, 1, torch.bfloat16, H100)
    assert str(tuned / NAME) in str(refused.value)
    assert "not a table of tuned tiles" in str(refused.value)


def test_an_unreadable_table_is_named(tuned):
    (tuned / NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{NAME} is not a table of tuned tiles"):
        configs.choose("spatial", 1, 1, 1, torch.bfloat16, H100)


def test_shipped_tables_are_tables():
    for path in Path(configs.__file__).with_name("tuned").glob("*.json"):
        assert configs.read_table(path)


class Recorder:
    """Stand in for a kernel and keep the keywords of its launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.__dict__.update(kwargs, grid=grid)


@pytest.mark.skipif(not target.interpreted(), reason="looks at a launch without a device")
def test_launchers_follow_the_table_and_their_keyword(tuned, monkeypatch):
    from fastinception.kernels import entry as entry_module
    from fastinception.kernels import spatial as spatial_module

    conditions = CONDITIONS | {"device": "cpu"}
    entries = [
        entry("entry", "float32", (50, 8, 100), block_m=32, pool=[16, 32, 16]),
        entry(dtype="float32", shape=(50, 72, 40), block_k=64),
        entry("entry_train", "float32", (50, 8, 100), num_warps=2, pool=[16, 32, 16]),
        entry("spatial_train", "float32", (50, 72, 40), num_warps=1),
    ]
    (tuned / "cpu.json").write_text(json.dumps({"conditions": conditions, "entries": entries}))
    kernels = {"entry": Recorder(), "spatial": Recorder()}
    monkeypatch.setattr(entry_module, "_entry_kernel", kernels["entry"])
    monkeypatch.setattr(spatial_module, "_spatial_kernel", kernels["spatial"])
    x = torch.empty(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    w1, w3 = torch.empty(100, 8, 1, 1), torch.empty(40, 8, 3, 3)
    out, bias = torch.empty(2, 200, 5, 5), torch.empty(100)

    def launch(mask: torch.Tensor | None = None, **options: Any) -> None:
        saved = None if mask is None else (mask, out, mask)
        entry_module.entry(x, (w1,), (bias,), w1, bias, out, 100, (), saved, 0, **options)
        spatial_module.spatial([spatial_module.Conv(x, w3, bias[:40], 0, padding=(1, 1))], out, mask, **options)

    launch()
    # 50 rows: two tiles, each with two columns of the GEMM and two times four of the pooled branch.
    assert (kernels["entry"].BLOCK_M, kernels["entry"].POOL_M, kernels["entry"].grid) == (32, 16, (2 * (2 + 2 * 4),))
    assert spatial_module.Geometry(*kernels["spatial"].LEVEL[0]).block_m == 64
    assert (kernels["spatial"].BLOCK_K, kernels["spatial"].grid) == (64, (1,))
    launch(torch.empty(50, 25, dtype=torch.uint8))
    assert (kernels["entry"].num_warps, kernels["spatial"].num_warps) == (2, 1)
    launch(tiles=configs.Tiles(16, 16, 16, 1, 1, pool=(16, 16, 16)))
    assert (kernels["entry"].BLOCK_M, kernels["entry"].num_warps, kernels["entry"].grid) == (16, 1, (4 * (7 + 7),))
    assert (kernels["spatial"].BLOCK_K, kernels["spatial"].grid) == (16, (4 * 3,))


@pytest.fixture
def switches() -> Iterator[list[Any]]:
    """PyTorch's switches from the widest to that of convolutions, and last the one that is none of ours."""
    found: list[Any] = [
        torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul
    ]  # fmt: skip
    before = [switch.fp32_precision for switch in found]
    yield found
    for switch, precision in zip(found, before, strict=True):
        switch.fp32_precision = precision


@pytest.mark.parametrize(
    ("chip", "chosen"), [("sm_80", "tf32"), ("sm_90", "tf32"), ("gfx942", "tf32"), ("gfx90a", "ieee"), ("cpu", "ieee")]
)
def test_float32_follows_the_switch_of_convolutions_where_the_chip_has_tf32(switches, chip, chosen):
    """Not that of matrix products. Of AMD's chips, Triton compiles TF32 for one alone."""
    gpu = target.Gpu("", chip)
    everywhere, cudnn, conv, matmul = switches
    for matmul.fp32_precision in ("ieee", "tf32"):
        conv.fp32_precision = "tf32"
        assert target.input_precision(torch.float32, gpu) == chosen
        assert target.input_precision(torch.float16, gpu) == "ieee"
        assert target.input_precision(torch.float64, gpu) == "ieee"
        conv.fp32_precision = "ieee"
        assert target.input_precision(torch.float32, gpu) == "ieee"
        conv.fp32_precision = cudnn.fp32_precision = "none"  # leaves it to the next wider switch
        for everywhere.fp32_precision in ("ieee", "tf32"):
            assert target.input_precision(torch.float32, gpu) == (
                chosen if everywhere.fp32_precision == "tf32" else "ieee"
            )
