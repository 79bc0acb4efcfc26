"""Backwards like an earlier one: what may be another in one than in those before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastinception.functional import inception
from fastinception.kernels import configs, target
from tests import known_calls
from tests.known_calls import call, close, forbid, misaligned, params_of, planned_backwards, truth

pytestmark, planned = known_calls.MARKS, known_calls.planned


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_backward_behind_another_precision_or_none(planned, forgotten, monkeypatch):
    net, x = planned
    expected = truth(net, x, True)
    y = inception(x.requires_grad_(), params_of(net), backend="triton")
    if forgotten:
        configs.forget()
    else:
        monkeypatch.setattr(target, "input_precision", lambda dtype, gpu: "tf32")  # the interpreter rounds nothing
    torch.manual_seed(1)
    upstream = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    with planned_backwards() as plans:
        close([y.detach(), *torch.autograd.grad(y, [x, *params_of(net)], upstream)], expected)
    assert len(plans) == 1


def test_a_backward_is_known_whatever_the_weights_layout(planned, monkeypatch):
    net, x = planned
    net.to(memory_format=torch.contiguous_format)
    for conv in (net.p2_2, net.p3_2):
        conv.weight.data = conv.weight.data.contiguous()
    call(net, x, True)
    forbid(monkeypatch)
    ours, theirs = call(net, x, True), truth(net, x, True)
    close(ours, theirs)
    assert [t.stride() for t in ours[1:]] == [t.stride() for t in (x, *params_of(net))]


@pytest.mark.parametrize("upstream", ["contiguous", "expanded", "transposed", "channels_last"])
def test_a_known_backward_is_not_taken_for_another_gradients_strides(planned, upstream):
    net, x = planned
    grad = torch.randn(3, 24, 4, 5)
    if upstream == "expanded":
        grad = torch.randn(1).expand(3, 24, 4, 5)
    elif upstream == "transposed":
        grad = torch.randn(3, 24, 5, 4).transpose(2, 3)
    elif upstream == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    ours, theirs = inception(x.requires_grad_(), params_of(net), backend="triton"), net(x)
    for _ in range(2):
        grads = [torch.autograd.grad(y, [x, *params_of(net)], grad, retain_graph=True) for y in (ours, theirs)]
        close(*map(list, grads))


@pytest.mark.parametrize("wanted", [[0], [1, 2], [5, 12], [0, 3, 11]])
def test_a_known_backward_is_not_taken_for_one_that_needs_others(planned, wanted):
    net, x = planned
    inputs = [x, *params_of(net)]
    for i, t in enumerate(inputs):
        t.requires_grad_(i in wanted)
    ours, theirs = inception(x, inputs[1:], backend="triton"), net(x)
    upstream = torch.randn_like(theirs)
    with planned_backwards() as plans:
        for _ in range(2):
            grads = [
                torch.autograd.grad(y, [inputs[i] for i in wanted], upstream, retain_graph=True) for y in (ours, theirs)
            ]
            close(*map(list, grads))
    assert len(plans) == 1


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("changed", ["x", "weight", "bias", "dtype"])
def test_other_operands_in_the_backward_are_an_error(planned, changed, known):
    """Kernels that were planned for the old one would pass the end of its memory."""
    net, x = planned
    if not known:
        configs.forget()
    y = inception(x.requires_grad_(), params_of(net), backend="triton")
    if changed == "x":
        x.data = x.data[:1]
    elif changed == "weight":
        net.p2_1.weight.data = net.p2_1.weight.data[:2]
    elif changed == "bias":
        net.p1_1.bias.data = net.p1_1.bias.data[:2]
    else:
        net.p1_1.weight.data = net.p1_1.weight.data.half()
    with pytest.raises(RuntimeError, match="another shape"):
        y.sum().backward()


@pytest.mark.parametrize("unpacked", ["copies", "transposed", "misaligned"])
def test_what_hooks_make_of_saved_tensors(planned, unpacked):
    """Whoever saves them elsewhere may give them back with other strides."""
    net, x = planned

    def unpack(t: Tensor) -> Tensor:
        if unpacked == "copies":
            return t.clone()
        if unpacked == "misaligned":
            return misaligned(t)
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    expected = truth(net, x, True)
    with planned_backwards() as plans:
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
                close(call(net, x, True), expected)
            close(call(net, x, True), expected)
    assert len(plans) == (unpacked != "copies")


def test_a_second_derivative_after_a_known_first(planned):
    net, x = planned
    x.requires_grad_()
    seconds = []
    for y in (inception(x, params_of(net), backend="triton"), net(x)):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        seconds.append(list(torch.autograd.grad(first.square().sum(), [x, *params_of(net)])))
    close(*seconds)
