"""bench/tune.py: what it picks, what it drops, what it keeps, and a dry run as a whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from bench import trial, tune
from bench.report import Display
from fastinception import FastInception, GoogLeNet, Inception
from fastinception.googlenet import WIDTHS
from fastinception.kernels import configs, target

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")
GPU = target.Gpu("cpu", "cpu")
H100 = target.Gpu("NVIDIA H100 80GB HBM3", "sm_90")
ENTRY: tune.Key = ("entry", 1000, 192, 176, torch.bfloat16, GPU)
SPATIAL: tune.Key = ("spatial", 1000, 864, 128, torch.bfloat16, GPU)
UNIT = trial.Shape("3a", trial.Widths(192, 64, (96, 128), (16, 32), 32), 1, 96, "bf16")
CPU = torch.device("cpu")


@pytest.mark.parametrize("image_size", [32, 96, 100, 224, 299])
def test_blocks_are_tuned_at_the_sizes_that_the_network_has(image_size):
    """Also where a side is odd: its half is rounded upwards."""
    net, found = GoogLeNet().to("meta"), []
    for module in net.modules():
        if isinstance(module, Inception):
            module.register_forward_hook(lambda block, args, out: found.append(tuple(args[0].shape[2:])))
    net(torch.empty(1, 1, image_size, image_size, device="meta"))
    shapes = [trial.Shape(block, widths, 1, image_size) for block, widths in WIDTHS.items()]
    assert [(shape.side, shape.side) for shape in shapes] == found


def test_what_the_stem_launches_is_tuned_too(monkeypatch):
    """Else a whole table would have no entry near it, and warn."""
    asked, choose = [], configs.choose
    monkeypatch.setattr(configs, "choose", lambda *key: asked.append(key) or choose(*key))
    run = trial.Shape("3a", WIDTHS["3a"], 1, 32, "fp16").passes(CPU)["stem"]
    configs.forget()
    asked.clear()
    (out,) = run()
    assert out.count_nonzero() > 0
    (tuned,) = asked
    configs.forget()
    asked.clear()
    net = GoogLeNet(lambda *widths: FastInception(*widths, backend="triton")).half().eval()
    with torch.no_grad():
        net[:2].to(memory_format=torch.channels_last)(torch.rand(1, 1, 32, 32).half())
    assert asked == [tuned]


class FakeTimer:
    """Give a choice the time that ``cost`` says, without running anything."""

    unit = "us"

    def __init__(self, cost: Any, tuner: tune.Tuner) -> None:
        self.cost, self.tuner = cost, tuner

    def cold(self, run: Any, calls: int) -> list[float]:
        return [1e-6 * sum(self.cost(key, self.tuner.choose(*key)) for key in list(self.tuner.asked))]


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Build a tuner of a fake block whose kernels are ``keys``; ``run`` is called where it runs."""

    def build(cost: Any = lambda key, tiles: 1.0, keys: Any = (ENTRY, SPATIAL), run: Any = None) -> tune.Tuner:
        progress = {"conditions": {}, "measured": {}, "entries": {}}
        tuner = tune.Tuner(tmp_path / "p", progress, CPU, time.monotonic() + 60, Display(Console(quiet=True)))
        tuner.timer = FakeTimer(cost, tuner)

        def fake() -> list[torch.Tensor]:
            tiles = {key[0]: tuner.choose(*key) for key in keys}
            return [torch.ones(3)] if run is None else run(tiles)

        monkeypatch.setattr(trial.Shape, "passes", lambda self, device: {"forward": fake})
        return tuner

    return build


def tiles_of(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["kernel"]: entry["tiles"] for entry in entries}


def test_the_fastest_of_each_step_is_taken(make):
    def cost(key: tune.Key, tiles: configs.Tiles) -> float:
        if key == SPATIAL:
            return 10 - 5 * tiles.library - 2 * (tiles.block_m == 32)
        parts = (tiles.block_n, tiles.num_warps) == (256, 16), tiles.pool == (32, 128, 64), not tiles.interleaved
        return 10 - 3 * parts[0] - 2 * parts[1] - parts[2]

    found = tiles_of(make(cost).tune(UNIT, None))
    assert [found["entry"][name] for name in ("block_m", "block_n", "num_stages", "num_warps")] == [128, 256, 3, 16]
    assert found["entry"]["pool"] == (32, 128, 64)
    assert found["entry"]["interleaved"] is False
    assert (found["spatial"]["library"], found["spatial"]["block_m"]) == (True, 32)
    assert not found["entry"]["launch_pdl"]


