"""Define FastInception: the textbook block under another name, computed by the fastest path that is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.fx.node import has_side_effect
from torch.nn.modules import module as nn_module

from fastinception import backends, functional
from fastinception.backends import Path
from fastinception.conv import Conv2d
from fastinception.functional import check_images, copy_into, inception
from fastinception.pool import MaxPool2d
from fastinception.reference import Inception

# What each child computes, if nobody edited it: kernel size, padding, stride, dilation, groups, padding mode.
_CONVS = {
    name: ((size, size), (size // 2, size // 2), (1, 1), (1, 1), 1, "zeros")
    for name, size in {"p1_1": 1, "p2_1": 1, "p2_2": 3, "p3_1": 1, "p3_2": 5, "p4_2": 1}.items()
}
# The package's own compute the same.
_CONV_CLASSES = (nn.Conv2d, Conv2d)
_POOL_CLASSES = (nn.MaxPool2d, MaxPool2d)


class FastInception(Inception):
    """Run the textbook Inception block fast: same constructor, parameters, ``state_dict`` and numbers.

    On a GPU the block is two Triton launches that write into one output (see ``kernels/``); elsewhere it is ATen,
    whose ReLUs write into the output (few elements and compiled inference aside). A block that was edited (a child
    replaced, hooked, parametrized or reconfigured) runs the textbook forward instead; functorch transforms,
    forward-mode derivatives and exported programs get standard operators. :func:`explain` says what runs and why.

    Args:
        in_channels, c1, c2, c3, c4: as for :class:`fastinception.Inception`.
        backend: ``"auto"`` takes Triton on a GPU and ATen elsewhere, unless the environment variable
            FASTINCEPTION_BACKEND says otherwise; ``"triton"`` insists, and raises where Triton cannot run;
            ``"aten"`` needs no Triton.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, c1 + c2[1] + c3[1] + c4, H, W]``, any floating dtype, in the textbook
        block's memory format. The fast one is channels_last: move the network with
        ``.to(memory_format=torch.channels_last)``.

    Raises:
        TypeError, ValueError: as :class:`fastinception.Inception`; ValueError for an unknown backend.

    Example:
        >>> import torch
        >>> from fastinception import FastInception, explain
        >>> block = FastInception(192, 64, (96, 128), (16, 32), 32)
        >>> block(torch.zeros(2, 192, 12, 12)).shape
        torch.Size([2, 256, 12, 12])
        >>> print(explain(block, torch.zeros(64, 192, 12, 12)))
        aten: x is not on a GPU that runs Triton
    """

    backend: str
    __prepare_scriptable__ = backends.refuse_script

    def __init__(
        self,
        in_channels: int,
        c1: int,
        c2: tuple[int, int],
        c3: tuple[int, int],
        c4: int,
        *,
        backend: str = "auto",
    ) -> None:
        backend = backends.check(backend)
        super().__init__(in_channels, c1, c2, c3, c4)
        self.backend = backend

    @classmethod
    def from_reference(cls, module: Inception, *, backend: str | None = None) -> FastInception:
        """Return ``module`` as a fast block that shares its children, and so its parameters, and its hooks.

        What is replaced or hooked later on one of them is so on both. Without a ``backend`` it is that of a fast
        ``module``, else ``"auto"``.

        Raises:
            TypeError: ``module`` is not an :class:`fastinception.Inception`, or overrides its forward or call, in its
                class or, as a patch or a wrapper does, by itself.
        """
        kind = type(module)
        known = isinstance(module, Inception) and kind.forward in (Inception.forward, cls.forward)
        patched = known and "forward" in vars(module)
        if not known or kind.__call__ is not nn.Module.__call__ or patched:
            got = f"{_name(kind)}{', patched' if patched else ''}"
            raise TypeError(
                f"from_reference takes a fastinception.Inception with its own forward, got {got}; for another "
                f"class with the same convolutions and no others, build {cls.__name__} with the same widths and load "
                f"their weights, under the names {', '.join(_CONVS)}"
            )
        fast = cls.__new__(cls)
        fast.__dict__.update(module.__dict__)
        fast._compiled_call_impl = None  # what module.compile() made would go on running the plain block
        own = module.backend if isinstance(module, FastInception) else "auto"
        fast.backend = backends.check(own if backend is None else backend)
        return fast

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the block of ``x``, in ``out`` if one is given.

        Args:
            x: ``[N, in_channels, H, W]``, the parameters' dtype and device (autocast aside), any strides.
            out: a tensor of the output's shape, dtype and device, contiguous or channels_last, to write into and
                return; only where no gradient is recorded.

        Raises:
            TypeError, ValueError: see :func:`fastinception.functional.inception`.
            AssertionError: an ``out`` for a program that ``torch.fx.symbolic_trace`` made.
        """
        if backends.symbolic(x):
            _refuse(out)
            return super().forward(x)
        if _edited(self) is None and not backends.followed():
            return inception(x, _params(self), backend=self.backend, out=out)
        check_images(x)
        y: Tensor = super().forward(x)
        return y if out is None else copy_into(out, y, (x, *self.parameters()))


