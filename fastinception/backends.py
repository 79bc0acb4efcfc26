"""Choose the backend that computes a block, from what was asked for, the device and the dtype."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastinception.kernels import target

PLAIN = {Tensor, Parameter}  # a subclass may be anything
BACKENDS = ("auto", "triton", "aten")
# What of a layer decides whether it computes what its class does.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_CONVS = ("kernel_size", "padding", "stride", "dilation", "groups", "padding_mode", "_parameters")
# What the kernels count in int32: pixels, up to the end of the last tile, numbers from row to row of an image, and
# those of a weight, up to the end of the last tile; the weights of the 1x1 convolutions that read x are one to them.
_MOST_PIXELS = 2**31 - 2**12
_MOST_IN_FIVE_ROWS = 2**31  # a 5x5 kernel has four rows below its first, and reads five pixels of the last
_MOST_WEIGHTS = 2**30  # of all together


def _widened(cpu: Mapping[str, Any]) -> dict[torch.dtype, int]:
    """Return the dtypes in which this CPU is slower than in float32, and from how many pixels on.

    Zero where PyTorch's own loops take many times as long. That is where a CPU has no products of the dtype, and for
    float16 where only tensor tiles (AMX) differentiate weights: the library's reference takes 500 times as long.
    Intel's cores without tiles multiply bfloat16 at half of float32's rate (Emerald Rapids with AMX masked: 165
    and 321 GFLOP/s). Of few pixels the casts of the weights take longer than that: of 0, 128, 256, 512, 1024 and 2048
    256 and 512 did best in GoogLeNet's inference of 1 to 32 images of 96 pixels, 256 by 5 to 7% of 8 images.

    Args:
        cpu: what ``torch.cpu.get_capabilities()`` says.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return {}  # nothing measured there
    found = {}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found[torch.bfloat16] = 0
    elif cpu.get("cpu_name", "").startswith("Intel") and not cpu.get("amx_bf16"):
        found[torch.bfloat16] = 256
    if not cpu.get("amx_fp16") or not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found[torch.float16] = 0
    return found


# Asked once, on import: torch.compile cannot trace the question.
_WIDENED = _widened(torch.cpu.get_capabilities())


class Path(NamedTuple):
    """How a call is computed: ``"triton"``, ``"aten"`` or ``"plain"`` (standard operators, any PyTorch
    transform), and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def check(backend: str) -> str:
    """Return ``backend``, or for ``"auto"`` what the variable FASTINCEPTION_BACKEND says; ValueError if unknown."""
    source = "backend"
    if backend == "auto" and (backend := os.environ.get("FASTINCEPTION_BACKEND") or "auto") != "auto":
        source = "the environment variable FASTINCEPTION_BACKEND"
    _check_known(backend, source)
    return backend


def _check_known(backend: str, source: str = "backend") -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def environment_error(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why what the variable FASTINCEPTION_BACKEND asks for cannot run on a device in a dtype, or None."""
    try:
        backend = check("auto")
    except ValueError as error:
        return str(error)
    if backend == "triton" and (reason := target.unsupported(device, dtype)) is not None:
        return f"FASTINCEPTION_BACKEND=triton cannot run here: {reason}"
    return None


def select(backend: str, x: Tensor, params: Sequence[Tensor]) -> Path:
    """Return the path for ``x``: ``"auto"`` takes Triton on a GPU that can run it, ATen everywhere else.

    Raises:
        ValueError: ``backend`` is unknown, or ``"triton"`` where Triton cannot run ``x``.
    """
    _check_known(backend)
    special = _special(x, params)
    reason = None
    if backend == "triton" or (backend == "auto" and x.device.type == "cuda"):
        reason = target.unsupported(x.device, x.dtype)
        if special is None:
            reason = reason or target.without_products(x.device) or _too_large(x, params)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' cannot run here: {reason}; use backend='auto' or 'aten'")
    if special is not None:
        return Path("plain", special)
    if backend == "triton":
        return Path("triton", "backend='triton' was asked for")
    if backend == "aten":
        reason = "backend='aten' was asked for"
    elif x.device.type != "cuda":  # the interpreter is for tests: only where it was asked for
        reason = "x is not on a GPU that runs Triton"
    if reason is None:
        return Path("triton", "x is on a GPU that runs Triton")
    if widened(x.dtype, x):
        reason += f"; in float32, in which this CPU is faster than in {x.dtype}"
    return Path("aten", reason)


def by_triton(backend: str, x: Tensor, *params: Tensor) -> bool:
    """Tell whether Triton computes what the kernels around the blocks serve: eager calls of operands that fit.

    ``"triton"`` asks for it in the interpreter, too; where it cannot run, or does not serve, the answer is False.

    Raises:
        ValueError: an unknown backend.
    """
    _check_known(backend)
    if backend == "aten" or (backend == "auto" and x.device.type != "cuda"):
        return False
    operands = x, *params
    return (
        not torch.compiler.is_compiling()
        and target.unsupported(x.device, x.dtype) is None
        and special_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and {*map(type, operands)} <= PLAIN
        and not any(map(only_dispatched, operands))
        and all(t.device == x.device for t in params)
        and (all(t.dtype is x.dtype for t in params) or torch.is_autocast_enabled(x.device.type))
        and x.dim() == 4
        and x.shape[1] > 0
        and are_countable(x)
        and target.without_products(x.device) is None
    )


def only_dispatched(t: Tensor) -> bool:
    """Tell whether the memory of ``t`` is not what it stands for: batched (is_grads_batched), negated, known zeros."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(t) or t.is_neg() or t._is_zerotensor())


def watched() -> bool:
    """Tell whether a mode, a trace or a transform meets the operators: then the block has to be one, or plain ones."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or _passes_modes()
    )


