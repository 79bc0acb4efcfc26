"""Measure a training step on the CPU in a process that does nothing else: what memory.in_fresh_process starts.

The one argument is JSON with the keys ``block``, ``batch_size``, ``image_size``, ``dtype`` and ``threads``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.harness import Runner
from bench.memory import BLOCKS, measure
from fastinception import GoogLeNet


def main(spec: dict[str, Any]) -> None:
    """Print the bytes that ``memory.measure`` finds, as JSON."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    net = GoogLeNet(block=BLOCKS[spec["block"]])
    size, side = spec["batch_size"], spec["image_size"]
    images, labels = torch.rand(size, 1, side, side), torch.zeros(size).long()
    print(json.dumps(measure(Runner(net, images, labels, mode="training", dtype=spec["dtype"]))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
