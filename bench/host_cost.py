"""Time what Python and dispatch take for one call of a block, beside the plain block's own: tiny tensors, no kernels.

python bench/host_cost.py

Triton's launches are stubbed out, so that no GPU is needed; what Triton's own launcher takes is not in it. The plain
block's time includes its operators on a few numbers, which is what the host pays for it on any device.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fastinception import FastInception, Inception

WIDTHS = (16, 8, (8, 8), (8, 8), 8)


class _Stub:
    """Stand in for a kernel: take any launch and do nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def stubbed() -> Iterator[None]:
    """Replace both kernels by stubs."""
    from fastinception.kernels import entry, spatial

    with mock.patch.object(entry, "_entry_kernel", _Stub()), mock.patch.object(spatial, "_spatial_kernel", _Stub()):
        yield


def measure(rounds: int = 2000) -> dict[str, dict[str, float]]:
    """Return microseconds a call, medians, by block (``"plain"``, ``"FastInception"``) and kind of call.

    Needs ``TRITON_INTERPRET=1``, which lets the launchers take CPU tensors.
    """
    x = torch.rand(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    blocks = {"plain": Inception(*WIDTHS), "FastInception": FastInception(*WIDTHS, backend="triton")}

    def inference(block: Any) -> None:
        with torch.inference_mode():
            block(x)

    calls = {"inference": inference, "forward with grad": lambda block: block(x)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in blocks for kind in calls}
    try:
        with stubbed():
            for _ in range(rounds):  # interleaved: a slow moment of the machine falls on all
                for (name, kind), times in samples.items():
                    start = time.perf_counter()
                    calls[kind](blocks[name])
                    times.append(1e6 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    return {name: {kind: statistics.median(samples[name, kind]) for kind in calls} for name in blocks}


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # here, not on import: it would switch a whole test run to the interpreter
    for name, costs in measure().items():
        print(f"{name:14}" + "".join(f"{kind}: {cost:6.1f} us   " for kind, cost in costs.items()))
