"""Run the textbook's stages around the blocks: on a CPU a large batch in parts, on a GPU in few launches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastinception import backends, custom_op, first_layer
from fastinception.conv import convolve, result_format, serves_first_layer
from fastinception.conv_backward import conv_backward, library, padding, result_size, templates
from fastinception.kernels import target
from fastinception.module import hooked_globally, wrapped
from fastinception.pool import is_around_every_second, max_pool
from fastinception.pool_relu import is_launchable, launch

# Bytes. glibc's malloc reuses what is smaller than its largest mmap threshold (DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB),
# header and alignment included. Larger pieces come fresh from the system: at batch 64 and 96 pixels the first
# convolution's result had 9217 page faults, which took about as long as the convolution, and its gradient again.
_KEPT = 2**25 - 2**14
_PART = 5 * 2**20  # bytes of a part's convolution: 8 images of 96 pixels in the first stage; 4 to 16 took about as long
_MOST_PARTS = 8  # of a compiled graph, which holds the layers once for each

# On cores with AVX2 alone oneDNN convolves images of few channels in channels_last at a third of the speed that it has
# into its own blocked layout (jit:avx2), where it pools faster, too. With AVX-512 (Intel) both layouts take as long.
# Asked once, on import. Other cores were not measured.
BLOCKED_PAYS = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkldnn.is_available()
_FEW_CHANNELS = 4
_FINITE = 1e38  # a bound of what the convolution computes: below, nothing becomes infinite or NaN

# What another shape of .data, or of what a hook brings back, would make of the indices is a write to foreign memory.
CHANGED = "x, the weight or what was saved has another shape in the backward than in the forward"
_POOL = 3, 2, 1  # kernel size, stride, padding


class Stage(nn.Sequential):
    """Run layers of torch.nn, the last of them a MaxPool2d, each as it does or by a faster way: the same numbers.

    Convolutions and the pool compute as :class:`fastinception.Conv2d` and :class:`fastinception.MaxPool2d` do. A ReLU
    between a convolution and the pool of 3x3 around every second pixel comes behind the pool, as a maximum and a ReLU
    commute: of a quarter of the elements.

    On a CPU these three in parts of a large batch: a part's convolution is pooled, and in the backward its gradient
    consumed, while the cache holds it, and malloc reuses its memory; it is not kept for the backward. The same numbers:
    no image sees another.

    Inference that is compiled for one size has as few parts as malloc needs, of the layers themselves: Inductor fuses
    what follows a convolution, and its pool keeps no indices.

    On a GPU, where ``backend`` lets Triton run, in eager mode in channels_last, the library's convolution gets its
    bias, pool and ReLU in one launch, and its gradient in one: PyTorch passes over it for the bias and for the ReLU,
    and its pool writes an int64 index for each maximum. Among numbers that only the bias's rounding makes equal, the
    gradient goes to the largest before it, not to the first.

    Where one of these layers is hooked, patched or of another class, in a program that is traced or exported, and under
    transforms and modes, it is the ``nn.Sequential`` that it looks like. A slice is one always.

    Args:
        layers: as for ``nn.Sequential``.
        backend: as for :class:`fastinception.FastInception`, of the pools' and convolutions' launches.
    """

    __prepare_scriptable__ = backends.refuse_script

    def __init__(self, *layers: nn.Module, backend: str = "auto") -> None:
        super().__init__(*layers)
        self.backend = backend

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        if not isinstance(input, Tensor) or input.is_nested or not _is_unwatched(layers):
            run: Callable[[Tensor], Tensor] = super().forward
            return run(input)
        *front, pool = layers
        if [*map(type, front[-2:])] != [nn.Conv2d, nn.ReLU] or not is_around_every_second(pool):
            return max_pool(pool, self.backend, _run(front, input, self.backend))
        *front, conv, relu = front
        if input.device.type == "cuda" or self.backend == "triton":
            return _in_few_launches(self.backend, input, front, conv, relu, pool)
        input = _run(front, input, self.backend)
        if input.device.type == "cpu" and _is_served(input, conv):  # first: a GPU's call pays for no more
            return _in_parts(input, conv, relu, pool)
        return _pooled(self.backend, input, conv, relu, pool)


def _is_unwatched(layers: Sequence[nn.Module]) -> bool:
    """Tell whether a pool is the last of the layers, and nobody may want what goes into torch.nn's, or comes out."""
    if not layers or type(layers[-1]) is not nn.MaxPool2d or backends.special_state() is not None:
        return False
    attributes = backends.attributes()
    watched = (wrapped(attributes(layer)) for layer in layers if type(layer) in (nn.Conv2d, nn.ReLU, nn.MaxPool2d))
    return not any(watched) and not hooked_globally()


