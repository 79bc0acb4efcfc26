"""Compare GoogLeNet's examples/s with plain and with fast Inception blocks: agreement first, then speed.

python bench/compare.py                     # inference and training, fp32 and bf16, this machine's device
python bench/compare.py --quick             # fewer rounds and rows
python bench/compare.py --device cuda --dtype bf16 --json result.json --plot result.png
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# What is measured is the checkout whose commit is reported, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from bench import engines, memory
    from bench.agreement import Disagreement, Errors, check, check_weights, errors, truth
    from bench.engines import Engine
    from bench.floor import Convolutions
    from bench.harness import (
        DTYPES,
        Batch,
        Runner,
        compile_failure,
        interleave,
        load_batch,
        rate,
        synchronize,
        wall_clock,
    )
    from bench.record import conditions, write_json
    from bench.report import BASE, FLOOR, Display, Row, cross_precision, plot, with_ratios
    from fastinception import backends
    from fastinception.googlenet import GoogLeNet, xavier_uniform_
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: install what the benchmarks need with pip install -e '.[bench]'")

BLOCKS: Mapping[str, Callable[..., nn.Module]] = memory.BLOCKS


@dataclass(frozen=True)
class Variant:
    """One way to run the network. Variants of one name compete for one row, and the fastest is the row.

    ``engine`` names another inference engine; the variant named FLOOR is the network's convolutions alone.
    """

    name: str
    block: str
    layout: str = "channels_last"
    compile_options: Mapping[str, Any] | None = None
    cuda_graph: bool = False
    engine: str = ""
    detail: str = ""

    @property
    def label(self) -> str:
        """Name the variant among its rivals, too."""
        return f"{self.name} ({self.detail})" if self.detail else self.name


Timed = Runner | Engine | Convolutions


class Weights(NamedTuple):
    """State dicts of the plain network: for the check, and (the textbook's Xavier start) for the timing."""

    check: dict[str, Tensor]
    timing: dict[str, Tensor]


class Schedule(NamedTuple):
    """How long one mode and dtype is measured: at least so many rounds, more if the seconds allow."""

    warmup: float
    rounds: int
    seconds: float


# Before each sample on a CPU, in seconds: PyTorch's threads spin for some milliseconds after a run, and an engine with
# threads of its own would share the cores with them (OpenVINO lost 7 to 14%).
PAUSE = 0.05
SCHEDULES = {
    ("inference", False): Schedule(warmup=1.0, rounds=7, seconds=12.0),
    ("training", False): Schedule(warmup=1.0, rounds=5, seconds=15.0),
    ("inference", True): Schedule(warmup=0.3, rounds=7, seconds=1.0),
    ("training", True): Schedule(warmup=0.3, rounds=5, seconds=1.0),
}


def variants(mode: str, dtype: str, device: torch.device, compiles: bool, quick: bool) -> list[Variant]:
    """List what is measured; the first is the plain module that errors and ratios refer to."""
    cuda = device.type == "cuda"
    chosen = [
        Variant(BASE, "plain", layout="NCHW"),
        Variant("plain eager channels_last", "plain"),
        Variant("FastInception eager", "FastInception"),
    ]
    if compiles and (cuda or mode == "inference" or not quick):
        chosen.append(Variant("plain compiled", "plain", compile_options={}))
        if mode == "training":
            # Inductor can lose channels_last in the backward graph (pytorch#189239); this is its remedy.
            remedy = "force_layout_optimization"
            chosen.append(
                Variant("plain compiled", "plain", compile_options={"options": {remedy: True}}, detail=remedy)
            )
        chosen.append(Variant("FastInception compiled", "FastInception", compile_options={}))
        if mode == "inference" and not cuda and not quick:  # weights become constants, in oneDNN's own layout
            freezing = {"options": {"freezing": True}}
            chosen += [Variant(f"{b} compiled, frozen", b, compile_options=freezing) for b in BLOCKS]
        tunings = ("reduce-overhead",) if quick else ("reduce-overhead", "max-autotune")
        for tuning in tunings if cuda else ():
            chosen += [Variant(f"{b} {tuning}", b, compile_options={"mode": tuning}) for b in BLOCKS]
    if cuda:
        chosen += [Variant(f"{b} CUDA graph", b, cuda_graph=True) for b in BLOCKS]
    elif mode == "inference" and not quick:
        chosen += [Variant(name, "plain", layout="NCHW", engine=name) for name in engines.available(dtype)]
    return [*chosen, Variant(FLOOR, "plain")]


class Comparison:
    """Check and measure variants of one network on one batch, one mode and dtype after another."""

    def __init__(self, args: argparse.Namespace, batch: Batch, compiles: bool, display: Display) -> None:
        self.args, self.batch, self.compiles, self.display = args, batch, compiles, display
        self.notes: list[str] = []
        torch.manual_seed(0)
        textbook = xavier_uniform_(GoogLeNet())
        self.weights = Weights(check_weights(), textbook.state_dict())
        display.stage("reference in fp64", 0, None)
        self.truths = {
            mode: truth(self.weights.check, batch.images, batch.labels, mode == "training") for mode in modes(args)
        }
        # The library at its best; not for the truth, whose fp64 it would search for seconds.
        torch.backends.cudnn.benchmark = args.device.type == "cuda"

    def note(self, words: str) -> None:
        """Say, now and in the JSON, what a reader of the rows should know."""
        self.notes.append(words)
        self.display.say(f"note: {words}")

    def group(self, mode: str, dtype: str) -> list[Row]:
        """Return the rows of one mode and dtype.

        Raises:
            Disagreement: a variant computes something else, or training left NaN or infinity.
        """
        title = f"{mode}, {dtype}"
        chosen = variants(mode, dtype, self.args.device, self.compiles, self.args.quick)
        runners = self._prepare(title, chosen, mode, dtype)
        measured = self._memory(runners, dtype) if mode == "training" and not self.args.quick else {}
        self.display.stage(f"{title}: warm up", 0, None)
        sync = partial(synchronize, self.args.device)
        clock = wall_clock(sync, PAUSE if self.args.device.type == "cpu" else 0.0)
        for samples, rounds in interleave(runners, sync, clock=clock, **SCHEDULES[mode, self.args.quick]._asdict()):
            done = min(map(len, samples.values()))
            self.display.stage(f"{title}: rounds", done, rounds)
            if done:
                rows = self._rows(samples, chosen, measured, mode, dtype)
                self.display.rows(title, rows, final=done == rounds)
        for label, runner in runners.items():
            if not all(bool(torch.isfinite(p).all()) for p in runner.net.parameters()):
                raise Disagreement(f"{title}: {label} left NaN or infinity in the parameters")
        for name in {variant.name for variant in chosen if variant.detail}:
            rivals = [v for v in chosen if v.name == name]
            speeds = [f"{v.detail or 'default'} {self._rate(samples[v.label])[0]:.1f}" for v in rivals]
            self.note(f"{title}: {name} is the better of {' and '.join(speeds)} examples/s")
        torch.compiler.reset()
        return rows

    def _runner(self, variant: Variant, net: nn.Module, mode: str, dtype: str) -> Runner | Engine:
        images, labels = self.batch.images, self.batch.labels
        if variant.engine:
            return Engine(variant.engine, net, images, dtype=dtype)
        return Runner(
            net,
            images,
            labels,
            mode=mode,
            dtype=dtype,
            layout=variant.layout,
            compile_options=variant.compile_options,
            cuda_graph=variant.cuda_graph,
        )

    def _prepare(self, title: str, chosen: list[Variant], mode: str, dtype: str) -> dict[str, Timed]:
        runners: dict[str, Timed] = {}
        plain: Errors | None = None
        for done, variant in enumerate(list(chosen)):
            self.display.stage(f"{title}: compile and check {variant.label}", done, len(chosen))
            net = GoogLeNet(block=BLOCKS[variant.block])
            if variant.name == FLOOR:
                runners[variant.label] = Convolutions(net, self.batch.images, mode=mode, dtype=dtype)
                continue
            net.load_state_dict(self.weights.check)
            try:
                runner = self._runner(variant, net, mode, dtype)
            except Exception as error:  # engines raise what they like, and are no part of what is compared
                if not variant.engine:
                    raise
                reason = " ".join(str(error).split())[:300]
                self.note(f"{title}: no row of {variant.engine}, which fails here: {type(error).__name__}: {reason}")
                chosen.remove(variant)
                continue
            found = errors(runner, self.truths[mode])
            plain = plain or found
            self.display.say(check(f"{title}, {variant.label}", found, plain))
            net.load_state_dict(self.weights.timing)  # engines and frozen graphs keep those of the check
            runners[variant.label] = runner
        return runners

    def _memory(self, runners: Mapping[str, Timed], dtype: str) -> dict[str, dict[str, int]]:
        """Return saved and peak bytes of the eager training variants in channels_last, by label."""
        size, side = len(self.batch.labels), self.batch.images.shape[-1]
        found = {}
        for block, label in (("plain", "plain eager channels_last"), ("FastInception", "FastInception eager")):
            self.display.stage(f"training, {dtype}: memory of {label}", 0, None)
            if isinstance(runner := runners[label], Runner) and self.args.device.type == "cuda":
                found[label] = memory.measure(runner)
            else:
                try:
                    found[label] = memory.in_fresh_process(block, size, side, dtype)
                except subprocess.CalledProcessError as error:
                    last = error.stderr.strip().splitlines()[-1:]
                    self.note(f"training, {dtype}: no memory of {label}: status {error.returncode}, {' '.join(last)}")
        return found

    def _rate(self, samples: list[float]) -> tuple[float, list[float]]:
        return rate(samples, len(self.batch.labels))

    def _rows(
        self,
        samples: dict[str, list[float]],
        chosen: list[Variant],
        measured: dict[str, dict[str, int]],
        mode: str,
        dtype: str,
    ) -> list[Row]:
        best: dict[str, Row] = {}
        for variant in chosen:
            speed, spread = self._rate(samples[variant.label])
            if variant.name in best and best[variant.name]["examples_per_second"] >= speed:
                continue
            best[variant.name] = {
                "variant": variant.name,
                "mode": mode,
                "dtype": dtype,
                "layout": variant.layout,
                "compiled": variant.compile_options is not None,
                "examples_per_second": speed,
                "spread": spread,
            } | measured.get(variant.label, {})
        return with_ratios(list(best.values()))


def modes(args: argparse.Namespace) -> list[str]:
    """Return the modes that ``--mode`` stands for."""
    return ["inference", "training"] if args.mode == "both" else [args.mode]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a bad one ends the program with status 2 before any work."""
    parser = argparse.ArgumentParser(
        description="Check that plain and fast Inception blocks agree, then compare GoogLeNet's examples/s."
    )

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    add = parser.add_argument
    add("--mode", choices=("inference", "training", "both"), default="both")
    add("--dtype", choices=tuple(DTYPES), nargs="+", help="default: fp32, and bf16 but for a CPU that emulates it")
    add("--batch-size", type=positive, help="default: 64, with --quick 32")
    add("--image-size", type=positive, default=96, help="pixels per side (default: 96)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda if there is one (default)")
    add("--quick", action="store_true", help="fewer rounds; no max-autotune; no compiled training on a CPU")
    add("--synthetic", action="store_true", help="random images instead of Fashion-MNIST")
    add("--data-root", type=Path, help="folder with Fashion-MNIST's *-ubyte.gz files")
    add("--json", type=Path, metavar="FILE", help="write conditions and rows")
    add("--plot", type=Path, metavar="FILE.png", help="draw the rows")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or (32 if args.quick else 64)
    if args.synthetic and args.data_root:
        parser.error("--synthetic and --data-root exclude each other")
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.absolute().parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            parser.error(f"{path} cannot be written")
    if args.plot and args.plot.suffix != ".png":
        parser.error(f"--plot writes a .png file, got {args.plot}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -e '.[bench]'")
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        args.device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}")
    if args.device.type == "cuda" and (args.device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    usual = ["fp32", "bf16"]
    # There the plain network takes many times as long as in fp32, and no one should wait for that unasked.
    args.left_out = [] if args.dtype else _emulated(usual, args.device)
    args.dtype = list(dict.fromkeys(args.dtype or [dtype for dtype in usual if dtype not in args.left_out]))
    return args


def _emulated(dtypes: list[str], device: torch.device) -> list[str]:
    return [dtype for dtype in dtypes if backends.emulated(DTYPES[dtype], device)]


def run(
    args: argparse.Namespace, batch: Batch, display: Display, keep: Callable[[list[Row], list[str]], None]
) -> list[Row]:
    """Return the rows of all that was asked for; behind each group ``keep`` gets those so far, and their notes."""
    rows: list[Row] = []
    with display.live:
        display.stage("try torch.compile", 0, None)
        failure = compile_failure(args.device)
        comparison = Comparison(args, batch, failure is None, display)
        if failure:
            comparison.note(f"no compiled rows: torch.compile does not work here: {failure}")
        if args.quick:
            comparison.note("--quick: fewer rounds; no max-autotune; no compiled training on a CPU")
        for dtype in _emulated(args.dtype, args.device):
            comparison.note(
                f"this CPU has no {dtype} products: PyTorch emulates them, FastInception and the convolutions alone "
                "compute in fp32"
            )
        for dtype in args.left_out:
            comparison.note(f"no {dtype} rows: PyTorch emulates it on this CPU, slowly; --dtype {dtype} measures it")
        for mode in modes(args):
            for dtype in args.dtype:
                rows += comparison.group(mode, dtype)
                keep(rows, comparison.notes)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status: 0, or 1 where something failed or disagreed."""
    args = parse(argv)
    console = Console()
    try:
        batch = load_batch(
            args.batch_size,
            args.image_size,
            args.device,
            synthetic=args.synthetic,
            data_root=args.data_root,
        )
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    about = conditions(args.device) | {
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "data": batch.source,
        "quick": args.quick,
        "cudnn_benchmark": args.device.type == "cuda",
        "spread": "25th and 75th percentile of examples/s over the rounds",
        "notes": [],
    }
    for name, value in about.items():
        if value not in (None, [], False) and name != "spread":
            console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    result: dict[str, Any] = {}

    def keep(rows: list[Row], notes: list[str]) -> None:
        nonlocal result
        result = {"conditions": about | {"notes": notes}, "rows": rows}
        if args.json:
            write_json(result, args.json)

    try:
        rows = run(args, batch, Display(console), keep)
    except Disagreement as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"FAILED: --batch-size {args.batch_size} does not fit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for line in filter(None, (cross_precision(mode, rows) for mode in modes(args))):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
