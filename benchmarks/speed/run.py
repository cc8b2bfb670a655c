"""Run the suites, write one CSV, print what came out beside the targets."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.speed.candidates import NAIVE, Subject
from benchmarks.speed.report import print_report
from benchmarks.speed.suites import PLANS, SUITES, Group, Plan
from benchmarks.table import write_rows

YARDSTICK = Subject("matrix product")


def choose_device(name: Optional[str]) -> torch.device:
    """The device of this name, or CUDA where there is one.

    Raises:
        ValueError: there is none of this name here, or no plan for it.
    """
    has_cuda = torch.cuda.is_available()
    known = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count() if has_cuda else 0)), *["cuda"] * has_cuda]
    if name is not None and name not in known:
        raise ValueError(f"there is no device {name!r} here: choose from {', '.join(known)}")
    return torch.device(name or ("cuda" if has_cuda else "cpu"))


def bench(suites: Sequence[str], device: torch.device, quick: bool, path: Path) -> int:
    """Measure, write and print; returns the exit status."""
    plan_name = "quick" if quick else device.type
    plan = PLANS[plan_name]
    dtypes, left_out = measure.without_slow_dtypes(plan.dtypes, device)
    plan = replace(plan, dtypes=dtypes)
    facts = {"plan": plan_name, **measure.machine(device)}
    rows: list[dict[str, Any]] = []
    with _silent_models():
        for suite in suites:
            try:
                for row in measure_suite(suite, plan, device):
                    rows.append({**row, **facts})
                    write_rows(path, rows)  # after every row, so that an interrupted run keeps what it has
            except torch.cuda.OutOfMemoryError as error:
                left_out.append(f"the rest of suite {suite}: {str(error).splitlines()[0]}")
            gc.collect()
    if not rows:
        print(*left_out, sep="\n", file=sys.stderr)
        return 1
    print_report(rows)
    for what in left_out:
        print(f"LEFT OUT, {what}")
    print(f"\nWritten to {path}")
    return 0


def measure_suite(suite: str, plan: Plan, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of every group, with progress on stderr."""
    progress = tqdm(SUITES[suite](plan, device), desc=suite, unit=" group")
    for group in progress:
        progress.set_postfix_str(f"{group.measure}, {_dtype(group)}, batch {group.batch}, images {group.images}")
        yield from measure_group(group, device, plan.seconds)


def measure_group(group: Group, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One row for each candidate."""
    group.prepare()
    multiply, matrix_flops = measure.matrix_rate_function(device, group.dtype)
    functions: dict[Subject, measure.Function] = {
        subject: candidate.function for subject, candidate in group.candidates.items()
    }
    times = measure.interleave({YARDSTICK: multiply, **functions}, device, seconds)
    rate = matrix_flops / statistics.median(times.pop(YARDSTICK))
    baseline = next(iter(group.candidates))
    for subject, candidate in group.candidates.items():
        low, middle, high = measure.quartiles(times[subject])
        bound = candidate.flops / rate
        yield {
            "suite": group.suite,
            "measure": group.measure,
            "type": subject.type_string,
            "implementation": subject.implementation,
            "dtype": _dtype(group),
            "batch": group.batch,
            "images": group.images,
            "visual_tokens": candidate.visual_tokens,
            "rounds": len(times[subject]),
            "median_s": _number(middle),
            "q1_s": _number(low),
            "q3_s": _number(high),
            "peak_mib": round(measure.peak_bytes(candidate.memory or candidate.function, device) / 2**20, 1),
            "flops": candidate.flops,
            "matrix_flops_per_s": _number(rate),
            "measured_to_bound": _number(middle / bound),
            "baseline": baseline.type_string,
            **_ratios("ratio", times[subject], times[baseline]),
            "flops_ratio": _number(candidate.flops / group.candidates[baseline].flops),
            **_ratios("ratio_to_naive", times[subject], times.get(subject._replace(implementation=NAIVE))),
        }


def _ratios(column: str, ours: list[float], others: Optional[list[float]]) -> dict[str, str]:
    """Median and quartiles of the ratios within each round."""
    columns = (f"{column}_q1", column, f"{column}_q3")
    if others is None:
        return dict.fromkeys(columns, "")
    return dict(zip(columns, map(_number, measure.quartiles([a / b for a, b in zip(ours, others)]))))


def _dtype(group: Group) -> str:
    return str(group.dtype).removeprefix("torch.")


def _number(value: float) -> str:
    return f"{value:.5g}"


@contextmanager
def _silent_models() -> Iterator[None]:
    """Building models of random weights is nothing to report."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
