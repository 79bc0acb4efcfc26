"""The training command: the textbook's recipe and loop, nothing counted twice, what it records, its options."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import platform
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastinception import GoogLeNet, Inception, checkpoint, functional, record, train, trainer
from fastinception.data import fashion_mnist
from fastinception.googlenet import xavier_uniform_
from tests import fresh, runs
from tests.runs import (
    BATCH,
    EPOCHS,
    FILES,
    IMAGES,
    ROOT,
    STEPS,
    assert_same_run,
    at_step,
    metrics,
    weights,
)

as_in_a_process_of_its_own = runs.as_in_a_process_of_its_own
command, finished, images = runs.command, runs.finished, runs.images


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


def test_one_epoch_is_the_textbooks_loop(images, command, tmp_path, monkeypatch):
    """PIL images through torchvision's transforms, the plain block in NCHW, mean loss, one process.

    Both in float64: in float32 rounding decides which of two equal numbers is a pool's maximum, and so each gradient.
    """
    batch_of = trainer._batch
    monkeypatch.setattr(trainer, "xavier_uniform_", lambda net: xavier_uniform_(net).double())
    monkeypatch.setattr(
        trainer, "_batch", lambda *args: [t.double() if t.is_floating_point() else t for t in batch_of(*args)]
    )
    assert command(tmp_path / "run", "--lr", "0.5", "--seed", "3", epochs=1) == 0
    raw = fashion_mnist("train", image_size=28, data_root=images)
    transform = torchvision.transforms.Compose([torchvision.transforms.Resize(32), torchvision.transforms.ToTensor()])
    x = torch.stack([transform(Image.fromarray(image[0].numpy())) for image in raw.images])
    torch.manual_seed(3)
    net = xavier_uniform_(GoogLeNet(Inception)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    loss_sum = correct = 0.0
    for batch in np.array_split(np.random.default_rng([3, 0]).permutation(IMAGES), range(BATCH, IMAGES, BATCH)):
        logits = net(x[batch].double()).float()
        loss = torch.nn.functional.cross_entropy(logits, raw.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(batch)
        correct += (logits.argmax(1) == raw.labels[batch]).sum().item()
    (row,) = metrics(tmp_path / "run")
    assert row["train_loss"] == pytest.approx(loss_sum / IMAGES, abs=1e-5)
    assert row["train_accuracy"] == pytest.approx(correct / IMAGES)
    torch.testing.assert_close(weights(tmp_path / "run"), dict(net.state_dict()), rtol=1e-6, atol=1e-8)


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


def test_curves_are_of_what_they_are_named(monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def spy(axes, x, y, *style, label, **options):
        drawn[label, len(drawn) // 2] = (x, y)
        return plot(axes, x, y, *style, label=label, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    names = ["train_loss", "test_loss", "train_accuracy", "test_accuracy"]
    assert record._curves([{"epoch": i} | {name: i / len(name) for name in names} for i in (1, 2)])
    panels = {(name.split("_")[0], i // 2): ([1, 2], [1 / len(name), 2 / len(name)]) for i, name in enumerate(names)}
    assert drawn == panels


def test_the_bar_shows_means_over_the_examples_so_far():
    """Also behind the last step of an epoch, which has fewer."""
    display = record.Display(0)
    about = {"config": {"epochs": 3, "batch_size": 4}, "epoch": 1, "steps": 2, "step_seconds": 0.5, "seconds": 2.0}
    for step, seen in ((1, 4), (2, 6)):
        display.step(mock.Mock(**about, step=step, order=range(6)), 3.0, 2.0)
        (shown,) = display.bar.tasks
        words = (
            f"epoch 2/3  loss {3 / seen:.3f}  accuracy {2 / seen:.3f}  {seen / 0.5:.0f} examples/s, {seen / 2:.0f} end"
        )
        assert shown.description == f"{words} to end"
        assert (shown.completed, shown.total) == (step, 2)


def test_a_picture_that_cannot_be_drawn_ends_no_run(command, tmp_path, monkeypatch, capsys):
    """Notebooks set a MPLBACKEND that another environment may lack, and matplotlib is imported at the first picture."""

    def draw(history: list[Any]) -> bytes:
        raise ValueError("Key backend: 'inline' is not a valid value for backend")

    monkeypatch.setattr(record, "_curves", draw)
    monkeypatch.setattr(record, "CURVES_SECONDS", 0)
    folder = tmp_path / "run"
    assert command(folder) == 0
    assert len(metrics(folder)) == EPOCHS
    assert capsys.readouterr().out.count("curves.png is not drawn: Key backend: 'inline' is not a valid") == EPOCHS
    assert not (folder / "curves.png").exists()


def test_a_picture_that_cannot_be_written_does_not_hide_why_a_run_ends(command, tmp_path, monkeypatch, capsys):
    write = checkpoint.write

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "curves.png":
            raise OSError("no space for the curves")
        write(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", full)
    at_step(monkeypatch, STEPS + 1, lambda x: x * math.nan)
    assert command(tmp_path / "run") == 1
    assert "the training loss is not finite" in capsys.readouterr().err


# The options


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
        (["--device", "cuda:1"], "--device cuda:1: PyTorch sees 1 CUDA devices"),
        (["--checkpoint-steps", "0"], "argument --checkpoint-steps: must be 1 to"),
        *(([name, ""], f"argument {name}: must not be empty") for name in ("--output", "--resume", "--data-root")),
    ],
)
def test_bad_option(options, message, monkeypatch, capsys):
    monkeypatch.setattr(train, "_train", lambda *args: pytest.fail("it went on"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as caught:
        train.main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_into_the_memory_is_named(monkeypatch, capsys):
    """A device says so by a class of its own, a CPU by a RuntimeError that is none of ours."""
    on_a_device = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    for work in (on_a_device, mock.Mock(side_effect=MemoryError), lambda *_: torch.empty(1 << 45)):
        monkeypatch.setattr(train, "_train", work)
        assert train.main(["--device", "cpu"]) == 1
        assert "error: the images or --batch-size do not fit into the memory" in capsys.readouterr().err
    monkeypatch.setattr(train, "_train", mock.Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        train.main(["--device", "cpu"])


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine of four GPUs and two nodes' processes; returns what was chosen of it."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(train.dist, "init_process_group", chosen.append)
    return chosen


def test_each_process_of_a_node_takes_a_gpu_of_its_own(four_gpus, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "5"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    for name in ("auto", "cuda"):
        assert train._join(name, train._parser()) == (5, 8, torch.device("cuda", 1))
    assert four_gpus == 2 * [torch.device("cuda", 1), "nccl"]
    assert train._join("cpu", train._parser()) == (5, 8, torch.device("cpu"))
    assert four_gpus[4:] == ["gloo"]
    with pytest.raises(SystemExit):
        train._join("cuda:1", train._parser())
    assert "--device cuda:1: under torchrun each process takes a GPU of its own" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_one_process_takes_the_gpu_that_is_asked_for(four_gpus, name, index):
    assert train._join(name, train._parser()) == (0, 1, torch.device("cuda", index))
    assert four_gpus == [torch.device("cuda", index)]


def test_what_is_printed_to_nobody_is_recorded_before(command, tmp_path, monkeypatch):
    """The reader of a pipe has gone: rich ends the program."""

    def broken(self: record.Display, line: str) -> None:
        if "examples/s" in line:
            raise SystemExit(1)

    monkeypatch.setattr(record.Display, "say", broken)
    with pytest.raises(SystemExit):
        command(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "3"}, "the environment says RANK=3 of WORLD_SIZE=1: unset both, or start by torchrun"),
        ({"WORLD_SIZE": "0"}, "the environment says RANK=0 of WORLD_SIZE=0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE, RANK and LOCAL_RANK, which torchrun sets, must be numbers: invalid"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, and the processes cannot meet: "),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "the processes cannot meet"),
    ],
)
def test_a_bad_environment_of_processes_is_named(environment, message, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        train.main(["--device", "cpu", "--output", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
