"""The whole block as launches: forward in two, level by level, and backward in six at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class _Plan(NamedTuple):
    """Which launches a backward takes, and of what, by shapes and needs.

    Branches count from 0. A gradient's number is its place among those of x and the twelve parameters.
    """

    merged: int  # columns of the matrix for branch 1's gradient and the reductions', 0 without
    branches: dict[int, Branch]  # but the first each has a matrix of its own
    gradients: dict[int, Gradient]  # by branch
    tiles: configs.Tiles  # of the gradients' launch
    library: dict[int, int]  # by branch, the number of a weight's gradient that the library computes
    products: dict[int, Product]  # by branch; the first is of all merged convolutions
    division: Division | None
    sums: dict[int, Sum]  # by the gradient's number
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
    size, rows = (n, height, width), n * height * width
    c1, c21, c2, c31, c3, c4 = (weight[0] for weight in weights)
    x, w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = range(13)
    merged = c1 + c21 + c31
    sums: dict[int, Sum] = {}
    partials = 0

    def place(parts: int, elements: dict[int, int]) -> int:
        """Reserve parts of some gradients, whose numbers of elements are given; return where the first begins."""
        nonlocal partials
        first = offset = partials
        of_part = sum(elements.values())
        for gradient, count in elements.items():
            if needs[gradient]:
                sums[gradient] = Sum(count, offset, parts, of_part)
            offset += count
        partials += configs.cdiv(of_part * parts, 16) * 16  # each begins where wide stores may
        return first

    def need(*gradients: int) -> bool:
        return any(needs[i] for i in gradients)

    reach2, reach3 = need(x, w21, b21), need(x, w31, b31)
    masks = mask_columns((c1, c2, c3, c4))
    branches, column = {}, 0
    for i, (columns, stride, needed, bias) in enumerate((
        (c1, merged, need(x, w1, b1), b1),
        (c2, c2, reach2 or need(w22, b22), b22),
        (c3, c3, reach3 or need(w32, b32), b32),
        (c4, c4, need(x, w42, b42), b42),
    )):  # fmt: skip
        if needed:
            offset = place(split_parts(rows, gpu), {bias: columns})
            branches[i] = Branch(columns, column, masks[i], stride, offset)
        column += columns

    tiles = choose_tiles(rows, (weights[2], weights[4], weights[5]), dtype, gpu)
    gradients = {}
    for i, weight, reached, column, bias in ((1, weights[2], reach2, c1, b21), (2, weights[4], reach3, c1 + c21, b31)):
        if reached:
            offset = place(data_gradient_parts(rows, weight[1], tiles, gpu), {bias: weight[1]})
            gradients[i] = Gradient(weight, True, merged, column, offset)
    if needs[x]:
        gradients[3] = Gradient(weights[5], False, channels)

    # Whose gradients the rows of a product are, and how many of them.
    results = {0: {w1: c1, w21: c21, w31: c31}, 1: {w22: c2}, 2: {w32: c3}, 3: {w42: c4}}
    products = {
        0: Product(merged, channels, 1, 1), 1: Product(c2, c21, 3, 3),
        2: Product(c3, c31, 5, 5), 3: Product(c4, channels, 1, 1),
    }  # fmt: skip
    products = {i: product for i, product in products.items() if need(*results[i])}
    division = divide(size, list(products.values()), dtype, gpu) if products else None
    by_library = {}
    if division is not None and division.tiles.library:
        by_library = {i: weight for i, weight in ((1, w22), (2, w32)) if i in products}
        products = {i: product for i, product in products.items() if i not in by_library}
        division = divide(size, list(products.values()), dtype, gpu, division.tiles) if products else None
    for i, product in products.items():
        elements = {gradient: count * product.columns for gradient, count in results[i].items()}
        products[i] = product._replace(offset=place(division.parts, elements))

    return _Plan(
        merged=merged if need(x, w1, b1, w21, b21, w31, b31) else 0,
        branches=branches, gradients=gradients, tiles=tiles,
        library=by_library, products=products, division=division, sums=sums, partials=partials,
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
    n, channels, height, width = shape
    size, rows = (n, height, width), n * height * width
    plan = _plan(
        shape, tuple([w.shape for w in (w1, w21, w22, w31, w32, w42)]), tuple([grad is not None for grad in grads]),
        dtype, target.gpu(device),
    )  # fmt: skip

    def empty(columns: int) -> Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=device)

    # Branch 1's gradient and the reductions' lie side by side, so that one product each gives what they lead to. What
    # nobody needs of them stays as it is: each column leads to its own weights alone, and where x needs it, all do.
    merged = empty(plan.merged) if plan.merged else None
    masked = {0: merged} | {i: empty(branch.stride) for i, branch in plan.branches.items() if i > 0}
    grad_pooled = None if grads[0] is None else empty(channels)
    sums_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    partials = torch.empty(plan.partials, dtype=sums_dtype, device=device)
    made.allocated.extend((*masked.values(), grad_pooled, partials))
    launched = made.launched
    if plan.branches:
        outs = [masked[i] for i in plan.branches]
        launched.append(split(grad_out, mask, tuple(plan.branches.values()), outs, partials))
    if plan.gradients:
        operands = {1: (w22, r2, merged), 2: (w32, r3, merged), 3: (w42, None, grad_pooled)}
        weights, actives, outs = zip(*[operands[i] for i in plan.gradients], strict=True)
        gradients, grads_of = tuple(plan.gradients.values()), [masked[i] for i in plan.gradients]
        launched.append(data_gradient(gradients, grads_of, weights, actives, outs, size, partials, plan.tiles))
    if (grad_x := grads[0]) is not None:
        launched.append(pool_gradient(grad_pooled, codes, grad_x))
        launched.append(entry_gradient(merged, (w1, w21, w31), grad_x))
    sources = (x, r2, r3, pooled)
    for i, weight in plan.library.items():
        library.weight_gradient(masked[i], sources[i], grads[weight])
        launched.append(None)
    if plan.products:
        products, grads_of = tuple(plan.products.values()), [masked[i] for i in plan.products]
        xs = [sources[i] for i in plan.products]
        launched.append(weight_gradient(products, grads_of, xs, size, plan.division, partials))
    if plan.sums:
        launched.append(add_up(tuple(plan.sums.values()), [grads[i] for i in plan.sums], partials))
    return made
