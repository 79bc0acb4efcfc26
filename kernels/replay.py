"""Launch again: a call like an earlier one goes straight to its kernels, past all that decided about them.

What a call decides takes the host several times as long as its launches. It depends on what :func:`facts` says of the
operands, never on their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastinception.kernels import configs, target

Tensors = Tensor | tuple[Tensor | None, ...] | None  # one argument of a kernel


class Launched(NamedTuple):
    """A launch that was made."""

    kernel: Any
    launch: configs.Launch
    tensors: tuple[Tensors, ...]


_compiling = ContextVar("_compiling", default=False)


def launch(kernel: Any, launch: configs.Launch, *tensors: Tensors) -> Launched:
    """Launch on the current device and stream; under :func:`compile` only compile."""
    if _compiling.get():
        kernel.warmup(*tensors, *launch.sizes, grid=launch.grid, **launch.constants)
    else:
        kernel[launch.grid](*tensors, *launch.sizes, **launch.constants)
    return Launched(kernel, launch, tensors)


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
    """Launches on other tensors than those that they were recorded with."""

    places: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]  # what to allocate: shape, strides, dtype
    steps: tuple[tuple[Any, Callable[[list[Any]], list[Any]], tuple[Any, ...], dict[str, Any]], ...]
    results: tuple[int, ...]

    def __call__(self, *operands: Tensor) -> list[Any]:
        """Return what the recorded call made, made of ``operands``: as many, and the same by their :func:`facts`."""
        like = operands[0]
        tensors: list[Any] = [*operands]
        tensors += [like.new_empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in self.places]
        tensors.append(None)
        with target.device_of(like):
            for run, pick, sizes, constants in self.steps:
                run(*pick(tensors), *sizes, **constants)
        return [tensors[i] for i in self.results]


# What is known of a call and of its backwards: the replay of each, None where there is none.
Known = dict[Any, Replay | None]


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
    if not launched or None in launched:
        return None
    fresh = [t for t in allocated if t is not None]
    tensors = [*operands, *fresh]
    index = {id(t): i for i, t in enumerate([*tensors, None])}
    if len(index) <= len(tensors):
        return None
    steps = []
    for kernel, launch, arguments in cast(Sequence[Launched], launched):
        try:
            pick = _picker([_index(argument, index) for argument in arguments])
        except KeyError:
            return None  # neither given nor allocated: a copy
        steps.append((kernel[launch.grid], pick, launch.sizes, launch.constants))
    places = [(t.shape, t.stride(), t.dtype) for t in fresh]
    return Replay(tuple(places), tuple(steps), tuple([index[id(t)] for t in results]))


def _index(argument: Tensors, index: dict[int, int]) -> int | tuple[int, ...]:
    return tuple([index[id(t)] for t in argument]) if isinstance(argument, tuple) else index[id(argument)]


def _picker(arguments: Sequence[int | tuple[int, ...]]) -> Callable[[list[Any]], list[Any]]:
    """Return what finds a launch's arguments in the list of all tensors."""

    def one_of(indices: int | tuple[int, ...]) -> Callable[[list[Any]], Any]:
        if isinstance(indices, int):
            return itemgetter(indices)
        if len(indices) == 1:
            return lambda tensors: (tensors[indices[0]],)
        return itemgetter(*indices)

    picks = [one_of(indices) for indices in arguments]
    return lambda tensors: [pick(tensors) for pick in picks]


@configs.cached
def known(*key: Any) -> Known:
    """Return what is known of calls with this key: always the same dict, empty at first."""
    return {}


def facts(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return all that the launches for these operands depend on; ``weights`` are some of them."""
    return (
        target.gpu(tensors[0].device), target.interpreted(),
        *[t.dtype for t in tensors], *[t.device for t in tensors], *map(type, tensors), *layout(tensors, weights),
    )  # fmt: skip


def layout(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return those of the facts that may be others when a call comes to its backward."""
    precision = target.input_precision(tensors[0].dtype, target.gpu(tensors[0].device))
    return (
        precision, *[t.shape for t in tensors], *[t.stride() for t in tensors],
        *[t.data_ptr() % 16 == 0 for t in weights],
    )  # fmt: skip
