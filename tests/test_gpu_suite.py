"""Test that bench/gpu_suite.py runs as a whole, resumes, records what fails, and labels a dry run as one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu_suite
from bench.gpu import report, timing
from bench.gpu.case import Case, Context
from bench.gpu.model import modelled
from tests import fresh

pytestmark = [
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
    before = torch.backends.cudnn.benchmark
    assert gpu_suite.main(["--dry-run", "--in-process", "--output", str(folder), "--budget", "600"]) == 0
    torch.backends.cudnn.benchmark = before
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

    def variants_of(part: str) -> set[str]:
        return {row["variant"] for row in _strict(dry / f"{part}.json")["cases"]["tiny at 2x32x32"]["rows"]}

    variants = variants_of("decisive")
    # Each figure of the model has something measured to stand beside.
    assert set(modelled("3b", 256, 224, 256 * 28 * 28)) <= variants | variants_of("blocks")
    assert {
        "entry, pool and GEMM apart",
        "entry, separate tile order",
        "entry, 256x128 tiles",
        "spatial, library and epilogue",
        "spatial, 256x128 tiles",
        "two launches, dependent launch",
    } <= variants
    assert {"entry", "spatial"} <= variants_of("kernels")
    assert len(_strict(dry / "networks.json")["cases"]) == 2
    profiled = {row["variant"]: row for row in _strict(dry / "profile.json")["cases"]["training 2x32x32"]["rows"]}
    assert profiled["plain: aten::convolution_backward"]["calls"] == 57  # of one step
    for case in _strict(dry / "networks.json")["cases"].values():
        for row in case["rows"]:
            assert row["dry_examples_per_second"] == pytest.approx(2e6 / row["dry_us"], rel=1e-2)
    assert profiled["FastInception: aten::convolution_backward"]["dry_us"] > 0
    for name in ("inference", "training"):
        assert {f"{name}, launch 1: _entry_kernel", f"{name}, launch 2: _spatial_kernel"} <= variants_of("passes")


def test_a_second_call_skips_what_is_finished_and_gathers_it(
    dry: Path, no_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in dry.glob("*.json")}
    assert gpu_suite.main(["--dry-run", "--output", str(dry)]) == 0
    for part in gpu_suite.PARTS:
        assert (dry / f"{part}.json").read_bytes() == before[f"{part}.json"]
    result = _strict(dry / "results.json")
    assert list(result["parts"]) == list(gpu_suite.PARTS)
    assert {row["family"] for row in result["comparison"]} == {"blocks", "kernelbench", "networks"}
    assert (dry / "results.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for part, content in result["parts"].items():
        assert f"{part} (DRY RUN on a CPU: no figure of a GPU)" in shown or not content["cases"]
    assert "dry_us" in shown
    assert f"all that was measured: {dry / 'results.json'}, with results.png beside it\n" in shown


def test_the_script_runs_parts_in_processes_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, gpu_suite.__file__, "--dry-run", "--output", "out", "--only", "environment"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert _strict(tmp_path / "out" / "environment.json")["finished"] is True
    assert set(_strict(tmp_path / "out" / "results.json")["parts"]) == {"environment"}


# A suite of its own: one part with cases that end their process, one in which nothing works, one behind them.
BROKEN = """
import os, sys, time
from bench import gpu_suite
from bench.gpu.case import Case

def raises():
    print(9999 * ".")
    raise RuntimeError("this case raises [/not markup]")

def hangs():
    time.sleep(60)

def fine():
    return [{"variant": "plain", "dry_us": 1.0}]

def row():
    return [{"variant": "plain", "failed": "OutOfMemoryError: too large"}]

