"""The truth itself, against the textbook's code written out here: names, checkpoints, numbers, bad widths."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastinception
from fastinception import FastInception, GoogLeNet, Inception, googlenet, module, reference

SMALL = (5, 4, (3, 6), (2, 3), 7)


class Textbook(nn.Module):
    def __init__(self, in_channels, c1, c2, c3, c4):
        super().__init__()
        self.p1_1 = nn.Conv2d(in_channels, c1, kernel_size=1)
        self.p2_1 = nn.Conv2d(in_channels, c2[0], kernel_size=1)
        self.p2_2 = nn.Conv2d(c2[0], c2[1], kernel_size=3, padding=1)
        self.p3_1 = nn.Conv2d(in_channels, c3[0], kernel_size=1)
        self.p3_2 = nn.Conv2d(c3[0], c3[1], kernel_size=5, padding=2)
        self.p4_1 = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
        self.p4_2 = nn.Conv2d(in_channels, c4, kernel_size=1)

    def forward(self, x):
        p1 = F.relu(self.p1_1(x))
        p2 = F.relu(self.p2_2(F.relu(self.p2_1(x))))
        p3 = F.relu(self.p3_2(F.relu(self.p3_1(x))))
        p4 = F.relu(self.p4_2(self.p4_1(x)))
        return torch.cat((p1, p2, p3, p4), dim=1)


def textbook_googlenet(in_channels=1, num_classes=10):
    b1 = nn.Sequential(
        nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    b2 = nn.Sequential(
        nn.Conv2d(64, 64, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(64, 192, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    b3 = nn.Sequential(
        Textbook(192, 64, (96, 128), (16, 32), 32),
        Textbook(256, 128, (128, 192), (32, 96), 64),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    b4 = nn.Sequential(
        Textbook(480, 192, (96, 208), (16, 48), 64),
        Textbook(512, 160, (112, 224), (24, 64), 64),
        Textbook(512, 128, (128, 256), (24, 64), 64),
        Textbook(512, 112, (144, 288), (32, 64), 64),
        Textbook(528, 256, (160, 320), (32, 128), 128),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    b5 = nn.Sequential(
        Textbook(832, 256, (160, 320), (32, 128), 128),
        Textbook(832, 384, (192, 384), (48, 128), 128),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    )
    return nn.Sequential(b1, b2, b3, b4, b5, nn.Linear(1024, num_classes))


def random_biases_(net):
    """Biases away from zero, so that one which is not loaded or not used shows."""
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.1, 0.1)
    return net


# The block


@pytest.mark.parametrize("block", [Inception, FastInception])
def test_block_is_the_textbooks(block, tmp_path):
    torch.manual_seed(0)
    textbook, ours = Textbook(*SMALL), block(*SMALL)
    theirs = [(name, tuple(p.shape)) for name, p in textbook.state_dict().items()]
    assert [(name, tuple(p.shape)) for name, p in ours.state_dict().items()] == theirs
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs]

    torch.save(textbook.state_dict(), tmp_path / "textbook.pt")
    ours.load_state_dict(torch.load(tmp_path / "textbook.pt", weights_only=True), strict=True)
    x = torch.randn(2, 5, 7, 6)
    torch.testing.assert_close(ours(x), textbook(x))

    torch.save(block(*SMALL).state_dict(), tmp_path / "ours.pt")
    textbook.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True), strict=True)
    ours.load_state_dict(textbook.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), textbook(x))


def test_plain_block_is_the_textbooks_to_the_bit():
    torch.manual_seed(0)
    textbook = Textbook(*SMALL)
    ours = Inception(*SMALL)
    ours.load_state_dict(textbook.state_dict())
    x = torch.randn(3, 5, 6, 5)
    assert torch.equal(ours(x), textbook(x))


@pytest.mark.parametrize("block", [Inception, FastInception])
def test_block_draws_the_textbooks_initial_weights(block):
    """Same seed, same numbers: the children are made in the textbook's order."""
    torch.manual_seed(3)
    textbook = Textbook(*SMALL).state_dict()
    torch.manual_seed(3)
    ours = block(*SMALL).state_dict()
    for name in textbook:
        assert torch.equal(ours[name], textbook[name]), name


