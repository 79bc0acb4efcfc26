"""The convolutions' own gradients: exact where every sum is, and Conv2d that has them around the blocks."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fastinception import Conv2d, FastInception, GoogLeNet, backends
from fastinception import conv_backward as gradients
from tests import profiled

CL = torch.channels_last
operators = functools.partial(profiled.operators, prefix="conv2d")
NATIVE = gradients.COLUMNS_PAY


@pytest.fixture(autouse=True)
def paying(monkeypatch):
    """As on cores where a product of columns is the faster gradient, whatever these are."""
    torch.compiler.reset()
    monkeypatch.setattr(gradients, "COLUMNS_PAY", True)


def integers(*shape: int, high: int = 8) -> Tensor:
    """Return small integers: every sum of their products is exact in float32."""
    return torch.randint(-high, high + 1, shape).float()


def operands(n: int, c: int, o: int, kernel: tuple[int, int], height: int, width: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    tensors = integers(n, o, height, width), integers(n, c, height, width), integers(o, c, *kernel)
    return tuple(t.contiguous(memory_format=CL) for t in tensors)


def library(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...] = (True,) * 3) -> tuple[Tensor, ...]:
    padding = [side // 2 for side in weight.shape[2:]]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1, needs
    )


@pytest.mark.parametrize("chain", [1, 40, 512], ids="chain{}".format)
@pytest.mark.parametrize(
    ("n", "kernel", "height", "width"),
    [(64, (3, 3), 3, 3), (5, (3, 3), 12, 13), (1, (3, 3), 50, 41), (3, (1, 3), 7, 60), (2, (3, 1), 60, 7),
     (90, (5, 5), 3, 4), (600, (3, 3), 1, 1)],
)  # fmt: skip
def test_the_columns_gradients_are_exact(n, kernel, height, width, chain, monkeypatch):
    """Whole chains, a rest, lines of one image, and images smaller than the kernel."""
    monkeypatch.setattr(gradients, "_COLUMNS_CHAIN", chain)
    grad, x, weight = operands(n, 16, 17, kernel, height, width)
    assert gradients.by_columns(x, weight)
    exact = library(grad.double(), x.double(), weight.double())
    pixels, addmm_ = [], Tensor.addmm_

    def watch(self: Tensor, columns: Tensor, matrix: Tensor) -> Tensor:
        pixels.append(len(matrix))
        return addmm_(self, columns, matrix)

    monkeypatch.setattr(Tensor, "addmm_", watch)
    for needs in itertools.product((False, True), repeat=3):
        found = gradients.conv_backward(grad, x, weight, needs)
        assert [result is not None for result in found] == list(needs)
        for result, expected in zip(found, exact, strict=True):
            assert result is None or torch.equal(result.double(), expected)
    assert max(pixels) <= chain


@pytest.mark.parametrize("n", [14, 32, 40])
def test_no_product_of_a_1x1_weights_gradient_sums_more_than_a_chain(n, monkeypatch):
    """In float32, where each step rounds; of 2016, 4608 and 5760 pixels."""
    grad, x, weight = operands(n, 16, 17, (1, 1), 12, 12)
    exact, chains = library(grad.double(), x.double(), weight.double())[1], []

    def watch(owner, name: str, place: int) -> None:
        product = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: chains.append(args[place].shape[-1]) or product(*args))

    for owner, name, place in ((torch, "mm", 0), (torch, "bmm", 0), (Tensor, "addmm_", 1)):
        watch(owner, name, place)
    _, found, _ = gradients.conv_backward(grad, x, weight, (False, True, False))
    assert torch.equal(found.double(), exact)
    assert max(chains, default=0) <= 2048
    assert n == 14 or sum(chains) > 0


def test_a_gradient_from_elsewhere_is_added():
    for kernel, format in itertools.product(((1, 1), (3, 3)), (CL, torch.contiguous_format)):
        grad, x, weight = operands(4, 5, 7, kernel, 9, 8)
        into = integers(*x.shape).contiguous(memory_format=format)
        expected = into + library(grad, x, weight)[0]
        found, _, _ = gradients.conv_backward(grad, x, weight, (True, True, True), into)
        assert torch.equal(found, expected)


def test_products_that_are_rounded_more_than_convolutions_take_no_part(monkeypatch):
    """The precision of matrix products is not the convolutions', and float32 is as exact as theirs."""
    mkldnn, asked = torch.backends.mkldnn, []
    mm, addmm_ = torch.mm, Tensor.addmm_
    monkeypatch.setattr(torch, "mm", lambda *args: asked.append("mm") or mm(*args))
    monkeypatch.setattr(Tensor, "addmm_", lambda *args: asked.append("addmm_") or addmm_(*args))

    def products(dtype: torch.dtype = torch.float32) -> list[str]:
        asked.clear()
        tensors = [t.to(dtype) for t in operands(4, 16, 17, (1, 1), 12, 12)]
        for into in (None, torch.zeros_like(tensors[1])):
            found = gradients.conv_backward(*tensors, (True, True, True), into)
            assert all(map(torch.equal, found, library(*tensors)))
        return list(asked)

    wanted = products()
    assert {"mm", "addmm_"} <= set(wanted)
    before = mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        assert mkldnn.matmul.fp32_precision == "bf16"
        assert products() == []
        assert "addmm_" in products(torch.float64)
        mkldnn.conv.fp32_precision = "bf16"
        assert products() == wanted
    finally:
        torch.set_float32_matmul_precision("highest")
        mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision = before


