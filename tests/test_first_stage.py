"""The network's first stage, which takes a large batch in parts in inference on a CPU, against itself in one piece."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from fastinception import FastInception, GoogLeNet, backends, googlenet

IMAGE = 64 * 24 * 20 * 4  # bytes of the convolution's result of one image
BATCH = 37


@pytest.fixture
def first_stage(monkeypatch):
    """The first stage of the fast network, where malloc would reuse the result of 16 images, and 37 images."""
    torch.manual_seed(0)
    monkeypatch.setattr(googlenet, "_KEPT", 16 * IMAGE)
    return GoogLeNet(FastInception, in_channels=3)[0], torch.randn(BATCH, 3, 48, 40)


def batches_at(convolution, monkeypatch):
    """Collect the batch sizes that a convolution sees, by no hook."""
    seen = []
    forward = type(convolution).forward
    monkeypatch.setattr(type(convolution), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_first_stage_in_parts_is_the_stage(first_stage, monkeypatch, format, mode):
    stage, x = first_stage
    stage, x = stage.to(memory_format=format), x.to(memory_format=format)
    expected = stage(x).detach()
    seen = batches_at(stage[0], monkeypatch)
    with mode():
        y = stage(x)
    assert seen == [10, 10, 10, 7]
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("watched", ["grad", "hook", "global hook", "own forward", "other layer", "one image"])
def test_first_stage_stays_whole(first_stage, monkeypatch, watched):
    """Where gradients are kept, parts would only be copied; a hook or a foreign layer may want the whole batch."""
    stage, x = first_stage
    sizes = []
    if watched == "hook":
        stage[1].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    if watched == "own forward":
        pool = stage[1].forward
        stage[1].forward = lambda y: sizes.append(len(y)) or pool(y)
    if watched == "other layer":
        stage[2] = nn.Sequential(nn.ReLU())
    if watched == "one image":
        x = x.reshape(3, BATCH * 48, 40)
    seen = batches_at(stage[0], monkeypatch)
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None) if watched == "global hook" else None
    try:
        with torch.set_grad_enabled(watched == "grad"):
            stage(x)
    finally:
        if hook:
            hook.remove()
    assert seen == [len(x)]
    assert sizes == ([BATCH] if watched in ("hook", "own forward") else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("side", [28, 33, 64, 96, 128, 150])
def test_malloc_reuses_each_parts_result(dtype, side, monkeypatch):
    """Below 32 MiB with malloc's header, by the sizes themselves; as many pieces as parts, and as few as will do."""
    monkeypatch.setattr(backends, "_EMULATED", frozenset())
    stage = GoogLeNet(FastInception)[0]
    image = 64 * math.ceil(side / 2) ** 2 * dtype.itemsize
    with torch.no_grad():
        for batch in range(1, 300):
            x = torch.empty((), dtype=dtype).expand(batch, 1, side, side)
            parts = stage._parts(x)
            sizes = [len(piece) for piece in x.chunk(parts)]
            if parts > 1:
                assert len(sizes) == parts
                assert batch * image > parts // 2 * (2**25 - 2**14 - image)
            if parts > 1 or 16 * image <= batch * image < 2**25 - 2**14:
                assert max(sizes) * image <= 2**25 - 2**14


@pytest.mark.parametrize("shape", [(2, 3, 0, 40), (2, 3, 48, 0)])
def test_images_without_pixels_are_the_convolutions_error(first_stage, shape):
    stage, _ = first_stage
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        stage(torch.empty(shape))


def test_an_emulated_dtype_is_convolved_in_float32(first_stage, monkeypatch):
    stage, x = first_stage
    monkeypatch.setattr(backends, "_EMULATED", frozenset({torch.bfloat16}))
    with torch.no_grad():
        assert stage._parts(x.bfloat16()) == stage._parts(x) == 4
        monkeypatch.setattr(backends, "_EMULATED", frozenset())
        assert stage._parts(x.bfloat16()) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("program", ["traced", "exported", "fx"])
def test_a_program_that_is_kept_takes_any_batch(first_stage, program):
    stage, x = first_stage
    with torch.no_grad():
        if program == "traced":
            kept = torch.jit.trace(stage, x)
        elif program == "exported":
            kept = torch.export.export(stage, (x,), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}}).module()
        else:
            kept = make_fx(stage)(x)
        for batch in (2, 7, BATCH):
            torch.testing.assert_close(kept(x[:batch]), stage(x[:batch]))


def test_first_stage_compiles_for_any_batch(first_stage):
    """A graph for each number of parts, not for each batch."""
    stage, _ = first_stage
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(stage, backend=counter, fullgraph=True, dynamic=True)
    batches = {2: 1, 5: 1, 16: 1, 17: 2, 23: 2, 32: 2, 33: 3, 41: 3, 64: 3, 65: 4, 97: 4, 128: 4, 129: 5, 200: 5}
    try:
        with torch.no_grad():
            for batch, graphs in batches.items():
                x = torch.randn(batch, 3, 48, 40)
                torch.testing.assert_close(compiled(x), stage(x))
                assert counter.frame_count == graphs
    finally:
        torch.compiler.reset()
