"""Train one network on one data set: the steps, the epochs, and all that a run has to remember; beside the chain."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastinception import checkpoint
from fastinception.data import FashionMNIST
from fastinception.googlenet import GoogLeNet, xavier_uniform_
from fastinception.module import FastInception
from fastinception.reference import Inception

BLOCKS = {"fast": FastInception, "plain": Inception}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Steps between two looks at a GPU's results: each look waits for all that was launched.
GPU_POLL = 10


class TrainingError(Exception):
    """What ends the run with a message instead of a traceback."""


class Stopped(Exception):
    """A signal asked for the end of the run; its number is the argument."""


class World(NamedTuple):
    """This process among those of the run, and its device."""

    rank: int
    size: int
    device: torch.device

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's consecutive part of a global batch ``[N]``; the shares differ by one at most."""
        return batch.tensor_split(self.size)[self.rank]

    def total(self, local: Tensor) -> Tensor:
        """Return the sum of ``local`` over all processes."""
        total = local.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total


class Graphed:
    """Run a function on a GPU three times as it is, then record it in one CUDA graph, and replay that from then on.

    What the function takes and leaves has to lie in the same tensors at each call, as a graph knows addresses alone; a
    number that changes between calls has to be in a tensor, too, and nothing may wait for the device.
    """

    WARMUP = 3  # what libraries choose and allocate at first cannot be recorded

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.calls = function, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do what the function does."""
        if self.calls < self.WARMUP:
            self.calls += 1
            # Not on the default stream, with which what autograd keeps of it would wait in the graph.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.function()
            torch.cuda.current_stream().wait_stream(side)
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.function()
            self.graph = graph
        self.graph.replay()


class Trainer:
    """One run: the network, where the run stands, and what it has measured.

    The processes of a run share each *global* batch: every one takes its part of the same permutation's slice, so
    that an epoch visits every example once, whatever the sizes. Each divides its sum of losses by the size of the
    global batch, and their gradients are added: they are those of one process, also where the last batch divides
    unevenly or leaves a process without an example, and overflow in fp16 where those do.

    Args:
        config: the keys of ``train.RECIPE``.
        world: this process; its device holds all images as uint8.
        train, test: the data.
        compiled: call the network through ``torch.compile``. Smaller batches (the last ones) run eagerly.
        graphed: replay one CUDA graph for each step. Smaller batches are launched as they are.
        folder: where the checkpoints go.
    """

    def __init__(
        self,
        config: dict[str, Any],
        world: World,
        train: FashionMNIST,
        test: FashionMNIST,
        *,
        compiled: bool,
        graphed: bool,
        folder: Path,
    ) -> None:
        self.config, self.world, self.compiled, self.folder = config, world, compiled, folder
        torch.manual_seed(config["seed"])
        # On the CPU first, so that every device starts from the same weights.
        net = xavier_uniform_(GoogLeNet(BLOCKS[config["block"]]))
        self.net: nn.Module = net.to(world.device).to(memory_format=torch.channels_last)
        # The compiled network shares the parameters. It is inside of DistributedDataParallel, whose own forward Dynamo
        # would break into many graphs.
        self.call: Any = torch.compile(self.net, dynamic=False) if compiled else self.net
        self.model = self.call
        if world.size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.call, device_ids=ids)
            self.model.register_comm_hook(None, lambda _, bucket: _add_up(bucket.buffer()))
        self.optimizer = torch.optim.SGD(net.parameters(), lr=config["lr"])
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config["amp"] == "fp16")
        self.train, self.test = ((d.images.to(world.device), d.labels.to(world.device)) for d in (train, test))
        self.steps = math.ceil(len(train.labels) / config["batch_size"])
        self.history: list[dict[str, Any]] = []
        self.sessions: list[dict[str, Any]] = []
        self.signum = 0
        # What steps add to stays in the same tensors, for a graph: this process's sum of losses and number of correct
        # answers; whether all losses were finite, and in how many steps of the epoch they were.
        self.sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        self._finite = torch.ones((), dtype=torch.bool, device=world.device)
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=world.device)
        self._indices = torch.zeros(config["batch_size"], dtype=torch.int64, device=world.device)
        self._graphed = Graphed(self._update_by_indices) if graphed else None
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        # Not torch.Generator, which keeps 32 bits of its seed: too few for both numbers.
        order = np.random.default_rng([self.config["seed"], epoch]).permutation(len(self.train[1]))
        self.order = torch.from_numpy(order).to(self.world.device)
        self.sums.zero_()
        self._finite_steps.zero_()
        self.step_seconds = self.seconds = 0.0

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, and what it measured; every process has to call it."""
        cuda = self.world.device.type == "cuda"
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.world.device) if cuda else None,
            },
            "config": self.config,
            "epoch": self.epoch,
            "step": self.step,
            "order": self.order.cpu(),
            "sums": self.world.total(self.sums).tolist(),
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "history": self.history,
            "sessions": self.sessions,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.world.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.world.device)
        self._start_epoch(state["epoch"])
        self.step, self.order = state["step"], state["order"].to(self.world.device)
        self._finite_steps.fill_(self.step)
        if self.world.rank == 0:  # the checkpoint holds the sum over the processes
            self.sums += self.sums.new_tensor(state["sums"])
        self.step_seconds, self.seconds = state["step_seconds"], state["seconds"]
        self.history, self.sessions = state["history"], state["sessions"]

    def save(self, *, rotate: bool = True) -> None:
        """Write a checkpoint, in which no weight is infinite or NaN."""
        self._check_weights()
        state = self.state()
        if self.world.rank == 0:
            checkpoint.save(state, self.folder, rotate=rotate)

    def run(self, every: int | None, on_step: Callable[[float, float], None], on_epoch: Callable[[], None]) -> None:
        """Train until the last epoch is done; write a checkpoint after each, and after ``every`` steps.

        ``on_step`` gets the epoch's sums over all processes, of losses and of correct answers; ``on_epoch`` is called
        behind each epoch's checkpoint.

        Raises:
            Stopped: after a signal; the state is that of a finished step.
            TrainingError: the loss is not finite.
        """
        self._last_tick = time.perf_counter()
        while self.epoch < self.config["epochs"]:
            while self.step < self.steps:
                self._step()
                due = every is not None and self.step % every == 0 and self.step < self.steps
                if due or self.step == self.steps or self._look_now(self.step):
                    start = time.perf_counter()
                    self._look()
                    self.step_seconds += time.perf_counter() - start
                    self._tick()
                    on_step(*self.world.total(self.sums).tolist())
                if due:
                    self.save()
            self._check_weights()
            test = self._evaluate()
            self._tick()
            train = self.world.total(self.sums).tolist()
            row = {
                "epoch": self.epoch + 1,
                "train_loss": train[0] / len(self.order),
                "train_accuracy": train[1] / len(self.order),
                "test_loss": test[0] / len(self.test[1]),
                "test_accuracy": test[1] / len(self.test[1]),
                "examples_per_second": len(self.order) / self.step_seconds,
                "examples_per_second_end_to_end": len(self.order) / self.seconds,
                "seconds": self.seconds,
            }
            self.history.append(row)
            self._start_epoch(self.epoch + 1)
            self.save()
            on_epoch()

    def _step(self) -> None:
        first = self.step * self.config["batch_size"]
        batch = self.order[first : first + self.config["batch_size"]]
        update: Callable[[], None]
        if self._graphed is not None and len(batch) == len(self._indices):
            self._indices.copy_(batch)
            update = self._graphed
        else:
            images, labels = _batch(self.train, self.world.share(batch))
            update = partial(self._update, images, labels, len(batch))
        start = time.perf_counter()
        update()
        self.step += 1
        self.step_seconds += time.perf_counter() - start

    def _update_by_indices(self) -> None:
        self._update(*_batch(self.train, self._indices), len(self._indices))

    def _update(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """Go one step on this process's part of a batch of ``global_size``; may run in a graph."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._forward(self.model, images)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.scaler.scale(loss / global_size).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += _sums(loss, logits, labels)
        self._finite.logical_and_(loss.isfinite())
        self._finite_steps += self._finite

    def _forward(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return float32 logits ``[N, 10]``."""
        dtype = AMP[self.config["amp"]]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None))
            if self.compiled and len(images) < len(self.world.share(self.order[: self.config["batch_size"]])):
                # A graph for each smaller batch would take longer to compile than it saves.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            logits = model(images)
        return logits.float()

    @torch.no_grad()
    def _evaluate(self) -> list[float]:
        """Return the sum of losses and the number of correct answers on the test split."""
        sums = torch.zeros_like(self.sums)
        batches = torch.arange(len(self.test[1]), device=self.world.device).split(self.config["batch_size"])
        for number, batch in enumerate(batches, start=1):
            images, labels = _batch(self.test, self.world.share(batch))
            if len(labels):
                logits = self._forward(self.call, images)
                sums += _sums(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
            if self._look_now(number):
                self._look()
        total: list[float] = self.world.total(sums).tolist()
        if not math.isfinite(total[0]):
            raise self._not_finite("the test loss", self.step)
        return total

    def _look_now(self, step: int) -> bool:
        return self.world.device.type == "cpu" or step % GPU_POLL == 0

    def _look(self) -> None:
        """Find out, together with the other processes, whether to stop; waits for the device."""
        found = torch.stack((self._finite_steps, torch.tensor(-self.signum, device=self.world.device)))
        if self.world.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        finite_steps, signum = found.tolist()
        if finite_steps < self.step:
            raise self._not_finite("the training loss", finite_steps + 1)
        if signum:
            raise Stopped(-signum)

    def _check_weights(self) -> None:
        # A finite loss can have a gradient that is not: the next loss shows it, and may come after a checkpoint.
        if not all(bool(torch.isfinite(p).all()) for p in self.net.parameters()):
            raise self._not_finite("a weight", self.step)

    def _not_finite(self, what: str, step: int) -> TrainingError:
        last = step * self.config["batch_size"]
        batch = self.order[max(0, last - self.config["batch_size"]) : last].tolist()
        return TrainingError(
            f"{what} is not finite in epoch {self.epoch + 1}, step {step} of {self.steps}. "
            f"That step's examples, as indices into the training split: {batch}. "
            f"The last good checkpoint is {self.folder / checkpoint.CURRENT}"
        )

    def _tick(self) -> None:
        """Add the time since the last tick to the epoch's seconds."""
        now = time.perf_counter()
        self.seconds += now - self._last_tick
        self._last_tick = now


def _add_up(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Add the gradients of all processes, where DistributedDataParallel would average them."""
    work = dist.all_reduce(gradients, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _batch(split: tuple[Tensor, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return images fp32 ``[N, 1, S, S]``, with the values of ``ToTensor``, and labels ``[N]``."""
    images, labels = split
    return images[indices].float().div_(255).contiguous(memory_format=torch.channels_last), labels[indices]


def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack((loss.detach().double(), (logits.argmax(dim=1) == labels).sum().double()))
