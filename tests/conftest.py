"""Set up every test run: the interpreter where there is no GPU, the number of threads, and the `gpu` marker."""

from __future__ import annotations

import os

# Read when torch loads OpenMP. Two teams on two cores spin against each other unless waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Several workers share the cores, and the threads of NumPy spin.
os.environ.setdefault(
    "OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(2, os.cpu_count() or 1))
)

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is defined, and torch defines none on import.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
