"""Build the textbook GoogLeNet around any Inception block with the textbook constructor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fastinception.module import FastInception
from fastinception.reference import Inception, width
from fastinception.stem import Stage


class Widths(NamedTuple):
    """Channel widths of one Inception block, in the order of its constructor."""

    in_channels: int
    c1: int
    c2: tuple[int, int]
    c3: tuple[int, int]
    c4: int


# Table 1 of Szegedy et al. 2015 (arXiv:1409.4842).
WIDTHS = {
    "3a": Widths(192, 64, (96, 128), (16, 32), 32),
    "3b": Widths(256, 128, (128, 192), (32, 96), 64),
    "4a": Widths(480, 192, (96, 208), (16, 48), 64),
    "4b": Widths(512, 160, (112, 224), (24, 64), 64),
    "4c": Widths(512, 128, (128, 256), (24, 64), 64),
    "4d": Widths(512, 112, (144, 288), (32, 64), 64),
    "4e": Widths(528, 256, (160, 320), (32, 128), 128),
    "5a": Widths(832, 256, (160, 320), (32, 128), 128),
    "5b": Widths(832, 384, (192, 384), (48, 128), 128),
}


class GoogLeNet(nn.Sequential):
    """Classify images with the textbook GoogLeNet: stem, nine Inception blocks, one linear layer.

    A plain ``nn.Sequential`` of five stages and a ``Linear``, so that its ``state_dict`` has the keys of the
    textbook's ``nn.Sequential(b1, b2, b3, b4, b5, nn.Linear(1024, 10))`` and loads with ``strict=True`` both ways.
    No dropout, no auxiliary heads, no batch normalisation.

    Around ``FastInception`` the layers are the same, and the stages that end in a pool run them by faster ways
    (:class:`fastinception.stem.Stage`), with the first block's backend.

    Args:
        block: called as ``block(in_channels, c1, c2, c3, c4)`` for each of the nine blocks: ``Inception``
            (the default), ``FastInception`` or anything with that signature.
        in_channels: channels of the images (1 for Fashion-MNIST).
        num_classes: width of the last layer.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``; the textbook uses H = W = 96.

    Raises:
        TypeError: ``in_channels`` or ``num_classes`` is not an int, or ``block`` cannot be called to make one.
        ValueError: one of the numbers is below 1.

    Example:
        >>> import torch
        >>> from fastinception import FastInception, GoogLeNet
        >>> net = GoogLeNet(block=FastInception)
        >>> net(torch.zeros(2, 1, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        block: Callable[..., nn.Module] = Inception,
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        def stage(*names: str) -> list[nn.Module]:
            return [make(*WIDTHS[name]) for name in names]

        def make(*widths: Any) -> nn.Module:
            try:
                made = block(*widths)
            except TypeError as error:
                raise TypeError(f"block must take {', '.join(Widths._fields)}; {block!r} did not: {error}") from error
            if not isinstance(made, nn.Module):
                raise TypeError(f"block must make a module, {block!r} made {made!r}")
            return made

        in_channels, num_classes = width("in_channels", in_channels), width("num_classes", num_classes)
        if isinstance(block, nn.Module) or not callable(block):
            raise TypeError(f"block must be a class such as FastInception, or a function, got {block!r}")

        def pool() -> nn.Module:
            return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        def relu() -> nn.Module:
            return nn.ReLU()  # not in place: a hook may keep, or watch, what a layer in front of it returns

        third = stage("3a", "3b")
        sequential: Callable[..., nn.Module] = nn.Sequential
        if isinstance(third[0], FastInception):
            sequential = partial(Stage, backend=third[0].backend)
        super().__init__(
            sequential(nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3), relu(), pool()),
            sequential(
                nn.Conv2d(64, 64, kernel_size=1),
                relu(),
                nn.Conv2d(64, 192, kernel_size=3, padding=1),
                relu(),
                pool(),
            ),
            sequential(*third, pool()),
            sequential(*stage("4a", "4b", "4c", "4d", "4e"), pool()),
            nn.Sequential(*stage("5a", "5b"), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
            nn.Linear(1024, num_classes),
        )

    def __getitem__(self, idx: int | slice) -> Any:
        # nn.Sequential builds a slice by calling its own class, and a part of the network is not a GoogLeNet.
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


def xavier_uniform_(net: nn.Module) -> nn.Module:
    """Set the weights of every convolution and linear layer as the textbook recipe does; biases stay.

    ``nn.init.xavier_uniform_`` (Glorot and Bengio 2010) on the global random generator. Returns ``net``.
    """

    def init(module: nn.Module) -> Any:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)

    return net.apply(init)
