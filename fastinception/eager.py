"""Run a backend in eager mode past PyTorch's dispatcher, wherever nothing has to see an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinception import custom_op, ops
from fastinception.backends import only_dispatched
from fastinception.kernels import replay


class _Inception(torch.autograd.Function):
    """Call a backend past the dispatcher: to an operator with a derivative the host loses 100 us in each direction."""

    @staticmethod
    def forward(ctx: Any, backend: str, known: replay.Known, x: Tensor, *params: Tensor) -> Any:
        if backend == "aten":
            out, *saved = ops.aten_forward(x, *params)
        else:
            out, *saved = cast(tuple[Tensor, ...], ops.launch_forward(known, x, params, True, True))
        ctx.backend = backend
        ctx.save_for_backward(x, *params, *saved)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 15
        needs, saved = custom_op.needed(ctx, 13), ctx.saved_tensors
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or watched() or only_dispatched(grad_out):
            grads: Sequence[Tensor | None] = ops.DIFFERENTIATED[ctx.backend](grad_out, saved, needs)
        elif ctx.backend == "aten":
            with torch._C.DisableTorchFunctionSubclass():  # whatever comes upstream, the gradients are tensors
                grads = ops.aten_gradients(grad_out, *saved, needs)
        else:
            grads = ops.triton_gradients(grad_out, *saved, needs)
        return None, None, *grads


def watched() -> bool:
    """Tell whether a dispatch mode, a trace or a transform meets the operators: then the block has to be one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def run_triton(known: replay.Known, x: Tensor, params: Sequence[Tensor], needs_grad: bool, relu: bool) -> Tensor:
    """Return the block of ``x`` by Triton; what is ``known`` of its operands serves, and grows.

    The caller has seen to it that nothing watches.
    """
    if needs_grad:
        return cast(Tensor, _Inception.apply("triton", known, x, *params))
    return cast(Tensor, ops.launch_forward(known, x, params, False, relu)[0])


def run(backend: str, x: Tensor, params: Sequence[Tensor], needs_grad: bool, relu: bool = True) -> Tensor:
    """Return the block of ``x`` by a backend's operator, or as that would compute it where nothing watches.

    By Triton and without a derivative also without ``relu``.
    """
    if not relu and (needs_grad or backend == "aten"):
        raise ValueError("only Triton's forward comes without ReLU")
    if backend == "triton" and not needs_grad:
        return cast(Tensor, torch.ops.fastinception.triton_inference(x, *params, relu))
    if backend == "aten" and needs_grad and not watched() and not any(map(Tensor.is_neg, (x, *params))):
        return cast(Tensor, _Inception.apply("aten", {}, x, *params))
    out, *_ = getattr(torch.ops.fastinception, f"{backend}_forward")(x, *params)
    return cast(Tensor, out)
