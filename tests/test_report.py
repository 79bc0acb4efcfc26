"""What compare.py shows: its tables and their ratios, and the line across precisions."""

from __future__ import annotations

import pytest

from bench import report
from tests.comparisons import row_of


def test_ratios_take_the_best_of_all_plain_rows() -> None:
    speeds = {"plain eager NCHW": 10.0, "plain eager channels_last": 30.0, "plain compiled": 20.0}
    speeds |= {"FastInception compiled": 45.0, report.FLOOR: 50.0}
    found = report.with_ratios([row_of(name, speed) for name, speed in speeds.items()])
    assert [row["ratio_to_plain"] for row in found] == [1.0, 3.0, 2.0, 4.5, 5.0]
    assert [row["ratio_to_best_plain"] for row in found] == [10 / 30, 1.0, 20 / 30, 1.5, 50 / 30]
    assert [row["outside_convolutions"] for row in found] == pytest.approx([0.8, 0.4, 0.6, 0.1, 0.0])


def test_the_cross_precision_line_names_both_precisions_and_its_rows() -> None:
    rows = [
        row_of("plain eager NCHW", 10.0),
        row_of("plain eager NCHW", 20.0, dtype="bf16"),
        row_of("FastInception compiled", 30.0),
        row_of("FastInception compiled", 70.0, dtype="bf16"),
        row_of("FastInception compiled", 900.0, dtype="bf16", mode="training"),
    ]
    line = report.cross_precision("inference", rows)
    assert line is not None
    for words in ("cross-precision", "bf16", "fp32", "7.00x"):
        assert words in line
    assert report.cross_precision("training", rows) is None


def test_a_table_shows_half_the_distance_of_the_quartiles_and_memory_under_its_name() -> None:
    row = row_of(report.BASE, 50.0) | {"spread": [40.0, 60.0], "saved_bytes": 2_000_000, "peak_bytes": 7_000_000}
    (shown,) = report.with_ratios([row, row_of(report.FLOOR, 100.0)])[:1]
    view = report.table("training, fp32", [shown])
    cells = {str(column.header): next(iter(column.cells)) for column in view.columns}
    assert (cells["spread"], cells["outside\nconvs"]) == ("+-20.0%", "50%")
    assert (cells["saved\nMB"], cells["peak\nMB"]) == ("2", "7")
