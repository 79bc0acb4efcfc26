"""Test what the GPU suite's parts are made of: the contest, the clocks, the model, the comparison and the baselines."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from bench.agreement import Errors
from bench.gpu import baselines, blocks, checks, kernels, model, networks, report, timing
from bench.gpu.case import Candidate, Context, contest, unsearched
from bench.roofline import CHIPS, Work, floor_us
from fastinception import GoogLeNet, Inception
from fastinception.googlenet import WIDTHS, Widths
from fastinception.kernels import configs, replay

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, under the interpreter
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
]


TILES = {
    level: configs.Tiles(64, 32, 16, 4, 2, pool=pool) for level, pool in (("entry", (64, 32, 16)), ("spatial", None))
}


class _NoTimer(timing.HostTimer):
    """A device that can do no more."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.sync = self._raise

    def _raise(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _context(timer: timing.Timer | None = None) -> Context:
    device = torch.device("cpu")
    return Context(device, True, timer or timing.HostTimer(device), Path(), 0.0)


def test_a_variant_that_is_wrong_or_fails_is_not_timed() -> None:
    runs: list[str] = []

    def maker(name: str, error: float) -> Any:
        return lambda: Candidate(lambda: runs.append(name), Errors(error, {}, 0.0))

    def fails() -> Candidate:
        raise torch.OutOfMemoryError("too large")

    def own_rule() -> Candidate:
        return Candidate(lambda: runs.append("own rule"), Errors(0.09, {}, 0.0), Errors(0.05, {}, 0.0))

    makers = {
        "early": maker("early", 0.0),
        "plain": maker("plain", 1e-3),
        "right": maker("right", 1.9e-3),
        "wrong": maker("wrong", 2.1e-3),
        "nan": maker("nan", float("nan")),
        "large": fails,
        "own rule": own_rule,
    }
    rows = {row["variant"]: row for row in contest(makers, _context(), cold=True)}
    assert list(rows) == list(makers)
    assert {name for name, row in rows.items() if "dry_us" in row} == {"plain", "right", "own rule"} == set(runs)
    assert "no plain variant" in rows["early"]["failed"]
    assert "wrong: output is off by 2.10e-03" in rows["wrong"]["failed"]
    assert "nan" in rows["nan"]["failed"]
    assert rows["large"]["failed"] == "OutOfMemoryError: too large"


def test_a_lost_device_ends_the_contest() -> None:
    def fails() -> Candidate:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        contest({"plain": fails}, _context(_NoTimer()), cold=True)


def test_each_launch_is_marked_in_order_and_still_happens() -> None:
    block = kernels.Block(next(kernels.shapes(_context())), _context())

    def run() -> None:
        block.spatial()
        block.spatial()
        block.entry()

    class Timer(timing.HostTimer):
        late = 3  # of what was timed before

        def mark(self, run: timing.Run) -> tuple[float, float]:
            run()
            return 0.0, 1.0

        def read(self, launch: Any) -> list[float]:
            block.out.fill_(torch.nan)
            self.late += 1
            return [(end - start) * (i + 1) for i, (start, end) in enumerate(launch())]

    rows = timing.each_launch(run, Timer(torch.device("cpu")))
    assert [row["kernel"] for row in rows] == ["_spatial_kernel", "_spatial_kernel", "_entry_kernel"]
    assert [row["dry_us"] for row in rows] == [1e6, 2e6, 3e6]
    assert [row["host_late"] for row in rows] == [2] * 3
    assert block.out.isfinite().all()


class _Event:
    """An event of a GPU that is slow to start: the host is ahead from the second head start on, or never."""

    asked = 0
    never = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def query(self) -> bool:
        _Event.asked += 1
        return _Event.never or _Event.asked == 1

    def elapsed_time(self, end: _Event) -> float:
        return 0.25


def test_events_are_milliseconds_and_the_host_gets_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    timer = timing.EventTimer.__new__(timing.EventTimer)
    calls: list[str] = []
    other = mock.Mock(sum=lambda: calls.append("other memory"))
    timer.sync, timer.other, timer.head_start, timer.late = lambda: None, other, timing.HEAD_START, 0
    assert timer.cold(lambda: calls.append("call"), 1000) == [0.25e-3] * timing.COLD_CALLS
    assert slept == [timing.HEAD_START, 2 * timing.HEAD_START]
    assert calls == 2 * timing.COLD_CALLS * ["other memory", "call"]
    assert timer.stream(lambda: None, 5) == [0.05e-3]
    assert timing._noted(timer, timer.late) == {}
    monkeypatch.setattr(_Event, "never", True)
    assert timer.cold(lambda: None, 1) == [0.25e-3]
    assert slept[-1] == timing.MOST_HEAD_START
    assert timing._noted(timer, 0) == {"host_late": 1}
    figures = timing.measure({"late": lambda: None}, timer, cold=True, seconds=0.0)["late"]
    assert (figures["host_late"], timer.late) == (5, 6)  # its own, not the one before
    assert timing.summary([1e-6, 2e-6, 3e-6, 4e-6, 5e-6], "us") == {"us": 3, "quartiles_us": [2, 4], "samples": 5}


@pytest.mark.parametrize(("cache", "read"), [(50 << 20, 1 << 28), (128 << 20, 512 << 20)])
def test_what_is_read_between_cold_calls_is_four_l2_caches(
    cache: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(L2_cache_size=cache))
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.empty(size, device="meta"))
    assert timing.EventTimer(torch.device("cpu")).other.nbytes == read


