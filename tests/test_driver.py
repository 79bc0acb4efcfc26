"""What reaches the driver: Triton's own launchers run, on kernels compiled for sm_90, and fake_cuda.c is the driver.

Nothing else shows without a GPU which address each argument of a kernel holds, planned and replayed, what a launch asks
for, and when something is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fresh

triton = pytest.importorskip("triton")

COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # the one that Triton takes
HEADER = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, with a driver of its own"),
    pytest.mark.skipif(COMPILER is None or not HEADER.is_file(), reason="no C compiler, or not Python's headers"),
]

# In a process without the interpreter; FAKE is the path of the driver library.
CODE = """
import ctypes, gc, json, os, re, sys, threading, time
from pathlib import Path
from unittest import mock

os.environ["TRITON_LIBCUDA_PATH"] = os.path.dirname(FAKE)  # Triton links with it, and finds it loaded by its name
fake = ctypes.CDLL(FAKE)

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from fastinception import Inception
from fastinception.functional import inception
from fastinception.kernels import configs, replay, target

class Driver(nvidia.CudaDriver):
    def __init__(self):  # Triton's asks PyTorch, which sees no GPU
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device, self.get_device_capability = lambda: 0, lambda device: (9, 0)
        self.get_current_stream = lambda device: 7

triton.runtime.driver.set_active(Driver())
os.cpu_count = lambda: 8

# What a loaded kernel takes is read from its PTX: for each parameter the type, and whether it is a pointer.
TYPES = {"u32": ctypes.c_uint32, "u64": ctypes.c_uint64}
loaded = {}

def read(module, kernel, name, files, hash):
    ptx = next(Path(path).read_text() for path in files.values() if str(path).endswith(".ptx"))
    head, = re.findall("[.]entry [^)]*", ptx)
    loaded[kernel] = name, re.findall("[.]param [.]([a-z0-9]+)( [.]ptr)?", head)

knobs.runtime.kernel_load_end_hook.add(read)

@ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_void_p))
def tell(kernel, how, arguments):
    name, parameters = loaded[kernel]
    launch = {"kernel": name, "grid": how[:3], "block": how[3:6], "pointers": [], "integers": []}
    launch |= zip(("shared", "stream", "attributes", "overlaps"), how[6:10])
    for (type, pointer), place in zip(parameters, arguments):
        launch["pointers" if pointer else "integers"].append(TYPES[type].from_address(place).value)
    launched.append(launch)

launched = []
ctypes.c_void_p.in_dll(fake, "fake_launched").value = ctypes.cast(tell, ctypes.c_void_p).value
capturing = ctypes.c_int.in_dll(fake, "fake_capturing")

def counts():
    return [ctypes.c_int.in_dll(fake, name).value for name in ("fake_loads", "fake_unloads")]

# Each launch that was planned, not replayed.
planned, kernels, launch = [], {}, replay.launch

def plan(*args):
    one = launch(*args)
    if one.compiled is not None:
        planned.append(one)
        kernels[one.compiled.name] = one.kernel
    return one

def forget():
    configs.forget()
    for kernel in kernels.values():
        kernel.device_caches.clear()  # what was compiled is on the disk, and quickly there again
    gc.collect()

def tiles(size, num_warps, launch_pdl=False, pool=None):
    chosen = configs.Tiles(size, size, size, num_warps, num_stages=2, launch_pdl=launch_pdl, pool=pool)
    return lambda dtype, chip: chosen

TILES = {
    "entry": tiles(16, 2, launch_pdl=True, pool=(16, 16, 16)),
    "entry_train": tiles(32, 1, pool=(16, 16, 16)),
    "spatial": tiles(16, 1),
    "spatial_train": tiles(16, 2, launch_pdl=True),
    "data_gradient": tiles(32, 2),
    "entry_gradient": tiles(32, 1),
    "weight_gradient": tiles(16, 2, launch_pdl=True),
}
for one in (
    mock.patch.object(target, "unsupported", lambda *_: None),
    mock.patch.object(target, "gpu", lambda device: target.Gpu("sm_90", "sm_90")),
    mock.patch.object(replay, "launch", plan),
    mock.patch.dict(configs.DEFAULTS, TILES),
):
    one.start()

