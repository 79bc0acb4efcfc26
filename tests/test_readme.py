"""The README's snippets run as they stand, as a reader would paste them, and its tables are what was measured."""

from __future__ import annotations

import doctest
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinception import FastInception, Inception, explain, functional

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
CPUS = {
    "Intel Xeon, AVX-512": "compare-cpu-avx512-intel.json",
    "AMD EPYC, AVX-512": "compare-cpu-avx512.json",
    "AMD EPYC, AVX2": "compare-cpu-avx2.json",
}
# Of the H200's table, what its file has under another name.
VARIANTS = {
    "plain, CUDA graph": "plain CUDA graph",
    "`cudnn_convolution_relu`, CUDA graph": "plain cudnn_convolution_relu CUDA graph",
    "FastInception eager": "FastInception eager channels_last",
    "FastInception, CUDA graph": "FastInception CUDA graph",
}


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
    shared = Inception(3, 2, (2, 2), (2, 2), 2)
    assert [type(m) for m in names["swap"](torch.nn.Sequential(shared, shared))] == [FastInception, FastInception]
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


def _tables() -> list[list[list[str]]]:
    """Return the README's tables: rows of cells, the headings first."""
    found = re.findall(r"(?:^\|.*\|\n)+", README.read_text(), flags=re.MULTILINE)
    rows = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in found]
    return [[headings, *cells] for headings, _, *cells in rows]


def test_the_table_of_cpus_is_what_was_measured() -> None:
    ((headings, *rows),) = [table for table in _tables() if table[0][0] == "cores"]
    shown = {(cores, what): cells for cores, what, *cells in rows}
    measured = {}
    for cores, file in CPUS.items():
        speeds: dict[str, dict[str, float]] = {}
        for row in json.loads((RESULTS / file).read_text())["rows"]:
            speeds.setdefault(f"{row['mode']} {row['dtype']}", {})[row["variant"]] = row["examples_per_second"]
        for what, speed in speeds.items():
            # An engine's heading has its version, too; a plain network or ours may be frozen as well.
            best = [
                max((v for name, v in speed.items() if heading.startswith(name) or name.startswith(heading)), default=0)
                for heading in headings[2:]
            ]
            ratios = [f"{best[0] / other:.2f}x" if other else "" for other in best[1:]]
            measured[cores, what] = [f"{best[0]:.0f}", *ratios]
    assert shown == measured


def test_the_table_of_the_gpu_is_what_was_measured() -> None:
    ((headings, *rows),) = [table for table in _tables() if "`cudnn_convolution_relu`, CUDA graph" in table[0]]
    cases = json.loads((RESULTS / "h200" / "results.json").read_text())["parts"]["networks"]["cases"]
    assert sorted(row[0] for row in rows) == sorted(cases)
    for what, *cells in rows:
        speed = {row["variant"]: row["examples_per_second"] for row in cases[what]["rows"]}
        expected = [speed.get(VARIANTS.get(heading, heading)) for heading in headings[1:-1]]
        plain, fast = (max(v for name, v in speed.items() if name.startswith(k)) for k in ("plain", "FastInception"))
        assert cells == [*("" if v is None else f"{v:,.0f}" for v in expected), f"{fast / plain:.2f}x"], what
