"""Test that bench/compare.py refuses wrong numbers, times only what it says, and reports what it timed."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import compare, comparison, convolutions, engines, harness, record, report
from fastinception import FastInception, GoogLeNet, backends
from fastinception.reference import Inception
from tests.runs import write_idx

SCRIPT = Path(compare.__file__)
TINY = ["--synthetic", "--device", "cpu", "--batch-size", "2", "--image-size", "32"]
ROW_KEYS = {
    "variant",
    "mode",
    "dtype",
    "layout",
    "compiled",
    "examples_per_second",
    "spread",
    "ratio_to_plain",
    "ratio_to_best_plain",
    "outside_convolutions",
    "page_faults",
}
EAGER = ["plain eager NCHW", "plain eager channels_last", "FastInception eager"]


@pytest.fixture
def fast_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as little as possible, and nothing compiled."""
    short = {key: comparison.Schedule(warmup=0.0, rounds=1, seconds=0.0) for key in comparison.SCHEDULES}
    monkeypatch.setattr(comparison, "SCHEDULES", short)
    monkeypatch.setattr(harness, "MIN_SAMPLE", 0.0)
    monkeypatch.setattr(compare, "compile_failure", lambda device: "switched off by a test")
    monkeypatch.setattr(comparison, "MANY_FAULTS", 2**31)  # how many there are is the heap's choice


def _row(variant: str, speed: float, mode: str = "inference", dtype: str = "fp32") -> dict[str, Any]:
    return {
        "variant": variant,
        "mode": mode,
        "dtype": dtype,
        "layout": "channels_last",
        "compiled": False,
        "examples_per_second": speed,
        "spread": [speed, speed],
    }


def _strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_script_writes_what_it_measured(tmp_path: Path) -> None:
    # From another folder, as a program, and on a machine that cannot compile.
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")},
        "CXX": "there-is-no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--quick", "--mode", "both", "--dtype", "fp32", "bf16", "--json", "r.json", "--plot", "r.png"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = _strict(tmp_path / "r.json")
    assert set(result) == {"conditions", "rows"}
    about = result["conditions"]
    assert about["batch_size"] == 2
    assert about["image_size"] == 32
    assert about["quick"] is True
    assert about["threads"] == 1
    assert about["torch"] == torch.__version__
    assert about["device_type"] == "cpu"
    assert {"device", "driver", "triton", "python", "commit", "date", "spread"} <= set(about)
    assert "SYNTHETIC" in about["data"]
    assert "SYNTHETIC" in done.stdout
    assert any("no compiled rows" in note for note in about["notes"])
    assert about["engines"] == {}  # none runs in a quick comparison

    rows = result["rows"]
    groups = {(mode, dtype) for mode in ("inference", "training") for dtype in ("fp32", "bf16")}
    assert {(row["mode"], row["dtype"]) for row in rows} == groups
    for mode, dtype in groups:
        group = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
        assert [row["variant"] for row in group] == [*EAGER, report.FLOOR]
        assert [row["layout"] for row in group] == ["NCHW", *["channels_last"] * 3]
        speeds = [row["examples_per_second"] for row in group]
        for row, speed in zip(group, speeds, strict=True):
            assert set(row) == ROW_KEYS
            assert row["compiled"] is False
            low, high = row["spread"]
            assert 0 < low <= speed <= high < math.inf
            assert row["ratio_to_plain"] == speed / speeds[0]
            assert row["ratio_to_best_plain"] == speed / max(speeds[:2])
            assert row["outside_convolutions"] == 1 - speed / speeds[-1]
            # What the reader sees is what the file says.
            assert f"{speed:.1f}" in done.stdout
        assert f"agrees: {mode}, {dtype}, FastInception eager" in done.stdout
    assert report.LEGEND in done.stdout
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["r.json", "r.png"]