gpu_suite.PARTS = {
    "mixed": lambda context: [
        Case("row", row), Case("raises", raises), Case("hangs", hangs, limit=0.5), Case("fine", fine)
    ],
    "dead": lambda context: [Case(f"dies {i}", lambda: os._exit(7)) for i in range(4)],
    "good": lambda context: [Case("fine", fine)],
}
sys.exit(gpu_suite.main(sys.argv[1:]))
"""


class Forked:
    """Run a suite of broken cases where the command starts a process, without the seconds that PyTorch takes."""

    def __init__(self, command: list[str], stdout: IO[str], stderr: int, start_new_session: bool) -> None:
        log = Path(stdout.name)
        assert command[: len(gpu_suite.COMMAND)] == [*gpu_suite.COMMAND]
        assert start_new_session
        self.process = fresh.start(BROKEN, log, log, command[len(gpu_suite.COMMAND) :], PYTHONPATH=str(fresh.ROOT))
        self.pid = self.process.pid

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("broken cases", timeout)
        return self.process.exitcode


def test_what_fails_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The command in this process, which is faster, and the parts in theirs.
    monkeypatch.setattr(gpu_suite, "subprocess", mock.Mock(wraps=subprocess, Popen=Forked))
    monkeypatch.setattr(gpu_suite, "PARTS", dict.fromkeys(("mixed", "dead", "good")))
    for again in (False, True):
        assert gpu_suite.main(["--dry-run", "--output", str(tmp_path / "out")]) == 1
        errors = capsys.readouterr().err
        assert "FAILED: mixed, row, plain: OutOfMemoryError: too large" in errors
        assert "FAILED: mixed, raises: status 1: RuntimeError: this case raises [/not markup]" in errors
        mixed, dead, good = (_strict(tmp_path / "out" / f"{part}.json") for part in ("mixed", "dead", "good"))
        assert list(mixed["cases"]) == ["row", "raises", "hangs", "fine"], again
        assert mixed["finished"] is True
        assert mixed["cases"]["fine"]["rows"] == [{"variant": "plain", "dry_us": 1.0}]
        assert "Timeout" in mixed["cases"]["hangs"]["error"]
        assert "in hangs" in mixed["cases"]["hangs"]["error"]  # where it was
        assert list(dead["cases"]) == ["dies 0", "dies 1", "dies 2"]
        assert dead["cases"]["dies 0"]["status"] == 7
        assert "given_up" in dead
        assert good["finished"] is True


def test_all_that_competes_is_compared() -> None:
    competing = {part for part in gpu_suite.PARTS if part.startswith(("blocks", "networks", "kernelbench"))}
    assert {part for parts in report.FAMILIES.values() for part in parts} == competing


def test_no_case_ends_the_process_behind_its_own_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What watches a case exits in the middle of whatever runs then. The library searches, as in compare.py."""
    events: list[Any] = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(gpu_suite.faulthandler, "dump_traceback_later", lambda limit, **_: events.append(limit))
    monkeypatch.setattr(gpu_suite.faulthandler, "cancel_dump_traceback_later", lambda: events.append("end"))
    case = Case("one", lambda: events.append(torch.backends.cudnn.benchmark) or [], limit=7.0)
    monkeypatch.setattr(gpu_suite, "PARTS", {"some": lambda context: [case]})
    assert gpu_suite.main(["--dry-run", "--in-process", "--output", str(tmp_path)]) == 0
    assert events == [7.0, True, "end"]


def test_a_full_disk_is_said_and_the_case_that_it_kept_from_its_record_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    kept = gpu_suite.write_json
    ran: list[str] = []

    def write(*given: Any) -> None:
        if len(ran) == 2:
            raise full
        kept(*given)

    cases = [Case(name, lambda name=name: ran.append(name) or [{"variant": name, "dry_us": 1.0}]) for name in "ab"]
    monkeypatch.setattr(gpu_suite, "PARTS", {"some": lambda context: cases})
    path, options = tmp_path / "some.json", ["--dry-run", "--output", str(tmp_path)]
    # Room for the first case; as the part's own process, and as the command that started it.
    with monkeypatch.context() as patch:
        patch.setattr(gpu_suite, "write_json", write)
        assert gpu_suite.main([*options, "--in-process"]) == gpu_suite.FULL
        process = mock.Mock(pid=2**31 - 1, wait=lambda timeout: gpu_suite.FULL)
        patch.setattr(gpu_suite, "subprocess", mock.Mock(wraps=subprocess, Popen=lambda command, **_: process))
        patch.setattr(gpu_suite.os, "killpg", lambda *group: None)
        assert gpu_suite.main(options) == gpu_suite.FULL
    child, command = capsys.readouterr().err.splitlines()
    assert child == f"FAILED: {path} cannot be written: No space left on device; what was recorded before is kept"
    assert command.startswith(f"FAILED: {path} cannot be written, as {tmp_path / 'some.log'} says")
    assert (list(_strict(path)["cases"]), ran) == (["a"], ["a", "b"])
    assert gpu_suite.main([*options, "--in-process"]) == 0
    assert (list(_strict(path)["cases"]), ran) == (["a", "b"], ["a", "b", "b"])
    monkeypatch.setattr(report, "write_json", mock.Mock(side_effect=full))
    assert gpu_suite.main(options) == gpu_suite.FULL
    assert f"{tmp_path / 'results.json'} cannot be written: No space left" in capsys.readouterr().err