def test_weight_gradients_by_the_library_are_a_choice(make):
    key = ("weight_gradient", 224, 25088, 1008, *SPATIAL[4:])
    tuner = make(lambda key, tiles: 10 - tiles.library - (tiles.num_warps == 16), keys=[key])
    (found,) = tiles_of(tuner.tune(UNIT, None)).values()
    assert (found["library"], found["num_warps"]) == (True, 16)


def test_a_choice_within_the_noise_is_not_taken(make):
    default = configs.DEFAULTS["spatial"](torch.bfloat16, "cpu")
    fast = make(lambda key, tiles: 1.0 if tiles == default else 0.985, keys=[SPATIAL])
    assert tiles_of(fast.tune(UNIT, None))["spatial"] == asdict(default)
    assert not any("together" in name for name in fast.progress["measured"])


def test_what_is_faster_alone_and_not_together_is_not_taken(make):
    tuner = make()
    tuner.timer.cost = lambda key, tiles: 0.9 if len(tuner.choice) == 1 else 1.0
    found = tiles_of(tuner.tune(UNIT, 1))
    assert any("together" in name for name in tuner.progress["measured"])
    assert found == {key[0]: asdict(tune.default(key)) for key in (ENTRY, SPATIAL)}


@pytest.mark.parametrize(("saving", "taken"), [(0.1, True), (0.01, False)])
def test_an_early_launch_is_for_all_kernels_or_for_none(make, saving, taken):
    keys = [(*ENTRY[:5], H100), (*SPATIAL[:5], H100)]
    tuner = make(lambda key, tiles: 1.0 - saving * tiles.launch_pdl, keys=keys)
    assert [entry["tiles"]["launch_pdl"] for entry in tuner.tune(UNIT, 1)] == [taken, taken]


def test_an_early_launch_is_held_against_the_best_tiles_and_only_where_the_chip_has_it(make):
    for gpu, saving in ((H100, 0.0), (GPU, 0.5)):
        tuner = make(
            lambda key, tiles, saving=saving: 1 - 0.3 * tiles.library - saving * tiles.launch_pdl,
            keys=[(*SPATIAL[:5], gpu)],
        )
        (entry,) = tuner.tune(UNIT, 1)
        assert (entry["tiles"]["library"], entry["tiles"]["launch_pdl"]) == (True, False)