# The network


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got 2.0"),
        ({"in_channels": True}, TypeError, "in_channels must be an int, got True"),
        ({"in_channels": -1}, ValueError, "in_channels must be at least 1, got -1"),
        ({"block": "fast"}, TypeError, "block must be a class such as FastInception, or a function, got 'fast'"),
        ({"block": Inception(1, 1, (1, 1), (1, 1), 1)}, TypeError, r"or a function, got Inception\("),
        ({"block": nn.Linear}, TypeError, "block must take in_channels, c1, c2, c3, c4; .*Linear'> did not: "),
        ({"block": lambda *widths: None}, TypeError, "block must make a module, .* made None"),
    ],
)
def test_what_makes_no_network_is_named(options, error, message):
    with pytest.raises(error, match=message):
        GoogLeNet(**options)


@pytest.mark.parametrize("block", [Inception, FastInception])
def test_googlenet_is_the_textbooks(block, tmp_path):
    torch.manual_seed(0)
    textbook = random_biases_(textbook_googlenet(in_channels=3, num_classes=7))
    ours = GoogLeNet(block, in_channels=3, num_classes=7)
    theirs = [(name, tuple(p.shape)) for name, p in textbook.state_dict().items()]
    assert [(name, tuple(p.shape)) for name, p in ours.state_dict().items()] == theirs

    torch.save(textbook.state_dict(), tmp_path / "textbook.pt")
    ours.load_state_dict(torch.load(tmp_path / "textbook.pt", weights_only=True), strict=True)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    again = textbook_googlenet(in_channels=3, num_classes=7)
    again.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True), strict=True)

    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        expected = textbook(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("block", [Inception, FastInception])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_googlenet_gives_the_textbooks_gradients(block, format):
    """With ties behind every ReLU and NaN-free: where ReLU and max pool change places, no gradient may."""
    torch.manual_seed(0)
    textbook = random_biases_(textbook_googlenet(in_channels=3, num_classes=7)).double()
    ours = GoogLeNet(block, in_channels=3, num_classes=7).double().to(memory_format=format)
    ours.load_state_dict(textbook.state_dict())
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64).contiguous(memory_format=format)
    for net in (ours, textbook):
        nn.functional.cross_entropy(net(x), torch.tensor([3, 5])).backward()
    for (name, a), b in zip(ours.named_parameters(), textbook.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9 * float(b.grad.abs().max()), msg=name)


def test_googlenet_defaults():
    with torch.device("meta"):
        net, textbook = GoogLeNet(), textbook_googlenet()
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in textbook.state_dict().items()}
    assert sum(type(m) is Inception for m in net.modules()) == 9
    assert net(torch.empty(2, 1, 96, 96, device="meta")).shape == (2, 10)


def test_a_fast_block_of_the_callers_class_gets_the_fast_stem():
    class Own(FastInception):
        pass

    with torch.device("meta"):
        nets = [GoogLeNet(block=block) for block in (FastInception, Own)]
    for stage, own in zip(*(net[:2].modules() for net in nets), strict=True):
        assert type(stage) is type(own)


def test_googlenet_slices_indexes_and_is_a_sequential():
    """nn.Sequential builds a slice by calling its own class with an OrderedDict, which GoogLeNet takes for a block."""
    with torch.device("meta"):
        net = GoogLeNet(FastInception)
    body = net[:3]
    assert isinstance(body, nn.Sequential)
    assert list(body) == [net[0], net[1], net[2]]
    assert list(body.state_dict()) == [name for name in net.state_dict() if name[0] in "012"]
    assert list(net[-1:]) == [net[5]]
    assert list(net[-1:].state_dict()) == ["5.weight", "5.bias"]
    assert isinstance(net[-1], nn.Linear)
    assert body(torch.empty(2, 1, 96, 96, device="meta")).shape == (2, 480, 6, 6)
    net[5] = nn.Linear(1024, 3, device="meta")
    assert net(torch.empty(2, 1, 96, 96, device="meta")).shape == (2, 3)
    with pytest.raises(IndexError):
        net[6]


def test_xavier_uniform_sets_weights_and_leaves_biases():
    torch.manual_seed(0)
    stem = fastinception.Conv2d(7, 5, 3)
    net = nn.Sequential(stem, FastInception(*SMALL), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(20, 3))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert googlenet.xavier_uniform_(net) is net
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, before[name]), name
        else:
            bound = (6 / sum(nn.init._calculate_fan_in_and_fan_out(p))) ** 0.5
            assert not torch.equal(p, before[name]), name
            assert 0.5 * bound < p.abs().max() <= bound, name


def test_xavier_uniform_is_the_textbooks_recipe():
    def init(layer):
        if type(layer) in (nn.Linear, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)

    theirs, ours = Textbook(*SMALL), Inception(*SMALL)
    torch.manual_seed(1)
    theirs.apply(init)
    torch.manual_seed(1)
    googlenet.xavier_uniform_(ours)
    for name in ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2"):
        assert torch.equal(getattr(ours, name).weight, getattr(theirs, name).weight), name


