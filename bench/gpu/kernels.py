"""Time the launches of one block: the questions that no model settles, and a table of every launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import roofline
from bench.agreement import Errors
from bench.gpu.case import Candidate, Case, Context, Row, contest, output_error, unsearched
from bench.gpu.model import modelled
from bench.gpu.timing import Run, each_launch, measure
from bench.harness import DTYPES
from bench.trial import TINY, Shape
from fastinception.googlenet import WIDTHS
from fastinception.reference import Inception

SIZES = ((256, 224), (128, 96))  # batch and image size
# Large enough for a card's ceilings: rows and columns of a product's matrices, and bytes of a copy.
PRODUCT, COPIED = 8192, 1 << 30
DECISIVE = ("3b", "4d", "4e", "3a")


def shapes(context: Context, blocks: tuple[str, ...] = tuple(WIDTHS)) -> Iterator[Shape]:
    """Yield the blocks, each at both sizes; in a dry run one block so small that the interpreter runs it."""
    if context.dry:
        yield TINY
        return
    for block in blocks:
        for batch, image_size in SIZES:
            yield Shape(block, WIDTHS[block], batch, image_size)


class Block:
    """Operands of one block in bf16 (dry: fp16), channels_last; its launches; and what each should write, in fp64."""

    def __init__(self, shape: Shape, context: Context) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, DTYPES[shape.dtype]
        net = Inception(*shape.widths)
        for p in net.parameters():  # sums stay of the size of their inputs, and biases count
            torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
        self.net = net = net.to(context.device, self.dtype).to(memory_format=torch.channels_last).requires_grad_(False)
        params = list(net.parameters())
        self.params = list(zip(params[::2], params[1::2], strict=True))  # weight and bias of p1_1, p2_1, p2_2, ...
        # Behind a ReLU, as in the network: half of it zeros, and ties in the pool.
        x = torch.randn(shape.batch, shape.widths.in_channels, shape.side, shape.side, device=context.device)
        self.x = F.relu(x).to(self.dtype, memory_format=torch.channels_last)
        # What the spatial level reads, and what the entry level writes.
        self.r2, self.r3 = F.relu(net.p2_1(self.x)), F.relu(net.p3_1(self.x))
        self.denses = (torch.empty_like(self.r2), torch.empty_like(self.r3))
        _, c1, (_, c2), (_, c3), c4 = shape.widths
        self.out = torch.empty_like(net(self.x), memory_format=torch.channels_last)
        first, second, third, last = self.out.split((c1, c2, c3, c4), dim=1)
        self.written = {
            "entry": (first, *self.denses, last),
            "spatial": (second, third),
            "block": (self.out,),
        }
        with unsearched():
            self.truth = self._truth()

    def _truth(self) -> dict[str, tuple[Tensor, ...]]:
        net, x = self.net, self.x.double()
        y1, y2, y3 = (_conv(x, conv) for conv in (net.p1_1, net.p2_1, net.p3_1))
        y4 = _conv(F.max_pool2d(x, 3, 1, 1), net.p4_2)
        return {
            "entry": (y1, y2, y3, y4),
            "spatial": (_conv(self.r2.double(), net.p2_2), _conv(self.r3.double(), net.p3_2)),
            "block": (torch.cat((y1, _conv(y2, net.p2_2), _conv(y3, net.p3_2), y4), dim=1),),
        }

    def library(self, level: str) -> list[Tensor]:
        """Compute what a level computes by the library, without a concatenation, or the whole block with it."""
        net, x = self.net, self.x
        if level == "block":
            return [net(x)]
        if level == "spatial":
            return [F.relu(net.p2_2(self.r2)), F.relu(net.p3_2(self.r3))]
        return [F.relu(conv(x)) for conv in (net.p1_1, net.p2_1, net.p3_1)] + [F.relu(net.p4_2(net.p4_1(x)))]

    def entry(self, tiles: Any = None, part: str | None = None) -> None:
        """Launch level 0."""
        from fastinception.kernels.entry import entry

        (w1, b1), (w2, b2), _, (w3, b3), _, projection = self.params
        weights, biases, column = [w1, w2, w3], [b1, b2, b3], self.out.shape[1] - self.shape.widths.c4
        entry(self.x, weights, biases, *projection, self.out, column, self.denses, None, 0, tiles=tiles, part=part)

    def spatial(self, tiles: Any = None, chained: bool = False) -> None:
        """Launch level 1; ``chained`` behind level 0, on what that wrote."""
        from fastinception.kernels.spatial import Conv, spatial

        _, c1, (_, c2), *_ = self.shape.widths
        r2, r3 = self.denses if chained else (self.r2, self.r3)
        _, _, second, _, third, _ = self.params
        level = [Conv(r2, *second, column=c1, padding=(1, 1)), Conv(r3, *third, column=c1 + c2, padding=(2, 2))]
        spatial(level, self.out, None, tiles=tiles)

    def tiles(self, level: str, *, tuned: bool) -> Any:
        """Return the tiles of ``"entry"`` or ``"spatial"``: what a launch takes unasked, or the chip's default."""
        from fastinception.kernels import configs, target

        gpu = target.gpu(self.x.device)
        if not tuned:
            return configs.DEFAULTS[level](self.dtype, gpu.chip)
        k, c1, (r2, c2), (r3, c3), _ = self.shape.widths
        reduction, columns = k, c1 + r2 + r3
        if level == "spatial":  # of its larger convolution, and the most channels of both
            reduction, columns = 9 * r2 if 9 * r2 * c2 >= 25 * r3 * c3 else 25 * r3, max(c2, c3)
        return configs.choose(level, self.shape.rows, reduction, columns, self.dtype, gpu)

    def work(self, level: str) -> roofline.Work:
        """Return a level's multiply-adds, and its bytes if each input is read and each result written once."""
        k, c1, (r2, c2), (r3, c3), c4 = self.shape.widths
        weights, pixels = 9 * r2 * c2 + 25 * r3 * c3, r2 + r3 + c2 + c3
        if level == "entry":
            weights, pixels = k * (c1 + r2 + r3 + c4), k + c1 + r2 + r3 + c4
        elif level == "block":
            weights, pixels = weights + k * (c1 + r2 + r3 + c4), k + c1 + c2 + c3 + c4
        return roofline.Work(2 * self.shape.rows * weights, self.dtype.itemsize * (self.shape.rows * pixels + weights))

    def launched(self, level: str, run: Run) -> Candidate:
        """Return a launch as a candidate, after one run over poison."""
        for tensor in (self.out, *self.denses):
            tensor.fill_(torch.nan)
        run()
        return Candidate(run, _error(self.written[level], self.truth[level]))

    def plain(self, level: str) -> Candidate:
        """Return the library's way as a candidate."""
        run = partial(self.library, level)
        return Candidate(run, _error(run(), self.truth[level]))


