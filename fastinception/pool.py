"""Keep max pools out of Inductor's hands when a network is trained on a CPU: its loops for them do not vectorise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastinception import custom_op

_SETTINGS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"


class MaxPool2d(nn.MaxPool2d):
    """Pool as ``torch.nn.MaxPool2d`` does, and faster where ``torch.compile`` trains on a CPU.

    There ATen's kernels run instead of the loops that Inductor writes: the same values, the same gradients.
    Everywhere else, and where indices are asked for, it is ``torch.nn.MaxPool2d`` itself. It has no parameters.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as for ``torch.nn.MaxPool2d``.

    Shape:
        As ``torch.nn.MaxPool2d``: ``[N, C, H, W]`` to ``[N, C, H_out, W_out]``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            and not torch.compiler._is_exporting_flag
            and not torch._C._are_functorch_transforms_active()
            and torch.is_grad_enabled()
            and input.requires_grad
            and input.device.type == "cpu"
            and input.dim() == 4
            and not self.return_indices
        ):
            settings = map(_pair, (self.kernel_size, self.stride, self.padding, self.dilation))
            pooled, _ = torch.ops.fastinception.max_pool2d(input, *settings, self.ceil_mode)
            return cast(Tensor, pooled)
        return cast(Tensor, super().forward(input))


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


torch.library.define(
    "fastinception::max_pool2d", f"(Tensor x, {_SETTINGS}) -> (Tensor out, Tensor indices)", tags=custom_op.TAGS
)
torch.library.define(
    "fastinception::max_pool2d_backward",
    f"(Tensor grad_out, Tensor x, {_SETTINGS}, Tensor indices) -> Tensor",
    tags=custom_op.TAGS,
)


@torch.library.impl("fastinception::max_pool2d", "default")
def _max_pool2d(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], torch.ops.aten.max_pool2d_with_indices(x, *settings))


@torch.library.impl("fastinception::max_pool2d_backward", "default")
def _max_pool2d_backward(grad_out: Tensor, x: Tensor, *args: Any) -> Tensor:
    return cast(Tensor, torch.ops.aten.max_pool2d_with_indices_backward(grad_out, x, *args))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1])


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    x, indices = ctx.saved_tensors
    grad = torch.ops.fastinception.max_pool2d_backward(grad_out, x, *ctx.settings, indices)
    return (grad, *(None,) * 5)


torch.library.register_fake("fastinception::max_pool2d", _max_pool2d)
torch.library.register_fake("fastinception::max_pool2d_backward", _max_pool2d_backward)
torch.library.register_autograd("fastinception::max_pool2d", _differentiate, setup_context=_setup)
