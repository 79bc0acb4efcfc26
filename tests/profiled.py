"""See which of our operators run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OWN = "fastinception::"


def operators(run: Callable[[], Any], prefix: str = "") -> set[str]:
    """Return the names of our operators that ``run`` calls, without ``fastinception::``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run()
    names = {event.name.removeprefix(OWN) for event in profile.events() if event.name.startswith(OWN)}
    return {name for name in names if name.startswith(prefix)}
