"""Register the block as operators, for each backend one in each direction: ``torch.ops.fastinception.*``.

``aten_forward`` and ``triton_forward`` allocate and return the output, and behind it what ``aten_backward`` and
``triton_backward`` need; ``triton_inference`` returns the output alone, and ``inception_out`` writes into the caller's:
these have no gradient. The backward's own derivative is computed from plain operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinception import aten, backends, custom_op
from fastinception.kernels import replay

_NAMES = ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2")
_PARAMS = ", ".join(f"Tensor {name}_weight, Tensor {name}_bias" for name in _NAMES)


@functools.cache
def _launches() -> Any:
    """Import the kernels, which need Triton as this module does not, once: Python's own look-up costs 1 us a call."""
    from fastinception.kernels import block

    return block


def _dense(x: Tensor, shape: Sequence[int], format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)


def _widths(params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    return params[0].shape[0], params[4].shape[0], params[8].shape[0], params[10].shape[0]


def fitting_shapes(x: Tensor, params: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of the params that fit ``x`` and the weights' first sizes."""
    k = x.shape[1]
    c1, c21, c22, c31, c32, c42 = (weight.shape[0] if weight.shape else 0 for weight in params[::2])
    return [
        (c1, k, 1, 1), (c1,), (c21, k, 1, 1), (c21,), (c22, c21, 3, 3), (c22,),
        (c31, k, 1, 1), (c31,), (c32, c31, 5, 5), (c32,), (c42, k, 1, 1), (c42,),
    ]  # fmt: skip


def output_shape(x: Tensor, params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Return the shape of the block's output, ``[N, c1 + c2[1] + c3[1] + c4, H, W]``."""
    return x.shape[0], sum(_widths(params)), x.shape[2], x.shape[3]


def empty_output(x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Allocate the block's output."""
    return _dense(x, output_shape(x, params), output_format(x, params))


def output_format(x: Tensor, params: Sequence[Tensor]) -> torch.memory_format:
    """Return the plain block's memory format for ``x``: channels_last if x is, or all branches are.

    A branch is where one of its weights is.
    """
    format = custom_op.memory_format(x)
    if format is torch.contiguous_format:
        w1, w21, w22, w31, w32, w42 = (custom_op.memory_format(weight) is torch.channels_last for weight in params[::2])
        if w1 and (w21 or w22) and (w31 or w32) and w42:
            format = torch.channels_last
    return format


def _empty_aten_outputs(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """Allocate what ``aten_forward`` returns, see :func:`aten.forward_saving`."""
    n, channels, height, width = x.shape
    widths = (params[2].shape[0], params[6].shape[0], *_widths(params), channels)
    saved = [_dense(x, (n, c, height, width), torch.channels_last) for c in widths]
    return empty_output(x, params), *saved, torch.empty_like(saved[-1], dtype=torch.int64)


def _empty_triton_outputs(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """Allocate what ``triton_forward`` returns, see :class:`fastinception.kernels.block.Saved`."""
    return empty_output(x, params), *cast(Sequence[Tensor], _launches().empty_saved(x, params, True))


def aten_forward(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    out = empty_output(x, params)
    with torch.autocast(x.device.type, enabled=False):  # it would narrow what is saved, and not the output
        saved = aten.forward_saving(x, params, out)
    return out, *(custom_op.as_promised(tensor, _channels_last_strides(tensor.shape)) for tensor in saved)


def _triton_forward(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    return tuple(cast(Sequence[Tensor], launch_forward(replay.known((x, *params)), x, params, True, True)))


def _triton_inference(x: Tensor, *args: Any) -> Tensor:
    *params, relu = args
    return cast(Tensor, launch_forward(replay.known((x, *params)), x, params, False, relu)[0])


def launch_forward(
    known: replay.Known, x: Tensor, params: Sequence[Tensor], save: bool, relu: bool, out: Tensor | None = None
) -> Sequence[Tensor | None]:
    """Return the output and what is saved by Triton; what is ``known`` of the operands serves, and grows.

    The output is the caller's ``out``, if there is one, which is an operand then.
    """
    operands = (x, *params) if out is None else (x, *params, out)
    if (call := known.get((save, relu))) is not None:
        return cast(Sequence[Tensor | None], call(*operands))
    block, result = _launches(), empty_output(x, params) if out is None else out
    saved = block.empty_saved(x, params, save)
    run, results = functools.partial(block.forward, x, params, result, saved, relu=relu), (result, *saved)
    if (save, relu) in known:
        run()
    else:
        replay.compile(run, x)
        launched, copies = run()
        allocated = [*(results if out is None else saved), *copies]
        known[save, relu] = replay.record(launched, operands, allocated, results)
    return results


def _channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels


def _inception_out(x: Tensor, *args: Any) -> None:
    params, backend, out, relu = list(args[:12]), args[12], args[13], args[14] if len(args) > 14 else True
    check_overlap(out, (x, *params))
    if backend == "aten" and not relu:
        raise ValueError("only Triton's forward comes without ReLU")
    if backend == "triton":
        launch_forward(replay.known((x, *params, out)), x, params, False, relu, out)
    elif not backends.widened(x.dtype, x):
        aten.forward(x, params, out)
    else:
        wide, *params = [t.float() for t in (x, *params)]
        result = torch.empty_like(out, dtype=wide.dtype)
        with torch.autocast(x.device.type, enabled=False):  # it would narrow the convolutions' operands again
            aten.forward(wide, params, result)
        out.copy_(result)


def check_overlap(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise ValueError if ``out`` shares addresses with an input; neighbours that merely touch do not."""

    def addresses(t: Tensor) -> tuple[int, int]:
        extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
        return t.data_ptr(), t.data_ptr() + extent * t.element_size()

    first, end = addresses(out)
    for tensor in inputs:
        if tensor.numel() and out.numel() and tensor.device == out.device:
            other_first, other_end = addresses(tensor)
            if first < other_end and other_first < end:
                raise ValueError("out must not share memory with x or with a parameter")


def aten_gradients(grad_out: Tensor, x: Tensor, *args: Any) -> list[Tensor | None]:
    params, saved, needs = args[:12], args[12:-1], args[-1]
    with torch.autocast(x.device.type, enabled=False):  # it would cast for some of the products and not for others
        grads = aten.backward(grad_out, x, params, saved, needs)
    return custom_op.finish(grads, (x, *params))


def triton_gradients(grad_out: Tensor, x: Tensor, *args: Any) -> Sequence[Tensor | None]:
    """Return the gradients by Triton, given what ``triton_backward`` is."""
    params, saved, needs = args[:12], args[12:17], tuple(args[17])
    operands = (grad_out, x, *params, *saved)
    known = replay.known(operands)  # .data and hooks may have changed what the forward saw
    if (call := known.get(needs)) is not None:
        return cast(Sequence[Tensor | None], call(*operands))
    block, inputs = _launches(), (x, *params)
    grads = [_dense(x, x.shape, custom_op.memory_format(x)) if needs[0] else None]
    grads += [_empty_gradient(t) if need else None for t, need in zip(params, needs[1:], strict=True)]
    run = functools.partial(block.backward, grad_out, x, params, block.Saved(*saved), grads)
    if needs not in known:
        _check_operands(*operands)
        replay.compile(run, x)
    launched, allocated = run()
    fits = all(grad is None or grad.stride() == t.stride() for grad, t in zip(grads, inputs, strict=True))
    if needs not in known:
        call = replay.record(launched, operands, [*grads, *allocated], grads)
        known[needs] = call if fits or call is None else functools.partial(_replay_and_finish, call)
    return grads if fits else custom_op.finish(grads, inputs)


def _replay_and_finish(call: replay.Replay, *operands: Tensor) -> list[Tensor | None]:
    return custom_op.finish(call(*operands), operands[1:14])


def _check_operands(grad_out: Tensor, x: Tensor, *args: Tensor) -> None:
    """Raise RuntimeError where the kernels would pass the end of a tensor: ``.data`` or a hook may have changed it."""
    params, saved, own, byte = args[:12], args[12:], x.dtype, torch.uint8
    n, channels, height, width = x.shape
    pixels, mask_bytes = n * height * width, _launches().mask_columns(_widths(params))[-1]
    expected: list[tuple[Any, torch.dtype]] = [(output_shape(x, params), own)]
    expected += [((n, weight.shape[0], height, width), own) for weight in (params[2], params[6])]
    expected += [((pixels, mask_bytes), byte), ((pixels, channels), own), ((pixels, channels), byte)]
    expected += [(shape, own) for shape in fitting_shapes(x, params)]
    found = [(t.shape, t.dtype) for t in (grad_out, *saved, *params)]
    if found != expected or any(t.device != x.device for t in (grad_out, *saved, *params)):
        raise RuntimeError(
            "x, a parameter or what was saved has another shape, dtype or device in the backward than in the forward"
        )


def _empty_gradient(t: Tensor) -> Tensor:
    """Allocate a parameter's gradient as the kernels write it: a spatial weight's in channels_last."""
    if t.is_contiguous() and (t.dim() == 1 or t.shape[2:] == (1, 1)):
        return torch.empty_like(t)
    if t.dim() == 1:
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    return _dense(t, t.shape, torch.channels_last)


def _setup_forward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # or zeros would be made of what is saved, every time
    ctx.save_for_backward(*inputs, *saved)


def _no_backward(ctx: Any, grad_out: Tensor) -> None:
    raise RuntimeError("fastinception::triton_inference keeps nothing for a backward: triton_forward was expected")


def _compose_backward(grad_out: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the block composed of plain operators: slower, and any transform applies to them."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the derivative ends here and the tensors keep their place in an outer graph.
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        out = aten.compose(inputs[0], inputs[1:])
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    ctx.save_for_backward(*inputs[:14])


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the backward a second time, through the block composed of plain operators."""

    def backward(grad_out: Tensor, *rest: Any) -> list[Tensor | None]:
        return _compose_backward(grad_out, rest[:-1], rest[-1])

    return custom_op.differentiate_twice(ctx, grads, backward)


def _define(
    backend: str, saved: str, forward: Any, fake: Any, gradients: Any
) -> Callable[[Tensor, Sequence[Tensor], list[bool]], list[Tensor | None]]:
    """Define the two operators of a backend that keeps what is ``saved``.

    Returns:
        The gradients, which have a derivative, of the upstream one, of what autograd saved, and of what is needed.
    """

    def run(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return custom_op.without_none(gradients(grad_out, *args), like=grad_out)

    def empty(grad_out: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return custom_op.empty_gradients((x, *args[:12]), args[-1])

    schema = f"(Tensor grad_out, Tensor x, {_PARAMS}, {saved}, bool[] needs) -> ({', '.join(['Tensor'] * 13)})"
    custom_op.define(f"{backend}_backward", schema, run, empty, _differentiate_backward, _setup_backward)
    operator = getattr(torch.ops.fastinception, f"{backend}_backward")

    def differentiate(grad_out: Tensor, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor | None]:
        if forward_ad._current_level >= 0:  # a tangent of grad_out passes through plain operators only
            return _compose_backward(grad_out, saved[:13], needs)
        grads = operator(grad_out, *saved, needs)
        return [grad if need else None for grad, need in zip(grads, needs, strict=True)]

    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> Sequence[Tensor | None]:
        if grad_out is None:
            return (None,) * 13
        return tuple(differentiate(grad_out, ctx.saved_tensors, custom_op.needed(ctx, 13)))

    schema = f"(Tensor x, {_PARAMS}) -> (Tensor out, {saved})"
    custom_op.define(f"{backend}_forward", schema, forward, fake, backward, _setup_forward)
    return differentiate


DIFFERENTIATED = {
    "aten": _define(
        "aten",
        "Tensor r2, Tensor r3, Tensor p1, Tensor p2, Tensor p3, Tensor p4, Tensor pooled, Tensor indices",
        aten_forward,
        _empty_aten_outputs,
        aten_gradients,
    ),
    "triton": _define(
        "triton",
        "Tensor r2, Tensor r3, Tensor mask, Tensor pooled, Tensor codes",
        _triton_forward,
        _empty_triton_outputs,
        triton_gradients,
    ),
}
custom_op.define(
    "triton_inference",
    f"(Tensor x, {_PARAMS}, bool relu) -> Tensor",
    _triton_inference,
    lambda x, *args: empty_output(x, args[:12]),
    _no_backward,
    lambda ctx, inputs, output: None,
)
custom_op.define(
    "inception_out",
    f"(Tensor x, {_PARAMS}, str backend, Tensor(a!) out, bool relu=True) -> ()",
    _inception_out,
    lambda x, *args: None,
)