net = Inception(16, 24, (16, 32), (8, 16), 8).half().to(memory_format=torch.channels_last)
names, params = zip(*net.named_parameters())
x = torch.randn(2, 16, 5, 4).half().contiguous(memory_format=torch.channels_last).requires_grad_()
found, alive = {"given": ["x", *names]}, []

def passed(one):  # a size of 1 is compiled into the kernel, where it may
    params = one.kernel.params[len(one.tensors):]
    return [size for param, size in zip(params, one.config.sizes) if param.do_not_specialize or size != 1]

def report(case, tensors):
    alive.append(tensors)  # or the next ones could have their addresses
    addresses = {name: t.data_ptr() for name, t in {"x": x, **dict(zip(names, params)), **tensors}.items()}
    plans = [
        {
            "grid": [*one.config.grid, 1, 1], "block": [32 * one.config.constants["num_warps"], 1, 1],
            "shared": one.compiled.metadata.shared, "sizes": passed(one),
        }
        for one in planned
    ]
    found[case] = {"launched": launched[:], "planned": plans, "addresses": addresses, "counts": counts()}
    launched.clear()
    planned.clear()

def step():
    y = inception(x, params, backend="triton")
    dy = torch.randn_like(y)
    dx, *grads = torch.autograd.grad(y, [x, *params], dy, retain_graph=True)
    return {"y": y, "dy": dy, "dx": dx} | {f"d{name}": grad for name, grad in zip(names, grads)}

def infer(**options):
    with torch.no_grad():
        return {"y": inception(x, params, backend="triton", **options)}

first = step()
training = planned[:]
report("step 1", first)
report("step 2", step())
for number in (1, 2):
    report(f"out {number}", infer(out=torch.empty_like(first["y"])))

# Loaded again, kernels find their launchers built, as those of a further block do; threads take turns at every step.
switching = sys.getswitchinterval()
sys.setswitchinterval(5e-6)
found["wrong launchers"] = []
for _ in range(200):
    for one in training:
        one.compiled.module = None
    for future in replay.compile_all(training, x):
        future.result()
    for one in training:
        try:
            launch(one.kernel, one.config, *one.tensors)
        except Exception as error:
            found["wrong launchers"].append(f"{one.compiled.name}: {error}")
sys.setswitchinterval(switching)
launched.clear()

forget()
capturing.value = 1
try:
    with mock.patch.object(replay, "compiles_together", lambda: False):  # nor does it where x's stream is captured
        infer()
except Exception as error:
    found["refused"] = [type(error).__name__, str(error), len(launched)]
capturing.value = 0
for case in ("recovered", "replayed"):
    report(case, infer())

forget()
before, compile = counts(), triton.compiler.compile

def compile_slowly(*args, **options):
    compiled.append(args[0].fn.__name__)
    time.sleep(0.3)  # by now all threads are here
    return compile(*args, **options)

