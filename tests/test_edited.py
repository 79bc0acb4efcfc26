"""Edited blocks: whatever changes what a child computes gives the plain block's numbers, and `explain` names it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

import fastinception
from fastinception import FastInception, GoogLeNet, Inception, explain
from tests.profiled import Functions

SMALL = (5, 4, (3, 6), (2, 3), 7)
BACKENDS = ("aten", "triton")


def pair(backend="aten"):
    torch.manual_seed(0)
    plain, fast = Inception(*SMALL), FastInception(*SMALL, backend=backend)
    fast.load_state_dict(plain.state_dict())
    return plain, fast, torch.randn(2, 5, 8, 6)


def check_plain_path(plain, fast, x, *named):
    """The numbers and gradients are the plain block's to the bit, and `explain` names the child and why."""
    path = explain(fast, x)
    assert path.name == "plain", path
    for word in named:
        assert word in path.reason, path
    results = []
    for block in (plain, fast):
        torch.manual_seed(1)  # for edits that draw random numbers
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        out.backward(torch.ones_like(out))
        results.append([out.detach(), leaf.grad, *(p.grad for p in block.parameters())])
    for theirs, ours in zip(*results, strict=True):
        assert (theirs is None) == (ours is None)
        assert theirs is None or torch.equal(ours, theirs)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = plain(x)
        into = torch.empty_like(expected)
        torch.manual_seed(1)
        assert fast(x, out=into) is into
        assert torch.equal(into, expected)


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 0.5


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def replace(block, name, child):
    child.load_state_dict(getattr(block, name).state_dict())
    setattr(block, name, child)


def unbiased(block):
    block.p2_1.bias = None


def strided(block):
    for name in ("p1_1", "p2_2", "p3_2", "p4_2"):
        getattr(block, name).stride = (2, 2)


def grouped(block):
    block.p2_2.groups = 3
    block.p2_2.weight = nn.Parameter(block.p2_2.weight.detach()[:, :1].clone())


def wrapped(block, name):
    child = getattr(block, name)
    forward = child.forward
    child.forward = lambda x: forward(x) * 3


def wrapped_inside(block):
    child = block.p3_2
    inner = child._conv_forward
    child._conv_forward = lambda x, weight, bias: inner(x, weight * 2, bias)


def doubled_pool_hook(block):
    block.p4_1.register_forward_hook(lambda module, args, out: out * 2)


def other_class(block, name, cls):
    getattr(block, name).__class__ = cls


class AveragePool(nn.MaxPool2d):
    def forward(self, x):
        return nn.functional.avg_pool2d(x, 3, 1, 1)


