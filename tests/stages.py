"""What tests of the stem's stages share: stages of small integers, in parts of four images, beside their layers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from fastinception import FastInception, GoogLeNet, stem
from fastinception.stem import Stage
from tests import profiled

CL = torch.channels_last
operators = functools.partial(profiled.operators, prefix="conv_pool_relu")
FORMATS = torch.contiguous_format, CL
BATCH, IMAGES = 13, 4  # of which one part is


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """Take every batch of :func:`stage` in parts of 4 images, whatever these cores and this malloc do best."""
    torch.compiler.reset()
    monkeypatch.setattr(stem, "_KEPT", 0)
    monkeypatch.setattr(stem, "BLOCKED_PAYS", False)


def integers(*shape: int, high: int = 4) -> Tensor:
    """Return small integers: every sum of their products is exact in float32, and of few of them in float16."""
    return torch.randint(-high, high + 1, shape).float()


def of_integers(which: int, images: int, channels: int = 3, height: int = 25, width: int = 22) -> tuple[Stage, Tensor]:
    """Return the first or the second stage, of small integers, and so many images of it."""
    torch.manual_seed(0)
    own = GoogLeNet(block=FastInception, in_channels=channels)[which]
    with torch.no_grad():
        for p in own.parameters():
            p.copy_(integers(*p.shape, high=1))
    return own, integers(images, (channels, 64)[which], height, width)


def stage(which: int, monkeypatch, channels: int = 3, height: int = 25, width: int = 22) -> tuple[Stage, Tensor]:
    """Return the first or the second stage, of small integers, and images of it."""
    own, x = of_integers(which, BATCH, channels, height, width)
    last = own[-3]
    pixels = -(-height // last.stride[0]) * -(-width // last.stride[0])
    monkeypatch.setattr(stem, "_PART", IMAGES * last.out_channels * pixels * 4)
    return own, x


def layers(own: Stage) -> nn.Sequential:
    return nn.Sequential(*own)


def results(run, x: Tensor, params) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = run(x)
    torch.manual_seed(1)
    grad = torch.randint_like(y, -3, 4)
    return [y, *torch.autograd.grad(y, [x, *params], grad)]
