"""Pool faster than PyTorch where it can be done: in compiled training on a CPU, and in eager mode on a GPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastinception import backends, custom_op
from fastinception.pool_relu import is_launchable, launch

_SETTINGS = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"


class MaxPool2d(nn.MaxPool2d):
    """Pool as ``torch.nn.MaxPool2d`` does, faster in two places, with the same values and gradients.

    Where ``torch.compile`` trains on a CPU, ATen's kernels run instead of the loops that Inductor writes, which do not
    vectorise. On a GPU that runs Triton, in eager mode in channels_last, windows of 3x3 around every second pixel are
    one launch, and so is their gradient, which goes by a byte for each maximum; ATen's kernels write and read an int64
    index. Everywhere else, and where indices are asked for, it is ``torch.nn.MaxPool2d`` itself. It has no parameters.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as for ``torch.nn.MaxPool2d``.

    Shape:
        As ``torch.nn.MaxPool2d``: ``[N, C, H, W]`` to ``[N, C, H_out, W_out]``.

    Attributes:
        backend: ``"aten"`` keeps Triton out; ``"triton"`` asks for it on CPU tensors, in Triton's interpreter. A pool
            starts with what the environment variable FASTINCEPTION_BACKEND says when it is built.
    """

    backend: str = "auto"
    __prepare_scriptable__ = backends.refuse_script

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backends.check("auto")

    def forward(self, input: Tensor) -> Tensor:
        return max_pool(self, self.backend, input)


def max_pool(pool: nn.MaxPool2d, backend: str, input: Tensor) -> Tensor:
    """Return what the forward of :class:`MaxPool2d` does of a pool, which may be ``torch.nn.MaxPool2d``'s."""
    if (
        torch.compiler.is_compiling()
        and not backends.exporting()
        and not torch._C._are_functorch_transforms_active()
        and torch.is_grad_enabled()
        and input.requires_grad
        and input.device.type == "cpu"
        and input.dim() == 4
        and not pool.return_indices
    ):
        settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        pooled, _ = torch.ops.fastinception.max_pool2d(input, *settings)
        return cast(Tensor, pooled)
    if (
        isinstance(input, Tensor)
        and backends.by_triton(backend, input)
        and is_around_every_second(pool)
        and is_launchable(input)
    ):
        return launch(input)
    return cast(Tensor, nn.MaxPool2d.forward(pool, input))


def is_around_every_second(pool: nn.MaxPool2d) -> bool:
    """Tell whether a pool's windows are 3x3 around every second pixel."""

    def are(size: Any, number: int) -> bool:  # NumPy's integers make an array of a comparison with a tuple
        return tuple(size) == (number, number) if isinstance(size, (tuple, list)) else bool(size == number)

    return (
        are(pool.kernel_size, 3)
        and are(pool.stride, 2)
        and are(pool.padding, 1)
        and are(pool.dilation, 1)
        and not pool.ceil_mode
        and not pool.return_indices
    )


def _max_pool2d(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], torch.ops.aten.max_pool2d_with_indices(x, *settings))


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
    # A tangent of grad_out passes through plain operators only.
    run = _max_pool2d_backward if forward_ad._current_level >= 0 else torch.ops.fastinception.max_pool2d_backward
    return (run(grad_out, x, *ctx.settings, indices), *(None,) * 5)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[-1])


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return grad.flatten(2).gather(2, indices.flatten(2)).view(indices.shape), *(None,) * 7


custom_op.define(
    "max_pool2d_backward",
    f"(Tensor grad_out, Tensor x, {_SETTINGS}, Tensor indices) -> Tensor",
    _max_pool2d_backward,
    _max_pool2d_backward,
    _differentiate_backward,
    _setup_backward,
)
custom_op.define(
    "max_pool2d",
    f"(Tensor x, {_SETTINGS}) -> (Tensor out, Tensor indices)",
    _max_pool2d,
    _max_pool2d,
    _differentiate,
    _setup,
)
