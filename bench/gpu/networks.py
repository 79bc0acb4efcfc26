"""Time GoogLeNet: inference at four batch sizes and training at two, plain and fast, in bf16; and its kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from bench.agreement import check_weights, errors, truth
from bench.gpu.baselines import compilations, fused_googlenet
from bench.gpu.case import Candidate, Case, Context, Row, contest, unsearched
from bench.harness import Runner, load_batch
from fastinception import FastInception, GoogLeNet
from fastinception.googlenet import xavier_uniform_


class Workload(NamedTuple):
    """One pass or one step of the network."""

    mode: str
    batch: int
    image_size: int

    def __str__(self) -> str:
        return f"{self.mode} {self.batch}x{self.image_size}x{self.image_size}"


WORKLOADS = (
    Workload("inference", 128, 96),
    Workload("training", 128, 96),
    Workload("inference", 1, 224),
    Workload("inference", 256, 224),
    Workload("training", 256, 224),
    Workload("inference", 32, 224),
)
TINY = (Workload("inference", 2, 32), Workload("training", 2, 32))
PROFILED = 5  # passes that are added up
NAMED = 30  # kernels that have a row of their own


def cases(how: str, context: Context) -> list[Case]:
    """List the workloads; ``how`` is ``"eager"`` (CUDA graphs among them) or a mode of ``torch.compile``."""
    needs = {"eager": 10.0, "default": 60.0, "reduce-overhead": 60.0, "max-autotune": 180.0}[how]
    workloads: tuple[Workload, ...] = WORKLOADS
    if context.dry:  # where all modes of torch.compile only trace
        workloads = {"eager": TINY, "default": TINY[1:]}.get(how, ())
    return [Case(str(w), partial(_network, w, how, context), needs, max(200.0, 2 * needs)) for w in workloads]


def _network(workload: Workload, how: str, context: Context) -> list[Row]:
    torch.manual_seed(0)
    # Random images: speed does not depend on what they show.
    batch = load_batch(workload.batch, workload.image_size, context.device, synthetic=True)
    weights = check_weights()
    with unsearched():
        expected = truth(weights, batch.images, batch.labels, workload.mode == "training")
    start = xavier_uniform_(GoogLeNet()).state_dict()
    dtype = "fp32" if context.dry else "bf16"  # a CPU may emulate bf16, slowly

    def runner(net: Callable[[], nn.Module], **options: Any) -> Candidate:
        made = net()
        made.load_state_dict(weights)
        run = Runner(made, batch.images, batch.labels, mode=workload.mode, dtype=dtype, **options)
        found = errors(run, expected)
        made.load_state_dict(start)  # the textbook's, for the timing
        return Candidate(run, found)

    fast = partial(GoogLeNet, block=FastInception)
    # What errors are held against, and what ratios start from, whatever else is measured.
    makers = {"plain eager NCHW": partial(runner, GoogLeNet, layout="NCHW")}
    if how == "eager":
        nets: dict[str, Callable[[], nn.Module]] = {"plain": GoogLeNet, "FastInception": fast}
        if workload.mode == "inference":
            nets["plain cudnn_convolution_relu"] = fused_googlenet
        for name, net in nets.items():
            makers[f"{name} eager channels_last"] = partial(runner, net)
            if not context.dry:
                makers[f"{name} CUDA graph"] = partial(runner, net, cuda_graph=True)
    else:
        for name, options in compilations(how, context.dry).items():
            makers[f"plain {name}"] = partial(runner, GoogLeNet, compile_options=options)
        name, options = next(iter(compilations(how, context.dry).items()))
        makers[f"FastInception {name}"] = partial(runner, fast, compile_options=options)
    rows = contest(makers, context, cold=False, seconds=2.0)
    torch.compiler.reset()
    unit = context.timer.unit
    rate = unit.replace("us", "examples_per_second")
    return [row | ({rate: round(1e6 * workload.batch / row[unit], 1)} if unit in row else {}) for row in rows]


def profile(context: Context) -> list[Case]:
    """List the workloads at 96 pixels: how long the device ran each kernel of a pass or a step, plain and fast."""
    workloads = TINY if context.dry else WORKLOADS[:2]
    return [Case(str(w), partial(_profile, w, context), seconds=15.0) for w in workloads]


def _profile(workload: Workload, context: Context) -> list[Row]:
    batch = load_batch(workload.batch, workload.image_size, context.device, synthetic=True)
    activity = ProfilerActivity.CPU if context.dry else ProfilerActivity.CUDA
    rows: list[Row] = []
    nets: dict[str, Callable[[], nn.Module]] = {
        "plain": GoogLeNet,
        "FastInception": partial(GoogLeNet, block=FastInception),
    }
    for name, net in nets.items():
        made = xavier_uniform_(net())
        dtype = "fp32" if context.dry else "bf16"
        run = Runner(made, batch.images, batch.labels, mode=workload.mode, dtype=dtype)
        for _ in range(3):  # compiles, and chooses algorithms
            run()
        context.timer.sync()
        with torch.profiler.profile(activities=[activity], acc_events=True) as recorded:
            for _ in range(PROFILED):
                run()
            context.timer.sync()
        times: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in recorded.events():
            if event.device_type.name == activity.name:  # what ran there
                times[event.name] += event.time_range.elapsed_us()
                calls[event.name] += 1
        unit = context.timer.unit

        def row(variant: str, us: float, count: int, unit: str = unit) -> Row:
            return {"variant": variant, unit: round(us / PROFILED, 2), "calls": round(count / PROFILED, 1)}

        rows.append(row(f"{name}: all", times.total(), calls.total()))
        rows += [row(f"{name}: {kernel}", us, calls[kernel]) for kernel, us in times.most_common(NAMED)]
    return rows