# name: (edit, words that `explain` must say)
EDITS = {
    "child replaced": (lambda b: replace(b, "p2_1", Halved(5, 3, 1)), ("p2_1", "Halved")),
    "child replaced by a chain": (
        lambda b: setattr(b, "p1_1", nn.Sequential(nn.Conv2d(5, 4, 1), nn.Dropout(0.5))),
        ("p1_1", "Sequential"),
    ),
    "child's class changed": (lambda b: other_class(b, "p3_2", Halved), ("p3_2", "Halved")),
    "stride": (strided, ("p1_1", "reconfigured", "stride=(2, 2)")),
    "padding_mode": (
        lambda b: (setattr(b.p3_2, "padding_mode", "reflect"),
                   setattr(b.p3_2, "_reversed_padding_repeated_twice", [2, 2, 2, 2])),
        ("p3_2", "reflect"),
    ),
    "dilation": (
        lambda b: (setattr(b.p2_2, "dilation", (2, 2)), setattr(b.p2_2, "padding", (2, 2))),
        ("p2_2", "dilation=(2, 2)"),
    ),
    "dilation that keeps the size": (lambda b: setattr(b.p1_1, "dilation", (3, 3)), ("p1_1", "dilation")),
    "groups": (grouped, ("p2_2", "groups=3")),
    "no bias": (unbiased, ("p2_1", "no bias")),
    "padding as one int": (lambda b: setattr(b.p2_2, "padding", 1), ("p2_2", "padding=1")),
    "padding as a word": (lambda b: setattr(b.p2_2, "padding", "same"), ("p2_2", "padding='same'")),
    "forward wrapped": (lambda b: wrapped(b, "p4_2"), ("p4_2", "forward")),
    "pool's forward wrapped": (lambda b: wrapped(b, "p4_1"), ("p4_1", "forward")),
    "inner forward wrapped": (wrapped_inside, ("p3_2", "forward")),
    "pool swapped": (lambda b: setattr(b, "p4_1", nn.AvgPool2d(3, 1, 1)), ("p4_1", "AvgPool2d")),
    "pool swapped for nothing": (lambda b: setattr(b, "p4_1", nn.Identity()), ("p4_1", "Identity")),
    "pool's class changed": (lambda b: other_class(b, "p4_1", AveragePool), ("p4_1", "AveragePool")),
    "pool's kernel": (
        lambda b: (setattr(b.p4_1, "kernel_size", 5), setattr(b.p4_1, "padding", 2)), ("p4_1", "kernel_size=5"),
    ),
    "pool's dilation": (
        lambda b: (setattr(b.p4_1, "kernel_size", 2), setattr(b.p4_1, "dilation", 2)), ("p4_1", "dilation=2"),
    ),
    "pool's ceil_mode": (lambda b: setattr(b.p4_1, "ceil_mode", True), ("p4_1", "ceil_mode=True")),
    "child forward hook": (
        lambda b: b.p1_1.register_forward_hook(lambda module, args, out: out * 2), ("p1_1", "hooks"),
    ),
    "child forward pre-hook": (
        lambda b: b.p3_1.register_forward_pre_hook(lambda module, args: (args[0] * 2,)), ("p3_1", "hooks"),
    ),
    "child backward hook": (
        lambda b: b.p2_2.register_full_backward_hook(lambda module, grads, _: tuple(g * 2 for g in grads)),
        ("p2_2", "hooks"),
    ),
    "child backward pre-hook": (
        lambda b: b.p4_2.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,)), ("p4_2", "hooks"),
    ),
    "pool hook": (doubled_pool_hook, ("p4_1", "hooks")),
    "parametrization": (
        lambda b: parametrize.register_parametrization(b.p2_1, "weight", Doubled()), ("p2_1", "Parametrized"),
    ),
    "bias parametrization": (
        lambda b: parametrize.register_parametrization(b.p4_2, "bias", Doubled()), ("p4_2", "Parametrized"),
    ),
    "weight_norm": (lambda b: parametrizations.weight_norm(b.p2_2), ("p2_2", "Parametrized")),
    "spectral_norm": (lambda b: parametrizations.spectral_norm(b.p3_1), ("p3_1", "Parametrized")),
    "old weight_norm": (lambda b: nn.utils.weight_norm(b.p3_2), ("p3_2", "hooks")),
    "old spectral_norm": (lambda b: nn.utils.spectral_norm(b.p1_1), ("p1_1", "hooks")),
    "pruning": (lambda b: prune.l1_unstructured(b.p2_2, "weight", 0.5), ("p2_2", "hooks")),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm says that it is old
def test_edited_child_takes_the_plain_path(backend, edit):
    plain, fast, x = pair(backend)
    unedited = fast(x).detach()
    change, named = EDITS[edit]
    for block in (plain, fast):
        torch.manual_seed(2)
        change(block)
    check_plain_path(plain, fast, x, *named)
    # The edit shows in the numbers, so that a fast path that overlooked it would fail above.
    if edit not in ("padding as one int", "padding as a word", "child backward hook", "child backward pre-hook",
                    "pool's ceil_mode", "dilation that keeps the size", "weight_norm", "old weight_norm"):  # fmt: skip
        out = fast(x)
        assert out.shape != unedited.shape or not torch.allclose(out, unedited)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm says that it is old
