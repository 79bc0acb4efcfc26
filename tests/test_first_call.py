"""The first call on a GPU: its kernels are compiled at the same time, once, and launched after that.

There is none here, so a driver stands in for it: Triton's own launcher runs, and finds kernels that take a moment to
compile and that do nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

from tests import fresh

# In a process without the interpreter.
CODE = """
import json, os, tempfile, threading, time
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.console import Console
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from bench import trial, tune
from bench.report import Display
from fastinception import Inception
from fastinception.kernels import configs, entry, spatial, target
from fastinception.functional import inception

events, lock = [], threading.Lock()

def log(*event):
    with lock:
        events.append(event)

def described(argument):
    if isinstance(argument, tuple):
        return list(map(described, argument))
    if isinstance(argument, torch.Tensor):
        return [str(argument.dtype), argument.shape, argument.stride(), addresses.get(argument.data_ptr(), "new")]
    return repr(argument) if isinstance(argument, (int, str)) or argument is None else type(argument).__name__

class Kernel(CompiledKernel):  # one that is on the device already
    def __init__(self, name):
        self.name, self.src, self.module = name, None, "module"
        self.function, self.packed_metadata = f"{name}'s function", f"{name}'s metadata"
        self.n_spills = 0
        self._run = lambda *args: log("launches", name, *map(described, args))

def compile(source, **_):
    name = source.fn.fn.__name__
    log("compiles", name)
    time.sleep(0.5)
    if name in failing:
        raise RuntimeError(f"{name} does not compile")
    log("compiled", name)
    return Kernel(name)

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
os.cpu_count = lambda: 8
net = Inception(16, 16, (16, 16), (16, 16), 16)
x = torch.randn(2, 16, 4, 4)

addresses, failing = {}, []
launcher, looked_up = triton.JITFunction.run, []

def look_up(self, *args, **kwargs):
    looked_up.append(self.fn.__name__)
    return launcher(self, *args, **kwargs)

triton.JITFunction.run = look_up

