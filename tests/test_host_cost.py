"""Host cost: a call must not cost the host more than the plain block's, whatever the kernels take."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

from bench import host_cost
from fastinception import FastInception, Inception
from fastinception.kernels import entry, spatial, target
from tests import fresh

# Of the plain block's inference, forward with grad, forward + backward. Measured: 0.23, 0.27 and 0.30, on the oldest
# PyTorch 0.25, 0.38 and 0.35. With every call checked and planned: 0.37, 0.49 and 0.49, and 0.41, 0.63 and 0.60.
LIMITS = (0.28, 0.43, 0.41)


needs_interpreter = pytest.mark.skipif(
    not target.interpreted(), reason="stubs Triton's launches on CPU tensors: needs TRITON_INTERPRET=1"
)


@needs_interpreter
def test_a_call_costs_the_host_less_than_the_plain_blocks():
    kernels = entry._entry_kernel, spatial._spatial_kernel
    # The least of each: beside other work one measurement may say anything (0.51 was seen).
    runs = [host_cost.measure(rounds=15) for _ in range(3)]
    least = {block: {name: min(run[block][name] for run in runs) for name in runs[0][block]} for block in runs[0]}
    ratios = [least["FastInception"][name] / cost for name, cost in least["plain"].items()]
    assert (entry._entry_kernel, spatial._spatial_kernel) == kernels
    assert all(ratio < limit for ratio, limit in zip(ratios, LIMITS, strict=True)), least
    assert all(least[host_cost.FLOOR][name] < cost for name, cost in least["FastInception"].items()), least


@needs_interpreter
def test_costs_are_the_least_microseconds_of_a_call_on_one_thread(monkeypatch):
    """The clock says 4 ms for each sample of the first round, and 2 ms in the second; two calls make one."""
    samples, threads = 3 * 3, []
    ticks = [tick for seconds in (4e-3, 2e-3) for _ in range(samples) for tick in (0.0, seconds)]
    monkeypatch.setattr(host_cost.time, "thread_time", mock.Mock(side_effect=itertools.accumulate(ticks)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    found = host_cost.measure(rounds=2, calls=2)
    kinds = ("inference", "forward with grad", "forward + backward")
    rows = "plain", "FastInception", host_cost.FLOOR
    assert found == {name: pytest.approx(dict.fromkeys(kinds, 1000)) for name in rows}
    assert threads == [1, 7]


@needs_interpreter
def test_no_call_launches_a_stub_behind_the_measurement():
    block = FastInception(*host_cost.WIDTHS, backend="triton")
    x = torch.rand(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    plain = Inception(*host_cost.WIDTHS)
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        with host_cost.stubbed():
            block(x)
        torch.testing.assert_close(block(x), plain(x))


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command sets
    monkeypatch.setattr(host_cost, "compile_failure", mock.Mock(side_effect=KeyboardInterrupt))
    assert host_cost.main([]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_an_import_leaves_the_interpreter_switch_alone():
    """Set on import, it would turn a GPU's whole test run into an interpreted one."""
    fresh.run("import os; from bench import host_cost; assert 'TRITON_INTERPRET' not in os.environ")
