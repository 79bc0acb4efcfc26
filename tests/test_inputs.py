"""Bad input: a TypeError or ValueError that names what came and what was expected, on every backend, and empty too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastinception import FastInception, Inception, explain, functional

SMALL = (5, 4, (3, 6), (2, 3), 7)
BACKENDS = ("auto", "aten", "triton")


def block(backend, dtype=torch.float32):
    torch.manual_seed(0)
    return FastInception(*SMALL, backend=backend).to(dtype)


def numbers(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# what comes, error, message
BAD = {
    "fewer channels": (lambda: numbers(2, 4, 6, 6), ValueError, r"x must have 5 channels, got 4: \[2, 4, 6, 6\]"),
    "more channels": (lambda: numbers(2, 6, 6, 6), ValueError, r"x must have 5 channels, got 6: \[2, 6, 6, 6\]"),
    "channels last as NumPy has them": (
        lambda: numbers(2, 6, 6, 5), ValueError, r"x must have 5 channels, got 6: \[2, 6, 6, 5\]",
    ),
    "no batch": (lambda: numbers(5, 6, 6), ValueError, r"x must be \[N, C, H, W\], got 3 dimensions: \[5, 6, 6\]"),
    "video": (
        lambda: numbers(2, 5, 3, 6, 6), ValueError, r"x must be \[N, C, H, W\], got 5 dimensions: \[2, 5, 3, 6, 6\]",
    ),
    "scalar": (lambda: torch.tensor(1.0), ValueError, r"x must be \[N, C, H, W\], got 0 dimensions: \[\]"),
    "int64": (lambda: numbers(2, 5, 6, 6, dtype=torch.int64), TypeError, r"floating dtype, got torch\.int64"),
    "uint8": (lambda: numbers(2, 5, 6, 6, dtype=torch.uint8), TypeError, r"floating dtype, got torch\.uint8"),
    "bool": (lambda: numbers(2, 5, 6, 6, dtype=torch.bool), TypeError, r"floating dtype, got torch\.bool"),
    "complex64": (
        lambda: numbers(2, 5, 6, 6, dtype=torch.complex64), TypeError, r"floating dtype, got torch\.complex64",
    ),
    "float64": (
        lambda: numbers(2, 5, 6, 6, dtype=torch.float64), TypeError,
        r"got torch\.float64 for x and torch\.float32 for p1_1's weight: .* all but float64",
    ),
    "float16": (
        lambda: numbers(2, 5, 6, 6, dtype=torch.float16), TypeError,
        r"got torch\.float16 for x and torch\.float32 for p1_1's weight: cast one, or call under autocast",
    ),
    "meta": (
        lambda: numbers(2, 5, 6, 6).to("meta"), ValueError,
        "on one device, got meta for x and cpu for p1_1's weight",
    ),
    "array": (lambda: np.zeros((2, 5, 6, 6), np.float32), TypeError, r"x must be a torch\.Tensor, got ndarray"),
    "sparse": (lambda: numbers(2, 5, 6, 6).to_sparse(), TypeError, r"x must be a dense tensor, got torch\.sparse_coo"),
    "mkldnn": (
        lambda: numbers(2, 5, 6, 6).to_mkldnn(), TypeError, r"x must be a dense tensor, got torch\._mkldnn",
    ),
    "nested": (
        lambda: torch._nested_tensor_from_tensor_list([numbers(5, 6, 6), numbers(5, 4, 6)]), TypeError,
        r"x must be a dense tensor, got a nested one",
    ),
    "None": (lambda: None, TypeError, r"x must be a torch\.Tensor, got NoneType"),
    "list": (lambda: [numbers(5, 6, 6)], TypeError, r"x must be a torch\.Tensor, got list"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_names_what_came_and_what_was_expected(backend, kind, grad):
    build, error, message = BAD[kind]
    fast = block(backend)
    with torch.set_grad_enabled(grad):
        with pytest.raises(error, match=message):
            fast(build())
        with pytest.raises(error, match=message):
            explain(fast, build())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", [k for k in BAD if k not in ("scalar", "no batch", "array", "sparse", "mkldnn", "nested", "None", "list")]
)
def test_an_empty_batch_hides_no_error(backend, kind):
    build, error, message = BAD[kind]
    message = message.replace(r"\[2, ", r"\[0, ")
    with pytest.raises(error, match=message):
        block(backend)(build()[:0])


@pytest.mark.parametrize("kind", ["no batch", "video", "scalar", "int64", "complex64", "array", "sparse", "None"])
def test_edited_blocks_check_what_no_edit_changes(kind):
    """The plain forward would take an image without a batch and concatenate its rows."""
    build, error, message = BAD[kind]
    fast = FastInception(5, 4, (4, 4), (4, 4), 4)
    fast.p1_1.register_forward_hook(lambda *_: None)
    for call in (fast, lambda x: explain(fast, x), lambda x: fast(x, out=torch.empty(4, 16, 6))):
        with torch.no_grad(), pytest.raises(error, match=message):
            call(build())


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_mixed_dtypes_and_devices_are_named(backend):
    x = torch.zeros(2, 5, 6, 6)
    fast = block(backend)
    fast.p3_2.bias.data = fast.p3_2.bias.data.double()
    with pytest.raises(TypeError, match=r"torch\.float32 for x and torch\.float64 for p3_2's bias"):
        fast(x)
    fast = block(backend)
    fast.p2_2.weight = torch.nn.Parameter(fast.p2_2.weight.to("meta"))
    with pytest.raises(ValueError, match="got cpu for x and meta for p2_2's weight"):
        fast(x)
    fast = block(backend, torch.float64)
    with pytest.raises(TypeError, match=r"torch\.float32 for x and torch\.float64 for p1_1's weight"):
        fast(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_wrong_shapes_are_named(backend):
    x = torch.zeros(2, 5, 6, 6)
    for name, shape, message in (
        ("p2_2.weight", (6, 4, 3, 3), r"p2_2's weight must be \[c, 3, 3, 3\], c at least 1, got \[6, 4, 3, 3\]"),
        ("p3_2.weight", (3, 2, 3, 3), r"p3_2's weight must be \[c, 2, 5, 5\], c at least 1, got \[3, 2, 3, 3\]"),
        ("p4_2.weight", (7, 6, 1, 1), r"p4_2's weight must be \[c, 5, 1, 1\], c at least 1, got \[7, 6, 1, 1\]"),
        ("p4_2.bias", (8,), r"p4_2's bias must be \[7\], got \[8\]"),
        ("p1_1.weight", (4, 5), r"p1_1's weight must be \[c, 5, 1, 1\], c at least 1, got \[4, 5\]"),
    ):
        fast = block(backend)
        fast.get_parameter(name).data = torch.zeros(shape)
        with pytest.raises(ValueError, match=message):
            fast(x)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_channels_are_refused_whatever_is_recorded(backend, grad):
    """A convolution of autograd's refuses them, and others do not."""
    x, widths = torch.zeros(2, 5, 6, 6), {"p1_1": [0], "p2_1": [2, 4], "p2_2": [4], "p3_1": [6, 8], "p4_2": [10]}
    for name, places in widths.items():
        params = [p.detach().clone() for p in block(backend).parameters()]
        first, *seconds = places
        params[first], params[first + 1] = params[first][:0], params[first + 1][:0]
        for second in seconds:
            params[second] = params[second][:, :0]
        params = [p.requires_grad_(grad) for p in params]
        with pytest.raises(ValueError, match=rf"{name}'s weight must be \[c, .*c at least 1, got \[0, "):
            functional.inception(x, params, backend=backend)
    params = [p[:, :0] if p.dim() == 4 and p.shape[1] == 5 else p for p in block(backend).parameters()]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"x must have channels, got \[2, 0, 6, 6\]"):
        functional.inception(x[:, :0], params, backend=backend)