@pytest.mark.skipif(not NATIVE, reason="the library computes this gradient on these cores")
@pytest.mark.parametrize(
    ("n", "c", "o", "kernel", "side"),
    [
        (64, 96, 208, 3, 6),
        (64, 192, 384, 3, 3),
        (64, 48, 128, 5, 3),
        (8, 64, 192, 3, 24),
        (1, 16, 16, 3, 70),
        (1, 3, 4, 3, 70),
    ],
)
def test_the_columns_error_is_within_twice_the_librarys(n, c, o, kernel, side):
    """In the library's worse layout, as in test_equivalence; with few channels a product's chain is longest."""
    torch.manual_seed(0)
    grad, x, weight = torch.randn(n, o, side, side), torch.randn(n, c, side, side), torch.randn(o, c, kernel, kernel)
    exact = library(grad.double(), x.double(), weight.double())[1]

    def error(weight_gradient: Tensor) -> Tensor:
        return (weight_gradient - exact).abs().max()

    rows = [t.contiguous(memory_format=CL) for t in (grad, x, weight)]
    theirs = max(error(library(*tensors)[1]) for tensors in ((grad, x, weight), rows))
    assert error(gradients.conv_backward(*rows, (False, True, False))[1]) <= 2 * theirs


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only these have AVX2, or do not")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_this_cpu_was_asked_on_import(capability):
    """Here and in the stem, by PyTorch's own name for its instructions."""
    code = (
        "import torch; from fastinception import conv_backward, stem; "
        "print(torch.backends.cpu.get_cpu_capability(), conv_backward.COLUMNS_PAY, stem.BLOCKED_PAYS)"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    blocked = capability == "avx2" and torch.backends.mkldnn.is_available()
    assert found.split() == [capability.upper(), str(capability == "avx2"), str(blocked)]


def test_where_columns_are_multiplied(monkeypatch):
    """In float32, for small kernels or images within the kernel, enough pixels and enough channels."""

    def by_columns(kernel: int, n=32, height=6, width=6, channels=16, out=16, **options) -> bool:
        x = torch.empty(n, channels, height, width, **options)
        return gradients.by_columns(x, torch.empty(out, channels, kernel, kernel))

    assert by_columns(3)
    assert by_columns(7)
    assert not by_columns(7, width=7)
    assert not by_columns(7, width=1, n=600, height=7)
    assert not by_columns(1)
    assert not by_columns(5)
    assert not by_columns(3, n=14)
    assert not by_columns(3, channels=15)
    assert not by_columns(3, out=15)
    assert not by_columns(3, dtype=torch.float64)
    assert not by_columns(3, device="meta")
    monkeypatch.setattr(gradients, "COLUMNS_PAY", False)
    assert not by_columns(3)


def pair(kernel: tuple[int, int] = (3, 3), bias: bool = True) -> tuple[Conv2d, nn.Conv2d]:
    """Return a convolution of our own and torch's with the same small integers."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    own, theirs = (cls(16, 17, kernel, padding=padding, bias=bias) for cls in (Conv2d, nn.Conv2d))
    with torch.no_grad():
        for p in own.parameters():
            p.copy_(integers(*p.shape))
    theirs.load_state_dict(own.state_dict())
    return own, theirs


def image(n: int = 16, height: int = 7, width: int = 6) -> Tensor:
    return integers(n, 16, height, width).contiguous(memory_format=CL).requires_grad_()


def results(conv: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    y = conv(x)
    return [y, *torch.autograd.grad(y, [x, *conv.parameters()], grad)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", [CL, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("kernel", "side"), [((3, 3), 7), ((1, 3), 7), ((3, 1), 7), ((5, 5), 4), ((5, 7), 4)])
def test_conv_gives_torchs_values_and_strides(kernel, side, format, bias, compiled):
    own, theirs = (conv.to(memory_format=format) for conv in pair(kernel, bias))
    run = torch.compile(own, fullgraph=True, backend="aot_eager") if compiled else own
    x, grad = image(64, side, side), integers(64, 17, side, side)
    found, expected = results(run, x, grad), results(theirs, x, grad)
    assert operators(lambda: run(x)) == {"conv2d"}
    assert all(map(torch.equal, found, expected))
    assert found[0].stride() == expected[0].stride()
    assert [t.stride() for t in found[1:]] == [t.stride() for t in (x, *own.parameters())]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_stem_is_trained_by_them(compiled):
    net = GoogLeNet(block=FastInception)[1].to(memory_format=CL)
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    x = torch.randn(2, 64, 16, 16).contiguous(memory_format=CL)
    run(x).sum().backward()  # compiles
    assert operators(lambda: run(x).sum().backward()) == {"conv2d", "conv2d_backward"}


def test_another_batch_is_not_another_graph():
    own, theirs = pair()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(own, fullgraph=True, backend=counter, dynamic=True)
    for n in (20, 24, 40):
        x, grad = image(n), integers(n, 17, 7, 6)
        assert all(map(torch.equal, results(run, x, grad), results(theirs, x, grad)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("formats", list(itertools.product((CL, torch.contiguous_format), repeat=2)), ids=str)
def test_opcheck(formats, bias):
    grad, x, weight = operands(16, 16, 17, (3, 3), 6, 7)
    x, weight = x.contiguous(memory_format=formats[0]), weight.contiguous(memory_format=formats[1])
    args = (x.requires_grad_(), weight.requires_grad_(), integers(17).requires_grad_() if bias else None)
    torch.library.opcheck(torch.ops.fastinception.conv2d, args)
    needs = [True, True, bias]
    backward = torch.ops.fastinception.conv2d_backward
    torch.library.opcheck(backward, (grad, x.detach(), weight.detach(), needs))
    # Dynamic shapes are left out: torch 2.11's own second derivative of a convolution does not take them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(backward, (grad.requires_grad_(), x, weight, needs), test_utils=checks)


def test_derivatives_are_those_of_finite_differences():
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4, 3), (2, 3, 3, 3), 2)]
    assert torch.autograd.gradcheck(torch.ops.fastinception.conv2d, tensors)
    assert torch.autograd.gradgradcheck(torch.ops.fastinception.conv2d, tensors)


def test_what_is_frozen_gets_no_gradient():
    conv, _ = pair()
    for frozen in (("weight",), ("bias",), ("weight", "bias"), ()):
        for name, p in conv.named_parameters():
            p.requires_grad_(name not in frozen)
            p.grad = None
        x = image().requires_grad_(len(frozen) == 2)
        conv(x).sum().backward()
        assert {name for name, p in conv.named_parameters() if p.grad is None} == set(frozen)
        assert (x.grad is not None) == x.requires_grad
        assert bool(operators(lambda x=x: conv(x))) == ("weight" not in frozen)


def test_a_changed_operand_is_an_error_and_a_moved_one_is_not():
    own, theirs = pair()
    for change in ("x", "weight"):
        x = image().detach().clone(memory_format=torch.preserve_format)
        y = own(x)
        with torch.no_grad():
            (x if change == "x" else own.weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    theirs.load_state_dict(own.state_dict())
    x, grad = image(), integers(16, 17, 7, 6)
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, results(own, x, grad), results(theirs, x, grad)))


@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 1}, {"padding": 0}, {"padding": (1, 0)}, {"padding": (0, 1)}, {"groups": 2},
     {"padding": 1, "dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}, {"kernel_size": 2}],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_torchs(options):
    options = {"kernel_size": 3, "padding": 1, **options}
    own, theirs = Conv2d(32, 34, **options), nn.Conv2d(32, 34, **options)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(16, 32, 9, 9).contiguous(memory_format=CL).requires_grad_()
    y = theirs(x)
    assert not operators(lambda: own(x))
    for ours, expected in zip(results(own, x, torch.ones_like(y)), results(theirs, x, torch.ones_like(y)), strict=True):
        assert torch.equal(ours, expected)


def test_everything_else_is_torchs(monkeypatch):
    """And what is no faster: contiguous images, few pixels or channels, large kernels."""
    monkeypatch.setattr(backends, "_WIDENED", {})
    conv, x = pair()[0], image()

    class Own(Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, 2 * weight, bias)

    def under(context) -> None:
        with context:
            conv(x)

    assert operators(lambda: conv(x))
    assert not operators(lambda: under(torch.no_grad()))
    assert not operators(lambda: under(torch.autocast("cpu", torch.bfloat16)))
    assert not operators(lambda: under(FlopCounterMode(display=False)))
    assert not operators(lambda: conv(x[0]))
    assert not operators(lambda: conv(x[:4]))
    assert not operators(lambda: conv(x.contiguous()))
    assert not operators(lambda: conv(TwoTensor(x, x)))
    assert not operators(lambda: conv(x.detach().to_mkldnn()))
    for name, t in list(conv.named_parameters()):
        doubled = pair()[0]
        setattr(doubled, name, nn.Parameter(TwoTensor(t.detach(), t.detach())))
        assert not operators(lambda doubled=doubled: doubled(x)), name
    assert not operators(lambda: Own(16, 17, 3, padding=1)(x))
    patched = pair()[0]
    patched._conv_forward = conv._conv_forward
    assert not operators(lambda: patched(x))
    assert not operators(lambda: Conv2d(16, 17, 5, padding=2)(x))
    assert not operators(lambda: Conv2d(16, 17, 1)(x))
    assert not operators(lambda: Conv2d(16, 15, 3, padding=1)(x))
    assert not operators(lambda: pair()[0].double()(x.double()))
    monkeypatch.setattr(gradients, "COLUMNS_PAY", False)
    assert not operators(lambda: conv(x))


def test_a_patch_behind_the_first_compiled_call_counts():
    conv, x = pair()[0], image()
    run = torch.compile(conv, backend="eager")
    unpatched, original = run(x), conv._conv_forward
    conv._conv_forward = lambda *args: 2 * original(*args)
    assert torch.equal(run(x), 2 * unpatched)


def test_a_replaced_weight_is_padded_as_by_torch():
    own, theirs = pair()
    for side in (1, 5):
        own.weight = theirs.weight = nn.Parameter(integers(17, 16, side, side))
        x = image(64, 4, 4)
        assert torch.equal(own(x), theirs(x))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3)])
def test_transforms(kernel, passing):
    """Each by the operator or around it: second derivatives, batched gradients, forward mode, functorch, export."""
    conv, theirs = pair(kernel)
    x = torch.randn(4, 16, 12, 12).contiguous(memory_format=CL).requires_grad_()
    assert operators(lambda: conv(x))

    def second(conv: nn.Module) -> tuple[Tensor, ...]:
        y = conv(x)
        first = torch.autograd.grad(y.square().sum(), [x, *conv.parameters()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *conv.parameters()])

    def of_the_weight_alone(conv: nn.Module) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(conv(x.detach()).square().sum(), conv.weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), conv.parameters())

    def watched(conv: nn.Module) -> tuple[Tensor, ...]:
        with passing():
            return second(conv)

    def batched(conv: nn.Module) -> tuple[Tensor, ...]:
        y = conv(x)
        grads = torch.randn(4, *y.shape, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad(y, conv.weight, grads, is_grads_batched=True)

    def forward(conv: nn.Module) -> tuple[Tensor, ...]:
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(conv(torch.autograd.forward_ad.make_dual(x, x)))

    def forward_over_backward(conv: nn.Module) -> tuple[Tensor, ...]:
        y = conv(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            (grad,) = torch.autograd.grad(y, x, dual)
            return torch.autograd.forward_ad.unpack_dual(grad)

    def jacobian(conv: nn.Module) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda x: conv(x).square().sum()))(x[:, None])

    for transform in (second, of_the_weight_alone, watched, batched, forward, forward_over_backward, jacobian):
        found, expected = transform(conv), transform(theirs)
        for own, correct in zip(found, expected, strict=True):
            assert correct is not None
            torch.testing.assert_close(own, correct, rtol=1e-4, atol=1e-4 * correct.abs().max().item())
    for strict in (False, True):
        exported = torch.export.export(conv, (x.detach(),), strict=strict)
        assert "fastinception" not in str(exported.graph)


def test_a_gradient_under_autocast_is_not_rounded():
    """Whose products, if autocast saw them, would be of bfloat16: those of the block's 1x1 convolutions."""
    grad, x, weight = (torch.randn_like(t) for t in operands(64, 16, 17, (3, 3), 9, 8))
    needs = [True, True, True]
    expected = torch.ops.fastinception.conv2d_backward(grad, x, weight, needs)
    pointwise = torch.ops.fastinception.conv2d_backward(grad, x, weight[..., :1, :1], needs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, torch.ops.fastinception.conv2d_backward(grad, x, weight, needs), expected))
        found = torch.ops.fastinception.conv2d_backward(grad, x, weight[..., :1, :1], needs)
    assert all(map(torch.equal, found, pointwise))


