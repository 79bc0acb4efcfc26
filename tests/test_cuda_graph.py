"""Training steps replayed from a CUDA graph: on a GPU, and on a CPU from a record that knows addresses alone, too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastinception import train, trainer
from fastinception.data import FashionMNIST

BATCH, STEPS, EPOCHS = 4, 7, 2
IMAGES = BATCH * (STEPS - 1) + 1  # the last step of an epoch is a smaller one, launched as it is


class Operations(TorchDispatchMode):
    """Record every operation with its operands, and run them again on the same tensors, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.record: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("an operation waits for a result, which ends the capture of a CUDA graph")
        result = func(*args, **(kwargs or {}))
        self.record.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.record:
            given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and storage(old) not in given:  # neither a view nor changed in place
                    old.copy_(new)


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Recorded(trainer.Graphed):
    """Stand in for a CUDA graph on a CPU. Recording computes already, where a capture does not: this undoes it."""

    replays = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.WARMUP:
            self.function()
            return
        if self.graph is None:
            run = self.function.__self__
            kept = [*run.net.parameters(), run.sums, run._finite, run._finite_steps]
            before = [t.detach().clone() for t in kept]
            with Operations() as self.graph:
                self.function()
            with torch.no_grad():
                for t, value in zip(kept, before, strict=True):
                    t.copy_(value)
        with torch.no_grad():
            self.graph.replay()
        type(self).replays += 1


def split(count: int, seed: int) -> FashionMNIST:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 32, 32), generator=generator, dtype=torch.uint8)
    return FashionMNIST(images, torch.randint(10, (count,), generator=generator), "random")


@pytest.fixture
def make(tmp_path) -> Callable[..., trainer.Trainer]:
    """Make a run of a few small steps."""

    def made(*, graphed: bool, compiled: bool = False, device: str = "cpu", **config: Any) -> trainer.Trainer:
        settings = train.RECIPE | {"epochs": EPOCHS, "batch_size": BATCH, "image_size": 32} | config
        world = trainer.World(0, 1, torch.device(device))
        data = split(IMAGES, 0), split(BATCH + 1, 1)
        return trainer.Trainer(settings, world, *data, compiled=compiled, graphed=graphed, folder=tmp_path)

    return made


def history(run: trainer.Trainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in run.history]


