"""Turn rows of examples/s into ratios, a table, a sentence and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Row = dict[str, Any]
BASE = "plain eager NCHW"
FLOOR = "convolutions alone"
LEGEND = f"""\
spread: half of what lies between the quartiles of the rounds, as a share of their median
{FLOOR}: no network, but the library's convolutions of one, called one by one
outside convs: the share of a row's time that these would not take; below 0% a network's own run faster"""


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return the rows of one mode and dtype with their ratio to the plain row and to the best plain row.

    ``outside_convolutions`` is the share of a row's time that the network's convolutions alone would not have taken;
    it is negative where a row runs them faster than the library does one by one.
    """
    speed = {row["variant"]: row["examples_per_second"] for row in rows}
    base, best = speed[BASE], max(value for name, value in speed.items() if name.startswith("plain "))
    return [
        row
        | {
            "ratio_to_plain": row["examples_per_second"] / base,
            "ratio_to_best_plain": row["examples_per_second"] / best,
            "outside_convolutions": 1 - row["examples_per_second"] / speed[FLOOR],
        }
        for row in rows
    ]


def table(title: str, rows: list[Row]) -> Table:
    """Lay out the rows of one mode and dtype."""
    view = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("variant", no_wrap=True)
    headers = ["examples/s", "spread", "vs plain\neager NCHW", "vs best\nplain", "outside\nconvs"]
    if any("peak_bytes" in row for row in rows):
        headers += ["saved\nMB", "peak\nMB"]
    for header in headers:
        view.add_column(header, justify="right", overflow="fold")
    for row in rows:
        speed, (low, high) = row["examples_per_second"], row["spread"]
        view.add_row(
            row["variant"],
            f"{speed:.1f}",
            f"+-{50 * (high - low) / speed:.1f}%",
            f"{row['ratio_to_plain']:.2f}x",
            f"{row['ratio_to_best_plain']:.2f}x",
            f"{row['outside_convolutions']:.0%}",
            *(f"{row[key] / 1e6:.0f}" for key in ("saved_bytes", "peak_bytes") if key in row),
            style="bold" if row["variant"].startswith("FastInception") else "",
        )
    return view


class Display:
    """Show the work as it goes: check lines and finished tables stay, the bar and the open table move."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("start", total=None)
        self.live = Live(self.progress, console=console, transient=True, refresh_per_second=4)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.live.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def stage(self, words: str, done: int, total: int | None) -> None:
        """Say what runs now and how far it is."""
        self.progress.update(self.task, description=words, completed=done, total=total)

    def rows(self, title: str, rows: list[Row], *, final: bool) -> None:
        """Show one group's rows, which further rounds may move unless they are final."""
        if final:
            self.live.update(self.progress)
            self.live.console.print(table(title, rows))
        else:
            self.live.update(Group(table(f"{title} (so far)", rows), self.progress))


def cross_precision(mode: str, rows: list[Row]) -> str | None:
    """Compare compiled bf16 FastInception with plain eager NCHW in fp32, where both were measured."""
    speed = {(row["variant"], row["dtype"]): row["examples_per_second"] for row in rows if row["mode"] == mode}
    fast, plain = speed.get(("FastInception compiled", "bf16")), speed.get((BASE, "fp32"))
    if fast is None or plain is None:
        return None
    return (
        f"cross-precision, {mode}: FastInception compiled in bf16 against {BASE} in fp32: "
        f"{fast / plain:.2f}x (two precisions; the tables compare one)"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw one panel for each mode and dtype: a bar for each variant, with its quartiles."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    groups = list(dict.fromkeys((row["mode"], row["dtype"]) for row in rows))
    modes = list(dict.fromkeys(mode for mode, _ in groups))
    dtypes = list(dict.fromkeys(dtype for _, dtype in groups))
    most = max(sum((row["mode"], row["dtype"]) == group for row in rows) for group in groups)
    size = max(7, 6.2 * len(dtypes)), (1.1 + 0.36 * most) * len(modes) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(modes), len(dtypes), squeeze=False)
    for axis, (mode, dtype) in zip(axes.flat, groups, strict=True):
        shown = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
        speeds = [row["examples_per_second"] for row in shown]
        spread = [
            [speed - row["spread"][0] for speed, row in zip(speeds, shown, strict=True)],
            [row["spread"][1] - speed for speed, row in zip(speeds, shown, strict=True)],
        ]
        colors = ["#d9480f" if row["variant"].startswith("FastInception") else "#9aa5b1" for row in shown]
        names = [row["variant"] for row in shown]
        bars = axis.barh(names, speeds, xerr=spread, color=colors, ecolor="#343a40", capsize=2)
        labels = [f"{row['examples_per_second']:.0f}  ({row['ratio_to_plain']:.2f}x)" for row in shown]
        axis.bar_label(bars, labels, padding=6, fontsize=9)
        axis.set_xlim(0, 1.3 * max(row["spread"][1] for row in shown))
        axis.invert_yaxis()
        axis.set_title(f"{mode}, {dtype}", loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(f"examples/s (x: against {BASE})")
    about = result["conditions"]
    figure.suptitle(
        f"GoogLeNet {about['image_size']}x{about['image_size']}, batch {about['batch_size']}, "
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)
