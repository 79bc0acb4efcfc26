"""Time plain against FastInception under pytest-benchmark: each Inception block, and GoogLeNet as a whole.

    pytest bench --benchmark-only
    pytest bench --benchmark-only --benchmark-autosave      # then, after a change:
    pytest bench --benchmark-only --benchmark-compare
    pytest bench --benchmark-only -k "3a and forward"       # some of it

Plain and fast of one case share a group, so that pytest-benchmark's table compares them. Everything is eager
and in channels_last, plain's better layout; compile modes and CUDA graphs are compare.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.harness import DTYPES, side_of, synchronize
from bench.record import commit
from fastinception import FastInception
from fastinception.googlenet import WIDTHS, GoogLeNet
from fastinception.reference import Inception

BLOCKS = {"plain": Inception, "fast": FastInception}
# Small enough for two cores, large enough for a GPU.
BATCH = {"cpu": 8, "cuda": 128}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = [
    # The suite has 152 cases on a CPU: half a second each, or five rounds where a round is long.
    pytest.mark.benchmark(max_time=0.5, min_time=0.02, min_rounds=5),
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("dtype", ["fp32", "bf16"]),
    pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"]),
    pytest.mark.parametrize("kind", BLOCKS),
]


@functools.cache
def _commit() -> str:
    return commit()


def _work(net: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    """Return one pass that ends when the device has ended it."""
    if not backward:

        def forward() -> None:
            with torch.inference_mode():
                net(x)
            synchronize(x.device)

        return forward
    x = x.requires_grad_()
    grad = torch.randn_like(net(x))

    def forward_backward() -> None:
        x.grad = None
        net.zero_grad(set_to_none=True)
        net(x).backward(grad)
        synchronize(x.device)

    return forward_backward


def _time(benchmark: Any, net: nn.Module, shape: tuple[int, ...], dtype: str, backward: bool, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
    torch.manual_seed(0)
    net = net.to(device, DTYPES[dtype]).to(memory_format=torch.channels_last)
    x = torch.rand((BATCH[device], *shape), device=device, dtype=DTYPES[dtype])
    work = _work(net, x.contiguous(memory_format=torch.channels_last), backward)
    for _ in range(3 if benchmark.enabled else 0):  # library set-up and kernel compilation
        work()
    benchmark.extra_info.update(
        dtype=dtype, batch=len(x), layout="channels_last", torch=torch.__version__, commit=_commit()
    )
    benchmark(work)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["images_per_second"] = len(x) / benchmark.stats.stats.median


@pytest.mark.parametrize("image_size", [224, 96])
@pytest.mark.parametrize("name", WIDTHS)
def test_block(benchmark: Any, name: str, image_size: int, kind: str, backward: bool, dtype: str, device: str) -> None:
    side = side_of(name, image_size)
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"block {name} {side}x{side} {dtype} {direction} {device}"
    widths = WIDTHS[name]
    _time(benchmark, BLOCKS[kind](*widths), (widths.in_channels, side, side), dtype, backward, device)


def test_network(benchmark: Any, kind: str, backward: bool, dtype: str, device: str) -> None:
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"GoogLeNet 96x96 {dtype} {direction} {device}"
    _time(benchmark, GoogLeNet(block=BLOCKS[kind]), (1, 96, 96), dtype, backward, device)