def test_a_replayed_run_is_the_same_run(make, monkeypatch):
    """Nothing that changes between steps is a number in the graph, and nothing it writes is replaced beside it."""
    monkeypatch.setattr(trainer, "Graphed", Recorded)
    monkeypatch.setattr(Recorded, "replays", 0)
    runs = [make(graphed=graphed) for graphed in (True, False)]
    for run in runs:
        run.run(None, lambda *_: None, lambda: None)
    assert Recorded.replays == EPOCHS * (STEPS - 1) - Recorded.WARMUP
    replayed, launched = runs
    assert history(replayed) == history(launched)
    assert replayed.history[0]["train_loss"] != replayed.history[1]["train_loss"]
    for got, expected in zip(replayed.net.parameters(), launched.net.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("at", [2, 5, STEPS + 3])
def test_a_replayed_loss_that_is_not_finite_is_found_in_its_step(make, monkeypatch, at):
    """Also where nobody looks before later steps went well again."""
    monkeypatch.setattr(trainer, "Graphed", Recorded)
    monkeypatch.setattr(trainer.Trainer, "_look_now", lambda run, step: False)
    run = make(graphed=True)
    step, steps = run._step, []

    def spoil() -> None:
        steps.append(None)
        before = [p.detach().clone() for p in run.net.parameters()]
        if len(steps) == at:
            next(run.net.parameters()).data.fill_(math.nan)
        step()
        if len(steps) == at:
            for p, value in zip(run.net.parameters(), before, strict=True):
                p.data.copy_(value)

    monkeypatch.setattr(run, "_step", spoil)
    words = f"the training loss is not finite in epoch {1 + (at - 1) // STEPS}, step {1 + (at - 1) % STEPS} of {STEPS}"
    with pytest.raises(trainer.TrainingError, match=words):
        run.run(None, lambda *_: None, lambda: None)
    assert len(steps) % STEPS == 0


class FakeGpu:
    """Note what is asked of a GPU's streams and graphs, and run nothing in a graph before it is replayed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.stream: list[str] = ["usual"]
        self.captures = False
        gpu = self

        class Stream:
            name = "side"

            def wait_stream(self, other: Any) -> None:
                gpu.events.append(f"{self.name} waits for {other.name}")

        class Usual(Stream):
            name = "usual"

        class Graph:
            def replay(self) -> None:
                gpu.events.append("replay")

        @contextlib.contextmanager
        def stream(side: Stream) -> Iterator[None]:
            gpu.stream.append(side.name)
            yield
            gpu.stream.pop()

        @contextlib.contextmanager
        def graph(made: Graph) -> Iterator[None]:
            gpu.captures = True
            yield
            gpu.captures = False

        for name, value in (("Stream", Stream), ("current_stream", Usual), ("stream", stream)):
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", graph)

    def work(self) -> None:
        self.events.append("captured" if self.captures else f"runs on {self.stream[-1]}")


def test_a_graph_is_replayed_from_its_capture_on(monkeypatch):
    """A capture computes nothing: without a replay behind it a step would be lost."""
    gpu = FakeGpu(monkeypatch)
    graphed = trainer.Graphed(gpu.work)
    for _ in range(5):
        graphed()
    warm_up = ["side waits for usual", "runs on side", "usual waits for side"]
    assert gpu.events == [*3 * warm_up, "captured", "replay", "replay"]


@pytest.mark.parametrize(
    ("device", "size", "amp", "graphed"),
    [
        ("cuda", 1, "off", True),
        ("cuda", 1, "bf16", True),
        ("cuda", 1, "fp16", False),
        ("cuda", 2, "off", False),
        ("cpu", 1, "off", False),
    ],
)
def test_one_gpu_has_a_graph_unless_its_scaler_waits(tmp_path, monkeypatch, device, size, amp, graphed):
    class Made(Exception):
        pass

    def make(*_: Any, **options: Any) -> None:
        raise Made(options["graphed"])

    monkeypatch.setattr(train, "_load_data", lambda config, root: (None, None))
    monkeypatch.setattr(train, "_keep_memory", lambda: None)
    monkeypatch.setattr(train, "Trainer", make)
    world = trainer.World(0, size, torch.device(device))
    for asked in (None, False, True):
        expected = graphed if asked is None else asked
        with pytest.raises((Made, trainer.TrainingError)) as ended:
            train._train_in(tmp_path, None, train.RECIPE | {"amp": amp, "cuda_graph": asked}, None, world)
        if asked and not graphed:
            assert f"this is {size} x {device}, amp {amp}: give --no-cuda-graph" in str(ended.value)
        else:
            assert ended.value.args == (expected,)


@pytest.mark.parametrize("options", [["--device", "cpu"], ["--device", "cpu", "--amp", "fp16"]])
def test_a_graph_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(train, "_load_data", lambda config, root: pytest.fail("read the data first"))
    assert train.main([*options, "--output", str(tmp_path), "--cuda-graph"]) == 1
    assert "--cuda-graph needs one process on a GPU, and not --amp fp16; this is 1 x cpu" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_graph_on_the_gpu_is_the_same_run(make, amp, compiled):
    options = {"compiled": compiled, "device": "cuda", "amp": amp, "lr": 0.01}
    runs = [make(graphed=graphed, **options) for graphed in (True, False)]
    starts = [p.detach().clone() for p in runs[0].net.parameters()]
    for run in runs:
        run.run(None, lambda *_: None, lambda: None)
    replayed, launched = runs
    assert replayed._graphed.graph is not None
    bound = 1e-3 if amp == "off" else 3e-2  # the library's convolutions add in another order at each call
    for got, expected, start in zip(replayed.net.parameters(), launched.net.parameters(), starts, strict=True):
        assert (got - expected).norm() <= bound * (expected - start).norm() + 1e-6
    for got, expected in zip(replayed.history, launched.history, strict=True):
        assert got["train_loss"] == pytest.approx(expected["train_loss"], rel=bound)
