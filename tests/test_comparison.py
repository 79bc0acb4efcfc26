"""What stands beside what: which variants a comparison has, how each runs, and that no wrong one is timed."""

from __future__ import annotations

import itertools
import math
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bench import compare, comparison, harness, report
from fastinception import FastInception
from fastinception.reference import Inception
from tests import comparisons
from tests.comparisons import EAGER, TINY, strict

fast_schedule = comparisons.fast_schedule


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
def test_training_that_ends_in_nan_is_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [comparison.Variant(name, "plain") for name in (report.BASE, report.FLOOR)]
    monkeypatch.setattr(comparison, "variants", lambda *_: chosen)
    monkeypatch.setattr(comparison.Comparison, "_memory", lambda *_: {})
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: self.param_groups[0]["params"][-1].data.fill_(math.nan))
    assert compare.main([*TINY, "--mode", "training", "--dtype", "fp32"]) == 1
    assert f"FAILED: training, fp32: {report.BASE} left NaN or infinity" in capsys.readouterr().err


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
    assert strict(result)["conditions"]["complete"] is True
    rows = strict(result)["rows"]
    assert [row["variant"] for row in rows] == [*EAGER, "plain compiled", "FastInception compiled", report.FLOOR]
    assert [row["compiled"] for row in rows] == [False, False, False, True, True, False]
    measured = [row["variant"] for row in rows if row.get("peak_bytes", 0) > row.get("saved_bytes", 0) > 0]
    assert measured == ["plain eager channels_last", "FastInception eager"]
    assert all(row["page_faults"] >= 0 for row in rows)
    assert [options.get("options") for options in compiled] == [None, {"force_layout_optimization": True}, None]
    assert all(options["fullgraph"] for options in compiled)
    (note,) = strict(result)["conditions"]["notes"]
    shown = [float(word) for word in note.split() if word.replace(".", "").isdigit()]
    assert len(shown) == 2
    assert f"{rows[3]['examples_per_second']:.1f}" == f"{max(shown):.1f}"


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
    kept = strict(result)
    assert kept["conditions"]["complete"] is False
    assert [(row["variant"], row["mode"]) for row in kept["rows"]] == [(n, "inference") for n in (*EAGER, report.FLOOR)]
    assert "no row of OpenVINO, which fails here: ImportError: libopenvino.so" in kept["conditions"]["notes"][-1]
    printed = " ".join(capsys.readouterr().out.split())
    assert "no memory of plain eager channels_last: status 1, no memory" in printed


@pytest.mark.usefixtures("fast_schedule")
def test_many_page_faults_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults = itertools.cycle([5, 1234, 7, 8])
    monkeypatch.setattr(comparison, "MANY_FAULTS", 1000)
    monkeypatch.setattr(comparison, "page_faults", lambda run: next(faults))
    result = tmp_path / "result.json"
    assert compare.main([*TINY, "--mode", "inference", "--dtype", "fp32", "--json", str(result)]) == 0
    kept = strict(result)
    assert [row["page_faults"] for row in kept["rows"]] == [5, 1234, 7, 8]
    assert kept["conditions"]["notes"][-1].endswith("(the others had few): plain eager channels_last 1,234")


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


def _compared(*modes: str) -> comparison.Comparison:
    batch = harness.Batch(torch.rand(2, 1, 32, 32), torch.arange(2), "random")
    return comparison.Comparison([*modes], batch, torch.device("cpu"), True, False, report.Display(Console(quiet=True)))


def test_the_fast_side_is_fastinception() -> None:
    assert comparison.BLOCKS["plain"] is Inception
    assert comparison.BLOCKS["FastInception"] is FastInception


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_row_is_run_as_it_says(mode: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a frozen graph is what is called one."""
    monkeypatch.setattr(comparison.engines, "available", lambda dtype: [])
    monkeypatch.setattr(comparison, "Runner", lambda *args, **options: options)
    compared = _compared()
    for variant in comparison.variants(mode, "bf16", torch.device(device), True, False):
        given: Any = compared._runner(variant, nn.Conv2d(1, 4, 3), mode, "bf16")
        said = {name: getattr(variant, name) for name in ("layout", "compile_options", "cuda_graph")}
        assert given == said | {"mode": mode, "dtype": "bf16", "freezing": variant.name.endswith("frozen")}


def test_what_is_timed_starts_from_the_textbooks_weights() -> None:
    compared = _compared("inference")
    chosen = [comparison.Variant(report.BASE, "plain"), comparison.Variant("FastInception eager", "FastInception")]
    for runner in compared._prepare("", chosen, "inference", "fp32").values():
        torch.testing.assert_close(runner.net.state_dict(), compared.weights.timing, rtol=0, atol=0)
