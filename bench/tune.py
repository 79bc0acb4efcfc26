"""Measure which tiles are fastest on this GPU, and write the table that the launchers read.

python bench/tune.py                                    # into kernels/tuned/, under the GPU's name
python bench/tune.py --budget 600                       # ten minutes of it; again: goes on where it stopped
python bench/tune.py --shape 1x224 --dtype bf16 fp16    # batch x image size
python bench/tune.py --dry-run --output dry.json        # no GPU: a tiny block on the CPU; tests the script

A block runs as a whole: forward for inference, forward for training, backward. Each call finds a cold L2 cache, and one
kernel's tiles differ from the default's, beside which they are timed. What spills, does not fit the chip or changes the
numbers is dropped. All that was measured is kept in TABLE.progress.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import torch
    from rich.console import Console

    from bench.gpu.timing import COLD_CALLS, EventTimer
    from bench.harness import DTYPES, failure, synchronize
    from bench.record import check_writable, conditions, write_json
    from bench.report import Display
    from bench.trial import TINY, Run, Shape, disagreement, launched, poisoned
    from fastinception.googlenet import WIDTHS
    from fastinception.kernels import configs, target
    from fastinception.kernels.configs import Tiles
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: install what the benchmarks need with pip install -e '.[bench]'")

# Batch and image size, the most important first.
SHAPES = ((128, 96), (256, 224), (1, 224), (32, 224))
# Sizes for two-byte types: block_m, block_n, block_k, num_warps, num_stages.
PRODUCTS = (
    (128, 128, 64, 8, 4), (256, 128, 64, 8, 4), (256, 128, 64, 16, 4), (128, 256, 64, 8, 3), (128, 256, 64, 16, 3),
    (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 32, 64, 4, 5),
)  # fmt: skip
POOLS = ((64, 128, 32), (32, 128, 64), (128, 128, 32), (64, 64, 64), (16, 64, 128))
EPILOGUES = ((64, 128, 8), (64, 64, 4), (32, 128, 4))  # behind the library: block_m, block_n, num_warps
# Other tiles have to be so much faster than the default's; less may be chance.
MARGIN = 0.98
ROUNDS = 5
# What measurements in one table share.
SAME = ("device", "driver", "torch", "triton", "commit")

Key = tuple[str, int, int, int, torch.dtype, target.Gpu]  # the arguments of configs.choose
Choice = dict[Key, Tiles]


class DryTimer:
    """Stand in for an EventTimer on a CPU: it says that every choice takes the same time."""

    unit = "dry"

    def cold(self, run: Run, calls: int) -> list[float]:
        """Return a time that is none."""
        return [1e-6]


class OutOfTime(Exception):
    """The budget is spent."""


def variations(kernel: str, dtype: torch.dtype) -> list[list[dict[str, Any]]]:
    """Return what to change in the tiles of a kernel, in steps: each changes the best of the steps before."""
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    depth = 2 / dtype.itemsize  # rows of as many bytes
    products = [dict(zip(names, (m, n, int(k * depth), w, s), strict=True)) for m, n, k, w, s in PRODUCTS]
    if kernel in ("entry", "entry_train"):
        return [products, [{"pool": (m, n, int(k * depth))} for m, n, k in POOLS], [{"interleaved": False}]]
    if kernel in ("spatial", "spatial_train"):
        library = [{"block_m": m, "block_n": n, "num_warps": w, "library": True} for m, n, w in EPILOGUES]
        return [library + products]
    return [products, [{"library": True}]] if kernel == "weight_gradient" else [products]


def vary(tiles: Tiles, change: dict[str, Any]) -> Tiles | None:
    """Return ``tiles`` with a change, the pooled branch's made to fit; None where they cannot be."""
    if tiles.pool is not None and "pool" not in change:
        pool_m, *rest = tiles.pool
        change = change | {"pool": (min(pool_m, change.get("block_m", tiles.block_m)), *rest)}
    with contextlib.suppress(ValueError):
        return replace(tiles, **change)
    return None


