"""Say how fast GoogLeNet and its parts could be on a chip, from its datasheet alone; nothing runs.

python bench/roofline.py                                                # the forward, on an H100
python bench/roofline.py --chip mi300x --batch-size 256 --image-size 224 --mode training
python bench/roofline.py --times times.json                             # {"3a": 0.031, ...}, milliseconds

The floor of a part is the longer of its multiply-adds at the tensor cores' rate and its floor bytes at the memory's:
each pass reads its inputs and weights once and writes its results once. (The forward reads x and writes the output; in
training the backward reads the output's gradient and x, and writes x's gradient and the weights'.)

A block's plan is what the launches of kernels/ move: the forward's two, and in training the backward's six. What a
cache may serve is not in it: every launch reads its operands from memory once. Of the partial sums of a weight one is
counted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import positive
from fastinception.googlenet import WIDTHS, Widths


class Chip(NamedTuple):
    """Datasheet figures: dense tensor-core TFLOP/s with 16-bit operands and with TF32, and memory TB/s."""

    half: float
    tf32: float
    memory: float


CHIPS = {
    "a100": Chip(312, 156, 2.039),  # NVIDIA A100 datasheet, 80 GB SXM
    "h100": Chip(989.4, 494.7, 3.35),  # NVIDIA H100 datasheet, SXM; half of the figures with sparsity
    "h200": Chip(989.4, 494.7, 4.8),  # NVIDIA H200 datasheet, SXM; half of the figures with sparsity
    "b200": Chip(2250, 1125, 8.0),  # NVIDIA DGX B200 datasheet, an eighth; half of the figures with sparsity
    "mi300x": Chip(1307.4, 653.7, 5.3),  # AMD Instinct MI300X data sheet
}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
STAGES = {"3": ("3a", "3b"), "4": ("4a", "4b", "4c", "4d", "4e"), "5": ("5a", "5b")}


class Work(NamedTuple):
    """What a part of the network has to do. ``plan`` maps a launch's name to its bytes; None where there is no plan."""

    flops: int
    floor_bytes: int
    plan: dict[str, int] | None = None


