"""What follows the library's convolutions in front of the blocks: their max pool, bias and ReLU in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinception.kernels import configs, replay, target
from fastinception.kernels.entry_pool import maximum
from fastinception.kernels.epilogue import bias_relu
from fastinception.kernels.replay import Launch


@triton.jit(do_not_specialize=["M", "H", "W", "OUT_H", "OUT_W"])
def _max_pool_kernel(
    x_ptr, b_ptr, out_ptr, M, C, H, W, OUT_H, OUT_W,
    MAX_ASM: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``relu(max_pool2d(x, 3, 2, 1) + b)`` for BLOCK_M of M output pixels x BLOCK_N channels.

    A tap outside the image is replaced by the border pixel, which its window holds already.
    """
    column_tiles = tl.cdiv(C, BLOCK_N)
    offs_m = (tl.program_id(0) // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    pixel = tl.minimum(offs_m, M - 1)
    n = pixel // (OUT_H * OUT_W)
    h = pixel // OUT_W % OUT_H * 2
    w = pixel % OUT_W * 2
    middle = ((n * H + h) * W + w).to(tl.int64) * C
    pooled = tl.load(x_ptr + middle[:, None] + offs_n[None, :], mask=mask_n[None, :], other=0.0)
    for i in tl.static_range(8):  # the other taps
        tap_h = tl.minimum(tl.maximum(h + ((i + i // 4) // 3 - 1), 0), H - 1)
        tap_w = tl.minimum(tl.maximum(w + ((i + i // 4) % 3 - 1), 0), W - 1)
        rows = ((n * H + tap_h) * W + tap_w).to(tl.int64) * C
        value = tl.load(x_ptr + rows[:, None] + offs_n[None, :], mask=mask_n[None, :], other=0.0)
        pooled = maximum(pooled, value, MAX_ASM)
    if b_ptr is not None:
        # As PyTorch adds it: to what is rounded, and a maximum commutes with rounding and with adding what is finite.
        sums = pooled.to(tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
        pooled = bias_relu(sums, tl.load(b_ptr + offs_n, mask=mask_n, other=0.0), RELU)
    out = out_ptr + offs_m.to(tl.int64)[:, None] * C + offs_n[None, :]
    tl.store(out, pooled, mask=(offs_m < M)[:, None] & mask_n[None, :])


def max_pool(x: Tensor, bias: Tensor | None, out: Tensor) -> Launch:
    """Write ``max_pool2d(x, 3, 2, 1)``, with a bias ``relu`` of the sum, on x's device and current stream.

    Args:
        x: ``[N, C, H, W]``, contiguous in channels_last.
        bias: ``[C]``, contiguous, or None: then there is no ReLU either.
        out: ``[N, C, (H + 1) // 2, (W + 1) // 2]``, contiguous in channels_last.

    All of one dtype. Checked by the caller.
    """
    config = _launch_config(x.shape, bias is not None, x.dtype, target.gpu(x.device))
    with target.device_of(x):
        return replay.launch(_max_pool_kernel, config, x, bias, out)


@configs.cached
def _launch_config(shape: torch.Size, relu: bool, dtype: torch.dtype, gpu: target.Gpu) -> configs.LaunchConfig:
    n, channels, height, width = shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    rows, config = n * out_height * out_width, configs.sweep(configs.POOL, gpu)
    return configs.launch_config(
        configs.cdiv(rows, config.block_m) * configs.cdiv(channels, config.block_n),
        (rows, channels, height, width, out_height, out_width),
        MAX_ASM=target.max_asm(gpu, dtype, with_codes=False), RELU=target.relu_asm(gpu, dtype) if relu else None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