# Widths

BAD_WIDTHS = [
    ((0, 1, (1, 1), (1, 1), 1), ValueError, "in_channels must be at least 1, got 0"),
    ((-3, 1, (1, 1), (1, 1), 1), ValueError, "in_channels must be at least 1, got -3"),
    ((1, 0, (1, 1), (1, 1), 1), ValueError, "c1 must be at least 1, got 0"),
    ((1, 1, (0, 1), (1, 1), 1), ValueError, "c2[0] must be at least 1, got 0"),
    ((1, 1, (1, -1), (1, 1), 1), ValueError, "c2[1] must be at least 1, got -1"),
    ((1, 1, (1, 1), (-2, 1), 1), ValueError, "c3[0] must be at least 1, got -2"),
    ((1, 1, (1, 1), (1, 0), 1), ValueError, "c3[1] must be at least 1, got 0"),
    ((1, 1, (1, 1), (1, 1), 0), ValueError, "c4 must be at least 1, got 0"),
    ((True, 1, (1, 1), (1, 1), 1), TypeError, "in_channels must be an int, got True"),
    ((1, True, (1, 1), (1, 1), 1), TypeError, "c1 must be an int, got True"),
    ((1, 1, (1, False), (1, 1), 1), TypeError, "c2[1] must be an int, got False"),
    ((4.0, 1, (1, 1), (1, 1), 1), TypeError, "in_channels must be an int, got 4.0"),
    ((1, 2.5, (1, 1), (1, 1), 1), TypeError, "c1 must be an int, got 2.5"),
    ((1, 1, (1, 1), (1.0, 1), 1), TypeError, "c3[0] must be an int, got 1.0"),
    ((1, 1, (1, 1), (1, 1), "8"), TypeError, "c4 must be an int, got '8'"),
    ((1, 1, (1, 1), (1, 1), None), TypeError, "c4 must be an int, got None"),
    ((1, torch.tensor(True), (1, 1), (1, 1), 1), TypeError, "c1 must be an int, got tensor(True)"),
    ((1, torch.tensor([1, 2]), (1, 1), (1, 1), 1), TypeError, "c1 must be an int, got tensor([1, 2])"),
    ((1, 1, 3, (1, 1), 1), TypeError, "c2 must be a pair (reduction, output) of channel counts, got 3"),
    ((1, 1, (1, 1), "ab", 1), TypeError, "c3 must be a pair (reduction, output) of channel counts, got 'ab'"),
    ((1, 1, {1, 2}, (1, 1), 1), TypeError, "c2 must be a pair (reduction, output) of channel counts, got {1, 2}"),
    ((1, 1, (1,), (1, 1), 1), ValueError, "c2 must be a pair (reduction, output) of channel counts, got (1,)"),
    ((1, 1, (1, 1), (), 1), ValueError, "c3 must be a pair (reduction, output) of channel counts, got ()"),
    ((1, 1, (1, 1), [1] * 3, 1), ValueError, "c3 must be a pair (reduction, output) of channel counts, got [1, 1, 1]"),
]  # fmt: skip


@pytest.mark.parametrize("block", [Inception, FastInception])
@pytest.mark.parametrize(("widths", "error", "message"), BAD_WIDTHS)
def test_bad_widths_name_what_came_and_what_was_expected(block, widths, error, message):
    with pytest.raises(error) as caught:
        block(*widths)
    assert str(caught.value) == message


@pytest.mark.parametrize("block", [Inception, FastInception])
def test_widths_may_be_numpy_ints_and_lists(block):
    made = block(np.int64(5), np.int32(4), [np.int64(3), 6], [2, 3], np.uint8(7))
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in Textbook(*SMALL).state_dict().items()
    }
    assert type(made.p1_1.out_channels) is int


# Examples


@pytest.mark.parametrize("source", [reference, googlenet, module], ids=lambda source: source.__name__)
def test_documented_examples_run(source):
    """Every example of a public class, with nothing in scope but what it imports: a reader can paste it."""
    results = doctest.testmod(source, globs={})
    assert results.attempted >= 4, results
    assert results.failed == 0, results


def test_public_names():
    assert set(fastinception.__all__) <= set(vars(fastinception))
    for name in ("Inception", "FastInception", "GoogLeNet", "explain"):
        assert name in fastinception.__all__
    assert issubclass(FastInception, Inception)
