"""Where the stem's stages call their layers: who watches or changes one, and what is not served, meets them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fastinception import Conv2d, FastInception, GoogLeNet, Inception, MaxPool2d, stem
from fastinception.stem import Stage
from tests import profiled, stages
from tests.stages import BATCH, integers, layers, operators, stage

in_parts = stages.in_parts


def test_what_the_operator_does_not_take_is_computed_by_the_layers(monkeypatch):
    own, x = stage(0, monkeypatch)
    assert operators(lambda: own(x))

    def counted() -> None:
        with FlopCounterMode(display=False):
            own(x)

    assert not operators(counted)
    assert not operators(lambda: own(x[0]))
    narrow = x[0, :, :3]  # three lines, as if they were channels
    assert torch.equal(own(narrow), layers(own)(narrow))
    with monkeypatch.context() as patch:
        patch.setattr(stem, "BLOCKED_PAYS", True)
        patch.setattr(stem, "_KEPT", 2**40)
        assert not operators(lambda: own(x))  # with a gradient
    assert not operators(lambda: own(TwoTensor(x, x)))
    assert not operators(lambda: own.to("meta")(x.to("meta")))
    monkeypatch.setattr(stem, "_is_served", None)  # no other device, and no wrong type, gets as far as that
    own(x.to("meta"))
    with pytest.raises(TypeError, match=r"invalid combination of arguments - got .list"):
        own([1.0])


def test_layers_with_other_settings_are_called(monkeypatch):
    own, x = stage(0, monkeypatch)
    convolution, pool = {"kernel_size": 7, "padding": 3}, {"kernel_size": 3, "stride": 2, "padding": 1}
    others: list[tuple[int, nn.Module]] = [(1, nn.ReLU6())]
    others += [
        (0, nn.Conv2d(3, 6, **(convolution | options)))
        for options in (
            {"padding": 2}, {"padding": (3, 2)}, {"padding": (2, 3)}, {"dilation": 2}, {"padding_mode": "reflect"},
            {"bias": False}, {"kernel_size": (7, 6)}, {"kernel_size": (6, 7)}, {"stride": 3},
            {"stride": (1, 2)}, {"stride": 1, "padding": "same"}, {"groups": 3},
        )
    ]  # fmt: skip
    others += [
        (2, nn.MaxPool2d(**(pool | options)))
        for options in ({"kernel_size": 2}, {"stride": 1}, {"padding": 0}, {"ceil_mode": True}, {"dilation": 2})
    ]
    others += [(0, Conv2d(3, 64, 7, 2, 3)), (2, MaxPool2d(3, 2, 1))]
    for name, t in list(own[0].named_parameters()):
        others.append((0, Conv2d(3, 64, 7, 2, 3)))
        setattr(others[-1][1], name, nn.Parameter(TwoTensor(t.detach(), t.detach())))
    for place, layer in others:
        changed = Stage(*own)
        changed[place] = layer
        assert not operators(lambda changed=changed: changed(x)), layer
        expected = layers(changed)(x)
        assert type(expected) is TwoTensor or torch.equal(changed(x), expected), layer


def test_some_layers_of_a_stage_are_no_stage(monkeypatch):
    own, x = stage(0, monkeypatch)
    for start, stop in ((0, 0), (0, 1), (0, 2), (1, 3)):
        part = own[start:stop]
        assert type(part) is nn.Sequential
        assert torch.equal(part(x), layers(part)(x))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_of_another_class_is_called(place, monkeypatch):
    own, x = stage(0, monkeypatch)

    class Doubled(type(own[place])):
        def forward(self, y):
            return 2 * super().forward(y)

    own[place].__class__ = Doubled
    assert torch.equal(own(x), layers(own)(x))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_see_the_whole_batch(place, monkeypatch):
    own, x = stage(0, monkeypatch)
    seen: list[int] = []
    hook = own[place].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    own(x)
    hook.remove()
    forward = own[place].forward
    own[place].forward = lambda y: seen.append(len(y)) or forward(y)
    own(x)
    del own[place].forward
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(len(out)) if module is own[place] else None
    )
    try:
        own(x)
    finally:
        hook.remove()
    own(x)
    assert seen == [BATCH] * 3


def test_hooks_on_layers_in_front_run(monkeypatch):
    own, x = stage(1, monkeypatch)
    assert operators(lambda: own(x))
    seen: list[int] = []
    own[0].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    assert not operators(lambda: own(x))
    assert seen == [BATCH]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["hooked", "traced", "exported", "fx", "mode"])
def test_who_watches_sees_the_textbooks_layers(kind, which, monkeypatch):
    """By whose classes, order and inputs quantizers, counters, explanations, adapters and extractors go."""
    own = stage(which, monkeypatch)[0] if which < 2 else GoogLeNet(block=FastInception)[2]
    plain = GoogLeNet(in_channels=3)[which].eval()
    plain.load_state_dict(own.eval().state_dict())
    x = integers(4, (3, 64, 192)[which], 13, 12)
    kinds = [FastInception if type(m) is Inception else type(m) for m in plain.modules()]
    assert [*map(type, own.modules())][1:] == kinds[1:]
    seen: list[list[str]] = []
    for net in (own, plain):
        if kind == "hooked":
            kept: list[str] = []
            for name, module in net.named_modules():
                module.register_forward_hook(
                    lambda module, args, out, kept=kept, name=name: kept.append(f"{name} {args[0].sum()} {out.sum()}")
                )
            net(x)
        elif kind == "mode":
            with profiled.Functions() as mode:
                net(x)
            kept = mode.names
        elif kind == "traced":
            graph = torch.jit.trace(net, x).inlined_graph
            kept = [f"{node.kind()} {node.scopeName().split('/')[-1]}" for node in graph.nodes()]
        else:
            program = torch.fx.symbolic_trace(net) if kind == "fx" else torch.export.export(net, (x,))
            kept = [
                f"{node.op} {node.target} {[*node.meta.get('nn_module_stack', {})]}" for node in program.graph.nodes
            ]
        seen.append(kept)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 0, 40), None),
        ((2, 3, 48, 0), None),
        ((2, 4, 48, 48), None),
        ((2, 3, 48, 48), torch.float64),
        ("nested", None),
    ],
)
def test_wrong_images_are_the_convolutions_error(shape, dtype, monkeypatch):
    own, _ = stage(0, monkeypatch)
    if shape == "nested":
        images = torch._nested_tensor_from_tensor_list([torch.empty(3, 8, 8), torch.empty(3, 9, 8)])
    else:
        images = torch.empty(shape, dtype=dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as expected:
            layers(own)(images)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as found:
            own(images)
        assert str(found.value) == str(expected.value)
