"""How the stem's stages take a batch in parts on a CPU: when, of how many images, by which convolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastinception import FastInception, GoogLeNet, backends, stem
from fastinception.stem import Stage
from tests import stages
from tests.stages import BATCH, CL, IMAGES, operators, results, stage

in_parts = stages.in_parts


@pytest.mark.parametrize(
    ("images", "most", "expected"), [(64, 56, 32), (13, 5, 5), (12, 4, 4), (57, 56, 29), (3, 1, 1)]
)
def test_parts_are_even(images, most, expected):
    assert stem._evenly(images, most) == expected


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_part_is_as_large_as_it_may_be(trained, dtype, monkeypatch):
    monkeypatch.setattr(backends, "_WIDENED", {})
    own, x = stage(0, monkeypatch)
    own, x = own.to(dtype), x.to(dtype).requires_grad_(trained)
    seen: list[int] = []
    convolve = torch.nn.functional.conv2d

    def watch(part, *args):
        seen.append(len(part))
        return convolve(part, *args)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watch)
    with torch.set_grad_enabled(trained):
        own(x)
    images = IMAGES * 4 // dtype.itemsize
    assert seen == [images] * (BATCH // images) + [BATCH % images]


@pytest.mark.parametrize("side", [28, 33, 96, 224, 299])
def test_malloc_reuses_each_parts_result(side, monkeypatch):
    """Below 32 MiB with malloc's header, at the sizes that users have."""
    monkeypatch.undo()
    x, weight = torch.empty((), dtype=torch.float32).expand(1000, 1, side, side), torch.empty(64, 1, 7, 7)
    for part in stem._parts(x, weight, 2):
        assert 64 * ((side + 1) // 2) ** 2 * 4 * (part.stop - part.start) < 2**25 - 2**14


@pytest.mark.parametrize(("which", "side", "most"), [(0, 96, 56), (1, 24, 75)])
def test_parts_begin_where_malloc_would_not_reuse_the_result(which, side, most, monkeypatch):
    """As the README says, of images of 96 pixels."""
    monkeypatch.undo()
    monkeypatch.setattr(stem, "BLOCKED_PAYS", False)
    own = Stage(*GoogLeNet(block=FastInception)[which][-3:])
    x = torch.zeros(1, own[0].in_channels, side, side).expand(most + 1, -1, -1, -1)
    with torch.no_grad():
        assert operators(lambda: own(x)) == {"conv_pool_relu"}
        assert operators(lambda: own(x[:most])) == set()


def test_a_small_call_asks_no_more(monkeypatch):
    """And is never one that pays, as which the largest number and stride are taken."""
    own = Stage(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).double()
    x = torch.randn(BATCH, 3, 25, 22).double()
    monkeypatch.setattr(stem, "_KEPT", 4 * 8 * 25 * 22 * 8)
    assert operators(lambda: own(x[:5]))
    monkeypatch.setattr(stem, "_is_simple", None)
    own(x[:4])
    with pytest.raises(TypeError):
        own(x[:5])


def test_images_of_few_channels_are_convolved_blocked_in_inference(monkeypatch):
    """At any size, in float32 and where oneDNN may be used; without that it takes a large batch as elsewhere."""
    own, x = stage(0, monkeypatch)
    wide, y = stage(0, monkeypatch, channels=5)
    monkeypatch.setattr(stem, "_KEPT", 2**40)
    blocked: list[int] = []
    convolve = torch.mkldnn_convolution
    monkeypatch.setattr(
        torch, "mkldnn_convolution", lambda part, *args: blocked.append(len(part)) or convolve(part, *args)
    )
    with torch.no_grad():
        own(x)
        assert not blocked
        monkeypatch.setattr(stem, "BLOCKED_PAYS", True)
        own(x)
        assert blocked == [4, 4, 4, 1]
        assert not operators(lambda: wide(y))
        assert not operators(lambda: own.double()(x.double()))
        own.float()
        with torch.backends.mkldnn.flags(enabled=False):
            own(x)
        monkeypatch.setattr(stem, "_KEPT", 0)
        assert operators(lambda: wide(y))
    results(own, x, [own[0].weight])
    assert len(blocked) == 4
    monkeypatch.setattr(stem, "_KEPT", 2**40)
    own.requires_grad_(False)(x)
    assert len(blocked) == 8


def test_a_backward_lays_out_what_has_one_channel(monkeypatch):
    own, x = stage(0, monkeypatch, channels=1)
    weight, seen = own[0].weight.detach(), []
    out, indices = torch.ops.fastinception.conv_pool_relu(x, weight, own[0].bias.detach(), 2, True, CL)
    convolve = stem.conv_backward
    monkeypatch.setattr(stem, "conv_backward", lambda *args, **how: seen.append(args[:3]) or convolve(*args, **how))
    torch.ops.fastinception.conv_pool_relu_backward(out, x, weight, out, indices, 2, [False, True, True])
    assert {t.stride(1) for tensors in seen for t in tensors} == {1}
    assert x.stride(1) > 1 < weight.stride(1)
