"""The whole block as launches: forward in two, level by level, and backward in six at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinception.kernels import configs, library, target
from fastinception.kernels.data_gradient import Gradient, choose_tiles, data_gradient
from fastinception.kernels.data_gradient import parts as data_gradient_parts
from fastinception.kernels.entry import entry
from fastinception.kernels.entry_gradient import entry_gradient, pool_gradient
from fastinception.kernels.replay import Made
from fastinception.kernels.spatial import Conv, spatial
from fastinception.kernels.split import Branch, split
from fastinception.kernels.split import parts as split_parts
from fastinception.kernels.sums import Sum, add_up
from fastinception.kernels.weight_gradient import Division, Product, divide, weight_gradient


class Saved(NamedTuple):
    """What the backward needs, with M = N*H*W pixels. ``out`` is not among it: its owner may change it in place.

    r2, r3: what branches 2 and 3 convolve, ``[N, c2[0], H, W]`` and ``[N, c3[0], H, W]`` in channels_last.
    mask: where the output's ReLU passes a gradient, bits ``[M, bytes]`` uint8; each branch starts a byte.
    pooled: ``max_pool2d(x, 3, 1, 1)``, ``[M, K]``.
    codes: which pixel of its window each maximum is, uint8 ``[M, K]``.
    """

    r2: Tensor
    r3: Tensor
    mask: Tensor | None
    pooled: Tensor | None
    codes: Tensor | None


def widths(params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Return c1, c2[1], c3[1] and c4."""
    return params[0].shape[0], params[4].shape[0], params[8].shape[0], params[10].shape[0]


def mask_columns(widths: Sequence[int]) -> list[int]:
    """Return the byte at which each branch starts in a row of the packed ReLU mask, and the bytes of a row."""
    columns = [0]
    for width in widths:
        columns.append(columns[-1] + (width + 7) // 8)
    return columns


def empty_saved(x: Tensor, params: Sequence[Tensor], save: bool) -> Saved:
    """Allocate what the forward writes beside the output; without ``save``, r2 and r3 only."""
    n, channels, height, width = x.shape
    rows, dtype, device = n * height * width, x.dtype, x.device
    shapes = [(n, weight.shape[0], height, width) for weight in (params[2], params[6])]
    r2, r3 = [torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last) for size in shapes]
    if not save:
        return Saved(r2, r3, None, None, None)
    return Saved(
        r2,
        r3,
        torch.empty((rows, mask_columns(widths(params))[-1]), dtype=torch.uint8, device=device),
        torch.empty((rows, channels), dtype=dtype, device=device),
        torch.empty((rows, channels), dtype=torch.uint8, device=device),
    )


def _dense(made: Made, params: Sequence[Tensor]) -> list[Tensor]:
    """Return ``params`` as the kernels read them: of another layout, or expanded or sliced, copies."""
    # Of a contiguous spatial weight, consecutive elements of a tile would lie a kernel's taps apart.
    return [
        made.dense(p, torch.channels_last if p.dim() == 4 and p.shape[2:] != (1, 1) else torch.contiguous_format)
        for p in params
    ]


def forward(x: Tensor, params: Sequence[Tensor], out: Tensor, saved: Saved, *, relu: bool = True) -> Made:
    """Write the block of ``x`` to ``out``, ``[N, c1 + c2[1] + c3[1] + c4, H, W]``, and what is ``saved``.

    Without ``relu`` there is none behind any convolution, and no backward for it.
    """
    made = Made([], [])
    if x.numel() == 0:
        return made
    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = _dense(made, params)
    c1, c2, c3, _ = branches = widths(params)
    _, mask2, mask3, mask4, _ = mask_columns(branches)
    x = made.dense(x, torch.channels_last)
    r2, r3, *kept = saved
    level0 = entry(
        x, (w1, w21, w31), (b1, b21, b31), w42, b42, out, c1 + c2 + c3, (r2, r3),
        None if saved.mask is None else tuple(kept), mask4, relu=relu,
    )  # fmt: skip
    level = [
        Conv(r2, w22, b22, column=c1, mask_column=mask2, padding=(1, 1)),
        Conv(r3, w32, b32, column=c1 + c2, mask_column=mask3, padding=(2, 2)),
    ]
    made.launched.extend((level0, spatial(level, out, saved.mask, relu=relu)))
    return made


