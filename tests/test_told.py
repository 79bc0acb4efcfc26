"""What the compiler is told of numbers and addresses, which widths and masks rest on, holds."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from fastinception import FastInception, Inception
from fastinception.kernels import configs, epilogue, split, target
from tests.poisoned import needs_interpreter, normal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*")


@needs_interpreter
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(3, 5), (3, 2), (2, 2), (6, 4), (4, 4)])  # pixels that 1, 2, 4, 8 and 16 divide
def test_what_the_compiler_is_told_holds(monkeypatch, size, format):
    """Of multiples, runs and constancy, what widths and masks rest on, at the places where it is said."""
    told = collections.Counter()

    def set_attr(handle: Any, name: str, values: list[int]) -> None:
        (*_, n), data = values, np.atleast_1d(handle.data).astype(np.int64)
        if len(values) == 2 and name == "tt.contiguity":  # of offsets along rows
            assert (np.diff(data.reshape(-1, n)) == 1).all(), (n, data)
        elif len(values) == 2:  # of addresses along rows, eight bytes each
            assert name == "tt.divisibility"
            assert (data[:, :: n // 8] % n == 0).all(), (n, data)
        elif name == "tt.divisibility":  # of each number, or of the first of each n side by side
            runs = data.reshape(-1, n) if data.size > 1 else data[:, None]
            assert (data % n == 0).all() or ((runs[:, 0] % n == 0).all() and (np.diff(runs) == 1).all()), (n, data)
        elif name == "tt.constancy":
            assert (np.diff(data.reshape(-1, n)) == 0).all(), (n, data)
        elif (name, n, run) != ("tt.contiguity", 2, 1):  # of odd images, where it widens nothing
            assert (np.diff(data.reshape(-1, n)) == 1).all(), (n, data)
        told[(name, *values)] += 1

    run = epilogue.out_run((16, 1, *size), channels_last=False)
    assert run == {6: 1, 15: 1, 4: 4, 24: 8, 16: 16}[math.prod(size)]
    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    tiles = configs.Tiles(32, 32, 16, num_warps=4, num_stages=2)  # a step of one pixel of 16 images
    monkeypatch.setitem(configs.DEFAULTS, "weight_gradient", lambda dtype, chip: tiles)
    configs.forget()
    for channels, width, misaligned in ((23, 33, 0), (24, 32, 0), (24, 32, 1)):
        block = FastInception(channels, 40, (16, width), (8, 8), 16, backend="triton").double()
        x = normal(16, channels, *size, dtype=torch.float64).contiguous(memory_format=format)
        x = torch.empty(1 + x.numel(), dtype=x.dtype)[misaligned:].as_strided(x.shape, x.stride()).copy_(x)
        y = block(x.requires_grad_())
        y.backward(torch.randn_like(y))
    configs.forget()
    assert ("tt.divisibility", 16) in told  # the entry's weights
    assert ("tt.divisibility", 1, 16) in told  # the same, for its gradient
    assert ("tt.contiguity", 1, 2) in told  # the pool's codes
    # Of taps, as far as 8 divides the channels, and of pixels.
    constant = {n for name, *_, n in told if name == "tt.constancy"}
    assert constant == ({1, 8, run} if format is torch.contiguous_format else {1, 8})


@pytest.mark.parametrize(
    ("strides", "run"),
    [
        ((768, 32, 8, 1), 16),  # contiguous
        ((776, 32, 8, 1), 8),
        ((864, 36, 8, 1), 4),
        ((770, 32, 8, 1), 1),  # pairs are none
        ((960, 40, 10, 1), None),  # lines apart
        ((1536, 64, 16, 2), None),
        ((768, 1, 192, 24), 0),  # channels_last
        ((960, 1, 240, 30), 0),  # some of its channels
        ((1536, 1, 192, 24), None),  # every second image
        ((0, 0, 0, 0), 0),  # of a sum
    ],
)
def test_a_gradients_run_divides_all_its_distances(strides, run):
    """Which is as much as the compiler may be told of the addresses of any gradient of 4x8 pixels."""
    config = split._launch_config(
        (split.Branch(24, 0, 0, 24, 0),), torch.Size((2, 24, 4, 8)), strides, 3, True, target.gpu(torch.device("cpu"))
    )
    assert config.constants["RUN"] == run


@pytest.mark.parametrize("odd", range(7))
def test_what_divides_the_widths_divides_each_of_them(odd):
    """One of all is no multiple of 8: what a kernel takes for its divisor has to count it."""
    k, c1, c21, c22, c31, c32, c4 = (12 if place == odd else 8 for place in range(7))
    plain = Inception(k, c1, (c21, c22), (c31, c32), c4).double()
    fast = FastInception.from_reference(plain, backend="triton")
    x = normal(2, k, 3, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs, upstream = [x, *plain.parameters()], normal(*plain(x).shape, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x))
    ours, theirs = (torch.autograd.grad(block(x), inputs, upstream) for block in (fast, plain))
    torch.testing.assert_close(ours, theirs)
