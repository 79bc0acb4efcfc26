"""Run a block with one choice of tiles: whether it spills, whether its numbers are right, and how long it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.harness import DTYPES, side_of
from fastinception.googlenet import GoogLeNet, Widths
from fastinception.reference import Inception

Run = Callable[[], Sequence[Tensor]]


class Shape(NamedTuple):
    """A block of the network at one batch and image size, in one dtype."""

    block: str
    widths: Widths
    batch: int
    image_size: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.block} at {self.batch}x{self.image_size}x{self.image_size}"

    @property
    def side(self) -> int:
        return side_of(self.block, self.image_size)

    @property
    def rows(self) -> int:
        return self.batch * self.side**2

    def passes(self, device: torch.device) -> dict[str, Run]:
        """Return what is timed, by name, on channels_last operands; with the first block the stem's launch, too."""
        torch.manual_seed(0)
        net = Inception(*self.widths).to(device, DTYPES[self.dtype]).to(memory_format=torch.channels_last)
        params = [p.detach() for p in net.parameters()]
        shape = self.batch, self.widths.in_channels, self.side, self.side
        # Behind a ReLU, as in the network: half of it zeros, and ties in the pool.
        x = torch.randn(shape, device=device).relu().to(DTYPES[self.dtype], memory_format=torch.channels_last)
        forward, backward = torch.ops.fastinception.triton_forward, torch.ops.fastinception.triton_backward
        out, *saved = forward(x, *params)
        grad = torch.randn_like(out)
        passes: dict[str, Run] = {
            "inference": lambda: torch.ops.fastinception.triton_inference(x, *params, True),
            "training": lambda: forward(x, *params),
            "backward": lambda: backward(grad, x, *params, *saved, [True] * 13),
        }
        return passes | {"stem": self._stem(device)} if self.block == "3a" else passes

    def _stem(self, device: torch.device) -> Run:
        """Return the 1x1 convolution with ReLU behind GoogLeNet's first pool, which eager inference launches."""
        from fastinception.kernels.spatial import Conv, spatial

        conv = GoogLeNet()[1][0].to(device, DTYPES[self.dtype]).requires_grad_(False)
        side = -(-self.image_size // 4)
        shape = self.batch, conv.in_channels, side, side
        x = torch.randn(shape, device=device).relu().to(conv.weight.dtype, memory_format=torch.channels_last)

        def run() -> Sequence[Tensor]:
            out = torch.empty_like(x)
            spatial([Conv(x, conv.weight, conv.bias, column=0)], out, None)
            return [out]

        return run


TINY = Shape("tiny", Widths(16, 8, (8, 8), (8, 8), 8), 2, 32, "fp16")  # for Triton's interpreter


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """Collect the compiled kernels that are launched inside."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        if not kwargs["warmup"]:
            kernels.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", run):
        yield kernels


def poisoned(run: Run) -> list[Tensor]:
    """Return the results of a run that finds NaN in all memory it allocates."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        return list(run())
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def disagreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Say which result differs by more than its sums' order explains, or None. Bytes are bits of ReLU masks and codes.

    Of bytes a twentieth may differ: where a sum of another order has another sign. NaN never agrees.
    """
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.numel() == 0:
            continue
        if not ours.is_floating_point():
            off, limit = float((ours != theirs).float().mean()), 0.05
        else:
            off = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
            limit = 4 * max(torch.finfo(ours.dtype).eps, 2**-10)  # float32 is multiplied in TF32
        if not off <= limit:
            return f"result {i} is off by {off:.1e} of its largest, {limit:.1e} is allowed"
    return None
