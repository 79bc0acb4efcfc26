"""How a weight gradient is divided: its steps, and the parts that are summed by a program each."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastinception.kernels import configs, target, weight_gradient


@pytest.mark.parametrize(
    ("batch", "images_first", "steps"),
    [(63, False, 9), (64, True, 9), (65, False, 10), (113, False, 16), (114, True, 18), (171, True, 27)],
)
def test_a_step_takes_one_pixel_of_64_images_where_few_are_beyond_the_batch(batch, images_first, steps):
    tiles, gpu = configs.Tiles(64, 64, 64, num_warps=4, num_stages=2), target.gpu(torch.device("cpu"))
    division = weight_gradient.divide((batch, 3, 3), [weight_gradient.Product(8, 8, 3, 3)], torch.float32, gpu, tiles)
    assert (division.images_first, division.steps) == (images_first, steps)


@pytest.mark.parametrize("processors", [108, 132, 148])
def test_the_programs_of_a_weight_gradient_are_two_for_each_processor_at_most(processors):
    gpu, product = target.Gpu("", "sm_90", processors), weight_gradient.Product(128, 128, 3, 3)
    division = weight_gradient.divide((128, 28, 28), [product], torch.bfloat16, gpu)
    assert 2 * processors - 9 < 9 * division.parts <= 2 * processors


@pytest.mark.parametrize("channels", [16, 4096, 1 << 20])
def test_addresses_inside_a_part_fit_32_bits(channels):
    tiles, gpu = configs.Tiles(64, 64, 64, num_warps=4, num_stages=2), target.gpu(torch.device("cpu"))
    shape, product = (1, 1 << 14, 1 << 14), weight_gradient.Product(1 << 20, channels, 1, 1)
    division = weight_gradient.divide(shape, [product], torch.float16, gpu, tiles)
    assert division.steps_of_part * 64 * (1 << 20) < 1 << 31
    assert division.steps_of_part * division.parts >= division.steps == (1 << 28) // 64
    small = weight_gradient.divide(shape, [product._replace(out_channels=64)], torch.float16, gpu, tiles)
    assert small.steps_of_part * 64 * channels < 1 << 31
