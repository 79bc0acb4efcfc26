"""Which errors beside the truth are agreement."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import agreement
from fastinception import GoogLeNet


def test_the_truth_is_one_fp64_pass_of_the_plain_network() -> None:
    torch.manual_seed(0)
    weights = agreement.check_weights()
    images, labels = torch.rand(35, 1, 16, 16), torch.arange(35) % 10  # more than one of its pieces
    found = agreement.truth(weights, images, labels, True)
    net = GoogLeNet().double()
    net.load_state_dict(weights)
    logits = net(images.double())
    nn.functional.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(found.logits, logits.detach())
    torch.testing.assert_close(found.gradients, {name: p.grad for name, p in net.named_parameters()})


def test_a_lost_gradient_is_seen_through_any_noise() -> None:
    noisy = agreement.Errors(0.01, {"a": 0.6, "b": 0.1}, 0.5)
    agreement.check("all is well", noisy, noisy)
    with pytest.raises(agreement.Disagreement, match="wrong: gradient of b"):
        agreement.check("wrong", agreement.Errors(0.01, {"a": 0.6, "b": 1.0}, 0.5), noisy)


def test_a_parameter_whose_gradient_is_noisier_than_the_others_is_allowed_twice_its_own() -> None:
    plain = agreement.Errors(0.01, {"a": 0.3, "b": 0.01}, 0.02)
    agreement.check("all is well", agreement.Errors(0.01, {"a": 0.6, "b": 0.01}, 0.04), plain)
    with pytest.raises(agreement.Disagreement, match="wrong: gradient of b"):
        agreement.check("wrong", agreement.Errors(0.01, {"a": 0.6, "b": 0.1}, 0.04), plain)


def test_the_check_weights_let_bf16_see_a_wrong_block() -> None:
    # The reason for them: logits that depend on the image by more than bf16's rounding.
    torch.manual_seed(0)
    images = torch.rand(8, 1, 32, 32)
    found = agreement.truth(agreement.check_weights(), images, torch.arange(8), False)
    assert found.logits.std(0).mean() > 0.02 * found.logits.abs().mean()
