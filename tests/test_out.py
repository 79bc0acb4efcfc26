"""`out=`: what is accepted is written and returned, and what is refused is left as it was."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fastinception import FastInception, Inception, explain

SMALL = (5, 4, (3, 6), (2, 3), 7)
SHAPE = (2, 20, 6, 5)
PATHS = ("aten", "triton", "plain")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def make(path):
    """Return a block that takes ``path``, an input, and the plain block's output."""
    torch.manual_seed(0)
    plain = Inception(*SMALL)
    block = FastInception(*SMALL, backend="aten" if path == "plain" else path)
    block.load_state_dict(plain.state_dict())
    if path == "plain":
        block.p3_1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 5, 6, 5)
    assert explain(block, x).name == path
    with torch.no_grad():
        return block, x, plain(x)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_out_is_written_and_returned(path, x_layout, out_layout, mode):
    block, x, expected = make(path)
    x = x.contiguous(memory_format=LAYOUTS[x_layout])
    strides = torch.empty(SHAPE, memory_format=LAYOUTS[out_layout]).stride()
    storage = torch.full((expected.numel() + 20,), float("nan"))
    out = storage.as_strided(SHAPE, strides, 10)
    strides, address = out.stride(), out.data_ptr()
    with mode():
        assert block(x, out=out) is out
        assert block(x, out) is out
    assert (out.stride(), out.data_ptr()) == (strides, address)
    torch.testing.assert_close(out, expected)
    assert bool(torch.cat((storage[:10], storage[-10:])).isnan().all())


@pytest.mark.parametrize("path", PATHS)
def test_out_without_any_gradient_needs_no_mode(path):
    block, x, expected = make(path)
    block.requires_grad_(False)
    out = torch.empty(SHAPE)
    assert block(x, out=out) is out
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("image", [(1, 1), (1, 5)])
def test_out_of_size_one_dimensions(path, image):
    """Where a size is 1 both layouts are contiguous and the strides may be any."""
    block, _, _ = make(path)
    x = torch.randn(1, 5, *image)
    expected = block(x).detach()
    for layout in LAYOUTS.values():
        out = torch.full((1, 20, *image), float("nan")).contiguous(memory_format=layout)
        with torch.no_grad():
            assert block(x, out=out) is out
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("path", PATHS)
def test_out_whose_meaningless_strides_are_nonsense(path):
    """Contiguous by definition: the stride of a dimension of size 1 is never used, and must not be."""
    block, _, _ = make(path)
    x = torch.randn(1, 5, 4, 1)
    out = torch.full((80,), float("nan")).as_strided((1, 20, 4, 1), (7, 4, 1, 99))
    with torch.no_grad():
        torch.testing.assert_close(block(x, out=out), block(x))
    assert out.stride() == (7, 4, 1, 99)


@pytest.mark.parametrize("path", PATHS)
def test_out_of_an_empty_batch(path):
    block, x, _ = make(path)
    out = torch.empty(0, 20, 6, 5)
    with torch.no_grad():
        assert block(x[:0], out=out) is out


@pytest.mark.parametrize("path", PATHS)
def test_out_under_autocast_has_autocasts_dtype(path):
    block, x, expected = make(path)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        out = torch.empty(SHAPE, dtype=torch.float16)
        assert block(x, out=out) is out
        torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
        with pytest.raises(TypeError, match=r"out must be of dtype torch\.float16, got torch\.float32"):
            block(x, out=torch.empty(SHAPE))


