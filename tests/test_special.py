"""What hides in a block's numbers: NaN, infinities, and every kind of strides; equal to the plain block's."""

from __future__ import annotations

import pytest
import torch

from fastinception import FastInception, Inception

SMALL = (5, 4, (3, 6), (2, 3), 7)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
BACKENDS = ("aten", "triton")
# NumPy's, under the interpreter, on the infinities that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def run(block, x, grad_out):
    """Return the output and the 13 gradients of ``block(x)``."""
    block.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = block(x)
    out.backward(grad_out)
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


def pair(backend, widths=SMALL, dtype=torch.float32, seed=0):
    """Return a plain and a fast block with the same numbers."""
    torch.manual_seed(seed)
    plain = Inception(*widths).to(dtype)
    fast = FastInception(*widths, backend=backend).to(dtype)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def check_same(plain, fast, x, grad_out, fast_x=None):
    theirs, ours = run(plain, x, grad_out), run(fast, x if fast_x is None else fast_x, grad_out)
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


# NaN and infinities


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "values",
    [("nan",), ("inf",), ("-inf",), ("nan", "inf", "-inf")],
    ids=lambda values: "_".join(values),
)
def test_nan_and_infinities_in_x_come_out_where_the_plain_block_puts_them(backend, layout, values):
    plain, fast = pair(backend)
    x = torch.randn(3, 5, 9, 8).contiguous(memory_format=LAYOUTS[layout])
    for i, value in enumerate(values):
        x[i % 3, i % 5, 2 * i, 7 - 3 * i] = float(value)
        x[2, 4, 8, 0] = float(value)  # a corner, where the pool's window is cut
    with torch.no_grad():
        expected = plain(x)
    assert expected.isfinite().any(), "a test of nothing but NaN"
    assert not expected.isfinite().all()
    check_same(plain, fast, x, torch.randn_like(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_nothing_but_minus_infinity(backend):
    """The pool pads with -inf, so such a window's maximum is -inf and its gradient goes to its first real pixel."""
    plain, fast = pair(backend)
    x = torch.randn(2, 5, 6, 6)
    x[0, :, :3, :3] = float("-inf")
    for block in (plain, fast):
        with torch.no_grad():  # -inf times weights of one sign: no NaN, and inf where branch 4 has to be active
            for name in ("p1_1", "p2_1", "p3_1"):
                getattr(block, name).weight.abs_()
            block.p4_2.weight.abs_().neg_()
    check_same(plain, fast, x, torch.randn(2, 20, 6, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    "name", ["p1_1.weight", "p2_1.bias", "p2_2.bias", "p3_1.weight", "p3_2.bias", "p4_2.weight", "p4_2.bias"]
)
def test_nan_and_infinities_in_parameters(backend, value, name):
    plain, fast = pair(backend)
    for block in (plain, fast):
        block.get_parameter(name).data[1] = float(value)
    x = torch.randn(2, 5, 4, 5)
    check_same(plain, fast, x, torch.randn(2, 20, 4, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_upstream_gradient_stops_at_a_closed_relu(backend):
    plain, fast = pair(backend)
    x = torch.randn(2, 5, 4, 5)
    grad_out = torch.randn(2, 20, 4, 5)
    closed = plain(x).detach() <= 0
    grad_out[closed] = float("inf")
    theirs = run(plain, x, grad_out)
    assert all(t.isfinite().all() for t in theirs.values())
    check_same(plain, fast, x, grad_out)


# Strides

VIEWS = {
    "expanded over the batch": lambda: torch.randn(1, 5, 6, 7).expand(3, 5, 6, 7),
    "expanded over the batch, channels_last": lambda: torch.randn(1, 6, 7, 5).permute(0, 3, 1, 2).expand(3, 5, 6, 7),
    "expanded over channels": lambda: torch.randn(3, 1, 6, 7).expand(3, 5, 6, 7),
    "expanded over pixels": lambda: torch.randn(3, 5, 1, 1).expand(3, 5, 6, 7),
    "stepped pixels": lambda: torch.randn(3, 5, 12, 14)[:, :, ::2, 1::2],
    "stepped channels": lambda: torch.randn(3, 10, 6, 7)[:, 1::2],
    "stepped batch": lambda: torch.randn(6, 5, 6, 7).contiguous(memory_format=torch.channels_last)[::2],
    "permuted pixels": lambda: torch.randn(3, 5, 7, 6).transpose(2, 3),
    "permuted pixels of channels_last": lambda: torch.randn(3, 7, 6, 5).permute(0, 3, 2, 1),
    "batch innermost": lambda: torch.randn(5, 6, 7, 3).permute(3, 0, 1, 2),
    "channels before the batch": lambda: torch.randn(5, 3, 6, 7).transpose(0, 1),
    "cropped": lambda: torch.randn(3, 5, 9, 10)[:, :, 2:8, 1:8],
    "cropped channels_last": lambda: torch.randn(3, 9, 10, 5).permute(0, 3, 1, 2)[:, :, 2:8, 1:8],
    "channel slice": lambda: torch.randn(3, 9, 6, 7)[:, 3:8],
    "channel slice of channels_last": lambda: torch.randn(3, 6, 7, 9).permute(0, 3, 1, 2)[:, 3:8],
    "odd storage offset": lambda: torch.randn(3 * 5 * 6 * 7 + 3)[3:].view(3, 5, 6, 7),
    "odd offset channels_last": lambda: torch.randn(3 * 5 * 6 * 7 + 1)[1:].view(3, 6, 7, 5).permute(0, 3, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs(backend, view):
    plain, fast = pair(backend)
    x = VIEWS[view]()
    before = x.clone()
    check_same(plain, fast, x.contiguous(), torch.randn(3, 20, 6, 7), fast_x=x)
    assert torch.equal(x, before)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x.contiguous()), rtol=1e-4, atol=1e-5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert fast(x).stride() == plain(x).stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [2, 3])
def test_a_sequence_as_images_one_pixel_wide(backend, side):
    """[N, T, C] seen as [N, C, T, 1]: the side of one pixel has a stride that channels_last would not have."""
    plain, fast = pair(backend)
    x = torch.randn(3, 11, 5).transpose(1, 2).unsqueeze(side)
    check_same(plain, fast, x.contiguous(), torch.randn(3, 20, *x.shape[2:]), fast_x=x)


GRADS = {
    "of sum": lambda shape: torch.tensor(1.7).expand(shape),
    "of average pooling": lambda shape: torch.randn(shape[0], shape[1], 1, 1).expand(shape),
    "one for each image": lambda shape: torch.randn(shape[0], 1, 1, 1).expand(shape),
    "slice of a cat": lambda shape: torch.randn(shape[0], shape[1] + 9, *shape[2:])[:, 4 : 4 + shape[1]],
    "slice of a channels_last cat": lambda shape: torch.randn(shape[0], *shape[2:], shape[1] + 9).movedim(3, 1)[:, 9:],
    "permuted": lambda shape: torch.randn(shape[1], shape[3], shape[0], shape[2]).permute(2, 0, 3, 1),
    "reversed": lambda shape: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
    "of padding": lambda shape: torch.randn(shape[0], shape[1], shape[2] + 3, shape[3] + 2)[:, :, 1:-2, 1:-1],
    "stepped": lambda shape: torch.randn(shape[0], shape[1], 2 * shape[2], 2 * shape[3])[:, :, ::2, ::2],
    "channels_last": lambda shape: torch.randn(shape).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_upstream_gradients_are_read_right_and_never_written(backend, upstream, layout):
    plain, fast = pair(backend)
    x = torch.randn(3, 5, 6, 7).contiguous(memory_format=LAYOUTS[layout])
    grad_out = GRADS[upstream]((3, 20, 6, 7))
    before = grad_out.clone()
    check_same(plain, fast, x, grad_out)
    assert torch.equal(grad_out, before)


PARAMETER_VIEWS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "HWIO permuted": lambda t: t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    "expanded": lambda t: t[:1].expand_as(t),
    "slice of a larger one": lambda t: torch.cat((t, t, t), dim=1)[:, t.shape[1] : 2 * t.shape[1]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", PARAMETER_VIEWS)
def test_strided_parameters(backend, view):
    plain, fast = pair(backend)
    for name in ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2"):
        weight = PARAMETER_VIEWS[view](getattr(plain, name).weight.data)
        bias = getattr(plain, name).bias.data.repeat_interleave(2)[::2]
        getattr(fast, name).weight.data, getattr(fast, name).bias.data = weight, bias
        getattr(plain, name).weight.data = weight.contiguous()
    x = torch.randn(3, 5, 6, 7)
    check_same(plain, fast, x, torch.randn(3, 20, 6, 7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 5, 6, 7), (3, 5, 1, 1), (1, 5, 1, 1), (2, 5, 1, 7), (2, 1, 4, 3)])
def test_output_has_the_plain_blocks_strides(backend, layout, weights, shape):
    plain, fast = (block.to(memory_format=LAYOUTS[weights]) for block in pair(backend, (shape[1], *SMALL[1:])))
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected, out = plain(x), fast(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for format in (torch.contiguous_format, torch.channels_last):
            assert out.is_contiguous(memory_format=format) == expected.is_contiguous(memory_format=format)
        # Where a size is 1, its stride means nothing and a library may choose any.
        if 1 not in shape:
            assert out.stride() == expected.stride()
    if layout == weights == "nchw":
        assert out.view(shape[0], -1).shape == (shape[0], out[0].numel())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_call_same_bits(backend, layout):
    torch.manual_seed(0)
    block = FastInception(*SMALL, backend=backend).to(memory_format=LAYOUTS[layout])
    x = torch.randn(4, 5, 9, 8).contiguous(memory_format=LAYOUTS[layout])
    grad_out = torch.randn(4, 20, 9, 8)
    first = run(block, x, grad_out)
    for name, t in run(block, x, grad_out).items():
        assert torch.equal(t, first[name]), name