class _Swapped(Inception):
    """Branches 2 and 3 come out in the wrong order."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        widths = [conv.out_channels for conv in (self.p1_1, self.p2_2, self.p3_2, self.p4_2)]
        one, two, three, four = out.split(widths, dim=1)
        return torch.cat((one, three, two, four), dim=1)


class _NotANumber(Inception):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


class _NoBias(Inception):
    """One bias in 57 is forgotten."""

    def forward(self, x: Tensor) -> Tensor:
        if self.p1_1.in_channels == 192:
            nn.init.zeros_(self.p4_2.get_parameter("bias"))
        return super().forward(x)


class _WrongGradient(Inception):
    """The output is right; the gradient of one weight in each block is half of what it should be."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if out.requires_grad and not self.p2_2.weight._backward_hooks:
            self.p2_2.weight.register_hook(lambda grad: grad / 2)
        return out


class _LostGradient(Inception):
    def forward(self, x: Tensor) -> Tensor:
        self.p3_1.get_parameter("bias").requires_grad_(False)
        return super().forward(x)


@pytest.mark.usefixtures("fast_schedule")
@pytest.mark.parametrize(
    ("block", "mode", "dtype", "what"),
    [
        (_Swapped, "inference", "fp32", "output"),
        (_Swapped, "inference", "bf16", "output"),
        (_NotANumber, "inference", "fp32", "output"),
        (_NoBias, "inference", "fp32", "output"),
        (_WrongGradient, "training", "fp32", "gradient of 2.0.p2_2.weight"),
        (_WrongGradient, "training", "bf16", "gradient of 2.0.p2_2.weight"),
        (_LostGradient, "training", "fp32", "gradient of 2.0.p3_1.bias"),
    ],
)
def test_a_wrong_block_is_not_timed(
    block: type[Inception],
    mode: str,
    dtype: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(comparison.BLOCKS, "FastInception", block)
    result = tmp_path / "result.json"
    assert compare.main([*TINY, "--mode", mode, "--dtype", dtype, "--json", str(result)]) == 1
    printed = capsys.readouterr()
    assert f"FAILED: {mode}, {dtype}, FastInception eager: {what}" in printed.err
    assert "examples/s" not in printed.out
    assert not result.exists()


@pytest.mark.usefixtures("fast_schedule")
def test_compiled_variants_are_rows_and_the_better_rival_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compiled: list[dict[str, Any]] = []

    def fake_compile(net: nn.Module, **options: Any) -> nn.Module:
        compiled.append(options)
        return net

    pauses: list[float] = []
    wall_clock = comparison.wall_clock
    monkeypatch.setattr(comparison, "wall_clock", lambda sync, pause: pauses.append(pause) or wall_clock(sync, pause))
    monkeypatch.setattr(compare, "compile_failure", lambda device: None)
    monkeypatch.setattr(torch, "compile", fake_compile)
    result = tmp_path / "result.json"
    assert compare.main([*TINY, "--mode", "training", "--dtype", "fp32", "--json", str(result)]) == 0
    assert pauses == [comparison.PAUSE]  # a CPU's threads spin for a while
    assert comparison.PAUSE >= 0.02
    assert _strict(result)["conditions"]["complete"] is True
    rows = _strict(result)["rows"]
    assert [row["variant"] for row in rows] == [*EAGER, "plain compiled", "FastInception compiled", report.FLOOR]
    assert [row["compiled"] for row in rows] == [False, False, False, True, True, False]
    measured = [row["variant"] for row in rows if row.get("peak_bytes", 0) > row.get("saved_bytes", 0) > 0]
    assert measured == ["plain eager channels_last", "FastInception eager"]
    assert all(row["page_faults"] >= 0 for row in rows)
    assert [options.get("options") for options in compiled] == [
        None,
        {"force_layout_optimization": True},
        None,
    ]
    assert all(options["fullgraph"] for options in compiled)
    (note,) = _strict(result)["conditions"]["notes"]
    shown = [float(word) for word in note.split() if word.replace(".", "").isdigit()]
    assert len(shown) == 2
    assert f"{rows[3]['examples_per_second']:.1f}" == f"{max(shown):.1f}"


def test_engines_are_recorded_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"Pillow": ("PIL",), "None": ("no_such",), "In part": ("PIL", "no_such")}
    monkeypatch.setattr(engines, "ENGINES", {name: (needed, ("fp32",)) for name, needed in packages.items()})
    assert engines.versions() == {"Pillow": importlib.metadata.version("pillow")}
    assert (engines.available("fp32"), engines.available("bf16")) == (["Pillow"], [])


