"""The training run: the textbook's recipe and loop, and nothing counted twice."""

from __future__ import annotations

import itertools
import platform

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastinception import GoogLeNet, Inception, functional, train, trainer
from fastinception.data import fashion_mnist
from fastinception.googlenet import xavier_uniform_
from tests import fresh, runs
from tests.runs import BATCH, EPOCHS, IMAGES, STEPS, assert_same_run, metrics, weights

as_in_a_process_of_its_own = runs.as_in_a_process_of_its_own
command, images = runs.command, runs.images


def test_defaults_are_the_textbooks():
    assert train.RECIPE == {
        "block": "fast",
        "amp": "off",
        "epochs": 10,
        "lr": 0.1,
        "batch_size": 128,
        "image_size": 96,
        "seed": 0,
        "limit": None,
        "compile": None,
        "cuda_graph": None,
        "checkpoint_steps": None,
    }


def test_one_epoch_is_the_textbooks_loop(images, command, tmp_path, monkeypatch):
    """PIL images through torchvision's transforms, the plain block in NCHW, mean loss, one process.

    Both in float64: in float32 rounding decides which of two equal numbers is a pool's maximum, and so each gradient.
    """
    batch_of = trainer._batch
    monkeypatch.setattr(trainer, "xavier_uniform_", lambda net: xavier_uniform_(net).double())
    monkeypatch.setattr(
        trainer, "_batch", lambda *args: [t.double() if t.is_floating_point() else t for t in batch_of(*args)]
    )
    assert command(tmp_path / "run", "--lr", "0.5", "--seed", "3", epochs=1) == 0
    raw = fashion_mnist("train", image_size=28, data_root=images)
    transform = torchvision.transforms.Compose([torchvision.transforms.Resize(32), torchvision.transforms.ToTensor()])
    x = torch.stack([transform(Image.fromarray(image[0].numpy())) for image in raw.images])
    torch.manual_seed(3)
    net = xavier_uniform_(GoogLeNet(Inception)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    loss_sum = correct = 0.0
    for batch in np.array_split(np.random.default_rng([3, 0]).permutation(IMAGES), range(BATCH, IMAGES, BATCH)):
        logits = net(x[batch].double()).float()
        loss = torch.nn.functional.cross_entropy(logits, raw.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(batch)
        correct += (logits.argmax(1) == raw.labels[batch]).sum().item()
    (row,) = metrics(tmp_path / "run")
    assert row["train_loss"] == pytest.approx(loss_sum / IMAGES, abs=1e-5)
    assert row["train_accuracy"] == pytest.approx(correct / IMAGES)
    torch.testing.assert_close(weights(tmp_path / "run"), dict(net.state_dict()), rtol=1e-6, atol=1e-8)


def test_every_example_once_per_epoch_in_another_order(command, tmp_path, monkeypatch):
    batch, seen = trainer._batch, []

    def spy(split, indices):
        if len(split[1]) == IMAGES:
            seen.append(indices.tolist())
        return batch(split, indices)

    monkeypatch.setattr(trainer, "_batch", spy)
    assert command(tmp_path / "run") == 0
    assert [len(indices) for indices in seen] == [15, 15, 15, 15, 1] * EPOCHS
    orders = [list(itertools.chain(*seen[i * STEPS : (i + 1) * STEPS])) for i in range(EPOCHS)]
    assert all(sorted(order) == list(range(IMAGES)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_uneven_last_batch_counts_by_its_examples(command, tmp_path, monkeypatch):
    """A mean of batch means would weigh the last example of 61 as much as fifteen."""
    losses, cross_entropy = [], torch.nn.functional.cross_entropy

    def spy(logits, labels, reduction):
        if logits.requires_grad:
            losses.append(cross_entropy(logits.detach().double(), labels, reduction="none"))
        return cross_entropy(logits, labels, reduction=reduction)

    monkeypatch.setattr(trainer.F, "cross_entropy", spy)
    assert command(tmp_path / "run", epochs=1) == 0
    (row,) = metrics(tmp_path / "run")
    assert len(torch.cat(losses)) == IMAGES
    assert row["train_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-6)


def test_compiled_is_one_graph_for_each_way(command, tmp_path, monkeypatch):
    """One for training, one for testing; the smaller last batches run eagerly, the names stay."""
    compile_net, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def spy(net, **options):
        return compile_net(net, backend=backend, fullgraph=True, **options)

    monkeypatch.setattr(functional, "FEW", -1)  # a compiled network computes few elements as it does many
    assert command(tmp_path / "eager") == 0
    monkeypatch.setattr(torch, "compile", spy)
    assert command(tmp_path / "run", "--compile") == 0
    assert len(graphs) == 2
    assert_same_run(tmp_path / "run", tmp_path / "eager")


def test_amp_on_a_cpu_that_is_slower_in_it_is_said(command, tmp_path, monkeypatch, capsys):
    for slower in (False, True):
        monkeypatch.setattr(train.backends, "_WIDENED", {torch.bfloat16: 512} if slower else {})
        options = ["--amp", "bf16", "--batch-size", "5", "--limit", "5"]
        assert command(tmp_path / str(slower), *options, epochs=1) == 0
        assert ("slower in bf16 than in fp32" in " ".join(capsys.readouterr().out.split())) is slower


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_on_a_cpu_a_step_uses_the_memory_of_the_last(images, tmp_path):
    """In a process of its own, because it cannot be taken back."""
    code = """
import resource, sys
import torch
from fastinception import train

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(12 * 2**20) for _ in range(2)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(8)))
arguments = "--epochs 1 --batch-size 4 --limit 4 --image-size 32 --device cpu --no-compile".split()
assert train.main([*arguments, *sys.argv[1:]]) == 0
print(min(faults() for _ in range(8)))  # pieces have to grow together at first
"""
    output, errors = tmp_path / "stdout", tmp_path / "stderr"
    for file in (output, errors):
        file.touch()
    options = ["--data-root", str(images), "--output", str(tmp_path / "run")]
    process = fresh.start(code, output, errors, options)
    process.join(fresh.TIMEOUT)
    assert process.exitcode == 0, errors.read_text()
    first, *_, last = output.read_text().split("\n")[:-1]
    assert int(first) > 40  # 96 MB: 24 huge pages each
    assert int(last) < 20
