"""Time the network's first stage, of images of one channel: the library's convolution and pool, and Triton's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.case import Candidate, Case, Context, Row, contest, output_error, unsearched
from bench.gpu.kernels import SIZES
from fastinception import Conv2d, first_layer

STRIDE, PADDING = 2, 3
POOL = [3, 3], [2, 2], [1, 1]
Results = tuple[Tensor, ...]


def cases(context: Context) -> list[Case]:
    """List the stage at both sizes; in a dry run at one so small that the interpreter runs it."""
    sizes = ((2, 32),) if context.dry else SIZES
    return [Case(f"{batch}x{side}x{side}", partial(_case, batch, side, context)) for batch, side in sizes]


def _case(batch: int, side: int, context: Context) -> list[Row]:
    torch.manual_seed(0)
    dtype = torch.float16 if context.dry else torch.bfloat16
    conv = Conv2d(1, 64, kernel_size=7, stride=STRIDE, padding=PADDING).to(context.device, dtype).requires_grad_(False)
    x = torch.rand(batch, 1, side, side, device=context.device).to(dtype)
    kernel, bias = conv.parameters()
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, kernel))
    settings = (STRIDE, STRIDE), (PADDING, PADDING)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *settings))

    def forward() -> Tensor:
        return F.relu(F.conv2d(x, weight, bias, *settings))

    def backward(grad: Tensor = grad, x: Tensor = x, weight: Tensor = weight) -> Results:
        options = [64], *settings, [1, 1], False, [0, 0], 1, [False, True, True]
        found: Results = torch.ops.aten.convolution_backward(grad, x, weight, *options)[1:]
        return found

    def by_triton() -> Results:
        found: Results = torch.ops.fastinception.first_layer_backward(grad, x, weight, STRIDE, [False, True, True])[1:]
        return found

    y = F.conv2d(x, weight, None, *settings)
    pooled, codes = torch.ops.fastinception.max_pool_relu(y, bias, True)
    grad_pooled = torch.randn_like(pooled)

    def pool(y: Tensor = y, bias: Tensor = bias) -> tuple[Tensor, Tensor, Tensor]:
        rectified = F.relu(y + bias.view(-1, 1, 1))
        return rectified, *torch.ops.aten.max_pool2d_with_indices(rectified, *POOL)

    def pool_backward(grad: Tensor, rectified: Tensor, indices: Tensor) -> Results:
        unpooled = torch.ops.aten.max_pool2d_with_indices_backward(grad, rectified, *POOL, [1, 1], False, indices)
        found = torch.ops.aten.threshold_backward(unpooled, rectified, 0)
        return found, found.sum((0, 2, 3))

    def pool_by_triton() -> Tensor:
        found: Tensor = torch.ops.fastinception.max_pool_relu(y, bias, True)[0]
        return found

    def pool_backward_by_triton() -> Results:
        needs = [True, True]
        found: Results = torch.ops.fastinception.max_pool_relu_backward(grad_pooled, codes, *y.shape[2:], needs)
        return found

    rectified, _, indices = pool()
    runs: dict[str, dict[str, Callable[[], Tensor | Results]]] = {
        "forward": {
            "plain forward": forward,
            "forward": partial(first_layer.launch, x, weight, bias, STRIDE, relu=True),
        },
        "backward": {
            "plain backward": backward,
            "backward": by_triton,
        },
        "pool": {
            "plain pool": lambda: pool()[1],
            "pool": pool_by_triton,
        },
        "pool backward": {
            "plain pool backward": partial(pool_backward, grad_pooled, rectified, indices),
            "pool backward": pool_backward_by_triton,
        },
    }
    with unsearched():
        exact = x.double(), weight.double()
        # Without the ties that rounding the sum makes: the plain pool's gradient has their error, Triton's has none.
        exact_rectified, exact_pooled, exact_indices = pool(y.double(), bias.double())
        truth: dict[str, Tensor | Results] = {
            "forward": F.relu(F.conv2d(*exact, bias.double(), *settings)),
            "backward": backward(grad.double(), *exact),
            "pool": exact_pooled,
            "pool backward": pool_backward(grad_pooled.double(), exact_rectified, exact_indices),
        }
    rows = []
    for direction, ways in runs.items():
        makers = {name: partial(_candidate, run, truth[direction]) for name, run in ways.items()}
        rows += contest(makers, context, cold=True)
    return rows


def _candidate(run: Callable[[], Tensor | Results], truth: Tensor | Results) -> Candidate:
    return Candidate(run, output_error(_numbers(run()), _numbers(truth)))


def _numbers(results: Tensor | Results) -> Tensor:
    """Return all results' numbers, each result divided by what it has of them: none hides behind a larger one."""
    results = (results,) if isinstance(results, Tensor) else results
    return torch.cat([t.double().flatten() / t.numel() ** 0.5 for t in results])
