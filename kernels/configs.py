"""Choose how each launch is cut into tiles and compiled: a tuned table of the GPU where there is one, else defaults.

Nothing is measured here: ``bench/tune.py`` makes the tables.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from fastinception.kernels.target import Gpu

TUNED = Path(__file__).with_name("tuned")
CONDITIONS = ("device", "driver", "torch", "triton", "commit", "date")


@dataclass(frozen=True)
class Tiles:
    """Size of the tile that one program computes, and how a kernel is compiled and launched.

    ``block_m`` counts pixels, ``block_n`` output channels, ``block_k`` one step of the reduction. ``launch_pdl``:
    start while the previous kernel ends (programmatic dependent launch), where the chip can.

    Entry alone: ``pool`` is the tile of the pooled branch, in the same order, which shares ``num_warps``;
    ``interleaved`` puts the tiles of both parts side by side for each block of rows, else all of the GEMM's come first.

    ``library``, spatial: the library computes the convolutions, and one launch finishes them. Weight gradient: the
    library computes those of the 3x3 and 5x5 convolutions.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    pool: tuple[int, int, int] | None = None
    interleaved: bool = True
    library: bool = False
    launch_pdl: bool = False

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("block_m", "block_n", "block_k")}
        if self.pool is not None:
            sizes |= dict(zip(("pool's block_m", "pool's block_n", "pool's block_k"), self.pool, strict=True))
        for name, size in sizes.items():
            if type(size) is not int or size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16 (tl.dot), got {size!r}")
        if self.num_warps not in (1, 2, 4, 8, 16) or type(self.num_stages) is not int or self.num_stages < 1:
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16 and num_stages at least 1, got {self}")
        if self.pool is not None and self.block_m % self.pool[0]:
            raise ValueError(f"pool's block_m must divide block_m, got {self.pool[0]} and {self.block_m}")
        for name in ("interleaved", "library", "launch_pdl"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def options(self, gpu: Gpu) -> dict[str, Any]:
        """Return the keywords of a launch on ``gpu`` that say how it is compiled; ``PDL`` is the kernel's own."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.launch_pdl and gpu.runs_pdl:
            return options | {"PDL": True, "launch_pdl": True}  # not every backend knows the latter
        return options | {"PDL": False}


def _block_k(dtype: torch.dtype, chip: str) -> int:
    if chip == "cpu":
        return 128  # the interpreter takes its time by operation, not by element
    return 128 // dtype.itemsize  # rows of 128 bytes: whole cache lines, and the widest shared-memory swizzle


def _stages(chip: str) -> int:
    # Both hold two steps of copies beside the products of a third, in 96 KB: on sm_80 the fourth takes none.
    return 4 if chip == "sm_80" else 3


def _level(dtype: torch.dtype, chip: str) -> Tiles:
    return Tiles(128, 128, _block_k(dtype, chip), num_warps=8, num_stages=_stages(chip))


def _entry(dtype: torch.dtype, chip: str) -> Tiles:
    # Nine shifted loads are live at once, and each step waits for its own: few deep steps of few pixels. As wide as the
    # projection: a second column tile would pool the same pixels again.
    pool_m = 64 if chip.startswith("sm_") else 128
    return replace(_level(dtype, chip), pool=(pool_m, 128, max(16, _block_k(dtype, chip) * 64 // pool_m)))


# By the kernel's name: the tiles for many pixels where no table has any, by dtype and chip. A new kernel is one line.
# "_train" is the same kernel where it also stores what the backward needs: that takes registers, and large tiles spill.
DEFAULTS: dict[str, Callable[[torch.dtype, str], Tiles]] = {
    "entry": _entry,
    "entry_train": _entry,
    "spatial": _level,
    "spatial_train": _level,
    "data_gradient": _level,
    "entry_gradient": _level,
    "weight_gradient": _level,
}


class Sweep(NamedTuple):
    """Size of the piece that one program of a kernel bound by its accesses passes over: pixels, channels, how often."""

    block_m: int
    block_n: int
    num_warps: int
    steps: int = 1


# Memory decides their time, whatever the shape: 16 bytes a lane in two-byte types, and enough programs.
SPLIT = Sweep(64, 64, num_warps=4, steps=4)
POOL = Sweep(32, 64, num_warps=4)
# Its windows are gathered two bytes at a time: pixels of an output row, and in the backward more steps to fill a GPU.
FIRST_LAYER = Sweep(64, 64, num_warps=4, steps=8)
# Parts at a time, elements. A weight has 2 to 15 parts in GoogLeNet's blocks, a bias up to 144.
SUM_FEW, SUM_MANY = Sweep(1, 1024, num_warps=4), Sweep(16, 128, num_warps=4)
_INTERPRETED = {
    SPLIT: Sweep(128, 128, num_warps=4, steps=2),
    POOL: Sweep(128, 128, num_warps=4),
    SUM_FEW: Sweep(1, 16384, num_warps=4),
    SUM_MANY: Sweep(4, 16384, num_warps=4),
}
FEWER = 4  # times as few rows as were tuned for
NEAR = 8  # times, all factors between two shapes: 2.2 between blocks of a stage, up to thousands between others
# Programs that the weight gradients are divided into, for each processor: as many as fit one (sm_90, 16-bit types).
PROGRAMS = 2


def programs(gpu: Gpu) -> int:
    """Return how many programs fill a GPU with weight gradients."""
    return PROGRAMS * (gpu.processors or 132)  # without any, in the interpreter, an H100's


def sweep(size: Sweep, gpu: Gpu) -> Sweep:
    """Return ``size``, or what the interpreter has in its place: that takes its time by operation, not by element."""
    return _INTERPRETED.get(size, size) if gpu.chip == "cpu" else size


Function = TypeVar("Function", bound=Callable[..., Any])
_caches: list[Any] = []


def cached(function: Function) -> Function:
    """Remember what ``function`` makes of its arguments, until :func:`forget`."""
    # Not without a bound: a server may see any number of image sizes.
    _caches.append(functools.lru_cache(maxsize=4096)(function))
    return cast(Function, _caches[-1])


def forget() -> None:
    """Have every launch choose its tiles again, from tables read again."""
    for cache in _caches:
        cache.cache_clear()
    _warned.clear()


class LaunchConfig(NamedTuple):
    """What a launch takes beside its tensors: alike for like shapes, so that launchers cache it to spare the host."""

    grid: tuple[int]
    sizes: tuple[Any, ...]  # behind the tensors
    constants: dict[str, Any]


def launch_config(programs: int, sizes: tuple[Any, ...], **constants: Any) -> LaunchConfig:
    """Put a launch together. ``sizes`` are numbers and lists of numbers, which a kernel reads by ``operands.number``.

    Products and sums are fused, as in every Triton so far; 3.9 warns where that is not said, and 3.10 will not do it.
    """
    sizes = tuple([as_list(size) if isinstance(size, tuple) else size for size in sizes])
    return LaunchConfig((programs,), sizes, constants | {"enable_fp_fusion": True})


def as_list(numbers: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Return numbers that are not negative as a kernel takes them in a list: odd and from 3 on, None as it is.

    A 1 or a multiple of 16 in a tuple has Triton compile the kernel for it, and ``do_not_specialize`` does not prevent
    it (3.6 to 3.9): nearly each block would have kernels of its own.
    """
    return tuple([None if number is None else 2 * number + 3 for number in numbers])


def from_list(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of which :func:`as_list` made ``numbers``."""
    return tuple([number // 2 - 1 for number in numbers])


class TunedTiles(NamedTuple):
    """A line of a table: the best tiles measured for a kernel, a dtype and a shape."""

    kernel: str
    dtype: torch.dtype
    rows: int
    reduction: int
    columns: int
    tiles: Tiles


@cached
def choose(kernel: str, rows: int, reduction: int, columns: int, dtype: torch.dtype, gpu: Gpu) -> Tiles:
    """Return the tiles of a launch: the nearest entry of the GPU's table, if one is near, or the default.

    Distance: by which factors rows, reduction and columns differ, multiplied; at most ``NEAR``, and of an entry's rows
    a launch has at least a quarter.

    Args:
        kernel: a name in ``DEFAULTS``.
        rows: M of the launch's largest product, ``N * H * W`` where rows are pixels.
        reduction: its K, channels times taps.
        columns: its N.
        dtype: of the operands.
        gpu: from ``target.gpu``.

    Warns:
        UserWarning: the GPU has a table, and nothing in it is near, of this kernel and dtype. Once for each table.

    Raises:
        ValueError: the GPU's table is damaged or another GPU's; names the file.
    """
    chosen = default(kernel, rows, columns, dtype, gpu)
    path = table_path(gpu.name)
    if (entries := _read_once(path)) is not None:

        def distance(entry: TunedTiles) -> float:
            own = (entry.rows, entry.reduction, entry.columns)
            return math.prod(max(a / b, b / a) for a, b in zip((rows, reduction, columns), own, strict=True))

        # Tiles for far more rows would leave processors idle, which the default minds.
        alike = [entry for entry in entries if (entry.kernel, entry.dtype) == (kernel, dtype)]
        near = [entry for entry in alike if entry.rows <= FEWER * rows and distance(entry) <= NEAR]
        if near:
            chosen = min(near, key=distance).tiles
        else:
            _warn(path, kernel, dtype, (rows, reduction, columns))
    return replace(chosen, block_n=narrow(chosen.block_n, columns))


def default(kernel: str, rows: int, columns: int, dtype: torch.dtype, gpu: Gpu) -> Tiles:
    """Return the tiles of a launch that no table knows; arguments as of :func:`choose`.

    The smallest of which all run at once, as the launch ends when one of them does; else the usual ones.
    """
    usual = DEFAULTS[kernel](dtype, gpu.chip)
    if kernel != "weight_gradient":  # that divides its pixels among all processors
        for tiles in _smaller(usual):
            if cdiv(rows, tiles.block_m) * cdiv(columns, narrow(tiles.block_n, columns)) <= gpu.processors:
                return tiles
    return usual


def _smaller(large: Tiles) -> Iterator[Tiles]:
    """Yield tiles of less work, the smallest first."""
    # Hopper's tensor cores take 64 pixels at least; with fewer channels, the instructions beside them bound the loop.
    for block_m, block_n in ((64, 64), (64, 128)):
        # As many bytes on their way beside the step in use, to hide latency. The pool, unpipelined, gets fewer pixels
        # and no shorter steps: each waits for its loads.
        stages = 1 + (large.num_stages - 1) * (large.block_m + large.block_n) // (block_m + block_n)
        pool = large.pool and (32, large.pool[1], max(16, large.pool[0] * large.pool[2] // 64))
        yield replace(large, block_m=block_m, block_n=block_n, num_warps=4, num_stages=stages, pool=pool)


def narrow(size: int, channels: int) -> int:
    """Halve a channel tile while it is at least twice as wide as the channels need."""
    while size > 16 and size // 2 >= channels:
        size //= 2
    return size


def fit(tiles: Tiles, channels: int, gpu: Gpu) -> tuple[int, int]:
    """Return pixels and channels of the tile of one product among several, which writes ``channels``.

    Narrowed to a quarter, a tile has a quarter of the products in each step and nearly as many other instructions, so
    it gets twice the pixels. (Narrowed to half, it would take the registers of a second program on an SM.) Not where
    the wide one is for few pixels, or larger than usual.
    """
    block_n = narrow(tiles.block_n, channels)
    taller = 4 * block_n <= tiles.block_n and tiles.block_m == 128 and gpu.holds_tall_tiles
    return (256 if taller else tiles.block_m), block_n


class Strip(NamedTuple):
    """Some of the channels that a product writes, in tiles of one size side by side."""

    block_m: int
    block_n: int
    first: int  # of the tiles, counted in tiles of this size
    tiles: int


def strips(tiles: Tiles, channels: int, gpu: Gpu) -> list[Strip]:
    """Return how one product among several, which writes ``channels``, is cut: as :func:`fit` says, and what is left.

    What is left behind the last whole tile gets a tile of half its width or less, if that holds it. Of 32 at least:
    with 16, ptxas makes every tensor-core instruction of the kernel wait for the last one (sm_90).
    """
    block_m, block_n = fit(tiles, channels, gpu)
    whole, left = divmod(channels, block_n)
    if whole and left and max(left, 32) <= block_n // 2:
        last_m, last_n = fit(tiles, max(left, 32), gpu)
        return [Strip(block_m, block_n, 0, whole), Strip(last_m, last_n, whole * block_n // last_n, 1)]
    return [Strip(block_m, block_n, 0, whole + (left > 0))]


def in_turn(strips: Sequence[Strip], rows: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return the tiles of strips that follow one another over ``rows`` pixels, and of each its first and how many."""
    _, _, firsts, tiles = zip(*strips, strict=True)
    return sum(cdiv(rows, strip.block_m) * strip.tiles for strip in strips), firsts, tiles


def cdiv(size: int, block: int) -> int:
    """Return how many tiles of ``block`` cover ``size`` (``triton.cdiv`` takes 2 us: it serves kernels, too)."""
    return -(-size // block)


def table_path(name: str) -> Path:
    """Return where the table of a GPU is, from its product name."""
    return TUNED / f"{_slug(name)}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cached
def _read_once(path: Path) -> list[TunedTiles] | None:
    return read_table(path) if path.is_file() else None


_warned: set[Path] = set()


def _warn(path: Path, kernel: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(
            f"{path} has no entry for {kernel} in {dtype} near {shape} (rows, reduction, columns): default tiles are "
            "used where it has none. bench/tune.py adds them",
            stacklevel=2,
        )


def read_table(path: Path) -> list[TunedTiles]:
    """Read a table that ``bench/tune.py`` wrote.

    Raises:
        ValueError: the file is no table, or a value in it cannot be, or its conditions name another GPU than its name.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        table: Any = json.loads(path.read_text(), parse_constant=refuse)
        if set(table) != {"conditions", "entries"}:
            raise ValueError(f"the keys conditions and entries were expected, got {', '.join(table)}")
        if missing := [name for name in CONDITIONS if name not in table["conditions"]]:
            raise ValueError(f"the conditions lack {', '.join(missing)}")
        if _slug(table["conditions"]["device"]) != path.stem:
            raise ValueError(f"it was measured on {table['conditions']['device']!r}, which its name is not")
        return [_tuned_of(**item) for item in table["entries"]]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of tuned tiles: {error}") from error


def _tuned_of(
    *, kernel: str, dtype: str, rows: int, reduction: int, columns: int, tiles: dict[str, Any], **about: Any
) -> TunedTiles:
    if kernel not in DEFAULTS:
        raise ValueError(f"kernel must be one of {', '.join(DEFAULTS)}, got {kernel!r}")
    if not isinstance(type_ := getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be the name of a torch.dtype, got {dtype!r}")
    for name, size in (("rows", rows), ("reduction", reduction), ("columns", columns)):
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")
    pool = tiles.get("pool")
    if (pool is None) is not (DEFAULTS[kernel](type_, "").pool is None):
        raise ValueError(f"the entry level has a pool's tile and no other has, got {pool} for {kernel}")
    own = Tiles(**tiles | {"pool": None if pool is None else tuple(pool)})
    return TunedTiles(kernel, type_, rows, reduction, columns, own)
