"""Programs that are kept and run elsewhere: torch.jit.trace, torch.fx, and what is built on them.

They record what a call does. Writes into a slice are lost on the way through some of them, without a word, and a
Proxy of torch.fx is no tensor: all of them get the textbook's operators.
"""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from fastinception import Conv2d, FastInception, GoogLeNet, Inception, MaxPool2d, explain, module

SMALL = (5, 4, (3, 6), (2, 3), 7)

pytestmark = [  # torch.jit is deprecated, and used
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("error::torch.jit.TracerWarning"),  # a plain block has none
]


def block(backend):
    torch.manual_seed(0)
    return FastInception(*SMALL, backend=backend).eval(), torch.randn(2, 5, 6, 4)


def network():
    torch.manual_seed(0)
    return GoogLeNet(FastInception).eval(), torch.randn(2, 1, 32, 32)


CASES = {"aten": lambda: block("aten"), "triton": lambda: block("triton"), "network": network}


@pytest.fixture(params=CASES)
def case(request):
    """Return a module, an input, another batch, and what the textbook's modules make of both."""
    fast, x = CASES[request.param]()
    plain = Inception(*SMALL) if isinstance(fast, FastInception) else GoogLeNet()
    plain.load_state_dict(fast.state_dict())
    more = torch.cat((x, -x, x.flip(0)))
    return fast, x, more, plain(x).detach(), plain(more).detach()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_traced(case, grad):
    fast, x, more, expected, expected_more = case
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(fast, x)  # compares two traces, too
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "fastinception::" not in str(loaded.inlined_graph)  # or it could not be loaded without the package
    for program in (traced, loaded):
        close(program(x), expected)
        close(program(more), expected_more)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loaded(leaf).square().sum(), leaf)
    (wanted,) = torch.autograd.grad(fast(leaf).square().sum(), leaf)
    close(gradient, wanted)


def test_traced_and_optimized(case):
    """Its passes drop what was written into a slice of an output."""
    fast, x, more, expected, expected_more = case
    with torch.no_grad():
        optimized = torch.jit.optimize_for_inference(torch.jit.trace(fast, x))
        close(optimized(x), expected)
        close(optimized(more), expected_more)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FastInception(*SMALL), "FastInception"),
        (lambda: Conv2d(3, 4, 3), "Conv2d"),
        (lambda: MaxPool2d(3), "MaxPool2d"),
        (lambda: GoogLeNet(FastInception), "Stage"),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_script_is_refused_and_changes_nothing(make, name, within):
    net = torch.nn.Sequential(torch.nn.ReLU(), make()) if within else make()
    before = list(net.named_modules())
    with pytest.raises(
        TypeError, match=f"^torch.jit.script cannot compile {name}: use torch.jit.trace, .* plain network"
    ):
        torch.jit.script(net)
    assert list(net.named_modules()) == before


def test_a_block_is_fast_again_behind_a_trace():
    fast, x = block("triton")
    torch.jit.trace(fast, x)
    assert explain(fast, x).name == "triton"


@pytest.mark.parametrize("grad", [True, False])
def test_symbolically_traced(case, grad):
    fast, x, more, expected, expected_more = case
    with torch.set_grad_enabled(grad):
        program = torch.fx.symbolic_trace(fast)
    close(program(x), expected)
    close(program(more), expected_more)
    blocks = [m for m in fast.modules() if isinstance(m, FastInception)]
    nodes = [node.target for node in program.graph.nodes if node.op == "call_module"]
    assert sum(name.split(".")[-1].startswith("p") for name in nodes) == 7 * len(blocks)  # each layer is one


def test_features_are_extracted_by_name():
    from torchvision.models.feature_extraction import create_feature_extractor

    fast, x = network()
    plain = GoogLeNet()
    plain.load_state_dict(fast.state_dict())
    names = {"0.0": "convolution", "2.0": "block", "2.2": "pool"}
    ours, theirs = (create_feature_extractor(net.eval(), names)(x) for net in (fast, plain))
    for name in names.values():
        close(ours[name], theirs[name])


def test_a_symbolic_call_with_a_buffer_is_refused():
    """The textbook's forward would drop the buffer, which is an argument of the program."""
    fast, x = block("aten")
    buffer = torch.empty_like(fast(x))
    program = torch.fx.symbolic_trace(fast)
    program.graph.eliminate_dead_code()
    program.recompile()
    with pytest.raises(AssertionError, match=r"takes no out"):
        program(x, buffer)
    nodes = torch.fx.symbolic_trace(fast, concrete_args={"out": None}).graph.nodes
    assert not any(node.target is module._refuse for node in nodes)


def loaded(program):
    return pickle.loads(pickle.dumps(program))


@pytest.mark.parametrize("again", [torch.fx.symbolic_trace, loaded])
def test_a_symbolic_program_can_be_traced_again(again):
    """As loading one does."""
    fast, x = block("aten")
    try:
        again(torch.fx.symbolic_trace(Inception(*SMALL)))
    except AttributeError as error:
        pytest.skip(f"nor does this torch load the plain block's program: {error}")
    program = again(again(torch.fx.symbolic_trace(fast)))
    close(program(x), fast(x))
    with pytest.raises(AssertionError, match=r"takes no out"):
        program(x, torch.empty_like(fast(x)))


@pytest.mark.parametrize("grad", [True, False])
def test_a_network_traced_with_its_stem(grad, recwarn):
    """Whose convolutions have operators of their own in training, on some cores."""
    fast, _ = network()
    x = torch.rand(2, 1, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(fast, x)
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    assert "fastinception::" not in str(traced.inlined_graph)
    close(traced(x), fast(x))