def test_an_edit_behind_the_first_compiled_call_counts(edit):
    """Where it does in the plain block: Dynamo takes hooks for fixed, and torch 2.11 a module's class."""
    torch.compiler.reset()
    plain, fast, x = (t.double() for t in pair())  # compiled and eager convolve in layouts that round differently
    noticed = []
    for block in (plain.eval(), fast.eval()):  # eval: some of the edits draw random numbers
        run = torch.compile(block, backend="eager")
        with torch.no_grad():
            run(x)
            EDITS[edit][0](block)
            block.double().eval()
            out, expected = run(x), block(x)
        noticed.append(out.shape == expected.shape and torch.allclose(out, expected))
    assert noticed[1] >= noticed[0]
    assert noticed[0] or "hook" in edit or "class" in edit


def test_a_pool_that_returns_indices_fails_as_in_the_plain_block():
    *blocks, x = pair()
    for block in blocks:
        block.p4_1.return_indices = True
        with pytest.raises(TypeError, match=r"got \(tuple, "):
            block(x)
    assert explain(blocks[1], x).reason.endswith("return_indices=True")


@pytest.mark.parametrize(("setting", "value"), [("stride", 2), ("padding", 0)])
def test_a_pool_of_another_size_fails_as_in_the_plain_block(setting, value):
    *blocks, x = pair()
    for block in blocks:
        setattr(block.p4_1, setting, value)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            block(x)
    assert f"{setting}={value}" in explain(blocks[1], x).reason


def undo_forward(block):
    del block.p4_2.forward


