"""The network's first stage, which takes a large batch in parts in inference on a CPU, against itself in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastinception import FastInception, GoogLeNet, googlenet


@pytest.fixture
def first_stage(monkeypatch):
    """The first stage of the fast network, where malloc would keep the result of two images, and five images."""
    torch.manual_seed(0)
    monkeypatch.setattr(googlenet, "_KEPT", 2 * 64 * 24 * 20 * 4)
    return GoogLeNet(FastInception, in_channels=3)[0], torch.randn(5, 3, 48, 40)


def batches_at(convolution, monkeypatch):
    """Collect the batch sizes that a convolution sees, by no hook."""
    seen = []
    forward = type(convolution).forward
    monkeypatch.setattr(type(convolution), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_first_stage_in_parts_is_the_stage(first_stage, monkeypatch, format):
    stage, x = first_stage
    stage, x = stage.to(memory_format=format), x.to(memory_format=format)
    expected = stage(x).detach()
    seen = batches_at(stage[0], monkeypatch)
    with torch.no_grad():
        y = stage(x)
    assert seen == [2, 2, 1]
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("watched", ["grad", "hook", "global hook", "other layer", "one image", "empty"])
def test_first_stage_stays_whole(first_stage, monkeypatch, watched):
    """Where gradients are kept, parts would only be copied; a hook or a foreign layer may want the whole batch."""
    stage, x = first_stage
    sizes = []
    if watched == "hook":
        stage[1].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    if watched == "other layer":
        stage[2] = nn.Sequential(nn.ReLU())
    if watched in ("one image", "empty"):
        x = x.reshape(3, 5 * 48, 40) if watched == "one image" else x[:0]
    seen = batches_at(stage[0], monkeypatch)
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None) if watched == "global hook" else None
    try:
        with torch.set_grad_enabled(watched == "grad"):
            stage(x)
    finally:
        if hook:
            hook.remove()
    assert seen == [len(x)]
    assert sizes == ([5] if watched == "hook" else [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_first_stage_is_traced_for_any_batch(first_stage):
    stage, x = first_stage
    with torch.no_grad():
        traced = torch.jit.trace(stage, x)
        exported = torch.export.export(stage, (x,), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}}).module()
        for batch in (1, 7):
            x = torch.randn(batch, 3, 48, 40)
            torch.testing.assert_close(traced(x), stage(x))
            if batch > 1:
                torch.testing.assert_close(exported(x), stage(x))


def test_first_stage_compiles_for_any_batch(first_stage, monkeypatch):
    """A graph for each power of two of parts, not for each batch."""
    stage, _ = first_stage
    monkeypatch.setattr(googlenet, "_KEPT", 16 * 64 * 8 * 8 * 4)
    counter = CompileCounter()
    compiled = torch.compile(stage, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, graphs in ((17, 1), (24, 1), (32, 1), (33, 2), (50, 2)):
            x = torch.randn(batch, 3, 16, 16)
            torch.testing.assert_close(compiled(x), stage(x))
            assert counter.frame_count == graphs
    torch.compiler.reset()
