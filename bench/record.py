"""Describe the run and keep its result: what a rate means nothing without."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """Name the commit of this checkout, with ``-dirty`` where a tracked file differs from it."""
    name = _output("git", "rev-parse", "--short=12", "HEAD")
    if name is None:
        return "unknown"
    return f"{name}-dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else name


def conditions(device: torch.device) -> dict[str, Any]:
    """Return machine, software and date, ready for JSON."""
    triton = None
    with contextlib.suppress(ImportError):
        import triton as module

        triton = module.__version__
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "device_type": device.type,
        "cpu_flags": [],
        "driver": None,
    }
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text()
        fields = dict([part.strip() for part in line.split(":", 1)] for line in cpuinfo.splitlines() if ":" in line)
        found["device"] = fields.get("model name", found["device"])
        flags = fields.get("flags", "").split()
        found["cpu_flags"] = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    found["cpu_count"] = os.cpu_count()
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = drivers.splitlines()[0] if drivers else None
    return found | {
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write strict JSON under ``path`` in one step: readers see the old file or the whole new one."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