UNDONE = {
    "hook": (
        lambda b: b.p2_2.register_forward_hook(lambda module, args, out: out * 2),
        lambda b, handle: handle.remove(),
    ),
    "backward hook": (
        lambda b: b.p2_2.register_full_backward_hook(lambda module, grads, _: None),
        lambda b, handle: handle.remove(),
    ),
    "forward": (lambda b: wrapped(b, "p4_2"), lambda b, _: undo_forward(b)),
    "parametrization": (
        lambda b: parametrize.register_parametrization(b.p2_1, "weight", Doubled()),
        lambda b, _: parametrize.remove_parametrizations(b.p2_1, "weight", leave_parametrized=True),
    ),
    "pruning": (
        lambda b: prune.l1_unstructured(b.p2_2, "weight", 0.5), lambda b, _: prune.remove(b.p2_2, "weight"),
    ),
    "old weight_norm": (
        lambda b: nn.utils.weight_norm(b.p3_2), lambda b, _: nn.utils.remove_weight_norm(b.p3_2),
    ),
    "stride": (lambda b: setattr(b.p1_1, "stride", (2, 2)), lambda b, _: setattr(b.p1_1, "stride", (1, 1))),
    "class": (lambda b: other_class(b, "p1_1", Halved), lambda b, _: other_class(b, "p1_1", nn.Conv2d)),
    "pool": (
        lambda b: setattr(b, "p4_1", nn.Identity()),
        lambda b, _: setattr(b, "p4_1", nn.MaxPool2d((3, 3), (1, 1), (1, 1))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", UNDONE)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm says that it is old
def test_removing_the_edit_returns_to_the_fast_path(edit):
    plain, fast, x = pair()
    do, undo = UNDONE[edit]
    for block in (plain, fast):
        handle = do(block)
        if block is fast:
            assert explain(fast, x).name == "plain"
        undo(block, handle)
    assert explain(fast, x).name == "aten"
    torch.testing.assert_close(fast(x), plain(x))


GLOBAL_HOOKS = {
    "forward": lambda: nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, nn.Conv2d) else None
    ),
    "forward pre": lambda: nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (args[0] * 2,) if isinstance(module, nn.MaxPool2d) else None
    ),
    "backward": lambda: nn.modules.module.register_module_full_backward_hook(
        lambda module, grads, _: (
            tuple(g * 2 for g in grads) if isinstance(module, nn.Conv2d) and None not in grads else None
        )
    ),
    "backward pre": lambda: nn.modules.module.register_module_full_backward_pre_hook(
        lambda module, grads: (grads[0] * 2,) if isinstance(module, nn.Conv2d) else None
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hooks_reach_the_children(backend, kind):
    plain, fast, x = pair(backend)
    handle = GLOBAL_HOOKS[kind]()
    try:
        check_plain_path(plain, fast, x, "global module hook")
    finally:
        handle.remove()
    assert explain(fast, x).name == backend


def test_profiling_hooks_see_every_child():
    """A tool that lists the layers by global hooks finds the seven, as in the plain block."""
    _, fast, x = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        fast(x)
    finally:
        handle.remove()
    assert set(seen) == {fast, *fast.children()}


def test_copies_of_an_edited_block_stay_edited():
    plain, fast, x = pair()
    for block in (plain, fast):
        doubled_pool_hook(block)
    other = copy.deepcopy(fast)
    assert explain(other, x) == explain(fast, x)
    assert explain(other, x).name == "plain"
    assert torch.equal(other(x), plain(x))


def test_explain_names_the_child_that_from_reference_took_over_edited():
    plain, _, x = pair()
    doubled_pool_hook(plain)
    fast = FastInception.from_reference(plain)
    check_plain_path(plain, fast, x, "p4_1", "hooks")


@pytest.mark.parametrize("name", ["p1_1", "p2_2", "p4_1"])
def test_the_packages_own_layers_are_no_edit(name):
    """A user who takes them for all of a network's layers meets the block's, too."""
    plain, fast, x = pair()
    cls = {"p4_1": fastinception.MaxPool2d}.get(name, fastinception.Conv2d)
    other_class(fast, name, cls)
    assert explain(fast, x).name == "aten"
    torch.testing.assert_close(fast(x), plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_static_quantization_as_in_the_plain_block():
    results = []
    for block in pair()[:2]:
        torch.manual_seed(1)
        x = torch.randn(2, 5, 8, 6)
        net = nn.Sequential(quantization.QuantStub(), block, quantization.DeQuantStub()).eval()
        net.qconfig = quantization.get_default_qconfig("x86")
        quantization.prepare(net, inplace=True)
        net(x)
        quantization.convert(net, inplace=True)
        results.append(net(x))
    assert torch.equal(*results)
    assert explain(net[1], net[0](x)).reason.startswith("p1_1 is a torch.ao.nn.quantized")


def test_additional_children_and_attributes_do_not_matter():
    plain, fast, x = pair()
    fast.extra = nn.Linear(2, 2)
    fast.note = "mine"
    assert explain(fast, x).name == "aten"
    torch.testing.assert_close(fast(x), plain(x))


def test_a_replica_of_data_parallel_is_no_edit():
    """Whose layers have plain tensors for parameters."""
    plain, fast, x = pair()
    replica = fast._replicate_for_data_parallel()
    for name, child in fast.named_children():
        replica._modules[name] = child._replicate_for_data_parallel()
        for key, p in child.named_parameters():
            setattr(replica._modules[name], key, p * 1)
    assert not list(replica.parameters())
    assert explain(replica, x).name == "aten"
    torch.testing.assert_close(replica(x), plain(x))


def test_explain_says_why_for_every_path():
    _, fast, x = pair()
    assert explain(fast, x) == ("aten", "backend='aten' was asked for")
    assert str(explain(fast, x)) == "aten: backend='aten' was asked for"
    assert explain(FastInception(*SMALL, backend="triton"), x) == ("triton", "backend='triton' was asked for")
    assert explain(FastInception(*SMALL), x) == ("aten", "x is not on a GPU that runs Triton")
    assert explain(fast, x[:0]) == ("plain", "x is empty")
    with torch.autograd.forward_ad.dual_level():
        assert explain(fast, x) == ("plain", "forward-mode differentiation is active")
    seen = []
    torch.func.vmap(lambda x: seen.append(explain(fast, x)) or x)(x[None])
    assert seen == [("plain", "a functorch transform (vmap, grad, jvp, ...) is active")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["traced", "exported", "mode"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_follows_functions_meets_them_in_their_layers(backend, kind, grad):
    """By these a quantizer, or a converter, tells a convolution from another."""
    plain, fast, x = pair(backend)
    met = []
    for block in (plain, fast):
        with torch.set_grad_enabled(grad):
            if kind == "traced":
                nodes = torch.jit.trace(block, x).inlined_graph.nodes()
                met.append([f"{node.kind()} {node.scopeName().split('/')[-1]}" for node in nodes])
            elif kind == "exported":
                nodes = torch.export.export(block, (x,)).graph.nodes
                met.append([f"{node.target} {[*node.meta.get('nn_module_stack', {})]}" for node in nodes])
            else:
                block(x)  # what is known of an earlier call says nothing
                with Functions() as mode:
                    block(x)
                met.append(mode.names)
                with mode:
                    assert block is plain or explain(fast, x) == ("plain", "a TorchFunctionMode is active")
    assert met[0] == met[1]
    assert len(met[0]) >= 14
    with torch.device("cpu"):  # a mode as well
        assert explain(fast, x).name == backend


def test_explain_refuses_what_has_no_path():
    plain, fast, x = pair()
    for module, named in ((plain, "Inception"), (nn.Sequential(fast), "Sequential"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"takes a FastInception block and its input, got {named}"):
            explain(module, x)


def test_a_bias_that_is_none_as_a_plain_attribute():
    plain = Inception(6, 4, (5, 8), (3, 4), 8)
    del plain.p1_1.bias
    plain.p1_1.bias = None
    fast = FastInception.from_reference(plain)
    x = torch.rand(2, 6, 7, 9)
    torch.testing.assert_close(fast(x), plain(x))
    assert explain(fast, x).reason == "p1_1 has no bias"


def test_a_bias_that_is_no_parameter():
    plain, fast, x = pair()
    bias = torch.randn(4)
    for block in (plain, fast):
        del block.p1_1.bias
        block.p1_1.bias = bias
    torch.testing.assert_close(fast(x), plain(x))
    assert explain(fast, x).name == "aten"


def test_from_reference_does_not_go_on_running_the_plain_block():
    """Neither a patch in the instance nor what ``module.compile()`` made."""
    plain = Inception(6, 4, (5, 8), (3, 4), 8)
    plain.forward = plain.forward
    with pytest.raises(TypeError, match=r"with its own forward, got fastinception.reference.Inception, patched"):
        FastInception.from_reference(plain)
    del plain.forward
    plain.compile(backend="eager")
    x = torch.rand(2, 6, 7, 9)
    out = torch.empty(2, 24, 7, 9)
    with torch.no_grad():
        assert FastInception.from_reference(plain)(x, out=out) is out
        torch.testing.assert_close(out, Inception.forward(plain, x))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU, nn.MaxPool2d])
def test_hooks_around_the_blocks_see_what_layers_return(kind):
    """Backward hooks on any layer of the network, and what a convolution returned stays as it was."""
    net = GoogLeNet(block=FastInception)
    x = torch.rand(2, 1, 32, 32, requires_grad=True)
    kept, called = [], []
    net[1][0].register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    for stage in net[:2]:
        for child in stage:
            if isinstance(child, kind):
                child.register_full_backward_hook(lambda *_: called.append(kind))
    net(x).sum().backward()
    assert len(called) == {nn.Conv2d: 3, nn.ReLU: 3, nn.MaxPool2d: 2}[kind]
    assert torch.equal(*kept[0])
    assert kept[0][0].min() < 0
