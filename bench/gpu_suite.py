"""Measure everything that needs a GPU, in parts, the most decisive first; resumable.

python bench/gpu_suite.py --output gpu-results            # until all is measured or the budget is spent
python bench/gpu_suite.py --output gpu-results            # again: goes on where it stopped
python bench/gpu_suite.py --output /tmp/dry --dry-run     # tiny shapes on a CPU: tests the script, times nothing

Each part writes DIR/PART.json, and all together make DIR/results.json and DIR/results.png. To measure a part again,
delete its file. A part is a process of its own, and goes on in a new one behind a case that ended it.

The tiles are those of kernels/tuned/, where it has this GPU, else the defaults. The last part looks for faster ones and
leaves them in DIR/tuned/: moved there, they are measured by another run, with another DIR.

Exit status: 0 where all that was asked for is measured; 1 where something failed; 3 where the budget ended first; 4
where DIR takes no more, as a full disk does: what was recorded before stays.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# What is measured is the checkout whose commit is reported, whatever else is installed.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    import torch
    from rich.console import Console

    from bench.gpu import blocks, checks, first_layer, kernels, networks, report
    from bench.gpu.case import Case, Context
    from bench.gpu.timing import EventTimer, HostTimer
    from bench.record import conditions, write_json
    from fastinception.kernels.target import interpreted
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: install what the benchmarks need with pip install -e '.[bench]'")

PARTS: dict[str, Callable[[Context], list[Case]]] = {
    "decisive": kernels.decisive,
    "first-layer": first_layer.cases,
    "environment": checks.environment,
    "networks": partial(networks.cases, "eager"),
    "profile": networks.profile,
    "tests": checks.tests,
    "kernels": kernels.table,
    "blocks": blocks.eager,
    "kernelbench": blocks.kernelbench,
    "networks-compiled": partial(networks.cases, "default"),
    "networks-reduce-overhead": partial(networks.cases, "reduce-overhead"),
    "passes": kernels.passes,
    "blocks-max-autotune": blocks.autotuned,
    "networks-max-autotune": partial(networks.cases, "max-autotune"),
    "sanitizer": checks.sanitizer,
    "tuning": checks.tuning,
}
COMMAND = (sys.executable, __file__)
BUDGET = 520.0  # seconds: under nine minutes, with what starting and ending take
STDERR = 2  # the process's own, which a test run may have replaced in sys
DEATHS = 3  # after so many in one part, its other cases would most likely end the same way
FULL = 4  # the exit status where results cannot be written
# What all results of one folder share.
SAME = ("device", "torch", "triton", "commit", "dry")


class Unwritten(Exception):
    """A result cannot be written, because the disk is full or the folder is gone."""


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the system inside into :class:`Unwritten`, which names ``path``."""
    try:
        yield
    except OSError as error:
        raise Unwritten(f"{path} cannot be written: {error.strerror or error}") from error


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder was expected, got ''")
    return Path(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a bad one ends the program with status 2 before any work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=_folder, required=True, metavar="DIR", help="folder for the results, made if it is missing")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:.0f}")
    add("--dry-run", action="store_true", help="tiny shapes on the CPU: tests this script, times nothing")
    add("--in-process", action="store_true", help="run the parts in this process, for a debugger")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed")
    if not args.budget > 0:
        parser.error(f"--budget must be a positive number of seconds, got {args.budget:g}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is not a folder")
    if args.dry_run and args.output.is_relative_to(ROOT / "bench" / "results"):
        parser.error("--dry-run measures nothing: it does not write into bench/results")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --dry-run tests the script without one")
    if not args.dry_run and interpreted():
        parser.error("TRITON_INTERPRET is set, which runs kernels on a CPU: unset it")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}")
    return args


class Record:
    """What is known of one part: written anew behind each case, so that nothing measured is lost.

    ``cases`` maps a case's name to its ``rows`` and ``seconds``, or to the ``error`` and ``status`` with which it ended
    its process; ``running`` is the case that runs; ``finished`` says that every case is there.
    """

    def __init__(self, part: str, output: Path, about: dict[str, Any]) -> None:
        self.path = output / f"{part}.json"
        self.content: dict[str, Any] = {"part": part, "conditions": about, "cases": {}}
        self.content |= {"running": None, "finished": False}
        self.reread()

    def reread(self) -> None:
        """Take over what is in the file; ValueError where it is damaged."""
        with contextlib.suppress(FileNotFoundError):
            try:
                found = json.loads(self.path.read_text())
                if missing := set(self.content) - set(found):
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path} is damaged, delete it to measure its part anew: {error}") from error
            self.content = found

    def write(self, **changes: Any) -> None:
        """Change the content and write it."""
        self.content |= changes
        with _writing(self.path):
            write_json(self.content, self.path)


