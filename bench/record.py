"""Describe the run and keep its result: what a rate means nothing without."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastinception import checkpoint, record


def commit() -> str:
    """Name the commit of this checkout, with ``-dirty`` where a tracked file differs from it."""
    return record.commit() or "unknown"


def conditions(device: torch.device) -> dict[str, Any]:
    """Return machine, software and date, ready for JSON."""
    about = record.environment(device)
    cpu, gpu = about.pop("cpu"), about.pop("gpu")
    flags: list[str] = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith("flags")).split()
    return about | {
        "device": gpu or cpu,
        "device_type": device.type,
        "cpu_flags": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "cpu_count": os.cpu_count(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write strict JSON under ``path`` in one step: readers see the old file or the whole new one."""
    checkpoint.write(path, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
