"""What the rows of the CSV say: a table a suite, and the project's bars with what was measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Callable

from benchmarks.speed.models import STOCK
from llava_projectors.columns import print_columns

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A figure that is to be reached in every row it is about.

    Attributes:
        figure: what it is.
        limit: device -> the bar.
        applies: whether a row is about it.
        value: the figure of a row, given all rows.
        at_least: whether the bar is a floor, not a ceiling.
    """

    figure: str
    limit: dict[str, float]
    applies: Callable[[Row], bool]
    value: Callable[[Row, list[Row]], float]
    at_least: bool = False


def read_rows(path: Path) -> list[Row]:
    """The CSV that `bench` wrote.

    Raises:
        ValueError: the file is something else.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "measured_to_bound" not in rows[0]:
        raise ValueError(f"{path} was not written by `llava-projectors bench`")
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """One CSV, all rows with the columns of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def group_name(row: Row) -> tuple[str, ...]:
    """What the rows of one interleaved run share."""
    return tuple(str(row[column]) for column in ("suite", "measure", "dtype", "batch", "images"))


def bound_reached(row: Row) -> float:
    """The measured speed-up over the baseline, as a part of the speed-up in FLOPs."""
    return float(row["flops_ratio"]) / float(row["ratio"])


def _peak_against(row: Row, other_type: str, rows: list[Row]) -> float:
    other = next(r for r in rows if group_name(r) == group_name(row) and r["type"] == other_type)
    return float(row["peak_mib"]) / float(other["peak_mib"])


def _of(suite: str, prefix: str = "", **values: Any) -> Callable[[Row], bool]:
    def applies(row: Row) -> bool:
        if row["suite"] != suite or row["type"] == STOCK or not str(row["type"]).startswith(prefix):
            return False
        return all(str(row[column]) in allowed for column, allowed in values.items())

    return applies


S2, S3_AND_UP = ["144"], ["64", "36"]  # visual tokens at these strides

BARS = (
    *(
        Bar(
            f"{title} / {STOCK}, time, {strides}",
            {"cpu": limit, "cuda": limit},
            _of("projector", title.lower(), visual_tokens=tokens),
            lambda row, _: float(row["ratio"]),
        )
        for title in ("SAEP", "TokenPacker")
        for strides, tokens, limit in (("s = 2", S2, 1.0), ("s >= 3", S3_AND_UP, 0.8))
    ),
    Bar(
        "TokenPacker / naive, time",
        {"cpu": 0.9, "cuda": 0.6},
        _of("projector", "tokenpacker"),
        lambda row, _: float(row["ratio_to_naive"]),
    ),
    Bar(
        "TokenPacker / naive, peak memory, forward+backward",
        {"cpu": 0.7, "cuda": 0.7},
        _of("projector", "tokenpacker", measure=["forward+backward"]),
        lambda row, rows: _peak_against(row, f"naive {row['type']}", rows),
    ),
    Bar(
        "multi-layer / stock tower, time", {"cpu": 0.98, "cuda": 0.98}, _of("tower"), lambda row, _: float(row["ratio"])
    ),
    Bar(
        "multi-layer / stock tower, peak memory",
        {"cpu": 1.0, "cuda": 1.0},
        _of("tower"),
        lambda row, rows: _peak_against(row, STOCK, rows),
    ),
    *(
        Bar(
            f"{measure}, speed-up as part of the FLOP bound's, 144 and 64 tokens",
            {"cpu": 0.85, "cuda": 0.9},
            _of("model", measure=[measure], visual_tokens=["144", "64"]),
            lambda row, _: bound_reached(row),
            at_least=True,
        )
        for measure in ("prefill", "training step, stage 1", "training step, stage 2")
    ),
    Bar(
        "projector at batch 32, part of the matrix rate",
        {"cuda": 0.6},
        lambda row: _of("projector", batch=["32"])(row) and not row["type"].startswith("naive"),
        lambda row, _: 1 / float(row["measured_to_bound"]),
        at_least=True,
    ),
)


def print_report(rows: Iterable[Row]) -> None:
    """Tables, then bars, for rows of one machine; a quick run's sizes are too small for the bars."""
    rows = list(rows)
    for name, group in groupby(rows, group_name):
        suite, measure, dtype, batch, images = name
        more = f", {images} images a prompt" if images != "1" else ""
        print(f"\n{suite}: {measure}, {dtype}, batch {batch}{more}")
        header = ("type", "tokens", "median", "ratio (quartiles)", "FLOP ratio", "GFLOP", "x bound", "peak MiB")
        print_columns([header, *(_cells(row) for row in group)], "  ")
    bars = list(bar_lines(rows))
    if bars and rows[0]["plan"] != "quick":
        print()
        print_columns([("bar", "limit", "best", "worst", "where the worst is", ""), *bars])


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"{float(row['ratio']):.2f} ({float(row['ratio_q1']):.2f} to {float(row['ratio_q3']):.2f})"
    return (
        row["type"],
        str(row["visual_tokens"]),
        f"{float(row['median_s']) * 1000:.1f} ms",
        spread,
        f"{float(row['flops_ratio']):.2f}",
        f"{float(row['flops']) / 1e9:.1f}",
        f"{float(row['measured_to_bound']):.2f}",
        f"{float(row['peak_mib']):.0f}",
    )


def bar_lines(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Every bar that the rows say something about: figure, limit, best, worst, where, whether it is met everywhere."""
    device = str(rows[0]["device"])
    for bar in BARS:
        found = [(bar.value(row, rows), row) for row in rows if bar.applies(row)]
        if device not in bar.limit or not found:
            continue
        found.sort(key=lambda pair: pair[0], reverse=not bar.at_least)
        (worst, where), (best, _) = found[0], found[-1]
        limit = bar.limit[device]
        met = sum(value >= limit if bar.at_least else value <= limit for value, _ in found)
        place = f"{where['type']}, {where['measure']}, {where['dtype']}, batch {where['batch']}"
        sign = ">=" if bar.at_least else "<="
        state = "met" if met == len(found) else f"met in {met} of {len(found)}"
        yield (bar.figure, f"{sign} {limit:.2f}", f"{best:.2f}", f"{worst:.2f}", place, state)
