"""That tests run in the interpreter unless a GPU is asked for, and that it gives, hastened, the numbers as it is."""

from __future__ import annotations

import json
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fastinception.kernels import target
from tests import conftest, fresh, interpreter

CODE = """
import hashlib, json, torch
from fastinception import FastInception

def digest(t):
    return hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()

def digests():
    torch.manual_seed(0)
    block = FastInception(20, 12, (5, 16), (4, 12), 20, backend="triton").to(torch.float16)
    x = torch.randn(1, 20, 5, 6, dtype=torch.float16, requires_grad=True)
    out = block(x)
    out.square().sum().backward()
    return [digest(t) for t in (out, x.grad, *(p.grad for p in block.parameters()))]
"""


@pytest.mark.skipif(not target.interpreted(), reason="needs the interpreter")
def test_hastened_it_gives_the_same_bits():
    as_it_is = json.loads(fresh.run(CODE + "\nprint(json.dumps(digests()))", TRITON_INTERPRET="1"))
    here = {}
    exec(CODE, here)
    assert here["digests"]() == as_it_is


@pytest.mark.parametrize(
    ("expression", "interpreted"),
    [
        ("gpu", "0"),
        ("", "1"),
        ("not gpu", "1"),
        ("device and not gpu", "1"),
        ("gpu and not device", None),
        ("gpu or device", None),
    ],
)
def test_only_the_mark_alone_asks_for_the_gpu(expression, interpreted, monkeypatch):
    """With more, tests of the GPU would be skipped, or run in the interpreter."""
    hasten = mock.Mock()
    monkeypatch.setattr(interpreter, "hasten", hasten)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "as it was")
    config = mock.Mock(option=mock.Mock(markexpr=expression))
    if interpreted is None:
        with pytest.raises(pytest.UsageError, match=f"-m gpu alone asks for the device, got -m '{expression}'"):
            conftest.pytest_configure(config)
    else:
        conftest.pytest_configure(config)
    assert os.environ["TRITON_INTERPRET"] == (interpreted or "as it was")
    assert hasten.called is (interpreted == "1")
