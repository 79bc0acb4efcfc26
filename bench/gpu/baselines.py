"""Define what FastInception is held against beside the plain module: fused calls, no ReLU, and TF32 that truncates."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastinception.googlenet import GoogLeNet
from fastinception.reference import Inception


class ConvReLU(nn.Conv2d):
    """Convolution, bias and ReLU in one call of the library (inference only); in a dry run on a CPU, in two."""

    padding: tuple[int, ...]  # never one of the names that nn.Conv2d takes as well

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return F.relu(super().forward(x))
        return torch.cudnn_convolution_relu(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class LinearInception(Inception):
    """The textbook block without its ReLUs, as KernelBench has it (level 3, problem 6)."""

    def forward(self, x: Tensor) -> Tensor:
        p2, p3 = self.p2_2(self.p2_1(x)), self.p3_2(self.p3_1(x))
        return torch.cat((self.p1_1(x), p2, p3, self.p4_2(self.p4_1(x))), dim=1)


class FusedInception(LinearInception):
    """The textbook block on ``cudnn_convolution_relu``, in which its ReLUs are."""

    def __init__(self, *widths: Any) -> None:
        super().__init__(*widths)
        fuse(self)


class _TruncatedConv(torch.autograd.Function):
    """A convolution in fp64 whose products, the gradients' too, read operands in TF32, the bits below cut off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
        x, weight = _truncate(x), _truncate(weight)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        about = ((1, 1), ctx.padding, (1, 1), False, (0, 0), 1)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            _truncate(grads[0]), x, weight, None, *about, (True, True, False)
        )
        return dx, dweight, grads[0].sum((0, 2, 3)), None


def _truncate(t: Tensor) -> Tensor:
    return (t.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()


class TruncatedConv2d(nn.Conv2d):
    """An fp64 convolution that reads its operands as tensor cores read float32: in TF32, cut off and not rounded.

    No kernel that hands float32 to them as it is can be closer to the truth, whatever the library does.
    """

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _TruncatedConv.apply(x, self.weight, self.bias, self.padding)
        return out


def truncated(net: nn.Module) -> nn.Module:
    """Return a copy of a net in fp64 with every convolution a :class:`TruncatedConv2d`."""
    net = copy.deepcopy(net).double()
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = TruncatedConv2d
    return net


def fuse(net: nn.Module) -> None:
    """Make every convolution of ``net`` a :class:`ConvReLU`, in place, and every ReLU nothing."""
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = ConvReLU
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Identity())


def fused_googlenet() -> GoogLeNet:
    """Return the textbook network on ``cudnn_convolution_relu``, with the textbook's ``state_dict``."""
    net = GoogLeNet(block=FusedInception)
    fuse(net)
    return net


def compilations(mode: str, dry: bool) -> dict[str, dict[str, Any]]:
    """Return keywords of ``torch.compile`` by a variant's name: rivals, of which the best counts.

    Inductor can lose channels_last, in a backward above all (pytorch#189239); ``force_layout_optimization`` is the
    remedy. A dry run only traces: Inductor's compiler for CPUs is no part of what it tests.
    """
    name = "compiled" if mode == "default" else f"compiled {mode}"
    if dry:
        return {name: {"backend": "eager"}}
    options = torch._inductor.list_mode_options(mode)
    forced = options | {"force_layout_optimization": True}
    return {name: {"options": options}, f"{name}, force_layout_optimization": {"options": forced}}
