"""Train GoogLeNet on Fashion-MNIST with the textbook's recipe: the command, beside the chain.

python -m fastinception.train --output runs/fast                          # ten epochs, on a GPU if there is one
python -m fastinception.train --output runs/fast --resume                 # go on where it was killed
torchrun --nproc-per-node 4 -m fastinception.train --output runs/four     # the same run on four GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import math
import os
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastinception import backends, checkpoint
from fastinception.data import FashionMNIST, fashion_mnist
from fastinception.googlenet import GoogLeNet, xavier_uniform_
from fastinception.module import FastInception
from fastinception.record import Display, environment, write_record
from fastinception.reference import Inception

BLOCKS = {"fast": FastInception, "plain": Inception}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
RECIPE: dict[str, Any] = {
    "block": "fast",
    "amp": "off",
    "epochs": 10,
    "lr": 0.1,
    "batch_size": 128,
    "image_size": 96,
    "seed": 0,
    "limit": None,
}
# With another value the rest of the run would not be that run; the block, the device, the number of processes and
# torch.compile change roundings only.
FIXED = ("amp", "lr", "batch_size", "image_size", "seed", "limit")
# The network halves its images five times.
SMALLEST_IMAGE = 32
# Any of them in a folder is a run that another would overwrite.
FILES = (checkpoint.CURRENT, checkpoint.PREVIOUS, "config.json", "environment.json", "metrics.json", "metrics.csv")
# Steps between two looks at a GPU's results: each look waits for all that was launched.
GPU_POLL = 10
_NEVER = 2**62


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


class Trainer:
    """One run: the network, where the run stands, and what it has measured.

    The processes of a run share each *global* batch: every one takes its part of the same permutation's slice, so
    that an epoch visits every example once, whatever the sizes. Each divides its sum of losses by the size of the
    global batch, and multiplies by the number of processes, since DistributedDataParallel averages: the gradients are
    those of one process, also where the last batch divides unevenly or leaves a process without an example.

    Args:
        config: the keys of ``RECIPE``.
        world: this process; its device holds all images as uint8.
        train, test: the data.
        compiled: call the network through ``torch.compile``. Smaller batches (the last ones) run eagerly.
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
        self.optimizer = torch.optim.SGD(net.parameters(), lr=config["lr"])
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config["amp"] == "fp16")
        self.train, self.test = ((d.images.to(world.device), d.labels.to(world.device)) for d in (train, test))
        self.steps = math.ceil(len(train.labels) / config["batch_size"])
        self.history: list[dict[str, Any]] = []
        self.sessions: list[dict[str, Any]] = []
        self.signum = 0
        self._first_bad = torch.tensor(_NEVER, device=world.device)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        # Not torch.Generator, which keeps 32 bits of its seed: too few for both numbers.
        order = np.random.default_rng([self.config["seed"], epoch]).permutation(len(self.train[1]))
        self.order = torch.from_numpy(order).to(self.world.device)
        # This process's sum of losses and number of correct answers.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
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

    def run(self, every: int | None, display: Display) -> None:
        """Train until the last epoch is done; write a checkpoint after each, and after ``every`` steps.

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
                    display.step(self, *self.world.total(self.sums).tolist())
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
            display.epoch(self)

    def _step(self) -> None:
        first = self.step * self.config["batch_size"]
        batch = self.order[first : first + self.config["batch_size"]]
        images, labels = _batch(self.train, self.world.share(batch))
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._forward(self.model, images)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.scaler.scale(loss * (self.world.size / len(batch))).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.sums += _sums(loss, logits, labels)
        bad = torch.where(loss.isfinite(), _NEVER, self.step)
        self._first_bad = torch.minimum(self._first_bad, bad)
        self.step_seconds += time.perf_counter() - start

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
        found = torch.stack((self._first_bad, torch.tensor(-self.signum, device=self.world.device)))
        if self.world.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        bad, signum = found.tolist()
        if bad != _NEVER:
            raise self._not_finite("the training loss", bad)
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
            f"That batch's examples, as indices into the training split: {batch}. "
            f"The last good checkpoint is {self.folder / checkpoint.CURRENT}"
        )

    def _tick(self) -> None:
        """Add the time since the last tick to the epoch's seconds."""
        now = time.perf_counter()
        self.seconds += now - self._last_tick
        self._last_tick = now


