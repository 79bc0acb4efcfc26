"""FastInception as a module: built, shared, hooked, saved, trained and moved as any user does it."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import fastinception
from fastinception import FastInception, Inception, backends, explain
from tests import fresh

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


# Construction and sharing


def test_from_reference_shares_parameters_both_ways():
    plain, _, x = pair()
    fast = FastInception.from_reference(plain)
    assert type(fast) is FastInception
    assert all(a is b for a, b in zip(fast.parameters(), plain.parameters(), strict=True))
    assert explain(fast, x).name == "aten"
    before = plain(x).detach()

    optimizer = torch.optim.SGD(fast.parameters(), lr=0.02)
    fast(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(plain(x), before)
    torch.testing.assert_close(fast(x), plain(x))

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02)
    plain(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(fast(x), plain(x))

    plain.p2_1 = nn.Conv2d(5, 3, 1)  # the children, too
    torch.testing.assert_close(fast(x), plain(x))


def test_from_reference_keeps_mode_hooks_and_the_backend_asked_for():
    plain, _, x = pair()
    calls = []
    plain.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    plain.eval()
    fast = FastInception.from_reference(plain, backend="triton")
    assert fast.backend == "triton"
    assert not fast.training
    fast(x)
    assert calls == [FastInception]
    assert type(plain) is Inception
    assert "backend" not in plain.__dict__
    with pytest.raises(ValueError, match="'cuda'"):
        FastInception.from_reference(plain, backend="cuda")
    assert FastInception.from_reference(plain).backend == "auto"
    assert FastInception.from_reference(fast).backend == "triton"
    assert FastInception.from_reference(fast, backend="auto").backend == "auto"


def test_from_reference_takes_a_fast_block_and_a_subclass():
    class Named(Inception):
        label = "mine"

    class Faster(FastInception):
        pass

    class Shifted(FastInception):
        def forward(self, x, out=None):
            return super().forward(x, out) + 1

    assert Faster.from_reference(FastInception(*SMALL)).__class__ is Faster
    assert Shifted.from_reference(Shifted(*SMALL)).__class__ is Shifted
    with pytest.raises(TypeError, match=r"with its own forward, got .*Shifted"):
        FastInception.from_reference(Shifted(*SMALL))
    assert type(FastInception.from_reference(Named(*SMALL))) is FastInception


class OwnForward(Inception):
    def forward(self, x):
        return super().forward(x) + 1


class OwnCall(Inception):
    def __call__(self, x):
        return super().__call__(x) * 2


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Conv2d(1, 1, 1), "torch.nn.modules.conv.Conv2d"),
        (OwnForward(*SMALL), "OwnForward"),
        (OwnCall(*SMALL), "OwnCall"),
        (None, "NoneType"),
        (Inception, "type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_from_reference_refuses_another_class(module, named):
    """Another class, or another forward, would silently become the textbook block."""
    with pytest.raises(TypeError, match=rf"takes a fastinception\.Inception.*got .*{named}"):
        FastInception.from_reference(module)


def test_repr_shows_the_backend():
    assert "backend='aten'" in repr(FastInception(*SMALL, backend="aten"))
    assert "(p4_1): MaxPool2d" in repr(FastInception(*SMALL))


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclass_that_calls_super_forward(backend):
    class Shifted(FastInception):
        def forward(self, x, out=None):
            return super().forward(x, out) + 1

    plain, fast, x = pair(backend)
    shifted = Shifted(*SMALL, backend=backend)
    shifted.load_state_dict(fast.state_dict())
    torch.testing.assert_close(shifted(x), plain(x) + 1)


# The environment variable


def test_environment_variable_chooses_where_auto_would(monkeypatch):
    monkeypatch.setenv("FASTINCEPTION_BACKEND", "triton")
    assert FastInception(*SMALL).backend == "triton"
    assert FastInception(*SMALL, backend="aten").backend == "aten"
    assert explain(FastInception(*SMALL), torch.zeros(1, 5, 2, 2)).name == "triton"
    for value in ("auto", ""):
        monkeypatch.setenv("FASTINCEPTION_BACKEND", value)
        assert FastInception(*SMALL).backend == "auto"


def test_environment_variable_that_is_wrong_is_named(monkeypatch):
    monkeypatch.setenv("FASTINCEPTION_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTINCEPTION_BACKEND must be one of 'auto', 'triton', 'aten', got 'cuda'"):
        FastInception(*SMALL)
    assert FastInception(*SMALL, backend="aten").backend == "aten"


TRITON_IS_REFUSED = """
import sys
{first}
import torch
from fastinception import FastInception, explain
x = torch.randn(2, 4, 5, 5)
block = FastInception(4, 2, (2, 2), (2, 2), 2)
large = torch.empty(512, 4, 12, 12)
assert explain(block, large).name == "aten", explain(block, large)
assert block(x).shape == (2, 8, 5, 5)
block(x).sum().backward()
insists = FastInception(4, 2, (2, 2), (2, 2), 2, backend="triton")
for call in (insists, lambda x: explain(insists, x), lambda x: insists(x[:0])):
    try:
        call(x)
    except ValueError as error:
        print(error)
    else:
        raise SystemExit("no error")
