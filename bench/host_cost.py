"""Time what Python and dispatch take for one call of a block, beside the plain block's own: tiny tensors, no kernels.

python bench/host_cost.py

Triton's launches are stubbed out, so that no GPU is needed; what Triton's own launcher takes is not in it. The plain
block's time includes its operators on a few numbers, which is about what the host pays for it on any device. "PyTorch
alone" is what no autograd function in Python goes below: one of as many tensors that only allocates its results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.harness import compile_failure
from fastinception import FastInception, Inception

WIDTHS = (16, 8, (8, 8), (8, 8), 8)
FLOOR = "PyTorch alone"


class _Allocate(torch.autograd.Function):
    """Allocate an output of ``width`` channels, and the gradients: what PyTorch itself takes for a block's call."""

    @staticmethod
    def forward(ctx: Any, width: int, x: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x, *params)
        return x.new_empty((x.shape[0], width, *x.shape[2:]))

    @staticmethod
    def backward(ctx: Any, *grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, *map(torch.empty_like, ctx.saved_tensors)


class _Floor(Inception):
    def __init__(self, *widths: Any) -> None:
        super().__init__(*widths)
        # Once: to look for them is no part of it.
        self.own = list(self.parameters())
        self.out_channels = sum(conv.out_channels for conv in (self.p1_1, self.p2_2, self.p3_2, self.p4_2))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Allocate.apply(self.out_channels, x, *self.own))


class _Stub:
    """Stand in for a kernel: take any launch and do nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def stubbed() -> Iterator[None]:
    """Replace all kernels by stubs."""
    from bench.aot import KERNELS
    from fastinception.kernels import configs

    with ExitStack() as patched:
        patched.callback(configs.forget)  # a replay holds its kernels, and these are stubs
        for name, module in KERNELS.items():
            patched.enter_context(mock.patch.object(module, f"_{name}_kernel", _Stub()))
        configs.forget()
        yield


def measure(rounds: int = 30, calls: int = 50, compiled: bool = False) -> dict[str, dict[str, float]]:
    """Return microseconds a call, least of all rounds, by block (``"plain"``, ``"FastInception"``, FLOOR) and kind.

    The processor's time of this thread, so that others on the machine count little; each round is the mean of
    ``calls`` calls. Needs ``TRITON_INTERPRET=1``, which lets the launchers take CPU tensors. With ``compiled`` also of
    both blocks by ``torch.compile``.
    """
    x = torch.rand(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    nets = {
        "plain": Inception(*WIDTHS),
        "FastInception": FastInception(*WIDTHS, backend="triton"),
        FLOOR: _Floor(*WIDTHS),
    }
    blocks: dict[str, Any] = {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}
    if compiled:
        blocks |= {f"{name}, compiled": torch.compile(nets[name]) for name in ("plain", "FastInception")}
    leaves = {name: [leaf, *block.parameters()] for name, block in blocks.items()}
    grad = torch.rand_like(blocks["plain"](x))

    def inference(name: str) -> None:
        with torch.inference_mode():
            blocks[name](x)

    def forward(name: str) -> None:
        blocks[name](leaf)

    def step(name: str) -> None:
        blocks[name](leaf).backward(grad)
        for t in leaves[name]:
            t.grad = None

    kinds = {"inference": inference, "forward with grad": forward, "forward + backward": step}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in blocks for kind in kinds}
    try:
        with stubbed():
            for _ in range(rounds):  # interleaved: a slow moment of the machine falls on all
                for (name, kind), times in samples.items():
                    start = time.thread_time()
                    for _ in range(calls):
                        kinds[kind](name)
                    times.append(1e6 * (time.thread_time() - start) / calls)
    finally:
        torch.set_num_threads(threads)
    return {name: {kind: min(samples[name, kind]) for kind in kinds} for name in blocks}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed")
    os.environ["TRITON_INTERPRET"] = "1"  # here, not on import: it would switch a whole test run to the interpreter
    try:
        if (failure := compile_failure(torch.device("cpu"))) is not None:
            print(f"no compiled blocks: torch.compile does not work here: {failure}")
        found = measure(compiled=failure is None)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(f"{'us a call':22}" + "".join(f"{kind:>20}" for kind in found["plain"]))
    for name, costs in found.items():
        print(f"{name:22}" + "".join(f"{cost:20.1f}" for cost in costs.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
