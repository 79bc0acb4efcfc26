"""Show that a variant computes what the plain network computes, before its speed counts for anything."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engines import Engine
from bench.harness import Runner
from fastinception.googlenet import GoogLeNet

# An output is continuous in its rounding errors. A gradient is not: where rounding moves a ReLU or a maximum
# to its other side it jumps; seen in fp32: up to 7e-3 of a parameter's gradient at batch 2, 3e-3 at batch 64.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 3e-2
# A lost or a doubled gradient has an error of 1, which twice the noise of bf16 at batch 2 would let pass.
MOST = 0.9


class Disagreement(Exception):
    """A variant's numbers are not the plain network's."""


class Truth(NamedTuple):
    """Logits and gradients (none for inference) of the plain network in fp64."""

    logits: Tensor
    gradients: dict[str, Tensor]


class Errors(NamedTuple):
    """Relative L2 errors against the truth; ``overall`` takes all gradients as one vector."""

    output: float
    gradients: dict[str, float]
    overall: float


def check_weights() -> dict[str, Tensor]:
    """Return weights under which logits differ from image to image, so that the check sees a wrong block.

    Under the textbook's Xavier weights the signal fades from layer to layer: at the start the logits are
    little more than biases (0.028 +- 0.0002 over 64 images), and bf16 hides the rest.
    """
    net = GoogLeNet()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net.state_dict()


def truth(weights: dict[str, Tensor], images: Tensor, labels: Tensor, with_gradients: bool) -> Truth:
    """Run the plain network in fp64, some images at a time: losses and gradients add up over images."""
    net = GoogLeNet().to(images.device, torch.float64)
    net.load_state_dict(weights)
    logits = []
    for some, targets in zip(images.split(32), labels.split(32), strict=True):
        with torch.set_grad_enabled(with_gradients):
            logits.append(net(some.double()))
            loss = F.cross_entropy(logits[-1], targets, reduction="sum") / len(labels)
        if with_gradients:
            loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return Truth(torch.cat(logits).detach(), gradients)


def errors(runner: Runner | Engine, expected: Truth) -> Errors:
    """Run once and compare with the truth; the first call of a compiled runner compiles it."""
    output = _norm(runner.evaluate().detach() - expected.logits) / _norm(expected.logits)
    if isinstance(runner, Engine) or not runner.training:
        return Errors(output, {}, 0.0)
    found = runner.gradients()
    off, size = {}, {}
    for name, want in expected.gradients.items():
        got = found.get(name, torch.full_like(want, torch.nan))
        off[name], size[name] = _norm(got - want), _norm(want)
    overall = (sum(e * e for e in off.values()) / sum(s * s for s in size.values())) ** 0.5
    return Errors(output, {name: off[name] / size[name] for name in off}, overall)


def _norm(values: Tensor) -> float:
    return float(values.double().norm())


def check(label: str, found: Errors, plain: Errors) -> str:
    """Return a line that says how well a variant agrees: at most twice plain's own error, plus a little.

    Args:
        label: names the variant in the line and in the error.
        found: the variant's errors.
        plain: those of the plain eager NCHW module in the same dtype and mode.

    Raises:
        Disagreement: names the variant, what is off, by how much, and what would have been allowed.
    """
    compared = [("output", found.output, plain.output, OUTPUT_TOLERANCE)]
    for name, error in found.gradients.items():
        # One parameter's error is one draw of the noise; the overall error says how loud the noise is.
        usual = max(plain.gradients[name], plain.overall)
        compared.append((f"gradient of {name}", error, usual, GRADIENT_TOLERANCE))
    for what, error, usual, tolerance in compared:
        limit = min(2 * usual + tolerance, MOST)
        if not error <= limit:  # not `>`: NaN is a disagreement
            raise Disagreement(
                f"{label}: {what} is off by {error:.2e} (relative L2 error against fp64); plain is off by "
                f"{usual:.2e} in this dtype, so {limit:.2e} is allowed"
            )
    line = f"agrees: {label}, output error {found.output:.1e} (plain {plain.output:.1e})"
    if found.gradients:
        line += f", gradients {found.overall:.1e} ({plain.overall:.1e})"
    return line
