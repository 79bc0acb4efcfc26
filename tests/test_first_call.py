"""The first call on a GPU: its kernels are compiled at the same time, once, and launched after that.

There is none here, so a driver stands in for it: Triton's own launcher runs, and finds kernels that take a moment to
compile and that do nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# In a process without the interpreter.
CODE = """
import json, threading, time
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastinception import Inception
from fastinception.kernels import configs, library, target
from fastinception.functional import inception

events, lock = [], threading.Lock()

def log(*event):
    with lock:
        events.append(event)

def compile(source, **_):
    name = source.fn.fn.__name__
    log("compiles", name)
    time.sleep(0.5)
    log("compiled", name)
    return SimpleNamespace(
        launch_metadata=lambda *_: None, function=None, packed_metadata=None, n_spills=0,
        run=lambda *_: log("launches", name),
    )

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
net = Inception(16, 16, (16, 16), (16, 16), 16)
x = torch.randn(2, 16, 4, 4)

def step(x):
    y = inception(x.requires_grad_(), list(net.parameters()), backend="triton")
    log("backward")
    y.backward(torch.ones_like(y).contiguous(memory_format=torch.channels_last))
    log("end")

found = {}
with mock.patch("triton.compiler.compile", compile), mock.patch.object(target, "unsupported", lambda *_: None):
    with mock.patch.object(target, "gpu", lambda device: target.Gpu("sm_90", "sm_90")):
        for format in (torch.channels_last, torch.contiguous_format):
            for _ in range(2):
                step(x.detach().contiguous(memory_format=format))
        found["triton"], events = events, []
        tiles = configs.Tiles(32, 32, 16, num_warps=4, num_stages=1, library=True)
        with mock.patch.dict(configs.DEFAULTS, dict.fromkeys(("spatial_train", "weight_gradient"), lambda *_: tiles)):
            configs.forget()
            for _ in range(2):
                step(x.detach().contiguous(memory_format=torch.channels_last))
        found["library"], events = events, []
print(json.dumps(found))
"""
FORWARD = ["_entry_kernel", "_spatial_kernel"]
BACKWARD = [
    f"_{name}_kernel"
    for name in ("split", "data_gradient", "pool_gradient", "entry_gradient", "weight_gradient", "sum")
]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events: dict[str, Any] = json.loads(done.stdout)
    return events


def passes(events: list[list[str]]) -> list[dict[str, list[str]]]:
    """Return what each forward and each backward compiled, at most at the same time, and launched, in order."""
    found, running = [{"compiled": [], "together": [], "launched": []}], 0
    for kind, *names in events:
        here = found[-1]
        if kind in ("backward", "end"):
            found.append({"compiled": [], "together": [], "launched": []})
        elif kind == "launches":
            here["launched"] += names
        else:
            assert not here["launched"], "a kernel was compiled behind a launch of its pass"
            running += 1 if kind == "compiles" else -1
            here["together"].append(running)
            here["compiled"] += names if kind == "compiled" else []
    return found[:-1]


def test_the_kernels_of_a_pass_are_compiled_together_and_once(found):
    forward, backward, *others = passes(found["triton"])
    for one, kernels in ((forward, FORWARD), (backward, BACKWARD)):
        assert one["launched"] == kernels
        assert Counter(one["compiled"]) == Counter(kernels)
        assert max(one["together"]) == min(len(kernels), 4 + (os.cpu_count() or 1))
    # The second step compiles nothing; in the other layout what the layout changes.
    assert [one["launched"] for one in others] == 3 * [FORWARD, BACKWARD]
    assert [len(one["compiled"]) for one in others[:2]] == [0, 0]
    assert not set(others[2]["compiled"] + others[3]["compiled"]) - {*FORWARD, *BACKWARD}
    assert [len(one["compiled"]) for one in others[4:]] == [0, 0]


def test_what_the_library_computes_is_no_obstacle(found):
    forward, backward, *others = passes(found["library"])
    assert forward["launched"] == ["_entry_kernel", "_library_kernel"]
    assert backward["launched"] == BACKWARD
    assert Counter(forward["compiled"]) <= Counter(forward["launched"])
    assert "_library_kernel" in forward["compiled"]
    assert [one["launched"] for one in others] == [forward["launched"], BACKWARD]
    assert [len(one["compiled"]) for one in others] == [0, 0]
