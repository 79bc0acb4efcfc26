"""Show the GPU suite's results: a table for each part, the comparison that they add up to, one JSON and one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.gpu.case import Row
from bench.record import write_json

# Parts whose rows compete: the best plain variant of all of them is what FastInception is compared with.
FAMILIES = {
    "blocks": ("blocks", "blocks-max-autotune"),
    "networks": ("networks", "networks-compiled", "networks-reduce-overhead", "networks-max-autotune"),
    "kernelbench": ("kernelbench",),
}


# Shown in columns of their own, or only in the file.
TOLD = ("variant", "samples", "model_us", "of_floor", "floor_us", "bound", "error", "prepare_seconds")


def table(content: Mapping[str, Any]) -> Table:
    """Lay out the rows of one part, as its file holds them."""
    dry = content["conditions"]["dry"]
    unit, rate = ("dry_us", "dry_examples_per_second") if dry else ("us", "examples_per_second")
    title = f"{content['part']}{' (DRY RUN on a CPU: no figure of a GPU)' if dry else ''}"
    columns = (*TOLD, unit, f"quartiles_{unit}", rate)
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("case", no_wrap=True)
    view.add_column("variant", no_wrap=True)
    for header in (unit, "quartiles", "model us", "of floor", rate.replace("examples_per_second", "examples/s")):
        view.add_column(header, justify="right")
    view.add_column("", overflow="fold")
    for case, result in content["cases"].items():
        for i, row in enumerate(result.get("rows") or [{"variant": "", "failed": last_line(result)}]):
            low, high = row.get(f"quartiles_{unit}", (None, None))
            view.add_row(
                "" if i else escape(case),
                escape(row["variant"]),
                f"{row[unit]:.1f}" if unit in row else "",
                "" if low is None else f"{low:.1f}, {high:.1f}",
                f"{row['model_us']:.1f}" if "model_us" in row else "",
                f"{row['of_floor']:.0%}" if "of_floor" in row else "",
                f"{row[rate]:.1f}" if rate in row else "",
                escape(", ".join(f"{key}: {str(value)[-300:]}" for key, value in row.items() if key not in columns)),
                style="red" if "failed" in row else "bold" if row["variant"].startswith("FastInception") else "",
            )
    return view


def last_line(result: Mapping[str, Any]) -> str:
    """Say how a case ended its process, in one line: the last of its output is where Python puts the message."""
    if "error" not in result:
        return "no rows"
    return f"status {result['status']}: {(result['error'].splitlines() or ['no output'])[-1]}"


def _unit(row: Row) -> str:
    return "us" if "us" in row else "dry_us"


def compare(parts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Hold FastInception's best variant of each workload against the best plain one, over all parts measured.

    Args:
        parts: contents of the parts' files, by name.

    Returns:
        A row for each workload for which both were measured: ``family``, ``workload``, the two variants and their
        figures, ``ratio`` (above 1: FastInception is faster) and the ``parts`` that were there to win; and behind the
        blocks of one size, if all nine are there, the geometric mean and the least of their ratios.
    """
    found: list[Row] = []
    for family, names in FAMILIES.items():
        rows: dict[str, list[Row]] = {}
        there: dict[str, list[str]] = {}
        for name in names:
            for case, result in parts.get(name, {}).get("cases", {}).items():
                workload = case.partition(",")[0]
                rows.setdefault(workload, []).extend(row for row in result.get("rows", []) if _unit(row) in row)
                there.setdefault(workload, []).append(name)
        for workload, own in rows.items():
            best = {}
            for side in ("plain", "FastInception"):
                if rivals := [row for row in own if row["variant"].startswith(side)]:
                    best[side] = min(rivals, key=lambda row: row[_unit(row)])
            if len(best) == 2:
                plain, fast = best["plain"], best["FastInception"]
                unit = _unit(fast)
                found.append(
                    {
                        "family": family,
                        "workload": workload,
                        "plain": plain["variant"],
                        f"plain_{unit}": plain[unit],
                        "fast": fast["variant"],
                        f"fast_{unit}": fast[unit],
                        "ratio": round(plain[unit] / fast[unit], 3),
                        "parts": list(dict.fromkeys(there[workload])),
                    }
                )
        if family == "blocks":
            found += _means(found)
    return found


