"""Time single blocks: the nine of the network in bf16, and KernelBench's in fp32 without ReLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.baselines import FusedInception, LinearInception, compilations, truncated
from bench.gpu.case import Candidate, Case, Context, Row, contest, output_error, unsearched
from bench.gpu.kernels import Block, beside_floor, beside_model, shapes
from bench.harness import LAYOUTS
from bench.trial import Shape
from fastinception import FastInception, functional
from fastinception.googlenet import Widths
from fastinception.reference import Inception

Makers = dict[str, Callable[[], Candidate]]


def eager(context: Context) -> list[Case]:
    """List the nine blocks at both sizes, plain, by the library's fused calls, compiled, and fast."""
    return [Case(str(shape), partial(_block, shape, "default", context), 15) for shape in shapes(context)]


def autotuned(context: Context) -> list[Case]:
    """List the same with Inductor's search, which takes long."""
    mode = "max-autotune-no-cudagraphs"  # as ``cold`` leaves the host's time out, graphs would add nothing
    return [Case(str(shape), partial(_block, shape, mode, context), 40) for shape in shapes(context)]


def _forward(net: Callable[[Tensor], Tensor], x: Tensor, truth: Tensor) -> Candidate:
    def run() -> Tensor:
        with torch.inference_mode():
            return net(x)

    return Candidate(run, output_error(run(), truth))


def _block(shape: Shape, mode: str, context: Context) -> list[Row]:
    block = Block(shape, context)
    (truth,) = block.truth["block"]

    # In a dry run the interpreter has to be asked for.
    fast = partial(FastInception, backend="triton")

    def forward(
        kind: Callable[..., Inception], layout: str = "channels_last", compile_options: dict[str, Any] | None = None
    ) -> Candidate:
        net = kind(*shape.widths)
        net.load_state_dict(block.net.state_dict())
        net.to(context.device, block.dtype).to(memory_format=LAYOUTS[layout]).requires_grad_(False)
        call: nn.Module | Callable[[Tensor], Tensor] = net
        if compile_options is not None:
            call = torch.compile(net, fullgraph=True, dynamic=False, **compile_options)
        return _forward(call, block.x.contiguous(memory_format=LAYOUTS[layout]), truth)

    makers: Makers = {"plain eager channels_last": partial(forward, Inception)}
    if mode == "default":
        makers["plain eager NCHW"] = partial(forward, Inception, "NCHW")
        makers["plain cudnn_convolution_relu"] = partial(forward, FusedInception)
    for name, options in compilations(mode, context.dry).items():
        makers[f"plain {name}"] = partial(forward, Inception, compile_options=options)
    makers["FastInception"] = partial(forward, fast)
    rows = contest(makers, context, cold=True)
    torch.compiler.reset()
    return beside_model(beside_floor(rows, block, "block", context), shape)


# KernelBench, level 3, problem 6.
KERNELBENCH = Widths(480, 192, (96, 208), (16, 48), 64)


def kernelbench(context: Context) -> list[Case]:
    """List KernelBench's block: fp32, contiguous NCHW, TF32 as the convolution switch says, without ReLU."""
    batch, side = (1, 6) if context.dry else (10, 224)
    modes = ("default",) if context.dry else ("default", "max-autotune-no-cudagraphs")
    name = f"{batch}x480x{side}x{side} fp32"
    return [Case(f"{name}, {mode}", partial(_kernelbench, batch, side, mode, context), 40) for mode in modes]


def _kernelbench(batch: int, side: int, mode: str, context: Context) -> list[Row]:
    from fastinception.kernels import target

    truncates = target.input_precision(torch.float32, target.gpu(context.device)) == "tf32"
    torch.manual_seed(0)
    net = LinearInception(*KERNELBENCH).to(context.device).requires_grad_(False)
    x = torch.rand(batch, KERNELBENCH.in_channels, side, side, device=context.device)
    # One image after another: in fp64 the whole batch would take some 10 GB.
    twin = LinearInception(*KERNELBENCH).to(context.device, torch.float64).requires_grad_(False)
    twin.load_state_dict(net.state_dict())
    with unsearched():
        truth = torch.cat([twin(image.double()) for image in x.split(1)])
        cut = truncated(net)
        truncation = output_error(torch.cat([cut(image.double()) for image in x.split(1)]), truth)

    def ours() -> Candidate:
        params = [p for conv in (net.p1_1, net.p2_1, net.p2_2, net.p3_1, net.p3_2, net.p4_2) for p in conv.parameters()]
        found = _forward(lambda x: functional.inception(x, params, activation="none"), x, truth)
        # Triton's products drop the bits that TF32 lacks, where the library's may round.
        return found._replace(usual=truncation) if truncates else found

    def channels_last() -> Candidate:
        other = LinearInception(*KERNELBENCH).to(context.device).to(memory_format=torch.channels_last)
        other.load_state_dict(net.state_dict())
        return _forward(other, x, truth)

    makers: Makers = {"plain eager NCHW": partial(_forward, net, x, truth)}
    if mode == "default":
        makers["plain eager, channels_last weights"] = channels_last
    for name, options in compilations(mode, context.dry).items():
        compiled = torch.compile(net, fullgraph=True, dynamic=False, **options)
        makers[f"plain {name}"] = partial(_forward, compiled, x, truth)
    makers["FastInception"] = ours
    rows = contest(makers, context, cold=True)
    torch.compiler.reset()
    cudnn: Any = torch.backends.cudnn  # an object in the module's place, which has more than the module
    return [row | {"conv_fp32_precision": cudnn.conv.fp32_precision} for row in rows]