def test_autocast_takes_other_floating_dtypes_and_no_integers():
    fast, plain = block("aten"), Inception(*SMALL)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 5, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x.half()).dtype is torch.bfloat16
        torch.testing.assert_close(fast(x.half()), plain(x.half()), rtol=2e-2, atol=2e-2)
        with pytest.raises(TypeError, match=r"floating dtype, got torch\.int64"):
            fast(x.long())
        with pytest.raises(TypeError, match=r"torch\.float64 for x"):
            fast(x.double())


@pytest.mark.parametrize("backend", ["cuda", "", "Triton", None, 3, "reference", ["aten"]])
def test_unknown_backend(backend):
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'aten', got") as caught:
        FastInception(*SMALL, backend=backend)
    assert str(caught.value).endswith(repr(backend))
    fast = block("aten")
    fast.backend = backend
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'aten', got"):
        fast(torch.zeros(2, 5, 6, 6))


def test_backend_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        FastInception(*SMALL, "aten")


def test_triton_backend_refuses_bfloat16_in_the_interpreter():
    """Its products are wrong there, so that no numbers may come out; auto and aten have right ones."""
    fast, x = block("triton", torch.bfloat16), torch.zeros(2, 5, 6, 6, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pytest.skip("a GPU's bfloat16 is right")
    for given in (x, x[:0]):
        with pytest.raises(ValueError, match=r"backend='triton' cannot run.*bfloat16.*backend='auto' or 'aten'"):
            fast(given)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="bfloat16"):
        block("triton")(x.float())
    assert block("auto", torch.bfloat16)(x).dtype is torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_empty_batch_is_the_plain_blocks(backend, layout):
    fast, plain = block(backend), Inception(*SMALL)
    results = []
    for module in (plain, fast):
        x = torch.zeros(0, 5, 6, 4).contiguous(memory_format=layout).requires_grad_()
        out = module(x)
        out.sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters())])
        with torch.no_grad():
            assert module(x).shape == (0, 20, 6, 4)
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs)
    assert results[1][0].requires_grad


