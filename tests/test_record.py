"""What a training run shows and writes: metrics, how it was made, curves; also where they cannot be shown."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastinception import GoogLeNet, Inception, checkpoint, record
from fastinception.data import fashion_mnist
from tests import runs
from tests.runs import BATCH, EPOCHS, FILES, IMAGES, ROOT, STEPS, at_step, metrics, weights

as_in_a_process_of_its_own = runs.as_in_a_process_of_its_own
command, finished, images = runs.command, runs.finished, runs.images


def test_metrics_files(finished, images):
    assert {path.name for path in finished.iterdir()} == FILES
    rows = metrics(finished)
    with (finished / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    columns = "epoch train_loss train_accuracy test_loss test_accuracy"
    assert list(table[0]) == f"{columns} examples_per_second examples_per_second_end_to_end seconds".split()
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


def test_what_is_printed_to_nobody_is_recorded_before(command, tmp_path, monkeypatch):
    """The reader of a pipe has gone: rich ends the program."""

    def broken(self: record.Display, line: str) -> None:
        if "examples/s" in line:
            raise SystemExit(1)

    monkeypatch.setattr(record.Display, "say", broken)
    with pytest.raises(SystemExit):
        command(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 1