@pytest.mark.usefixtures("fast_schedule")
def test_what_fails_beside_the_comparison_is_a_note_and_what_was_measured_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def engine(*_: Any, **__: Any) -> None:
        raise ImportError("libopenvino.so: cannot open shared object file")

    fail = [subprocess.CalledProcessError(1, "python", stderr="Traceback\nno memory"), KeyboardInterrupt]
    monkeypatch.setattr(comparison.engines, "available", lambda dtype: ["OpenVINO"])
    monkeypatch.setattr(comparison, "Engine", engine)
    monkeypatch.setattr(comparison.memory, "in_fresh_process", mock.Mock(side_effect=fail))
    result = tmp_path / "result.json"
    assert compare.main([*TINY, "--mode", "both", "--dtype", "fp32", "--json", str(result)]) == 130
    kept = _strict(result)
    assert kept["conditions"]["complete"] is False
    assert [(row["variant"], row["mode"]) for row in kept["rows"]] == [(n, "inference") for n in (*EAGER, report.FLOOR)]
    assert "no row of OpenVINO, which fails here: ImportError: libopenvino.so" in kept["conditions"]["notes"][-1]
    printed = " ".join(capsys.readouterr().out.split())
    assert "no memory of plain eager channels_last: status 1, no memory" in printed


def test_ratios_take_the_best_of_all_plain_rows() -> None:
    speeds = {"plain eager NCHW": 10.0, "plain eager channels_last": 30.0, "plain compiled": 20.0}
    speeds |= {"FastInception compiled": 45.0, report.FLOOR: 50.0}
    found = report.with_ratios([_row(name, speed) for name, speed in speeds.items()])
    assert [row["ratio_to_plain"] for row in found] == [1.0, 3.0, 2.0, 4.5, 5.0]
    assert [row["ratio_to_best_plain"] for row in found] == [10 / 30, 1.0, 20 / 30, 1.5, 50 / 30]
    assert [row["outside_convolutions"] for row in found] == pytest.approx([0.8, 0.4, 0.6, 0.1, 0.0])


