"""Show a training run as it goes, and write its record: settings, environment, metrics and curves; beside the chain."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastinception import checkpoint
from fastinception.trainer import Trainer

_HERE = Path(__file__).resolve().parent
CURVES_SECONDS = 60.0  # between two drawings: one takes as long as an epoch on a fast GPU


class Display:
    """Show the run as it goes and write its record: what only the first process does."""

    def __init__(self, rank: int) -> None:
        # Here, not above: an import of this module asks for nothing but PyTorch.
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.rank = rank
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console()
        self.bar = Progress(*columns, console=console, disable=rank != 0 or not console.is_terminal, transient=True)
        self.task = self.bar.add_task("", total=None)
        self.drawn = time.perf_counter()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self.rank == 0:
            self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, run: Trainer, loss: float, correct: float) -> None:
        """Show the epoch so far, from its sums over all processes."""
        if self.rank == 0:
            done = min(run.step * run.config["batch_size"], len(run.order))
            words = (
                f"epoch {run.epoch + 1}/{run.config['epochs']}  loss {loss / done:.3f}  accuracy {correct / done:.3f}  "
                f"{done / run.step_seconds:.0f} examples/s, {done / run.seconds:.0f} end to end"
            )
            self.bar.update(self.task, description=words, completed=run.step, total=run.steps)

    def epoch(self, run: Trainer) -> None:
        """Print the last finished epoch and write the record; the curves behind the last one, or once a minute."""
        if self.rank == 0:
            row = run.history[-1]
            write_record(run)  # first: what is printed may have no reader any more
            self.say(
                f"epoch {row['epoch']}/{run.config['epochs']}: train loss {row['train_loss']:.3f}, "
                f"accuracy {row['train_accuracy']:.3f}; test loss {row['test_loss']:.3f}, "
                f"accuracy {row['test_accuracy']:.3f}; {row['examples_per_second']:.1f} examples/s, "
                f"{row['examples_per_second_end_to_end']:.1f} end to end"
            )
            if run.epoch == run.config["epochs"] or time.perf_counter() - self.drawn >= CURVES_SECONDS:
                self.curves(run)

    def curves(self, run: Trainer) -> None:
        """Draw curves.png into the run's folder, where an epoch is finished."""
        if self.rank == 0 and run.history:
            self.drawn = time.perf_counter()
            try:
                picture = _curves(run.history)
            except Exception as error:  # an unknown MPLBACKEND is one when matplotlib is imported
                self.say(f"curves.png is not drawn: {error}")
                return
            checkpoint.write(run.folder / "curves.png", picture)


def write_record(run: Trainer) -> None:
    """Write config.json, environment.json, metrics.json and metrics.csv into the run's folder.

    ``environment.json`` has an entry for each start and resume of the run. The columns of the metrics, one row an
    epoch: means over the examples; ``examples_per_second`` as the textbook counts, over the time of the steps alone
    (forward, loss, backward, update, accuracy; warm-up included, loading left out; on a GPU the making of batches is
    queued with the steps and counted); ``examples_per_second_end_to_end`` and ``seconds`` with loading, evaluation
    and checkpoints.
    """
    for name, content in (("config", run.config), ("environment", run.sessions), ("metrics", run.history)):
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        checkpoint.write(run.folder / f"{name}.json", text.encode())
    if run.history:
        table = io.StringIO()
        writer = csv.DictWriter(table, list(run.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.history)
        checkpoint.write(run.folder / "metrics.csv", table.getvalue().encode())


def _curves(history: Sequence[dict[str, Any]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in (("train", "o-"), ("test", "s--")):
            values = [row[f"{split}_{kind}"] for row in history]
            axis.plot([row["epoch"] for row in history], values, style, markersize=3, label=split)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(kind, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=140)
    return png.getvalue()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=_HERE, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str | None:
    """Name the commit of this checkout, with ``-dirty`` where a tracked file differs; None where this is none."""
    # An installed copy may lie inside another project's checkout, whose commit says nothing.
    if _output("git", "rev-parse", "--show-prefix") != f"{_HERE.name}/":
        return None
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or None


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, the processor, the GPU and the commit of this code, ready for JSON."""
    triton = None
    with contextlib.suppress(ImportError):
        import triton as module

        triton = module.__version__
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = driver = None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": driver,
        "commit": commit(),
    }
