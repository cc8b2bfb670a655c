"""What the rows of the CSV say: a table per suite, and the project's targets with what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Callable

from benchmarks.speed.candidates import EAGER, NAIVE, PUBLISHED, STOCK
from benchmarks.table import Row
from llava_projectors.commands.columns import print_columns


@dataclass(frozen=True)
class Target:
    """A value of a metric that is to be reached in every row it is about.

    Attributes:
        metric: what is measured.
        limit: device -> the target.
        applies: whether a row is about it.
        value: the metric of a row, given all rows.
        is_minimum: whether the target is to be reached from above.
    """

    metric: str
    limit: dict[str, float]
    applies: Callable[[Row], bool]
    value: Callable[[Row, list[Row]], float]
    is_minimum: bool = False


def group_name(row: Row) -> tuple[str, ...]:
    """What the rows of one interleaved run share."""
    return tuple(str(row[column]) for column in ("suite", "measure", "dtype", "batch", "images"))


def bound_reached(row: Row) -> float:
    """The measured speed-up over the baseline, as a part of the speed-up in FLOPs."""
    return float(row["flops_ratio"]) / float(row["ratio"])


def _peak_against(row: Row, other_type: str, rows: list[Row], implementation: str = EAGER) -> float:
    wanted = (*group_name(row), other_type, implementation)
    peaks = (r["peak_mib"] for r in rows if (*group_name(r), r["type"], r["implementation"]) == wanted)
    return float(row["peak_mib"]) / float(next(peaks, "") or "nan")


def _ratio_to(reference: str, row: Row, rows: list[Row]) -> float:
    return float(row.get(f"ratio_to_{reference}") or "nan")


def _peak_against_reference(reference: str, row: Row, rows: list[Row]) -> float:
    return _peak_against(row, row["type"], rows, reference)


def _of(suite: str, prefix: str = "", **values: Any) -> Callable[[Row], bool]:
    def applies(row: Row) -> bool:
        if row["suite"] != suite or row["type"] == STOCK or row["implementation"] != EAGER:
            return False
        if not str(row["type"]).startswith(prefix):
            return False
        return all(str(row[column]) in allowed for column, allowed in values.items())

    return applies


S2, S3_AND_UP = ["144"], ["64", "36"]  # visual tokens at these strides

TARGETS = (
    *(
        Target(
            f"{title} / {STOCK}, time, {strides}",
            {"cpu": limit, "cuda": limit},
            _of("projector", title.lower(), visual_tokens=tokens),
            lambda row, _: float(row["ratio"]),
        )
        for title in ("SAEP", "TokenPacker")
        for strides, tokens, limit in (("s = 2", S2, 1.0), ("s >= 3", S3_AND_UP, 0.8))
    ),
    *(
        Target(
            f"{title} / {STOCK}, time, s = 2, batch 32, forward+backward",
            {"cuda": limit},
            _of("projector", title.lower(), visual_tokens=S2, batch=["32"], measure=["forward+backward"]),
            lambda row, _: float(row["ratio"]),
        )
        for title, limit in (("SAEP", 0.6), ("TokenPacker", 0.9))
    ),
    *(
        target
        for device, reference, limit in (("cpu", NAIVE, 0.9), ("cuda", PUBLISHED, 0.9))
        for target in (
            Target(
                f"TokenPacker / {reference}, time",
                {device: limit},
                _of("projector", "tokenpacker"),
                partial(_ratio_to, reference),
            ),
            Target(
                f"TokenPacker / {reference}, peak memory, forward+backward",
                {device: 0.7},
                _of("projector", "tokenpacker", measure=["forward+backward"]),
                partial(_peak_against_reference, reference),
            ),
        )
    ),
    Target(
        "multi-layer / stock tower, time", {"cpu": 0.98, "cuda": 0.75}, _of("tower"), lambda row, _: float(row["ratio"])
    ),
    Target(
        "multi-layer / stock tower, peak memory",
        {"cpu": 1.0, "cuda": 1.0},
        _of("tower"),
        lambda row, rows: _peak_against(row, STOCK, rows),
    ),
    *(
        Target(
            f"{measure}, speed-up as part of the FLOP bound's, 144 and 64 tokens",
            {"cpu": 0.85},
            _of("model", measure=[measure], visual_tokens=["144", "64"]),
            lambda row, _: bound_reached(row),
            is_minimum=True,
        )
        for measure in ("prefill", "training step, stage 1", "training step, stage 2")
    ),
    *(
        Target(
            f"{measure}, {images} image(s), speed-up as part of the FLOP bound's, 144 and 64 tokens",
            {"cuda": 0.9},
            _of("model", measure=[measure], visual_tokens=["144", "64"], images=[images]),
            lambda row, _: bound_reached(row),
            is_minimum=True,
        )
        for measure, images in (
            ("prefill", "8"),
            ("prefill, graph", "8"),
            ("training step, stage 1, checkpointing", "1"),
            ("training step, LoRA, checkpointing", "1"),
        )
    ),
)


HEADER = (
    "type", "implementation", "tokens", "median", "ratio (quartiles)", "FLOP ratio", "GFLOP", "x bound", "peak MiB", ""
)  # fmt: skip


def print_report(rows: Iterable[Row]) -> None:
    """Tables, then targets, for rows of one machine; a quick run's sizes are too small for the targets."""
    rows = list(rows)
    for name, group in groupby(rows, group_name):
        suite, measure, dtype, batch, images = name
        more = f", {images} images per prompt" if images != "1" else ""
        print(f"\n{suite}: {measure}, {dtype}, batch {batch}{more}")
        print_columns([HEADER, *(_cells(row) for row in group)], "  ")
    targets = list(target_lines(rows))
    if targets and rows[0]["plan"] != "quick":
        print()
        print_columns([("metric", "target", "best", "worst", "where the worst is", ""), *targets])


def _cells(row: Row) -> tuple[str, ...]:
    def number(column: str, digits: int, factor: float = 1) -> str:
        return f"{float(row[column]) * factor:.{digits}f}" if row[column] != "" else "-"

    rate = f"{number('tokens_per_s', 0)} tokens/s" if row.get("tokens_per_s") else ""
    return (
        row["type"],
        row["implementation"],
        str(row["visual_tokens"]),
        f"{number('median_s', 2, 1000)} ms",
        f"{number('ratio', 2)} ({number('ratio_q1', 2)} to {number('ratio_q3', 2)})",
        number("flops_ratio", 2),
        number("flops", 1, 1e-9),
        number("measured_to_bound", 2),
        number("peak_mib", 0),
        row.get("note") or rate,
    )


def target_lines(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Every target that the rows say something about: metric, target, best, worst, where, whether it is always met."""
    device = str(rows[0]["device"])
    compared = [row for row in rows if row["ratio"] != ""]  # a candidate or its baseline may not have run
    for target in TARGETS:
        found = [(target.value(row, rows), row) for row in compared if device in target.limit and target.applies(row)]
        found = [(value, row) for value, row in found if not math.isnan(value)]
        if not found:
            continue
        found.sort(key=lambda pair: pair[0], reverse=not target.is_minimum)
        (worst, where), (best, _) = found[0], found[-1]
        limit = target.limit[device]
        met = sum(value >= limit if target.is_minimum else value <= limit for value, _ in found)
        place = f"{where['type']}, {where['measure']}, {where['dtype']}, batch {where['batch']}"
        sign = ">=" if target.is_minimum else "<="
        state = "met" if met == len(found) else f"met in {met} of {len(found)}"
        yield (target.metric, f"{sign} {limit:.2f}", f"{best:.2f}", f"{worst:.2f}", place, state)