@pytest.mark.parametrize(("mode", "per_convolution"), [("inference", 1), ("training", 3)])
def test_the_convolutions_alone_are_all_of_them_and_nothing_else(
    mode: str, per_convolution: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its FLOPs are the network's own less the last layer's, and its only operators are convolutions."""
    images, net = torch.rand(2, 1, 32, 32), GoogLeNet()
    alone = convolutions.Convolutions(net, images, mode=mode, dtype="fp32")
    called: list[Any] = []
    convolve = nn.functional.conv2d

    def watch(x: Tensor, weight: Tensor, bias: Tensor, *settings: Any) -> Tensor:
        called.append((x.shape, weight.shape, bias.shape, *settings[:2]))
        return convolve(x, weight, bias, *settings)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "conv2d", watch)
        net(images)
        alone()
    assert called[:57] == called[57:]
    with FlopCounterMode(display=False) as counter:
        loss = net(images).sum()
        if mode == "training":
            loss.backward()
    linear = per_convolution * 2 * 2 * 1024 * 10
    expected = counter.get_total_flops() - linear
    with FlopCounterMode(display=False) as counter:
        alone()
    assert counter.get_total_flops() == expected > 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        alone()
    ran = {event.name.removeprefix("aten::") for event in profile.events()}
    assert ran & {"mkldnn_convolution", "convolution"}
    others = {"relu", "clamp_min", "max_pool2d", "max_pool2d_with_indices", "cat", "add", "add_", "sum"}
    assert ran & others == set()


@pytest.mark.parametrize("least", [0, 2 * 8 * 8, None])
def test_the_convolutions_alone_run_in_the_dtype_and_layout_of_the_rows(
    least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 where the CPU is slower in the dtype, from so many pixels on, as FastInception does."""
    monkeypatch.setattr(backends, "_WIDENED", {} if least is None else {torch.bfloat16: least})
    alone = convolutions.Convolutions(GoogLeNet(), torch.rand(2, 1, 32, 32), mode="training", dtype="bf16")
    assert len(alone.calls) == 3 + 9 * 6
    for _, x, weight, bias, grad in alone.calls:
        widened = least is not None and x.shape[0] * x.shape[2] * x.shape[3] >= least
        assert {t.dtype for t in (x, weight, bias, grad)} == {torch.float32 if widened else torch.bfloat16}
        assert all(t.stride(1) == 1 for t in (x, weight, grad))  # also where one channel leaves the layout open


@pytest.mark.usefixtures("fast_schedule")
def test_many_page_faults_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults = itertools.cycle([5, 1234, 7, 8])
    monkeypatch.setattr(comparison, "MANY_FAULTS", 1000)
    monkeypatch.setattr(comparison, "page_faults", lambda run: next(faults))
    monkeypatch.setattr(comparison.engines, "available", lambda dtype: [])
    result = tmp_path / "result.json"
    assert compare.main([*TINY, "--mode", "inference", "--dtype", "fp32", "--json", str(result)]) == 0
    kept = _strict(result)
    assert [row["page_faults"] for row in kept["rows"]] == [5, 1234, 7, 8]
    assert kept["conditions"]["notes"][-1].endswith("(the others had few): plain eager channels_last 1,234")


def test_the_cross_precision_line_names_both_precisions_and_its_rows() -> None:
    rows = [
        _row("plain eager NCHW", 10.0),
        _row("plain eager NCHW", 20.0, dtype="bf16"),
        _row("FastInception compiled", 30.0),
        _row("FastInception compiled", 70.0, dtype="bf16"),
        _row("FastInception compiled", 900.0, dtype="bf16", mode="training"),
    ]
    line = report.cross_precision("inference", rows)
    assert line is not None
    for words in ("cross-precision", "bf16", "fp32", "7.00x"):
        assert words in line
    assert report.cross_precision("training", rows) is None


def test_precisions_are_compared_in_each_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {"inference": 30.0, "training": 50.0}
    rows = [_row(report.BASE, 10.0, mode) for mode in speeds]
    rows += [_row("FastInception compiled", speed, mode, "bf16") for mode, speed in speeds.items()]
    monkeypatch.setattr(compare, "run", lambda *_: rows)
    assert compare.main(TINY) == 0
    found = [line.split(" in fp32: ") for line in capsys.readouterr().out.splitlines() if "cross-precision" in line]
    assert [(line.split()[1], ratio.split()[0]) for line, ratio in found] == [
        ("inference:", "3.00x"),
        ("training:", "5.00x"),
    ]


def test_a_table_shows_half_the_distance_of_the_quartiles_and_memory_under_its_name() -> None:
    row = _row(report.BASE, 50.0) | {"spread": [40.0, 60.0], "saved_bytes": 2_000_000, "peak_bytes": 7_000_000}
    (shown,) = report.with_ratios([row, _row(report.FLOOR, 100.0)])[:1]
    view = report.table("training, fp32", [shown])
    cells = {str(column.header): next(iter(column.cells)) for column in view.columns}
    assert (cells["spread"], cells["outside\nconvs"]) == ("+-20.0%", "50%")
    assert (cells["saved\nMB"], cells["peak\nMB"]) == ("2", "7")


def test_a_cpu_that_emulates_bf16_measures_it_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for least, usual in ((512, ["fp32", "bf16"]), (0, ["fp32"])):
        monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: least})
        assert compare.parse(["--device", "cpu"]).dtype == usual
        assert compare.parse(["--device", "cpu", "--dtype", "bf16", "fp32", "bf16"]).dtype == ["bf16", "fp32"]
    notes = []
    monkeypatch.setattr(compare, "compile_failure", lambda device: None)
    monkeypatch.setattr(compare, "Comparison", lambda *args: mock.Mock(note=notes.append, group=lambda *_: []))
    for options in ([], ["--dtype", "bf16"], ["--dtype", "fp32"]):
        notes.append(options)
        compare.run(compare.parse(["--device", "cpu", *options]), mock.Mock(), mock.MagicMock(), mock.Mock())
    assert len(notes) == 5
    assert "no bf16 rows" in notes[1]
    assert "slower in bf16" in notes[3]
    notes.clear()
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 256})
    compare.run(compare.parse(["--device", "cpu"]), mock.Mock(), mock.MagicMock(), mock.Mock())
    assert len(notes) == 1
    assert "slower in bf16" in notes[0]


