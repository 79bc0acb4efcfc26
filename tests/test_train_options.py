"""The training command's options, environment and data: what cannot be is named before anything is trained."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from fastinception import checkpoint, train, trainer
from tests import runs

as_in_a_process_of_its_own = runs.as_in_a_process_of_its_own
command, images = runs.command, runs.images


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
        ("cudnn", "variable FASTINCEPTION_BACKEND must be one of 'auto', 'triton', 'aten', got 'cudnn'"),
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