def _conv(x: Tensor, conv: Any) -> Tensor:
    return F.relu(F.conv2d(x, conv.weight.double(), conv.bias.double(), padding=conv.padding))


def _error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> Errors:
    return output_error(torch.cat([t.flatten() for t in found]), torch.cat([t.flatten() for t in truth]))


def decisive(context: Context) -> list[Case]:
    """List the questions that no model settles: how to launch each level, tiles, tile order, dependent launch."""
    return [Case(str(shape), partial(_decide, shape, context)) for shape in shapes(context, DECISIVE)]


def _decide(shape: Shape, context: Context) -> list[Row]:
    block = Block(shape, context)
    # The default has tiles of 128x128: measured twice, which shows the noise.
    entry, spatial = block.tiles("entry", tuned=False), block.tiles("spatial", tuned=False)
    wide = {"block_m": 256, "num_warps": 8, "num_stages": 4}
    wide_entry = replace(entry, **wide, pool=(64, 64, 32))  # beside the pool's default tile it spills

    def apart() -> None:
        block.entry(entry, part="pool")
        block.entry(entry, part="gemm")

    def both(dependent: bool) -> None:
        block.entry(replace(entry, launch_pdl=dependent))
        block.spatial(replace(spatial, launch_pdl=dependent), chained=True)

    launches: dict[str, dict[str, Run]] = {
        "entry": {
            "entry": partial(block.entry, entry),
            "entry, pool and GEMM apart": apart,
            "entry, 128x128 tiles": partial(block.entry, replace(entry, block_m=128)),
            "entry, 256x128 tiles": partial(block.entry, wide_entry),
            "entry, separate tile order": partial(block.entry, replace(entry, interleaved=False)),
        },
        "spatial": {
            "spatial": partial(block.spatial, spatial),
            "spatial, library and epilogue": partial(block.spatial, replace(spatial, library=True)),
            "spatial, 128x128 tiles": partial(block.spatial, replace(spatial, block_m=128)),
            "spatial, 256x128 tiles": partial(block.spatial, replace(spatial, **wide)),
        },
        "block": {
            "two launches": partial(both, False),
            "two launches, dependent launch": partial(both, True),
        },
    }
    _compile_together([run for runs in launches.values() for run in runs.values()], block.x)
    rows = []
    for level, runs in launches.items():
        makers = {f"plain {level}": partial(block.plain, level)}
        makers |= {name: partial(block.launched, level, run) for name, run in runs.items()}
        rows += contest(makers, context, cold=True, seconds=0.5)
    return beside_model(rows, shape)


