"""Compute the block with ATen operators: the backend where there is no Triton, and the block for any transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastinception.conv_backward import conv_backward

_MOST_ROWS = 7  # of the pool's result in one compiled loop: 12 (of 12) took less time in bfloat16, more in float32

# Everywhere below, params are the block's twelve in the order of its state_dict:
# p1_1, p2_1, p2_2, p3_1, p3_2, p4_2, a weight and a bias of each.


def compose(x: Tensor, params: Sequence[Tensor], relu: bool = True, pooled: Tensor | None = None) -> Tensor:
    """Return the block of ``x`` from differentiable operators without side effects: for any PyTorch transform.

    Without ``relu`` there is none behind any convolution. ``pooled`` stands for ``max_pool2d(x, 3, 1, 1)``.
    """
    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = params
    activation = torch.relu if relu else (lambda y: y)  # F.relu and F.max_pool2d are Python around these
    p1 = activation(F.conv2d(x, w1, b1))
    p2 = activation(F.conv2d(activation(F.conv2d(x, w21, b21)), w22, b22, padding=1))
    p3 = activation(F.conv2d(activation(F.conv2d(x, w31, b31)), w32, b32, padding=2))
    p4 = activation(F.conv2d(torch.max_pool2d(x, 3, 1, 1) if pooled is None else pooled, w42, b42))
    return torch.cat((p1, p2, p3, p4), dim=1)


def compose_for_inductor(x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return the block of ``x``, in channels_last, from the operators that Inductor compiles best on a CPU.

    For inference only. There the merged convolution gains less than the copies of its slices cost, and Inductor fuses
    ReLUs and concatenation anyway; what it does not do by itself is choose the layout, and let the pool's windows share
    what they have in common. Not to be differentiated: where values tie, a maximum of two halves the gradient, and a
    pool does not.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    return compose(x, params, pooled=_pool_for_inductor(x))


def _pool_for_inductor(x: Tensor) -> Tensor:
    """Return ``max_pool2d(x, 3, stride=1, padding=1)`` of x in channels_last, some rows of the result at a time.

    Inductor computes each number of a result by itself, here by nine loads and eight maxima. Results of one size that
    read the same are one loop, which computes once what they share: six rows that lie together need eight rows of
    maxima of three, half the loads and maxima. Alone the pool takes 0.4 to 0.65 of the time (AMD EPYC with AVX-512, and
    held to AVX2).
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value

    n, channels, height, width = x.shape
    rows = max(rows for rows in range(1, _MOST_ROWS + 1) if height % rows == 0) if has_static_value(height) else 1
    if rows == 1:
        return torch.max_pool2d(x, 3, 1, 1)
    # A pixel of the border once more changes no maximum, and unlike -inf is read without asking where it is.
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate").permute(0, 2, 3, 1)
    lines = []
    for i in range(rows + 2):
        line = padded[:, i : i + height - rows + 1 : rows]  # of each group of rows, [N, H / rows, W + 2, C]
        lines.append(torch.maximum(torch.maximum(line[:, :, :-2], line[:, :, 1:-1]), line[:, :, 2:]))
    pooled = []
    for i in range(0, rows, 2):
        shared = torch.maximum(lines[i + 1], lines[i + 2])
        pooled.append(torch.maximum(lines[i], shared))
        if i + 1 < rows:
            pooled.append(torch.maximum(shared, lines[i + 3]))
    return torch.stack(pooled, dim=2).view(n, height, width, channels).permute(0, 3, 1, 2)


def forward(x: Tensor, params: Sequence[Tensor], out: Tensor) -> None:
    """Write the block of ``x`` into ``out``.

    Every ReLU is the pass that moves a convolution's result to its place, so there is no concatenation. (oneDNN could
    fuse ReLU into the convolution, and gain 2 to 6%, but its ReLU turns NaN into 0.)
    """
    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = params
    x = x.contiguous(memory_format=torch.channels_last)
    p1, p2, p3, p4 = out.split((w1.shape[0], w22.shape[0], w32.shape[0], w42.shape[0]), dim=1)
    entry = F.conv2d(x, torch.cat((w1, w21, w31)), torch.cat((b1, b21, b31)))
    e1, e2, e3 = entry.split((w1.shape[0], w21.shape[0], w31.shape[0]), dim=1)
    torch.clamp_min(e1, 0, out=p1)
    r2 = torch.clamp_min(e2, 0).contiguous(memory_format=torch.channels_last)
    r3 = torch.clamp_min(e3, 0).contiguous(memory_format=torch.channels_last)
    torch.clamp_min(F.conv2d(r2, w22, b22, padding=1), 0, out=p2)
    torch.clamp_min(F.conv2d(r3, w32, b32, padding=2), 0, out=p3)
    torch.clamp_min(F.conv2d(_max_pool(x), w42, b42), 0, out=p4)


