"""Run and time one workload: what the benchmarks share."""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastinception.data import fashion_mnist
from fastinception.trainer import Graphed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Seconds: below this the clock and one device synchronisation would show in a sample.
MIN_SAMPLE = 0.05


def side_of(block: str, image_size: int) -> int:
    """Return height and width of a block's input: each stride of 2 in front of it halves, upwards."""
    return -(-image_size // {"3": 8, "4": 16, "5": 32}.get(block[0], 8))


class Batch(NamedTuple):
    """Images fp32 ``[N, 1, S, S]`` in 0..1, labels int64 ``[N]``, both on the device, and their origin."""

    images: Tensor
    labels: Tensor
    source: str


def load_batch(
    size: int, image_size: int, device: torch.device, *, synthetic: bool, data_root: Path | None = None
) -> Batch:
    """Return the first Fashion-MNIST test images, or random ones where ``synthetic`` asks for them.

    Raises:
        FileNotFoundError: the data cannot be had.
        ValueError: there are fewer images than ``size``, they do not fit into the memory, or a file is damaged.
    """
    try:
        if synthetic:
            generator = torch.Generator().manual_seed(0)
            images = torch.rand((size, 1, image_size, image_size), generator=generator)
            labels = torch.randint(10, (size,), generator=generator)
            source = "SYNTHETIC random images, not Fashion-MNIST"
        else:
            data = fashion_mnist("test", image_size=image_size, data_root=data_root, limit=size)
            if len(data.images) < size:
                raise ValueError(f"batch size {size}: there are only {len(data.images)} test images")
            images, labels = data.images.float() / 255, data.labels
            source = f"Fashion-MNIST test images, {data.source}"
    except (RuntimeError, MemoryError) as error:
        words = f"batch size {size}: images of {image_size} pixels a side do not fit into the memory"
        raise ValueError(f"{words}: {str(error).splitlines()[0]}") from error
    return Batch(images.to(device), labels.to(device), source)


class Runner:
    """Repeat one inference pass or one training step of a network on a fixed batch.

    Inference casts the whole network and the images to ``dtype`` and runs under ``torch.inference_mode``.
    Training keeps fp32 parameters, runs forward and loss under ``torch.autocast`` for bf16 and fp16 (with a
    ``GradScaler`` for fp16), then backward and one SGD step.

    Args:
        net: the network; cast and laid out in place.
        images: fp32 ``[N, C, H, W]`` on the device to measure.
        labels: int64 ``[N]`` on the same device.
        mode: ``"inference"`` or ``"training"``.
        dtype: a key of ``DTYPES``.
        layout: a key of ``LAYOUTS``, for weights and images.
        compile_options: keywords of ``torch.compile``; None runs eagerly.
        freezing: compile with Inductor's ``freezing``: the weights become constants, in oneDNN's own layout.
        cuda_graph: capture the eager pass in one CUDA graph (the optimizer step stays outside).
    """

    def __init__(
        self,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        mode: str,
        dtype: str,
        layout: str = "channels_last",
        compile_options: Mapping[str, Any] | None = None,
        freezing: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.freezing = freezing
        self.training, self.dtype = mode == "training", DTYPES[dtype]
        cast = torch.float32 if self.training else self.dtype
        self.net = net.to(images.device, cast).to(memory_format=LAYOUTS[layout])
        self.images = images.to(dtype=cast, memory_format=LAYOUTS[layout])
        self.labels = labels
        self.call: Callable[[Tensor], Tensor] = self.net
        if compile_options is not None:
            self.call = torch.compile(self.net, fullgraph=True, dynamic=False, **compile_options)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        # A scale at which no gradient of the first steps overflows, so that no step is skipped.
        scaled = self.training and self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(images.device.type, init_scale=1024.0, enabled=scaled)
        self.graphed = Graphed(self._keep_logits) if cuda_graph else None
        self.logits = torch.empty(0)

    def forward(self) -> Tensor:
        """Return the logits ``[N, classes]``; in training leave the (scaled) gradients on the parameters."""
        if not self.training:
            with torch.inference_mode(), self._frozen() if self.freezing else contextlib.nullcontext():
                return self.call(self.images)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.call(self.images)
            loss = F.cross_entropy(logits, self.labels)
        self.scaler.scale(loss).backward()
        return logits

    @staticmethod
    def _frozen() -> contextlib.AbstractContextManager[Any]:
        """Freeze what is compiled: Dynamo asks for that before the options of torch.compile hold, among which it does
        nothing."""
        import torch._inductor.config

        frozen: contextlib.AbstractContextManager[Any] = torch._inductor.config.patch(freezing=True)
        return frozen

    def __call__(self) -> None:
        """Do the work of one timed call."""
        self.evaluate()
        if self.training:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def evaluate(self) -> Tensor:
        """Do ``forward``, through the CUDA graph where one is wanted; the first call compiles or captures."""
        if self.graphed is None:
            return self.forward()
        while self.graphed.graph is None:  # what is checked and timed is the graph
            self.graphed()
        self.graphed()
        return self.logits

    def gradients(self) -> dict[str, Tensor]:
        """Return the unscaled gradients that the last ``evaluate`` left, by parameter name."""
        scale = self.scaler.get_scale()
        named = self.net.named_parameters()
        return {name: p.grad / scale for name, p in named if p.grad is not None}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.images.device.type, dtype=self.dtype)

    def _keep_logits(self) -> None:
        self.logits = self.forward()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Clock = Callable[[Callable[[], object], int], list[float]]


def wall_clock(sync: Callable[[], None], pause: float = 0.0) -> Clock:
    """Return a clock that pauses for some seconds, then takes one sample, seconds a call, of so many calls in a row."""

    def sample(run: Callable[[], object], calls: int) -> list[float]:
        time.sleep(pause)
        sync()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        sync()
        return [(time.perf_counter() - start) / calls]

    return sample


def interleave(
    runs: Mapping[str, Callable[[], object]],
    sync: Callable[[], None],
    *,
    warmup: float,
    rounds: int,
    seconds: float,
    clock: Clock | None = None,
) -> Iterator[tuple[dict[str, list[float]], int]]:
    """Time several runs in turn, so that a slow moment of the machine falls on all of them.

    Each run is called once outside every clock (compilation belongs there), then warmed up for ``warmup``
    seconds. Then come at least ``rounds`` rounds, more if ``seconds`` allow; each takes one sample of every
    run (or those that ``clock`` takes) and starts with another one.

    Yields:
        After the warm-up and after each round: the samples so far (seconds per call, by name), and the number
        of rounds there will be.
    """
    calls, round_time = {}, 0.0
    for name, run in runs.items():
        run()
        sync()
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < warmup:
            run()
            sync()
            count += 1
        per_call = (time.perf_counter() - start) / count
        calls[name] = max(1, round(MIN_SAMPLE / per_call))
        round_time += calls[name] * per_call
    rounds = max(rounds, int(seconds / round_time))
    clock = clock or wall_clock(sync)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    yield samples, rounds
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name] += clock(runs[name], calls[name])
        yield samples, rounds


def page_faults(run: Callable[[], object]) -> int | None:
    """Return how many pages of memory one call had from the system; None on Windows, which does not say.

    Each takes about a microsecond. Whether malloc keeps a large piece for the next call depends on what else is
    in the process's heap, so that the same call may have thousands in one process and none in another.
    """
    try:
        import resource
    except ModuleNotFoundError:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def rate(samples: list[float], batch_size: int) -> tuple[float, list[float]]:
    """Return the median rate of samples (seconds per call) and its quartiles, all in examples/s."""
    low, middle, high = quartiles([batch_size / sample for sample in samples])
    return middle, [low, high]


def quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile, to three decimals."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(value, 3) for value in found]


def positive(text: str) -> int:
    """Read an option that counts something."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def failure(error: BaseException) -> str:
    """Return the kind of an error and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compile_failure(device: torch.device) -> str | None:
    """Say why ``torch.compile`` does not work here: no C++ compiler, no Python headers, no Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    # Each missing piece raises its own kind of error, and all mean the same here: no compiled rows.
    except Exception as error:
        return failure(error)
    return None
