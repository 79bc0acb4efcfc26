"""Test that bench/gpu_suite.py runs as a whole, resumes, records what fails, and labels a dry run as one."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from bench import gpu_suite
from bench.agreement import Errors
from bench.gpu import baselines, model, report, timing
from bench.gpu.case import Candidate, Case, Context, contest
from bench.roofline import CHIPS, Work, floor_us
from fastinception import GoogLeNet, Inception
from fastinception.googlenet import WIDTHS
from fastinception.kernels import configs

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run needs the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, under the interpreter
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
]


def _strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every part, in this process, which is faster."""
    folder = tmp_path_factory.mktemp("dry")
    with mock.patch.object(configs, "TUNED", configs.TUNED):
        assert gpu_suite.main(["--dry-run", "--in-process", "--output", str(folder), "--budget", "600"]) == 0
        assert folder / "tuned" == configs.TUNED
    configs.choose.cache_clear()
    return folder


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(gpu_suite, "run_in_processes", refuse)


def test_every_part_is_there_right_and_labelled(dry: Path) -> None:
    for part in gpu_suite.PARTS:
        content = _strict(dry / f"{part}.json")
        assert content["finished"] is True
        assert content["running"] is None
        about = content["conditions"]
        assert about["dry"] is True
        assert {"device", "driver", "torch", "triton", "commit", "date"} <= set(about)
        # No figure of a dry run may be taken for a GPU's.
        assert not {"us", "examples_per_second", "of_floor", "floor_us", "model_us"} & _keys(content)
        rows = [row for case in content["cases"].values() for row in case["rows"]]
        assert not [row for row in rows if "failed" in row]
        if part not in ("environment", "tests", "sanitizer", "tuning"):
            for row in rows:
                assert row.get("dry_us", 0) > 0 or "says" in row
                assert row.get("error", 0) < 0.05
    variants = {row["variant"] for row in _strict(dry / "decisive.json")["cases"]["tiny at 2x32x32"]["rows"]}
    assert {
        "entry, pool and GEMM apart",
        "entry, separate tile order",
        "entry, 256x128 tiles",
        "spatial, library and epilogue",
        "spatial, 256x128 tiles",
        "two launches, dependent launch",
    } <= variants
    assert len(_strict(dry / "networks.json")["cases"]) == 2