compiled, pair = [], [threading.Thread(target=infer) for _ in range(2)]
with mock.patch("triton.compiler.compile", compile_slowly):
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
gc.collect()
changes = [after - count for after, count in zip(counts(), before)]
found["threads"] = [sorted(compiled), *changes, len(launched)]
print(json.dumps(found))
"""

# By kernel, in order: the tensors behind its pointers. What neither goes in nor comes out is named by what it holds.
FORWARD = {
    "_entry_kernel": "x p1_1.weight p2_1.weight p3_1.weight p1_1.bias p2_1.bias p3_1.bias y r2 r3 "
    "p4_2.weight p4_2.bias",
    "_spatial_kernel": "r2 r3 p2_2.weight p3_2.weight p2_2.bias p3_2.bias y",
}
STEP = {
    "_entry_kernel": FORWARD["_entry_kernel"] + " mask pooled codes",
    "_spatial_kernel": FORWARD["_spatial_kernel"] + " mask",
    "_split_kernel": "dy mask merged masked2 masked3 masked4 partials",
    "_data_gradient_kernel": "masked2 masked3 masked4 p2_2.weight p3_2.weight p4_2.weight r2 r3 merged merged dpooled "
    "partials",
    "_pool_gradient_kernel": "dpooled codes dx",
    "_entry_gradient_kernel": "merged p1_1.weight p2_1.weight p3_1.weight dx",
    "_weight_gradient_kernel": "merged masked2 masked3 masked4 x r2 r3 pooled partials",
    "_sum_kernel": "partials dp1_1.bias dp2_2.bias dp3_2.bias dp4_2.bias dp2_1.bias dp3_1.bias "
    "dp1_1.weight dp2_1.weight dp3_1.weight dp2_2.weight dp3_2.weight dp4_2.weight",
}
TENSORS = {"step": STEP, "out": FORWARD}
OVERLAPPING = {"step": {"_spatial_kernel", "_weight_gradient_kernel"}, "out": {"_entry_kernel"}}  # by their tiles
CASES = pytest.mark.parametrize("case", TENSORS)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    name, source = "libcuda.so.1", Path(__file__).with_name("fake_cuda.c")
    library = tmp_path_factory.mktemp("driver") / name
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-I{headers}", source, "-o", library]
    subprocess.run(command, check=True)
    cases: dict[str, Any] = json.loads(fresh.run(f"FAKE = {str(library)!r}\n{CODE}"))
    return cases


def flat(sizes: list[Any]) -> list[int]:
    return [number for size in sizes for number in (flat(size) if isinstance(size, list) else [size])]


def addresses(call: dict[str, Any], tensors: dict[str, str]) -> dict[str, int]:
    """Check that each kernel got the tensors of its name, and return all their addresses: each has its own."""
    assert [launch["kernel"] for launch in call["launched"]] == list(tensors)
    found: dict[str, int] = dict(call["addresses"])
    for launch in call["launched"]:
        pointers = [pointer for pointer in launch["pointers"] if pointer]  # Triton's own scratch memory is none
        for name, pointer in zip(tensors[launch["kernel"]].split(), pointers, strict=True):
            assert found.setdefault(name, pointer) == pointer, f"{launch['kernel']} got something else for {name}"
    assert len({*found.values()}) == len(found)
    return found


@CASES
def test_a_first_call_launches_what_was_planned(found, case):
    call = found[f"{case} 1"]
    assert len(call["planned"]) == len(call["launched"])
    for plan, launch in zip(call["planned"], call["launched"], strict=True):
        assert {name: launch[name] for name in ("grid", "block", "shared")} | {"sizes": launch["integers"]} == {
            **plan,
            "sizes": flat(plan["sizes"]),
        }
        assert launch["stream"] == 7


@CASES
def test_every_kernel_gets_the_tensors_that_belong_there(found, case):
    """In a replay, too, and none that an earlier call still has."""
    first, second = (addresses(found[f"{case} {number}"], TENSORS[case]) for number in (1, 2))
    freed = {"r2", "r3"} if case == "out" else {"merged", "masked2", "masked3", "masked4", "dpooled", "partials"}
    new = second.keys() - found["given"]
    assert not {second[name] for name in new} & {first[name] for name in first.keys() - freed}


@CASES
def test_a_replay_launches_the_same_and_loads_nothing(found, case):
    first, second = (found[f"{case} {number}"] for number in (1, 2))
    assert second["planned"] == []
    assert second["counts"] == first["counts"]
    for one, other in zip(first["launched"], second["launched"], strict=True):
        assert one | {"pointers": None} == other | {"pointers": None}


@CASES
@pytest.mark.parametrize("number", [1, 2])
def test_only_a_launch_whose_tiles_say_so_starts_before_its_predecessor_ends(found, case, number):
    for launch in found[f"{case} {number}"]["launched"]:
        overlaps = launch["kernel"] in OVERLAPPING[case]
        assert (launch["attributes"], launch["overlaps"]) == (overlaps, overlaps), launch["kernel"]


def test_a_load_refused_during_a_capture_is_explained_and_made_up_for(found):
    kind, message, launched = found["refused"]
    assert kind == "RuntimeError"
    assert message.startswith("a kernel has to be loaded, and no CUDA graph may be captured meanwhile")
    assert launched == 0
    for case, planned in (("recovered", 2), ("replayed", 0)):
        addresses(found[case], FORWARD)
        assert len(found[case]["planned"]) == planned


def test_two_threads_with_the_same_first_call_compile_and_load_once(found):
    compiled, loads, unloads, launched = found["threads"]
    assert compiled == list(FORWARD)
    assert (loads, unloads, launched) == (2, 0, 4)


def test_kernels_loaded_by_several_threads_have_launchers_of_their_own(found):
    assert found["wrong launchers"] == []