class Overdue:
    """A part's process that has recorded a failed row, and runs on when the budget ends."""

    pid = 2**31 - 1
    waited = 0.0

    def __init__(self, command: list[str], **_: Any) -> None:
        about = gpu_suite.conditions(torch.device("cpu")) | {"dry": True, "cudnn_benchmark": True}
        record = gpu_suite.Record("slow", Path(command[command.index("--output") + 1]), about)
        failed = {"rows": [{"variant": "plain", "failed": "too large"}], "seconds": 1.0}
        record.write(cases={"first": failed}, running="second")

    def wait(self, timeout: float) -> int:
        Overdue.waited = timeout
        raise subprocess.TimeoutExpired("a slow case", timeout)


def test_what_a_part_recorded_before_the_budget_ended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = mock.Mock(wraps=subprocess, Popen=Overdue, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_suite, "subprocess", started)
    monkeypatch.setattr(gpu_suite, "PARTS", {"slow": None})
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(gpu_suite.os, "killpg", lambda *group: ended.append(group))
    assert gpu_suite.main(["--dry-run", "--output", str(tmp_path / "out")]) == 1
    assert "FAILED: slow, first, plain: too large" in capsys.readouterr().err
    assert ended == [(Overdue.pid, signal.SIGKILL)]  # what it started ends with it
    assert 0 < Overdue.waited < gpu_suite.BUDGET  # for what is left of it


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


def test_a_case_that_was_too_short_of_time_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([None, None, [{"variant": "a"}]])
    monkeypatch.setattr(gpu_suite, "PARTS", {"some": lambda context: [Case("long", lambda: next(results))]})
    record = gpu_suite.Record("some", tmp_path, {})
    device = torch.device("cpu")
    for finished in (False, False, True):
        gpu_suite.run_part("some", Context(device, True, timing.HostTimer(device), tmp_path, float("inf")), record)
        content = _strict(record.path)
        assert (content["finished"], content["running"], list(content["cases"])) == (
            finished,
            None,
            ["long"] * finished,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--budget", "1e-9", "--output", str(gpu_suite.ROOT / "bench/results/h100")], "bench/results"),
        (["--output", "x"], "sees no GPU"),
        (["--dry-run", "--output", "x", "--budget", "0"], "--budget must be a positive number"),
        (["--dry-run", "--output", "x", "--budget", "nan"], "--budget must be a positive number"),
        (["--dry-run", "--output", "x", "--only", "all"], "invalid choice: 'all'"),
        (["--dry-run", "--output", __file__], "is not a folder"),
        (["--dry-run", "--budget", "1e-9", "--output", ""], "--output: the name of a folder was expected"),
        (["--dry-run", "--output", f"{__file__}/x"], "Not a directory"),
        (["--dry-run"], "--output"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_triton_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(["--dry-run", "--output", str(tmp_path)])
    assert ended.value.code == 2
    assert "Triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["device", "torch", "triton", "commit", "dry"])
def test_results_of_other_conditions_are_not_mixed_in(
    tmp_path: Path, no_process: None, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    gpu_suite.main(["--dry-run", "--output", str(tmp_path), "--budget", "1e-9"])
    record = gpu_suite.Record("tests", tmp_path, gpu_suite.conditions(torch.device("cpu")) | {"dry": True})
    record.write(conditions=record.content["conditions"] | {what: "another"})
    assert gpu_suite.main(["--dry-run", "--output", str(tmp_path)]) == 2
    assert f"tests.json was made with {what} 'another'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"), [('{"part"', "Expecting"), ("{}", "it lacks cases, "), ("3", "iterable")]
)
def test_a_damaged_part_is_named(
    tmp_path: Path, no_process: None, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    (tmp_path / "tests.json").write_text(content)
    assert gpu_suite.main(["--dry-run", "--output", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'tests.json'} is damaged, delete it to measure its part anew: " in told
    assert reason in told
    assert (tmp_path / "tests.json").read_text() == content