def _run(layers: Sequence[Any], x: Tensor, backend: str) -> Tensor:
    for layer in layers:
        x = convolve(layer, x, backend) if type(layer) is nn.Conv2d else layer(x)
    return x


def _pooled(backend: str, x: Tensor, conv: nn.Conv2d, relu: nn.ReLU, pool: nn.MaxPool2d) -> Tensor:
    return cast(Tensor, relu(max_pool(pool, backend, convolve(conv, x, backend))))


def _in_parts(x: Tensor, conv: nn.Conv2d, relu: nn.ReLU, pool: nn.MaxPool2d) -> Tensor:
    """Return what the three layers do, in parts where these are faster: of a large batch, and in the blocked layout."""
    dtype, operands = _result_dtype(x), (x, conv.weight, cast(Tensor, conv.bias))
    exact = torch.float32 if backends.widened(dtype, x) else dtype
    saves = custom_op.is_recorded(operands)
    blocked = BLOCKED_PAYS and not saves and exact is torch.float32 and x.shape[1] <= _FEW_CHANNELS
    image = _image_bytes(x, conv.weight, conv.stride[0], exact)
    if not backends.holds(x.shape[0] * image > (0 if blocked else _KEPT)):
        return _pooled("aten", x, conv, relu, pool)
    if not saves and not blocked and _is_compiled_for_one_size(x) and x.shape[0] * image <= _MOST_PARTS * _KEPT:
        parts = x.split(_evenly(x.shape[0], max(1, _KEPT // image)))
        return torch.cat([_pooled("aten", part, conv, relu, pool) for part in parts])
    # By name: a compiled graph does not keep the strides by which one channel tells its format.
    format = result_format(x, conv.weight)
    wide = [t.to(exact) for t in operands]
    y, _ = torch.ops.fastinception.conv_pool_relu(*wide, conv.stride[0], saves, format)
    return cast(Tensor, y.to(dtype))


def _in_few_launches(
    backend: str, x: Tensor, front: list[Any], conv: nn.Conv2d, relu: nn.ReLU, pool: nn.MaxPool2d
) -> Tensor:
    if (
        [*map(type, front)] == [nn.Conv2d, nn.ReLU]
        and _is_launched(backend, x, front[0])
        and _is_one_launch(x, front[0])
    ):
        x = _conv_relu(x, front[0])
    else:
        x = _run(front, x, backend)
    if not _is_launched(backend, x, conv):
        return _pooled(backend, x, conv, relu, pool)
    bias: Tensor | None = cast(Tensor, conv.bias)
    if not serves_first_layer(conv, x, backend):
        y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    elif _is_inference(x, conv):
        return launch(first_layer.launch(x, conv.weight, cast(Tensor, bias), conv.stride[0], relu=True))
    else:
        y, bias = convolve(conv, x, backend), None
    if bias is not None:
        bias = bias.to(y.dtype)
    # Images of one channel have both formats, and what their convolution has is the library's choice.
    if is_launchable(y) and backends.are_countable(y):
        return launch(y, bias, relu=True)
    return cast(Tensor, relu(pool(y if bias is None else y.add_(bias.view(-1, 1, 1)))))


def _is_inference(x: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether a convolution with a bias computes without gradients, of operands of the dtype that they have."""
    operands = x, conv.weight, cast(Tensor, conv.bias)
    return not custom_op.is_recorded(operands) and not torch.is_autocast_enabled(x.device.type)


def _conv_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    from fastinception.kernels.spatial import Conv, spatial

    shape = x.shape[0], conv.out_channels, *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    spatial([Conv(x, conv.weight, cast(Tensor, conv.bias), column=0)], out, None)
    return out


def _is_one_launch(x: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether a convolution and its ReLU are one launch: a matrix product, in inference."""
    settings = conv.kernel_size, conv.stride, conv.padding
    product = settings == ((1, 1), (1, 1), (0, 0)) and conv.weight.is_contiguous() and is_launchable(x)
    return product and _is_inference(x, conv)


def _is_launched(backend: str, x: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether Triton may compute a part of what a convolution and the layers behind it do."""
    return (
        conv.bias is not None
        and backends.by_triton(backend, x, conv.weight, conv.bias)
        and target.unsupported(x.device, _result_dtype(x)) is None
        and x.is_contiguous(memory_format=torch.channels_last)
        and conv.bias.is_contiguous()
        and _is_simple(x, conv)
    )


def _is_simple(x: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether a convolution of ``[N, C, H, W]`` has the weight of its settings, and zeros around the image."""
    shape = conv.out_channels, x.shape[1], *conv.kernel_size
    settings = conv.dilation, conv.groups, conv.padding_mode
    return conv.weight.shape == shape and settings == ((1, 1), 1, "zeros")


def _result_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _is_served(x: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether the operator below computes what the convolution and the layers behind it do."""
    if _is_small(x, conv) or conv.bias is None:
        return False
    operands = x, conv.weight, conv.bias
    if not {*map(type, operands)} <= backends.PLAIN or any(t.device.type != "cpu" for t in operands):
        return False
    dtype, casts = _result_dtype(x), torch.is_autocast_enabled("cpu")
    if not dtype.is_floating_point or not all(t.dtype in (dtype, torch.float32 if casts else dtype) for t in operands):
        return False
    kernel_h, kernel_w = conv.kernel_size
    return (
        x.dim() == 4
        and _is_simple(x, conv)
        and kernel_h % 2 == kernel_w % 2 == 1
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding == (kernel_h // 2, kernel_w // 2)
    )


def _is_small(x: Tensor, conv: nn.Conv2d) -> bool:
    """Tell at once that an eager call is too small for parts: to ask all takes a tenth of one image's time."""
    if BLOCKED_PAYS or torch.compiler.is_compiling() or x.dim() != 4:
        return False
    return x.shape[0] * conv.out_channels * x.shape[2] * x.shape[3] * 8 <= _KEPT  # 8 bytes a number, and no stride


def _is_compiled_for_one_size(x: Tensor) -> bool:
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(has_static_value(size) for size in x.shape)


def _evenly(images: int, most: int) -> int:
    """Return how many images the parts have, if there are as few parts as ``most`` images in each allow."""
    parts = -(-images // most)
    return -(-images // parts)


def _image_bytes(x: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> int:
    """Return the bytes of the convolution's result of one image."""
    height, width = result_size(x, stride)
    return weight.shape[0] * height * width * dtype.itemsize


def _pooled_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    height, width = result_size(x, stride)
    return x.shape[0], weight.shape[0], (height + 1) // 2, (width + 1) // 2


def _empty_outputs(
    x: Tensor, weight: Tensor, _: Tensor, stride: int, save: bool, format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Allocate the operator's output, and int64 indices of the maxima in their planes, empty where nothing is saved."""
    out = torch.empty(_pooled_shape(x, weight, stride), dtype=x.dtype, device=x.device, memory_format=format)
    return out, torch.empty_like(out, dtype=torch.int64) if save else out.new_empty(0, dtype=torch.int64)


def _laid_out(t: Tensor, format: torch.memory_format) -> Tensor:
    return t if custom_op.memory_format(t) is format else t.to(memory_format=format)


def _parts(x: Tensor, weight: Tensor, stride: int) -> list[slice]:
    """Return the images of each part."""
    images = max(1, _PART // max(1, _image_bytes(x, weight, stride, x.dtype)))
    return [slice(first, first + images) for first in range(0, len(x), images)]


def _conv_pool_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, save: bool, format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    out, indices = _empty_outputs(x, weight, bias, stride, save, format)
    weight = _laid_out(weight, format)
    run = _pool_blocked if not save and _is_blocked(x, weight, bias) else _pool
    with torch.autocast("cpu", enabled=False):  # it would narrow the operands
        for part in _parts(x, weight, stride):
            run(_laid_out(x[part], format), weight, bias, stride, out[part], indices[part])
    return out, indices


def _pool(x: Tensor, weight: Tensor, bias: Tensor, stride: int, out: Tensor, indices: Tensor) -> None:
    """Fill a part's ``out``, and ``indices`` if it is not empty."""
    conv = F.conv2d(x, weight, bias, stride, padding(weight))
    if indices.numel() > 0:
        torch.ops.aten.max_pool2d_with_indices.out(conv, *_POOL, out=out, indices=indices)
        out.clamp_min_(0)
    else:
        torch.clamp_min(torch.max_pool2d(conv, *_POOL), 0, out=out)


def _pool_blocked(x: Tensor, weight: Tensor, bias: Tensor, stride: int, out: Tensor, _: Tensor) -> None:
    operands = x.to_mkldnn(), weight.to_mkldnn(), bias.to_mkldnn()
    conv = torch.mkldnn_convolution(*operands, padding(weight), [stride, stride], [1, 1], 1)
    torch.clamp_min(torch.ops.aten.mkldnn_max_pool2d(conv, *_POOL).to_dense(), 0, out=out)


def _is_blocked(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Tell whether oneDNN's blocked layout serves: its pool loses NaN, so nothing may become one."""
    if not (BLOCKED_PAYS and torch.backends.mkldnn.enabled and x.dtype is torch.float32 and x.numel() > 0):
        return False
    if x.shape[1] > _FEW_CHANNELS or weight.shape[0] % 8:
        return False
    largest = torch.stack([*torch.aminmax(x)]).abs().max()
    return bool(largest * weight.abs().sum((1, 2, 3)).max() + bias.abs().max() < _FINITE)  # not where it is NaN


def _conv_pool_relu_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor, indices: Tensor, stride: int, needs: list[bool]
) -> tuple[Tensor, ...]:
    if any(t.shape != _pooled_shape(x, weight, stride) for t in (grad_out, out, indices)):
        raise RuntimeError(CHANGED)
    height, width = result_size(x, stride)
    format = custom_op.memory_format(indices)
    filters = _laid_out(weight, format)
    sums = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_weight, grad_bias = (weight.new_zeros(shape, dtype=sums) for shape in (weight.shape, weight.shape[:1]))
    with torch.autocast("cpu", enabled=False):
        for part in _parts(x, weight, stride):
            grad = torch.ops.aten.threshold_backward(grad_out[part], out[part], 0)
            if needs[2]:  # every number of grad has one place in the convolution's gradient
                grad_bias += grad.sum((0, 2, 3), dtype=sums)
            if needs[0] or needs[1]:
                first, last = torch.aminmax(indices[part])
                if first < 0 or last >= height * width:  # they would scatter beyond the end of the gradient
                    raise RuntimeError(CHANGED)
                grad = _unpool(grad, x[part], indices[part], stride)
                rows = _laid_out(x[part], format)
                found = conv_backward(grad, rows, filters, (needs[0], needs[1], False), stride=stride)
                if grad_x is not None:
                    grad_x[part] = cast(Tensor, found[0])
                if needs[1]:
                    grad_weight += cast(Tensor, found[1])
    grads = [
        grad.to(x.dtype) if grad is not None and need else None
        for grad, need in zip((grad_x, grad_weight, grad_bias), needs, strict=True)
    ]
    return custom_op.without_none(custom_op.finish(grads, templates(x, weight)), like=x)


def _unpool(grad: Tensor, x: Tensor, indices: Tensor, stride: int) -> Tensor:
    """Return the gradient of the convolution of ``x``, given that of its maxima and where these were."""
    shape, format = (*grad.shape[:2], *result_size(x, stride)), custom_op.memory_format(indices)
    conv = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=format)  # asked for its shape only
    return cast(Tensor, torch.ops.aten.max_pool2d_with_indices_backward(grad, conv, *_POOL, 1, False, indices))


def _differentiable(tensors: Sequence[Tensor], needs: Sequence[bool], stride: int) -> tuple[Tensor | None, ...]:
    """Return what the backward does, of its first five arguments, by operators that have a derivative."""
    grad_out, x, weight, out, indices = tensors
    grad = torch.ops.aten.threshold_backward(grad_out, out, 0)
    return library(_unpool(grad, x, indices, stride), x, weight, needs, stride)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.stride, ctx.saves, _ = inputs
    ctx.shapes = x.shape, weight.shape
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *output)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    if not ctx.saves:
        raise RuntimeError("fastinception::conv_pool_relu kept nothing for its backward: save must be True")
    saved = ctx.saved_tensors  # each look at them unpacks them, which a checkpoint allows once
    if ctx.shapes != tuple(t.shape for t in saved[:2]):
        raise RuntimeError(CHANGED)
    needs = custom_op.needed(ctx, 3)
    if forward_ad._current_level >= 0:  # a tangent of grad_out passes through plain operators only
        return *_differentiable((grad_out, *saved), needs, ctx.stride), None, None, None
    grads = torch.ops.fastinception.conv_pool_relu_backward(grad_out, *saved, ctx.stride, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.stride, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return custom_op.differentiate_twice(ctx, grads, lambda *args: _differentiable(args[:-1], args[-1], ctx.stride))


custom_op.define(
    "conv_pool_relu_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor out, Tensor indices, int stride, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _conv_pool_relu_backward,
    lambda grad_out, x, weight, out, indices, stride, needs: custom_op.empty_gradients(templates(x, weight), needs),
    _differentiate_backward,
    _setup_backward,
)
custom_op.define(
    "conv_pool_relu",
    "(Tensor x, Tensor weight, Tensor bias, int stride, bool save, MemoryFormat format) "
    "-> (Tensor out, Tensor indices)",
    _conv_pool_relu,
    _empty_outputs,
    _differentiate,
    _setup,
)