"""


def without_gpu(code: str) -> str:
    return fresh.run(code, FASTINCEPTION_BACKEND=None, CUDA_VISIBLE_DEVICES="")


def test_triton_backend_on_a_cpu_without_the_interpreter_raises():
    lines = without_gpu(TRITON_IS_REFUSED.format(first="")).splitlines()
    assert len(lines) == 3
    assert all("backend='triton' cannot run" in line and "on cpu" in line for line in lines), lines


def test_package_runs_without_triton_and_says_so():
    lines = without_gpu(TRITON_IS_REFUSED.format(first="sys.modules['triton'] = None")).splitlines()
    assert len(lines) == 3
    assert all("Triton is not installed" in line for line in lines), lines


# Checkpoints and copies


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_dict_is_the_plain_blocks_both_ways(backend, tmp_path):
    plain, fast, x = pair(backend)
    assert list(fast.state_dict()) == list(plain.state_dict())
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    other = Inception(*SMALL)
    other.load_state_dict(torch.load(tmp_path / "fast.pt", weights_only=True), strict=True)
    torch.testing.assert_close(other(x), fast(x))
    plain.load_state_dict({k: v + 1 for k, v in fast.state_dict().items()}, strict=True)
    fast.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(fast(x), plain(x))


def copies():
    def save(block):
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda block: pickle.loads(pickle.dumps(block)),
        "save": save,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", copies())
def test_copies_are_equal_and_independent(backend, way):
    """After a training step: nothing that a step leaves on the module may be shared or unpicklable."""
    _, fast, x = pair(backend)
    fast(x.requires_grad_()).sum().backward()
    fast.eval()
    other = copies()[way](fast)
    assert type(other) is FastInception
    assert (other.backend, other.training) == (backend, False)
    expected = fast(x).detach()
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        fast.p2_2.weight.zero_()
    assert torch.equal(other(x), expected)
    assert not torch.equal(fast(x), expected)


def test_nothing_but_the_backend_lives_on_the_module():
    """No cache, lock or graph: what a call leaves behind is what a copy, a thread or the next call would meet."""
    plain, fast, x = pair("triton")
    fast(x.requires_grad_()).sum().backward()
    with torch.inference_mode():
        fast(x)
    with torch.no_grad():
        first = fast(x)
        kept = first.clone()
        fast(x + 1)
        assert torch.equal(first, kept)
    assert fast.__dict__.keys() - plain.__dict__.keys() == {"backend"}
    for name in CONVS:
        assert getattr(fast, name).__dict__.keys() == getattr(plain, name).__dict__.keys()


# Hooks on the block


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_the_block_fire_once_with_the_right_arguments(backend):
    plain, fast, x = pair(backend)
    logs = {}
    for block in (plain, fast):
        log = logs[block] = []

        def note(kind, log=log):
            return lambda fired, *args: log.append((kind, fired, args))

        block.register_forward_pre_hook(note("pre"))
        block.register_forward_hook(note("forward"))
        block.register_full_backward_pre_hook(note("backward_pre"))
        block.register_full_backward_hook(note("backward"))
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        assert [kind for kind, *_ in log] == ["pre", "forward"]
        assert log[0][2][0][0] is not None
        out.backward(torch.ones(2, 20, 6, 5))
        assert [kind for kind, *_ in log] == ["pre", "forward", "backward_pre", "backward"]
        assert all(module is block for _, module, _ in log)
    assert explain(fast, x).name == backend
    for (kind, _, theirs), (_, _, ours) in zip(logs[plain], logs[fast], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_the_block_may_change_what_passes(backend):
    plain, fast, x = pair(backend)
    for block in (plain, fast):
        block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        block.register_forward_hook(lambda module, args, out: out + args[0].sum())
        block.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 3,))
    torch.testing.assert_close(fast(x), plain(x))
    check_gradients(plain, fast, x)


# Ambient state


@pytest.mark.parametrize("backend", BACKENDS)
def test_anomaly_mode(backend):
    plain, fast, x = pair(backend)
    with torch.autograd.set_detect_anomaly(True):
        check_gradients(plain, fast, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ambient", ["default dtype", "default device", "deterministic"])
def test_ambient_defaults_change_nothing(backend, ambient):
    """Every buffer names its dtype and device; deterministic mode fills the ones nobody wrote with NaN."""
    plain, fast, x = pair(backend)
    grad_out = torch.randn(2, 20, 6, 5)
    expected, theirs = plain(x).detach(), gradients(plain, x, grad_out)
    try:
        if ambient == "default dtype":
            torch.set_default_dtype(torch.float64)
        elif ambient == "default device":
            torch.set_default_device("meta")
        else:
            torch.use_deterministic_algorithms(True)
        out, ours = fast(x).detach(), gradients(fast, x, grad_out)
        with torch.no_grad():
            alone = fast(x)
        into = fast.eval().requires_grad_(False)(x, out=torch.empty_like(out))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
    assert (out.dtype, out.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(into, expected)
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_meta_construction_then_to_empty():
    plain, _, x = pair()
    with torch.device("meta"):
        fast = FastInception(*SMALL)
    meta = x.to("meta")
    assert fast(meta).shape == plain(x).shape
    assert explain(fast, meta) == ("plain", "x is on the meta device")
    with torch.no_grad():
        out = torch.empty(2, 20, 6, 5, device="meta")
        assert fast(meta, out=out) is out
    fast.to_empty(device="cpu").load_state_dict(plain.state_dict())
    torch.testing.assert_close(fast(x), plain(x))
    check_gradients(plain, fast, x)


def test_threads_share_one_module():
    """The interpreter patches Triton's language while a kernel runs, so this is for ATen only."""
    plain, fast, _ = pair()
    inputs = [torch.randn(4, 5, 12, 12) for _ in range(16)]  # of one shape, as what might be kept for a shape
    expected = [plain(x).detach() for x in inputs]
    failures = []

    def work(first):
        try:
            for repeat in range(10):
                for i in range(first, 16, 4):
                    with torch.set_grad_enabled(repeat % 2 == 0):
                        torch.testing.assert_close(fast(inputs[i]).detach(), expected[i])
        except Exception as error:  # a thread's error is nobody's unless it is handed over
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