@has_side_effect
def _refuse(out: Tensor | None) -> None:
    """Raise AssertionError for a buffer; in ``torch.fx.symbolic_trace`` have the program do so, which takes it, too."""
    if backends.symbolic(out):
        cast(Any, out).tracer.create_proxy("call_function", _refuse, (out,), {})
    elif out is not None:
        raise AssertionError("a program that torch.fx made of the block takes no out")


def explain(module: FastInception, x: Tensor) -> Path:
    """Say how ``module(x)`` is computed and why, without computing it.

    Returns:
        A named tuple: ``name`` is ``"triton"``, ``"aten"`` or ``"plain"``, ``reason`` is a sentence.

    Raises:
        TypeError: ``module`` is not a :class:`FastInception`; for a network, ask its blocks.
        TypeError, ValueError: what ``module(x)`` would raise.
    """
    if not isinstance(module, FastInception):
        raise TypeError(f"explain takes a FastInception block and its input, got {type(module).__qualname__}")
    if (reason := _edited(module)) is not None:
        check_images(x)
        return Path("plain", reason)
    return functional.explain(x, _params(module), module.backend)


def _params(block: Inception) -> list[Tensor]:
    params: list[Tensor] = []
    for name in _CONVS:
        conv: Any = block._modules[name]
        own = conv._parameters  # a look-up in this dict takes a tenth of nn.Module's for an attribute
        if "weight" in own and "bias" in own:
            params += own["weight"], own["bias"]
        else:  # a replica of nn.DataParallel has plain attributes
            params += conv.weight, conv.bias
    return params


def _edited(block: Inception) -> str | None:
    """Say what makes ``block`` compute something else than its twelve parameters say, or None."""
    if hooked_globally():
        return "a global module hook is registered"
    children, attributes = block._modules, backends.attributes()
    for name, settings in _CONVS.items():
        conv: Any = children.get(name)
        if type(conv) not in _CONV_CLASSES:  # a subclass, a parametrization and a wrapper all change the class
            return f"{name} is a {_name(type(conv))}"
        own = attributes(conv)
        params = own["_parameters"]
        bias = params["bias"] if "bias" in params else conv.bias  # noqa: SIM401, the second takes ten times as long
        if bias is None:
            return f"{name} has no bias"
        found = own["kernel_size"], own["padding"], own["stride"], own["dilation"], own["groups"], own["padding_mode"]
        if found != settings:
            return f"{name} was reconfigured: {_settings(conv, 'padding_mode', 'groups')}"
        if (reason := wrapped(own)) is not None:
            return f"{name} {reason}"
    pool: Any = children.get("p4_1")
    if type(pool) not in _POOL_CLASSES:
        return f"p4_1 is a {_name(type(pool))}"
    if (
        pool.kernel_size not in (3, (3, 3))
        or pool.stride not in (1, (1, 1))
        or pool.padding not in (1, (1, 1))
        or pool.dilation not in (1, (1, 1))
        or pool.return_indices
        or pool.ceil_mode
    ):
        return f"p4_1 was reconfigured: {_settings(pool, 'ceil_mode', 'return_indices')}"
    if (reason := wrapped(attributes(pool))) is not None:
        return f"p4_1 {reason}"
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _settings(child: nn.Module, *more: str) -> str:
    # Not the child's repr, which fails for settings that its forward takes, such as a convolution's padding=1.
    return ", ".join(f"{k}={getattr(child, k)!r}" for k in ("kernel_size", "stride", "padding", "dilation", *more))


def hooked_globally() -> bool:
    """Say whether a hook for all modules is registered."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def wrapped(own: Mapping[str, Any]) -> str | None:
    """Say what runs beside its class's forward of a layer with these attributes, or None."""
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has hooks"
    if "forward" in own or "_conv_forward" in own:
        return "has a forward of its own"
    return None
