"""The network's convolutions alone, which stand beside it in a comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import convolutions
from fastinception import GoogLeNet, backends


@pytest.mark.parametrize(("mode", "per_convolution"), [("inference", 1), ("training", 3)])
def test_the_convolutions_alone_are_all_of_them_and_nothing_else(
    mode: str, per_convolution: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its FLOPs are the network's own less the last layer's, and its only operators are convolutions."""
    images, net = torch.rand(2, 1, 32, 32), GoogLeNet()
    alone = convolutions.Convolutions(net, images, mode=mode, dtype="fp32")
    called: list[Any] = []
    convolve = nn.functional.conv2d

    def watch(x: Tensor, weight: Tensor, bias: Tensor, *settings: Any) -> Tensor:
        called.append((x.shape, weight.shape, bias.shape, *settings[:2]))
        return convolve(x, weight, bias, *settings)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "conv2d", watch)
        net(images)
        alone()
    assert called[:57] == called[57:]
    with FlopCounterMode(display=False) as counter:
        loss = net(images).sum()
        if mode == "training":
            loss.backward()
    linear = per_convolution * 2 * 2 * 1024 * 10
    expected = counter.get_total_flops() - linear
    with FlopCounterMode(display=False) as counter:
        alone()
    assert counter.get_total_flops() == expected > 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        alone()
    ran = {event.name.removeprefix("aten::") for event in profile.events()}
    assert ran & {"mkldnn_convolution", "convolution"}
    others = {"relu", "clamp_min", "max_pool2d", "max_pool2d_with_indices", "cat", "add", "add_", "sum"}
    assert ran & others == set()


@pytest.mark.parametrize("least", [0, 2 * 8 * 8, None])
def test_the_convolutions_alone_run_in_the_dtype_and_layout_of_the_rows(
    least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 where the CPU is slower in the dtype, from so many pixels on, as FastInception does."""
    monkeypatch.setattr(backends, "_WIDENED", {} if least is None else {torch.bfloat16: least})
    alone = convolutions.Convolutions(GoogLeNet(), torch.rand(2, 1, 32, 32), mode="training", dtype="bf16")
    assert len(alone.calls) == 3 + 9 * 6
    for _, x, weight, bias, grad in alone.calls:
        widened = least is not None and x.shape[0] * x.shape[2] * x.shape[3] >= least
        assert {t.dtype for t in (x, weight, bias, grad)} == {torch.float32 if widened else torch.bfloat16}
        assert all(t.stride(1) == 1 for t in (x, weight, grad))  # also where one channel leaves the layout open
