"""What a step is said to keep and to take at most."""

from __future__ import annotations

import json
import subprocess
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from bench import harness, memory
from fastinception import GoogLeNet


def test_saved_bytes_are_what_autograd_keeps_less_the_parameters() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.rand(2, 1, 8, 8)
    with memory.saved_bytes(net) as found:
        net(x).sum()
    # The input, and ReLU's result, which the second convolution saves as well.
    assert sum(found.values()) == 4 * (x.numel() + 2 * 4 * 8 * 8)


def test_a_fresh_process_measures_the_block_it_is_asked_for() -> None:
    found = memory.in_fresh_process("plain", 32, 32, "fp32")
    images, labels = torch.rand(32, 1, 32, 32), torch.zeros(32).long()
    here = memory.measure(harness.Runner(GoogLeNet(), images, labels, mode="training", dtype="fp32"))
    assert 0 < here["saved_bytes"] == found["saved_bytes"] < found["peak_bytes"]
    with pytest.raises(subprocess.CalledProcessError) as failure:
        memory.in_fresh_process("nothing", 2, 32, "fp32")
    assert "KeyError: 'nothing'" in failure.value.stderr


def test_a_fresh_process_computes_on_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    run = mock.Mock(return_value=mock.Mock(stdout='a warning\n{"peak_bytes": 1}\n'))
    monkeypatch.setattr(memory, "subprocess", mock.Mock(run=run))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert memory.in_fresh_process("plain", 8, 32, "bf16") == {"peak_bytes": 1}
    spec = {"block": "plain", "batch_size": 8, "image_size": 32, "dtype": "bf16", "threads": 7}
    assert json.loads(run.call_args.args[0][-1]) == spec


def test_the_command_prints_every_block_and_ends_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command sets
    saved = mock.Mock(side_effect=[(4_000_000, 1_000_000)] * 17 + [KeyboardInterrupt])
    monkeypatch.setattr(memory, "saved_by_block", saved)
    assert memory.main([]) == 130
    printed = capsys.readouterr()
    assert printed.out.count("plain   4.00 MB  FastInception   1.00 MB  0.25x") == 17
    assert printed.err == "stopped\n"


def test_a_peak_is_the_most_that_was_ever_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    status = mock.Mock(read_text=lambda: "VmPeak:\t900 kB\nVmHWM:\t  300 kB\nVmRSS:\t  100 kB\n")
    monkeypatch.setattr(memory, "Path", lambda name: status)
    assert memory._peak_resident() == 300 * 1024


def test_a_peak_on_a_gpu_is_what_a_later_step_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    runner: Any = mock.Mock(side_effect=lambda: events.append("step"), net=nn.Identity())
    runner.images.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert memory.measure(runner) == {"saved_bytes": 0, "peak_bytes": 250}
    assert events == ["step", "reset", "step"]
