"""Print what each block keeps for its backward on the Triton path, beside the plain block's.

python bench/memory.py

It is also what compare.py measures the memory of a whole training step with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.harness import Runner, side_of
from bench.host_cost import stubbed
from fastinception import FastInception, Inception
from fastinception.googlenet import WIDTHS

BLOCKS = {"plain": Inception, "FastInception": FastInception}
STEP = Path(__file__).with_name("step_memory.py")


@contextlib.contextmanager
def saved_bytes(net: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Collect what autograd saves inside the context: bytes of each storage by its address, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    found: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def measure(runner: Runner) -> dict[str, int]:
    """Return ``saved_bytes``, what autograd keeps of one forward pass, and ``peak_bytes``, the most that a step needs.

    The peak on a GPU is what the device's own counter gained over all that was allocated before the step. On a CPU it
    is the process's resident memory, PyTorch's own included, so it says something about a step only in a process that
    ran nothing else.
    """
    device = runner.images.device
    runner()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        runner()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        runner()
        peak = _peak_resident()
    with saved_bytes(runner.net) as found:
        runner.evaluate()
    return {"saved_bytes": sum(found.values()), "peak_bytes": peak}


def _peak_resident() -> int:
    with contextlib.suppress(OSError):  # Linux; its ru_maxrss starts at the parent's, whatever the child needs
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(block: str, batch_size: int, image_size: int, dtype: str) -> dict[str, int]:
    """Measure an eager channels_last training step on the CPU, in a process that does nothing else.

    Raises:
        subprocess.CalledProcessError: the process failed; its stderr is in the error.
    """
    spec = {"block": block, "batch_size": batch_size, "image_size": image_size, "dtype": dtype}
    command = [sys.executable, str(STEP), json.dumps(spec | {"threads": torch.get_num_threads()})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def saved_by_block(name: str, dtype: torch.dtype, batch_size: int, side: int) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a GoogLeNet block's forward, the plain one's and then Triton's.

    Kernels are stubbed, as what is kept goes by shapes: ``TRITON_INTERPRET=1`` is needed, a GPU is not.
    """
    plain = Inception(*WIDTHS[name]).to(dtype)
    x = torch.rand(batch_size, WIDTHS[name].in_channels, side, side, dtype=dtype, requires_grad=True)
    kept = []
    for block in (plain, FastInception.from_reference(plain, backend="triton")):
        with stubbed(), saved_bytes(block) as storages:
            block(x.contiguous(memory_format=torch.channels_last))
        kept.append(sum(storages.values()))
    return kept[0], kept[1]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed")
    os.environ["TRITON_INTERPRET"] = "1"  # before the first use of Triton
    try:
        for dtype in (torch.float16, torch.float32):
            print(f"saved for the backward, {str(dtype)[6:]}, images of 96x96, batch 16")
            for name in WIDTHS:
                plain, fast = saved_by_block(name, dtype, 16, side_of(name, 96))
                print(f"  {name}  plain {plain / 1e6:6.2f} MB  FastInception {fast / 1e6:6.2f} MB  {fast / plain:.2f}x")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