# The branches with a spatial convolution, and where its weight is among x and the twelve parameters.
SPATIAL = {1: 5, 2: 9}


class _Plan(NamedTuple):
    """Which launches a backward takes, and of what, by shapes and needs. Indices count branches from 0."""

    merged: int  # columns of the matrix for branch 1's gradient and the reductions'
    pooled: int  # columns of the pooled x's gradient, 0 without
    widths: tuple[int, ...]  # columns of the matrices that branches 2 to 4 have of their own, 0 without
    branches: tuple[Branch, ...]
    branch_of: tuple[int, ...]
    gradients: tuple[Gradient, ...]
    gradient_of: tuple[int, ...]
    tiles: configs.Tiles
    library: tuple[int, ...]  # whose weights' gradients the library computes
    products: tuple[Product, ...]
    product_of: tuple[int, ...]
    division: Division | None
    sums: tuple[Sum, ...]
    sum_of: tuple[int, ...]  # of the thirteen gradients
    partials: int  # elements


@configs.cached
def _plan(
    shape: torch.Size,
    weights: tuple[torch.Size, ...],
    needs: tuple[bool, ...],
    dtype: torch.dtype,
    gpu: target.Gpu,
) -> _Plan:
    """Plan a backward, given the weights' shapes."""
    n, channels, height, width = shape
    rows = n * height * width
    c1, c21, c2, c31, c3, c4 = (weight[0] for weight in weights)
    x, w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = range(13)
    partials = 0
    sums: dict[int, Sum] = {}

    def place(elements: int, parts: int, *outs: tuple[int, int]) -> int:
        """Reserve partial sums; ``outs`` are the gradients that are their rows in turn, and their elements."""
        nonlocal partials
        start = offset = partials
        for out, size in outs:
            if needs[out]:
                sums[out] = Sum(size, offset, parts, elements)
            offset += size
        partials += configs.cdiv(elements * parts, 16) * 16  # each begins where wide stores may
        return start

    def need(*indices: int) -> bool:
        return any(needs[i] for i in indices)

    reach2, reach3 = need(x, w21, b21), need(x, w31, b31)
    masks = mask_columns((c1, c2, c3, c4))
    branches, branch_of, column = [], [], 0
    for i, (columns, needed, bias) in enumerate((
        (c1, need(x, w1, b1), b1),
        (c2, reach2 or need(w22, b22), b22),
        (c3, reach3 or need(w32, b32), b32),
        (c4, need(x, w42, b42), b42),
    )):  # fmt: skip
        if needed:
            offset_of_sums = place(columns, split_parts(rows, gpu), (bias, columns))
            stride = columns if i else c1 + c21 + c31
            branches.append(Branch(columns, column, masks[i], stride, offset_of_sums))
            branch_of.append(i)
        column += columns

    tiles = choose_tiles(rows, (weights[2], weights[4], weights[5]), dtype, gpu)
    gradients, gradient_of = [], []
    for i, weight, reached, first, bias in ((1, weights[2], reach2, c1, b21), (2, weights[4], reach3, c1 + c21, b31)):
        if reached:
            offset_of_sums = place(weight[1], data_gradient_parts(rows, weight[1], tiles, gpu), (bias, weight[1]))
            gradients.append(Gradient(weight, True, c1 + c21 + c31, first, offset_of_sums))
            gradient_of.append(i)
    if needs[x]:
        gradients.append(Gradient(weights[5], False, channels))
        gradient_of.append(3)

    # The merged convolutions count as one.
    outs = (
        (Product(c1 + c21 + c31, channels, 1, 1), ((w1, c1 * channels), (w21, c21 * channels), (w31, c31 * channels))),
        (Product(c2, c21, 3, 3), ((w22, weights[2].numel()),)),
        (Product(c3, c31, 5, 5), ((w32, weights[4].numel()),)),
        (Product(c4, channels, 1, 1), ((w42, c4 * channels),)),
    )
    product_of = tuple(i for i, (_, wanted) in enumerate(outs) if need(*(out for out, _ in wanted)))
    by_library: tuple[int, ...] = ()
    division = divide((n, height, width), [outs[i][0] for i in product_of], dtype, gpu) if product_of else None
    if division is not None and division.tiles.library:
        by_library = tuple(i for i in product_of if i in SPATIAL)
        product_of = tuple(i for i in product_of if i not in SPATIAL)
        left = [outs[i][0] for i in product_of]
        division = divide((n, height, width), left, dtype, gpu, division.tiles) if left else None
    products = [outs[i][0] for i in product_of]
    for j, i in enumerate(product_of):
        assert division is not None
        elements = products[j].out_channels * products[j].columns
        products[j] = products[j]._replace(offset=place(elements, division.parts, *outs[i][1]))

    return _Plan(
        merged=c1 + c21 + c31 if need(x, w1, b1, w21, b21, w31, b31) else 0,
        pooled=channels if needs[x] else 0,
        widths=tuple(columns if i in branch_of else 0 for i, columns in ((1, c2), (2, c3), (3, c4))),
        branches=tuple(branches), branch_of=tuple(branch_of),
        gradients=tuple(gradients), gradient_of=tuple(gradient_of), tiles=tiles,
        library=by_library, products=tuple(products), product_of=product_of, division=division,
        sums=tuple(sums.values()), sum_of=tuple(sums), partials=partials,
    )  # fmt: skip


