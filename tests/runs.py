"""Runs of the training command on a few images, and what they leave behind.

The fixtures are those of a test file that names them: pytest looks for them among its globals.
"""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastinception import functional, train, trainer
from fastinception.data import fashion_mnist

ROOT = Path(__file__).resolve().parent.parent
IMAGES, TEST_IMAGES, BATCH, EPOCHS = 61, 19, 15, 2
# Two processes get 8 and 7 of a batch, and 1 and none of the last.
STEPS = math.ceil(IMAGES / BATCH)
OPTIONS = ["--device", "cpu", "--image-size", "32", "--batch-size", str(BATCH), "--checkpoint-steps", "2"]
FILES = {"checkpoint.pt", "checkpoint.previous.pt", "config.json", "environment.json"}
FILES |= {"metrics.json", "metrics.csv", "curves.png"}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module", autouse=True)
def as_in_a_process_of_its_own(usual_few):
    """Runs in this process and in others are compared bit for bit.

    On one thread, as in a worker of xdist: the images are so small that the last blocks see one pixel, and of one pixel
    in one image oneDNN's gradients on two threads differ from call to call.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "FEW", usual_few)
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


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


def assert_moved_alike(got, expected, start) -> None:
    """Compare what training changed: the weights themselves are nearly all start."""
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert (got[name] - value).norm() <= 1e-2 * moved + 1e-7, name


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
