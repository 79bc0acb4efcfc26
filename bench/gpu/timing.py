"""Time runs on a GPU by its events, cold or one call after another; in a dry run by the CPU's clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench.harness import interleave, quartiles, synchronize, wall_clock
from fastinception.kernels import configs

Run = Callable[[], object]
# Calls of one cold sample, and the clock cycles for which the GPU waits at its start (at first 3 ms, at most 50): what
# the host takes for a launch, more than many a kernel, would otherwise lie between the events.
COLD_CALLS, HEAD_START, MOST_HEAD_START = 10, 5_000_000, 80_000_000


class EventTimer:
    """Time by CUDA events; every figure is in microseconds, under the key ``"us"``."""

    unit = "us"

    def __init__(self, device: torch.device) -> None:
        self.sync = partial(synchronize, device)
        size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 28)
        # Read, not written: written lines would go back to memory while the next call is timed.
        self.other = torch.zeros(size // 4, device=device)
        self.head_start = HEAD_START
        self.late = 0  # samples with some of the host's time in them: it was behind a GPU that waited longest

    def mark(self, run: Run) -> tuple[Any, Any]:
        """Call ``run`` with nothing of its data in the L2 cache, between the two events that are returned."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.sum()
        start.record()
        run()
        end.record()
        return start, end

    def read(self, launch: Callable[[], Sequence[tuple[Any, Any]]]) -> list[float]:
        """Return the seconds between the marks that ``launch`` made, no host time among them."""
        torch.cuda._sleep(self.head_start)
        marks = launch()
        host_was_ahead = not marks or not marks[0][0].query()
        self.sync()
        if not host_was_ahead and self.head_start < MOST_HEAD_START:
            self.head_start *= 2
            return self.read(launch)
        self.late += not host_was_ahead
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def cold(self, run: Run, calls: int) -> list[float]:
        """Return seconds of at most COLD_CALLS calls, each with nothing of its data in the L2 cache; no host time."""
        return self.read(lambda: [self.mark(run) for _ in range(min(calls, COLD_CALLS))])

    def stream(self, run: Run, calls: int) -> list[float]:
        """Return the mean seconds of calls one after another, the host's share included where it is the slower."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.sync()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        self.sync()
        return [start.elapsed_time(end) / 1e3 / calls]


class HostTimer:
    """Stand in for EventTimer on a CPU. Its figures say nothing about a GPU, and their key says so: ``"dry_us"``."""

    unit = "dry_us"
    late = 0

    def __init__(self, device: torch.device) -> None:
        self.sync = partial(synchronize, device)

    def mark(self, run: Run) -> tuple[float, float]:
        """Return the clock before and after ``run``."""
        start = time.perf_counter()
        run()
        return start, time.perf_counter()

    def read(self, launch: Callable[[], Sequence[tuple[float, float]]]) -> list[float]:
        """Return the seconds between marks."""
        return [end - start for start, end in launch()]

    def cold(self, run: Run, calls: int) -> list[float]:
        """Return seconds of one call."""
        return self.stream(run, 1)

    def stream(self, run: Run, calls: int) -> list[float]:
        """Return the mean seconds of one call after another."""
        return wall_clock(self.sync)(run, calls)


Timer = EventTimer | HostTimer


def measure(runs: Mapping[str, Run], timer: Timer, *, cold: bool, seconds: float) -> dict[str, dict[str, Any]]:
    """Time runs in turn: each warmed up for a tenth of a second, then at least five rounds over all of them.

    Args:
        runs: by name; what they compute has been checked before.
        timer: of the device they run on.
        cold: time single calls that find nothing in the L2 cache; else calls one after another.
        seconds: for the rounds of all runs together, unless five take longer.

    Returns:
        By name the ``timer.unit`` of the median, ``quartiles_`` of the same unit, and the number of ``samples``; also
        ``host_late``, in how many samples of all runs the host's time is, if there are any.
    """
    late = timer.late
    dry = isinstance(timer, HostTimer)
    warmup, rounds, seconds = (0.0, 2, 0.0) if dry else (0.1, 5, seconds)
    clock = timer.cold if cold else timer.stream
    *_, (samples, _) = interleave(runs, timer.sync, warmup=warmup, rounds=rounds, seconds=seconds, clock=clock)
    return {name: summary(times, timer.unit) | _noted(timer, late) for name, times in samples.items()}


def each_launch(run: Run, timer: Timer) -> list[dict[str, Any]]:
    """Time every Triton launch of ``run`` apart, whoever makes it: each finds nothing of its data in the L2 cache.

    Returns:
        In the order of the launches: the ``kernel``'s name and its figures, as ``measure`` returns them.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    late = timer.late
    kernels: list[str] = []

    def launch() -> list[tuple[Any, Any]]:
        kernels.clear()
        marks: list[tuple[Any, Any]] = []

        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs["warmup"]:
                return originals[type(self)](self, *args, **kwargs)
            kernels.append(self.fn.__name__)
            made: list[Any] = []
            marks.append(timer.mark(lambda: made.append(originals[type(self)](self, *args, **kwargs))))
            return made[-1]

        configs.forget()  # what is replayed does not come by here
        with contextlib.ExitStack() as patched:
            for kind in originals:
                patched.enter_context(mock.patch.object(kind, "run", timed))
            run()
        return marks

    originals = {kind: kind.run for kind in (InterpretedFunction, JITFunction)}
    run()  # compiles
    samples = zip(*(timer.read(launch) for _ in range(2 if isinstance(timer, HostTimer) else 15)), strict=True)
    configs.forget()
    figures = [summary(list(times), timer.unit) | _noted(timer, late) for times in samples]
    return [{"kernel": name} | row for name, row in zip(kernels, figures, strict=True)]


def _noted(timer: Timer, before: int) -> dict[str, int]:
    return {"host_late": timer.late - before} if timer.late > before else {}


def summary(samples: list[float], unit: str) -> dict[str, Any]:
    """Return the median and the quartiles of ``samples`` (seconds) in microseconds."""
    low, middle, high = quartiles([1e6 * sample for sample in samples])
    return {unit: middle, f"quartiles_{unit}": [low, high], "samples": len(samples)}
