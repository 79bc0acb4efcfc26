"""Nothing is lost of a training run: to a crash, a signal, a full disk, a damaged checkpoint or another run."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastinception import GoogLeNet, checkpoint, train, trainer
from tests import runs
from tests.runs import (
    BATCH,
    EPOCHS,
    FILES,
    IMAGES,
    OPTIONS,
    ROOT,
    STEPS,
    TEST_IMAGES,
    assert_same_run,
    at_step,
    metrics,
    position,
    weights,
    write_idx,
)

as_in_a_process_of_its_own = runs.as_in_a_process_of_its_own
command, finished, images = runs.command, runs.finished, runs.images


class Killed(BaseException):
    """Ends a run where it is raised, as kill -9 would: nothing cleans up after it."""


# What ends a run


def test_kill_9_in_mid_epoch_then_resume(images, command, finished, tmp_path):
    folder = tmp_path / "run"
    options = ["--data-root", str(images), "--output", str(folder), "--epochs", str(EPOCHS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastinception.train", *OPTIONS, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # other threads, other sums
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline, seen = time.monotonic() + 60, set()
        # A new file for each checkpoint; the third follows the second step.
        while len(seen) < 3 and process.poll() is None and time.monotonic() < deadline:
            if (current := folder / "checkpoint.pt").exists():
                seen.add(current.stat().st_mtime_ns)
    except FileNotFoundError:  # between two renames: as good a moment as any
        pass
    finally:
        process.kill()
        output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    found = checkpoint.newest(folder)
    epoch, step = position(folder, found.name)
    assert epoch == 0
    assert 0 < step < STEPS
    assert command(folder, "--resume") == 0
    assert_same_run(folder, finished)
    assert len(json.loads((folder / "environment.json").read_text())) == 2


@pytest.mark.parametrize("moment", ["partial written", "between the renames", "renamed"])
def test_crash_while_a_checkpoint_is_written(command, finished, tmp_path, monkeypatch, moment):
    folder = tmp_path / "run"
    replace, fsync, renames = os.replace, os.fsync, []
    partial = folder / ".checkpoint.pt.partial"

    def crash_on_fsync(number):  # of the checkpoint, not of its folder or of the record
        if len(renames) >= 3 and moment == "partial written" and partial.exists():
            raise Killed
        fsync(number)

    def crash_on_replace(source, target):
        if Path(target).name == "checkpoint.pt" and len(renames) >= 3 and moment == "between the renames":
            raise Killed
        replace(source, target)
        if Path(target).name == "checkpoint.pt":
            renames.append(target)
            if len(renames) == 4 and moment == "renamed":
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash_on_fsync)
        patch.setattr(os, "replace", crash_on_replace)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill leaves behind what it finds
        with pytest.raises(Killed):
            command(folder)
    assert partial.exists() is (moment != "renamed")
    assert command(folder, "--resume") == 0
    assert_same_run(folder, finished)
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_writes_a_checkpoint_and_ends(command, finished, tmp_path, monkeypatch, signum, status, capsys):
    folder, before = tmp_path / "run", signal.getsignal(signum)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda x: signal.raise_signal(signum))
        # No other checkpoint than the first comes near.
        assert command(folder, "--checkpoint-steps", "100") == status
    assert signal.getsignal(signum) is before
    assert position(folder) == (0, 3)
    assert not (folder / "curves.png").exists()  # no epoch to draw
    assert f"--output {folder} --resume" in capsys.readouterr().out
    assert command(folder, "--resume", "--checkpoint-steps", "100") == 0
    assert f"from epoch 1, step 3 of {STEPS}" in capsys.readouterr().out
    assert_same_run(folder, finished)


def test_signal_while_testing(command, finished, tmp_path, monkeypatch):
    folder, batch = tmp_path / "run", trainer._batch

    def spy(split, indices):
        if len(split[1]) == TEST_IMAGES:
            signal.raise_signal(signal.SIGTERM)
        return batch(split, indices)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_batch", spy)
        assert command(folder, "--checkpoint-steps", "100") == 143
    assert position(folder) == (0, STEPS)
    assert command(folder, "--resume") == 0
    assert_same_run(folder, finished)


def test_full_disk_keeps_what_was_there(command, finished, tmp_path, monkeypatch, capsys):
    folder, fsync, writes = tmp_path / "run", os.fsync, []

    def full(number):
        writes.append(number)
        if len(writes) == 11:  # a mid-epoch checkpoint's
            raise OSError(28, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert command(folder) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert str(folder) in message
    assert not list(folder.glob(".*"))
    assert command(folder, "--resume") == 0
    assert_same_run(folder, finished)


def test_non_finite_loss_names_its_batch(command, tmp_path, monkeypatch, capsys):
    folder, bad = tmp_path / "run", STEPS + 2
    at_step(monkeypatch, bad, lambda x: x * math.nan)
    assert command(folder) == 1
    message = capsys.readouterr().err
    order = np.random.default_rng([0, 1]).permutation(IMAGES)
    assert "the training loss is not finite in epoch 2, step 2 of 5" in message
    assert f"That step's examples, as indices into the training split: {order[BATCH : 2 * BATCH].tolist()}" in message
    assert f"last good checkpoint is {folder / 'checkpoint.pt'}" in message
    assert position(folder) == (1, 0)
    assert all(bool(torch.isfinite(value).all()) for value in weights(folder).values())
    assert len(metrics(folder)) == 1
    assert (folder / "curves.png").exists()


def test_a_test_loss_that_is_not_finite_ends_the_run(command, tmp_path, monkeypatch, capsys):
    """Weights of finite numbers may be too large for images that were not trained on."""
    monkeypatch.setattr(trainer.F, "cross_entropy", lambda y, _, reduction: y.sum() if y.requires_grad else y.sum() / 0)
    assert command(tmp_path / "run") == 1
    assert f"the test loss is not finite in epoch 1, step {STEPS} of {STEPS}" in capsys.readouterr().err
    assert position(tmp_path / "run") == (0, STEPS - 1)  # the last checkpoint


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts what is open by /proc")
def test_a_writing_leaves_nothing_open(tmp_path):
    """A run writes thousands of times, and a process may open a thousand files."""
    gc.collect()  # may close what other tests left
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        checkpoint.write(tmp_path / "file", b"content", keep=tmp_path / "kept")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_non_finite_weights_are_no_checkpoint(command, tmp_path, monkeypatch, capsys):
    """A finite loss whose gradient is not: the step spoils the weights, the next loss would show it."""
    folder = tmp_path / "run"
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(math.inf))
    assert command(folder, "--checkpoint-steps", "1") == 1
    assert "a weight is not finite in epoch 1, step 1" in capsys.readouterr().err
    assert position(folder) == (0, 0)


# What a run goes on from


def test_finished_run_is_left_alone_or_prolonged(command, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert command(folder, epochs=1) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert train.main(["--device", "cpu", "--output", str(folder), "--data-root", str(folder), "--resume"]) == 1
    assert command(folder, "--resume", epochs=1) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert command(folder, "--resume", "--block", "plain", epochs=1) == 0  # no step of it was a plain block's
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert command(folder, "--resume") == 0
    assert_same_run(folder, finished)
    sessions = json.loads((folder / "environment.json").read_text())
    assert [(session["epoch"], session["step"]) for session in sessions] == [(1, 0), (2, 0)]


def test_an_older_checkpoint_does_not_overwrite_a_newer_one(command, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert command(folder, epochs=1) == 0
    older = folder / "epoch1.pt"
    older.write_bytes((folder / "checkpoint.pt").read_bytes())
    assert command(folder, "--resume") == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for epochs in (1, EPOCHS, EPOCHS + 1):
        assert command(folder, "--resume", str(older), epochs=epochs) == 1
        assert f"{folder / 'checkpoint.pt'} stands further than epoch1.pt" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert command(tmp_path / "other", "--resume", str(older)) == 0
    assert_same_run(tmp_path / "other", finished)


def test_two_processes_do_not_train_in_one_folder(images, command, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert command(folder, epochs=1) == 0
    code = """
