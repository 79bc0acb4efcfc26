"""Host cost: a call must not cost the host more than the plain block's, whatever the kernels take."""

from __future__ import annotations

import pytest

from bench import host_cost
from fastinception.kernels import entry, spatial, target
from tests import fresh

# Of the plain block's inference, forward with grad, forward + backward. Measured: 0.23, 0.27 and 0.30, on the oldest
# PyTorch 0.25, 0.38 and 0.35. With every call checked and planned: 0.37, 0.49 and 0.49, and 0.41, 0.63 and 0.60.
LIMITS = (0.28, 0.43, 0.41)


@pytest.mark.skipif(not target.interpreted(), reason="stubs Triton's launches on CPU tensors: needs TRITON_INTERPRET=1")
def test_a_call_costs_the_host_less_than_the_plain_blocks():
    kernels = entry._entry_kernel, spatial._spatial_kernel
    # The least of each: beside other work one measurement may say anything (0.51 was seen).
    runs = [host_cost.measure(rounds=15) for _ in range(3)]
    least = {block: {name: min(run[block][name] for run in runs) for name in runs[0][block]} for block in runs[0]}
    ratios = [least["FastInception"][name] / cost for name, cost in least["plain"].items()]
    assert (entry._entry_kernel, spatial._spatial_kernel) == kernels
    assert all(ratio < limit for ratio, limit in zip(ratios, LIMITS, strict=True)), least
    assert all(least[host_cost.FLOOR][name] < cost for name, cost in least["FastInception"].items()), least


def test_an_import_leaves_the_interpreter_switch_alone():
    """Set on import, it would turn a GPU's whole test run into an interpreted one."""
    fresh.run("import os; from bench import host_cost; assert 'TRITON_INTERPRET' not in os.environ")