def _batch(split: tuple[Tensor, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return images fp32 ``[N, 1, S, S]``, with the values of ``ToTensor``, and labels ``[N]``."""
    images, labels = split
    return images[indices].float().div_(255).contiguous(memory_format=torch.channels_last), labels[indices]


def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack((loss.detach().double(), (logits.argmax(dim=1) == labels).sum().double()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastinception.train",
        description="Train GoogLeNet on Fashion-MNIST with the textbook's recipe. Under torchrun the processes share "
        "each batch. With --resume, options that are not given are the run's.",
    )

    def integer(least: int, most: int = 2**31) -> Callable[[str], int]:
        def read(text: str) -> int:
            value = int(text)
            if not least <= value <= most:
                raise argparse.ArgumentTypeError(f"must be {least} to {most}, got {value}")
            return value

        read.__name__ = "int"  # argparse shows it for text that is no number
        return read

    def rate(text: str) -> float:
        value = float(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    add = parser.add_argument
    add("--block", choices=tuple(BLOCKS), help="FastInception or the textbook's block (default: fast)")
    compiled = "call the network through torch.compile (default: on a GPU where Triton is installed)"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    add("--amp", choices=tuple(AMP), help="autocast; fp16 with a GradScaler (default: off, that is fp32)")
    add("--epochs", type=integer(1), help="default: 10; more than before to prolong a finished run")
    add("--lr", type=rate, help="SGD's learning rate (default: 0.1)")
    add("--batch-size", type=integer(1), help="global, shared by all processes (default: 128)")
    add("--image-size", type=integer(SMALLEST_IMAGE), help="pixels per side (default: 96)")
    add("--seed", type=integer(0), help="of the weights and of each epoch's order (default: 0)")
    add("--limit", type=integer(1), metavar="N", help="the first N images of each split only")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda if there is one (default)")
    add("--data-root", type=Path, help="folder with Fashion-MNIST's *-ubyte.gz files")
    add("--output", type=Path, metavar="DIR", help="default: runs/train, or where the resumed checkpoint lies")
    add(
        "--resume",
        nargs="?",
        const=True,
        type=Path,
        metavar="CHECKPOINT",
        help="go on with the run in --output, from its newest checkpoint or from the one that is given",
    )
    add("--checkpoint-steps", type=integer(1), metavar="N", help="checkpoint every N steps, too, not only every epoch")
    return parser


def _join(name: str, parser: argparse.ArgumentParser) -> World:
    """Return this process's place, and meet the others where torchrun started several."""
    size, rank, local = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}")
    if device.type == "cuda":
        if size > 1 and device.index is not None:
            parser.error(f"--device {name}: under torchrun each process takes a GPU of its own, say --device cuda")
        device = torch.device("cuda", local if size > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            parser.error(f"--device {name}: GPU {device.index} is not among the {torch.cuda.device_count()} here")
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def _find_run(args: argparse.Namespace) -> tuple[Path, dict[str, Any] | None]:
    """Return the folder of the run, and the state to continue from."""
    given = isinstance(args.resume, Path)
    folder: Path = args.output or (args.resume.parent if given else Path("runs", "train"))
    if args.resume is True:
        if (found := checkpoint.newest(folder)) is None:
            raise TrainingError(f"{folder} holds no run to resume; without --resume one is started there")
        return folder, checkpoint.load(found)
    if given and args.resume.parent.resolve() == folder.resolve():
        return folder, checkpoint.load(args.resume)
    if taken := [name for name in FILES if (folder / name).exists()]:
        raise TrainingError(
            f"{folder} holds a run already ({taken[0]}): continue it with --resume, or choose another --output"
        )
    return folder, checkpoint.load(args.resume) if given else None


def _agree(find: Callable[[], Any], world: World) -> Any:
    """Return, or raise, in every process what ``find`` does in the first.

    Were each to read the folder, two that saw different checkpoints would wait for each other for ever.
    """
    found: list[Any] = [None]
    if world.rank == 0:
        try:
            found = [find()]
        except (TrainingError, checkpoint.CheckpointError) as error:
            found = [error]
    if world.size > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _configure(args: argparse.Namespace, state: dict[str, Any] | None) -> dict[str, Any]:
    given = {name: value for name in RECIPE if (value := getattr(args, name)) is not None}
    if state is None:
        return RECIPE | given
    saved = state["config"]
    changed = [
        f"--{name.replace('_', '-')} {given[name]} (the run has {saved[name]})"
        for name in FIXED
        if name in given and given[name] != saved[name]
    ]
    if changed:
        raise TrainingError(f"a resumed run cannot change {', '.join(changed)}")
    return {name: saved[name] for name in RECIPE} | given


def _load_data(config: dict[str, Any], root: Path | None) -> tuple[FashionMNIST, FashionMNIST]:
    size, limit = config["image_size"], config["limit"]
    try:
        train, test = (fashion_mnist(s, image_size=size, data_root=root, limit=limit) for s in ("train", "test"))
    except ValueError as error:
        raise TrainingError(str(error)) from error
    for name, data in (("training", train), ("test", test)):
        if not len(data.labels):
            raise TrainingError(f"the {name} split holds no images: {data.source}")
    config["data"] = {
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "labels_crc32": zlib.crc32(test.labels.numpy().tobytes(), zlib.crc32(train.labels.numpy().tobytes())),
    }
    return train, test


@contextlib.contextmanager
def _signals(run: Trainer) -> Iterator[None]:
    """Note SIGINT and SIGTERM for the run's next look, instead of dying of them."""

    def note(signum: int, frame: object) -> None:
        run.signum = signum

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(args: argparse.Namespace, world: World) -> int:
    folder, state = _agree(lambda: _find_run(args), world)
    config = _configure(args, state)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # before the data is read, which takes a while
    train, test = _load_data(config, args.data_root)
    compiled = args.compile
    if compiled is None:
        compiled = world.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    run = Trainer(config, world, train, test, compiled=compiled, folder=folder)
    display = Display(world.rank)
    if state is not None:
        if (had := state["config"]["data"]) != config["data"]:
            raise TrainingError(f"this is not the data of the run, which had {had}: {config['data']}")
        run.restore(state)
    if state is not None and run.epoch >= config["epochs"]:
        if world.rank == 0 and checkpoint.newest(folder):  # a crash may have come before the last epoch's record
            run.config = state["config"]
            write_record(run)
        display.say(f"nothing to do: {run.epoch} epochs are finished; prolong the run with --epochs")
        return 0
    how = {"block": config["block"], "compile": compiled, "device": world.device.type, "processes": world.size}
    run.sessions.append({"epoch": run.epoch + 1, "step": run.step, **how, **environment(world.device)})
    # No rotation yet: the previous checkpoint may be the one that was resumed from, beside a damaged one.
    run.save(rotate=False)
    if world.rank == 0:
        checkpoint.check_space(folder)
        write_record(run)
    with _signals(run), display.bar:
        display.say(
            f"GoogLeNet with {config['block']} blocks{', compiled' if compiled else ''}, amp {config['amp']}, "
            f"{world.size} x {world.device.type}; {len(train.labels)} images from {train.source}; "
            f"from epoch {run.epoch + 1}, step {run.step} of {run.steps}"
        )
        if (dtype := AMP[config["amp"]]) is not None and backends.emulated(dtype, world.device):
            display.say(f"this CPU has no {config['amp']} products: fast blocks compute in fp32, plain ones slowly")
        try:
            run.run(args.checkpoint_steps, display)
        except Stopped as stopped:
            (signum,) = stopped.args
            run.save()
            display.say(f"stopped by {signal.Signals(signum).name}; continue with --output {folder} --resume")
            return 128 + int(signum)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 where something failed, 128 + the signal that stopped it.

    Raises:
        SystemExit: with status 2, for a bad option.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("rich", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            parser.error(f"{name} is needed: pip install 'fastinception[bench]'")
    try:
        return _train(args, _join(args.device, parser))
    except (TrainingError, checkpoint.CheckpointError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"{parser.prog}: error: --batch-size does not fit into the GPU's memory: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            gc.collect()  # what is left of DistributedDataParallel has to go before its group
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