def default(key: Key) -> Tiles:
    """Return the tiles that a launch takes without a table."""
    kernel, rows, _, columns, dtype, gpu = key
    return configs.default(kernel, rows, columns, dtype, gpu)


def narrowed(tiles: Tiles, key: Key) -> Tiles:
    """Return the tiles as ``configs.choose`` hands them out."""
    return replace(tiles, block_n=configs.narrow(tiles.block_n, key[3]))


def _measurement(name: str, choice: Choice) -> str:
    return f"{name}: " + ", ".join(f"{key[0]} {json.dumps(asdict(tiles))}" for key, tiles in choice.items())


class Tuner:
    """Measure candidates, remember what was measured in ``path``, and write the ``table``."""

    def __init__(
        self,
        path: Path,
        progress: dict[str, Any],
        device: torch.device,
        deadline: float,
        display: Display,
        table: Path | None = None,
    ) -> None:
        self.table = table
        self.path, self.progress, self.device, self.deadline, self.display = path, progress, device, deadline, display
        self.timer = DryTimer() if device.type == "cpu" else EventTimer(device)
        self.choice = {}
        self.asked: dict[Key, None] = {}
        self.expected: list[torch.Tensor] = []  # of the defaults
        self.spilled = 0  # registers of all their kernels

    @property
    def choice(self) -> Choice:
        """The tiles under test; the defaults elsewhere."""
        return self._choice

    @choice.setter
    def choice(self, choice: Choice) -> None:
        self._choice = choice
        configs.forget()

    def choose(
        self, kernel: str, rows: int, reduction: int, columns: int, dtype: torch.dtype, gpu: target.Gpu
    ) -> Tiles:
        """Stand in for ``configs.choose``: the choice under test, elsewhere the default."""
        key: Key = (kernel, rows, reduction, columns, dtype, gpu)
        self.asked[key] = None
        return narrowed(self.choice.get(key) or default(key), key)

    def compare(self, name: str, run: Run, choice: Choice, base: Choice) -> float:
        """Return the time of a choice over that of another, measured in turn; infinite where it is dropped."""
        name = _measurement(name, choice)
        if name not in self.progress["measured"]:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            measured = self.progress["measured"]
            measured[name] = {"dropped": "the program ended meanwhile"}  # a choice that hangs is not tried again
            write_json(self.progress, self.path)
            try:
                measured[name] = self._measure(run, choice, base)
            except KeyboardInterrupt:
                del measured[name]
                raise
            finally:
                write_json(self.progress, self.path)
            synchronize(self.device)  # where the choice broke the device, this ends the program, and it is recorded
        row = self.progress["measured"][name]
        if "dropped" in row:
            return float("inf")
        return float(row[self.timer.unit] / row[f"default_{self.timer.unit}"])

    def _measure(self, run: Run, choice: Choice, base: Choice) -> dict[str, Any]:
        from triton.errors import TritonError

        self.choice = choice
        try:
            with launched() as kernels:
                differs = disagreement(poisoned(run), self.expected)
            spilled = sum(kernel.n_spills for kernel in kernels)
        except (TritonError, RuntimeError) as error:
            return {"dropped": failure(error)}
        if spilled > self.spilled:
            return {"dropped": f"spills {spilled} registers, the defaults {self.spilled}"}
        if differs:
            self.display.say(f"WRONG NUMBERS, dropped: {choice}: {differs}")
            return {"dropped": differs}
        own_times: list[float] = []
        base_times: list[float] = []
        for _ in range(ROUNDS):
            for self.choice, times in ((base, base_times), (choice, own_times)):
                run()  # plans its launches again, as the choice was changed
                times += self.timer.cold(run, COLD_CALLS)
        median = {"": own_times, "default_": base_times}
        return {f"{name}{self.timer.unit}": round(1e6 * statistics.median(times), 3) for name, times in median.items()}

    def tune(self, unit: Shape, most: int | None) -> list[dict[str, Any]]:
        """Return the entries of one block, recorded behind each pass; ``most`` bounds the candidates of a step."""
        done, entries = self.progress["entries"], []
        for pass_name, run in unit.passes(self.device).items():
            name = f"{unit} in {unit.dtype} {pass_name}"
            if name not in done:
                best = self._tune_pass(name, run, most)
                done[name] = [
                    {"block": unit.block, "kernel": key[0], "dtype": str(key[4]).removeprefix("torch.")}
                    | dict(zip(("rows", "reduction", "columns"), key[1:4], strict=True))
                    | {"tiles": asdict(tiles)}
                    for key, tiles in best.items()
                ]
                write_json(self.progress, self.path)
                if self.table is not None:
                    all_entries = [entry for entries_of_pass in done.values() for entry in entries_of_pass]
                    write_json({"conditions": self.progress["conditions"], "entries": all_entries}, self.table)
            entries += done[name]
        return entries

    def _tune_pass(self, name: str, run: Run, most: int | None) -> Choice:
        """Return the best tiles of each kernel of a pass; the defaults, where the best are not faster together."""
        self.choice, self.asked = {}, {}
        with launched() as kernels:
            self.expected = [tensor.clone() for tensor in run()]
        self.spilled = sum(kernel.n_spills for kernel in kernels)
        best = {key: self._search(name, run, key, most) for key in list(self.asked)}
        if changed := {key: tiles for key, tiles in best.items() if tiles != default(key)}:
            ratio = self.compare(f"{name} together", run, changed, {})
            self.display.say(f"{name}: {ratio:.3f} of the time that the defaults take")
            if ratio > MARGIN:  # faster one by one, and not together
                best = {key: default(key) for key in best}
        # One kernel after another profits, so it is on for all of them or for none.
        early = {key: replace(tiles, launch_pdl=True) for key, tiles in best.items()}
        early_runs = any(key[5].runs_pdl for key in best)
        if early_runs and self.compare(f"{name} early", run, early, best) < MARGIN:
            return early
        return best

    def _compile(self, name: str, run: Run, choices: list[Choice]) -> None:
        """Compile at the same time what is going to be measured: one after another takes most of a tuner's time.

        What fails here fails again when it is measured, and is recorded then. Also where it ends the program: the next
        run does without.
        """
        from fastinception.kernels import replay

        new = [choice for choice in choices if _measurement(name, choice) not in self.progress["measured"]]
        late = time.monotonic() > self.deadline
        if late or len(new) < 2 or not replay.compiles_together() or self.progress.get("compiling") == name:
            return
        self.progress["compiling"] = name
        write_json(self.progress, self.path)
        launches = []
        for self.choice in new:
            with contextlib.suppress(ValueError, RuntimeError):
                launches += replay.collect(run)
        self.choice = {}  # what was planned to be compiled is not launched
        if launches:
            replay.compile_all(launches, next(t for t in launches[0].tensors if isinstance(t, torch.Tensor)))
        del self.progress["compiling"]

    def _search(self, name: str, run: Run, key: Key, most: int | None) -> Tiles:
        """Return a kernel's best tiles: of each step the fastest, the default where nothing is faster by MARGIN."""
        best, best_ratio = default(key), 1.0
        seen = {narrowed(best, key)}
        for step in variations(key[0], key[4]):
            candidates = []
            for change in step[:most]:
                tiles = vary(best, change)
                if tiles is not None and narrowed(tiles, key) not in seen:
                    seen.add(narrowed(tiles, key))
                    candidates.append(tiles)
            self._compile(name, run, [{key: tiles} for tiles in candidates])
            for tiles in candidates:
                ratio = self.compare(name, run, {key: tiles}, {})
                if ratio < min(best_ratio, MARGIN):
                    best, best_ratio = tiles, ratio
        return best


