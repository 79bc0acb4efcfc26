"""Check and measure the ways to run one network on one batch: what compare.py does for each mode and dtype."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import engines, memory
from bench.agreement import Disagreement, Errors, check, check_weights, errors, truth
from bench.convolutions import Convolutions
from bench.engines import Engine
from bench.harness import Batch, Runner, failure, interleave, page_faults, rate, synchronize, wall_clock
from bench.report import BASE, FLOOR, Display, Row, with_ratios
from fastinception.googlenet import GoogLeNet, xavier_uniform_

BLOCKS: Mapping[str, Callable[..., nn.Module]] = memory.BLOCKS


@dataclass(frozen=True)
class Variant:
    """One way to run the network. Variants of one name compete for one row, and the fastest is the row.

    ``engine`` names another inference engine; the variant named FLOOR is the network's convolutions alone.
    """

    name: str
    block: str
    layout: str = "channels_last"
    compile_options: Mapping[str, Any] | None = None
    freezing: bool = False
    cuda_graph: bool = False
    engine: str = ""
    detail: str = ""

    @property
    def label(self) -> str:
        """Name the variant among its rivals, too."""
        return f"{self.name} ({self.detail})" if self.detail else self.name


Timed = Runner | Engine | Convolutions


class Weights(NamedTuple):
    """State dicts of the plain network: for the check, and (the textbook's Xavier start) for the timing."""

    check: dict[str, Tensor]
    timing: dict[str, Tensor]


class Schedule(NamedTuple):
    """How long one mode and dtype is measured: at least so many rounds, more if the seconds allow."""

    warmup: float
    rounds: int
    seconds: float


# Before each sample on a CPU, in seconds: PyTorch's threads spin for some milliseconds after a run, and an engine with
# threads of its own would share the cores with them (OpenVINO lost 7 to 14%).
PAUSE = 0.05
MANY_FAULTS = 1000  # in a call, which take about a millisecond
SCHEDULES = {
    ("inference", False): Schedule(warmup=1.0, rounds=7, seconds=12.0),
    ("training", False): Schedule(warmup=1.0, rounds=5, seconds=15.0),
    ("inference", True): Schedule(warmup=0.3, rounds=7, seconds=1.0),
    ("training", True): Schedule(warmup=0.3, rounds=5, seconds=1.0),
}


def variants(mode: str, dtype: str, device: torch.device, compiles: bool, quick: bool) -> list[Variant]:
    """List what is measured; the first is the plain module that errors and ratios refer to."""
    cuda = device.type == "cuda"
    chosen = [
        Variant(BASE, "plain", layout="NCHW"),
        Variant("plain eager channels_last", "plain"),
        Variant("FastInception eager", "FastInception"),
    ]
    if compiles and (cuda or mode == "inference" or not quick):
        chosen.append(Variant("plain compiled", "plain", compile_options={}))
        if mode == "training":
            # Inductor can lose channels_last in the backward graph (pytorch#189239); this is its remedy.
            remedy = "force_layout_optimization"
            chosen.append(
                Variant("plain compiled", "plain", compile_options={"options": {remedy: True}}, detail=remedy)
            )
        chosen.append(Variant("FastInception compiled", "FastInception", compile_options={}))
        if mode == "inference" and not cuda and not quick:
            chosen += [Variant(f"{b} compiled, frozen", b, compile_options={}, freezing=True) for b in BLOCKS]
        tunings = ("reduce-overhead",) if quick else ("reduce-overhead", "max-autotune")
        for tuning in tunings if cuda else ():
            chosen += [Variant(f"{b} {tuning}", b, compile_options={"mode": tuning}) for b in BLOCKS]
    if cuda:
        chosen += [Variant(f"{b} CUDA graph", b, cuda_graph=True) for b in BLOCKS]
    elif mode == "inference" and not quick:
        chosen += [Variant(name, "plain", layout="NCHW", engine=name) for name in engines.available(dtype)]
    return [*chosen, Variant(FLOOR, "plain")]


class Comparison:
    """Check and measure variants of one network on one batch, one mode and dtype after another."""

    def __init__(
        self, modes: Sequence[str], batch: Batch, device: torch.device, compiles: bool, quick: bool, display: Display
    ) -> None:
        self.batch, self.device, self.compiles, self.quick, self.display = batch, device, compiles, quick, display
        self.notes: list[str] = []
        torch.manual_seed(0)
        textbook = xavier_uniform_(GoogLeNet())
        self.weights = Weights(check_weights(), textbook.state_dict())
        display.stage("reference in fp64", 0, None)
        self.truths = {
            mode: truth(self.weights.check, batch.images, batch.labels, mode == "training") for mode in modes
        }
        # The library at its best; not for the truth, whose fp64 it would search for seconds.
        torch.backends.cudnn.benchmark = device.type == "cuda"

    def note(self, words: str) -> None:
        """Say, now and in the JSON, what a reader of the rows should know."""
        self.notes.append(words)
        self.display.say(f"note: {words}")

    def group(self, mode: str, dtype: str) -> list[Row]:
        """Return the rows of one mode and dtype.

        Raises:
            Disagreement: a variant computes something else, or training left NaN or infinity.
        """
        title = f"{mode}, {dtype}"
        chosen = variants(mode, dtype, self.device, self.compiles, self.quick)
        runners = self._prepare(title, chosen, mode, dtype)
        chosen = [variant for variant in chosen if variant.label in runners]
        measured = self._memory(runners, dtype) if mode == "training" and not self.quick else {}
        self.display.stage(f"{title}: warm up", 0, None)
        sync = partial(synchronize, self.device)
        clock = wall_clock(sync, PAUSE if self.device.type == "cpu" else 0.0)
        for samples, rounds in interleave(runners, sync, clock=clock, **SCHEDULES[mode, self.quick]._asdict()):
            done = min(map(len, samples.values()))
            self.display.stage(f"{title}: rounds", done, rounds)
            if 0 < done < rounds:
                self.display.rows(title, self._rows(samples, chosen, measured, mode, dtype), final=False)
        faults: dict[str, int] = {}
        for label, run in runners.items() if self.device.type == "cpu" else ():
            if (count := page_faults(run)) is not None:
                faults[label] = count
                measured.setdefault(label, {})["page_faults"] = count
        rows = self._rows(samples, chosen, measured, mode, dtype)
        self.display.rows(title, rows, final=True)
        if many := [f"{label} {count:,}" for label, count in faults.items() if count >= MANY_FAULTS]:
            self.note(f"{title}: page faults in one call (the others had few): {', '.join(many)}")
        for label, runner in runners.items():
            if not all(bool(torch.isfinite(p).all()) for p in runner.net.parameters()):
                raise Disagreement(f"{title}: {label} left NaN or infinity in the parameters")
        for name in {variant.name for variant in chosen if variant.detail}:
            rivals = [v for v in chosen if v.name == name]
            speeds = [f"{v.detail or 'default'} {self._rate(samples[v.label])[0]:.1f}" for v in rivals]
            self.note(f"{title}: {name} is the better of {' and '.join(speeds)} examples/s")
        torch.compiler.reset()
        return rows

    def _runner(self, variant: Variant, net: nn.Module, mode: str, dtype: str) -> Runner | Engine:
        images, labels = self.batch.images, self.batch.labels
        if variant.engine:
            return Engine(variant.engine, net, images, dtype=dtype)
        return Runner(
            net,
            images,
            labels,
            mode=mode,
            dtype=dtype,
            layout=variant.layout,
            compile_options=variant.compile_options,
            freezing=variant.freezing,
            cuda_graph=variant.cuda_graph,
        )

    def _prepare(self, title: str, chosen: Sequence[Variant], mode: str, dtype: str) -> dict[str, Timed]:
        """Return by label what is timed, checked; an engine that fails is not among it, and a note says why."""
        runners: dict[str, Timed] = {}
        plain: Errors | None = None
        for done, variant in enumerate(chosen):
            self.display.stage(f"{title}: compile and check {variant.label}", done, len(chosen))
            net = GoogLeNet(block=BLOCKS[variant.block])
            if variant.name == FLOOR:
                runners[variant.label] = Convolutions(net, self.batch.images, mode=mode, dtype=dtype)
                continue
            net.load_state_dict(self.weights.check)
            try:
                runner = self._runner(variant, net, mode, dtype)
            except Exception as error:  # engines raise what they like, and are no part of what is compared
                if not variant.engine:
                    raise
                self.note(f"{title}: no row of {variant.engine}, which fails here: {failure(error)}")
                continue
            found = errors(runner, self.truths[mode])
            plain = plain or found
            self.display.say(check(f"{title}, {variant.label}", found, plain))
            net.load_state_dict(self.weights.timing)  # engines and frozen graphs keep those of the check
            runners[variant.label] = runner
        return runners

    def _memory(self, runners: Mapping[str, Timed], dtype: str) -> dict[str, dict[str, int]]:
        """Return saved and peak bytes of the eager training variants in channels_last, by label."""
        size, side = len(self.batch.labels), self.batch.images.shape[-1]
        found = {}
        for block, label in (("plain", "plain eager channels_last"), ("FastInception", "FastInception eager")):
            self.display.stage(f"training, {dtype}: memory of {label}", 0, None)
            if isinstance(runner := runners[label], Runner) and self.device.type == "cuda":
                found[label] = memory.measure(runner)
            else:
                try:
                    found[label] = memory.in_fresh_process(block, size, side, dtype)
                except subprocess.CalledProcessError as error:
                    last = error.stderr.strip().splitlines()[-1:]
                    self.note(f"training, {dtype}: no memory of {label}: status {error.returncode}, {' '.join(last)}")
        return found

    def _rate(self, samples: list[float]) -> tuple[float, list[float]]:
        return rate(samples, len(self.batch.labels))

    def _rows(
        self,
        samples: dict[str, list[float]],
        chosen: list[Variant],
        measured: dict[str, dict[str, int]],
        mode: str,
        dtype: str,
    ) -> list[Row]:
        best: dict[str, Row] = {}
        for variant in chosen:
            speed, spread = self._rate(samples[variant.label])
            if variant.name in best and best[variant.name]["examples_per_second"] >= speed:
                continue
            best[variant.name] = {
                "variant": variant.name,
                "mode": mode,
                "dtype": dtype,
                "layout": variant.layout,
                "compiled": variant.compile_options is not None,
                "examples_per_second": speed,
                "spread": spread,
            } | measured.get(variant.label, {})
        return with_ratios(list(best.values()))