def forward_saving(x: Tensor, params: Sequence[Tensor], out: Tensor) -> tuple[Tensor, ...]:
    """Write the block of ``x`` into ``out`` and return what ``backward`` needs.

    What tells ReLU's gradient from 0 is kept apart from the output, which its owner may change in place, and costs
    no pass of its own: the convolutions' results, which the output is made from. Here the entry convolutions are not
    merged, because the copies of its slices would be kept as well, and cost what the merging gains.

    Returns:
        r2, r3: what branches 2 and 3 convolve, ``[N, c2[0], H, W]`` and ``[N, c3[0], H, W]``.
        p1, p2, p3, p4: the branches before their last ReLU, ``[N, c, H, W]``.
        pooled, indices: ``max_pool2d(x, 3, 1, 1)`` and int64 ``[N, K, H, W]``, where in a plane each came from.
        All in channels_last.
    """
    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = params
    x = x.contiguous(memory_format=torch.channels_last)
    p1 = F.conv2d(x, w1, b1)
    r2 = F.conv2d(x, w21, b21).relu_()
    p2 = F.conv2d(r2, w22, b22, padding=1)
    r3 = F.conv2d(x, w31, b31).relu_()
    p3 = F.conv2d(r3, w32, b32, padding=2)
    pooled, indices = torch.ops.aten.max_pool2d_with_indices(x, [3, 3], [1, 1], [1, 1])
    branches = (p1, p2, p3, F.conv2d(pooled, w42, b42))
    for branch, part in zip(branches, out.split([branch.shape[1] for branch in branches], dim=1), strict=True):
        torch.clamp_min(branch, 0, out=part)
    return r2, r3, *branches, pooled, indices


def _max_pool(x: Tensor) -> Tensor:
    """Return ``max_pool2d(x, 3, stride=1, padding=1)``: on a CPU a row of three, then a column of three.

    Four vectorised maxima take 0.4 to 0.9 of the time of ATen's pool, which always looks for the indices as well.
    """
    if x.device.type != "cpu":
        return F.max_pool2d(x, 3, 1, 1)
    for dim in (3, 2):
        last = x.shape[dim] - 1
        pooled = torch.empty_like(x)
        before, after = x.narrow(dim, 0, last), x.narrow(dim, 1, last)
        torch.maximum(before, after, out=pooled.narrow(dim, 1, last))
        pooled.narrow(dim, 0, 1).copy_(x.narrow(dim, 0, 1))
        torch.maximum(pooled.narrow(dim, 0, last), after, out=pooled.narrow(dim, 0, last))
        x = pooled
    return x


def backward(
    grad_out: Tensor, x: Tensor, params: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of ``x`` and the twelve params, None where ``needs`` says so.

    Args:
        grad_out: gradient of the output, any strides.
        saved: what :func:`forward_saving` returned.
        needs: thirteen flags, for ``x`` and the params.

    The three convolutions that read ``x`` share one gradient buffer: one product gives their data gradient, and adds
    it to the pool's, where three and three additions of x's size would be needed.
    """
    w1, _, w21, _, w22, _, w31, _, w32, _, w42, _ = params
    need_x, n1w, n1b, n21w, n21b, n22w, n22b, n31w, n31b, n32w, n32b, n42w, n42b = needs
    r2, r3, *branches, pooled, indices = saved
    grads_out = grad_out.split([branch.shape[1] for branch in branches], dim=1)
    x = x.contiguous(memory_format=torch.channels_last)

    def empty(channels: int) -> Tensor:
        shape = (x.shape[0], channels, *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def gradient(i: int, out: Tensor) -> Tensor:
        """Fill ``out`` with the gradient of a branch before its last ReLU, and return it."""
        return cast(Tensor, torch.ops.aten.threshold_backward.grad_input(grads_out[i], branches[i], 0, grad_input=out))

    grad_x = grad_w42 = grad_b42 = None
    if need_x or n42w or n42b:
        g4 = gradient(3, empty(w42.shape[0]))
        grad_pooled, grad_w42, grad_b42 = conv_backward(g4, pooled, w42, (need_x, n42w, n42b))
        if grad_pooled is not None:
            grad_x = torch.ops.aten.max_pool2d_with_indices_backward(
                grad_pooled, x, [3, 3], [1, 1], [1, 1], [1, 1], False, indices
            )

    reductions = (w1.shape[0], w21.shape[0], w31.shape[0])
    entry = empty(sum(reductions))
    e1, e2, e3 = entry.split(reductions, dim=1)
    need_entry = (need_x, n1w or n21w or n31w, n1b or n21b or n31b)
    if any(need_entry):
        gradient(0, e1)
    grads_spatial: list[Tensor | None] = []
    for i, e, r, weight, needs_conv in (
        (1, e2, r2, w22, (need_x or n21w or n21b, n22w, n22b)),
        (2, e3, r3, w32, (need_x or n31w or n31b, n32w, n32b)),
    ):
        g = gradient(i, empty(weight.shape[0])) if any(needs_conv) else e
        grad_r, *grads_conv = conv_backward(g, r, weight, needs_conv)
        grads_spatial += grads_conv
        if grad_r is not None:
            torch.ops.aten.threshold_backward.grad_input(grad_r, r, 0, grad_input=e)
        # Otherwise nobody asked for what the columns of e lead to, and nothing else depends on them.
    grad_w22, grad_b22, grad_w32, grad_b32 = grads_spatial

    grad_w: Tensor | None = None
    grad_b: Tensor | None = None
    if any(need_entry):
        grad_x, grad_w, grad_b = conv_backward(entry, x, torch.cat((w1, w21, w31)), need_entry, into=grad_x)
    grad_w1, grad_w21, grad_w31 = grad_w.split(reductions) if grad_w is not None else (None,) * 3
    grad_b1, grad_b21, grad_b31 = grad_b.split(reductions) if grad_b is not None else (None,) * 3
    grads = [
        grad_x, grad_w1, grad_b1, grad_w21, grad_b21, grad_w22, grad_b22,
        grad_w31, grad_b31, grad_w32, grad_b32, grad_w42, grad_b42,
    ]  # fmt: skip
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]
