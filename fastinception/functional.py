"""Check the arguments of a block and hand them to the backend that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastinception import aten, backends, custom_op, ops
from fastinception.backends import Path
from fastinception.kernels import replay

ACTIVATIONS = ("relu", "none")
# Elements of x up to which standard operators compute a block faster on a CPU, in both modes (measured with AVX2): they
# need no slices and no autograd function. Of 96x96 images these are 9 in block 3a, and 35 in 5b.
FEW = 2**18


def inception(
    x: Tensor,
    params: Sequence[Tensor],
    *,
    backend: str = "auto",
    out: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Return the Inception block of ``x``: four branches, each convolution followed by a ReLU, side by side.

    The functional form of :class:`fastinception.Inception`. Under autocast ``x`` and ``params`` are cast to its
    dtype first, but for those in float64, as ``torch.nn.functional.conv2d`` does.

    Args:
        x: ``[N, K, H, W]``, floating, any strides; channels_last is fastest.
        params: weight and bias of ``p1_1, p2_1, p2_2, p3_1, p3_2, p4_2``: ``[c1, K, 1, 1]``, ``[c2[0], K, 1, 1]``,
            ``[c2[1], c2[0], 3, 3]``, ``[c3[0], K, 1, 1]``, ``[c3[1], c3[0], 5, 5]``, ``[c4, K, 1, 1]``, each with
            a bias of its first size; x's dtype and device.
        backend: ``"auto"``, ``"triton"`` or ``"aten"``; FASTINCEPTION_BACKEND, which modules read, says nothing here.
        out: ``[N, c1 + c2[1] + c3[1] + c4, H, W]`` to write into and return, contiguous or channels_last; only
            where no gradient is recorded.
        activation: ``"relu"``, or ``"none"`` for the convolutions and the pool alone; where a gradient is recorded
            standard operators compute that.

    Returns:
        ``out``, or a new tensor in the memory format of PyTorch's convolutions: channels_last where ``x`` is, or a
        weight of each branch, else contiguous.

    Raises:
        TypeError: a tensor has a wrong type or dtype.
        ValueError: a tensor has a wrong shape or device, ``out`` cannot be used, the backend cannot run, or the
            activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    relu = activation == "relu"
    x, params = _cast(x, params)
    if out is not None:
        return _write(out, x, params, backend, relu)
    seen = _seen_like(x, backend, relu, params)
    way = None if seen is None else replay.recall(seen, (x, *params))
    if way is None:
        way = _choose(x, params, backend, relu)
        if seen is not None:
            replay.remember(seen, (x, *params), way)
    return _compute(way, x, params)


class _Way(NamedTuple):
    """How a call is computed, and all like it."""

    path: str  # as in Path
    relu: bool
    needs_grad: bool
    known: replay.Known | None  # of launches for such operands, by Triton and where nothing watches


def _seen_like(x: Tensor, backend: str, relu: bool, params: Sequence[Tensor]) -> replay.Seen | None:
    """Return what was seen of calls whose operands may be like these, or None where they do not say all.

    To choose a way, and to check the operands for it, takes the host longer than to compare them with earlier ones. All
    depends on them, on the moment, and for Triton on a few things more; its kernels depend on their alignment, too.
    """
    if backends.watched() or forward_ad._current_level >= 0:
        return None
    operands = x, *params
    if not {*map(type, operands)} <= backends.PLAIN or backend not in backends.BACKENDS:
        return None
    about = "ways", backend, relu, torch.is_grad_enabled(), x.shape
    if backend == "aten" or (x.is_cpu and backend == "auto"):
        return replay.seen_of(*about)
    return replay.seen_of(*about, *replay.surroundings(x)) if replay.are_aligned(operands) else None


def _choose(x: Tensor, params: Sequence[Tensor], backend: str, relu: bool) -> _Way:
    """Check the arguments and return how they are computed."""
    path = _select(x, params, backend).name
    needs_grad = custom_op.is_recorded((x, *params))
    if not relu and (path == "aten" or needs_grad):  # only Triton's forward comes without ReLU
        path = "plain"
    known = None
    if path == "triton" and not backends.watched() and not any(map(backends.only_dispatched, (x, *params))):
        known = replay.known((x, *params))
    return _Way(path, relu, needs_grad, known)


def _compute(way: _Way, x: Tensor, params: Sequence[Tensor]) -> Tensor:
    if way.known is not None and way.needs_grad:
        return cast(Tensor, _Inception.apply("triton", way.known, x, *params))
    if way.known is not None:
        return cast(Tensor, ops.launch_forward(way.known, x, params, False, way.relu)[0])
    if way.path == "aten" and backends.widened(x.dtype, x):
        with torch.autocast("cpu", enabled=False):  # it would narrow the convolutions' operands again
            return _compute(way, x.float(), [p.float() for p in params]).to(x.dtype)
    if way.path == "plain" or (way.path == "aten" and _is_few(x)):
        return aten.compose(x, params, way.relu)
    if way.path == "aten" and not way.needs_grad and torch.compiler.is_compiling():
        if x.device.type != "cpu":
            return aten.compose(x, params)
        return aten.compose_for_inductor(x, params).contiguous(memory_format=ops.output_format(x, params))
    if way.path == "aten" and not way.needs_grad:
        y = ops.empty_output(x, params)
        aten.forward(x, params, y)
        return y
    if way.path == "triton" and not way.needs_grad:
        return cast(Tensor, torch.ops.fastinception.triton_inference(x, *params, way.relu))
    if way.path == "aten" and not backends.watched():
        return cast(Tensor, _Inception.apply("aten", {}, x, *params))
    out, *_ = getattr(torch.ops.fastinception, f"{way.path}_forward")(x, *params)
    return cast(Tensor, out)


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
        if (
            torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or backends.watched()
            or backends.only_dispatched(grad_out)
        ):
            grads: Sequence[Tensor | None] = ops.DIFFERENTIATED[ctx.backend](grad_out, saved, needs)
        elif ctx.backend == "aten":
            with torch._C.DisableTorchFunctionSubclass():  # whatever comes upstream, the gradients are tensors
                grads = ops.aten_gradients(grad_out, *saved, needs)
        else:
            grads = ops.triton_gradients(grad_out, *saved, needs)
        return None, None, *grads


def _write(out: Tensor, x: Tensor, params: Sequence[Tensor], backend: str, relu: bool) -> Tensor:
    """Write the block of ``x`` into ``out`` and return that."""
    path = _select(x, params, backend).name
    if path == "plain" or (path == "aten" and not relu):
        return copy_into(out, aten.compose(x, params, relu), (x, *params))
    needs_grad = custom_op.is_recorded((x, *params))
    _check_out(out, ops.output_shape(x, params), x, needs_grad)
    version = None if torch.compiler.is_compiling() or out.is_inference() else out._version
    torch.ops.fastinception.inception_out(x, *params, path, out, relu)
    if version is not None and out._version == version:  # a kernel writes behind autograd's back, and so does a mode
        torch.autograd.graph.increment_version(out)
    return out


def _is_few(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() <= FEW


def explain(x: Tensor, params: Sequence[Tensor], backend: str) -> Path:
    """Return the path of a call, and why it takes that."""
    x, params = _cast(x, params)
    path = _select(x, params, backend)
    if path.name == "aten" and _is_few(x):
        return Path("plain", f"{path.reason}, and for few elements standard operators are faster")
    return path


def _select(x: Tensor, params: Sequence[Tensor], backend: str) -> Path:
    if not backends.traced():  # there the convolutions find what does not fit
        _check_input(x, params)
    return backends.select(backend, x, params)


def check_images(x: Tensor) -> None:
    """Raise the TypeError or ValueError that says why ``x`` is no batch of images, if it is none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:  # which has no shape to ask for
        raise TypeError("x must be a dense tensor, got a nested one")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.dim()} dimensions: {list(x.shape)}")
    if not (x.is_floating_point() or x.is_quantized):  # a quantized one goes through the modules that replaced a child
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"x must be a dense tensor, got {x.layout}")


