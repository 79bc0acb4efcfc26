"""See which of our operators run, and which of PyTorch's functions are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OWN = "fastinception::"


def operators(run: Callable[[], Any], prefix: str = "") -> set[str]:
    """Return the names of our operators that ``run`` calls, without ``fastinception::``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run()
    names = {event.name.removeprefix(OWN) for event in profile.events() if event.name.startswith(OWN)}
    return {name for name in names if name.startswith(prefix)}


class Functions(TorchFunctionMode):
    """Remember the functions that convolve, pool, activate and concatenate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.relu, F.max_pool2d, torch.cat):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Remember the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