def test_a_second_call_skips_what_is_finished_and_gathers_it(
    dry: Path, no_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in dry.glob("*.json")}
    assert gpu_suite.main(["--dry-run", "--output", str(dry)]) == 0
    for part in gpu_suite.PARTS:
        assert (dry / f"{part}.json").read_bytes() == before[f"{part}.json"]
    result = _strict(dry / "results.json")
    assert list(result["parts"]) == list(gpu_suite.PARTS)
    assert {row["family"] for row in result["comparison"]} == {"blocks", "networks"}
    assert (dry / "results.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for part, content in result["parts"].items():
        assert f"{part} (DRY RUN on a CPU: no figure of a GPU)" in shown or not content["cases"]
    assert "dry_us" in shown


def test_the_script_runs_parts_in_processes_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, gpu_suite.__file__, "--dry-run", "--output", "out", "--only", "environment"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert _strict(tmp_path / "out" / "environment.json")["finished"] is True
    assert set(_strict(tmp_path / "out" / "results.json")["parts"]) == {"environment"}


# A suite of its own: one part with cases that end their process, one in which nothing works, one behind them.
BROKEN = """
    import os, sys, time
    sys.path.insert(0, {root!r})
    from bench import gpu_suite
    from bench.gpu.case import Case

    def raises():
        raise RuntimeError("this case raises")

    def fine():
        return [{{"variant": "plain", "dry_us": 1.0}}]

    def row():
        return [{{"variant": "plain", "failed": "OutOfMemoryError: too large"}}]

    gpu_suite.LIMIT = 0.5
    gpu_suite.COMMAND = (sys.executable, __file__)
    gpu_suite.PARTS = {{
        "mixed": lambda context: [
            Case("row", row), Case("raises", raises), Case("hangs", lambda: time.sleep(60), 0.1), Case("fine", fine)
        ],
        "dead": lambda context: [Case(f"dies {{i}}", lambda: os._exit(7)) for i in range(4)],
        "good": lambda context: [Case("fine", fine)],
    }}
    if __name__ == "__main__":
        sys.exit(gpu_suite.main(sys.argv[1:]))
"""


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(textwrap.dedent(BROKEN.format(root=str(gpu_suite.ROOT))))
    command = [sys.executable, str(script), "--dry-run", "--output", str(tmp_path / "out")]
    for again in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 1
        assert "FAILED: mixed, row, plain: OutOfMemoryError: too large" in done.stderr
        assert "FAILED: mixed, raises: RuntimeError: this case raises" in done.stderr
        mixed, dead, good = (_strict(tmp_path / "out" / f"{part}.json") for part in ("mixed", "dead", "good"))
        assert list(mixed["cases"]) == ["row", "raises", "hangs", "fine"], again
        assert mixed["finished"] is True
        assert mixed["cases"]["fine"]["rows"] == [{"variant": "plain", "dry_us": 1.0}]
        assert "Timeout" in mixed["cases"]["hangs"]["error"]
        assert "time.sleep" in mixed["cases"]["hangs"]["error"] or "broken.py" in mixed["cases"]["hangs"]["error"]
        assert list(dead["cases"]) == ["dies 0", "dies 1", "dies 2"]
        assert "status 7" in dead["cases"]["dies 0"]["error"]
        assert "given_up" in dead
        assert good["finished"] is True


def test_a_budget_that_is_spent_starts_nothing_and_says_so(
    tmp_path: Path, no_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_suite.main(["--dry-run", "--output", str(tmp_path / "out"), "--budget", "1e-9"]) == 3
    assert "run the command again" in capsys.readouterr().out


def test_a_case_that_the_budget_may_not_hold_is_left_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def cases(context: Context) -> list[Case]:
        return [Case(name, lambda name=name: calls.append(name) or [], need) for name, need in (("a", 1), ("b", 99))]

    monkeypatch.setattr(gpu_suite, "PARTS", {"some": cases})
    device = torch.device("cpu")
    record = gpu_suite.Record("some", tmp_path, {})
    for seconds in (50.0, 150.0):
        # Not dry, where no case needs time; no case here touches a device.
        deadline = gpu_suite.time.monotonic() + seconds
        gpu_suite.run_part("some", Context(device, False, timing.HostTimer(device), tmp_path, deadline), record)
        if seconds == 50.0:
            assert calls == ["a"]
            assert _strict(record.path)["finished"] is False
    assert calls == ["a", "b"]
    assert _strict(record.path)["finished"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--output", str(gpu_suite.ROOT / "bench" / "results" / "h100")], "bench/results"),
        (["--output", "x"], "sees no GPU"),
        (["--dry-run", "--output", "x", "--budget", "0"], "--budget must be a positive number"),
        (["--dry-run", "--output", "x", "--only", "all"], "invalid choice: 'all'"),
        (["--dry-run", "--output", __file__], "is not a folder"),
        (["--dry-run"], "--output"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_results_of_another_commit_are_not_mixed_in(
    tmp_path: Path, no_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_suite.main(["--dry-run", "--output", str(tmp_path), "--budget", "1e-9"])
    record = gpu_suite.Record("tests", tmp_path, gpu_suite.conditions(torch.device("cpu")) | {"dry": True})
    record.write(conditions=record.content["conditions"] | {"commit": "0123456789ab"})
    assert gpu_suite.main(["--dry-run", "--output", str(tmp_path)]) == 2
    assert "tests.json was made with commit '0123456789ab'" in capsys.readouterr().err


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

    makers = {
        "early": maker("early", 0.0),
        "plain": maker("plain", 1e-3),
        "right": maker("right", 1.9e-3),
        "wrong": maker("wrong", 2.1e-3),
        "nan": maker("nan", float("nan")),
        "large": fails,
    }
    rows = {row["variant"]: row for row in contest(makers, _context(), cold=True)}
    assert list(rows) == list(makers)
    assert {name for name, row in rows.items() if "dry_us" in row} == {"plain", "right"} == set(runs)
    assert "no plain variant" in rows["early"]["failed"]
    assert "wrong: output is off by 2.10e-03" in rows["wrong"]["failed"]
    assert "nan" in rows["nan"]["failed"]
    assert rows["large"]["failed"] == "OutOfMemoryError: too large"


def test_a_lost_device_ends_the_contest() -> None:
    def fails() -> Candidate:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        contest({"plain": fails}, _context(_NoTimer()), cold=True)


class _Event:
    """An event of a GPU that is slow to start: the host is ahead from the second head start on."""

    asked = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def query(self) -> bool:
        _Event.asked += 1
        return _Event.asked == 1

    def elapsed_time(self, end: _Event) -> float:
        return 0.25


def test_events_are_milliseconds_and_the_host_gets_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    timer = timing.EventTimer.__new__(timing.EventTimer)
    timer.sync, timer.other, timer.head_start = lambda: None, torch.zeros(1), timing.HEAD_START
    calls: list[int] = []
    assert timer.cold(lambda: calls.append(1), 1000) == [0.25e-3] * timing.COLD_CALLS
    assert slept == [timing.HEAD_START, 2 * timing.HEAD_START]
    assert len(calls) == 2 * timing.COLD_CALLS
    assert timer.stream(lambda: None, 5) == [0.05e-3]
    assert timing.summary([1e-6, 2e-6, 3e-6, 4e-6, 5e-6], "us") == {"us": 3, "quartiles_us": [2, 4], "samples": 5}


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


def test_floors_of_launches_are_the_studys() -> None:
    """3a at 128x96x96, with the study's rates: 4.9 us for level 0, 5.7 for level 1."""
    from bench.gpu.kernels import Block, Shape

    block = Block.__new__(Block)
    block.shape, block.dtype = Shape("3a", WIDTHS["3a"], 128, 96, 12), torch.bfloat16
    chip = CHIPS["h100"]._replace(half=798, memory=3.0)
    assert floor_us(block.work("entry"), chip, "bf16")[0] == pytest.approx(4.9, abs=0.05)
    assert floor_us(block.work("spatial"), chip, "bf16")[0] == pytest.approx(5.7, abs=0.05)
    assert block.work("block").flops == block.work("entry").flops + block.work("spatial").flops
    assert isinstance(block.work("block"), Work)


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
