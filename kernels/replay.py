"""Launch again: a call like an earlier one goes straight to its kernels, past all that decided about them.

What a call decides takes the host several times as long as its launches. It depends on what :func:`known` compares of
the operands, never on their numbers.
"""

from __future__ import annotations

import functools
import operator
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastinception.kernels import configs, target

Tensors = Tensor | tuple[Tensor | None, ...] | None  # one argument of a kernel


class Launch(NamedTuple):
    """A launch that was made, or that would have been, under :func:`collect`."""

    kernel: Any
    config: configs.LaunchConfig | None  # None of what is no kernel of Triton's, and takes the tensors alone
    tensors: tuple[Tensors, ...]
    compiled: Any  # None in the interpreter


class Made(NamedTuple):
    """What a call launched, in order, None for what the library did, and what it allocated: enough to record it."""

    launched: list[Launch | None]
    allocated: list[Tensor | None]

    def dense(self, t: Tensor, format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Return ``t`` if it is contiguous in ``format``, else a copy that is."""
        if t.is_contiguous(memory_format=format):
            return t
        copy = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=format)
        self.allocated.append(copy)
        self.launched.append(Launch(Tensor.copy_, None, (copy, t), None))
        if _waiting.get() is None:
            copy.copy_(t)
        return copy


_waiting: ContextVar[list[Launch] | None] = ContextVar("_waiting", default=None)
_lock, _loading = threading.Lock(), threading.Lock()


def launch(kernel: Any, config: configs.LaunchConfig, *tensors: Tensors) -> Launch:
    """Launch on the current device and stream; under :func:`collect` only remember it.

    Raises:
        RuntimeError: what the driver says; while a CUDA graph is captured it loads no kernel.
    """
    if (waiting := _waiting.get()) is not None:
        waiting.append(Launch(kernel, config, tensors, None))
        return waiting[-1]
    try:
        return Launch(kernel, config, tensors, kernel[config.grid](*tensors, *config.sizes, **config.constants))
    except RuntimeError as error:
        if "capturing" not in str(error):
            raise
        raise RuntimeError(
            "a kernel has to be loaded, and no CUDA graph may be captured meanwhile: a call with the same shapes, "
            "dtypes, strides and gradients was expected before the capture"
        ) from error


def collect(run: Callable[[], Any]) -> list[Launch]:
    """Return all that ``run`` would launch, and launch nothing; whatever else it does, it does."""
    waiting: list[Launch] = []
    token = _waiting.set(waiting)
    try:
        run()
    finally:
        _waiting.reset(token)
    return waiting


def compile(run: Callable[[], Any], x: Tensor) -> None:
    """Compile all kernels that ``run`` launches on x's device, at the same time, and launch none; not on AMD.

    One after another, as Triton does when they are launched, those of a training step take several times as long.
    Whatever else ``run`` does, the library's convolutions, is done.
    """
    if _waiting.get() is not None or not compiles_together():
        return
    with target.device_of(x):
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # where what else is done would stay
            return
    for kernel in compile_all(collect(run), x):
        kernel.result()


def compiles_together() -> bool:
    """Tell whether several kernels may be compiled at a time: there is a compiler, and AMD's is not (Triton < 3.9)."""
    return not target.interpreted() and torch.version.hip is None


def compile_all(launches: Sequence[Launch], x: Tensor) -> list[Future[None]]:
    """Compile and load what is launched on x's device, as many at a time as the host has cores; return when all ended.

    Not by triton.AsyncCompileMode: before 3.8 it stays on behind an error, and another thread may get its unfinished
    kernels.
    """
    from triton.runtime import driver

    def warm_up(step: Launch) -> None:
        with target.device_of(x):
            config = step.config
            compiled = step.kernel.warmup(*step.tensors, *config.sizes, grid=config.grid, **config.constants)
            # One at a time: Triton 3.6 has the host's compiler build a launcher for each signature, all of them modules
            # of one name. Loaded again, they share one dict, from which a kernel could take another's launcher.
            with _loading:
                compiled[config.grid]

    # The compiler releases Python's lock. Two calls at a time would compile the same twice.
    with _lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        driver.active.get_current_device()  # makes the driver, which is not for several threads to do
        return [pool.submit(warm_up, step) for step in launches]


class Replay(NamedTuple):
    """Launches on other tensors than those that they were recorded with.

    They are picked from a list: the operands, what is allocated, None, and the groups that kernels take as one
    argument.
    """

    allocate: tuple[Callable[[], Tensor], ...]
    groups: tuple[Pick, ...]
    steps: tuple[tuple[Any, Pick, tuple[Any, ...], dict[str, Any]], ...]  # what to call, arguments
    results: Pick

    def __call__(self, *operands: Tensor) -> tuple[Any, ...]:
        """Return what the recorded call made, made of ``operands``: as many, and alike to :func:`known`."""
        with target.device_of(operands[0]):
            tensors: list[Any] = [*operands, *[empty() for empty in self.allocate], None]
            tensors += [pick(tensors) for pick in self.groups]
            for run, pick, others, constants in self.steps:
                run(*pick(tensors), *others, **constants)
        return self.results(tensors)


Pick = Callable[[list[Any]], tuple[Any, ...]]


def _pick(places: Sequence[int]) -> Pick:
    """Return what takes these places of a list."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda tensors: tuple([tensors[i] for i in places])


def record(
    launched: Sequence[Launch | None],
    operands: Sequence[Tensor],
    allocated: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
) -> Replay | None:
    """Return what makes the same of other operands.

    Args:
        launched: all launches of the call, in order; None stands for other work.
        operands: all that the call was given.
        allocated: all that it allocated without writing it, but by its launches; None is nothing.
        results: of those, what it returned; None is returned as it is.

    Returns:
        None where there is other work than the launches, or where two operands are one tensor, so that it could not be
        told which of them a launch takes.
    """
    fresh = [t for t in allocated if t is not None]
    tensors = [*operands, *fresh, None]
    index = {id(t): i for i, t in enumerate(tensors)}
    if not launched or None in launched or len(index) != len(tensors):
        return None
    groups: list[tuple[int, ...]] = []

    def place(argument: Tensors) -> int:
        if not isinstance(argument, tuple):
            return index[id(argument)]
        groups.append(tuple([index[id(t)] for t in argument]))
        return len(tensors) + len(groups) - 1

    made = cast(Sequence[Launch], launched)
    try:
        arguments = [tuple(map(place, step.tensors)) for step in made]
    except KeyError:
        return None  # neither given nor allocated
    steps = []
    for step, indices in zip(made, arguments, strict=True):
        run, others, constants = _runner(step)
        steps.append((run, _pick(indices), others, constants))
    allocate = tuple(map(_allocation, fresh))
    return Replay(allocate, tuple(map(_pick, groups)), tuple(steps), _pick([index[id(t)] for t in results]))


def _allocation(t: Tensor) -> Callable[[], Tensor]:
    """Return what allocates a tensor like ``t``, whose device is the current one.

    By what Inductor's programs call, in half of the time that ``torch.empty_strided`` takes the host. It is private:
    where PyTorch has it no more, or it makes something else, by that.
    """
    empty = functools.partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=t.device)
    try:
        from torch._C._dynamo import guards

        own = getattr(guards, f"_empty_strided_{t.device.type}")
        fast = functools.partial(own, tuple(t.shape), t.stride(), t.dtype)
        with target.device_of(t):
            made, expected = [(a.shape, a.stride(), a.dtype, a.device) for a in (fast(), t)]
    except (ImportError, TypeError, AttributeError, RuntimeError):
        return empty
    return fast if made == expected else empty


def _runner(step: Launch) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return what launches a step again, with what follows the tensors, by place and by name.

    That is the compiled kernel, if there is one: looking it up takes the host longer than all the rest of a launch.
    What Triton looks it up by, :func:`known` compares, but for its switches for debugging, and on AMD for the size of
    the storage around a tensor: the same shape and strides end in the same place.
    """
    kernel, config, tensors, compiled = step
    if config is None:
        return kernel, (), {}
    if compiled is None:
        return kernel[config.grid], config.sizes, config.constants
    names = kernel.arg_names[len(tensors) + len(config.sizes) :]
    return compiled[(*config.grid, 1, 1)], (*config.sizes, *[config.constants[name] for name in names]), {}


# By what was asked of the operands: what makes the results of others like them, None where only planning again does.
Known = dict[Any, Any]


def known(tensors: Sequence[Tensor]) -> Known:
    """Return what is known of launches for operands like these: for the same facts one dict, empty at first."""
    about = surroundings(tensors[0])
    compared = TensorGuards is not None and are_aligned(tensors)
    seen = seen_of("launches", *about, tensors[0].shape, len(tensors)) if compared else []
    found: Known | None = recall(seen, tensors)
    if found is None:
        found = _known(
            *about, *[t.shape for t in tensors], *[t.stride() for t in tensors], *[t.dtype for t in tensors],
            *[t.device for t in tensors], *[t.data_ptr() % 16 == 0 for t in tensors], *map(Tensor.is_neg, tensors),
        )  # fmt: skip
        if compared:
            remember(seen, tensors, found)
    return found


def surroundings(x: Tensor) -> tuple[target.Gpu, str, bool]:
    """Return what launches depend on beside their operands."""
    gpu = target.gpu(x.device)
    return gpu, target.input_precision(x.dtype, gpu), target.interpreted()


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    """Tell whether all addresses are multiples of 16: Triton compiles other kernels for others."""
    return functools.reduce(operator.or_, map(Tensor.data_ptr, tensors)) % 16 == 0


Seen = list[tuple[Any, Any]]  # what compares others with tensors that were seen, and what stands for these


@configs.cached
def seen_of(*key: Any) -> Seen:
    """Return what was seen of operands with this key: always the same list, empty at first."""
    return []


def recall(seen: Seen, tensors: Sequence[Tensor]) -> Any:
    """Return what was remembered of tensors like these, whatever their numbers and addresses, or None."""
    for guards, found in seen:
        if guards.check(*tensors):
            return found
    return None


def remember(seen: Seen, tensors: Sequence[Tensor], found: Any) -> None:
    """Keep what stands for tensors like these, and forget what is oldest; nothing where PyTorch cannot compare them."""
    if TensorGuards is not None:
        seen.append((TensorGuards(*tensors, **_STATIC), found))
        del seen[:-_MOST_SEEN]


_STATIC = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}  # all sizes and strides count


def _guards() -> Any:
    """Return PyTorch's own comparison of tensors, which is private, or None where it is not as expected."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        works = TensorGuards(t := torch.empty(1, device="cpu"), **_STATIC).check(t)
    except (ImportError, TypeError, AttributeError, RuntimeError):
        return None
    return TensorGuards if works else None


# One call into C++ compares the operands' types, sizes, strides, dtypes and devices, and more: whether a gradient is
# wanted, what the dispatcher is told. To read and hash them in Python takes the host several times as long.
TensorGuards = _guards()
_MOST_SEEN = 16


@configs.cached
def _known(*facts: Any) -> Known:
    return {}