def run_part(part: str, context: Context, record: Record) -> None:
    """Run the cases that are not recorded yet, as long as the time left is what they need at least."""
    cases = record.content["cases"]
    for case in PARTS[part](context):
        if case.name in cases:
            continue
        if context.deadline - time.monotonic() < (0.0 if context.dry else case.seconds):
            return
        record.write(running=case.name)
        # Also where the process hangs in a library: it prints where, and ends.
        faulthandler.dump_traceback_later(case.limit, exit=True, file=STDERR)
        start = time.monotonic()
        rows = case.run()
        faulthandler.cancel_dump_traceback_later()
        if rows is None:
            record.write(running=None)
            return
        cases[case.name] = {"rows": rows, "seconds": round(time.monotonic() - start, 1)}
        record.write(running=None)
        gc.collect()  # what torch.compile leaves behind refers to itself
        torch.cuda.empty_cache()
    record.write(finished=True)


def run_in_processes(part: str, args: argparse.Namespace, deadline: float, record: Record) -> None:
    """Run a part in a process; where a case ends that, record how, and go on with the others in a new one."""
    for _ in range(DEATHS):
        left = deadline - time.monotonic()
        command = [*COMMAND, "--output", str(args.output), "--only", part, "--in-process"]
        command += ["--budget", f"{max(left, 1.0):.1f}", *(["--dry-run"] if args.dry_run else [])]
        log = args.output / f"{part}.log"
        with _writing(log):
            log.write_bytes(b"")
        with log.open("a") as file:
            # A session of its own, so that what it starts ends with it.
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                status = process.wait(timeout=max(left, 1.0))
            except subprocess.TimeoutExpired:
                status = 3  # as of a part that ends for want of time
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        record.reread()
        if status in (0, 3):
            return
        if status == FULL:  # the case is none that failed: another call runs it again
            raise Unwritten(f"{record.path} cannot be written, as {log} says")
        error = {"error": log.read_text(errors="replace").strip()[-2000:], "status": status}
        record.content["cases"][record.content["running"] or "before the first case"] = error
        record.write(running=None)
    record.write(given_up=f"after {DEATHS} cases that ended their process")


def failures(record: Record) -> list[str]:
    """Name what went wrong in a part, each in a line."""
    content, found = record.content, []
    for case, result in content["cases"].items():
        if "error" in result:
            found.append(f"{content['part']}, {case}: {report.last_line(result)}")
        for row in result.get("rows", []):
            if "failed" in row:
                found.append(f"{content['part']}, {case}, {row['variant']}: {row['failed']}")
    return found + ([f"{content['part']}: given up {content['given_up']}"] if "given_up" in content else [])


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse(argv)
    try:
        return _main(args)
    except Unwritten as error:
        print(f"FAILED: {error}; what was recorded before is kept", file=sys.stderr)
        return FULL


def _main(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.budget
    console = Console(width=None if sys.stdout.isatty() else 150)
    device = torch.device("cpu" if args.dry_run else "cuda")
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    about = conditions(device) | {"dry": args.dry_run, "cudnn_benchmark": True}
    try:
        records = {part: Record(part, args.output, about) for part in PARTS}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for record in records.values():
        before = record.content["conditions"]
        for name in SAME:
            if before.get(name) != about[name]:
                words = f"made with {name} {before.get(name)!r}, and now it is {about[name]!r}: use another --output"
                print(f"{record.path} was {words}", file=sys.stderr)
                return 2
    records = {part: records[part] for part in args.only}
    if args.in_process:
        torch.backends.cudnn.benchmark = True  # the plain module at its best
        timer = HostTimer(device) if args.dry_run else EventTimer(device)
        context = Context(device, args.dry_run, timer, args.output, deadline)
    for part, record in records.items():
        if not record.content["finished"] and "given_up" not in record.content and time.monotonic() < deadline:
            console.print(f"{part} ...", highlight=False)
            if args.in_process:
                run_part(part, context, record)
            else:
                run_in_processes(part, args, deadline, record)
        if record.content["cases"]:
            console.print(report.table(record.content))
    open_parts = [p for p, r in records.items() if not r.content["finished"] and "given_up" not in r.content]
    if args.in_process:
        return 3 if open_parts else 0
    with _writing(args.output / "results.json"):
        report.write(args.output, list(PARTS), console)
    found = [line for record in records.values() for line in failures(record)]
    for line in found:
        print(f"FAILED: {line}", file=sys.stderr)
    if open_parts and not found:
        console.print(f"The budget of {args.budget:g} s ended before {', '.join(open_parts)}: run the command again.")
    return 1 if found else 3 if open_parts else 0


if __name__ == "__main__":
    # So that whoever ends the command ends what it started, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped: what was measured is kept, run the command again", file=sys.stderr)
        sys.exit(130)
