"""Several processes: a run of two is that of one, and FSDP2 shards the block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastinception import GoogLeNet, trainer
from fastinception.googlenet import xavier_uniform_
from tests import runs
from tests.runs import EPOCHS, OPTIONS, ROOT, STEPS, assert_moved_alike, metrics, position, weights

as_in_a_process_of_its_own = runs.as_in_a_process_of_its_own
command, finished, images = runs.command, runs.finished, runs.images


def torchrun(script: Path, *arguments: str) -> str:
    """Run a script in two processes of one thread each; return what they printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=90)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: the launcher has to end its two, which would wait for each other for ever
        pytest.fail(f"the two processes hang: {process.communicate()[0]}")
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_of_the_processes_make_the_batch(size):
    for count in (1, 7, 8, 15):
        batch = torch.randperm(count)
        shares = [trainer.World(rank, size, torch.device("cpu")).share(batch) for rank in range(size)]
        assert torch.cat(shares).tolist() == batch.tolist()
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


# The second process gets the signal, in mid-epoch; the first alone may write.
TWO = """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from fastinception import checkpoint, record, train, trainer

second = os.environ["RANK"] == "1"
forward, calls = trainer.Trainer._forward, []

def spy(*args):
    calls.append(None)  # not what would outlive the process group
    if second and len(calls) == 3:
        signal.raise_signal(signal.SIGTERM)
    return forward(*args)

trainer.Trainer._forward = spy
scale, losses = torch.amp.GradScaler.scale, []
torch.amp.GradScaler.scale = lambda self, loss: losses.append(loss.detach().clone()) or scale(self, loss)
if second:
    checkpoint.write = record.write_record = train.write_record = None
# The launcher's store meets one group only: both runs have the first one's.
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
assert train.main(sys.argv[1:]) == 143
assert len(calls) == 3
# Together they are one process's loss, about log(10): in fp16 it overflows where that does.
dist.all_reduce(losses[0])
assert 1.8 < losses[0] < 2.8, losses
dist.init_process_group, dist.destroy_process_group = lambda backend: None, destroy
assert train.main([*sys.argv[1:], "--resume"]) == 0
# With the threads of a group that outlives the run, the interpreter's end aborts now and then.
names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").glob("*")]
assert not any("gloo" in name for name in names), names
"""


def test_two_processes_are_one_run(images, command, finished, tmp_path):
    """The losses within 1e-5, the weights' movement within 1 %; one process goes on where two stopped."""
    folder, script = tmp_path / "two", tmp_path / "two.py"
    script.write_text(TWO)
    options = ["--data-root", str(images), "--output", str(folder), "--epochs", str(EPOCHS)]
    output = torchrun(script, *OPTIONS, *options)
    rows, expected = metrics(folder), metrics(finished)
    assert len(rows) == EPOCHS
    for row, alone in zip(rows, expected, strict=True):
        for name in ("train_loss", "test_loss"):
            assert row[name] == pytest.approx(alone[name], abs=1e-5)
        for name in ("train_accuracy", "test_accuracy"):
            assert row[name] == pytest.approx(alone[name])
    torch.manual_seed(0)
    start = xavier_uniform_(GoogLeNet()).state_dict()
    assert_moved_alike(weights(folder), weights(finished), start)
    assert [output.count(words) for words in ("from epoch 1, step 3", "epoch 2/2:", "stopped by SIGTERM")] == [1, 1, 1]
    sessions = json.loads((folder / "environment.json").read_text())
    assert [(s["processes"], s["step"]) for s in sessions] == [(2, 0), (2, 3)]
    # The second epoch's last step, from sums over both processes.
    assert position(folder, "checkpoint.previous.pt") == (1, STEPS - 1)
    assert command(tmp_path / "one", "--resume", str(folder / "checkpoint.previous.pt")) == 0
    assert metrics(tmp_path / "one")[1]["train_loss"] == pytest.approx(expected[1]["train_loss"], abs=1e-5)


FSDP = """
import os
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from fastinception import FastInception, backends

dist.init_process_group("gloo")
rank = dist.get_rank()
select, paths = backends.select, []

def spy(*args):
    paths.append(select(*args))
    return paths[-1]

def build():
    torch.manual_seed(0)
    blocks = FastInception(6, 4, (3, 6), (2, 4), 3), FastInception(17, 5, (4, 3), (2, 6), 2)
    return torch.nn.Sequential(*blocks).double()

whole, sharded = build(), build()
x = torch.randn(4, 6, 9, 9, dtype=torch.double)
grad = torch.randn(4, 16, 9, 9, dtype=torch.double)
expected = whole(x)
expected.backward(grad)

mesh = init_device_mesh("cpu", (2,))
for block in sharded:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert all(isinstance(p, DTensor) for p in sharded.parameters())
assert isinstance(sharded[0], FastInception)

half = slice(2 * rank, 2 * rank + 2)
backends.select = spy
y = sharded(x[half])
backends.select = select
assert [path.name for path in paths] == ["aten", "aten"], paths
torch.testing.assert_close(y, expected[half])
y.backward(2 * grad[half])  # FSDP averages the gradients of the processes
for (name, p), q in zip(sharded.named_parameters(), whole.parameters()):
    torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda words: name + words)
for net in (sharded, whole):
    torch.optim.SGD(net.parameters(), lr=0.1).step()
torch.testing.assert_close(sharded(x), whole(x))
print("fine", rank, flush=True)
dist.destroy_process_group()
os._exit(0)  # the mesh outlives the group, and the interpreter's end then aborts now and then, in gloo's threads
"""


def test_fsdp2_shards_the_block(tmp_path):
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    assert torchrun(script).count("fine") == 2