def test_the_truth_is_computed_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with unsearched():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark


def test_the_comparison_takes_the_best_of_all_parts() -> None:
    def part(**figures: float) -> dict[str, Any]:
        def rows() -> list[dict[str, Any]]:
            return [{"variant": name.replace("_", " "), "us": us} for name, us in figures.items()]

        return {"cases": {f"{block} at 128x96x96": {"rows": rows()} for block in WIDTHS}}

    parts = {
        "blocks": part(plain_eager=30.0, plain_compiled=20.0, FastInception=10.0),
        "blocks-max-autotune": part(plain_max=15.0, FastInception=12.0),
        "networks": {"cases": {"inference": {"rows": [{"variant": "plain", "us": 1.0}]}}},
    }
    parts["blocks"]["cases"]["5b at 128x96x96"]["rows"][2]["us"] = 30.0
    *rows, mean = report.compare(parts)
    assert [row["ratio"] for row in rows] == [1.5] * 8 + [1.25]
    assert rows[0]["plain"] == "plain max"
    assert rows[0]["parts"] == ["blocks", "blocks-max-autotune"]
    assert mean["workload"] == "geometric mean at 128x96x96"
    assert mean["ratio"] == round((1.5**8 * 1.25) ** (1 / 9), 3)
    assert mean["least"] == 1.25
    kernelbench = {
        f"10x480 fp32, {mode}": {"rows": [{"variant": "plain", "us": us}, {"variant": "FastInception", "us": us}]}
        for mode, us in (("default", 6.0), ("max-autotune", 4.0))
    }
    (row,) = report.compare({"kernelbench": {"cases": kernelbench}})
    assert (row["workload"], row["plain_us"], row["fast_us"]) == ("10x480 fp32", 4.0, 4.0)
    del parts["blocks"]["cases"]["3a at 128x96x96"], parts["blocks-max-autotune"]["cases"]["3a at 128x96x96"]
    assert len(report.compare(parts)) == 8  # no mean of some


