"""The training command: nothing lost by a crash, nothing counted twice, the same run on one process and on two."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastinception import GoogLeNet, Inception, checkpoint, functional, record, train, trainer
from fastinception.data import fashion_mnist
from fastinception.googlenet import xavier_uniform_
from tests import fresh

ROOT = Path(__file__).resolve().parent.parent
IMAGES, TEST_IMAGES, BATCH, EPOCHS = 61, 19, 15, 2
# Two processes get 8 and 7 of a batch, and 1 and none of the last.
STEPS = math.ceil(IMAGES / BATCH)
OPTIONS = ["--device", "cpu", "--image-size", "32", "--batch-size", str(BATCH), "--checkpoint-steps", "2"]
FILES = {"checkpoint.pt", "checkpoint.previous.pt", "config.json", "environment.json"}
FILES |= {"metrics.json", "metrics.csv", "curves.png"}


class Killed(BaseException):
    """Ends a run where it is raised, as kill -9 would: nothing cleans up after it."""


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module", autouse=True)
def _as_in_a_process_of_its_own(usual_few):
    """Runs in this process and in others are compared bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "FEW", usual_few)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The first real images, in a folder that is read at once."""
    folder = tmp_path_factory.mktemp("images")
    for split, prefix, count in (("train", "train", IMAGES), ("test", "t10k", TEST_IMAGES)):
        try:
            data = fashion_mnist(split, image_size=28, limit=count)
        except FileNotFoundError as error:
            pytest.skip(f"Fashion-MNIST cannot be had here: {error}")
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", data.images.squeeze(1).numpy())
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", data.labels.numpy().astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def command(images):
    """Run the command in this process and return its exit status."""

    def run(output: Path, *more: str, epochs: int = EPOCHS) -> int:
        options = ["--data-root", str(images), "--output", str(output), "--epochs", str(epochs)]
        return train.main([*OPTIONS, *options, *more])

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert command(folder) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text())


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in metrics(folder)]


def position(folder: Path, name: str = "checkpoint.pt") -> tuple[int, int]:
    state = torch.load(folder / name, weights_only=True)
    return state["epoch"], state["step"]


def assert_same_run(folder: Path, finished: Path) -> None:
    expected = weights(finished)
    got = weights(folder)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert without_times(folder) == without_times(finished)


def at_step(monkeypatch, number: int, act) -> None:
    """Call ``act`` in the ``number``-th training step from now, before its loss is taken."""
    forward, calls = trainer.Trainer._forward, [0]

    def spy(run, model, x):
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] == number:
                x = x if (changed := act(x)) is None else changed
        return forward(run, model, x)

    monkeypatch.setattr(trainer.Trainer, "_forward", spy)


# The recipe


def test_defaults_are_the_textbooks():
    assert train.RECIPE == {
        "block": "fast",
        "amp": "off",
        "epochs": 10,
        "lr": 0.1,
        "batch_size": 128,
        "image_size": 96,
        "seed": 0,
        "limit": None,
        "compile": None,
        "cuda_graph": None,
        "checkpoint_steps": None,
    }


def test_one_epoch_is_the_textbooks_loop(images, command, tmp_path):
    """PIL images through torchvision's transforms, the plain block in NCHW, mean loss, one process."""
    assert command(tmp_path / "run", "--lr", "0.5", "--seed", "3", epochs=1) == 0
    raw = fashion_mnist("train", image_size=28, data_root=images)
    transform = torchvision.transforms.Compose([torchvision.transforms.Resize(32), torchvision.transforms.ToTensor()])
    x = torch.stack([transform(Image.fromarray(image[0].numpy())) for image in raw.images])
    torch.manual_seed(3)
    net = xavier_uniform_(GoogLeNet(Inception))
    start = {name: p.clone() for name, p in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    loss_sum = correct = 0.0
    for batch in np.array_split(np.random.default_rng([3, 0]).permutation(IMAGES), range(BATCH, IMAGES, BATCH)):
        logits = net(x[batch])
        loss = torch.nn.functional.cross_entropy(logits, raw.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(batch)
        correct += (logits.argmax(1) == raw.labels[batch]).sum().item()
    (row,) = metrics(tmp_path / "run")
    assert row["train_loss"] == pytest.approx(loss_sum / IMAGES, abs=1e-5)
    assert row["train_accuracy"] == pytest.approx(correct / IMAGES)
    assert_moved_alike(weights(tmp_path / "run"), net.state_dict(), start)


def assert_moved_alike(got, expected, start) -> None:
    """Compare what training changed: the weights themselves are nearly all start."""
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert (got[name] - value).norm() <= 1e-2 * moved + 1e-7, name


def test_every_example_once_per_epoch_in_another_order(command, tmp_path, monkeypatch):
    batch, seen = trainer._batch, []

    def spy(split, indices):
        if len(split[1]) == IMAGES:
            seen.append(indices.tolist())
        return batch(split, indices)

    monkeypatch.setattr(trainer, "_batch", spy)
    assert command(tmp_path / "run") == 0
    assert [len(indices) for indices in seen] == [15, 15, 15, 15, 1] * EPOCHS
    orders = [list(itertools.chain(*seen[i * STEPS : (i + 1) * STEPS])) for i in range(EPOCHS)]
    assert all(sorted(order) == list(range(IMAGES)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_of_the_processes_make_the_batch(size):
    for count in (1, 7, 8, 15):
        batch = torch.randperm(count)
        shares = [trainer.World(rank, size, torch.device("cpu")).share(batch) for rank in range(size)]
        assert torch.cat(shares).tolist() == batch.tolist()
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


def test_uneven_last_batch_counts_by_its_examples(command, tmp_path, monkeypatch):
    """A mean of batch means would weigh the last example of 61 as much as fifteen."""
    losses, cross_entropy = [], torch.nn.functional.cross_entropy

    def spy(logits, labels, reduction):
        if logits.requires_grad:
            losses.append(cross_entropy(logits.detach().double(), labels, reduction="none"))
        return cross_entropy(logits, labels, reduction=reduction)

    monkeypatch.setattr(trainer.F, "cross_entropy", spy)
    assert command(tmp_path / "run", epochs=1) == 0
    (row,) = metrics(tmp_path / "run")
    assert len(torch.cat(losses)) == IMAGES
    assert row["train_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-6)


def test_compiled_is_one_graph_for_each_way(command, tmp_path, monkeypatch):
    """One for training, one for testing; the smaller last batches run eagerly, the names stay."""
    compile_net, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def spy(net, **options):
        return compile_net(net, backend=backend, fullgraph=True, **options)

    monkeypatch.setattr(functional, "FEW", -1)  # a compiled network computes few elements as it does many
    assert command(tmp_path / "eager") == 0
    monkeypatch.setattr(torch, "compile", spy)
    assert command(tmp_path / "run", "--compile") == 0
    assert len(graphs) == 2
    assert_same_run(tmp_path / "run", tmp_path / "eager")


# The record


def test_metrics_files(finished, images):
    assert {path.name for path in finished.iterdir()} == FILES
    rows = metrics(finished)
    with (finished / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "examples_per_second",
        "examples_per_second_end_to_end",
        "seconds",
    ]
    assert [{k: float(v) for k, v in row.items()} for row in table] == rows
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        # Accuracies are whole numbers of images; the step rate leaves out what the other rate counts.
        assert (row["train_accuracy"] * IMAGES) == pytest.approx(round(row["train_accuracy"] * IMAGES))
        assert row["examples_per_second"] > row["examples_per_second_end_to_end"]
        assert row["examples_per_second_end_to_end"] == pytest.approx(IMAGES / row["seconds"])
    # The last test row, from the weights of the checkpoint and the plain network.
    net = GoogLeNet()
    net.load_state_dict(weights(finished))
    data = fashion_mnist("test", image_size=32, data_root=images)
    with torch.no_grad():
        logits = net(data.images.float() / 255)
    loss = torch.nn.functional.cross_entropy(logits, data.labels).item()
    assert rows[-1]["test_loss"] == pytest.approx(loss, abs=1e-5)
    assert rows[-1]["test_accuracy"] == pytest.approx((logits.argmax(1) == data.labels).double().mean().item())
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_says_how_but_not_where(finished, images):
    config = json.loads((finished / "config.json").read_text())
    assert config["batch_size"] == BATCH
    assert config["data"]["train_images"] == IMAGES
    (session,) = json.loads((finished / "environment.json").read_text())
    assert session["torch"] == torch.__version__
    assert session["threads"] == torch.get_num_threads()
    assert {"python", "triton", "cpu", "gpu", "driver", "commit", "block", "compile"} <= session.keys()
    for name in ("config.json", "environment.json", "metrics.json", "metrics.csv"):
        text = (finished / name).read_text()
        assert not [place for place in (os.uname().nodename, str(images), str(finished), str(ROOT)) if place in text]


def test_checkpoint_has_the_textbooks_keys(finished):
    state = weights(finished)
    assert state.keys() == GoogLeNet(Inception).state_dict().keys()
    GoogLeNet(Inception).load_state_dict(state)


# Nothing lost


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


def test_curves_are_drawn_at_the_end_and_once_a_minute(command, tmp_path, monkeypatch):
    folder, drawn = tmp_path / "run", []
    monkeypatch.setattr(record, "_curves", lambda history: str(drawn.append(len(history))).encode())
    with monkeypatch.context() as patch:
        patch.setattr(record, "CURVES_SECONDS", 0)
        at_step(patch, STEPS + 1, lambda x: signal.raise_signal(signal.SIGTERM))
        assert command(folder) == 143
    assert drawn == [1, 1]
    assert command(folder, "--resume", epochs=3) == 0
    assert drawn == [1, 1, 3]
    assert command(folder, "--resume", epochs=3) == 0  # a crash may have come before the last drawing
    assert drawn == [1, 1, 3, 3]


def test_a_drawing_that_fails_does_not_hide_why_a_run_ends(command, tmp_path, monkeypatch, capsys):
    def full(history: list[Any]) -> bytes:
        raise OSError("no space for the curves")

    monkeypatch.setattr(record, "_curves", full)
    at_step(monkeypatch, STEPS + 1, lambda x: x * math.nan)
    assert command(tmp_path / "run") == 1
    assert "the training loss is not finite" in capsys.readouterr().err


def test_finished_run_is_left_alone_or_prolonged(command, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert command(folder, epochs=1) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert train.main(["--device", "cpu", "--output", str(folder), "--data-root", str(folder), "--resume"]) == 1
    assert command(folder, "--resume", epochs=1) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert command(folder, "--resume") == 0
    assert_same_run(folder, finished)


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


def test_amp_on_a_cpu_that_is_slower_in_it_is_said(command, tmp_path, monkeypatch, capsys):
    for slower in (False, True):
        monkeypatch.setattr(train.backends, "_WIDENED", {torch.bfloat16: 512} if slower else {})
        options = ["--amp", "bf16", "--batch-size", "5", "--limit", "5"]
        assert command(tmp_path / str(slower), *options, epochs=1) == 0
        assert ("slower in bf16 than in fp32" in " ".join(capsys.readouterr().out.split())) is slower


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_on_a_cpu_a_step_uses_the_memory_of_the_last(images, tmp_path):
    """In a process of its own, because it cannot be taken back."""
    code = """
import resource, sys
import torch
from fastinception import train

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(12 * 2**20) for _ in range(2)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(8)))
arguments = "--epochs 1 --batch-size 4 --limit 4 --image-size 32 --device cpu --no-compile".split()
assert train.main([*arguments, *sys.argv[1:]]) == 0
print(min(faults() for _ in range(8)))  # pieces have to grow together at first
"""
    output, errors = tmp_path / "stdout", tmp_path / "stderr"
    for file in (output, errors):
        file.touch()
    options = ["--data-root", str(images), "--output", str(tmp_path / "run")]
    process = fresh.start(code, output, errors, options)
    process.join(fresh.TIMEOUT)
    assert process.exitcode == 0, errors.read_text()
    first, *_, last = output.read_text().split("\n")[:-1]
    assert int(first) > 40  # 96 MB: 24 huge pages each
    assert int(last) < 20


# What stops a run


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


def test_non_finite_weights_are_no_checkpoint(command, tmp_path, monkeypatch, capsys):
    """A finite loss whose gradient is not: the step spoils the weights, the next loss would show it."""
    folder = tmp_path / "run"
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(math.inf))
    assert command(folder, "--checkpoint-steps", "1") == 1
    assert "a weight is not finite in epoch 1, step 1" in capsys.readouterr().err
    assert position(folder) == (0, 0)


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


def test_unwritable_output_is_said_at_the_start(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.Trainer, "run", lambda *args: pytest.fail("it trained"))
    (tmp_path / "file").write_text("")
    assert command(tmp_path / "file" / "run") == 1
    assert f"'{tmp_path / 'file' / 'run'}'" in capsys.readouterr().err
    assert command(tmp_path / "file") == 1
    assert f"{tmp_path / 'file'} is not a folder: give another --output" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("", (), {"free": 30_000_000}))
        assert command(tmp_path / "small") == 1
    assert "48 MB are needed" in capsys.readouterr().err


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


@pytest.mark.parametrize("what", ["images", "labels"])
def test_resume_refuses_other_data(finished, images, tmp_path, capsys, what):
    other = tmp_path / "other"
    other.mkdir()
    for path in images.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    size, kind = ((28, 28), "images-idx3") if what == "images" else ((), "labels-idx1")
    write_idx(other / f"train-{kind}-ubyte.gz", np.zeros((IMAGES, *size), dtype=np.uint8))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be 1 to"),
        (["--lr", "-0.1"], "argument --lr: must be positive and finite, got -0.1"),
        (["--lr", "nan"], "argument --lr: must be positive and finite, got nan"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--image-size", "31"], "argument --image-size: must be 32 to"),
        (["--image-size", "40000"], "argument --image-size: must be 32 to 32768"),
        (["--limit", "0"], "argument --limit: must be 1 to"),
        (["--seed", "-1"], "argument --seed: must be 0 to"),
        (["--device", "tpu0"], "--device must be cpu, cuda, cuda:N or auto, got 'tpu0'"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--checkpoint-steps", "0"], "argument --checkpoint-steps: must be 1 to"),
    ],
)
def test_bad_option(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("triton", "FASTINCEPTION_BACKEND=triton cannot run here: "),
        (
            "cudnn",
            "the environment variable FASTINCEPTION_BACKEND must be one of 'auto', 'triton', 'aten', got 'cudnn'",
        ),
    ],
)
def test_a_backend_that_cannot_be_is_said_before_anything_is_written(
    command, tmp_path, monkeypatch, capsys, backend, message
):
    monkeypatch.setenv("FASTINCEPTION_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert command(tmp_path / "run") == 1
    assert message in capsys.readouterr().err
    assert not any((tmp_path / "run").iterdir())
    if backend == "triton":
        assert command(tmp_path / "run", "--block", "plain") == 0


@pytest.mark.parametrize("damaged", [False, True])
def test_bad_data_is_named(command, images, tmp_path, capsys, damaged):
    root = tmp_path / "root"
    root.mkdir()
    name = "t10k-images-idx3-ubyte.gz"
    for path in images.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    (root / name).unlink()
    if damaged:
        (root / name).write_bytes((images / name).read_bytes()[:-30])
    assert train.main(["--device", "cpu", "--data-root", str(root), "--output", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert name in message
    assert "Traceback" not in message
    assert checkpoint.newest(tmp_path / "run") is None


# Several processes


def torchrun(script: Path, *arguments: str) -> str:
    """Run a script in two processes of one thread each; return what they printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=90)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: the launcher has to end its two, which would wait for each other for ever
        pytest.fail(f"the two processes hang: {process.communicate()[0]}")
    assert process.returncode == 0, output
    return output


# The second process gets the signal, in mid-epoch; the first alone may write.
TWO = """
import os, signal, sys
import torch
import torch.distributed as dist
from fastinception import checkpoint, record, train, trainer

second = os.environ["RANK"] == "1"
forward, calls = trainer.Trainer._forward, []

def spy(*args):
    calls.append(None)  # not what would outlive the process group
    if second and len(calls) == 3:
        signal.raise_signal(signal.SIGTERM)
    return forward(*args)

trainer.Trainer._forward = spy
scale, losses = torch.amp.GradScaler.scale, []
torch.amp.GradScaler.scale = lambda self, loss: losses.append(loss.detach().clone()) or scale(self, loss)
if second:
    checkpoint.write = record.write_record = train.write_record = None
# The launcher's store meets one group only: both runs have the first one's.
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
assert train.main(sys.argv[1:]) == 143
assert len(calls) == 3
# Together they are one process's loss, about log(10): in fp16 it overflows where that does.
dist.all_reduce(losses[0])
assert 1.8 < losses[0] < 2.8, losses
dist.init_process_group, dist.destroy_process_group = lambda backend: None, destroy
assert train.main([*sys.argv[1:], "--resume"]) == 0
"""


def test_two_processes_are_one_run(images, command, finished, tmp_path):
    """The losses within 1e-5, the weights' movement within 1 %; one process goes on where two stopped."""
    folder, script = tmp_path / "two", tmp_path / "two.py"
    script.write_text(TWO)
    options = ["--data-root", str(images), "--output", str(folder), "--epochs", str(EPOCHS)]
    output = torchrun(script, *OPTIONS, *options)
    rows, expected = metrics(folder), metrics(finished)
    assert len(rows) == EPOCHS
    for row, alone in zip(rows, expected, strict=True):
        for name in ("train_loss", "test_loss"):
            assert row[name] == pytest.approx(alone[name], abs=1e-5)
        for name in ("train_accuracy", "test_accuracy"):
            assert row[name] == pytest.approx(alone[name])
    torch.manual_seed(0)
    start = xavier_uniform_(GoogLeNet()).state_dict()
    assert_moved_alike(weights(folder), weights(finished), start)
    assert [output.count(words) for words in ("from epoch 1, step 3", "epoch 2/2:", "stopped by SIGTERM")] == [1, 1, 1]
    sessions = json.loads((folder / "environment.json").read_text())
    assert [(s["processes"], s["step"]) for s in sessions] == [(2, 0), (2, 3)]
    # The second epoch's last step, from sums over both processes.
    assert position(folder, "checkpoint.previous.pt") == (1, STEPS - 1)
    assert command(tmp_path / "one", "--resume", str(folder / "checkpoint.previous.pt")) == 0
    assert metrics(tmp_path / "one")[1]["train_loss"] == pytest.approx(expected[1]["train_loss"], abs=1e-5)


FSDP = """
import os
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from fastinception import FastInception, backends

dist.init_process_group("gloo")
rank = dist.get_rank()
select, paths = backends.select, []

def spy(*args):
    paths.append(select(*args))
    return paths[-1]

def build():
    torch.manual_seed(0)
    blocks = FastInception(6, 4, (3, 6), (2, 4), 3), FastInception(17, 5, (4, 3), (2, 6), 2)
    return torch.nn.Sequential(*blocks).double()

whole, sharded = build(), build()
x = torch.randn(4, 6, 9, 9, dtype=torch.double)
grad = torch.randn(4, 16, 9, 9, dtype=torch.double)
expected = whole(x)
expected.backward(grad)

mesh = init_device_mesh("cpu", (2,))
for block in sharded:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert all(isinstance(p, DTensor) for p in sharded.parameters())
assert isinstance(sharded[0], FastInception)

half = slice(2 * rank, 2 * rank + 2)
backends.select = spy
y = sharded(x[half])
backends.select = select
assert [path.name for path in paths] == ["aten", "aten"], paths
torch.testing.assert_close(y, expected[half])
y.backward(2 * grad[half])  # FSDP averages the gradients of the processes
for (name, p), q in zip(sharded.named_parameters(), whole.parameters()):
    torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda words: name + words)
for net in (sharded, whole):
    torch.optim.SGD(net.parameters(), lr=0.1).step()
torch.testing.assert_close(sharded(x), whole(x))
print("fine", rank, flush=True)
dist.destroy_process_group()
os._exit(0)  # the mesh outlives the group, and the interpreter's end then aborts now and then, in gloo's threads
"""


def test_fsdp2_shards_the_block(tmp_path):
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    assert torchrun(script).count("fine") == 2
