"""Say what card this is, and run the checks that are programs of their own: tests, compute-sanitizer, tuning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from bench.gpu.case import Case, Context, Row
from bench.gpu.kernels import ceilings
from bench.gpu.timing import measure

ROOT = Path(__file__).resolve().parents[2]
TUNED = "tuned"  # the folder of tables inside the suite's
CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,pstate"


def environment(context: Context) -> list[Case]:
    """List what the figures depend on beside the conditions of every part: clocks, ceilings, what an event costs."""
    return [Case("card", partial(_card, context))]


def _card(context: Context) -> list[Row]:
    rows: list[Row] = []
    if (chip := ceilings(context)) is not None:
        p = torch.cuda.get_device_properties(context.device)
        about = {"processors": p.multi_processor_count, "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size}
        libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        rows.append({"variant": "card"} | about | libraries)
        rows.append({"variant": "ceilings (TFLOP/s bf16 and TF32, TB/s copied)"} | chip._asdict())
    # Between two events with nothing between them: part of every cold figure.
    nothing = measure({"": lambda: None}, context.timer, cold=True, seconds=0.1)[""]
    rows.append({"variant": "no launch at all"} | nothing)
    if (tool := shutil.which("nvidia-smi")) is not None and not context.dry:
        command = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader", f"--id={context.device.index or 0}"]
        rows += _verdict(f"{CLOCKS}, behind the products", command)
    return rows


def tests(context: Context) -> list[Case]:
    """List the tests that run on a GPU, one file a case; a dry run asks only for their names."""
    marked = re.compile(r"mark\.(gpu|device)\b")
    files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if marked.search(path.read_text()))
    files = [path for path in files if path.stem == "test_gpu" or not context.dry]
    return [Case(path.name, partial(_tests, path, context), seconds=30, limit=400) for path in files]


def _tests(path: Path, context: Context) -> list[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(path)]
    return _verdict("pytest -m gpu", [*command, "--collect-only"] if context.dry else command)


# Small enough for a tool that makes a kernel a hundred times slower.
SANITIZED = "tests/test_gpu.py::test_small_block_forward_and_backward"


def sanitizer(context: Context) -> list[Case]:
    """List compute-sanitizer's tools on one small test, where it is installed."""
    return [Case(tool, partial(_sanitize, tool, context), 40) for tool in ("memcheck", "racecheck")]


def _sanitize(tool: str, context: Context) -> list[Row]:
    name = f"compute-sanitizer {tool}"
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    program = shutil.which("compute-sanitizer") or (str(usual) if usual.is_file() else None)
    if program is None or context.dry:
        return [{"variant": name, "says": "not available" if program is None else "not run in a dry run"}]
    # Calls that fail and are handled, as PyTorch's and Triton's do, are no errors of a kernel.
    command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    # Each tensor an allocation of its own, so that reading past its end is an error.
    return _verdict(name, [*command, SANITIZED], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def tuning(context: Context) -> list[Case]:
    """Run bench/tune.py for what is left of the budget. It goes on where it stopped, until all is tuned."""
    left = context.deadline - time.monotonic()
    return [Case("bf16", partial(_tune, context), seconds=90, limit=max(200.0, left + 60))]


def _tune(context: Context) -> list[Row] | None:
    from fastinception.kernels import configs, target

    table = context.output / TUNED / configs.table_path(target.gpu(context.device).name).name
    table.parent.mkdir(exist_ok=True)
    # To end by itself: it starts some seconds later, and looks at the time only behind what it compiles together.
    budget = 1 if context.dry else max(10, int(context.deadline - time.monotonic()) - 60)
    command = [sys.executable, str(ROOT / "bench" / "tune.py"), "--budget", str(budget), "--output", str(table)]
    (row,) = _verdict("bench/tune.py", [*command, *(["--dry-run"] if context.dry else [])])
    return [row] if context.dry or "failed" in row or row["says"].endswith("all done") else None


def _verdict(name: str, command: list[str], extra: dict[str, str] | None = None) -> list[Row]:
    """Run a program of this checkout; ``failed`` says how it ended, where not well, with the end of what it said."""
    start = time.monotonic()
    try:
        said = _run(command, extra)
        row = {"variant": name, "says": said.strip().splitlines()[-1] if said.strip() else "nothing"}
    except subprocess.CalledProcessError as error:
        row = {"variant": name, "failed": f"status {error.returncode}", "says": error.stdout[-4000:]}
    return [row | {"seconds": round(time.monotonic() - start, 1)}]


def _run(command: list[str], extra: dict[str, str] | None = None) -> str:
    # Without a limit of its own: where the budget ends, the command ends this process and all that it started.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(extra or {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
