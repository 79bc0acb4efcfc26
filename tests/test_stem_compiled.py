"""The stem's stages in graphs: compiled, traced and exported, for any batch and under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from fastinception import backends, stem
from tests import stages
from tests.stages import BATCH, CL, integers, layers, operators, results, stage

in_parts = stages.in_parts


def test_inductor(monkeypatch):
    own, x = stage(0, monkeypatch)
    compiled = torch.compile(own, fullgraph=True)
    params = list(own.parameters())
    assert all(map(torch.equal, results(compiled, x, params), results(layers(own), x, params)))
    assert len(operators(lambda: results(compiled, x, params))) == 2


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled, widened, trained, monkeypatch):
    """Casts as the layers' convolution does, in a compiled graph as well, and widens what is slower."""
    monkeypatch.setattr(backends, "_WIDENED", {torch.bfloat16: 0} if widened else {})
    monkeypatch.setattr(stem, "_KEPT", BATCH * 64 * 13 * 11 * (4 if widened else 2) - 1)  # bytes that are computed
    own, x = stage(0, monkeypatch)
    run = torch.compile(own, fullgraph=True, backend="aot_eager") if compiled else own
    params = list(own.parameters())
    seen = set()
    convolve = torch.nn.functional.conv2d

    def watch(*args):
        y = convolve(*args)
        seen.add(y.dtype)
        return y

    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
        assert bool(operators(lambda: run(x))) is (trained or not compiled)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "conv2d", watch)
            run(x)
        assert seen == {torch.float32 if widened else torch.bfloat16}
        if trained:
            found, expected = results(run, x, params), results(layers(own), x, params)
        else:
            found, expected = [run(x)], [layers(own)(x)]
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert found[0].dtype is torch.bfloat16
    for own_result, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own_result, theirs, rtol=2e-2, atol=0)


def test_a_compiled_cast_leaves_one_channel_in_its_format(monkeypatch):
    """Of whose strides Inductor keeps none, and by which the library would convolve in NCHW, at half the speed."""
    monkeypatch.setattr(backends, "_WIDENED", {})
    own, x = stage(0, monkeypatch, channels=1)
    own, x = own.to(memory_format=CL), x.to(memory_format=CL)
    run, formats = torch.compile(own, fullgraph=True), set()

    def watched(convolve):
        def watch(*args, **kwargs):
            tensors = [t for t in args[:3] if isinstance(t, Tensor) and t.dim() == 4]
            formats.add((len(tensors), *(t.stride(1) == 1 for t in tensors)))
            return convolve(*args, **kwargs)

        return watch

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched(torch.nn.functional.conv2d))
    monkeypatch.setattr(stem, "conv_backward", watched(stem.conv_backward))
    for trained in (True, False):
        formats.clear()
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
            y = run(x)
            assert y.is_contiguous(memory_format=CL)
            if trained:
                y.float().sum().backward()
        assert formats == ({(2, True, True), (3, True, True, True)} if trained else {(2, True, True)})


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_inference_of_one_size_has_few_parts(dynamic, blocked, monkeypatch):
    """Of the layers, which Inductor fuses: one part more would be needed for images of another number."""
    own, x = stage(0, monkeypatch)
    monkeypatch.setattr(stem, "BLOCKED_PAYS", blocked)
    monkeypatch.setattr(stem, "_KEPT", 5 * 64 * 13 * 11 * 4)
    graphs: list[torch.fx.GraphModule] = []
    run = torch.compile(own, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        assert torch.equal(run(x), layers(own)(x))
        called = [getattr(node.target, "__name__", "") for node in graphs[-1].graph.nodes if node.op == "call_function"]
        convolved = called.count("conv2d"), sum("conv_pool_relu" in name for name in called)
        assert convolved == ((0, 1) if dynamic or blocked else (3, 0))
        assert torch.equal(run(x[:11]), layers(own)(x[:11]))
        assert len(graphs) == (1 if dynamic else 2)
        run = torch.compile(own, fullgraph=True, dynamic=False, backend="aot_eager")
        assert operators(lambda: run(x[:5])) == ({"conv_pool_relu"} if blocked else set())
        image = 64 * 13 * 11 * 4
        # A graph of any number of parts would take long to compile, and no part is less than an image.
        for kept, images, parts in ((image, 8, True), (image, 9, False), (image - 1, 3, True)):
            monkeypatch.setattr(stem, "_KEPT", kept)
            run = torch.compile(own, fullgraph=True, dynamic=False, backend="aot_eager")
            assert bool(operators(lambda run=run, images=images: run(x[:images]))) is not (parts and not blocked)


@pytest.mark.parametrize("grad", [False, True])
def test_a_graph_for_large_batches_and_one_for_small(grad, monkeypatch):
    own, x = stage(0, monkeypatch)
    monkeypatch.setattr(stem, "_KEPT", stem._PART)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(own, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(grad):
        for batch, graphs in {5: 1, 9: 1, 100: 1, 4: 2, 2: 2, 3: 2, 11: 2}.items():
            images = integers(batch, *x.shape[1:])
            assert torch.equal(compiled(images), layers(own)(images))
            assert counter.frame_count == graphs


@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_that_depends_on_data_is_taken_in_parts(grad, monkeypatch):
    own, x = stage(0, monkeypatch)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, chosen: Tensor) -> Tensor:
        return own(x[chosen])

    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for chosen in (torch.arange(BATCH) % 3 > 0, torch.zeros(BATCH, dtype=torch.bool)):
            assert operators(lambda chosen=chosen: run(x, chosen))
            assert torch.equal(run(x, chosen), layers(own)(x[chosen]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("program", ["traced", "exported", "exported strictly", "fx"])
def test_a_program_that_is_kept_takes_any_batch(program, monkeypatch):
    """Of standard operators, where it may run without the package."""
    own, x = stage(0, monkeypatch)
    monkeypatch.setattr(stem, "_KEPT", 5 * 64 * 13 * 11 * 4)  # a graph compiled for this batch alone has three parts
    with torch.no_grad():
        if program == "traced":
            kept = torch.jit.trace(own, x)
        elif program == "fx":
            kept = make_fx(own)(x)
        else:
            sizes, strict = {"input": {0: torch.export.Dim.AUTO}}, program == "exported strictly"
            kept = torch.export.export(own, (x,), dynamic_shapes=sizes, strict=strict).module()
        assert not operators(lambda: kept(x))
        for batch in (2, 7, BATCH):
            assert torch.equal(kept(x[:batch]), own(x[:batch]))


@pytest.mark.parametrize(("place", "method"), [(0, "forward"), (0, "_conv_forward"), (1, "forward"), (2, "forward")])
def test_a_patch_behind_the_first_compiled_call_counts(place, method, monkeypatch):
    own, x = stage(0, monkeypatch)
    run = torch.compile(own, backend="eager")
    unpatched, original = run(x), getattr(own[place], method)
    setattr(own[place], method, lambda *args: 2 * original(*args))
    assert torch.equal(run(x), 2 * unpatched)
