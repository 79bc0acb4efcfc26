"""Define the textbook Inception block: the single truth for tests, benchmarks and the plain path."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def width(name: str, value: object) -> int:
    """Return a number of channels that an argument gives, or raise what names it."""
    number = None
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        with suppress(TypeError):  # a tensor may be no integer
            number = operator.index(cast(Any, value))
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _pair(name: str, value: object) -> tuple[int, int]:
    expected = f"{name} must be a pair (reduction, output) of channel counts, got {value!r}"
    if not isinstance(value, (tuple, list)):
        raise TypeError(expected)
    if len(value) != 2:
        raise ValueError(expected)
    return width(f"{name}[0]", value[0]), width(f"{name}[1]", value[1])


class Inception(nn.Module):
    """Run four parallel branches over one input and concatenate them on the channels.

    The block of GoogLeNet (Szegedy et al. 2015, arXiv:1409.4842) in its textbook form (Zhang et al.,
    Dive into Deep Learning, "Networks with Parallel Concatenations"): biases, no batch
    normalisation, a ReLU after every convolution. In the order of the output channels:

    1. ``p1_1``: 1x1 convolution to ``c1`` channels
    2. ``p2_1``, ``p2_2``: 1x1 to ``c2[0]``, then 3x3 (padding 1) to ``c2[1]``
    3. ``p3_1``, ``p3_2``: 1x1 to ``c3[0]``, then 5x5 (padding 2) to ``c3[1]``
    4. ``p4_1``, ``p4_2``: 3x3 max pool (stride 1, padding 1), then 1x1 to ``c4``

    Args:
        in_channels: channels of the input.
        c1: output channels of branch 1.
        c2: reduction and output channels of branch 2.
        c3: reduction and output channels of branch 3.
        c4: output channels of branch 4.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, c1 + c2[1] + c3[1] + c4, H, W]``, any floating dtype.

    Raises:
        TypeError: a width is not an int, or ``c2`` or ``c3`` is not a tuple or list.
        ValueError: a width is below 1, or ``c2`` or ``c3`` does not hold two.

    Example:
        >>> import torch
        >>> from fastinception import Inception
        >>> block = Inception(192, 64, (96, 128), (16, 32), 32)
        >>> block(torch.zeros(2, 192, 12, 12)).shape
        torch.Size([2, 256, 12, 12])
    """

    def __init__(self, in_channels: int, c1: int, c2: tuple[int, int], c3: tuple[int, int], c4: int) -> None:
        super().__init__()
        in_channels, c1, c4 = width("in_channels", in_channels), width("c1", c1), width("c4", c4)
        c2, c3 = _pair("c2", c2), _pair("c3", c3)
        self.p1_1 = nn.Conv2d(in_channels, c1, kernel_size=1)
        self.p2_1 = nn.Conv2d(in_channels, c2[0], kernel_size=1)
        self.p2_2 = nn.Conv2d(c2[0], c2[1], kernel_size=3, padding=1)
        self.p3_1 = nn.Conv2d(in_channels, c3[0], kernel_size=1)
        self.p3_2 = nn.Conv2d(c3[0], c3[1], kernel_size=5, padding=2)
        self.p4_1 = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
        self.p4_2 = nn.Conv2d(in_channels, c4, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        p1 = F.relu(self.p1_1(x))
        p2 = F.relu(self.p2_2(F.relu(self.p2_1(x))))
        p3 = F.relu(self.p3_2(F.relu(self.p3_1(x))))
        p4 = F.relu(self.p4_2(self.p4_1(x)))
        return torch.cat((p1, p2, p3, p4), dim=1)
