"""The README's snippets run as they stand, one after another, as a reader would paste them."""

from __future__ import annotations

import doctest
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinception import FastInception, Inception, explain, functional

README = Path(__file__).resolve().parent.parent / "README.md"


def _snippets(*, sessions: bool = False) -> list[str]:
    """Return the Python blocks, those without a prompt or those that show one."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return [block for block in blocks if block.startswith(">>>") is sessions]


def test_the_session_prints_what_it_shows(usual_few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "FEW", usual_few)
    (session,) = _snippets(sessions=True)
    test = doctest.DocTestParser().get_doctest(session, {}, "README.md", str(README), None)
    results = doctest.DocTestRunner().run(test)
    assert (results.attempted, results.failed) == (5, 0)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what torchrun sets for the only process of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.filterwarnings("error:Grad strides do not match")  # DistributedDataParallel would copy each gradient
@pytest.mark.usefixtures("torchrun")
def test_the_snippets_run_and_do_what_they_say() -> None:
    start, swap, step, parallel = _snippets()
    names: dict[str, Any] = {}
    exec(start, names)
    assert isinstance(names["net"], torch._dynamo.eval_frame.OptimizedModule)

    names = {}
    exec(swap, names)
    assert type(names["swap"](Inception(3, 2, (2, 2), (2, 2), 2))) is FastInception
    (block,) = [m for m in names["net"].modules() if isinstance(m, FastInception)]
    assert explain(block, torch.rand(1, 192, 4, 4)).name == "aten"

    before = [p.detach().clone() for p in names["net"].parameters()]
    exec(step, names)
    assert torch.isfinite(names["loss"])
    after = list(names["net"].parameters())
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))

    gradients: list[Tensor] = [p.grad.clone() for p in after]
    exec(parallel, names)
    assert all(not torch.equal(p.grad, g) for p, g in zip(after, gradients, strict=True))
