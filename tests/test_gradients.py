"""Training: what asks for gradients gets them, in-place changes and changed weights included; nothing is remembered."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from fastinception import Conv2d, FastInception, Inception, aten, conv_backward, stem
from fastinception.kernels import block as launches
from fastinception.kernels import configs

SMALL = (5, 4, (3, 6), (2, 3), 7)
CONVS = ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2")
BACKENDS = ("aten", "triton")


def pair(backend="aten", dtype=torch.float32, seed=0):
    """Return a plain and a fast block with the same numbers, and an input."""
    torch.manual_seed(seed)
    plain = Inception(*SMALL).to(dtype)
    fast = FastInception(*SMALL, backend=backend).to(dtype)
    fast.load_state_dict(plain.state_dict())
    return plain, fast, torch.randn(2, 5, 6, 5, dtype=dtype)


def gradients(block, x, grad_out):
    """Return the gradients of what asks for one, by name."""
    x = x.detach().clone().requires_grad_()
    block.zero_grad(set_to_none=True)
    block(x).backward(grad_out)
    return {"x": x.grad, **{name: p.grad for name, p in block.named_parameters() if p.grad is not None}}


def check_gradients(plain, fast, x):
    grad_out = torch.randn(2, 20, 6, 5, dtype=x.dtype)
    theirs, ours = gradients(plain, x, grad_out), gradients(fast, x, grad_out)
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "trained",
    [
        {"p1_1.bias"}, {"p2_1.weight"}, {"p2_2.weight"}, {"p2_2.bias", "p4_2.weight"}, {"p3_1.bias"},
        {"p3_2.weight"}, {"p4_2.bias"}, {"p1_1.weight", "p3_1.weight"}, set(),
        {f"{name}.{kind}" for name in CONVS for kind in ("weight", "bias")},
    ],
    ids=lambda trained: "+".join(sorted(trained)) if len(trained) < 12 else "all",
)  # fmt: skip
@pytest.mark.parametrize("need_x", [False, True])
def test_frozen_parameters(backend, trained, need_x):
    plain, fast, x = pair(backend)
    grad_out = torch.randn(2, 20, 6, 5)
    results = []
    for block in (plain, fast):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in trained)
        data = x.clone().requires_grad_(need_x)
        out = block(data)
        assert out.requires_grad == bool(trained or need_x)
        if out.requires_grad:
            out.backward(grad_out)
        results.append({"x": data.grad, **{name: p.grad for name, p in block.named_parameters()}})
    theirs, ours = results
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)


def test_channels_behind_a_products_last_whole_tile():
    """Of 128: 28 of the entry's, 32 of the 5x5, and 12 and 22 of what is read. Whatever is not written is NaN."""
    torch.manual_seed(0)
    plain = Inception(150, 8, (140, 8), (8, 160), 8).double()
    fast = FastInception.from_reference(plain, backend="triton")
    x = torch.randn(2, 150, 12, 13, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-9, atol=1e-9)
    grad_out = torch.randn(2, 184, 12, 13, dtype=torch.float64)
    theirs = gradients(plain, x, grad_out)
    torch.use_deterministic_algorithms(True)
    try:
        ours = gradients(fast, x, grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("asked", ["x", "hidden", "p2_1.weight", "p4_2.bias"])
def test_only_what_a_backward_leads_to_is_computed(backend, operator, asked, passing, monkeypatch):
    """As torch.autograd.grad(y, x) of a network in training: no weight's gradient, though all require one."""
    plain, fast, x = pair(backend)
    grad_out, needs = torch.randn(2, 20, 6, 5), []

    def watch(function):
        return lambda *args: (
            needs.append([need is not None and need is not False for need in args[-1]]) or function(*args)
        )

    configs.forget()  # a known backward would be replayed
    module = aten if backend == "aten" else launches
    monkeypatch.setattr(module, "backward", watch(module.backward))
    results = []
    for block in (plain, fast):
        start = x.clone().requires_grad_()
        hidden = start * 2
        with passing() if operator else nullcontext():
            y = block(hidden)
        wanted = {"x": start, "hidden": hidden, **dict(block.named_parameters())}[asked]
        results.append(torch.autograd.grad(y, wanted, grad_out))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    names = ["x", *(name for name, _ in fast.named_parameters())]
    assert [name for name, need in zip(names, needs[0], strict=True) if need] == ["x" if asked == "hidden" else asked]


def test_leaves_that_are_asked_for_by_name():
    """All of them, and with them no more than one more exception: each takes as long as a small backward."""
    plain, fast, x = pair()
    x.requires_grad_()
    grad_out = torch.randn(2, 20, 6, 5)
    for names in (["p1_1.weight"], ["p1_1.weight", "p4_2.bias"], [name for name, _ in plain.named_parameters()]):
        theirs, ours = (
            torch.autograd.grad(block(x), [x, *map(block.get_parameter, names)], grad_out) for block in (plain, fast)
        )
        for expected, found in zip(theirs, ours, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_a_node_that_is_run_by_hand_gives_every_gradient(inside):
    """Also in the backward of another graph, whose engine knows nothing of this one's leaves."""
    _, fast, x = pair()
    x.requires_grad_()
    y, found = fast(x), []
    grad_out = torch.randn_like(y)

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            found.extend(y.grad_fn.apply(grad_out))
            return grad

    if inside:
        ByHand.apply(torch.ones(1, requires_grad=True)).backward()
    else:
        found.extend(y.grad_fn.apply(grad_out))
    expected = torch.autograd.grad(fast(x), [x, *fast.parameters()], grad_out)
    assert all(map(torch.equal, found[-13:], expected))


def test_only_what_a_backward_leads_to_is_computed_around_the_blocks(monkeypatch):
    monkeypatch.setattr(conv_backward, "COLUMNS_PAY", True)
    monkeypatch.setattr(stem, "_KEPT", 0)
    seen = []

    def watch(module):
        function = module.conv_backward
        watching = lambda *args, **kwargs: seen.append(args[3][:2]) or function(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(module, "conv_backward", watching)

    watch(conv_backward)
    watch(stem)
    x = torch.randn(16, 16, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    convolution = nn.Conv2d(16, 16, 3, padding=1)
    own = Conv2d(16, 16, 3, padding=1)
    own.weight, own.bias = convolution.weight, convolution.bias
    for run in (own, stem.Stage(convolution, nn.ReLU(), nn.MaxPool2d(3, 2, 1))):
        torch.autograd.grad(run(x).sum(), x)
        torch.autograd.grad(run(x).sum(), convolution.weight)
        run(x).sum().backward(inputs=[convolution.bias])
        run(x).sum().backward()
    only_bias = [(False, False)]
    assert seen == [(True, False), (False, True), *only_bias, (True, True), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate(backend):
    plain, fast, x = pair(backend)
    grads = torch.randn(3, 2, 20, 6, 5)
    for grad_out in grads:
        for block in (plain, fast):
            block(x).backward(grad_out)
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant):
    plain, fast, x = pair(backend)
    grad_out = torch.randn(2, 20, 6, 5)
    expected = gradients(plain, x, grad_out)
    leaf = x.clone().requires_grad_()
    checkpoint(fast, leaf, use_reentrant=use_reentrant).backward(grad_out)
    torch.testing.assert_close(leaf.grad, expected["x"], rtol=1e-4, atol=1e-5)
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_leaves_nothing_for_the_next_with(backend, mode):
    plain, fast, x = pair(backend)
    with mode():
        out = fast(x)
        torch.testing.assert_close(out, plain(x))
        assert not out.requires_grad
        assert out.is_inference() == (mode is torch.inference_mode)
    check_gradients(plain, fast, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_changes_of_the_output_are_allowed(backend):
    """The plain block's are: cat saves nothing. ``y += shortcut`` and ``ReLU(inplace=True)`` follow many a block."""
    plain, fast, x = pair(backend)
    shortcut = torch.randn(2, 20, 6, 5)
    results = []
    for block in (plain, fast):
        block.zero_grad()
        y = block(x)
        y += shortcut
        y.mul_(2)
        nn.functional.relu_(y)
        y.backward(shortcut)
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", ["x", *CONVS])
def test_in_place_changes_of_what_the_backward_reads_are_an_error(backend, changed):
    _, fast, x = pair(backend)
    x = x * 1
    y = fast(x)
    with torch.no_grad():
        (x if changed == "x" else fast.get_submodule(changed).weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_needs_retain_graph(backend):
    _, fast, x = pair(backend)
    y = fast(x)
    y.sum().backward(retain_graph=True)
    first = fast.p3_2.weight.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(fast.p3_2.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_saved_tensor_hooks_see_every_saved_tensor():
    """What bypasses save_for_backward escapes offloading, and its in-place changes go unnoticed."""
    plain, fast, x = pair()
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    grad_out = torch.randn(2, 20, 6, 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fast(x)
    assert {id(p) for p in fast.parameters()} <= {id(t) for t in packed}
    y.backward(grad_out)
    expected = gradients(plain, x, grad_out)
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


# Weights that change behind autograd's back


def through_data(block):
    block.p2_2.weight.data.mul_(-2)


def through_numpy(block):
    block.p1_1.weight.detach().numpy()[...] *= -2


def through_a_vector(block):
    vector = parameters_to_vector(block.parameters())
    vector_to_parameters(-1.5 * vector, block.parameters())


def through_an_optimizer(block):
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(block.parameters(), lr=0.3, foreach=True).step()


def through_a_new_tensor(block):
    block.p3_1.weight.data = -block.p3_1.weight.data.clone()


def through_a_new_parameter(block):
    block.p4_2.weight = nn.Parameter(-block.p4_2.weight.detach())


def through_to(block):
    block.to(memory_format=torch.channels_last)
    block.apply(lambda module: isinstance(module, nn.Conv2d) and nn.init.constant_(module.bias, 0.5))


CHANGES = [
    through_data, through_numpy, through_a_vector, through_an_optimizer, through_a_new_tensor,
    through_a_new_parameter, through_to,
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_seen_at_the_next_call(backend, change):
    plain, fast, x = pair(backend)
    with torch.no_grad():
        before = fast(x).clone()
        fast(x)
    change(plain)
    change(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x))
        assert not torch.allclose(fast(x), before)
    check_gradients(plain, fast, x)
