"""Set up every test run: where kernels run, on the GPU or in Triton's interpreter, and the number of threads."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

# Read when torch loads OpenMP. Two teams on two cores spin against each other unless waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Several workers share the cores, and the threads of NumPy spin. A worker inherits what is set here for its controller.
if WORKER := "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastinception import functional

# A failed assertion of these is explained as a test's own is.
pytest.register_assert_rewrite("tests.poisoned", "tests.runs")
assert not WORKER or torch.get_num_threads() == 1
# Tests are about the block's own ways, at sizes where a CPU takes standard operators; those of that choice say so.
FEW, functional.FEW = functional.FEW, -1


@pytest.fixture(scope="session")
def usual_few() -> int:
    """Return what FEW is outside of the tests, in a user's process as in one that a test starts."""
    return FEW


@pytest.fixture
def few(usual_few: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a CPU take standard operators for as few elements as outside of the tests, and return how many these are."""
    monkeypatch.setattr(functional, "FEW", usual_few)
    return usual_few


class _Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def passing() -> type[TorchDispatchMode]:
    """Return a dispatch mode that sees each operator and does nothing about it."""
    return _Passing


# The files that take longest, the longest first: what is left for the end is short, and no worker waits for another.
LONGEST = (
    "equivalence", "compile", "resume", "compare", "stem", "gpu_suite", "stem_compiled", "processes", "train", "told",
    "ops", "aot", "ptx", "replay", "training", "special",
)  # fmt: skip


def on_gpu(config: pytest.Config) -> bool:
    """Tell whether this run is for the GPU: most tests compute on CPU tensors, and one process cannot do both."""
    return config.option.markexpr == "gpu" and torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    if torch.cuda.is_available() and "gpu" in expression.replace("not gpu", "") and not on_gpu(config):
        raise pytest.UsageError(f"-m gpu alone asks for the device, got -m {expression!r}")
    # Read when a kernel is defined, which nothing has done so far.
    os.environ["TRITON_INTERPRET"] = "0" if on_gpu(config) else "1"
    if not on_gpu(config) and importlib.util.find_spec("triton"):
        from tests.interpreter import hasten

        hasten()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and -m gpu")
    for_gpu = on_gpu(config)
    for item in items:
        if for_gpu and item.get_closest_marker("device"):
            item.add_marker("gpu")
        if not for_gpu and item.get_closest_marker("gpu"):
            item.add_marker(skip)