def test_a_batch_has_64_images_or_half_as_many_if_it_is_to_be_quick() -> None:
    found = [compare.parse([*TINY[:3], *o]).batch_size for o in ([], ["--quick"], ["--quick", "--batch-size", "5"])]
    assert found == [64, 32, 5]


def test_a_quick_run_leaves_out_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison.engines, "available", lambda dtype: ["OpenVINO"])

    def names(mode: str, device: str) -> list[str]:
        return [v.name for v in comparison.variants(mode, "fp32", torch.device(device), True, True)]

    assert names("inference", "cpu") == [*EAGER, "plain compiled", "FastInception compiled", report.FLOOR]
    assert names("training", "cpu") == [*EAGER, report.FLOOR]
    tunings = [name for name in names("training", "cuda") if name.split()[-1] in ("reduce-overhead", "max-autotune")]
    assert tunings == ["plain reduce-overhead", "FastInception reduce-overhead"]


def test_a_gpu_run_has_every_compile_mode_and_cuda_graph_of_both() -> None:
    names = [v.name for v in comparison.variants("inference", "bf16", torch.device("cuda"), True, False)]
    assert names[0] == "plain eager NCHW"
    for way in ("eager", "compiled", "max-autotune", "reduce-overhead", "CUDA graph"):
        for block in ("plain", "FastInception"):
            assert any(name.startswith(f"{block} {way}") for name in names)


def test_a_cpu_run_has_frozen_graphs_and_the_engines_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison.engines, "available", lambda dtype: ["OpenVINO"] if dtype == "bf16" else [])
    for dtype in ("fp32", "bf16"):
        names = [v.name for v in comparison.variants("inference", dtype, torch.device("cpu"), True, False)]
        assert {"plain compiled, frozen", "FastInception compiled, frozen"} <= set(names)
        assert ("OpenVINO" in names) == (dtype == "bf16")
    training = [v.name for v in comparison.variants("training", "bf16", torch.device("cpu"), True, False)]
    assert not any("frozen" in name or name == "OpenVINO" for name in training)


def test_what_is_called_frozen_is() -> None:
    cpu, display = torch.device("cpu"), report.Display(Console(quiet=True))
    batch = harness.Batch(torch.rand(2, 1, 32, 32), torch.arange(2), "random")
    compared = comparison.Comparison([], batch, cpu, True, False, display)
    for variant in comparison.variants("inference", "fp32", cpu, True, False):
        if not variant.engine:
            runner = compared._runner(variant, nn.Conv2d(1, 4, 3), "inference", "fp32")
            assert runner.freezing is variant.name.endswith("frozen")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_is_run_as_it_says(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = harness.Batch(torch.rand(2, 1, 32, 32), torch.arange(2), "random")
    display = report.Display(Console(quiet=True))
    compared = comparison.Comparison([], batch, torch.device("cpu"), True, False, display)
    monkeypatch.setattr(comparison, "Runner", lambda *args, **options: options)
    for variant in comparison.variants("training", "bf16", torch.device(device), True, False):
        given: Any = compared._runner(variant, nn.Conv2d(1, 4, 3), "training", "bf16")
        said = {name: getattr(variant, name) for name in ("layout", "compile_options", "freezing", "cuda_graph")}
        assert given == said | {"mode": "training", "dtype": "bf16"}


def test_what_is_timed_starts_from_the_textbooks_weights() -> None:
    batch = harness.Batch(torch.rand(2, 1, 32, 32), torch.arange(2), "random")
    display = report.Display(Console(quiet=True))
    compared = comparison.Comparison(["inference"], batch, torch.device("cpu"), False, False, display)
    chosen = [comparison.Variant(report.BASE, "plain"), comparison.Variant("FastInception eager", "FastInception")]
    for runner in compared._prepare("", chosen, "inference", "fp32").values():
        torch.testing.assert_close(runner.net.state_dict(), compared.weights.timing, rtol=0, atol=0)


@pytest.mark.usefixtures("fast_schedule")
def test_training_that_ends_in_nan_is_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [comparison.Variant(name, "plain") for name in (report.BASE, report.FLOOR)]
    monkeypatch.setattr(comparison, "variants", lambda *_: chosen)
    monkeypatch.setattr(comparison.Comparison, "_memory", lambda *_: {})
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: self.param_groups[0]["params"][-1].data.fill_(math.nan))
    assert compare.main([*TINY, "--mode", "training", "--dtype", "fp32"]) == 1
    assert f"FAILED: training, fp32: {report.BASE} left NaN or infinity" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(comparison.engines.ENGINES))
