"""Report what the compiler makes of every kernel and shipped tile size, for chips that this machine need not have.

python bench/aot_report.py                                     # all blocks on sm_90, two on the other chips
python bench/aot_report.py --chip sm_90 --block 3a --dtype fp16 --mode training inference
python bench/aot_report.py --chip sm_90 --layout NCHW --images 128x7     # x, weights and output
python bench/aot_report.py --json new.json                     # with one Triton
python bench/aot_report.py --against new.json                  # with another: where they differ

A line for each kernel: registers of a thread, bytes of stack, local-memory accesses (spills), shared memory,
tensor-core instructions, and global loads and stores as count x bytes of a lane. Below it, on NVIDIA, how many
subroutines it has (on sm_100 some guard the tensor cores; elsewhere a long division is one), and a line for each main
loop, as cycles of the resource over cycles of the tensor cores: above 1 the resource bounds the loop.
  issue   instructions x warps / 4 slots
  shared  bytes through the port of shared memory and L1 / 128
  L2      bytes loaded per tensor cycle (an H100 feeds 24 to 32); "<" where L1 may serve some of the loads
Below them the whole launch, over the tensor cycles that its products would take without what pads their tiles (the
cycles they take with it over those are its padding).
Nothing here is a time: latency and occupancy are not in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__mp_main__":  # a worker: an interrupt, which its parent gets as well, ends it without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

try:
    import triton
except ModuleNotFoundError:
    sys.exit("Triton is not installed")

from bench import aot
from bench.harness import DTYPES, LAYOUTS, positive
from bench.record import commit, writable, write_json
from fastinception.googlenet import WIDTHS
from fastinception.kernels import target

KEY = ("chip", "block", "images", "layout", "dtype", "mode", "kernel")


def _cases(args: argparse.Namespace) -> list[aot.Case]:
    """Return the product of what was asked for; where no blocks were named, two stand for all but on sm_90."""
    asked = args.chip, args.block or WIDTHS, args.dtype, args.mode, [args.images], args.layout
    cases = [aot.Case(*case) for case in itertools.product(*asked)]
    return [case for case in cases if args.block or case.chip == "sm_90" or case.block in ("3a", "4e")]


def _run(cases: list[aot.Case], kernels: list[str], jobs: int) -> Iterator[list[dict[str, Any]]]:
    measure = partial(aot.measure, kernels=kernels)
    if jobs == 1:
        yield from map(measure, cases)
        return
    # spawn: a forked child would share threads that torch may have started.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(measure, cases)  # an interrupt cancels what has not begun


def _widths(counts: dict[str, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in counts.items()) or "none"


def lines(row: dict[str, Any]) -> list[str]:
    """Lay out one kernel and its main loops."""
    name = " ".join(row[key] for key in KEY)
    text = [
        f"{name:60} regs {row['registers']:3}  stack {row['stack']}  local {row['local']}  "
        f"shared {row['shared'] / 1024:5.1f} KB  tensor-core {row['tensor_core']:3}  "
        f"loads {_widths(row['loads'])}  stores {_widths(row['stores'])}"
    ]
    if row.get("subroutines"):
        text.append(f"  CALLS {row['subroutines']} subroutines")
    if row.get("loops") == {}:
        text.append("  no main loop for each product: unrolled, or split")
    for part, loop in row.get("loops", {}).items():
        shared = "-" if loop["shared_pressure"] is None else f"{loop['shared_pressure']:.2f}"
        notes = "  WAITS for its own loads" if loop["waits_for_own_loads"] else ""
        notes += "  drains the tensor cores" if loop["drains"] else ""
        tile = "x".join(map(str, loop["tile"]))
        l2 = f"{'' if loop['copies'] else '<'}{loop['l2_bytes_per_cycle']:.1f}"
        text.append(
            f"  {part:5} {tile:12} {loop['instructions']:4} instructions  {loop['tensor_cycles']:4.0f} tensor cycles  "
            f"issue {loop['issue_pressure']:5.2f}  shared {shared:>5}  L2 {l2:>7}{notes}"
        )
    if row.get("launch_pressure"):
        text.append(f"  whole launch: issue {row['launch_pressure']:.2f}  padding {row['padding']:.2f}")
    return text


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
    return {path: value}


def differences(ours: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return a line for each figure that differs, and for each kernel that only one report has."""
    reports = [{" ".join(row[key] for key in KEY): _flat(row) for row in report["rows"]} for report in (ours, other)]
    text = []
    for name in {**reports[0], **reports[1]}:
        row, others = (report.get(name) for report in reports)
        if row is None or others is None:
            text.append(f"{name}: only in {'this report' if others is None else 'the other report'}")
            continue
        for field in {**row, **others}:
            a, b = row.get(field), others.get(field)
            if a != b:
                a, b = (f"{v:.3f}" if isinstance(v, float) else v for v in (a, b))
                text.append(f"{name}: {field} {a}, the other {b}")
    return text


def read_report(path: Path) -> dict[str, Any]:
    """Read what ``--json`` wrote.

    Raises:
        ValueError: the file is not that, or of another version, whose rows have other names.
    """
    try:
        found: Any = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    report: dict[str, Any] = found if isinstance(found, dict) else {}
    rows, missing = report.get("rows"), {"triton", "commit"} - set(report)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        missing.add("rows")
    missing = missing or {key for row in report["rows"] for key in KEY if key not in row}
    if missing:
        raise ValueError(f"{path} is no report: it lacks {', '.join(sorted(missing))}")
    return report


def _images(text: str) -> str:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"BATCHxSIDE in pixels of the block's input was expected, got {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chips, kernels = list(aot.CHIPS), list(aot.KERNELS)
    parser.add_argument("--chip", nargs="+", choices=chips, default=chips, metavar="CHIP", help=" ".join(chips))
    parser.add_argument("--block", nargs="+", choices=WIDTHS, metavar="BLOCK", help=" ".join(WIDTHS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    parser.add_argument(
        "--mode", nargs="+", choices=("training", "inference"), default=["training"], help="default: training"
    )
    parser.add_argument(
        "--images", type=_images, default="128x14", metavar="BATCHxSIDE",
        help="of the block's input, which decides the tiles where it is small; default: 128x14",
    )  # fmt: skip
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, default=["channels_last"], help="default: channels_last"
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=kernels, default=kernels, metavar="KERNEL", help=" ".join(kernels)
    )
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes; default: the number of cores")
    parser.add_argument("--json", type=writable, metavar="PATH", help="keep the report")
    parser.add_argument("--against", type=Path, metavar="PATH", help="print where a kept report differs from this one")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    other = None
    if args.against is not None:
        try:
            other = read_report(args.against)
        except ValueError as error:
            parser.error(f"--against {error}")
    if target.interpreted():
        parser.error("TRITON_INTERPRET is set, and the interpreter replaces the compiler: unset it")
    head = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    print(", ".join(f"{name} {version}" for name, version in head.items()))
    report: dict[str, Any] = head | {"rows": []}
    try:
        for found in _run(_cases(args), args.kernel, args.jobs):
            report["rows"] += found
            if args.json is not None:
                try:
                    write_json(report, args.json)
                except OSError as error:
                    print(f"FAILED: {args.json} cannot be written: {error}", file=sys.stderr)
                    return 1
            for row in found:
                print("\n".join(lines(row)), flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if other is not None:
        print(f"\nagainst triton {other['triton']}, commit {other['commit']}:")
        print("\n".join(differences(report, other)) or "no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
