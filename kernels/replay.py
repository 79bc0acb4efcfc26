"""Launch again: a call like an earlier one goes straight to its kernels, past all that decided about them.

What a call decides takes the host several times as long as its launches. It depends on what :func:`facts` says of the
operands, never on their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastinception.kernels import configs, target

Tensors = Tensor | tuple[Tensor | None, ...] | None  # one argument of a kernel


class Launched(NamedTuple):
    """A launch that was made."""

    kernel: Any
    how: configs.Launch
    tensors: tuple[Tensors, ...]
    compiled: Any  # None in the interpreter


_compiling = ContextVar("_compiling", default=False)


def launch(kernel: Any, how: configs.Launch, *tensors: Tensors) -> Launched:
    """Launch on the current device and stream; under :func:`compile` only compile."""
    if _compiling.get():
        compiled = kernel.warmup(*tensors, *how.sizes, grid=how.grid, **how.constants)
    else:
        compiled = kernel[how.grid](*tensors, *how.sizes, **how.constants)
    return Launched(kernel, how, tensors, compiled)


def compile(run: Callable[[], Any]) -> None:
    """Compile all kernels that ``run`` launches, at the same time, and launch none.

    One after another, as Triton does when they are launched, those of a training step take several times as long.
    """
    if target.interpreted():
        return
    from triton import AsyncCompileMode

    token = _compiling.set(True)
    try:
        with ThreadPoolExecutor() as pool, AsyncCompileMode(pool):  # the compiler releases Python's lock
            run()
    finally:
        _compiling.reset(token)


class Replay(NamedTuple):
    """Launches on other tensors than those that they were recorded with.

    Tensors are counted: the operands, what is allocated, None, and the groups that kernels take as one argument.
    """

    allocated: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]  # shape, strides, dtype
    groups: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], ...]  # what to call, arguments
    results: tuple[int, ...]

    def __call__(self, *operands: Tensor) -> list[Any]:
        """Return what the recorded call made, made of ``operands``: as many, and the same by their :func:`facts`."""
        device = operands[0].device
        tensors: list[Any] = [*operands]
        tensors += [torch.empty_strided(size, strides, dtype=t, device=device) for size, strides, t in self.allocated]
        tensors.append(None)
        tensors += [tuple([tensors[i] for i in group]) for group in self.groups]
        with target.device_of(operands[0]):
            for run, arguments, others, constants in self.steps:
                run(*[tensors[i] for i in arguments], *others, **constants)
        return [tensors[i] for i in self.results]


def record(
    launched: Sequence[Launched | None],
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
        None where there is other work than the launches, a copy of an operand for instance, or where two operands are
        one tensor, so that it could not be told which of them a launch takes.
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

    try:
        steps = [
            (run, tuple(map(place, step.tensors)), others, constants)
            for step in cast(Sequence[Launched], launched)
            for run, others, constants in [_runner(step)]
        ]
    except KeyError:
        return None  # neither given nor allocated: a copy
    places = [(t.shape, t.stride(), t.dtype) for t in fresh]
    return Replay(tuple(places), tuple(groups), tuple(steps), tuple([index[id(t)] for t in results]))


def _runner(step: Launched) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return what launches a step again, with what follows the tensors, by place and by name.

    That is the compiled kernel, if there is one: :func:`facts` are all that Triton looks up a kernel by, and looking it
    up takes the host longer than all the rest of a launch.
    """
    kernel, how, tensors, compiled = step
    if compiled is None:
        return kernel[how.grid], how.sizes, how.constants
    names = kernel.arg_names[len(tensors) + len(how.sizes) :]
    return compiled[(*how.grid, 1, 1)], (*how.sizes, *[how.constants[name] for name in names]), {}


# What makes a call's results of its operands, and what makes those of its backwards; None where nothing but planning it
# again does.
Known = dict[Any, Any]


@configs.cached
def known(*key: Any) -> Known:
    """Return what is known of calls with this key: always the same dict, empty at first."""
    return {}


def facts(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return all that launches for these operands depend on."""
    gpu = target.gpu(tensors[0].device)
    return (
        gpu, target.input_precision(tensors[0].dtype, gpu), target.interpreted(),
        *[t.shape for t in tensors], *[t.stride() for t in tensors], *[t.dtype for t in tensors],
        *[t.device for t in tensors], *[t.data_ptr() % 16 == 0 for t in tensors],
    )  # fmt: skip