def test_the_model_is_the_studys() -> None:
    """Its sums over the nine blocks, and figures that follow from its tables."""
    for size, sums in (((128, 96), (95, 132, 97, 194, 475)), ((256, 224), (608, 957, 730, 1063, 2703))):
        blocks = model.MODEL[size].values()
        assert tuple(round(sum(block[i] for block in blocks)) for i in range(5)) == sums
        assert list(model.MODEL[size]) == list(WIDTHS)
    figures = model.modelled("3b", 256, 224, 256 * 28 * 28)
    assert figures["entry, 128x128 tiles"] == round(131.2 * 64 / 48, 1)
    assert figures["entry, 256x128 tiles"] == 131.2
    assert figures["spatial, 256x128 tiles"] == round(209.3 * 48 / 37, 1)
    assert figures["entry, separate tile order"] == round(131.2 + 2 * 200704 * 256 / 2.76e6, 1)
    assert figures["two launches"] - figures["two launches, dependent launch"] == pytest.approx(1.8)
    small = model.modelled("4a", 128, 96, 128 * 36)
    assert small["entry, separate tile order"] == small["entry"]  # x stays in the L2 cache
    assert "spatial, 256x128 tiles" not in small
    assert model.modelled("3b", 32, 224, 32 * 28 * 28) == {}
    rows = kernels.beside_model(
        [{"variant": "entry"}, {"variant": "plain entry"}], kernels.Shape("3b", WIDTHS["3b"], 256, 224)
    )
    assert rows == [{"variant": "entry", "model_us": 131.2}, {"variant": "plain entry"}]


def test_chained_launches_read_what_the_first_wrote_and_others_what_was_given() -> None:
    block = kernels.Block(next(kernels.shapes(_context())), _context())
    given = block.r2.clone()
    block.r2.fill_(torch.nan)
    block.entry()
    block.spatial(chained=True)
    assert block.out.isfinite().all()
    block.r2.copy_(given)
    assert block.launched("spatial", block.spatial).errors.output < 1e-3  # over poison where the entry level writes


def test_what_decides_is_compiled_together_and_a_failure_is_left_for_the_contest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each variant's kernels but for those whose launch cannot even be planned; nothing is launched meanwhile."""
    collected: list[Any] = []

    def compile_all(launches: list[Any], x: torch.Tensor) -> list[Any]:
        collected.extend(launches)
        return [mock.Mock(result=mock.Mock(side_effect=RuntimeError("PTX")))]

    monkeypatch.setattr(replay, "compiles_together", lambda: True)
    monkeypatch.setattr(replay, "compile_all", compile_all)
    monkeypatch.setattr(kernels, "contest", lambda *args, **how: [])
    monkeypatch.setattr(kernels.Block, "tiles", lambda self, level, tuned: TILES[level])
    assert kernels._decide(next(kernels.shapes(_context())), _context()) == []
    names = Counter(step.kernel.fn.__name__ for step in collected)
    # The entry in five ways, one of them as two launches, and twice in front of the spatial level; that is by itself in
    # three ways of its own and one of the library's.
    assert names == {"_entry_kernel": 6 + 2, "_spatial_kernel": 3 + 2, "_library_kernel": 1}
    monkeypatch.setattr(kernels.Block, "entry", mock.Mock(side_effect=ValueError("tiles")))
    collected.clear()
    assert kernels._decide(next(kernels.shapes(_context())), _context()) == []
    assert Counter(step.kernel.fn.__name__ for step in collected) == {"_spatial_kernel": 3, "_library_kernel": 1}


@pytest.mark.parametrize("widths", [WIDTHS["3a"], Widths(16, 8, (8, 8), (8, 16), 8)])
@pytest.mark.parametrize("level", ["entry", "spatial"])
def test_the_tiles_that_are_shown_are_the_launchs(level: str, widths: Widths, monkeypatch: pytest.MonkeyPatch) -> None:
    block, choose = kernels.Block(kernels.Shape("3a", widths, 1, 32, "fp16"), _context()), configs.choose
    asked: list[Any] = []
    monkeypatch.setattr(configs, "choose", lambda *key: asked.append(key) or choose(*key))
    configs.forget()
    getattr(block, level)()
    block.tiles(level, tuned=True)
    launched, shown = asked
    assert launched == shown