@pytest.mark.parametrize(
    ("pixels", "c2", "c3", "reason"),
    [
        (2**31, (3, 6), (2, 3), "the kernels count at most 2147479552 pixels"),
        (89478484, (6, 6), (6, 6), None),
        *(
            (89478485, c2, c3, "at most 89478484 pixels of 6 channels in a row, and there are 89478485")
            for c2, c3 in (((6, 3), (2, 3)), ((3, 6), (2, 3)), ((3, 2), (6, 3)), ((3, 2), (3, 6)))
        ),
        (536870911, (1, 1), (1, 1), "at most 536870910 pixels of 1 channels"),  # by the last of the five pixels alone
    ],
)
def test_what_is_beyond_the_kernels_integers_is_not_theirs(pixels, c2, c3, reason):
    x = torch.zeros(1).expand(1, 5, 1, pixels)
    assert explain(FastInception(5, 4, c2, c3, 7, backend="aten"), x).name == "aten"
    fast = FastInception(5, 4, c2, c3, 7, backend="triton")
    if reason is None:
        assert explain(fast, x).name == "triton"
    else:
        with pytest.raises(ValueError, match=f"backend='triton' cannot run here: .*{reason}"):
            explain(fast, x)
        with torch.autograd.forward_ad.dual_level():  # nor are standard operators, which serve this
            assert explain(fast, x).name == "plain"


def test_more_weights_than_the_kernels_count_are_not_theirs():
    """To one of them the 1x1 convolutions that read x are rows of one matrix."""
    x, others = torch.zeros(1).expand(1, 2**14, 1, 1), [(1, 2**14, 1, 1), (1,), (1, 1, 3, 3), (1,)]
    others += [(1, 2**14, 1, 1), (1,), (1, 1, 5, 5), (1,), (1, 2**14, 1, 1), (1,)]
    some, many = [
        [torch.zeros(1).expand(shape) for shape in ((c1, 2**14, 1, 1), (c1,), *others)] for c1 in (2**16 - 8, 2**16)
    ]
    assert functional.explain(x, some, "triton").name == "triton"
    with pytest.raises(ValueError, match="at most 1073741824 numbers of all parameters"):
        functional.explain(x, many, "triton")
