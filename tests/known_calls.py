"""What tests of known calls share: a block that was called once, further calls of it, and what these plan again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinception import Inception, functional
from fastinception.functional import inception
from fastinception.kernels import block as launches
from fastinception.kernels import configs, replay, target

MARKS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
    pytest.mark.skipif(
        target.unsupported(torch.device("cpu"), torch.float32) is not None, reason="Triton cannot run here"
    ),
]
MODES = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
NAMES = [f"{name}.{kind}" for name in ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2") for kind in ("weight", "bias")]


def call(net: Inception, x: Tensor, train: bool, **options: Any) -> list[Tensor]:
    """Return the block of ``x``, and its gradients if ``train``, by Triton."""
    return results(net, x, train, lambda x, params: inception(x, params, backend="triton", **options))


def truth(net: Inception, x: Tensor, train: bool) -> list[Tensor]:
    return results(net, x, train, lambda x, params: net(x))


def params_of(net: Inception) -> list[Tensor]:
    return [net.get_parameter(name) for name in NAMES]  # parameters() leaves a tied one out


def results(net: Inception, x: Tensor, train: bool, function: Any) -> list[Tensor]:
    x, params = x.detach(), params_of(net)
    with torch.set_grad_enabled(train):
        y = function(x.requires_grad_(train), params)
    if not train:
        return [y]
    torch.manual_seed(1)
    upstream = torch.randn(y.shape, dtype=y.dtype).contiguous(memory_format=torch.channels_last)
    return [y.detach(), *torch.autograd.grad(y, [x, *params], upstream)]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    rtol, atol = (2e-2, 4e-3) if ours[0].dtype is torch.float16 else (1e-4, 1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def known_of(net: Inception, x: Tensor, train: bool) -> replay.Known | None:
    with torch.set_grad_enabled(train):
        return functional._choose(x.detach().requires_grad_(train), params_of(net), "triton", True).known


def is_known(net: Inception, x: Tensor, train: bool) -> bool:
    known = known_of(net, x, train)
    return known is not None and known.get((train, True)) is not None


@contextmanager
def noted(module: Any, name: str) -> Iterator[list[Any]]:
    """Return the arguments of a module's function, of each call in turn."""
    own, calls = getattr(module, name), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, lambda *args: calls.append(args) or own(*args))
        yield calls


def checked() -> Any:
    """Return the calls that are checked, and not taken for an earlier one."""
    return noted(functional, "_choose")


def planned_backwards() -> Any:
    """Return the backwards that are planned, and not known from an earlier one."""
    return noted(launches, "backward")


def forbid(monkeypatch: pytest.MonkeyPatch, checks: bool = True) -> None:
    """Have every call fail that is planned again, and with ``checks`` one that is only checked again."""
    if checks:
        monkeypatch.setattr(functional, "_choose", lambda *args: pytest.fail("a known call was checked again"))
    for name in ("forward", "backward"):
        monkeypatch.setattr(launches, name, lambda *args, **kwargs: pytest.fail("a known call was planned again"))


@pytest.fixture
def planned(request):
    """A block and an input with which one call was made: in training, but where the test's ``train`` says otherwise."""
    configs.forget()
    torch.manual_seed(0)
    net = Inception(7, 5, (3, 9), (2, 6), 4).to(memory_format=torch.channels_last)
    x = torch.randn(3, 7, 4, 5).contiguous(memory_format=torch.channels_last)
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    call(net, x, params.get("train", True))
    yield net, x
    configs.forget()


def misaligned(t: Tensor) -> Tensor:
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].as_strided(t.shape, t.stride()).copy_(t)