def test_plain_blocks_run_in_the_layouts_that_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    makers: dict[str, Any] = {}
    monkeypatch.setattr(blocks, "contest", lambda given, *args, **how: makers.update(given) or [])
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(blocks, "_forward", lambda net, x, truth: seen.extend((x, net.p2_2.weight)))
    blocks._block(next(kernels.shapes(_context())), "default", _context())
    for name, format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        makers[f"plain eager {name}"]()
        assert all(t.is_contiguous(memory_format=format) for t in seen)
        seen.clear()


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_networks_are_timed_from_the_textbooks_start(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    makers: dict[str, Any] = {}
    monkeypatch.setattr(networks, "contest", lambda given, *args, **how: makers.update(given) or [])
    networks._network(networks.Workload(mode, 2, 32), "eager", _context())
    fused = ["plain cudnn_convolution_relu eager channels_last"]  # has no backward
    assert [name for name in makers if "cudnn" in name] == fused * (mode == "inference")
    last = makers["FastInception eager channels_last"]().run.net[-1]
    assert 0 < last.weight.abs().max() <= (6 / (last.in_features + last.out_features)) ** 0.5  # Xavier's bound


def test_tests_run_on_the_device_and_only_names_are_asked_for_in_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``-m gpu`` they would run in the interpreter."""
    monkeypatch.setattr(checks, "_verdict", lambda name, command, *_: command)
    for dry in (False, True):
        command = checks._tests(Path("tests/test_gpu.py"), _context()._replace(dry=dry))
        assert " ".join(command).count("-m gpu") == 1
        assert ("--collect-only" in command) is dry


def test_a_sanitizer_does_not_run_in_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_verdict", lambda *_: pytest.fail("it ran"))
    for tool, said in ((None, "not available"), ("/bin/compute-sanitizer", "not run in a dry run")):
        monkeypatch.setattr(checks.shutil, "which", lambda name, tool=tool: tool)
        monkeypatch.setenv("CUDA_HOME", "/no/such/folder")
        assert checks._sanitize("memcheck", _context()) == [{"variant": "compute-sanitizer memcheck", "says": said}]


def test_a_program_that_fails_is_a_failed_row_with_the_end_of_what_it_said() -> None:
    said = "import sys; print('begin' + 5000 * '.'); print('\\x1b[31mred'); sys.exit(int(sys.argv[1]))"
    rows = [checks._verdict("it", [sys.executable, "-S", "-c", said, status])[0] for status in ("0", "3")]
    assert [row.get("failed") for row in rows] == [None, "status 3"]
    assert rows[0]["says"] == "red"
    assert rows[1]["says"].strip().endswith("red")
    assert "begin" not in rows[1]["says"]


@pytest.mark.parametrize(
    ("row", "done"),
    [
        ({"says": "table.json: 3 blocks; 33 are left, run again"}, False),
        ({"says": "table.json: 36 blocks; all done"}, True),
        ({"says": "no such option", "failed": "status 2"}, True),
    ],
)
def test_tuning_is_open_until_all_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: dict[str, Any], done: bool
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(checks, "_verdict", lambda name, command: given.append(command) or [row])
    context = _context()._replace(dry=False, output=tmp_path, deadline=time.monotonic() + 100.5)
    assert checks._tune(context) == ([row] if done else None)
    assert given[0][-4:-2] == ["--budget", "40"]
    assert Path(given[0][-1]).parent == tmp_path / "tuned"


def test_floors_of_launches_are_the_studys() -> None:
    """3a at 128x96x96, with the study's rates: 4.9 us for level 0, 5.7 for level 1."""
    block = kernels.Block.__new__(kernels.Block)
    block.shape, block.dtype = kernels.Shape("3a", WIDTHS["3a"], 128, 96), torch.bfloat16
    chip = CHIPS["h100"]._replace(half=798, memory=3.0)
    assert floor_us(block.work("entry"), chip, "bf16")[0] == pytest.approx(4.9, abs=0.05)
    assert floor_us(block.work("spatial"), chip, "bf16")[0] == pytest.approx(5.7, abs=0.05)
    assert block.work("block").flops == block.work("entry").flops + block.work("spatial").flops
    assert isinstance(block.work("block"), Work)


def test_ceilings_are_measured_and_rows_say_what_share_they_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PRODUCT", 16)
    monkeypatch.setattr(kernels, "COPIED", 1024)
    monkeypatch.setattr(kernels, "measure", lambda runs, timer, **how: {"": {"us": 1e-5}})
    before = torch.backends.cuda.matmul.fp32_precision
    context = _context()._replace(dry=False)
    # 2 * 16^3 operations and 2 * 1024 bytes in 10 ps: 819 TFLOP/s and 205 TB/s.
    assert kernels.ceilings(context) == (819.2, 819.2, 204.8)
    assert torch.backends.cuda.matmul.fp32_precision == before
    block = kernels.Block(next(kernels.shapes(_context())), _context())
    size, work = block.dtype.itemsize, block.work("spatial")
    assert work.floor_bytes == size * (2 * 16 * (8 + 8 + 8 + 8) + (9 + 25) * 64)
    assert work.flops == 2 * 2 * 16 * (9 + 25) * 64
    floor = work.flops / 819.2e6
    rows = kernels.beside_floor([{"variant": "a", "us": 4 * floor}, {"variant": "b"}], block, "spatial", context)
    assert rows[0]["bound"] == "products"
    assert rows[0]["of_floor"] == 0.25
    assert "of_floor" not in rows[1]
    assert kernels.beside_floor([{"variant": "a", "us": 1.0}], block, "spatial", _context()) == [
        {"variant": "a", "us": 1.0}
    ]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_compile_options_are_known_to_inductor(mode: str) -> None:
    usual, forced = (options["options"] for options in baselines.compilations(mode, dry=False).values())
    for options in (usual, forced):
        torch.compile(nn.Identity(), options=options)  # refuses what it does not know
    assert forced == usual | {"force_layout_optimization": True}
    assert bool(usual) == (mode != "default")


def test_baselines_compute_what_the_textbook_computes() -> None:
    torch.manual_seed(0)
    net, fused = GoogLeNet(), baselines.fused_googlenet()
    fused.load_state_dict(net.state_dict())
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), net(x))
        assert not [m for m in fused.modules() if isinstance(m, nn.ReLU) or type(m) is nn.Conv2d]
        block, linear = Inception(*WIDTHS["3a"]), baselines.LinearInception(*WIDTHS["3a"])
        linear.load_state_dict(block.state_dict())
        x = torch.randn(1, 192, 4, 4)
        p2, p3 = block.p2_2(block.p2_1(x)), block.p3_2(block.p3_1(x))
        expected = torch.cat((block.p1_1(x), p2, p3, block.p4_2(block.p4_1(x))), 1)
        torch.testing.assert_close(linear(x), expected)