def backward(
    grad_out: Tensor, x: Tensor, params: Sequence[Tensor], saved: Saved, grads: Sequence[Tensor | None]
) -> Made:
    """Write the gradients of ``x`` and of the twelve params to ``grads``; None is not computed.

    Nothing is added by atomics: the same input gives the same bits.

    Args:
        grad_out: ``[N, c1 + c2[1] + c3[1] + c4, H, W]``, any strides; never written.
        x, params: what the forward got.
        saved: what the forward kept, of any strides: a hook may have changed them.
        grads: each of its tensor's shape; x's contiguous in either memory format, 4-D weights' in channels_last.
    """
    made = Made([], [])
    w1, w21, w22, w31, w32, w42 = _dense(made, params[::2])
    x, r2, r3 = (made.dense(t, torch.channels_last) for t in (x, saved.r2, saved.r3))
    mask, pooled, codes = (None if t is None else made.dense(t) for t in saved[2:])
    shape, dtype, device = x.shape, x.dtype, x.device
    n, _, height, width = shape
    size = n, height, width
    rows = n * height * width
    plan = _plan(
        shape, tuple([w.shape for w in (w1, w21, w22, w31, w32, w42)]), tuple([grad is not None for grad in grads]),
        dtype, target.gpu(device),
    )  # fmt: skip

    def empty(columns: int) -> Tensor | None:
        return torch.empty((rows, columns), dtype=dtype, device=device) if columns else None

    # Branch 1's gradient and the reductions' lie side by side, so that one product each gives what they lead to. What
    # nobody needs of them stays as it is: each column leads to its own weights alone, and where x needs it, all do.
    merged, grad_pooled = empty(plan.merged), empty(plan.pooled)
    masked: list[Any] = [merged, *map(empty, plan.widths)]
    sums_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    partials = torch.empty(plan.partials, dtype=sums_dtype, device=device)
    made.allocated.extend((*masked, grad_pooled, partials))
    launched = made.launched
    if plan.branches:
        launched.append(split(grad_out, mask, plan.branches, [masked[i] for i in plan.branch_of], partials))
    if plan.gradients:
        operands = {1: (w22, r2, merged), 2: (w32, r3, merged), 3: (w42, None, grad_pooled)}
        weights, actives, outs = zip(*[operands[i] for i in plan.gradient_of], strict=True)
        grads_of = [masked[i] for i in plan.gradient_of]
        launched.append(data_gradient(plan.gradients, grads_of, weights, actives, outs, size, partials, plan.tiles))
    if (grad_x := grads[0]) is not None:
        assert merged is not None
        assert grad_pooled is not None
        launched.append(pool_gradient(grad_pooled, codes, grad_x))
        launched.append(entry_gradient(merged, (w1, w21, w31), grad_x))
    sources = (x, r2, r3, pooled)
    for i in plan.library:
        library.weight_gradient(masked[i], sources[i], grads[SPATIAL[i]])
        launched.append(None)
    if plan.division is not None:
        grads_of, xs = [masked[i] for i in plan.product_of], [sources[i] for i in plan.product_of]
        launched.append(weight_gradient(plan.products, grads_of, xs, size, plan.division, partials))
    if plan.sums:
        results: list[Any] = [grads[i] for i in plan.sum_of]
        launched.append(add_up(plan.sums, results, partials))
    return made
