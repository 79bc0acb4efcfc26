"""What a replay is made of: operands that are alike, launches that can be recorded, memory of its own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from fastinception.kernels import configs, replay, target
from tests import known_calls
from tests.known_calls import misaligned

pytestmark = known_calls.MARKS


class Kernel:
    """Remember what it was launched on."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.launch

    def launch(self, *args: Any, **constants: Any) -> None:
        self.args, self.constants = args, constants


@pytest.mark.parametrize("guards", [replay.TensorGuards, None])
def test_operands_are_alike_only_where_launches_on_them_are(monkeypatch, guards):
    """With PyTorch's own comparison and without."""
    configs.forget()
    monkeypatch.setattr(replay, "TensorGuards", guards)
    x, bias = torch.zeros(2, 4), torch.zeros(3)
    found = replay.known([x, bias])
    assert replay.known([-x, torch.ones(3)]) is found
    others = [torch.zeros(5), torch.zeros(6)[::2], bias.double(), bias.to("meta"), torch._neg_view(bias)]
    for other in (*others, misaligned(bias)):
        assert replay.known([x, other]) is not found
    assert replay.known([x, bias]) is found


@pytest.mark.skipif(replay.TensorGuards is None, reason="nothing is remembered without PyTorch's own comparison")
def test_what_was_seen_first_is_forgotten_first():
    seen, operands = [], [[torch.zeros(size)] for size in range(1, replay._MOST_SEEN + 3)]
    for i, tensors in enumerate(operands):
        replay.remember(seen, tensors, i)
    assert [replay.recall(seen, tensors) for tensors in operands] == [None, None, *range(2, len(operands))]


def test_a_replay_launches_on_the_operands_and_on_memory_of_its_own():
    kernel, launch = Kernel(), configs.launch_config(3, (1, 2), BLOCK=4)
    a, b = torch.zeros(2), torch.zeros(3)
    out, scratch = (
        torch.zeros(2, 3, 4, 5).permute(0, 3, 1, 2),
        torch.zeros(7, dtype=torch.uint8),
    )
    launched = [replay.launch(kernel, launch, a, (b,), (out, None, scratch), None)]
    again = replay.record(launched, [a, b], [out, None, scratch], [out, None])
    other_a, other_b = a.clone(), b.clone()
    result, nothing = again(other_a, other_b)
    assert nothing is None
    one, (two,), (three, none, four), last, *sizes = kernel.args
    assert one is other_a
    assert two is other_b
    assert three is result
    assert (none, last, sizes, kernel.constants) == (None, None, [1, 2], {"BLOCK": 4, "enable_fp_fusion": True})
    assert (result.shape, result.stride(), result.dtype) == (out.shape, out.stride(), out.dtype)
    assert (four.shape, four.dtype) == (scratch.shape, scratch.dtype)
    assert len({t.data_ptr() for t in (out, scratch, result, four)}) == 4


@pytest.mark.parametrize("private", ["as it is", "absent", "other arguments", "another layout", "another dtype"])
def test_what_a_replay_allocates_is_like_what_was_recorded(monkeypatch, private):
    guards = pytest.importorskip("torch._C._dynamo.guards")
    name, t = "_empty_strided_cpu", torch.empty(2, 3, 4, 5, dtype=torch.float16).to(memory_format=torch.channels_last)
    if private == "as it is":
        assert replay._allocation(t).func is getattr(guards, name)
    elif private == "absent":
        monkeypatch.delattr(guards, name)
    else:
        other = {
            "other arguments": lambda size, stride: torch.empty_strided(size, stride),
            "another layout": lambda size, stride, dtype: torch.empty(size, dtype=dtype),
            "another dtype": lambda size, stride, dtype: torch.empty_strided(size, stride),
        }
        monkeypatch.setattr(guards, name, other[private])
    allocate = replay._allocation(t)
    first, second = allocate(), allocate()
    assert first.data_ptr() != second.data_ptr()
    for made in (first, second):
        assert (made.shape, made.stride(), made.dtype, made.device) == (t.shape, t.stride(), t.dtype, t.device)


@pytest.mark.parametrize("why", ["nothing launched", "other work", "unknown", "unknown among many", "one tensor twice"])
def test_what_cannot_be_recorded(why):
    kernel, launch = Kernel(), configs.launch_config(3, (1, 2), BLOCK=4)
    a, b, out, other = (torch.zeros(2) for _ in range(4))
    launched = [replay.launch(kernel, launch, a, (b, None), out)]
    assert replay.record(launched, [a, b], [out], [out]) is not None
    operands = [a, b]
    if why == "nothing launched":
        launched = []
    elif why == "other work":
        launched.append(None)
    elif why == "unknown":
        launched.append(replay.launch(kernel, launch, other, (b, None), out))
    elif why == "unknown among many":
        launched.append(replay.launch(kernel, launch, a, (b, other), out))
    else:
        operands.append(a)
    assert replay.record(launched, operands, [out], [out]) is None


def test_nothing_is_run_for_its_kernels_while_a_graph_is_captured(monkeypatch):
    """What it does beside its launches would be captured twice."""
    monkeypatch.setattr(replay, "compiles_together", lambda: True)
    monkeypatch.setattr(target, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    replay.compile(lambda: pytest.fail("it ran"), mock.Mock(is_cuda=True))


def test_a_first_call_inside_a_capture_says_what_it_needs():
    class Refused:
        def __init__(self, words):
            self.words = words

        def __getitem__(self, grid):
            def run(*args, **kwargs):
                raise RuntimeError(self.words)

            return run

    config = configs.launch_config(1, ())
    words = "Triton Error [CUDA]: operation not permitted when stream is capturing"
    with pytest.raises(RuntimeError, match="gradients was expected before the capture"):
        replay.launch(Refused(words), config)
    with pytest.raises(RuntimeError, match="out of memory"):
        replay.launch(Refused("Triton Error [CUDA]: out of memory"), config)