def test_a_wrong_image_gets_torchs_error():
    with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels"):
        Conv2d(4, 6, 3, padding=1)(torch.randn(2, 5, 8, 8))
    wrong = torch.randn(16, 17, 8, 8).contiguous(memory_format=CL)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 16 channels"):
        pair()[0](wrong)
    with pytest.raises(TypeError, match=r"invalid combination of arguments - got .list"):
        pair()[0]([1.0])
    flat = pair()[0]
    flat.weight = nn.Parameter(flat.weight.detach()[..., 0])
    with pytest.raises(RuntimeError):
        flat(image())


def test_the_block_differentiates_its_spatial_convolutions_so(monkeypatch):
    seen = []
    own = gradients._weight_gradient_by_columns
    monkeypatch.setattr(
        gradients, "_weight_gradient_by_columns", lambda *args: seen.append(args[2].shape[2]) or own(*args)
    )
    block = FastInception(64, 8, (16, 24), (16, 24), 8, backend="aten").to(memory_format=CL)
    x = torch.randn(512, 64, 4, 4).contiguous(memory_format=CL)
    block(x).sum().backward()
    assert seen == [3, 5]
    assert block.p2_2.weight.grad.stride() == block.p2_2.weight.stride()
    with torch.no_grad():
        assert torch.equal(F.relu(block.p1_1(x)), block(x)[:, :8])