def test_float32_gets_rows_of_as_many_bytes():
    depths = [
        {change["block_k"] for change in tune.variations("data_gradient", dtype)[0]}
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    assert depths == [{64}, {64}, {32}]


def test_a_pools_tile_follows_where_tiles_get_lower():
    tiles = configs.Tiles(128, 128, 64, 8, 3, pool=(128, 128, 32))
    assert tune.vary(tiles, {"block_m": 64}).pool == (64, 128, 32)
    assert tune.vary(tiles, {"block_m": 256}).pool == (128, 128, 32)
    assert tune.vary(tiles, {"block_m": 64, "pool": (128, 128, 32)}) is None


def test_a_table_is_made_of_the_shapes_that_launches_ask_for(make, tmp_path):
    entry, spatial = make().tune(UNIT, 1)
    assert (entry["rows"], entry["reduction"], entry["columns"], entry["dtype"]) == (1000, 192, 176, "bfloat16")
    table = {"conditions": dict.fromkeys(configs.CONDITIONS, "") | {"device": "cpu"}, "entries": [entry, spatial]}
    (tmp_path / "cpu.json").write_text(json.dumps(table))
    read = configs.read_table(tmp_path / "cpu.json")
    assert [(*line[:1], *line[2:5], line.dtype) for line in read] == [ENTRY[:5], SPATIAL[:5]]
    assert [line.tiles for line in read] == [tune.default(ENTRY), tune.default(SPATIAL)]


def test_candidates_that_narrow_to_the_same_are_measured_once(make):
    key: tune.Key = ("spatial", 1000, 400, 16, torch.bfloat16, GPU)
    tuner = make(keys=[key])
    tuner.tune(UNIT, None)
    measured = [configs.Tiles(**json.loads(name.split("spatial ")[1])) for name in tuner.progress["measured"]]
    assert len(measured) > 5
    assert len({tune.narrowed(tiles, key) for tiles in measured}) == len(measured)


def failing(error: Exception) -> Any:
    def run(tiles: dict[str, configs.Tiles]) -> list[torch.Tensor]:
        if tiles["spatial"].num_stages != 3:
            raise error
        return [torch.ones(3)]

    return run


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (failing(OutOfResources(300000, 232448, "shared memory")), "OutOfResources: out of resource: shared memory"),
        (failing(RuntimeError("PassManager::run failed")), "RuntimeError: PassManager::run failed"),
        (lambda tiles: [torch.ones(3) * (1 + (tiles["spatial"].num_stages != 3) * 0.01)], "result 0 is off by 1.0e-02"),
        (lambda tiles: [torch.ones(3) / (tiles["spatial"].num_stages == 3)], "result 0 is off by inf"),
        (
            lambda tiles: [torch.ones(3) if tiles["spatial"].num_stages == 3 else torch.empty(3)],
            "result 0 is off by nan",
        ),
        (lambda tiles: [torch.full((9,), tiles["spatial"].num_stages, dtype=torch.uint8)], "result 0 is off by 1.0e"),
    ],
)
def test_what_fails_or_computes_something_else_is_dropped(make, run, reason):
    tuner = make(lambda key, tiles: 1.0 if tiles.num_stages == 3 else 0.1, run=run)
    best = tiles_of(tuner.tune(UNIT, None))["spatial"]
    assert best["num_stages"] == 3
    dropped = [row["dropped"] for row in tuner.progress["measured"].values() if "dropped" in row]
    assert dropped
    assert all(reason in words for words in dropped)


def test_what_spills_more_than_the_defaults_is_dropped(make, monkeypatch):
    class Kernel:
        @property
        def n_spills(self) -> int:
            return 12 if all(tiles.num_warps == 8 for tiles in tuner.choice.values()) else 20

    tuner = make(lambda key, tiles: 1.0 if tiles.num_warps == 8 and tiles.num_stages == 3 else 0.1, keys=[SPATIAL])
    monkeypatch.setattr(tune, "launched", lambda: contextlib.nullcontext([Kernel()]))
    assert tiles_of(tuner.tune(UNIT, None))["spatial"]["num_warps"] == 8
    for name, row in tuner.progress["measured"].items():
        assert row.get("dropped") == (None if '"num_warps": 8' in name else "spills 20 registers, the defaults 12")


def test_spills_are_those_of_what_is_launched_and_not_of_what_is_compiled_ahead(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda self, name, *, warmup: name)
    with trial.launched() as kernels:
        for name in ("ahead", "launched"):
            JITFunction.run(mock.Mock(), name, warmup=name == "ahead")
    assert kernels == ["launched"]


def test_poison_is_for_one_run_alone():
    (found,) = trial.poisoned(lambda: [torch.empty(3)])
    assert found.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_small_differences_agree():
    half = torch.randn(1000, dtype=torch.float16)
    assert trial.disagreement([half * (1 + 2**-10)], [half]) is None
    assert trial.disagreement([torch.empty(0)], [torch.empty(0)]) is None
    bits = torch.zeros(1000, dtype=torch.uint8)
    assert trial.disagreement([(torch.arange(1000) < 40).byte()], [bits]) is None
    assert "result 1" in (trial.disagreement([half, (torch.arange(1000) < 60).byte()], [half, bits]) or "")


# The command


needs_interpreter = pytest.mark.skipif(not target.interpreted(), reason="a dry run switches the interpreter on")


