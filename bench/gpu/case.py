"""Define what a part of the GPU suite is made of: cases, and the contest of variants that most cases are."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.agreement import Errors, check
from bench.gpu.timing import Run, Timer, measure
from bench.harness import failure

Row = dict[str, Any]


class Context(NamedTuple):
    """What every part gets. ``dry``: tiny shapes on a CPU, kernels in Triton's interpreter, no figure of a GPU."""

    device: torch.device
    dry: bool
    timer: Timer
    output: Path
    deadline: float  # of time.monotonic()


class Case(NamedTuple):
    """A piece of a part that is run, recorded and resumed as a whole.

    ``run`` returns its rows, or None where the time left was too short, so that it is run again. ``seconds`` is what it
    needs at least, and behind ``limit`` seconds it counts as hanging.
    """

    name: str
    run: Callable[[], list[Row] | None]
    seconds: float = 10.0
    limit: float = 200.0


class Candidate(NamedTuple):
    """A variant that has run once: its timed call, and how far its results were from the truth.

    ``usual``: the errors to hold these against, where not the plain variant's.
    """

    run: Run
    errors: Errors
    usual: Errors | None = None


def contest(
    makers: Mapping[str, Callable[[], Candidate]], context: Context, *, cold: bool, seconds: float = 1.0
) -> list[Row]:
    """Prepare and check variants, then time those that are right, in turn.

    Args:
        makers: by the variant's name. The first whose name starts with ``"plain"`` is what the others' errors are
            held against (see :func:`bench.agreement.check`), so it comes first.
        context: of the part.
        cold: see :func:`bench.gpu.timing.measure`; ``seconds`` as well.

    Returns:
        A row for each variant, in order: its figures, its ``error`` against fp64 (relative L2) and the seconds to make
        it, ``prepare_seconds`` (compilation, capture and check); or ``failed``, what went wrong.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    plain: Errors | None = None
    for name, make in makers.items():
        start = time.perf_counter()
        rows[name] = {"variant": name}
        try:
            candidate = make()
            if plain is None and name.startswith("plain"):
                plain = candidate.errors
            if plain is None:
                raise RuntimeError("no plain variant ran before it, so nothing says whether it is right")
            check(name, candidate.errors, candidate.usual or plain)
        # One variant's failure, of whatever kind, is a result; the others are still measured.
        except Exception as error:
            rows[name]["failed"] = failure(error)
            gc.collect()
            context.timer.sync()  # raises where the device can do no more: then this process cannot go on
            continue
        took = round(time.perf_counter() - start, 3)
        rows[name] |= {"error": candidate.errors.output, "prepare_seconds": took}
        runs[name] = candidate.run
    figures = measure(runs, context.timer, cold=cold, seconds=seconds) if runs else {}
    return [row | figures.get(name, {}) for name, row in rows.items()]


@contextlib.contextmanager
def unsearched() -> Iterator[None]:
    """Compute the truth without cuDNN's search among algorithms, which takes seconds in fp64."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def output_error(found: Tensor, truth: Tensor) -> Errors:
    """Return the relative L2 error of a result against the truth in fp64; NaN where a number is missing."""
    return Errors(float((found.double() - truth).norm() / truth.norm()), {}, 0.0)