# Moving and converting


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_conversion(monkeypatch, dtype):
    monkeypatch.setattr(backends, "_WIDENED", {})  # tests/test_widened.py compares what that changes
    plain, fast, x = pair()
    plain, fast, x = plain.to(dtype), fast.to(dtype), x.to(dtype)
    out = fast(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out, plain(x))
    if dtype is torch.float16:
        torch.testing.assert_close(fast.float().half()(x), plain(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_network(backend):
    plain, fast, x = pair(backend)
    net = nn.Sequential(fast, nn.Conv2d(20, 4, 1)).to(memory_format=torch.channels_last)
    assert fast.p2_2.weight.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert fast(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x), plain(x))
    net(x).sum().backward()
    assert fast.p2_2.weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_uses_the_parameters_it_is_given(backend):
    plain, fast, x = pair(backend)
    others = {name: (p.detach() * -0.5).requires_grad_() for name, p in fast.named_parameters()}
    expected = torch.func.functional_call(plain, others, (x,))
    out = torch.func.functional_call(fast, others, (x,))
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    theirs = torch.autograd.grad(expected, list(others.values()), grad_out)
    ours = torch.autograd.grad(out, list(others.values()), grad_out)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(fast(x), fast(x))


def test_public_functional_is_the_module():
    plain, fast, x = pair()
    from fastinception.functional import inception

    torch.testing.assert_close(inception(x, list(fast.parameters())), plain(x))
    with pytest.raises(ValueError, match="12 weights and biases of the block, got 11"):
        inception(x, list(fast.parameters())[:11])
    assert fastinception.__version__