def _compile_together(runs: Sequence[Run], x: Tensor) -> None:
    """Compile what is going to be launched on x's device at the same time: one after another takes minutes.

    What fails here fails again when it is launched, and is recorded then.
    """
    from fastinception.kernels import replay

    def all_of_them() -> None:
        for run in runs:
            with contextlib.suppress(Exception):
                run()

    with contextlib.suppress(Exception):
        replay.compile(all_of_them, x)


def table(context: Context) -> list[Case]:
    """List the launches of every block, as they run unasked, beside their floors."""
    return [Case(str(shape), partial(_launches, shape, context)) for shape in shapes(context)]


def _launches(shape: Shape, context: Context) -> list[Row]:
    block = Block(shape, context)
    rows = []
    runs: dict[str, Run] = {"entry": block.entry, "spatial": block.spatial}
    for level, run in runs.items():
        makers = {f"plain {level}": partial(block.plain, level), level: partial(block.launched, level, run)}
        found = contest(makers, context, cold=True)
        found[-1]["tiles"] = str(block.tiles(level, tuned=True))
        rows += beside_floor(found, block, level, context)
    return beside_model(rows, shape)


def passes(context: Context) -> list[Case]:
    """List whatever launches whole passes make, the backward's too; that their numbers are right, the tests say."""
    return [Case(str(shape), partial(_pass, shape, context), 20) for shape in shapes(context)]


def _pass(shape: Shape, context: Context) -> list[Row]:
    return [
        {"variant": f"{name}, launch {i}: {row.pop('kernel')}"} | row
        for name, run in shape.passes(context.device).items()
        for i, row in enumerate(each_launch(run, context.timer), 1)
    ]


def beside_floor(rows: list[Row], block: Block, level: str, context: Context) -> list[Row]:
    """Add a level's floor on this card, and the share of it that each row reaches; nothing in a dry run."""
    if (chip := ceilings(context)) is None:
        return rows
    floor, bound = roofline.floor_us(block.work(level), chip, "bf16")
    floors = {"floor_us": round(floor, 2), "bound": bound}
    return [row | floors | ({"of_floor": round(floor / row["us"], 3)} if "us" in row else {}) for row in rows]


def beside_model(rows: list[Row], shape: Shape) -> list[Row]:
    """Add what a model expects of an H100, where it has a figure."""
    model = modelled(shape.block, shape.batch, shape.image_size, shape.rows)
    return [row | {"model_us": model[row["variant"]]} if row["variant"] in model else row for row in rows]


@cache
def ceilings(context: Context) -> roofline.Chip | None:
    """Measure what floors are made of on this card: large products (bf16, TF32) and a large copy; None in a dry run."""
    if context.dry:
        return None
    figures = {}
    with torch.inference_mode():
        source = torch.randn(COPIED // 4, device=context.device)
        target = torch.empty_like(source)
        figures["copy"] = measure({"": partial(target.copy_, source)}, context.timer, cold=False, seconds=0.3)
        for name, dtype in (("half", torch.bfloat16), ("tf32", torch.float32)):
            a, b = (torch.randn(PRODUCT, PRODUCT, device=context.device).to(dtype) for _ in range(2))
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            figures[name] = measure({"": partial(torch.mm, a, b)}, context.timer, cold=False, seconds=0.3)
            torch.backends.cuda.matmul.fp32_precision = before
    products = 2 * PRODUCT**3 / 1e6
    half, tf32 = (products / figures[name][""]["us"] for name in ("half", "tf32"))
    return roofline.Chip(round(half, 1), round(tf32, 1), round(2 * COPIED / figures["copy"][""]["us"] / 1e6, 3))
