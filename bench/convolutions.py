"""What the library's convolutions of a network take, called one by one, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import DTYPES
from fastinception import backends


class Convolutions:
    """Repeat a network's own convolution calls, in channels_last: forward, and in training both gradients.

    Everything else of a pass or a step is left out: activations, pools, copies, casts, bias gradients, the optimizer.
    The data gradient of the first convolution is left out as well, as autograd does.

    A measure of what is left to gain, no strict floor: each call reads an input that other calls have pushed out of the
    caches, while a network's has just been written. In inference a good network can be faster.

    Args:
        net: the network whose convolutions are listed, in the order of one forward pass.
        images: fp32 ``[N, C, H, W]`` on the device to measure.
        mode: ``"inference"`` or ``"training"``.
        dtype: a key of ``DTYPES``; computed in fp32 where FastInception does, on a CPU that is slower in it.
    """

    def __init__(self, net: nn.Module, images: Tensor, *, mode: str, dtype: str) -> None:
        self.net, self.training = net.to(images.device), mode == "training"
        self.calls: list[tuple[nn.Conv2d, Tensor, Tensor, Tensor, Tensor]] = []

        def record(conv: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            computed = torch.float32 if backends.widened(DTYPES[dtype], inputs[0]) else DTYPES[dtype]
            tensors = inputs[0], conv.weight, torch.randn_like(output)
            # Not contiguous(), which leaves one channel's strides as they are: they read as NCHW.
            x, weight, grad = (t.detach().to(computed).to(memory_format=torch.channels_last) for t in tensors)
            # A ReLU behind a convolution blocks about half of the gradient; its values change no time.
            self.calls.append((conv, x, weight, conv.bias.detach().to(computed), grad))

        handles = [m.register_forward_hook(record) for m in net.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            self.net(images)
        for handle in handles:
            handle.remove()

    def __call__(self) -> None:
        """Do the work of one timed call."""
        with torch.inference_mode():
            for conv, x, weight, bias, _ in self.calls:
                F.conv2d(x, weight, bias, conv.stride, conv.padding)
            if not self.training:
                return
            for i, (conv, x, weight, _, grad) in reversed(list(enumerate(self.calls))):
                torch.ops.aten.convolution_backward(
                    grad, x, weight, None, conv.stride, conv.padding, [1, 1], False, [0, 0], 1, [i > 0, True, False]
                )
