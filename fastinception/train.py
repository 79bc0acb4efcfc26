"""Train GoogLeNet on Fashion-MNIST with the textbook's recipe: the command, beside the chain.

python -m fastinception.train --output runs/fast                          # ten epochs, on a GPU if there is one
python -m fastinception.train --output runs/fast --resume                 # go on where it was killed
torchrun --nproc-per-node 4 -m fastinception.train --output runs/four     # the same run on four GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import math
import os
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastinception import backends, checkpoint
from fastinception.data import FashionMNIST, fashion_mnist
from fastinception.record import Display, environment, write_record
from fastinception.trainer import AMP, BLOCKS, Stopped, Trainer, TrainingError, World

RECIPE: dict[str, Any] = {
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
# With another value the rest of the run would not be that run; the block, the device, the number of processes,
# torch.compile and a CUDA graph change roundings only.
FIXED = ("amp", "lr", "batch_size", "image_size", "seed", "limit")
# The network halves its images five times.
SMALLEST_IMAGE = 32
# Any of them in a folder is a run that another would overwrite.
FILES = (checkpoint.CURRENT, checkpoint.PREVIOUS, "config.json", "environment.json", "metrics.json", "metrics.csv")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastinception.train",
        description="Train GoogLeNet on Fashion-MNIST with the textbook's recipe. Under torchrun the processes share "
        "each batch. With --resume, options that are not given are the run's, but for --device and --data-root.",
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

    rate.__name__ = "float"

    def path(text: str) -> Path:
        if not text:  # of an unset variable; Path would take it for the current folder
            raise argparse.ArgumentTypeError("must not be empty")
        return Path(text)

    add = parser.add_argument
    add("--block", choices=tuple(BLOCKS), help="FastInception or the textbook's block (default: fast)")
    compiled = "call the network through torch.compile (default: on a GPU where Triton is installed)"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    graphed = "replay a CUDA graph for each step (default: on one GPU, but for fp16, whose scaler waits for each step)"
    add("--cuda-graph", action=argparse.BooleanOptionalAction, help=graphed)
    add("--amp", choices=tuple(AMP), help="autocast; fp16 with a GradScaler (default: off, that is fp32)")
    add("--epochs", type=integer(1), help="default: 10; more than before to prolong a finished run")
    add("--lr", type=rate, help="SGD's learning rate (default: 0.1)")
    add("--batch-size", type=integer(1), help="global, shared by all processes (default: 128)")
    sides = integer(SMALLEST_IMAGE, 2**15)  # more would overflow NumPy's sizes
    add("--image-size", type=sides, help=f"pixels per side, {SMALLEST_IMAGE} at least (default: 96)")
    add("--seed", type=integer(0), help="of the weights and of each epoch's order (default: 0)")
    add("--limit", type=integer(1), metavar="N", help="the first N images of each split only")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda if there is one (default)")
    add("--data-root", type=path, help="folder with Fashion-MNIST's *-ubyte.gz files")
    add("--output", type=path, metavar="DIR", help="default: runs/train, or where the resumed checkpoint lies")
    add(
        "--resume",
        nargs="?",
        const=True,
        type=path,
        metavar="CHECKPOINT",
        help="go on with the run in --output, from its newest checkpoint or from the one, or the folder, that is given",
    )
    add("--checkpoint-steps", type=integer(1), metavar="N", help="checkpoint every N steps, too, not only every epoch")
    return parser


def _join(name: str, parser: argparse.ArgumentParser) -> World:
    """Return this process's place, and meet the others where torchrun started several."""
    try:
        size, rank, local = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    except ValueError as error:
        parser.error(f"WORLD_SIZE, RANK and LOCAL_RANK, which torchrun sets, must be numbers: {error}")
    if not 0 <= rank < size:
        parser.error(f"the environment says RANK={rank} of WORLD_SIZE={size}: unset both, or start by torchrun")
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
            parser.error(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    if size > 1:
        # The functions of this module have the default group of its import as an argument's default. Imported by
        # DistributedDataParallel, after the start, it would keep our group and its threads alive, and the interpreter's
        # end then aborts now and then.
        importlib.import_module("torch.distributed.nn.functional")
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except ValueError as error:  # MASTER_ADDR and the like are missing, or wrong
            parser.error(f"WORLD_SIZE={size}, and the processes cannot meet: {error}")
    return World(rank, size, device)


def _find_run(args: argparse.Namespace) -> tuple[Path, dict[str, Any] | None]:
    """Return the folder of the run, and the state to continue from."""
    wanted = args.resume
    if isinstance(wanted, Path) and wanted.is_dir():
        wanted = _newest(wanted)
    given = isinstance(wanted, Path)
    folder: Path = args.output or (wanted.parent if given else Path("runs", "train"))
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder: give another --output")
    if wanted is True:
        return folder, checkpoint.load(_newest(folder))
    if given and wanted.parent.resolve() == folder.resolve():
        state = checkpoint.load(wanted)
        if (later := checkpoint.later(folder, state)) is not None:
            raise TrainingError(
                f"{later} stands further than {wanted.name}, and going on from there would overwrite it: give another "
                "--output, or continue from it with --resume"
            )
        return folder, state
    if taken := [name for name in FILES if (folder / name).exists()]:
        if checkpoint.newest(folder) is None:
            raise TrainingError(f"{folder} holds the record of a run without its checkpoints: choose another --output")
        raise TrainingError(
            f"{folder} holds a run already ({taken[0]}): continue it with --resume, or choose another --output"
        )
    return folder, checkpoint.load(wanted) if given else None


def _newest(folder: Path) -> Path:
    if (found := checkpoint.newest(folder)) is not None:
        return found
    if any((folder / name).exists() for name in FILES):
        raise TrainingError(f"{folder} holds the record of a run without its checkpoints: nothing can be resumed")
    raise TrainingError(f"{folder} holds no run to resume; without --resume one is started there")


def _hold(folder: Path) -> int | None:
    """Keep other processes from training in ``folder`` for as long as this one lives."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise TrainingError(f"another process is training in {folder}: choose another --output") from None
    except OSError:  # a file system that knows no locks
        os.close(held)
        return None
    return held


def _agree(find: Callable[[], Any], world: World) -> Any:
    """Return, or raise, in every process what ``find`` does in the first.

    Were each to read the folder, two that saw different checkpoints would wait for each other for ever.
    """
    found: list[Any] = [None]
    if world.rank == 0:
        try:
            found = [find()]
        except (TrainingError, checkpoint.CheckpointError, OSError) as error:
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
    return {name: saved.get(name, default) for name, default in RECIPE.items()} | given


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
        "labels_crc32": zlib.crc32(test.labels.numpy().data, zlib.crc32(train.labels.numpy().data)),
        "images_crc32": zlib.crc32(test.images.numpy().data, zlib.crc32(train.images.numpy().data)),
    }
    return train, test


def _keep_memory() -> None:
    """Have glibc's malloc keep for the next step what this one frees; other C libraries do as they do.

    Large tensors are else given back, and come in the next step page by page from the system.
    """
    max_mmaps, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(max_mmaps, 0)
        mallopt(trim_threshold, 2**31 - 1)


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
    held = None

    def find() -> tuple[Path, dict[str, Any] | None, dict[str, Any]]:
        nonlocal held
        folder, state = _find_run(args)
        _configure(args, state)
        folder.mkdir(parents=True, exist_ok=True)
        held = _hold(folder)
        tempfile.TemporaryFile(dir=folder).close()  # before the data is read, which takes a while
        _, state = _find_run(args)  # another process may just have ended
        return folder, state, _configure(args, state)

    try:
        folder, state, config = _agree(find, world)
        return _train_in(folder, state, config, args.data_root, world)
    finally:
        if held is not None:
            os.close(held)


def _train_in(
    folder: Path, state: dict[str, Any] | None, config: dict[str, Any], data_root: Path | None, world: World
) -> int:
    if config["block"] == "fast":
        reason = backends.environment_error(world.device, AMP[config["amp"]] or torch.float32)
        if reason is not None:
            raise TrainingError(reason)
    compiled = config["compile"]
    if compiled is None:
        compiled = world.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    graphed = config["cuda_graph"]
    able = world.device.type == "cuda" and world.size == 1 and config["amp"] != "fp16"
    if graphed and not able:
        raise TrainingError(
            "--cuda-graph needs one process on a GPU, and not --amp fp16; this is "
            f"{world.size} x {world.device.type}, amp {config['amp']}: give --no-cuda-graph"
        )
    graphed = able if graphed is None else graphed
    if world.device.type == "cpu":
        _keep_memory()
    train, test = _load_data(config, data_root)
    run = Trainer(config, world, train, test, compiled=compiled, graphed=graphed, folder=folder)
    display = Display(world.rank)
    if state is not None:
        had = state["config"]["data"]
        if had != {name: config["data"][name] for name in had}:
            raise TrainingError(
                f"this is not the data of the run, which had {had}: {config['data']}; --data-root names another"
            )
        run.restore(state)
    if state is not None and run.epoch >= config["epochs"]:
        if world.rank == 0 and checkpoint.newest(folder):  # a crash may have come before the last epoch's record
            run.config = state["config"]
            write_record(run)
            display.curves(run)
        display.say(f"nothing to do: {run.epoch} epochs are finished; prolong the run with --epochs")
        return 0
    how = {"block": config["block"], "compile": compiled, "cuda_graph": graphed}
    where = {"device": world.device.type, "processes": world.size, **environment(world.device)}
    run.sessions.append({"epoch": run.epoch + 1, "step": run.step, **how, **where})
    # No rotation yet: the previous checkpoint may be the one that was resumed from, beside a damaged one.
    run.save(rotate=False)
    if world.rank == 0:
        checkpoint.check_space(folder)
        write_record(run)
    with _signals(run), display.bar:
        display.say(
            f"GoogLeNet with {config['block']} blocks{', compiled' if compiled else ''}, amp {config['amp']}, "
            f"{world.size} x {world.device.type}{', in a CUDA graph' if graphed else ''}; "
            f"{len(train.labels)} images from {train.source}; "
            f"from epoch {run.epoch + 1}, step {run.step} of {run.steps}"
        )
        if (dtype := AMP[config["amp"]]) is not None and backends.is_slower(dtype, world.device):
            display.say(
                f"this CPU is slower in {config['amp']} than in fp32: fast blocks compute in fp32, plain ones do not"
            )
        try:
            run.run(config["checkpoint_steps"], partial(display.step, run), partial(display.epoch, run))
        except TrainingError:
            with contextlib.suppress(OSError):  # what is wrong with the training comes first
                display.curves(run)
            raise
        except Stopped as stopped:
            (signum,) = stopped.args
            run.save()
            display.curves(run)
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
            parser.error(f"{name} is needed: pip install '.[bench]' in a clone, or pip install {name}")
    try:
        return _train(args, _join(args.device, parser))
    except (TrainingError, checkpoint.CheckpointError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not backends.is_out_of_memory(error):
            raise
        print(f"{parser.prog}: error: the images or --batch-size do not fit into the memory: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            gc.collect()  # what is left of DistributedDataParallel has to go before its group
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