def copy_into(out: Tensor, y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Copy a finished block into the caller's ``out`` after the checks that every path makes, and return ``out``."""
    _check_out(out, y.shape, y, needs_grad=y.requires_grad)
    if out.device.type != "meta":  # where every address is 0
        ops.check_overlap(out, inputs)
    return out.copy_(y)


def _cast(x: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return ``x`` and ``params`` in the dtype that autocast asks of a convolution, or as they are without it."""
    check_images(x)
    if type(params) is not list and not isinstance(params, (Sequence, nn.ParameterList)):
        hint = ": pass list(block.parameters())" if isinstance(params, nn.Module) else ""
        raise TypeError(f"params must be a sequence of 12 tensors, got {type(params).__name__}{hint}")
    if len(params) != 12:
        raise ValueError(f"params must be the 12 weights and biases of the block, got {len(params)}")
    device = x.device.type
    # is_autocast_enabled raises for meta, and Dynamo cannot trace is_autocast_available on the oldest PyTorch.
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        _check_types(params)
        x, *params = [
            t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in (x, *params)
        ]
    return x, params


def _check_types(params: Sequence[Tensor]) -> None:
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be tensors, got {type(p).__name__} as params[{i}]")


def _check_input(x: Tensor, params: Sequence[Tensor]) -> None:
    """Raise the TypeError or ValueError that says what of ``x`` and ``params`` does not fit, if anything."""
    _check_types(params)
    k, dtype, device = x.shape[1], x.dtype, x.device
    shapes, fitting = [p.shape for p in params], ops.fitting_shapes(x, params)
    dtypes, devices = [p.dtype for p in params], [p.device for p in params]
    some = all([k, *[shape[0] for shape in fitting]])  # a convolution has channels, and autograd's insists on them
    if some and shapes == fitting and dtypes.count(dtype) == devices.count(device) == 12:
        return  # in one go; the rest finds words
    if len(shapes[0]) == 4 and k != shapes[0][1]:
        raise ValueError(f"x must have {shapes[0][1]} channels, got {k}: {list(x.shape)}")
    if k == 0:
        raise ValueError(f"x must have channels, got {list(x.shape)}")
    for i, name in enumerate(("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2")):
        weight, bias = params[2 * i], params[2 * i + 1]
        if weight.shape != fitting[2 * i] or weight.shape[0] == 0:
            expected = ", ".join(map(str, fitting[2 * i][1:]))
            raise ValueError(f"{name}'s weight must be [c, {expected}], c at least 1, got {list(weight.shape)}")
        if bias.shape != fitting[2 * i + 1]:
            raise ValueError(f"{name}'s bias must be {list(fitting[2 * i + 1])}, got {list(bias.shape)}")
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor.dtype is not dtype:
                raise TypeError(
                    f"x and the parameters must have one dtype, got {dtype} for x and {tensor.dtype} for "
                    f"{name}'s {kind}: cast one, or call under autocast, which casts all but float64"
                )
            if tensor.device != device:
                raise ValueError(
                    f"x and the parameters must be on one device, got {device} for x and {tensor.device} for "
                    f"{name}'s {kind}"
                )


def _check_out(out: Tensor, shape: Sequence[int], like: Tensor, needs_grad: bool) -> None:
    """Raise the TypeError or ValueError that says why ``out`` cannot be written, if it cannot; ``out`` is untouched."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    if needs_grad or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError("out cannot be used where a gradient is recorded: call under torch.no_grad(), or without out")
    if out.dtype is not like.dtype:
        raise TypeError(f"out must be of dtype {like.dtype}, got {out.dtype}")
    if out.shape != torch.Size(shape):
        raise ValueError(f"out must be {list(shape)}, got {list(out.shape)}")
    if out.device != like.device:
        raise ValueError(f"out must be on {like.device}, got {out.device}")
    if not torch.compiler.is_compiling() and (
        backends.only_dispatched(out) or (out.is_inference() and not torch.is_inference_mode_enabled())
    ):
        raise ValueError("out must hold its numbers in memory, and be no tensor of inference mode outside of that")
    if not (out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"out must be contiguous or channels_last, got the strides {out.stride()}")
