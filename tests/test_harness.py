"""How compare.py loads a batch, runs a network on it and times that."""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bench import harness
from tests import fresh
from tests.comparisons import write_test_split


def _tiny_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def _tiny_runner(mode: str, dtype: str, **options: Any) -> harness.Runner:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 1, 8, 8, generator=generator), torch.arange(4)
    return harness.Runner(_tiny_net(), images, labels, mode=mode, dtype=dtype, **options)


def test_page_faults_are_those_of_one_call() -> None:
    pages = 200
    piece = mmap.mmap(-1, pages * mmap.PAGESIZE)

    def touch() -> None:
        for page in range(pages):
            piece[page * mmap.PAGESIZE] = 1

    first, again = harness.page_faults(touch), harness.page_faults(touch)
    piece.close()
    assert first - again >= pages // 2  # a system may map several pages at once


def test_a_system_that_counts_no_page_faults_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, where the command has to start nevertheless."""
    fresh.run("import sys; sys.modules['resource'] = None; from bench import comparison")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert harness.page_faults(lambda: pytest.fail("it ran for nothing")) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stop the clock: its time is what the test adds to the one number in the list."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_first_call_is_in_no_sample_and_a_sample_is_the_time_of_one_call(clock: list[float]) -> None:
    calls = {"a": 0, "b": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        clock[0] += 100.0 if calls[name] == 1 else seconds

    runs = {"a": lambda: run("a", 0.001), "b": lambda: run("b", 0.5)}
    *_, (samples, rounds) = harness.interleave(runs, lambda: None, warmup=1.0, rounds=3, seconds=0.0)
    assert rounds == 3
    assert samples == {"a": [pytest.approx(0.001)] * 3, "b": [pytest.approx(0.5)] * 3}
    # A second of warm-up, then as many calls a sample as make it long enough for the clock.
    assert calls["a"] == pytest.approx(1 + 1000 + 3 * harness.MIN_SAMPLE / 0.001, abs=2)
    assert calls["b"] == 1 + 2 + 3


def test_a_pause_comes_before_a_sample_and_is_not_in_it():
    """Threads that spin after one run must not share the cores with the next."""
    start = time.perf_counter()
    (sample,) = harness.wall_clock(lambda: None, pause=0.2)(lambda: None, 1)
    assert time.perf_counter() - start >= 0.2
    assert sample < 0.1


def test_more_rounds_are_taken_where_the_seconds_allow(clock: list[float]) -> None:
    def run() -> None:
        clock[0] += 0.5

    *_, (samples, rounds) = harness.interleave({"a": run}, lambda: None, warmup=0.0, rounds=3, seconds=5.0)
    assert rounds == len(samples["a"]) == 10


def test_rounds_take_turns_and_each_starts_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MIN_SAMPLE", 0.0)
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    for samples, _ in harness.interleave(runs, lambda: None, warmup=0.0, rounds=3, seconds=0.0):
        if not samples["a"]:
            order.clear()
    assert "".join(order) == "abc" + "bca" + "cab"


def test_every_sample_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = [0]
    waited: list[int] = []

    def launch() -> None:
        pending[0] += 1

    def sync() -> None:
        waited.append(pending[0])
        pending[0] = 0

    clock_saw: list[int] = []
    real = time.perf_counter

    def clock() -> float:
        clock_saw.append(pending[0])
        return real()

    monkeypatch.setattr(time, "perf_counter", clock)
    for _ in harness.interleave({"a": launch}, sync, warmup=0.0, rounds=2, seconds=0.0):
        pass
    assert sum(waited) > 2
    assert set(clock_saw) == {0}


def test_a_rate_is_the_median_with_its_quartiles() -> None:
    assert harness.rate([1.0, 0.5, 0.25, 0.2, 10.0], 2) == (4.0, [2.0, 8.0])
    assert harness.rate([0.5], 2) == (4.0, [4.0, 4.0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_inference_casts_and_leaves_the_network_alone(dtype: str) -> None:
    runner = _tiny_runner("inference", dtype, layout="channels_last")
    before = [p.clone() for p in runner.net.parameters()]
    runner()
    logits = runner.evaluate()
    assert logits.dtype == harness.DTYPES[dtype]
    assert logits.is_inference()
    assert all(torch.equal(p, q) for p, q in zip(runner.net.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_training_call_is_one_sgd_step_from_unscaled_gradients(dtype: str) -> None:
    torch.manual_seed(0)
    runner = _tiny_runner("training", dtype)
    before = {name: p.detach().clone() for name, p in runner.net.named_parameters()}
    assert runner.evaluate().dtype == harness.DTYPES[dtype]
    found = runner.gradients()
    truth = _tiny_net().double()
    truth.load_state_dict(before)
    nn.functional.cross_entropy(truth(runner.images.double()), runner.labels).backward()
    runner()
    runner.evaluate()  # a second backward must not add to the first
    tolerance = {"rtol": 0.0, "atol": 1e-6 if dtype == "fp32" else 2e-2}
    for name, p in truth.named_parameters():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), p.grad, **tolerance)
        stepped = before[name].double() - 0.1 * p.grad
        torch.testing.assert_close(runner.net.get_parameter(name).double(), stepped, **tolerance)
    assert found["4.weight"].abs().max() > 0.03  # the tolerance is not above what it compares


def test_what_is_checked_and_timed_is_the_graph_and_not_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graphed:
        graph, calls = None, 0

        def __init__(self, function: Any) -> None:
            self.function = function

        def __call__(self) -> None:
            self.calls += 1
            self.graph = object() if self.calls > 3 else None
            self.function()

    monkeypatch.setattr(harness, "Graphed", Graphed)
    runner = _tiny_runner("inference", "fp32", cuda_graph=True)
    for calls in (5, 6):
        assert runner.evaluate().shape == (4, 10)
        assert runner.graphed.calls == calls


def test_compilation_is_tried_on_the_device_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: devices.append(x.device.type))
    assert harness.compile_failure(torch.device("meta")) is None
    assert devices == ["meta"]
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no\n compiler")))
    assert harness.compile_failure(torch.device("cpu")) == "RuntimeError: no compiler"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_cuda_graph_computes_what_eager_computes(mode: str, dtype: str) -> None:
    images, labels = torch.rand(4, 1, 8, 8, device="cuda"), torch.arange(4, device="cuda")
    net, twin = _tiny_net(), _tiny_net()
    twin.load_state_dict(net.state_dict())
    eager = harness.Runner(net, images, labels, mode=mode, dtype=dtype)
    graph = harness.Runner(twin, images, labels, mode=mode, dtype=dtype, cuda_graph=True)
    # cuDNN may add up in another order; TF32 and 16-bit numbers round coarsely.
    tolerance = {"rtol": 1e-2, "atol": 1e-3}
    for _ in range(3):
        torch.testing.assert_close(graph.evaluate(), eager.evaluate(), **tolerance)
        if mode == "training":
            torch.testing.assert_close(graph.gradients(), eager.gradients(), **tolerance)
        graph()
        eager()
    torch.testing.assert_close(dict(twin.named_parameters()), dict(net.named_parameters()), **tolerance)


@pytest.mark.parametrize("freezing", [False, True])
def test_a_frozen_graph_keeps_its_weights(freezing: bool) -> None:
    torch.compiler.reset()
    runner = _tiny_runner("inference", "fp32", compile_options={}, freezing=freezing)
    before = runner.evaluate().clone()
    with torch.inference_mode():
        runner.net[0].weight.zero_()  # the graph has its own, in oneDNN's layout
    assert torch.equal(runner.evaluate(), before) is freezing


def test_images_that_do_not_fit_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 596. GiB")

    monkeypatch.setattr(harness, "fashion_mnist", full)
    with pytest.raises(ValueError, match=r"images of 96 pixels a side do not fit into the memory: Unable to allocate"):
        harness.load_batch(8, 96, torch.device("cpu"), synthetic=False)


def test_what_a_device_says_is_not_taken_for_too_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(Tensor, "to", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        harness.load_batch(1, 8, torch.device("cpu"), synthetic=True)


def test_the_batch_is_the_first_test_images_as_floats(tmp_path: Path) -> None:
    images = write_test_split(tmp_path, 5)
    batch = harness.load_batch(3, 28, torch.device("cpu"), synthetic=False, data_root=tmp_path)
    assert torch.equal(batch.images, torch.from_numpy(images[:3, None]).float() / 255)
    assert batch.labels.tolist() == [0, 1, 2]
    assert str(tmp_path) in batch.source
