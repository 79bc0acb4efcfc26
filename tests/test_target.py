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


def test_a_compiled_graph_knows_the_answer(devices):
    def block(x, device):
        return x + 1 if target.without_products(device) is None else x + 2

    for chip, device in devices.items():
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert compiled(torch.zeros(1), device) == (1 if CHIPS[chip] else 2)