def _block(widths: Widths, rows: int, size: int, train: bool) -> Work:
    """Return the work of a block over ``rows`` pixels, with elements of ``size`` bytes."""
    k, c1, (r2, c2), (r3, c3), c4 = widths
    entry, projection, spatial = k * (c1 + r2 + r3), k * c4, 9 * r2 * c2 + 25 * r3 * c3  # weights, without biases
    weights, out = entry + projection + spatial + c1 + r2 + r3 + c4 + c2 + c3, c1 + c2 + c3 + c4
    flops = 2 * rows * (entry + projection + spatial)
    floor = size * (rows * (k + out) + weights)
    plan = {
        "entry": size * (rows * (k + c1 + r2 + r3 + c4) + entry + projection + c1 + r2 + r3 + c4),
        "spatial": size * (rows * (r2 + r3 + c2 + c3) + spatial + c2 + c3),
    }
    if not train:
        return Work(flops, floor, plan)

    def bits(*channels: int) -> int:
        return rows * sum((c + 7) // 8 for c in channels)

    # Kept for the backward: the ReLU mask in bits, the pooled x, and each maximum's place in its window in a byte.
    plan["entry"] += bits(c1, c4) + rows * k * (size + 1)
    plan["spatial"] += bits(c2, c3)
    plan |= {
        "split": size * rows * 2 * out + bits(c1, c2, c3, c4),
        "data_gradient": size * (rows * (c2 + c3 + 2 * (r2 + r3) + c4 + k) + spatial + projection),
        "pool_gradient": size * rows * 2 * k + rows * k,
        "entry_gradient": size * (rows * (c1 + r2 + r3 + 2 * k) + entry),
        "weight_gradient": size * rows * (2 * k + c1 + c4 + 2 * (r2 + r3) + c2 + c3) + 4 * weights,
        "sum": (4 + size) * weights,
    }
    return Work(3 * flops, floor + size * (rows * (out + 2 * k) + 2 * weights), plan)


def _halve(side: int) -> int:
    """Return the side behind a convolution or pool of stride 2: 7x7 padded by 3, or 3x3 padded by 1."""
    return (side - 1) // 2 + 1


def network(batch: int, image_size: int, dtype: str, mode: str) -> dict[str, Work]:
    """Return the work of one pass (``"inference"``) or one step without the optimizer (``"training"``), part by part.

    The textbook GoogLeNet for 1-channel images and 10 classes: the stem, the nine blocks, the pools between the stages,
    the head.
    """
    train, size = mode == "training", ITEMSIZE[dtype]

    def part(flops: int, read: int, weights: int, written: int) -> Work:
        """A part that no plan covers: its backward reads its input again and both gradients pass."""
        floor = size * (read + weights + written)
        return Work(3 * flops, floor + size * (2 * read + written + 2 * weights)) if train else Work(flops, floor)

    side = _halve(image_size)
    first = 2 * batch * side**2 * 49 * 64
    side = _halve(side)
    flops = first + 2 * batch * side**2 * (64 * 64 + 9 * 64 * 192)
    weights = 49 * 64 + 64 * 64 + 9 * 64 * 192 + 64 + 64 + 192
    images, side = batch * image_size**2, _halve(side)
    parts = {"stem": part(flops, images, weights, batch * side**2 * 192)}
    if train:  # images need no gradient
        stem = parts["stem"]
        parts["stem"] = stem._replace(flops=stem.flops - first, floor_bytes=stem.floor_bytes - size * images)
    for stage, blocks in STAGES.items():
        for name in blocks:
            parts[name] = _block(WIDTHS[name], batch * side**2, size, train)
        if stage != "5":
            channels, before, side = WIDTHS[chr(ord(stage) + 1) + "a"].in_channels, side, _halve(side)
            parts[f"pool{stage}"] = part(0, batch * before**2 * channels, 0, batch * side**2 * channels)
    parts["head"] = part(2 * batch * 1024 * 10, batch * side**2 * 1024, 1024 * 10 + 10, batch * 10)
    return parts


def floor_us(work: Work, chip: Chip, dtype: str) -> tuple[float, str]:
    """Return a part's floor in microseconds, and what bounds it."""
    products = work.flops / (chip.tf32 if dtype == "fp32" else chip.half) / 1e6
    memory = work.floor_bytes / chip.memory / 1e6
    return max((products, "products"), (memory, "memory"))


def _sum(works: list[Work]) -> Work:
    plan: dict[str, int] | None = None
    if all(work.plan is not None for work in works):
        plan = {f"{i} {name}": n for i, work in enumerate(works) for name, n in (work.plan or {}).items()}
    return Work(sum(work.flops for work in works), sum(work.floor_bytes for work in works), plan)


def lines(parts: dict[str, Work], chip: Chip, dtype: str, times: dict[str, float]) -> list[str]:
    """Lay out the parts, the sum of the blocks and the net's; ``times`` are milliseconds."""
    floors = {name: floor_us(work, chip, dtype) for name, work in parts.items()}
    rows = dict(parts)
    for total, names in (("blocks", list(WIDTHS)), ("net", list(parts))):
        rows[total] = _sum([parts[name] for name in names])
        # Part by part: what one is bound by, the next cannot make up for.
        floors[total] = sum(floors[name][0] for name in names), ""
    headers = ("GFLOP", "floor MB", "plan MB", "plan/floor", "launches", "floor us")
    text = [f"{'':8}{''.join(f'{header:>12}' for header in headers)}  bound"]
    if times:
        text[0] = f"{text[0]:92}{'measured ms':>13}{'reached':>9}"
    for name, work in rows.items():
        plan, ratio, launches = "-", "-", "-"
        if work.plan is not None:
            moved = sum(work.plan.values())
            plan, ratio, launches = f"{moved / 1e6:.1f}", f"{moved / work.floor_bytes:.2f}x", str(len(work.plan))
        floor, bound = floors[name]
        line = (
            f"{name:8}{work.flops / 1e9:>12.2f}{work.floor_bytes / 1e6:>12.1f}{plan:>12}{ratio:>12}{launches:>12}"
            f"{floor:>12.1f}  {bound}"
        )
        if name in times:
            line = f"{line:92}{times[name]:>13.4f}{floor / 1e3 / times[name]:>9.0%}"
        text.append(line)
    return text


def read_times(path: Path) -> dict[str, float]:
    """Read ``{"3a": milliseconds, ...}``.

    Raises:
        ValueError: the file is not that, or a time is no positive number, or a name is no row's.
    """
    names = [*network(1, 32, "fp32", "inference"), "blocks", "net"]
    try:
        times: Any = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(times, dict):
        raise ValueError(f"{path}: a mapping of names to milliseconds was expected, got {type(times).__name__}")
    for name, value in times.items():
        if name not in names:
            raise ValueError(f"{path}: {name!r} is none of {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{path}: {name} must be a positive number of milliseconds, got {value!r}")
    return times


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, default="h100", help="default: h100")
    parser.add_argument("--batch-size", type=positive, default=128, help="images; default: 128")
    parser.add_argument("--image-size", type=positive, default=96, help="pixels a side; default: 96")
    parser.add_argument("--dtype", choices=ITEMSIZE, default="bf16", help="default: bf16; fp32 is TF32")
    parser.add_argument("--mode", choices=("inference", "training"), default="inference", help="default: inference")
    parser.add_argument("--times", type=Path, metavar="JSON", help="measured milliseconds by name, to add how near")
    args = parser.parse_args(argv)
    times: dict[str, float] = {}
    if args.times is not None:
        try:
            times = read_times(args.times)
        except ValueError as error:
            parser.error(f"--times {error}")
    chip = CHIPS[args.chip]
    rate = chip.tf32 if args.dtype == "fp32" else chip.half
    print(
        f"{args.chip}: {rate:g} TFLOP/s, {chip.memory:g} TB/s (datasheet); {args.mode}, {args.dtype}, "
        f"batch {args.batch_size}, {args.image_size}x{args.image_size}"
    )
    print("\n".join(lines(network(args.batch_size, args.image_size, args.dtype, args.mode), chip, args.dtype, times)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