@needs_interpreter
def test_a_dry_run_and_going_on_after_an_interrupt(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    table = tmp_path / "cpu.json"
    command = ["--dry-run", "--dtype", "bf16", "--output", str(table)]
    measured: list[str] = []
    original = tune.Tuner.compare

    def interrupted(self: tune.Tuner, name: str, *rest: Any) -> float:
        if len(measured) == 3:
            raise KeyboardInterrupt
        ratio = original(self, name, *rest)
        measured[:] = self.progress["measured"]
        return ratio

    monkeypatch.setattr(tune.Tuner, "compare", interrupted)
    assert tune.main(command) == 130
    assert "keeps what was measured, run again to go on" in " ".join(capsys.readouterr().out.split())
    assert not table.exists()
    progress = Path(f"{table}.progress")
    first = json.loads(progress.read_text())["measured"]
    assert len(first) == 3
    monkeypatch.setattr(tune.Tuner, "compare", original)
    assert tune.main(command) == 0
    second = json.loads(progress.read_text())["measured"]
    assert len(second) > len(first)
    assert {name: second[name] for name in first} == first  # not measured again
    entries = configs.read_table(table)
    assert [entry.kernel for entry in entries][:4] == ["entry", "spatial", "entry_train", "spatial_train"]
    assert {entry.dtype for entry in entries} == {torch.float16}
    # No row has a figure that could be taken for a time.
    assert {name for row in second.values() for name in row} == {"dry", "default_dry"}
    assert json.loads(table.read_text())["conditions"]["dry_run"] is True
    assert "all done" in capsys.readouterr().out
    # Finished: nothing is run at all.
    monkeypatch.setattr(trial.Shape, "passes", None)
    content = table.read_text()
    assert tune.main(command) == 0
    assert table.read_text() == content


@pytest.fixture
def fake_block(monkeypatch):
    """Let a dry run's block be nothing but the question for one kernel's tiles."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def passes(self: trial.Shape, device: torch.device) -> dict[str, Any]:
        return {"forward": lambda: [torch.ones(configs.choose(*SPATIAL).num_stages // 99 + 1)]}

    monkeypatch.setattr(trial.Shape, "passes", passes)


def test_a_spent_budget_is_said_and_is_no_error(fake_block, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    output = ["--output", str(tmp_path / "cpu.json")]
    assert tune.main(["--dry-run", "--budget", "1e-9", *output]) == 0
    assert "0 blocks; 1 are left, run again" in capsys.readouterr().out
    assert not torch.backends.cudnn.benchmark  # as it was
    assert tune.main(["--dry-run", *output]) == 0
    assert "1 blocks; all done" in capsys.readouterr().out


def test_a_disk_that_fills_up_is_said(fake_block, tmp_path, monkeypatch, capsys):
    def full(content, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tune, "write_json", full)
    assert tune.main(["--dry-run", "--output", str(tmp_path / "cpu.json")]) == 1
    file = tmp_path / "cpu.json.progress"
    assert f"FAILED: [Errno 28] No space left on device: '{file}'; what was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is damaged, delete it"),
        ("{", "is damaged, delete it"),
        ('{"conditions": {"device": "cpu"}, "measured": {}, "entries": {}}', "is damaged, delete it.*driver"),
        ('{"conditions": {}, "entries": {}}', "is damaged, delete it.*measured"),
    ],
)
def test_damaged_progress_is_refused(fake_block, tmp_path, capsys, content, message):
    (tmp_path / "cpu.json.progress").write_text(content)
    refused(["--dry-run", "--output", str(tmp_path / "cpu.json")], message, capsys)


def test_a_table_is_of_the_commit_that_it_makes_dirty(fake_block, tmp_path, monkeypatch, capsys):
    about = tune.conditions(CPU)
    for state in ("", "-dirty"):
        monkeypatch.setattr(tune, "conditions", lambda device, state=state: about | {"commit": f"0123456789ab{state}"})
        assert tune.main(["--dry-run", "--output", str(tmp_path / "cpu.json")]) == 0
    assert json.loads((tmp_path / "cpu.json").read_text())["conditions"]["commit"] == "0123456789ab"


@pytest.mark.parametrize("what", ["device", "driver", "torch", "triton", "commit"])
def test_progress_of_other_conditions_is_refused(fake_block, tmp_path, capsys, what):
    output = ["--dry-run", "--output", str(tmp_path / "cpu.json")]
    tune.main(output)
    path = tmp_path / "cpu.json.progress"
    progress = json.loads(path.read_text())
    progress["conditions"][what] = "other"
    path.write_text(json.dumps(progress))
    refused(output, f"was measured with {what} other, not", capsys)


def test_a_table_without_its_progress_is_not_overwritten(fake_block, tmp_path, capsys):
    (tmp_path / "cpu.json").write_text("{}")
    refused(["--dry-run", "--output", str(tmp_path / "cpu.json")], "cpu.json.progress does not", capsys)
    assert (tmp_path / "cpu.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "--budget must be a positive number of seconds, got 0"),
        (["--budget", "nan"], "--budget must be a positive"),
        (["--shape", "128"], "BATCHxSIZE.*got '128'"),
        (["--shape", "0x96"], "BATCHxSIZE.*got '0x96'"),
        (["--shape", "8x31"], "at least 32 pixels, got '8x31'"),
        (["--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["--dry-run"], "needs an --output outside"),
        (["--dry-run", "--output", "no/such/table.json"], "no/such/table.json: there is no folder"),
        (["--dry-run", "--output", str(configs.TUNED / "cpu.json")], "needs an --output outside"),
    ],
)
def test_bad_arguments_are_named(monkeypatch, arguments, message, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused(arguments, message, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_no_gpu_is_an_error(capsys):
    refused([], "PyTorch sees no GPU here", capsys)


def refused(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said


def test_a_missing_triton_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    refused(["--dry-run", "--output", str(tmp_path / "cpu.json")], "Triton is not installed", capsys)


def test_a_pass_is_in_the_table_before_its_block_is_finished(make, tmp_path, monkeypatch):
    tuner = make()
    tuner.table = tmp_path / "table.json"
    forward = UNIT.passes(CPU)["forward"]

    def too_late() -> list[torch.Tensor]:
        raise tune.OutOfTime

    monkeypatch.setattr(trial.Shape, "passes", lambda self, device: {"forward": forward, "backward": too_late})
    with pytest.raises(tune.OutOfTime):
        tuner.tune(UNIT, None)
    entries = json.loads(tuner.table.read_text())["entries"]
    assert {entry["kernel"] for entry in entries} == {"entry", "spatial"}
    monkeypatch.setattr(trial.Shape, "passes", lambda self, device: {"forward": too_late})
    assert json.loads(json.dumps(tuner.tune(UNIT, None))) == entries  # not run again


def test_a_choice_that_ends_the_program_is_not_tried_again(make, monkeypatch):
    tuner = make()
    choice = {SPATIAL: configs.Tiles(32, 32, 16, 4, 1)}

    def ends(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(tuner, "_measure", ends)
        with pytest.raises(SystemExit):
            tuner.compare("block", list, choice, {})
    assert json.loads(tuner.path.read_text())["measured"] == tuner.progress["measured"]
    assert tuner.compare("block", list, choice, {}) == float("inf")


def test_a_measurement_that_is_interrupted_is_made_again(make, monkeypatch):
    tuner, choice = make(), {SPATIAL: configs.Tiles(32, 32, 16, 4, 1)}
    tuner.expected = [torch.ones(3)]
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuner.compare("block", list, choice, {})
    assert json.loads(tuner.path.read_text())["measured"] == {}


def test_a_time_is_the_median_of_its_samples(make):
    tuner = make()
    tuner.expected = [torch.ones(3)]
    times = itertools.cycle([[2e-6, 3e-6, 9e-6], [1e-6, 2e-6, 50e-6]])
    tuner.timer = mock.Mock(unit="us", cold=lambda run, calls: next(times))
    assert tuner.compare("block", lambda: [torch.ones(3)], {SPATIAL: configs.Tiles(32, 32, 16, 4, 1)}, {}) == 2 / 3
    assert [*tuner.progress["measured"].values()] == [{"us": 2.0, "default_us": 3.0}]


def test_no_sample_holds_the_planning_of_a_new_choice(make):
    """A choice empties the caches of launches: what runs first behind it plans them again."""
    tuner = make()
    tuner.expected = [torch.ones(3)]
    events: list[str] = []

    def run() -> list[torch.Tensor]:
        events.append("run")
        return [torch.ones(3)]

    class Noted(FakeTimer):
        def cold(self, run: Any, calls: int) -> list[float]:
            events.append("timed")
            return [1.0]

    tuner.timer = Noted(None, tuner)
    assert tuner.compare("block", run, {SPATIAL: configs.Tiles(32, 32, 16, 4, 1)}, {}) == 1
    assert events.count("timed") == 2 * tune.ROUNDS
    assert all(before == "run" for before, event in itertools.pairwise(events) if event == "timed")
