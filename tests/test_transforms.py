"""Derivatives of every order and kind: functorch, forward mode, double backward; right numbers or a loud error."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastinception import FastInception, Inception, explain

TINY = (3, 2, (2, 3), (1, 2), 2)
BACKENDS = ("aten", "triton")


@pytest.fixture(params=BACKENDS)
def pair(request):
    """Return a plain and a fast block with the same float64 numbers, and an input; all ReLUs somewhere open."""
    torch.manual_seed(0)
    plain = Inception(*TINY).double()
    fast = FastInception(*TINY, backend=request.param).double()
    fast.load_state_dict(plain.state_dict())
    return plain, fast, torch.randn(2, 3, 4, 3, dtype=torch.float64)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def norm(block, x):
    """A scalar with second derivatives: the block itself is piecewise linear in x."""
    return (block(x) ** 3).sum()


# functorch


def test_vmap(pair):
    plain, fast, _ = pair
    x = torch.randn(3, 2, 3, 4, 3, dtype=torch.float64)
    close(vmap(fast)(x), torch.stack([plain(each) for each in x]))
    close(vmap(fast, in_dims=1, out_dims=2)(x), torch.stack([plain(each) for each in x.unbind(1)], dim=2))


def test_vmap_over_parameters(pair):
    """An ensemble: the same input through stacked parameters."""
    plain, fast, x = pair
    stacked = {name: torch.stack((p, -p, 2 * p)).detach() for name, p in fast.named_parameters()}
    ours = vmap(lambda params: functional_call(fast, params, (x,)))(stacked)
    for i in range(3):
        close(ours[i], functional_call(plain, {name: p[i] for name, p in stacked.items()}, (x,)))


def test_per_sample_gradients(pair):
    plain, fast, x = pair
    params = {name: p.detach() for name, p in plain.named_parameters()}

    def loss(block):
        return lambda params, each: (functional_call(block, params, (each[None],)) ** 2).sum()

    ours, theirs = (vmap(grad(loss(block)), in_dims=(None, 0))(params, x) for block in (fast, plain))
    close(ours, theirs)
    assert ours["p2_2.weight"].shape == (2, *params["p2_2.weight"].shape)


def test_jvp_and_vjp(pair):
    plain, fast, x = pair
    tangent = torch.randn_like(x)
    close(jvp(fast, (x,), (tangent,)), jvp(plain, (x,), (tangent,)))
    (out, pull), (expected, pull_expected) = vjp(fast, x), vjp(plain, x)
    close(out, expected)
    close(pull(out), pull_expected(out))


def test_jacobians(pair):
    plain, fast, x = pair
    x = x[:1, :, :2, :1]  # a backward for each element of the output
    expected = torch.autograd.functional.jacobian(plain, x)
    assert expected.abs().sum() > 0
    close(jacrev(fast)(x), expected)
    close(jacfwd(fast)(x), expected)
    close(torch.autograd.functional.jacobian(fast, x), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_upstream_gradients(pair):
    """`is_grads_batched` maps over the backward alone, which the fast path has made an operator of its own."""
    plain, fast, x = pair
    upstream = torch.randn(3, 2, 9, 4, 3, dtype=torch.float64)
    results = []
    for block in (plain, fast):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *block.parameters()]
        each = functools.partial(torch.autograd.grad, block(leaf), inputs, retain_graph=True)
        results += [each(upstream, is_grads_batched=True), vmap(each)(upstream)]
    for batched in results[1:]:
        close(batched, results[0])
    small = x[:1, :, :2, :1]  # a backward for each element of the output
    jacobians = [torch.autograd.functional.jacobian(block, small, vectorize=True) for block in (fast, plain)]
    close(*jacobians)


def test_hessian_vector_products(pair):
    plain, fast, x = pair
    vector = torch.randn_like(x)
    functions = [lambda x, block=block: norm(block, x) for block in (fast, plain)]
    expected = torch.autograd.functional.hvp(functions[1], x, vector)
    assert expected[1].abs().max() > 0
    close(torch.autograd.functional.hvp(functions[0], x, vector), expected)
    close(torch.autograd.functional.vhp(functions[0], x, vector), expected)
    close(jvp(grad(functions[0]), (x,), (vector,))[1], expected[1])
    small = x[:1, :, :2, :2]
    close(hessian(functions[0])(small), hessian(functions[1])(small))


# Double backward


def test_double_backward_of_everything(pair):
    """Second derivatives for x, the parameters and the upstream gradient, alone and together."""
    plain, fast, x = pair
    upstream = torch.randn(2, 9, 4, 3, dtype=torch.float64)
    results = []
    for block in (plain, fast):
        leaf, up = x.clone().requires_grad_(), upstream.clone().requires_grad_()
        inputs = [leaf, *block.parameters()]
        first = torch.autograd.grad(block(leaf), inputs, up, create_graph=True)
        generator = torch.Generator().manual_seed(1)
        total = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in first)
        second = torch.autograd.grad(total, [up, *inputs], allow_unused=True)
        results.append([*first, *(torch.zeros(()) if s is None else s for s in second)])
    assert results[0][13].abs().max() > 0
    # A bias moves no first derivative: None from the plain block, zeros from the fast one, the same number.
    for ours, theirs in zip(results[1], results[0], strict=True):
        close(ours.expand_as(theirs) if theirs.dim() else ours.abs().max(), theirs.to(ours.dtype))


@pytest.mark.parametrize("trained", ["x", "p2_2.weight", "p3_1.bias", "p1_1.weight"])
def test_gradient_penalty(pair, trained):
    """Differentiate the norm of one gradient, as WGAN-GP does, with everything else frozen."""
    plain, fast, x = pair
    results = []
    for block in (plain, fast):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name == trained)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(norm(block, leaf), leaf, create_graph=True)
        first.square().sum().backward()
        results.append([first.detach(), leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
    assert results[0][1].abs().max() > 0
    close(results[1], results[0])


def test_third_order(pair):
    """With parameters among the inputs: the block is piecewise linear in x alone, and mixed derivatives are not 0."""
    plain, fast, x = pair
    results = []
    for block in (plain, fast):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *block.parameters()]
        value = norm(block, leaf)
        for _ in range(3):
            derivatives = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((d**2).sum() for d in derivatives)
        results.append([d.detach() for d in derivatives])
    assert all(d.abs().max() > 0 for d in results[0])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def test_double_backward_through_the_network_around_the_block(pair):
    """The saved tensors keep their place in the outer graph: derivatives reach what made x and the weights."""
    plain, fast, x = pair
    results = []
    for block in (plain, fast):
        scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        params = {name: p.detach() * scale for name, p in block.named_parameters()}
        data = x * scale
        first = torch.autograd.grad((functional_call(block, params, (data,)) ** 2).sum(), scale, create_graph=True)
        results.append(torch.stack([*first, *torch.autograd.grad(first, scale)]).detach())
    assert results[0][1].abs() > 0
    close(results[1], results[0])


# Forward mode


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_dual_numbers_keep_their_tangent(pair, grad_mode):
    """`no_grad` does not switch forward mode off."""
    plain, fast, x = pair
    tangent = torch.randn_like(x)
    expected = jvp(plain, (x,), (tangent,))
    with grad_mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        assert explain(fast, dual).name == "plain"
        out = forward_ad.unpack_dual(fast(dual))
    assert out.tangent is not None
    close((out.primal, out.tangent), expected)


def test_dual_parameters_keep_their_tangent(pair):
    plain, fast, x = pair
    results = []
    for block in (plain, fast):
        with torch.no_grad(), forward_ad.dual_level():
            params = {
                name: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for name, p in block.named_parameters()
            }
            results.append(forward_ad.unpack_dual(functional_call(block, params, (x,))).tangent)
    close(results[1], results[0])


def test_out_receives_the_tangent(pair):
    plain, fast, x = pair
    tangent = torch.randn_like(x)
    expected = jvp(plain, (x,), (tangent,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        out = torch.empty(2, 9, 4, 3, dtype=torch.float64)
        fast(forward_ad.make_dual(x, tangent), out=out)
        close(forward_ad.unpack_dual(out).tangent, expected)


def test_forward_over_reverse_outside_functorch(pair):
    """A dual upstream gradient meets the fast path's backward: its tangent must not get lost."""
    plain, fast, x = pair
    upstream, tangent = (torch.randn(2, 9, 4, 3, dtype=torch.float64) for _ in range(2))
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(plain(leaf), leaf, tangent)[0]
    out = fast(leaf)
    with forward_ad.dual_level():
        (result,) = torch.autograd.grad(out, leaf, forward_ad.make_dual(upstream, tangent))
        close(forward_ad.unpack_dual(result).tangent, expected)


