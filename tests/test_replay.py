"""Calls like an earlier one: their checks and their launches are known, in inference and in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastinception import Inception, functional
from fastinception.functional import inception
from fastinception.kernels import block as launches
from fastinception.kernels import configs, replay, target

HAS_TRITON = target.unsupported(torch.device("cpu"), torch.float32) is None

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot run here"),
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


def is_known(net: Inception, x: Tensor, train: bool) -> bool:
    known = known_of(net, x, train)
    return known is not None and known.get((train, True)) is not None


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


def forbid(monkeypatch: pytest.MonkeyPatch, checks: bool = True) -> None:
    """Have every call fail that is planned again, and with ``checks`` one that is only checked again."""
    if checks:
        monkeypatch.setattr(functional, "_choose", lambda *args: pytest.fail("a known call was checked again"))
    for name in ("forward", "backward"):
        monkeypatch.setattr(launches, name, lambda *args, **kwargs: pytest.fail("a known call was planned again"))


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


def misaligned(t: Tensor) -> Tensor:
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].as_strided(t.shape, t.stride()).copy_(t)


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


class Operators(TorchDispatchMode):
    """Remember the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


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
    with Operators() as operators:
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


# What may be another in a backward than in those before it.


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


def test_gradients_are_plain_tensors_whatever_comes_upstream(planned):
    net, x = planned
    y = inception(x.requires_grad_(), params_of(net), backend="triton")
    for _ in range(2):
        grads = torch.autograd.grad(y, [x, *params_of(net)], torch.ones_like(y).as_subclass(Marked), retain_graph=True)
        assert {type(grad) for grad in grads} == {Tensor}


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


# What can be recorded.


class Kernel:
    """Remember what it was launched on."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.launch

    def launch(self, *args: Any, **constants: Any) -> None:
        self.args, self.constants = args, constants


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