def are_countable(x: Tensor) -> bool:
    """Tell whether images have pixels, and as few as the kernels count."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return holds(pixels > 0) and holds(pixels <= _MOST_PIXELS)


def _too_large(x: Tensor, params: Sequence[Tensor]) -> str | None:
    """Say what about the sizes is beyond the kernels, or None."""
    n, _, height, width = x.shape
    if n * height * width > _MOST_PIXELS:
        return f"the kernels count at most {_MOST_PIXELS} pixels"
    widest = max(weight.shape[0] for weight in params[2:10:2])  # into and out of the 3x3 and the 5x5 convolution
    if (4 * width + 5) * widest > _MOST_IN_FIVE_ROWS:
        most = (_MOST_IN_FIVE_ROWS // widest - 5) // 4
        return f"the kernels count at most {most} pixels of {widest} channels in a row, and there are {width}"
    if sum([p.numel() for p in params]) > _MOST_WEIGHTS:
        return f"the kernels count at most {_MOST_WEIGHTS} numbers of all parameters"
    return None


def widened(dtype: torch.dtype, x: Tensor) -> bool:
    """Tell whether ATen computes convolutions of x in float32: on a CPU that is slower in ``dtype``."""
    return x.device.type == "cpu" and dtype in _WIDENED and _has_pixels(x, _WIDENED[dtype])


def is_slower(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the device is a CPU that convolves a batch in ``dtype`` slower than in float32."""
    return device.type == "cpu" and dtype in _WIDENED


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the device is a CPU on which PyTorch takes many times as long in ``dtype`` as in float32."""
    return device.type == "cpu" and _WIDENED.get(dtype) == 0


def _has_pixels(x: Tensor, least: int) -> bool:
    if least == 0 or x.dim() != 4 or traced():
        return True
    return holds(x.shape[0] * x.shape[2] * x.shape[3] >= least)


def attributes() -> Callable[[nn.Module], Mapping[str, Any]]:
    """Return what tells a module's own attributes: ``vars``, a look-up in which takes half of an attribute's time.

    Where Dynamo traces, something that asks for them by name. In what it reads from ``vars`` an edit behind the first
    call goes unnoticed: all of them (torch 2.13), or a method that was put there (2.11 to 2.15).
    """
    return _ask_for if torch.compiler.is_compiling() else vars


def _ask_for(module: nn.Module) -> dict[str, Any]:
    names, methods = [*_HOOKS], {"forward": module.forward}
    if isinstance(module, nn.Conv2d):
        names += _OF_CONVS
        methods["_conv_forward"] = module._conv_forward
    own: dict[str, Any] = {name: getattr(module, name) for name in names}
    return own | {name: method for name, method in methods.items() if name in module.__dict__}


def holds(what: bool) -> bool:
    """Tell whether something about sizes is so; in a graph whose batch depends on data, whether it may be."""
    if not torch.compiler.is_compiling():
        return what
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return bool(guard_or_true(what))


def traced() -> bool:
    """Tell whether ``torch.jit.trace`` records the moment: it warns wherever a shape is looked at."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def exporting() -> bool:
    """Tell whether ``torch.export`` records the moment."""
    return torch.compiler._is_exporting_flag  # is_exporting() is constantly true to Dynamo, in torch.compile too


def followed() -> bool:
    """Tell whether functions are met with the layers that call them: in a program that is kept, or by a mode.

    By these quantizers and converters find what is theirs. PyTorch's own mode, for a default device, asks for none.
    """
    if torch.compiler.is_compiling():
        return exporting()
    return torch._C._get_tracing_state() is not None or _passes_modes()


def _passes_modes() -> bool:
    """Tell whether a mode meets functions, where Dynamo traces none."""
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def symbolic(x: Any) -> bool:
    """Tell whether ``x`` stands for a tensor in ``torch.fx.symbolic_trace``, which nothing may be asked about."""
    return isinstance(x, Proxy)


def _special(x: Tensor, params: Sequence[Tensor]) -> str | None:
    """Say what about a call only standard, differentiable operators can serve, or None."""
    if (state := special_state()) is not None:
        return state
    if holds(x.numel() == 0):
        return "x is empty"
    if x.is_meta:
        return "x is on the meta device"
    for kind in {type(x), *map(type, params)} - PLAIN:
        return f"an operand is a {kind.__qualname__}"
    return None


def special_state() -> str | None:
    """Say what about the moment only standard, differentiable operators can serve, or None."""
    if exporting():
        return "an exported program holds standard operators only"
    if traced():
        return "torch.jit.trace keeps standard operators without side effects only"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform (vmap, grad, jvp, ...) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.compiler.is_compiling():
        return None
    if torch._C._len_torch_dispatch_stack() and _counted():
        return "what counts FLOPs knows standard operators only"
    if _passes_modes():
        return "a TorchFunctionMode is active"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that what was asked for does not fit the memory of the host or of a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # a CPU's has no class of its own


def refuse_script(module: nn.Module) -> NoReturn:
    """Raise TypeError: the ``__prepare_scriptable__`` of modules whose forward ``torch.jit.script`` cannot compile.

    Another module, returned here, would take this one's place in the caller's network, too.
    """
    raise TypeError(
        f"torch.jit.script cannot compile {type(module).__qualname__}: use torch.jit.trace, torch.export or "
        "torch.compile, or load the weights into the plain network and script that"
    )


def _counted() -> bool:
    """Tell whether a mode counts FLOPs: PyTorch's, whose module imports Triton and need not be there, or another's."""
    return any("Flop" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