REFUSED = {
    "wrong batch": (lambda: torch.zeros(3, 20, 6, 5), ValueError, r"out must be \[2, 20, 6, 5\], got \[3, 20, 6, 5\]"),
    "wrong channels": (lambda: torch.zeros(2, 21, 6, 5), ValueError, r"\[2, 20, 6, 5\], got \[2, 21, 6, 5\]"),
    "swapped pixels": (lambda: torch.zeros(2, 20, 5, 6), ValueError, r"\[2, 20, 6, 5\], got \[2, 20, 5, 6\]"),
    "flat": (lambda: torch.zeros(1200), ValueError, r"\[2, 20, 6, 5\], got \[1200\]"),
    "empty": (lambda: torch.zeros(0), ValueError, r"\[2, 20, 6, 5\], got \[0\]"),
    "float64": (lambda: torch.zeros(SHAPE).double(), TypeError, r"dtype torch\.float32, got torch\.float64"),
    "float16": (lambda: torch.zeros(SHAPE).half(), TypeError, r"dtype torch\.float32, got torch\.float16"),
    "int32": (lambda: torch.zeros(SHAPE).int(), TypeError, r"dtype torch\.float32, got torch\.int32"),
    "meta": (lambda: torch.zeros(SHAPE, device="meta"), ValueError, "must be on cpu, got meta"),
    "transposed": (lambda: torch.zeros(2, 20, 5, 6).transpose(2, 3), ValueError, "contiguous or channels_last, got"),
    "stepped": (lambda: torch.zeros(4, 20, 6, 5)[::2], ValueError, "contiguous or channels_last, got the strides"),
    "expanded": (lambda: torch.zeros(1, 20, 6, 5).expand(SHAPE), ValueError, "contiguous or channels_last, got"),
    "expanded from one": (lambda: torch.zeros(1).expand(SHAPE), ValueError, "contiguous or channels_last, got"),
    "channel slice": (lambda: torch.zeros(2, 32, 6, 5)[:, 4:24], ValueError, "contiguous or channels_last, got"),
    "channel slice in channels_last": (
        lambda: torch.zeros(2, 6, 5, 32).permute(0, 3, 1, 2)[:, 4:24], ValueError, "contiguous or channels_last",
    ),
    "list": (lambda: [0.0], TypeError, r"out must be a torch\.Tensor, got list"),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_out_is_left_untouched(path, kind):
    block, x, _ = make(path)
    build, error, message = REFUSED[kind]
    out = build()
    is_tensor = isinstance(out, torch.Tensor) and out.device.type == "cpu"
    if is_tensor:
        before, strides, version = out.clone(), out.stride(), out._version
    with torch.no_grad(), pytest.raises(error, match=message):
        block(x, out=out)
    if is_tensor:
        assert (out.shape, out.stride(), out._version) == (before.shape, strides, version)
        assert torch.equal(out, before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source", ["x", "a parameter", "out"])
def test_out_is_refused_where_a_gradient_is_recorded(path, source):
    block, x, _ = make(path)
    out = torch.full(SHAPE, 7.0)
    if source != "a parameter":
        block.requires_grad_(False)
    if source == "x":
        x.requires_grad_()
    if source == "out":
        out.requires_grad_()
    with pytest.raises(ValueError, match="out cannot be used where a gradient is recorded"):
        block(x, out=out)
    assert (out == 7.0).all()
    assert out._version == 0


def overlapping(kind, block):
    """Return x and an out that shares memory with it or with a parameter, and the memory."""
    memory = torch.randn(4000)
    if kind == "same first element":
        return memory[:300].view(2, 5, 6, 5), memory[:1200].view(SHAPE), memory
    if kind == "last element of x":
        return memory[:300].view(2, 5, 6, 5), memory[299:1499].view(SHAPE), memory
    if kind == "last element of out":
        return memory[1199:1499].view(2, 5, 6, 5), memory[:1200].view(SHAPE), memory
    if kind == "within a stepped x":
        return memory[:2400].view(2, 40, 6, 5)[:, :10:2], memory[60:1260].view(SHAPE), memory
    if kind == "expanded x":
        return memory[1000:1030].view(1, 1, 6, 5).expand(2, 5, 6, 5), memory[:1200].view(SHAPE), memory
    block.p3_2.weight.data = memory[1100:1250].view(3, 2, 5, 5)
    return torch.randn(2, 5, 6, 5), memory[:1200].view(SHAPE), memory


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "kind",
    [
        "same first element", "last element of x", "last element of out", "within a stepped x", "expanded x",
        "a parameter",
    ],
)  # fmt: skip
def test_out_that_overlaps_is_refused_and_untouched(path, kind):
    block, _, _ = make(path)
    x, out, memory = overlapping(kind, block)
    before = memory.clone()
    with torch.no_grad(), pytest.raises(ValueError, match="out must not share memory with x or with a parameter"):
        block(x, out=out)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", ["x first", "out first"])
def test_buffers_that_touch_do_not_overlap(path, order):
    """Also where both are slices of one storage, as in a preallocated arena."""
    block, _, _ = make(path)
    memory = torch.randn(1500 + 8)
    first = 0 if order == "x first" else 1200
    x = memory[4 + first : 4 + first + 300].view(2, 5, 6, 5)
    at = 304 if order == "x first" else 4
    out = memory[at : at + 1200].view(SHAPE)
    expected, borders = block(x.clone()).detach(), memory[[0, 1, 2, 3, -4, -3, -2, -1]].clone()
    with torch.no_grad():
        assert block(x, out=out) is out
    torch.testing.assert_close(out, expected)
    assert torch.equal(memory[[0, 1, 2, 3, -4, -3, -2, -1]], borders)


@pytest.mark.parametrize("path", PATHS)
def test_contiguous_slice_of_a_larger_buffer_is_written_and_nothing_else(path):
    block, x, expected = make(path)
    larger = torch.full((4, 20, 6, 5), 7.0)
    with torch.no_grad():
        block(x, out=larger[1:3])
    torch.testing.assert_close(larger[1:3], expected)
    assert (larger[[0, 3]] == 7.0).all()

    one = torch.full((1, 32, 6, 5), 7.0)
    with torch.no_grad():  # at batch 1 a channel slice is contiguous
        block(x[:1], out=one[:, 4:24])
    torch.testing.assert_close(one[:, 4:24], expected[:1])
    assert (one[:, :4] == 7.0).all()
    assert (one[:, 24:] == 7.0).all()


@pytest.mark.parametrize("path", PATHS)
def test_out_can_be_used_again_and_bumps_its_version(path):
    """Autograd learns of the write: a graph that saved the old content must not use the new one in silence."""
    block, x, _ = make(path)
    out = torch.zeros(SHAPE)
    other = torch.ones(SHAPE, requires_grad=True)
    product = other * out
    with torch.no_grad():
        block(x, out=out)
        first = out.clone()
        block(2 * x, out=out)
        assert not torch.equal(out, first)
        torch.testing.assert_close(out, block(2 * x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("path", PATHS)
def test_a_write_is_seen_by_autograd(path, passing):
    """Under a dispatch mode, too, which keeps PyTorch from counting what an operator writes."""
    block, x, _ = make(path)
    out = torch.zeros(SHAPE)
    for mode in (nullcontext(), passing()):
        weight = torch.ones(SHAPE, requires_grad=True)
        total = (weight * out).sum()
        with torch.no_grad(), mode:
            block(x, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@pytest.mark.parametrize("path", PATHS)
def test_a_tensor_of_inference_mode_is_written_within_it(path):
    block, x, expected = make(path)
    with torch.inference_mode():
        out = torch.full(SHAPE, float("nan"))
        block(x, out=out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["negated", "of inference mode"])
def test_out_that_cannot_be_written_is_refused(path, kind):
    block, x, _ = make(path)
    if kind == "negated":
        out = torch._neg_view(torch.zeros(SHAPE))
    else:
        with torch.inference_mode():
            out = torch.zeros(SHAPE)
    with torch.no_grad(), pytest.raises(ValueError, match="must hold its numbers in memory"):
        block(x, out=out)
    assert not out.any()
