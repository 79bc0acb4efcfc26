"""Test that bench/roofline.py counts what the network does, and refuses what it does not know."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import roofline
from fastinception.googlenet import WIDTHS, GoogLeNet


def test_a_block_by_hand():
    """3a (192 in; 64, 96 to 128, 16 to 32, 32) over 2x12x12 = 288 pixels of 2-byte elements."""
    weights = 192 * 208 + 9 * 96 * 128 + 25 * 16 * 32
    assert weights == 163328
    work = roofline.network(2, 96, "bf16", "inference")["3a"]
    assert work.flops == 2 * 288 * 163328
    assert work.floor_bytes == 2 * (288 * (192 + 256) + 163328 + 368)
    assert work.plan == {"entry": 310688, "spatial": 403776}
    train = roofline.network(2, 96, "bf16", "training")["3a"]
    assert train.flops == 3 * work.flops
    assert train.floor_bytes == work.floor_bytes + 2 * (288 * (256 + 192 + 192) + 2 * 163696)
    assert train.plan == {
        "entry": 310688 + 288 * 12 + 288 * 192 * 3,  # mask bits of 64 + 32 channels; pooled x and the places
        "spatial": 403776 + 288 * 20,
        "split": 2 * 288 * 512 + 288 * 32,
        "data_gradient": 2 * (288 * (128 + 32 + 2 * 112 + 32 + 192) + 9 * 96 * 128 + 25 * 16 * 32 + 192 * 32),
        "pool_gradient": 288 * 192 * 5,
        "entry_gradient": 2 * (288 * (176 + 2 * 192) + 192 * 176),
        "weight_gradient": 2 * 288 * (2 * 192 + 64 + 32 + 2 * 112 + 128 + 32) + 4 * 163696,
        "sum": 6 * 163696,
    }


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(("batch", "size"), [(2, 96), (1, 57)])
def test_flops_are_those_that_pytorch_counts(batch, size, mode):
    with torch.device("meta"):
        net, images = GoogLeNet(), torch.empty(batch, 1, size, size)
    with FlopCounterMode(display=False) as counter:
        y = net(images)
        if mode == "training":
            y.sum().backward()
    parts = roofline.network(batch, size, "fp32", mode)
    assert sum(work.flops for work in parts.values()) == counter.get_total_flops()


def test_floor_bytes_of_the_net_are_its_images_activations_and_weights():
    """Where the parts meet, each activation is written once and read once."""
    with torch.device("meta"):
        net, images = GoogLeNet(), torch.empty(2, 1, 57, 57)
    meet: list[int] = []
    # The stem ends with the second stage; then each block and each pool between stages ends a part.
    ends = [net[1], *(m for stage in net[2:4] for m in stage), *net[4][:2]]
    for module in ends:
        module.register_forward_hook(lambda module, args, y: meet.append(y.numel()))
    y = net(images)
    assert len(meet) == 1 + 9 + 2
    elements = images.numel() + 2 * sum(meet) + y.numel() + sum(p.numel() for p in net.parameters())
    for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        parts = roofline.network(2, 57, dtype, "inference")
        assert sum(work.floor_bytes for work in parts.values()) == size * elements


def test_a_backward_reads_its_input_and_passes_both_gradients():
    """The stem but for the gradient of images, which nobody needs."""
    inference, training = (roofline.network(2, 57, "bf16", mode) for mode in ("inference", "training"))
    weights = 49 * 64 + 64 * 64 + 9 * 64 * 192 + 64 + 64 + 192
    more = {
        "stem": 2 * 57**2 + 2 * 8**2 * 192 + 2 * weights,
        "pool3": 2 * (2 * 8**2 * 480) + 2 * 4**2 * 480,
        "head": 2 * (2 * 2**2 * 1024) + 2 * 10 + 2 * (1024 * 10 + 10),
    }
    assert {name: training[name].floor_bytes - inference[name].floor_bytes for name in more} == {
        name: 2 * elements for name, elements in more.items()
    }


def test_floor_is_the_longer_of_products_and_memory():
    chip = roofline.Chip(half=100, tf32=50, memory=2)
    work = roofline.Work(flops=300_000_000, floor_bytes=10_000_000)
    assert roofline.floor_us(work, chip, "bf16") == (5, "memory")
    assert roofline.floor_us(work, chip, "fp32") == (6, "products")


def test_floor_and_plan_of_the_study():
    """With an H100's measured rates DESIGN's figures: 65 us and 1.32x, 708 us and 1.35x."""
    chip = roofline.Chip(half=798, tf32=399, memory=3.0)
    for batch, size, floor, ratio in ((128, 96, 65, 1.32), (256, 224, 708, 1.35)):
        parts = roofline.network(batch, size, "bf16", "inference")
        blocks = [parts[name] for name in WIDTHS]
        assert round(sum(roofline.floor_us(work, chip, "bf16")[0] for work in blocks)) == floor
        moved = sum(sum(work.plan.values()) for work in blocks)
        assert round(moved / sum(work.floor_bytes for work in blocks), 2) == ratio


def test_table(tmp_path, capsys):
    path = tmp_path / "times.json"
    assert roofline.main(["--chip", "a100"]) == 0
    plain = capsys.readouterr().out.splitlines()
    parts = roofline.network(128, 96, "bf16", "inference")
    floors = {name: roofline.floor_us(work, roofline.CHIPS["a100"], "bf16")[0] for name, work in parts.items()}
    path.write_text(f'{{"4c": {floors["4c"] / 1e3 / 0.5}, "net": {sum(floors.values()) / 1e3 / 0.25}}}')
    assert roofline.main(["--chip", "a100", "--times", str(path)]) == 0
    timed = capsys.readouterr().out.splitlines()
    assert plain[0] == timed[0] == "a100: 312 TFLOP/s, 2.039 TB/s (datasheet); inference, bf16, batch 128, 96x96"
    rows = {line.split()[0]: line.split() for line in timed[2:]}
    assert list(rows) == [*parts, "blocks", "net"]
    assert rows["4c"][-1] == "50%"
    assert rows["net"][-1] == "25%"
    assert rows["3a"][-1] in ("products", "memory")
    assert "reached" in timed[1]
    assert "reached" not in plain[1]
    assert rows["blocks"][5] == "18"
    work, moved = parts["3a"], sum(parts["3a"].plan.values())
    assert rows["3a"][1:7] == [
        f"{work.flops / 1e9:.2f}",
        f"{work.floor_bytes / 1e6:.1f}",
        f"{moved / 1e6:.1f}",
        f"{moved / work.floor_bytes:.2f}x",
        "2",
        f"{floors['3a']:.1f}",
    ]
    assert roofline.main(["--chip", "a100", "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out.startswith("a100: 156 TFLOP/s, 2.039 TB/s (datasheet); inference, fp32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "v100"], "invalid choice: 'v100'"),
        (["--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["--mode", "both"], "invalid choice: 'both'"),
        (["--batch-size", "0"], "--batch-size: must be a whole number, at least 1, got '0'"),
        (["--batch-size", "many"], "--batch-size: must be a whole number, at least 1, got 'many'"),
        (["--image-size", "-1"], "--image-size: must be a whole number, at least 1, got '-1'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        roofline.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[1]", "a mapping of names to milliseconds was expected, got list"),
        ('{"6a": 1}', "'6a' is none of stem, 3a,"),
        ('{"3a": 0}', "3a must be a positive number of milliseconds, got 0"),
        ('{"3a": "1"}', "3a must be a positive number of milliseconds, got '1'"),
        ('{"3a": true}', "3a must be a positive number of milliseconds, got True"),
        ('{"3a": NaN}', "3a must be a positive number of milliseconds, got nan"),
    ],
)
def test_bad_times_are_named(text, message, tmp_path, capsys):
    path = tmp_path / "times.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        roofline.main(["--times", str(path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
