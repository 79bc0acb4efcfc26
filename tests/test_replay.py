"""Calls like an earlier one: their checks and their launches are known, in inference and in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastinception import Inception
from fastinception.functional import inception
from fastinception.kernels import block as launches
from fastinception.kernels import configs, replay, target
from tests import known_calls, profiled
from tests.known_calls import (
    MODES,
    call,
    checked,
    close,
    forbid,
    is_known,
    misaligned,
    params_of,
    planned_backwards,
    truth,
)

pytestmark, planned = known_calls.MARKS, known_calls.planned


@MODES
def test_a_known_call_goes_straight_to_its_launches(planned, train, monkeypatch):
    net, x = planned
    expected = [truth(net, t, train) for t in (x, -x)]
    forbid(monkeypatch)
    ours = [call(net, t, train) for t in (x, -x)]  # other numbers; the first results stay as they are
    for one, other in zip(ours, expected, strict=True):
        close(one, other)
        assert [t.stride() for t in one] == [t.stride() for t in other]


@MODES
def test_calls_are_known_without_pytorchs_own_comparison(planned, train, monkeypatch):
    net, x = planned
    configs.forget()
    monkeypatch.setattr(replay, "TensorGuards", None)
    call(net, x, train)
    expected = truth(net, -x, train)
    forbid(monkeypatch, checks=False)
    close(call(net, -x, train), expected)


@MODES
def test_inference_and_training_are_two_calls(planned, train):
    net, x = planned
    close(call(net, x, not train), truth(net, x, not train))
    close(call(net, x, train), truth(net, x, train))


@pytest.mark.parametrize("train", [False])
def test_a_known_call_keeps_to_inference_mode(planned, train, monkeypatch):
    net, x = planned
    forbid(monkeypatch, checks=False)
    with torch.inference_mode():
        assert inception(x, list(net.parameters()), backend="triton").is_inference()
    with torch.no_grad():
        assert not inception(x, list(net.parameters()), backend="triton").is_inference()


@MODES
def test_a_known_call_follows_the_parameters(planned, train):
    net, x = planned
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    close(call(net, x, train), truth(net, x, train))
    net.p1_1 = torch.nn.Conv2d(7, 5, 1).to(memory_format=torch.channels_last)
    close(call(net, x, train), truth(net, x, train))


@pytest.mark.parametrize(
    ("change", "train"),
    [
        *(
            (change, False)
            for change in ("batch", "slice", "width", "expanded bias", "misaligned weight", "misaligned x", "float16")
        ),
        *((change, train) for change in ("x's layout", "weights' layout", "layouts") for train in (False, True)),
    ],
)
def test_another_call_is_not_taken_for_a_known_one(planned, change, train):
    net, x = planned
    if change == "batch":
        x = torch.cat((x, x))
    elif change == "x's layout":
        x = x.contiguous()
    elif change == "layouts":
        net, x = net.to(memory_format=torch.contiguous_format), x.contiguous()
    elif change == "slice":
        x = torch.cat((x, x), dim=1).contiguous(memory_format=torch.channels_last)[:, :7]
    elif change == "width":
        net.p1_1.weight.data, net.p1_1.bias.data = net.p1_1.weight.data[:3], net.p1_1.bias.data[:3]
    elif change == "weights' layout":
        net.p2_2.weight.data = net.p2_2.weight.data.contiguous()
    elif change == "expanded bias":
        net.p2_2.bias.data = torch.ones(1).expand(9)
    elif change == "misaligned weight":
        net.p2_1.weight.data = misaligned(net.p2_1.weight.data)
    elif change == "misaligned x":
        x = misaligned(x)
    else:
        net, x = net.half(), x.half()
    assert not is_known(net, x, train)
    for again in (False, True):
        with checked() as checks:
            ours, plains = call(net, x, train), truth(net, x, train)
        close(ours, plains)
        assert ours[0].stride() == plains[0].stride()
        assert not checks or not again or change.startswith("misaligned")  # what is misaligned is always checked
        assert checks or again


@MODES
def test_tied_parameters_are_no_rule_for_others(planned, train):
    _, x = planned
    net = Inception(7, 5, (3, 9), (3, 9), 4)
    other = Inception(7, 5, (3, 9), (3, 9), 4)
    net.p3_1.weight = net.p2_1.weight
    for _ in range(2):
        for one in (net, other):
            close(call(one, x, train), truth(one, x, train))


@MODES
@pytest.mark.parametrize("wrong", ["dtype", "channels", "width", "device", "backend"])
def test_a_bad_call_is_an_error_after_a_known_one(planned, wrong, train):
    net, x = planned
    params = params_of(net)
    backend = "Triton" if wrong == "backend" else "triton"
    with torch.no_grad():
        if wrong == "dtype":
            params[4] = params[4].double()
        elif wrong == "channels":
            x = torch.randn(3, 8, 4, 5).contiguous(memory_format=torch.channels_last)
        elif wrong == "width":
            params[3] = params[3][:2]
        elif wrong == "device":
            params[3] = params[3].to("meta")
    with torch.set_grad_enabled(train), pytest.raises((TypeError, ValueError)):
        inception(x, params, backend=backend)


@MODES
def test_what_watches_a_call_meets_it_after_a_known_one(planned, train):
    net, x = planned
    params = [p.detach().requires_grad_(train) for p in params_of(net)]

    def run(x: Tensor) -> Tensor:
        return inception(x, params, backend="triton")

    run(x)
    expected = net(x).detach()
    stacked = torch.stack((x, -x))
    torch.testing.assert_close(torch.vmap(run)(stacked), torch.stack((expected, net(-x))))
    _, tangent = torch.func.jvp(run, (x,), (x,))
    torch.testing.assert_close(tangent, torch.func.jvp(net, (x,), (x,))[1])
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(x, x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    assert inception(x, params_of(net), backend="triton").requires_grad
    assert run(x.detach().requires_grad_()).requires_grad
    torch.testing.assert_close(run(torch._neg_view(-x)), expected)
    without_bias = [torch._efficientzerotensor(p.shape) if i == 1 else p for i, p in enumerate(params)]
    assert torch.equal(inception(x, without_bias, backend="triton")[:, 5:], run(x)[:, 5:])
    with profiled.Operators() as operators:
        torch.testing.assert_close(run(x), expected)
    assert f"fastinception.triton_{'forward' if train else 'inference'}.default" in operators.names
    relus = [bool(inception(x, params, backend="triton", activation=a).min() >= 0) for a in 2 * ("relu", "none")]
    assert relus == [True, False, True, False]


@MODES
def test_a_call_under_autocast_is_known_too(planned, train, monkeypatch):
    net, x = planned
    net.half()
    expected = call(net, x.half(), train)
    net.float()
    with torch.autocast("cpu", torch.float16):
        call(net, -x, train)
        forbid(monkeypatch)
        y, *grads = call(net, x, train)
    assert y.dtype is torch.float16
    torch.testing.assert_close(y, expected[0], rtol=0, atol=0)
    for ours, theirs in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0)


@pytest.mark.parametrize("special", ["library", "library's gradients", "empty"])
@MODES
def test_what_takes_more_than_launches_is_never_replayed(planned, special, train, monkeypatch):
    net, x = planned
    tiles = configs.Tiles(32, 32, 16, num_warps=4, num_stages=1, library=True)
    if special == "library":
        for kernel in ("spatial", "spatial_train"):
            monkeypatch.setitem(configs.DEFAULTS, kernel, lambda dtype, chip: tiles)
    elif special == "library's gradients":
        monkeypatch.setitem(configs.DEFAULTS, "weight_gradient", lambda dtype, chip: tiles)
    else:
        x = x[:0]
    configs.forget()
    with planned_backwards() as plans:
        for _ in range(2):
            close(call(net, x, train), truth(net, x, train))
    if special == "library's gradients":
        assert is_known(net, x, train)
        assert len(plans) == 2 * train
    else:
        assert not is_known(net, x, train)


@pytest.mark.parametrize("train", [False])
@pytest.mark.parametrize("changed", ["input_precision", "gpu", "interpreted"])
def test_what_is_not_of_the_operands_is_part_of_the_key(planned, changed, train, monkeypatch):
    net, x = planned
    assert is_known(net, x, train)
    another = {"gpu": target.Gpu("another", "cpu"), "input_precision": "tf32", "interpreted": "another"}[changed]
    monkeypatch.setattr(target, changed, lambda *_: another)
    assert not is_known(net, x, train)
    monkeypatch.setattr(target, "unsupported", lambda *_: None)
    with checked() as checks:
        call(net, x, train)
    assert checks


class Marked(Tensor):
    """A subclass, which may be anything."""


@pytest.mark.parametrize("train", [False])
def test_a_subclass_is_not_taken_for_a_tensor(planned, train):
    net, x = planned
    with torch.no_grad():
        y = inception(x.as_subclass(Marked), params_of(net), backend="triton")
        weight = [p.as_subclass(Marked) if i == 4 else p for i, p in enumerate(params_of(net))]
        z = inception(x, weight, backend="triton")
    assert type(y) is type(z) is Marked
    close([y.as_subclass(Tensor)], truth(net, x, False))


@MODES
def test_known_calls_are_forgotten_with_their_tiles(planned, train):
    net, x = planned
    assert is_known(net, x, train)
    configs.forget()
    assert not is_known(net, x, train)


def test_the_operators_are_replayed_too(planned, monkeypatch):
    net, x = planned
    forward, backward = torch.ops.fastinception.triton_forward, torch.ops.fastinception.triton_backward
    inference = torch.ops.fastinception.triton_inference
    params, needs = [p.detach() for p in params_of(net)], [True] * 13

    def run(x: Tensor) -> list[Tensor]:
        alone = [inference(x, *params, relu) for relu in (True, False)]
        out, *saved = forward(x, *params)
        return [*alone, out, *backward(torch.ones_like(out), x, *params, *saved, needs)]

    x = x.detach()
    planned, expected = run(x), run(-x)
    forbid(monkeypatch)
    for ours, theirs in zip((run(x), run(-x)), (planned, expected), strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("train", [False])
def test_a_call_with_an_output_of_the_callers_is_replayed_on_that(planned, train, monkeypatch):
    net, x = planned
    expected = [truth(net, t, False)[0].detach() for t in (x, -x)]
    outs = [torch.full_like(expected[0], float("nan")).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    other = torch.full_like(expected[0], float("nan")).contiguous()
    with torch.no_grad():
        inception(x, params_of(net), backend="triton", out=outs[0])
        inception(x, params_of(net), backend="triton", out=other)  # is not taken for the same call
        monkeypatch.setattr(launches, "forward", lambda *args, **kwargs: pytest.fail("a known call was planned again"))
        for t, out in ((x, outs[1]), (-x, outs[2])):
            assert inception(t, params_of(net), backend="triton", out=out) is out
    close([*outs, other], [expected[0], *expected, expected[0]])


@pytest.mark.parametrize("train", [False])
def test_an_output_without_relu_is_another_call(planned, train):
    net, x = planned
    out = torch.empty_like(net(x)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for activation in ("relu", "none", "relu"):
            inception(x, params_of(net), backend="triton", out=out, activation=activation)
            assert bool((out < 0).any()) is (activation == "none")