def _means(rows: Sequence[Row]) -> list[Row]:
    sizes: dict[str, list[float]] = {}
    for row in rows:
        sizes.setdefault(row["workload"].rpartition(" at ")[2], []).append(row["ratio"])
    return [
        {
            "family": "blocks",
            "workload": f"geometric mean at {size}",
            "ratio": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3),
            "least": min(ratios),
        }
        for size, ratios in sizes.items()
        if len(ratios) == 9
    ]


def write(output: Path, names: Sequence[str], console: Console) -> None:
    """Gather the parts' files into ``results.json``, print the comparison, and draw ``results.png``."""
    parts = {name: json.loads(path.read_text()) for name in names if (path := output / f"{name}.json").is_file()}
    if not parts:
        return
    about = next(iter(parts.values()))["conditions"]
    rows = compare(parts)
    write_json({"conditions": about, "comparison": rows, "parts": parts}, output / "results.json")
    title = f"best plain against best FastInception{' (DRY RUN on a CPU: no figure of a GPU)' if about['dry'] else ''}"
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("workload", "plain", "FastInception", "ratio", "of the parts"):
        view.add_column(header)
    for row in rows:
        unit = _side_unit(row)
        sides = [f"{row[f'{side}_{unit}']:.1f} {unit}, {row[side]}" if unit else "" for side in ("plain", "fast")]
        told = f"least {row['least']:.2f}x" if "least" in row else ", ".join(row["parts"])
        view.add_row(row["workload"], *sides, f"{row['ratio']:.2f}x", told)
    if rows:
        console.print(view)
        plot(about, rows, output / "results.png")
    kept = f"{output / 'results.json'}{', with results.png beside it' if rows else ''}"
    console.print(f"all that was measured: {kept}", markup=False, highlight=False, soft_wrap=True)


def _side_unit(row: Row) -> str | None:
    return next((key.removeprefix("plain_") for key in row if key.startswith("plain_")), None)


def plot(about: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each family: for each workload the best plain time as 1, and FastInception's ratio to it."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in rows))
    counts = [sum(row["family"] == family for row in rows) for family in families]
    figure = Figure(figsize=(11, 1.6 + 0.34 * sum(counts) + 0.6 * len(families)), layout="constrained")
    axes = figure.subplots(len(families), 1, squeeze=False, height_ratios=[count + 1 for count in counts])
    for axis, family in zip(axes.flat, families, strict=True):
        shown = [row for row in rows if row["family"] == family]
        ratios = [row["ratio"] for row in shown]
        colors = ["#9aa5b1" if ratio < 1 else "#d9480f" for ratio in ratios]
        bars = axis.barh([row["workload"] for row in shown], ratios, color=colors)
        labels = []
        for row in shown:
            unit = _side_unit(row)
            times = f": {row[f'plain_{unit}']:.1f} ({row['plain']}) to {row[f'fast_{unit}']:.1f} {unit}" if unit else ""
            labels.append(f"{row['ratio']:.2f}x{times}")
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.axvline(1, color="#343a40", linewidth=0.8)
        axis.set_xlim(0, 2.2 * max(1.0, *ratios))
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(
            f"{family}: FastInception's speed, the best plain variant measured is 1", loc="left", fontsize=10
        )
        axis.spines[["top", "right"]].set_visible(False)
    title = (
        f"{about['device']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}, "
        f"commit {about['commit']}"
    )
    figure.suptitle(f"DRY RUN on a CPU: no figure of a GPU\n{title}" if about["dry"] else title, fontsize=10)
    figure.savefig(path, dpi=140)