def step(x):
    addresses.clear()
    addresses.update({t.data_ptr(): name for name, t in [("x", x), *net.named_parameters()]})
    y = inception(x.requires_grad_(), list(net.parameters()), backend="triton")
    log("backward")
    y.backward(torch.ones_like(y).contiguous(memory_format=torch.channels_last))
    log("end", len(looked_up))
    looked_up.clear()

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

        def write():
            with torch.no_grad():
                inception(x, list(net.parameters()), backend="triton", out=out)
            log("end", len(looked_up))
            looked_up.clear()

        configs.forget()
        for kernel in (entry._entry_kernel, spatial._spatial_kernel):
            kernel.device_caches.clear()
        x = x.detach().contiguous(memory_format=torch.channels_last)
        addresses.clear()
        addresses.update({t.data_ptr(): name for name, t in [("x", x), *net.named_parameters()]})
        out = torch.empty(2, 64, 4, 4).contiguous(memory_format=torch.channels_last)
        addresses[out.data_ptr()] = "out"
        write()
        write()
        found["out"], events = events, []

        configs.forget()
        for kernel in (entry._entry_kernel, spatial._spatial_kernel):
            kernel.device_caches.clear()
        failing += ["_spatial_kernel"]
        rows = x.detach().contiguous(memory_format=torch.channels_last)

        def infer(rows=rows):
            try:
                with torch.no_grad():
                    inception(rows, list(net.parameters()), backend="triton")
                log("inferred")
            except Exception as error:
                log("failed", type(error).__name__, str(error))

        infer()
        failing.clear()
        threads = [threading.Thread(target=infer) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        infer()
        found["failing"] = [event for event in events if event[0] in ("failed", "inferred", "launches")]

        def infer_by_operator():
            return torch.ops.fastinception.triton_inference(rows, *[p.detach() for p in net.parameters()], True)

        trial.Shape.passes = lambda self, device: {"inference": infer_by_operator}
        tune.disagreement = lambda found, expected: None  # these kernels compute nothing
        unit = trial.Shape("tiny", net, 2, 32, "fp32")
        for case, compiling in (("tuned", None), ("tuned alone", f"{unit} in fp32 inference")):
            for kernel in (entry._entry_kernel, spatial._spatial_kernel, spatial._library_kernel):
                kernel.device_caches.clear()
            configs.forget()
            events = []
            with tempfile.TemporaryDirectory() as folder:
                progress = {"conditions": {}, "measured": {}, "entries": {}, "compiling": compiling}
                display = Display(Console(quiet=True))
                path, deadline = Path(folder, "progress"), time.monotonic() + 99
                tuner = tune.Tuner(path, progress, torch.device("cpu"), deadline, display)
                compile_step = tuner._compile

                def logged(name, run, choices):
                    log("step", len(choices))
                    compile_step(name, run, choices)
                    log("measures")

                tuner._compile = logged
                with mock.patch.object(configs, "choose", tuner.choose), torch.no_grad():
                    tuner.tune(unit, most=4)
            found[case] = events
            found[f"{case}, dropped"] = [row["dropped"] for row in progress["measured"].values() if "dropped" in row]
print(json.dumps(found))
"""
FORWARD = ["_entry_kernel", "_spatial_kernel"]
BACKWARD = [
    f"_{name}_kernel"
    for name in ("split", "data_gradient", "pool_gradient", "entry_gradient", "weight_gradient", "sum")
]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    events: dict[str, Any] = json.loads(fresh.run(CODE))
    return events


def passes(events: list[list[Any]]) -> list[dict[str, list[Any]]]:
    """Return what each forward and each backward compiled, at most at the same time, and launched, in order."""
    found: list[dict[str, list[Any]]] = [{"compiled": [], "together": [], "launched": [], "arguments": []}]
    running = 0
    for kind, *event in events:
        here = found[-1]
        if kind in ("backward", "end"):
            found.append({name: [] for name in here})
        elif kind == "launches":
            here["launched"].append(event[0])
            here["arguments"].append(event[1:])
        else:
            assert not here["launched"], "a kernel was compiled behind a launch of its pass"
            running += 1 if kind == "compiles" else -1
            here["together"].append(running)
            here["compiled"] += event if kind == "compiled" else []
    return found[:-1]


def test_the_kernels_of_a_pass_are_compiled_together_and_once(found):
    forward, backward, *others = passes(found["triton"])
    for one, kernels in ((forward, FORWARD), (backward, BACKWARD)):
        assert one["launched"] == kernels
        assert Counter(one["compiled"]) == Counter(kernels)
        assert max(one["together"]) == len(kernels)
    # The second step compiles nothing; in the other layout what the layout changes.
    assert [one["launched"] for one in others] == 3 * [FORWARD, BACKWARD]
    assert [len(one["compiled"]) for one in others[:2]] == [0, 0]
    layouts = [FORWARD, ["_entry_gradient_kernel", "_pool_gradient_kernel"]]  # they write y and dx
    assert [sorted(one["compiled"]) for one in others[2:4]] == layouts
    assert [len(one["compiled"]) for one in others[4:]] == [0, 0]


def test_a_replay_launches_as_tritons_look_up_does(found):
    """With the same arguments in the same places, and without it; also behind copies of x, in the other layout."""
    planned, replayed = passes(found["triton"])[:2], passes(found["triton"])[2:4]
    for first, second in zip(planned, replayed, strict=True):
        assert first["arguments"] == second["arguments"]
        assert all(len(arguments) >= 19 for arguments in first["arguments"])  # 9 are the launcher's own
    look_ups = [event[1] for event in found["triton"] if event[0] == "end"]
    assert look_ups == [16, 0, 16, 0]  # of a first step for the compiler, too


def test_a_call_with_an_output_of_the_callers_is_no_exception(found):
    first, second = passes(found["out"])
    assert first["launched"] == second["launched"] == FORWARD
    assert Counter(first["compiled"]) == Counter(FORWARD)
    assert max(first["together"]) == 2
    assert first["arguments"] == second["arguments"]
    assert sum("'out'" in str(arguments) for arguments in first["arguments"]) == 2
    assert [event[1] for event in found["out"] if event[0] == "end"] == [4, 0]


def test_a_kernel_that_does_not_compile_is_tried_again_and_by_two_threads(found):
    first, *others = found["failing"]
    assert first == ["failed", "RuntimeError", "_spatial_kernel does not compile"]  # and none before it was launched
    assert Counter(event[0] for event in others) == {"launches": 6, "inferred": 3}


def test_what_the_library_computes_is_no_obstacle(found):
    forward, backward, *others = passes(found["library"])
    assert forward["launched"] == ["_entry_kernel", "_library_kernel"]
    assert backward["launched"] == BACKWARD
    assert Counter(forward["compiled"]) <= Counter(forward["launched"])
    assert "_library_kernel" in forward["compiled"]
    assert [one["launched"] for one in others] == [forward["launched"], BACKWARD]
    assert [len(one["compiled"]) for one in others] == [0, 0]


def test_a_tuners_candidates_are_compiled_together_before_they_are_measured(found):
    def counts(events: list[list[Any]]) -> list[list[Any]]:
        """Return for each step its candidates, what it compiled at most at a time, and what while it measured."""
        steps: list[list[Any]] = []
        running, measuring = 0, False
        for kind, *event in events:
            if kind == "step":
                steps.append([event[0], 0, 0])
            measuring = kind == "measures" or (measuring and kind != "step")
            running += {"compiles": 1, "compiled": -1}.get(kind, 0)
            if steps and kind == "compiles":
                steps[-1][1] = max(steps[-1][1], running)
                steps[-1][2] += measuring
        return steps

    steps = counts(found["tuned"])
    # The entry's tiles, its pool and its order; the spatial level's: three of the library's, and one of Triton's.
    assert [candidates for candidates, _, _ in steps] == [3, 4, 1, 4]
    assert [together for _, together, _ in steps] == [3, 2, 1, 4]  # two pools' tiles are the default's, for 16 channels
    assert [behind for _, _, behind in steps] == [0, 0, 1, 2]  # one candidate alone; at the end, both launched early
    # Where compiling ended the program before, each when it is measured.
    alone = counts(found["tuned alone"])
    assert [(together, behind) for _, together, behind in alone] == [(1, 3), (1, 2), (1, 1), (2, 6)]
    assert found["tuned, dropped"] == found["tuned alone, dropped"] == []
