"""What tests of compare.py share: a short schedule, images, rows as it makes them, and how its files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import compare, comparison, engines, harness
from tests.runs import write_idx

TINY = ["--synthetic", "--device", "cpu", "--batch-size", "2", "--image-size", "32"]
EAGER = ["plain eager NCHW", "plain eager channels_last", "FastInception eager"]


@pytest.fixture
def fast_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as little as possible, nothing compiled, and no other engine."""
    short = {key: comparison.Schedule(warmup=0.0, rounds=1, seconds=0.0) for key in comparison.SCHEDULES}
    monkeypatch.setattr(comparison, "SCHEDULES", short)
    monkeypatch.setattr(harness, "MIN_SAMPLE", 0.0)
    monkeypatch.setattr(compare, "compile_failure", lambda device: "switched off by a test")
    monkeypatch.setattr(engines, "available", lambda dtype: [])
    monkeypatch.setattr(comparison, "MANY_FAULTS", 2**31)  # how many there are is the heap's choice


def write_test_split(folder: Path, count: int) -> np.ndarray[Any, Any]:
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return images


def row_of(variant: str, speed: float, mode: str = "inference", dtype: str = "fp32") -> dict[str, Any]:
    what = {"variant": variant, "mode": mode, "dtype": dtype, "layout": "channels_last", "compiled": False}
    return what | {"examples_per_second": speed, "spread": [speed, speed]}


def strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
