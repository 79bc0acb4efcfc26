"""Compare GoogLeNet's examples/s with plain and with fast Inception blocks: agreement first, then speed.

python bench/compare.py                     # inference and training, fp32 and bf16, this machine's device
python bench/compare.py --quick             # fewer rounds and rows
python bench/compare.py --device cuda --dtype bf16 --json result.json --plot result.png
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What is measured is the checkout whose commit is reported, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import torch
    from rich.console import Console

    from bench import engines
    from bench.agreement import Disagreement
    from bench.comparison import Comparison
    from bench.harness import DTYPES, Batch, compile_failure, load_batch, positive
    from bench.record import conditions, writable, write_json
    from bench.report import LEGEND, Display, Row, cross_precision, plot
    from fastinception import backends
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: install what the benchmarks need with pip install -e '.[bench]'")


QUICK = "fewer rounds; no memory; no max-autotune; on a CPU no compiled training, frozen graphs or other engines"


def modes(args: argparse.Namespace) -> list[str]:
    """Return the modes that ``--mode`` stands for."""
    return ["inference", "training"] if args.mode == "both" else [args.mode]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a bad one ends the program with status 2 before any work."""
    parser = argparse.ArgumentParser(
        description="Check that plain and fast Inception blocks agree, then compare GoogLeNet's examples/s."
    )
    add = parser.add_argument
    add("--mode", choices=("inference", "training", "both"), default="both")
    add("--dtype", choices=tuple(DTYPES), nargs="+", help="default: fp32, and bf16 but for a CPU that emulates it")
    add("--batch-size", type=positive, help="default: 64, with --quick 32")
    add("--image-size", type=positive, default=96, help="pixels per side (default: 96)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda if there is one (default)")
    add("--quick", action="store_true", help=QUICK)
    add("--synthetic", action="store_true", help="random images instead of Fashion-MNIST")
    add("--data-root", type=Path, help="folder with Fashion-MNIST's *-ubyte.gz files")
    add("--json", type=writable, metavar="FILE", help="write conditions and rows")
    add("--plot", type=writable, metavar="FILE.png", help="draw the rows")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or (32 if args.quick else 64)
    if args.synthetic and args.data_root:
        parser.error("--synthetic and --data-root exclude each other")
    if args.plot and args.plot.suffix != ".png":
        parser.error(f"--plot writes a .png file, got {args.plot}")
    if args.plot:
        try:
            importlib.import_module("matplotlib.figure")
        except ModuleNotFoundError:
            parser.error("--plot needs matplotlib: pip install -e '.[bench]'")
        except ValueError as error:  # an unknown MPLBACKEND
            parser.error(f"--plot needs matplotlib, which says: {error}")
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
    args.left_out = [] if args.dtype else [d for d in usual if backends.is_emulated(DTYPES[d], args.device)]
    args.dtype = list(dict.fromkeys(args.dtype or [dtype for dtype in usual if dtype not in args.left_out]))
    for dtype in args.dtype:
        if (reason := backends.environment_error(args.device, DTYPES[dtype])) is not None:
            parser.error(reason)
    return args


def run(
    args: argparse.Namespace, batch: Batch, display: Display, keep: Callable[[list[Row], list[str], bool], None]
) -> list[Row]:
    """Return the rows of all that was asked for.

    Behind each group ``keep`` gets those so far, their notes, and whether they are all.
    """
    rows: list[Row] = []
    with display.live:
        display.stage("try torch.compile", 0, None)
        failure = compile_failure(args.device)
        comparison = Comparison(modes(args), batch, args.device, failure is None, args.quick, display)
        if failure:
            comparison.note(f"no compiled rows: torch.compile does not work here: {failure}")
        if args.quick:
            comparison.note(f"--quick: {QUICK}")
        for dtype in args.dtype:
            if backends.is_slower(DTYPES[dtype], args.device):
                wide = "FastInception and the convolutions alone compute in fp32"
                comparison.note(f"this CPU is slower in {dtype} than in fp32: {wide}")
        for dtype in args.left_out:
            comparison.note(f"no {dtype} rows: PyTorch emulates it on this CPU, slowly; --dtype {dtype} measures it")
        groups = [(mode, dtype) for mode in modes(args) for dtype in args.dtype]
        for group in groups:
            rows += comparison.group(*group)
            keep(rows, comparison.notes, group == groups[-1])
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
    with_engines = args.device.type == "cpu" and "inference" in modes(args) and not args.quick
    about = conditions(args.device) | {
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "data": batch.source,
        "engines": engines.versions() if with_engines else {},
        "quick": args.quick,
        "cudnn_benchmark": args.device.type == "cuda",
        "spread": "25th and 75th percentile of examples/s over the rounds",
        "notes": [],
    }
    for name, value in about.items():
        if value not in (None, [], {}, False) and name != "spread":
            console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    result: dict[str, Any] = {}
    unwritten: dict[Path, OSError] = {}  # a full disk; what is measured is still printed

    def keep(rows: list[Row], notes: list[str], complete: bool) -> None:
        nonlocal result
        result = {"conditions": about | {"notes": notes, "complete": complete}, "rows": rows}
        if args.json:
            unwritten.pop(args.json, None)
            try:
                write_json(result, args.json)
            except OSError as error:
                unwritten[args.json] = error

    try:
        rows = run(args, batch, Display(console), keep)
    except Disagreement as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not backends.is_out_of_memory(error):
            raise
        print(f"FAILED: --batch-size {args.batch_size} does not fit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    for line in filter(None, (LEGEND, *(cross_precision(mode, rows) for mode in modes(args)))):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.plot:
        try:
            plot(result, args.plot)
        except OSError as error:
            unwritten[args.plot] = error
    for path, reason in unwritten.items():
        print(f"FAILED: {path} cannot be written: {reason}", file=sys.stderr)
    return 1 if unwritten else 0


if __name__ == "__main__":
    sys.exit(main())
