"""Where a benchmark's result is written, and what it says of its machine."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record
from tests.comparisons import strict


def test_json_is_strict_and_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    record.write_json({"rows": [1]}, path)
    with pytest.raises(ValueError, match="JSON"):
        record.write_json({"rows": [math.nan]}, path)
    assert strict(path) == {"rows": [1]}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.write_json({"rows": [2]}, path)
    assert strict(path) == {"rows": [1]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_json_through_a_link_or_into_a_pipe_leaves_both_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, file, pipe = (tmp_path / name for name in ("link.json", "r.json", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    os.mkfifo(pipe)
    record.check_writable(link)
    record.write_json({"rows": [1]}, link)
    assert link.is_symlink()
    assert strict(file) == {"rows": [1]}
    with monkeypatch.context() as patch:  # nobody reads the pipe yet: to open it would wait for ever
        patch.setattr(Path, "open", lambda self, *_: pytest.fail(f"{self} was opened"))
        record.check_writable(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        record.write_json({"rows": [2]}, pipe)
        assert json.loads(os.read(reader, 4096)) == {"rows": [2]}
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.json", "pipe", "r.json"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may write, root neither")
def test_a_folder_in_which_nobody_may_write_is_found_at_once() -> None:
    with pytest.raises(ValueError, match=r"/proc/r\.json cannot be written: "):
        record.check_writable(Path("/proc/r.json"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux's list of what a processor knows")
def test_the_record_says_which_wide_instructions_the_processor_has() -> None:
    known = Path("/proc/cpuinfo").read_text().split()
    expected = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known]
    assert record.conditions(torch.device("cpu"))["cpu_flags"] == expected
