"""That the interpreter, hastened for these tests, gives the numbers that it gives as it is."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from fastinception.kernels import target
from tests import fresh

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