def test_an_engine_computes_what_the_network_computes(name: str) -> None:
    if name not in comparison.engines.available("fp32"):
        pytest.skip(f"{name} is not installed")
    net, images = GoogLeNet(), torch.rand(2, 1, 32, 32)
    engine = comparison.Engine(name, net, images, dtype="fp32")
    engine()
    torch.testing.assert_close(engine.evaluate(), net(images).detach(), rtol=1e-3, atol=1e-4)


def test_engines_are_asked_for_the_rows_dtype_and_torchs_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino, onnxruntime = pytest.importorskip("openvino"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    net, images, asked = nn.Conv2d(1, 2, 3), torch.rand(2, 1, 8, 8), []
    compiled, session = openvino.Core.compile_model, onnxruntime.InferenceSession

    def watch_compilation(self: Any, model: Any, device: str, hints: dict[str, Any]) -> Any:
        asked.append((hints["INFERENCE_PRECISION_HINT"], hints["INFERENCE_NUM_THREADS"]))
        return compiled(self, model, device, hints)

    def watch_session(file: bytes, options: Any, **settings: Any) -> Any:
        asked.append(("fp32", options.intra_op_num_threads))
        return session(file, options, **settings)

    monkeypatch.setattr(openvino.Core, "compile_model", watch_compilation)
    monkeypatch.setattr(onnxruntime, "InferenceSession", watch_session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for name, (_, dtypes) in engines.ENGINES.items():
        for dtype in dtypes:
            engines.Engine(name, net, images, dtype=dtype)
    assert asked == [("f32", 3), ("bf16", 3), ("fp32", 3)]


def _write_test_split(folder: Path, count: int) -> np.ndarray[Any, Any]:
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return images


def test_the_batch_is_the_first_test_images_as_floats(tmp_path: Path) -> None:
    images = _write_test_split(tmp_path, 5)
    batch = harness.load_batch(3, 28, torch.device("cpu"), synthetic=False, data_root=tmp_path)
    assert torch.equal(batch.images, torch.from_numpy(images[:3, None]).float() / 255)
    assert batch.labels.tolist() == [0, 1, 2]
    assert str(tmp_path) in batch.source


@pytest.mark.parametrize("images", [0, 3])
def test_missing_data_is_an_error_and_not_replaced(
    images: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if images:
        _write_test_split(tmp_path, images)
    assert compare.main(["--device", "cpu", "--batch-size", "4", "--data-root", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert ("there are only 3" if images else str(tmp_path)) in printed.err
    assert printed.out == ""


def test_json_is_strict_and_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    record.write_json({"rows": [1]}, path)
    with pytest.raises(ValueError, match="JSON"):
        record.write_json({"rows": [math.nan]}, path)
    assert _strict(path) == {"rows": [1]}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.write_json({"rows": [2]}, path)
    assert _strict(path) == {"rows": [1]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.usefixtures("fast_schedule")
def test_a_disk_that_fills_up_stops_no_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "write_json", full)
    monkeypatch.setattr(compare, "plot", full)
    files = ["--json", str(tmp_path / "result.json"), "--plot", str(tmp_path / "result.png")]
    assert compare.main([*TINY, "--mode", "inference", "--dtype", "fp32", *files]) == 1
    out, errors = capsys.readouterr()
    assert "FastInception eager" in out
    for path in files[1::2]:
        assert f"FAILED: {path} cannot be written: [Errno 28] No space left on device" in errors


def test_a_batch_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device says so by a class of its own, a CPU by a RuntimeError that is none of ours."""
    on_a_device = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    for run, said in ((on_a_device, "CUDA out of memory"), (lambda *_: torch.empty(1 << 45), "")):
        monkeypatch.setattr(compare, "run", run)
        assert compare.main(TINY) == 1
        assert f"FAILED: --batch-size 2 does not fit: {said}" in capsys.readouterr().err
    monkeypatch.setattr(compare, "run", mock.Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        compare.main(TINY)


@pytest.mark.usefixtures("fast_schedule")
@pytest.mark.parametrize("full", [[True, True], [True, False], [False, True]])
def test_a_file_that_was_written_at_last_holds_all(
    full: list[bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    times = iter(full)

    def write(*_: Any) -> None:
        if next(times):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "write_json", write)
    monkeypatch.setattr(compare.Comparison, "group", lambda self, mode, dtype: [_row("plain", 1.0, mode, dtype)])
    result = tmp_path / "result.json"
    status = compare.main([*TINY, "--mode", "both", "--dtype", "fp32", "--json", str(result)])
    assert list(times) == []
    assert (status, "cannot be written" in capsys.readouterr().err) == (int(full[-1]), full[-1])


def test_json_through_a_link_or_into_a_pipe_leaves_both_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, file, pipe = (tmp_path / name for name in ("link.json", "r.json", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    os.mkfifo(pipe)
    record.check_writable(link)
    record.write_json({"rows": [1]}, link)
    assert link.is_symlink()
    assert _strict(file) == {"rows": [1]}
    with monkeypatch.context() as patch:  # nobody reads the pipe yet: to open it would wait for ever
        patch.setattr(Path, "open", lambda self, *_: pytest.fail(f"{self} was opened"))
        record.check_writable(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        record.write_json({"rows": [2]}, pipe)
        assert json.loads(os.read(reader, 4096)) == {"rows": [2]}
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.json", "pipe", "r.json"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux's list of what a processor knows")
def test_the_record_says_which_wide_instructions_the_processor_has() -> None:
    known = Path("/proc/cpuinfo").read_text().split()
    expected = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known]
    assert record.conditions(torch.device("cpu"))["cpu_flags"] == expected


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may write, root neither")
def test_a_folder_in_which_nobody_may_write_is_found_at_once() -> None:
    with pytest.raises(ValueError, match=r"/proc/r\.json cannot be written: "):
        record.check_writable(Path("/proc/r.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:1"], "--device cuda:1: PyTorch sees 1 CUDA devices"),
        (["--device", "toaster"], "must be cpu, cuda, cuda:N or auto"),
        (["--device", "meta"], "must be cpu, cuda, cuda:N or auto"),
        (["--batch-size", "0"], "--batch-size: must be a whole number, at least 1, got '0'"),
        (["--dtype", "fp8"], "fp8"),
        (["--json", "no/such/folder/r.json"], "there is no folder"),
        (["--json", str(Path(__file__).parent)], "is a folder"),
        (["--plot", "no/such/folder/r.png"], "there is no folder"),
        (["--plot", "r.pdf"], ".png"),
        (["--plot", "r.png"], "matplotlib, which says: Key backend"),
        (["--synthetic", "--data-root", "."], "exclude each other"),
    ],
)
def test_a_bad_option_ends_with_status_2_before_any_work(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    def unknown(name: str) -> None:
        raise ValueError("Key backend: 'inline' is not a valid value")

    monkeypatch.setattr(compare, "load_batch", work)
    monkeypatch.setattr(compare.importlib, "import_module", unknown)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as stop:
        compare.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "message"), [("triton", "=triton cannot run here: "), ("cudnn", "got 'cudnn'")])
def test_a_backend_that_cannot_be_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str, message: str
) -> None:
    monkeypatch.setenv("FASTINCEPTION_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit) as stop:
        compare.main([*TINY, "--device", "cpu"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_fast_side_is_fastinception() -> None:
    assert comparison.BLOCKS["plain"] is Inception
    assert comparison.BLOCKS["FastInception"] is FastInception
