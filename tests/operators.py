"""The block as a function of thirteen tensors, by the textbook and by each backend's operators, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastinception.functional import inception
from fastinception.kernels import target

HAS_TRITON = target.unsupported(torch.device("cpu"), torch.float32) is None
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here"))
BACKENDS = ("aten", TRITON)
FORMATS = (torch.channels_last, torch.contiguous_format)
WIDTHS = (5, 3, (4, 6), (2, 3), 2)
FORWARD = {backend: getattr(torch.ops.fastinception, f"{backend}_forward") for backend in ("aten", "triton")}
BACKWARD = {backend: getattr(torch.ops.fastinception, f"{backend}_backward") for backend in ("aten", "triton")}
ONE = (1, 1, (1, 1), (1, 1), 1)


def block(
    shape: tuple[int, int, int] = (2, 4, 3),
    widths: tuple[int, int, tuple[int, int], tuple[int, int], int] = WIDTHS,
    *,
    format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
    seed: int = 0,
) -> list[Tensor]:
    """Return x ``[N, K, H, W]`` and the twelve parameters, leaves."""
    k, c1, c2, c3, c4 = widths
    n, h, w = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [randn(n, k, h, w).contiguous(memory_format=format)]
    sizes = (c1, k, 1), (c2[0], k, 1), (c2[1], c2[0], 3), (c3[0], k, 1), (c3[1], c3[0], 5), (c4, k, 1)
    for o, i, size in sizes:
        tensors += [randn(o, i, size, size), randn(o)]
    return [t.requires_grad_(grad) for t in tensors]


def randn_like(y: Tensor, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def plain(x: Tensor, *params: Tensor) -> Tensor:
    """Return the block as the textbook writes it."""
    f, relu = torch.nn.functional, torch.nn.functional.relu
    w1, b1, w21, b21, w22, b22, w31, b31, w32, b32, w42, b42 = params
    p1 = relu(f.conv2d(x, w1, b1))
    p2 = relu(f.conv2d(relu(f.conv2d(x, w21, b21)), w22, b22, padding=1))
    p3 = relu(f.conv2d(relu(f.conv2d(x, w31, b31)), w32, b32, padding=2))
    p4 = relu(f.conv2d(f.max_pool2d(x, 3, 1, 1), w42, b42))
    return torch.cat((p1, p2, p3, p4), 1)


def fast(backend: str) -> Callable[..., Tensor]:
    return lambda x, *params: inception(x, params, backend=backend)


def gradients(f: Callable[..., Tensor], tensors: Sequence[Tensor], grad_out: Tensor | None = None) -> list[Tensor]:
    y = f(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    return list(torch.autograd.grad(y, wanted, randn_like(y) if grad_out is None else grad_out))


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], **tolerance: float) -> None:
    """Check float64 results against each other; far from any error but a rounding."""
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-10}
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, **tolerance, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")