def test_gradcheck(pair):
    _, fast, x = pair
    params = {name: p.detach().requires_grad_() for name, p in fast.named_parameters()}
    x = x[:1].clone().requires_grad_()

    def call(x, *values):
        return functional_call(fast, dict(zip(params, values, strict=True)), (x,))

    inputs = (x, *params.values())
    if fast.backend == "triton":  # a launch for each element: the fast mode compares projections
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    else:
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_flops_are_counted_as_the_plain_blocks(pair):
    """Which are all that a FlopCounterMode knows: an operator of our own would count as nothing."""
    plain, fast, x = pair
    counts = []
    for block in (plain, fast):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            block(x)
        with FlopCounterMode(display=False) as step:
            block(x).sum().backward()
        counts.append((forward.get_total_flops(), step.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][1] > counts[0][0] > 0


class FlopsOfOthers(TorchDispatchMode):
    """Count as a library with a mode of its own does: by the operators that it knows."""

    def __init__(self):
        super().__init__()
        self.convolved = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.convolved.append((out.shape, args[1].shape))
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_another_counter_counts_as_in_the_plain_block(pair, grad):
    plain, fast, x = pair
    counts = []
    for block in (plain, fast):
        with torch.set_grad_enabled(grad):
            block(x)
            with FlopsOfOthers() as counter:
                block(x)
        counts.append(counter.convolved)
    assert counts[0] == counts[1]
    assert len(counts[0]) == 6