def test_truncated_convolutions_read_tf32_forward_and_backward() -> None:
    """10 bits behind the point: 1.75 times the last of them counts as one; numbers of 10 bits pass as they are."""
    torch.manual_seed(0)
    bit = 2.0**-10
    conv = nn.Sequential(nn.Conv2d(1, 1, 1)).double()
    cut = baselines.truncated(conv)
    for net, kept in ((conv, 1.75), (cut, 1.0)):
        net[0].weight.data.fill_(-1 - 1.75 * bit)
        net[0].bias.data.fill_(1.75 * bit)
        x = torch.full((1, 1, 1, 1), 1 + 1.75 * bit, dtype=torch.float64, requires_grad=True)
        y = net(x)
        assert y.item() == -((1 + kept * bit) ** 2) + 1.75 * bit
        y.backward(torch.full_like(y, 1 + 1.75 * bit))
        assert x.grad.item() == -((1 + kept * bit) ** 2)
        assert net[0].weight.grad.item() == (1 + kept * bit) ** 2
        assert net[0].bias.grad.item() == 1 + 1.75 * bit

    net = Inception(*WIDTHS["3a"]).double()
    x = torch.randn(2, 192, 5, 5, dtype=torch.float64)
    error = (baselines.truncated(net)(x) - net(x)).norm() / net(x).norm()
    assert 2**-12 < error < 2**-9
    exact = net.bfloat16().double()
    x = x.bfloat16().double()
    torch.testing.assert_close(baselines.truncated(exact).p2_2(x[:, :96]), exact.p2_2(x[:, :96]), rtol=0, atol=0)
