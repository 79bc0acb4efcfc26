"""What a device can run, asked of devices that are not there."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch._dynamo

from fastinception import Inception, backends
from fastinception.kernels import target

CHIPS = {
    "sm_80": True,
    "sm_120": True,
    "gfx942": True,
    "gfx90a": True,
    "sm_75": False,
    "sm_61": False,
    "gfx1030": False,
}


@pytest.fixture
def devices(monkeypatch):
    """The device of each of CHIPS."""
    described = {torch.device("cuda", i): target.Gpu("a product", chip) for i, chip in enumerate(CHIPS)}

    def gpu(device):
        torch._dynamo.graph_break()  # no graph may hold what asks a device
        return described[device]

    monkeypatch.setattr(target, "gpu", gpu)
    monkeypatch.setattr(target, "_MISSING", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return dict(zip(CHIPS, described, strict=True))


@pytest.mark.parametrize("chip", CHIPS)
def test_triton_gets_only_what_has_tensor_cores(devices, chip, monkeypatch):
    monkeypatch.setattr(backends, "_special", lambda *_: None)
    params = list(Inception(3, 4, (3, 6), (2, 3), 7).parameters())
    x = mock.Mock(device=devices[chip], dtype=torch.float16, shape=torch.Size((2, 3, 4, 5)))
    assert backends.select("auto", x, params).name == ("triton" if CHIPS[chip] else "aten")
    if not CHIPS[chip]:
        reason = f"the kernels need the tensor cores of sm_80 and up, or of gfx908, .* and x is on {chip}"
        assert backends.select("aten", x, params).reason == "backend='aten' was asked for"
        with pytest.raises(ValueError, match=f"backend='triton' cannot run here: {reason}"):
            backends.select("triton", x, params)


@pytest.mark.parametrize("chip", ["gfx908", "gfx90a", "gfx942", "gfx950"])
def test_amds_chips_with_matrix_cores_are_known(monkeypatch, chip):
    monkeypatch.setattr(target, "gpu", lambda device: target.Gpu("a product", chip))
    assert target.without_products(torch.device("cuda", 0)) is None


@pytest.mark.parametrize(
    ("hip", "version", "arch", "chip"),
    [(None, (9, 0), "", "sm_90"), (None, (12, 1), "", "sm_121"), ("6.4", (9, 4), "gfx942:sramecc+:xnack-", "gfx942")],
)
def test_a_device_is_described_by_what_its_driver_says(monkeypatch, hip, version, arch, chip):
    major, minor = version
    about = mock.Mock(major=major, minor=minor, gcnArchName=arch, multi_processor_count=132)
    about.name = "a product"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert target.gpu.__wrapped__(torch.device("cuda", 1)) == target.Gpu("a product", chip, 132)
    assert target.gpu.__wrapped__(torch.device("cpu")) == target.Gpu("cpu", "cpu")


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float64, "float64 has no tensor-core product"),
        (torch.int32, "the kernels know float16, bfloat16, float32 and float64, and x is torch.int32"),
        *((dtype, None) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
    ],
)
def test_what_a_gpu_cannot_compute_is_said(devices, dtype, said):
    reason = target.unsupported(torch.device("cuda", 0), dtype)
    assert reason is None if said is None else said in reason
    assert "x is on cpu, and Triton runs on CUDA" in (target.unsupported(torch.device("cpu"), torch.float16) or "")


@pytest.mark.parametrize(("value", "on"), [("1", True), ("True", True), ("on", True), ("0", False), ("", False)])
def test_the_interpreter_is_asked_for_in_tritons_words(monkeypatch, value, on):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert target.interpreted() is on


def test_a_launch_is_on_its_tensors_device(monkeypatch):
    """Triton launches on the current one."""
    with target.device_of(torch.empty(1)):
        pass
    x = mock.Mock(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: ("device of", t))
    assert target.device_of(x) == ("device of", x)


def test_a_compiled_graph_knows_the_answer(devices):
    def block(x, device):
        return x + 1 if target.without_products(device) is None else x + 2

    for chip, device in devices.items():
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert compiled(torch.zeros(1), device) == (1 if CHIPS[chip] else 2)
