"""Few elements on a CPU: standard operators compute them, as the block's own ways cost more there than they spare."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastinception import FastInception, Inception, aten, backends, explain

SMALL = (5, 4, (3, 6), (2, 3), 7)


@pytest.fixture
def recorded(monkeypatch):
    """Return the names of those functions of aten.py that compute the block's own way, as they are called."""
    calls = []
    for name in ("forward", "forward_saving"):
        own = getattr(aten, name)
        monkeypatch.setattr(aten, name, lambda *args, name=name, own=own: calls.append(name) or own(*args))
    return calls


@pytest.mark.parametrize("grad", [True, False])
def test_standard_operators_compute_few_elements(few, recorded, grad):
    torch.manual_seed(0)
    block = FastInception(64, 4, (3, 6), (2, 3), 7)
    plain = Inception(64, 4, (3, 6), (2, 3), 7)
    plain.load_state_dict(block.state_dict())
    with torch.set_grad_enabled(grad):
        for images, own in ((few // 4096, []), (few // 4096 + 1, ["forward_saving" if grad else "forward"])):
            x = torch.randn(images, 64, 8, 8).to(memory_format=torch.channels_last)
            y = block(x)
            torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert y.requires_grad is grad
            assert recorded == own
            path = explain(block, x)
            assert path.name == ("aten" if own else "plain")
            assert ("few elements" in path.reason) is (not own)
    assert explain(block, x[:0]).reason == "x is empty"  # few too, but not why


def test_few_elements_of_a_slower_dtype_are_widened(few, monkeypatch):
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 0})
    block = FastInception(*SMALL).bfloat16()
    x = torch.randn(2, 5, 6, 4, dtype=torch.bfloat16)
    seen = []
    compose = aten.compose
    monkeypatch.setattr(aten, "compose", lambda x, *args: seen.append(x.dtype) or compose(x, *args))
    assert block(x).dtype is torch.bfloat16
    assert seen == [torch.float32]


def test_a_graph_of_few_elements_serves_many(few, recorded):
    """A compiled block computes its own way whatever comes, or a batch would cost another graph."""
    torch._dynamo.reset()
    block, counter = FastInception(*SMALL), CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for images in (2, 3, few):
        x = torch.randn(images, 5, 3, 1)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