import sys
from fastinception import train
train._train_in = lambda *_: print("holds", flush=True) or sys.stdin.read()
train.main(sys.argv[1:])
"""
    options = ["--device", "cpu", "--data-root", str(images), "--output", str(folder), "--resume"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holds\n"
    assert command(folder, "--resume") == 1
    assert f"another process is training in {folder}" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert command(folder, "--resume") == 0
    assert_same_run(folder, finished)


def test_fp16_resumes_its_scaler(command, tmp_path, monkeypatch):
    init = torch.amp.GradScaler.__init__

    def eager_init(self, *args, **kwargs):
        init(self, *args, **kwargs, init_scale=8.0, growth_interval=2)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", eager_init)
    options = ["--amp", "fp16", "--batch-size", "5", "--limit", "11"]
    assert command(tmp_path / "whole", *options, epochs=1) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda x: signal.raise_signal(signal.SIGTERM))
        assert command(tmp_path / "broken", *options, epochs=1) == 143
    assert command(tmp_path / "broken", *options, "--resume", epochs=1) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    scaler = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (16.0, 1)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "a bit flipped":
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == "not PyTorch's":
        path.write_text("hello")
    elif kind == "another program's":
        torch.save(GoogLeNet().state_dict(), path)
    elif kind == "code":
        torch.save({"format": checkpoint.FORMAT, "model": print}, path)
    elif kind == "a part missing":
        state = torch.load(path, weights_only=True)
        torch.save({name: value for name, value in state.items() if name not in ("order", "sums")}, path)


@pytest.mark.parametrize(
    "kind", ["truncated", "a bit flipped", "not PyTorch's", "another program's", "code", "a part missing"]
)
def test_damaged_checkpoint_names_the_good_one(command, finished, tmp_path, monkeypatch, capsys, kind):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda x: signal.raise_signal(signal.SIGTERM))
        assert command(folder) == 143
    current, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    assert (position(folder), position(folder, previous.name)) == ((0, 4), (0, 2))
    assert command(folder, "--resume", str(previous)) == 1
    assert f"{current} stands further than {previous.name}" in capsys.readouterr().err
    damage(current, kind)
    assert command(folder, "--resume") == 1
    message = capsys.readouterr().err
    assert f"{current} cannot be used" in message
    assert message.strip().endswith(f"--resume {previous}")
    assert kind != "a part missing" or "it lacks order, sums" in message
    if kind == "truncated":
        # The previous one stays until there is another good one.
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "run", lambda *args: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                command(folder, "--resume", str(previous))
        assert position(folder) == position(folder, previous.name)
        assert command(folder, "--resume", str(previous)) == 0
        assert_same_run(folder, finished)
    assert command(folder, "--resume", str(folder / "checkpoint.3.pt")) == 1  # the newer of two good ones is named
    assert capsys.readouterr().err.strip().endswith(f"--resume {current if kind == 'truncated' else previous}")
    for path in (current, previous):
        path.write_bytes(path.read_bytes()[:100])
    assert command(folder, "--resume") == 1
    assert "no other good checkpoint" in capsys.readouterr().err


def test_output_that_holds_a_run_is_not_overwritten(command, finished, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert command(finished) == 1
    assert f"{finished} holds a run already" in capsys.readouterr().err
    other = tmp_path / "checkpoint.pt"
    other.write_bytes((finished / "checkpoint.pt").read_bytes())
    assert command(finished, "--resume", str(other)) == 1
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    assert command(tmp_path / "empty", "--resume") == 1
    assert f"{tmp_path / 'empty'} holds no run" in capsys.readouterr().err
    record = tmp_path / "record"
    record.mkdir()
    (record / "config.json").write_bytes((finished / "config.json").read_bytes())
    for more in ([], ["--resume"]):
        assert command(record, *more) == 1
        assert f"{record} holds the record of a run without its checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lr", "0.2"], "--lr 0.2 (the run has 0.1)"),
        (["--batch-size", "16"], "--batch-size 16 (the run has 15)"),
        (["--seed", "1", "--image-size", "48"], "--image-size 48 (the run has 32), --seed 1 (the run has 0)"),
        (["--limit", "60"], "--limit 60 (the run has None)"),
        (["--amp", "bf16"], "--amp bf16 (the run has off)"),
    ],
)
def test_resume_refuses_another_recipe(command, finished, capsys, options, named):
    assert command(finished, "--resume", *options) == 1
    assert f"cannot change {named}" in capsys.readouterr().err


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_what_is_new():
    args = train._parser().parse_args(["--epochs", "20"])
    saved = {name: value for name, value in train.RECIPE.items() if name != "cuda_graph"} | {"lr": 0.2}
    assert train._configure(args, {"config": saved}) == train.RECIPE | {"lr": 0.2, "epochs": 20}


@pytest.mark.parametrize(("prefix", "count"), [("train", IMAGES), ("t10k", TEST_IMAGES)])
@pytest.mark.parametrize("what", ["images", "labels"])
def test_resume_refuses_other_data(finished, images, tmp_path, capsys, what, prefix, count):
    other = tmp_path / "other"
    other.mkdir()
    for path in images.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    size, kind = ((28, 28), "images-idx3") if what == "images" else ((), "labels-idx1")
    write_idx(other / f"{prefix}-{kind}-ubyte.gz", np.zeros((count, *size), dtype=np.uint8))
    assert train.main(["--device", "cpu", "--data-root", str(other), "--output", str(finished), "--resume"]) == 1
    assert "not the data of the run" in capsys.readouterr().err


def test_resume_takes_the_recipe_from_the_run_and_another_block(command, images, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda x: signal.raise_signal(signal.SIGTERM))
        assert command(folder, "--lr", "0.05", "--no-compile", "--checkpoint-steps", "1", epochs=1) == 143
    given = ["--device", "cpu", "--data-root", str(images), "--block", "plain"]
    assert train.main([*given, "--resume", str(folder)]) == 0  # or its checkpoint.pt
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr"], config["batch_size"], config["epochs"], config["block"]) == (0.05, BATCH, 1, "plain")
    assert (config["compile"], config["checkpoint_steps"]) == (False, 1)
    assert position(folder, "checkpoint.previous.pt") == (0, STEPS - 1)
    sessions = json.loads((folder / "environment.json").read_text())
    assert [(s["block"], s["step"]) for s in sessions] == [("fast", 0), ("plain", 2)]
