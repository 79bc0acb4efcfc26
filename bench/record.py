"""Describe the run and keep its result: what a rate means nothing without."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import tempfile
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


def check_writable(path: Path) -> None:
    """Raise the ValueError that says why no file can be written there, before there is anything to write."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and the name of a file was expected")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no folder {folder}")
    try:
        if path.is_file():  # a pipe's reader would take this for its end
            path.open("ab").close()
        if _is_replaced(path):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def writable(text: str) -> Path:
    """Read an option that names a file to be written."""
    try:
        if not text:
            raise ValueError("the name of a file was expected, got ''")
        check_writable(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write strict JSON under ``path`` in one step: readers see the old file or the whole new one.

    A link stays, and so does a pipe or a device, which is written as it is.
    """
    content = (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()
    if _is_replaced(path):
        checkpoint.write(path.resolve(), content)
    else:
        path.write_bytes(content)


def _is_replaced(path: Path) -> bool:
    return path.is_file() or not path.exists()