def _shape(text: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if numbers is None or int(numbers[2]) < 32:
        raise argparse.ArgumentTypeError(f"a shape must be BATCHxSIZE with images of at least 32 pixels, got {text!r}")
    return int(numbers[1]), int(numbers[2])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a bad one ends the program with status 2 before any work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop then; default: when all is done")
    add(
        "--shape",
        nargs="+",
        type=_shape,
        default=SHAPES,
        metavar="SHAPE",
        help="batch x image size, such as 128x96; images of 32 at least",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16; fp32 is TF32")
    add("--output", type=Path, metavar="TABLE", help="default: where the launchers look for it")
    add("--dry-run", action="store_true", help="a tiny block in fp16 on the CPU: tests this script, times nothing")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed")
    if not args.budget > 0:
        parser.error(f"--budget must be a positive number of seconds, got {args.budget:g}")
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel
        if args.output is None or args.output.resolve().is_relative_to(configs.TUNED.resolve()):
            parser.error("--dry-run measures nothing: it needs an --output outside of the folder of tables")
    elif not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --dry-run tests the script without one")
    elif target.interpreted():
        parser.error("TRITON_INTERPRET is set, which runs kernels on a CPU: unset it")
    args.device = torch.device("cpu") if args.dry_run else torch.device("cuda", torch.cuda.current_device())
    gpu = target.gpu(args.device)
    args.output = args.output or configs.table_path(gpu.name)
    try:
        check_writable(args.output)
    except ValueError as error:
        parser.error(f"--output {error}")
    about = conditions(args.device) | {"device": gpu.name, "dry_run": args.dry_run}
    # A table that lies in the checkout makes it dirty by being written.
    about["commit"] = about["commit"].removesuffix("-dirty")
    args.path = args.output.with_name(f"{args.output.name}.progress")
    try:
        args.progress = resume(args.path, args.output, about)
    except ValueError as error:
        parser.error(str(error))
    return args


def resume(path: Path, table: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the progress in ``path``, or one that begins.

    Raises:
        ValueError: it is damaged or of other conditions, or the table is there without it.
    """
    if not path.exists():
        if table.exists():
            raise ValueError(f"{table} exists and {path.name} does not: delete it, or give another --output")
        return {"conditions": about, "measured": {}, "entries": {}}
    try:
        progress: dict[str, Any] = json.loads(path.read_text())
        before, *_ = (progress[name] for name in ("conditions", "measured", "entries"))
        differ = [name for name in SAME if before[name] != about[name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, delete it to start anew: {error!r}") from error
    if differ:
        said = ", ".join(f"{name} {before[name]}, not {about[name]}" for name in differ)
        raise ValueError(f"{path} was measured with {said}: delete it, or give another --output")
    return progress


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse(argv)
    units = [
        Shape(block, widths, batch, image_size, dtype)
        for dtype in args.dtype
        for batch, image_size in args.shape
        for block, widths in WIDTHS.items()
    ]
    if args.dry_run:
        units = [TINY]
    display = Display(Console())
    tuner = Tuner(args.path, args.progress, args.device, time.monotonic() + args.budget, display, args.output)
    left = len(units)
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # the library at its best
    try:
        with display.live, mock.patch.object(configs, "choose", tuner.choose), torch.no_grad():
            for i, unit in enumerate(units):
                name = f"{unit} in {unit.dtype}"
                display.stage(name, i, len(units))
                if name not in args.progress["entries"]:
                    tuner.tune(unit, most=1 if args.dry_run else None)
                    # The entries are under the names of its passes; this spares the next run to build the block.
                    args.progress["entries"][name] = []
                    write_json(args.progress, args.path)
                left -= 1
    except OutOfTime:
        pass
    except KeyboardInterrupt:
        display.say(f"stopped: {args.path} keeps what was measured, run again to go on")
        return 130
    except OSError as error:  # a full disk
        print(f"FAILED: {error}; what was measured before is kept", file=sys.stderr)
        return 1
    finally:
        torch.backends.cudnn.benchmark = benchmark
    configs.forget()
    display.say(f"{args.output}: {len(units) - left} blocks; {f'{left} are left, run again' if left else 'all done'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
