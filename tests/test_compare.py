"""The command bench/compare.py: what it takes, writes and refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import compare, report
from fastinception import backends
from tests import comparisons
from tests.comparisons import EAGER, TINY, row_of, strict, write_test_split

SCRIPT = Path(compare.__file__)
ROW_KEYS = {"variant", "mode", "dtype", "layout", "compiled", "examples_per_second", "spread", "page_faults"}
ROW_KEYS |= {"ratio_to_plain", "ratio_to_best_plain", "outside_convolutions"}

fast_schedule = comparisons.fast_schedule


def test_the_script_writes_what_it_measured(tmp_path: Path) -> None:
    # From another folder, as a program, and on a machine that cannot compile.
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")},
        "CXX": "there-is-no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--quick", "--mode", "both", "--dtype", "fp32", "bf16", "--json", "r.json", "--plot", "r.png"]
    command = [sys.executable, str(SCRIPT), *TINY, *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = strict(tmp_path / "r.json")
    assert set(result) == {"conditions", "rows"}
    about = result["conditions"]
    expected = {"batch_size": 2, "image_size": 32, "quick": True, "threads": 1, "device_type": "cpu"}
    assert {name: about[name] for name in (*expected, "torch")} == expected | {"torch": torch.__version__}
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


def test_a_batch_has_64_images_or_half_as_many_if_it_is_to_be_quick() -> None:
    found = [compare.parse([*TINY[:3], *o]).batch_size for o in ([], ["--quick"], ["--quick", "--batch-size", "5"])]
    assert found == [64, 32, 5]


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


def test_precisions_are_compared_in_each_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {"inference": 30.0, "training": 50.0}
    rows = [row_of(report.BASE, 10.0, mode) for mode in speeds]
    rows += [row_of("FastInception compiled", speed, mode, "bf16") for mode, speed in speeds.items()]
    monkeypatch.setattr(compare, "run", lambda *_: rows)
    assert compare.main(TINY) == 0
    found = [line.split(" in fp32: ") for line in capsys.readouterr().out.splitlines() if "cross-precision" in line]
    shown = [(line.split()[1], ratio.split()[0]) for line, ratio in found]
    assert shown == [("inference:", "3.00x"), ("training:", "5.00x")]


@pytest.mark.parametrize("images", [0, 3])
def test_missing_data_is_an_error_and_not_replaced(
    images: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if images:
        write_test_split(tmp_path, images)
    assert compare.main(["--device", "cpu", "--batch-size", "4", "--data-root", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert ("there are only 3" if images else str(tmp_path)) in printed.err
    assert printed.out == ""


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
    monkeypatch.setattr(compare.Comparison, "group", lambda self, mode, dtype: [row_of("plain", 1.0, mode, dtype)])
    result = tmp_path / "result.json"
    status = compare.main([*TINY, "--mode", "both", "--dtype", "fp32", "--json", str(result)])
    assert list(times) == []
    assert (status, "cannot be written" in capsys.readouterr().err) == (int(full[-1]), full[-1])


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
